"""The ``fastvit`` command (``python -m fastvit`` is the same)."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number}; accepted: 0 to 2^32 - 1")
    return number


def _lacks(command: str, *modules: str, extra: str | None = None) -> bool:
    """Say which of the modules that a command needs is missing, and what installs it."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            package = {"PIL": "Pillow"}.get(name, name)
            why = f"{package} is not installed (pip install 'fastvit[{extra or command}]')"
            print(f"fastvit {command} can't run: {why}", file=sys.stderr)
            return True
    return False


def _size(arguments: argparse.Namespace) -> tuple[int, int] | None:
    size = arguments.size
    if size is not None and len(size) > 2:
        raise ValueError(f"--size {' '.join(map(str, size))}: accepted: one number, or height and width")
    return None if size is None else (size[0], size[-1])


def _env(arguments: argparse.Namespace) -> int:
    from fastvit import env

    found = env.report()
    print(json.dumps(found, indent=2) if arguments.json else env.render(found))
    return 0


def _models(arguments: argparse.Namespace) -> int:
    import fastvit

    names = fastvit.list_models(arguments.filter)
    if not names:
        print(f"no model name contains {arguments.filter!r}; `fastvit models` lists all")
        return 1
    print("\n".join(names))
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from fastvit.ops import backends

    if backends.TRITON_MISSING is not None:
        print(f"fastvit tune can't run: {backends.TRITON_MISSING}", file=sys.stderr)
        return 2
    from fastvit.tuning import tune

    return tune.main(arguments)


def _convert(arguments: argparse.Namespace) -> int:
    from fastvit.checkpoints import convert

    try:
        convert(arguments.source, arguments.target, arguments.to, arguments.num_heads)
    except (ValueError, OSError) as error:
        print(f"fastvit convert: {error}", file=sys.stderr)
        return 2
    print(f"saved {arguments.target}")
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    if _lacks("embed", "PIL"):
        return 2
    import torch

    from fastvit.training.embed import embed

    try:
        count, unreadable = embed(
            arguments.source, arguments.weights, arguments.out, size=_size(arguments), mean=arguments.mean,
            std=arguments.std, batch=arguments.batch, threads=arguments.threads, dtype=getattr(torch, arguments.dtype),
            parquet=arguments.parquet,
        )  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        print(f"fastvit embed: {error}", file=sys.stderr)
        return 2
    if count or unreadable:
        print(f"{count} images, {unreadable} unreadable; saved {arguments.out}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    if _lacks("inspect", "matplotlib", "PIL"):
        return 2
    from fastvit.analysis.inspect import inspect

    try:
        found = inspect(
            arguments.images, arguments.weights, arguments.out, size=_size(arguments), mean=arguments.mean,
            std=arguments.std, num_heads=arguments.num_heads,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"fastvit inspect: {error}", file=sys.stderr)
        return 2
    for name, result in found.items():
        print(f"no picture of {name}: {result}" if isinstance(result, str) else f"saved {result}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    if _lacks("train", "torchvision", extra="train"):
        return 2
    from fastvit.training import build

    return build.main(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    if _lacks("evaluate", "torchvision", extra="train"):
        return 2
    from fastvit.training import evaluate

    return evaluate.main(arguments)


def _pretrain(arguments: argparse.Namespace) -> int:
    if _lacks("pretrain", "torchvision", extra="train"):
        return 2
    from fastvit.training.pretrain import build

    return build.main(arguments)


def _add_run_options(command: argparse.ArgumentParser) -> None:
    """How a run of the training loop is done, whatever it trains."""
    command.add_argument("--set", nargs="+", default=[], action="extend", metavar="FIELD=VALUE", help="of the recipe")
    command.add_argument("--steps", type=_positive, metavar="N", help="in place of the recipe's steps or epochs")
    command.add_argument("--seed", type=_seed, default=0, metavar="N")
    command.add_argument("--checkpoint-every", type=_positive, default=500, metavar="STEPS", help="(default: 500)")
    command.add_argument(
        "--evaluate-every", type=_positive, metavar="STEPS", help="by default only after the last step"
    )
    command.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    command.add_argument(
        "--fsdp", action="store_true", help="under torchrun: shard the model (FSDP2), not copy it (DDP)"
    )


def _add_pixels(command: argparse.ArgumentParser) -> None:
    """How pixels are normalised."""
    for name in ("--mean", "--std"):
        told = "of the pixels, 0 to 1, one or one of each channel; by default as WEIGHTS' folder says, else 0.5"
        command.add_argument(name, nargs="+", type=float, metavar="X", help=told)


def parser() -> argparse.ArgumentParser:
    """The command line, so that ``--help`` suffices."""
    top = argparse.ArgumentParser(
        prog="fastvit",
        description="Vision Transformers on hand-written kernels. Use from Python: from fastvit import ViT.",
        epilog="`make bench` and `python -m benchmarks --help`, in a clone, compare it with other libraries.",
    )
    top.add_argument("--version", action="version", version=f"fastvit {importlib.metadata.version('fastvit')}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    env = commands.add_parser(
        "env",
        help="device, versions, and which backend can run each op here",
        description="Print the device, the versions, and for every op which backends are available and why not the "
        "others. Put this into a bug report.",
    )
    env.add_argument("--json", action="store_true", help="as JSON; a backend's value is null, or why it can't run")
    env.set_defaults(run=_env)

    models = commands.add_parser(
        "models",
        help="names that fastvit.create_model takes",
        description="List the names that fastvit.create_model takes. It also takes the papers' names, ViT-B/16, "
        "ViT-L/14-384 or R50x1, and any image size for a ViT.",
    )
    models.add_argument("filter", nargs="?", default="", help="only names that match, for example base")
    models.set_defaults(run=_models)

    tune = commands.add_parser(
        "tune",
        help="measure tiles on this GPU: a table that goes before the shipped ones",
        description="Compile, check and time tiles for every kernel of the models given, on this GPU, and write the "
        "fastest into a table in the cache folder (FASTVIT_CACHE, default ~/.cache/fastvit), which fastvit reads from "
        "then on. A run that is interrupted goes on where it was.",
    )
    tune.add_argument(
        "--backend",
        choices=("triton", "cuda"),
        default="triton",
        help="cuda: for each product of a linear layer, whether the CUDA kernel or cuBLASLt runs it",
    )
    tune.add_argument("--models", nargs="+", metavar="NAME", default=["vit_base_patch16_224"])
    tune.add_argument("--batch", nargs="+", type=_positive, metavar="N", default=[256, 32, 1])
    tune.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"])
    which = tune.add_mutually_exclusive_group()
    which.add_argument("--training", action="store_const", const=True, help="the training step only (default: both)")
    which.add_argument(
        "--inference", dest="training", action="store_const", const=False, help="inference only (default: both)"
    )
    tune.add_argument("--out", metavar="PATH", help="a .json file, or a folder for one named after the GPU")
    tune.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing after it")
    tune.add_argument("--most", type=_positive, metavar="N", help="at most N candidates for each problem")
    tune.add_argument("--dry-run", action="store_true", help="list problems and numbers of candidates, run nothing")
    tune.add_argument("--arch", type=int, metavar="N", help="with --dry-run: as on this compute capability, 90 say")
    tune.set_defaults(run=_tune)

    convert = commands.add_parser(
        "convert",
        help="weights from one library's layout to another's",
        description="Read weights in any layout that fastvit knows (timm, torchvision, Hugging Face, DINOv2, DINOv3, "
        "BEiT, CLIP, SigLIP, OpenCLIP, MAE, Google's .npz) and write them in another. Values stay what they are, bit "
        "for bit.",
    )
    convert.add_argument("source", metavar="SOURCE", help="a file, a folder of Hugging Face, or hf-hub:org/name")
    convert.add_argument(
        "target", metavar="TARGET", help=".safetensors, .pth, .npz for npz, or a folder for huggingface"
    )
    convert.add_argument(
        "--to",
        default="timm",
        metavar="LAYOUT",
        help="timm (the default, and fastvit's own), torchvision, huggingface, huggingface-5 (names since transformers "
        "5), or npz; in Hugging Face's a TARGET without a suffix is a folder with a config.json, as from_pretrained "
        "takes it",
    )
    convert.add_argument(
        "--num-heads", type=_positive, metavar="N", help="attention heads, which an .npz and a folder need"
    )
    convert.set_defaults(run=_convert)

    embed = commands.add_parser(
        "embed",
        help="features of a folder, .tar or .parquet of images",
        description="Write the features of every image to OUT/features.npy (OUT/keys.txt has the names, "
        "OUT/unreadable.txt what could not be decoded). A run that is cut off goes on where it was; under torchrun it "
        "takes as many processes as there are: torchrun --nproc-per-node 8 -m fastvit embed ...",
    )
    embed.add_argument("source", metavar="SOURCE", help="a folder, a .tar, or a .parquet with a column of images")
    embed.add_argument("--weights", required=True, help="a file, a folder of Hugging Face, or hf-hub:org/name")
    embed.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    embed.add_argument("--size", nargs="+", type=_positive, metavar="PIXELS", help="one, or height and width")
    _add_pixels(embed)
    embed.add_argument("--batch", type=_positive, default=64, metavar="N", help="images at a time (default: 64)")
    embed.add_argument("--threads", type=_positive, default=4, metavar="N", help="that decode images (default: 4)")
    embed.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    embed.add_argument("--parquet", action="store_true", help="write OUT/features.parquet too")
    embed.set_defaults(run=_embed)

    inspect = commands.add_parser(
        "inspect",
        help="pictures of what a model has learned and what it attends to",
        description="Draw OUT/filters.png (principal components of the patch embedding's filters), positions.png "
        "(similarity of position embeddings), attention_distance.png (mean attention distance of every head, over the "
        "images given) and rollout.png (attention rollout over each image): figures 6, 7 and 10 of the ViT paper.",
    )
    inspect.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    inspect.add_argument("--weights", required=True, help="a file, a folder of Hugging Face, or hf-hub:org/name")
    inspect.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures")
    inspect.add_argument("--size", nargs="+", type=_positive, metavar="PIXELS", help="one, or height and width")
    _add_pixels(inspect)
    inspect.add_argument(
        "--num-heads", type=_positive, metavar="N", help="attention heads; a guess from the width is printed"
    )
    inspect.set_defaults(run=_inspect)

    train = commands.add_parser(
        "train",
        help="train or fine-tune a model on labelled images",
        description="Train by a recipe of the ViT paper, or one of ours; weights, metrics and log go to DIR. The "
        "same command goes on where a run was cut off. Under torchrun the processes share each batch: torchrun "
        "--nproc-per-node 8 -m fastvit train ... See docs/training.md.",
    )
    train.add_argument("--data", required=True, help="digits, cifar10[:FOLDER], ..., a folder, .tar, .parquet, hf:NAME")
    train.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    train.add_argument("--recipe", metavar="NAME", help="by default the data set's; digits, vit_imagenet, ...")
    train.add_argument("--model", metavar="NAME", help="by default the recipe's; see `fastvit models`")
    train.add_argument("--weights", help="to start from: a file, a folder (OUT of another run), or hf-hub:org/name")
    _add_run_options(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy of a classifier, or of probes on its features",
        description="Print the accuracy on the test set: of the classifier, or with --probe of a least-squares probe "
        "(few-shot, section 4.1 of the ViT paper) or of nearest neighbours (knn) on the features that it reads.",
    )
    evaluate.add_argument("--weights", required=True, help="a file, a folder (OUT of `fastvit train`), or hf-hub:name")
    evaluate.add_argument("--data", required=True, help="as in `fastvit train`")
    evaluate.add_argument("--probe", choices=("few-shot", "knn"), help="by default the classifier is judged")
    evaluate.add_argument("--shots", type=_positive, metavar="N", help="training images of a class (default: all)")
    evaluate.add_argument(
        "--whole", action="store_true", help="DATA is for testing alone: no tenth is held out, no training set opened"
    )
    evaluate.add_argument("--real", metavar="FILE", help="ReaL's real.json, for images of ImageNet's validation set")
    evaluate.add_argument("--size", type=_positive, metavar="PIXELS", help="a side; by default the model's")
    _add_pixels(evaluate)
    evaluate.add_argument("--middle", action="store_true", help="of each image 224 of 256 pixels, as for ImageNet")
    evaluate.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    evaluate.set_defaults(run=_evaluate)

    pretrain = commands.add_parser(
        "pretrain",
        help="pre-train a model on images without labels",
        description="Pre-train by masked patch prediction (the ViT paper's appendix B.1.2) or as BEiT; `fastvit train "
        "--weights DIR` then fine-tunes. As for `fastvit train`, the same command goes on where a run was cut off, and "
        "torchrun shares each batch. See docs/pretraining.md.",
    )
    pretrain.add_argument(
        "--method",
        required=True,
        choices=("masked", "beit", "tokenizer"),
        help="beit needs a tokenizer, which the method of that name trains, and beit itself where none is given",
    )
    pretrain.add_argument("--data", required=True, help="as `fastvit train` takes it; labels are not looked at")
    pretrain.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    pretrain.add_argument("--model", metavar="NAME", help="by default the recipe's")
    pretrain.add_argument(
        "--target",
        choices=("colour", "colours", "pixels"),
        help="of masked: the mean colour of a patch (default), of 4 x 4 parts of it, or all its pixels by L2",
    )
    pretrain.add_argument(
        "--share",
        type=float,
        metavar="X",
        help="of masked: of the patches that are corrupted (default: 0.5); of beit: of those masked, at most (0.4)",
    )
    pretrain.add_argument("--tokenizer", metavar="DIR", help="of beit: OUT of a run of --method tokenizer")
    pretrain.add_argument(
        "--codes", type=_positive, metavar="N", help="of tokenizer, and of beit's own: size of the vocabulary"
    )
    _add_run_options(pretrain)
    pretrain.set_defaults(run=_pretrain)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit status."""
    top = parser()
    arguments = top.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what is guessed, resampled, held out, say
    if not hasattr(arguments, "run"):
        top.print_help()
        return 0
    status: int = arguments.run(arguments)
    return status

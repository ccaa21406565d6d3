"""The ``fastvit`` command (``python -m fastvit`` is the same): for each command, its options and what it runs."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

WEIGHTS = "a file, a folder of Hugging Face or of `fastvit train`, or hf-hub:org/name"
# Messages of these errors are for users: one line, no traceback.
FOR_USERS = (ValueError, OSError, ImportError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit status."""
    top = parser()
    options = vars(top.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what is guessed, resampled, held out, say
    command, run = options.pop("command"), options.pop("run", top.print_help)
    try:
        status: int | None = run(**options)
    except (*FOR_USERS, KeyboardInterrupt, RuntimeError) as error:
        message = str(error) or "interrupted"
        if type(error).__name__ == "OutOfMemoryError" and "settings" in options:  # torch's
            message += "\nFewer images at a time need less: --set micro_batch=64"
        elif not isinstance(error, (*FOR_USERS, KeyboardInterrupt)):
            raise
        print(f"fastvit {command}: {message}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    return status or 0


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    top = ArgumentParser(
        prog="fastvit",
        description="Vision Transformers on hand-written kernels. Use from Python: from fastvit import ViT.",
        epilog="`make bench` and `python -m benchmarks --help`, in a clone, compare it with other libraries.",
    )
    top.add_argument("--version", action="version", version=f"fastvit {importlib.metadata.version('fastvit')}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for add in (_env, _models, _tune, _convert, _embed, _inspect, _train, _evaluate, _pretrain):
        add(commands)
    return top


def _env(commands: Any) -> None:
    command = commands.add_parser(
        "env",
        help="device, versions, and which backend can run each op here",
        description="Print the device, the versions, and for every op which backends are available and why not the "
        "others. Put this into a bug report.",
    )
    command.add_argument("--json", dest="as_json", action="store_true", help="backends: null, or why one can't run")

    def run(as_json: bool) -> None:
        from fastvit import env

        found = env.report()
        print(json.dumps(found, indent=2) if as_json else env.render(found))

    command.set_defaults(run=run)


def _models(commands: Any) -> None:
    command = commands.add_parser(
        "models",
        help="names that fastvit.create_model takes",
        description="List the names that fastvit.create_model takes. It also takes the papers' names, ViT-B/16, "
        "ViT-L/14-384 or R50x1, and any image size for a ViT.",
    )
    command.add_argument("filter", nargs="?", default="", help="only names that match, for example base")

    def run(filter: str) -> int:
        import fastvit

        names = fastvit.list_models(filter)
        print("\n".join(names) or f"no model name contains {filter!r}; `fastvit models` lists all")
        return 0 if names else 1

    command.set_defaults(run=run)


def _tune(commands: Any) -> None:
    command = commands.add_parser(
        "tune",
        help="measure tiles on this GPU: a table that goes before the shipped ones",
        description="Compile, check and time tiles for every kernel of the models, on this GPU, and write the "
        "fastest into a table in the cache folder (FASTVIT_CACHE, default ~/.cache/fastvit), which fastvit reads from "
        "then on. A run that is interrupted goes on where it was.",
    )
    command.add_argument(
        "--backend",
        choices=("triton", "cuda"),
        default="triton",
        help="cuda: for each product of a linear layer, whether the CUDA kernel or cuBLASLt runs it",
    )
    command.add_argument("--models", nargs="+", metavar="NAME", default=["vit_base_patch16_224"])
    command.add_argument("--batch", nargs="+", type=_positive, metavar="N", default=[256, 32, 1])
    command.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"])
    which = command.add_mutually_exclusive_group()
    which.add_argument("--training", action="store_const", const=True, help="the training step only (default: both)")
    which.add_argument("--inference", dest="training", action="store_const", const=False, help="inference only")
    command.add_argument("--out", metavar="PATH", help="a .json file, or a folder for one named after the GPU")
    command.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing after it")
    command.add_argument("--most", type=_positive, metavar="N", help="at most N candidates for each problem")
    command.add_argument("--dry-run", action="store_true", help="list problems and numbers of candidates, run nothing")
    command.add_argument("--arch", type=int, metavar="N", help="with --dry-run: as on this compute capability, 90 say")

    def run(**options: Any) -> int:
        from fastvit.ops import backends

        if backends.TRITON_MISSING is not None:
            raise ImportError(backends.TRITON_MISSING)
        from fastvit.tuning import tune

        return tune.main(argparse.Namespace(**options))

    command.set_defaults(run=run)


def _convert(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="weights from one library's layout to another's",
        description="Read weights in any layout that fastvit knows (timm, torchvision, Hugging Face, DINOv2, DINOv3, "
        "BEiT, CLIP, SigLIP, OpenCLIP, MAE, Google's .npz) and write them in another. Values stay what they are, bit "
        "for bit.",
    )
    command.add_argument("source", metavar="SOURCE", help=WEIGHTS)
    command.add_argument("target", metavar="TARGET", help=".safetensors, .pth, .npz for npz, or a folder")
    command.add_argument(
        "--to",
        default="timm",
        metavar="LAYOUT",
        help="timm (the default, and fastvit's own), torchvision, huggingface, huggingface-5 (names since transformers "
        "5), or npz; in Hugging Face's a TARGET without a suffix is a folder with a config.json, as from_pretrained "
        "takes it",
    )
    command.add_argument("--num-heads", type=_positive, metavar="N", help="heads, which an .npz and a folder need")

    def run(source: str, target: str, to: str, num_heads: int | None) -> None:
        from fastvit.checkpoints import convert

        convert(source, target, to, num_heads)
        print(f"saved {target}")

    command.set_defaults(run=run)


def _embed(commands: Any) -> None:
    command = commands.add_parser(
        "embed",
        help="features of a folder, .tar or .parquet of images",
        description="Write the features of every image to OUT/features.npy (OUT/keys.txt has the names, "
        "OUT/unreadable.txt what could not be decoded). A run that is cut off goes on where it was; under torchrun it "
        "takes as many processes as there are: torchrun --nproc-per-node 8 -m fastvit embed ...",
    )
    command.add_argument("source", metavar="SOURCE", help="a folder, a .tar, or a .parquet with a column of images")
    _add_weights_and_size(command)
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    command.add_argument("--batch", type=_positive, default=64, metavar="N", help="images at a time (default: 64)")
    command.add_argument("--threads", type=_positive, default=4, metavar="N", help="that decode images (default: 4)")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    command.add_argument("--parquet", action="store_true", help="write OUT/features.parquet too")

    def run(out: str, size: list[int] | None, dtype: str, **options: Any) -> None:
        _require("PIL", extra="embed")
        import torch

        from fastvit.training.embed import embed

        count, unreadable = embed(out=out, size=_size(size), dtype=getattr(torch, dtype), **options)
        if count or unreadable:
            print(f"{count} images, {unreadable} unreadable; saved {out}")

    command.set_defaults(run=run)


def _inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="pictures of what a model has learned and what it attends to",
        description="Draw OUT/filters.png (principal components of the patch embedding's filters), positions.png "
        "(similarity of position embeddings), attention_distance.png (mean attention distance of every head, over the "
        "images given) and rollout.png (attention rollout over each image): figures 6, 7 and 10 of the ViT paper.",
    )
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    _add_weights_and_size(command)
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures")
    command.add_argument("--num-heads", type=_positive, metavar="N", help="by default a guess, which is printed")

    def run(size: list[int] | None, **options: Any) -> None:
        _require("matplotlib", "PIL", extra="inspect")
        from fastvit.analysis.inspect import inspect

        for name, result in inspect(size=_size(size), **options).items():
            print(f"no picture of {name}: {result}" if isinstance(result, str) else f"saved {result}")

    command.set_defaults(run=run)


def _train(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        help="train or fine-tune a model on labelled images",
        description="Train by a recipe of the ViT paper, or one of ours; weights, metrics and log go to DIR. The "
        "same command goes on where a run was cut off. Under torchrun the processes share each batch: torchrun "
        "--nproc-per-node 8 -m fastvit train ... See docs/explanation/training.md.",
    )
    command.add_argument("--data", required=True, help="digits, cifar10[:FOLDER], a folder, .tar, .parquet, hf:NAME")
    command.add_argument("--recipe", metavar="NAME", help="by default the data set's; digits, vit_imagenet, ...")
    command.add_argument("--model", metavar="NAME", help="by default the recipe's; see `fastvit models`")
    command.add_argument("--weights", help="to start from: a file, a folder (OUT of another run), or hf-hub:org/name")
    _add_run_options(command)

    def run(**options: Any) -> None:
        _require("torchvision", extra="train")
        from fastvit.training.build import train

        found = train(**_run_options(options))
        _print_once(f"test accuracy: {found['test']['accuracy']:.2%}")

    command.set_defaults(run=run)


def _evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="accuracy of a classifier, or of probes on its features",
        description="Print the accuracy on the test set: of the classifier, or with --probe of a least-squares probe "
        "(few-shot, section 4.1 of the ViT paper) or of nearest neighbours (knn) on the features that it reads.",
    )
    command.add_argument("--weights", required=True, help=WEIGHTS)
    command.add_argument("--data", required=True, help="as in `fastvit train`")
    command.add_argument("--probe", choices=("few-shot", "knn"), help="by default the classifier is judged")
    command.add_argument("--shots", type=_positive, metavar="N", help="training images of a class (default: all)")
    command.add_argument("--whole", action="store_true", help="test on all of DATA, and open no training set")
    command.add_argument("--real", metavar="FILE", help="ReaL's real.json, for images of ImageNet's validation set")
    command.add_argument("--size", type=_positive, metavar="PIXELS", help="a side; by default the model's")
    _add_pixels(command)
    command.add_argument("--middle", action="store_true", help="of each image 224 of 256 pixels, as for ImageNet")
    command.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")

    def run(**options: Any) -> None:
        _require("torchvision", extra="train")
        from fastvit.training import evaluate

        evaluate.main(**options)

    command.set_defaults(run=run)


def _pretrain(commands: Any) -> None:
    command = commands.add_parser(
        "pretrain",
        help="pre-train a model on images without labels",
        description="Pre-train by masked patch prediction (the ViT paper's appendix B.1.2) or as BEiT; `fastvit train "
        "--weights DIR` then fine-tunes. As for `fastvit train`, the same command goes on where a run was cut off, and "
        "torchrun shares each batch. See docs/explanation/pretraining.md.",
    )
    command.add_argument(
        "--method",
        required=True,
        choices=("masked", "beit", "tokenizer"),
        help="beit needs a tokenizer: that of --tokenizer (trained by the method of that name), or one that it trains",
    )
    command.add_argument("--data", required=True, help="as `fastvit train` takes it; labels are not looked at")
    command.add_argument("--model", metavar="NAME", help="by default the recipe's")
    command.add_argument(
        "--target",
        choices=("colour", "colours", "pixels"),
        help="of masked: the mean colour of a patch (default), of 4 x 4 parts of it, or all its pixels by L2",
    )
    command.add_argument(
        "--share",
        type=float,
        metavar="X",
        help="of masked: of the patches that are corrupted (default: 0.5); of beit: of those masked, at most (0.4)",
    )
    command.add_argument("--tokenizer", metavar="DIR", help="of beit: OUT of a run of --method tokenizer")
    command.add_argument("--codes", type=_positive, metavar="N", help="of tokenizer and beit: size of the vocabulary")
    _add_run_options(command)

    def run(**options: Any) -> None:
        _require("torchvision", extra="train")
        from fastvit.training.pretrain.build import pretrain

        found = pretrain(**_run_options(options))
        _print_once(", ".join(f"test {name}: {value:.4f}" for name, value in found["test"].items()))

    command.set_defaults(run=run)


# -- options that commands share --------------------------------------------------------------------------------------


def _add_run_options(command: ArgumentParser) -> None:
    """Add the options of a run of the training loop, whatever it trains."""
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    command.add_argument(
        "--set", dest="settings", nargs="+", default=[], action="extend", metavar="FIELD=VALUE", help="of a recipe"
    )
    command.add_argument("--steps", type=_positive, metavar="N", help="in place of the recipe's steps or epochs")
    command.add_argument("--seed", type=_seed, default=0, metavar="N")
    command.add_argument("--checkpoint-every", type=_positive, default=500, metavar="STEPS", help="(default: 500)")
    command.add_argument("--evaluate-every", type=_positive, metavar="STEPS", help="(default: at the end)")
    command.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    command.add_argument("--fsdp", action="store_true", help="under torchrun: FSDP2 in place of DDP")


def _run_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of ``train`` and ``pretrain`` with those that don't change a run's results put together."""
    from fastvit.training.loop import Options

    names = ("checkpoint_every", "evaluate_every", "workers", "fsdp")
    options["options"] = Options(**{name: options.pop(name) for name in names})
    return options


def _print_once(line: str) -> None:
    """Print in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def _add_weights_and_size(command: ArgumentParser) -> None:
    command.add_argument("--weights", required=True, help=WEIGHTS)
    command.add_argument("--size", nargs="+", type=_positive, metavar="PIXELS", help="one, or height and width")
    _add_pixels(command)


def _add_pixels(command: ArgumentParser) -> None:
    """Add the options that say how pixels are normalised."""
    text = "of the pixels, 0 to 1, one or one of each channel; by default as WEIGHTS' folder says, else 0.5"
    for name in ("--mean", "--std"):
        command.add_argument(name, nargs="+", type=float, metavar="X", help=text)


def _size(size: list[int] | None) -> tuple[int, int] | None:
    if size is not None and len(size) > 2:
        raise ValueError(f"--size {' '.join(map(str, size))}: accepted: one number, or height and width")
    return None if size is None else (size[0], size[-1])


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


def _require(*modules: str, extra: str) -> None:
    """Raise an ImportError that names the first missing module, and what installs it."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"{'Pillow' if name == 'PIL' else name} is not installed (pip install 'fastvit[{extra}]')"
            )

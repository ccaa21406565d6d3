"""Counts from shapes: launches, bytes, memory for backward, FLOPs, floors, and table 6 of the ViT paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastvit
from benchmarks import roofline
from fastvit.triton import launch
from fastvit.tuning import compile_report, flops

MODELS = (
    "vit_base_patch32_224",
    "vit_base_patch16_224",
    "vit_large_patch32_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
)
MODEL, BATCH, DTYPE = "vit_base_patch16_224", 256, torch.bfloat16  # whose block is counted
Fusions = Sequence[tuple[str, Sequence[str]]]
SCALES: dict[str, dict[str, Any]] = {"plain": {}, "LayerScale": {"init_values": 1e-5}}

# What each fusion puts together, and the modules that, when a hook watches them, keep it apart: of a block, of a model.
BLOCK_FUSIONS = (
    ("attention", ("attn.attn_drop",)),
    ("GELU into fc1", ("mlp.act",)),
    ("residual adds into proj, fc2", ("ls1", "ls2")),
)
MODEL_FUSIONS = (
    ("patch embedding", ("patch_embed.proj",)),
    ("last block: class token only", ("norm",)),
)
Row6 = tuple[str, str, int, int]

# Table 6 of Dosovitskiy et al., 2021: (the paper's name, the model's, epochs of JFT-300M, exaFLOPs).
TABLE6: tuple[Row6, ...] = (
    ("ViT-B/32", "ViT-B/32", 7, 164),
    ("ViT-B/16", "ViT-B/16", 7, 743),
    ("ViT-L/32", "ViT-L/32", 7, 574),
    ("ViT-L/16", "ViT-L/16", 7, 2586),
    ("ViT-L/16", "ViT-L/16", 14, 5172),
    ("ViT-H/14", "ViT-H/14", 14, 12826),
    ("ResNet50x1", "R50x1", 7, 150),
    ("ResNet50x2", "R50x2", 7, 592),
    ("ResNet101x1", "R101x1", 7, 285),
    ("ResNet152x1", "R152x1", 7, 427),
    ("ResNet152x2", "R152x2", 7, 1681),
    ("ResNet152x2", "R152x2", 14, 3362),
    ("ResNet200x3", "R200x3", 14, 10212),
    ("R50x1+ViT-B/32", "R50+ViT-B/32", 7, 315),
    ("R50x1+ViT-B/16", "R50+ViT-B/16", 7, 855),
    ("R50x1+ViT-L/32", "R50+ViT-L/32", 7, 725),
    ("R50x1+ViT-L/16", "R50+ViT-L/16", 7, 2704),
    ("R50x1+ViT-L/16", "R50+ViT-L/16", 14, 5165),
)
JFT_IMAGES = 303e6  # section 4.1
REFERENCE = "ViT-B/32"  # the row that the paper's unit is fitted to


def _meta(name: str, **options: Any) -> Any:
    return fastvit.create_model(name, device="meta", dtype=DTYPE, **options)


def _images(name: str, batch: int) -> Tensor:
    return torch.empty(batch, 3, *_meta(name, depth=1).patch_embed.img_size, device="meta", dtype=DTYPE)


def _tokens(model: Any, batch: int, **options: Any) -> Tensor:
    """Return the input of the model's blocks."""
    shape = batch, model.patch_embed.num_patches + model.num_prefix_tokens, model.embed_dim
    return torch.empty(shape, dtype=DTYPE, **options)


def _forward(block: nn.Module, x: Tensor, arch: int = 90) -> compile_report.Trace:
    with compile_report.trace(arch) as trace, torch.no_grad():
        block.eval()(x)
    return trace


def _training_step(block: nn.Module, x: Tensor, arch: int = 90) -> compile_report.Trace:
    x = x.detach().requires_grad_()
    with compile_report.trace(arch) as trace:
        y = block.train()(x)
        torch.autograd.grad(y, [x, *block.parameters()], torch.empty_like(y))
    return trace


def launches_and_bytes(models: Iterable[str]) -> dict[str, Any]:
    """Count launches of a block (the most over architectures and LayerScale) and of the models, and bytes moved."""
    blocks = {}
    for name, options in SCALES.items():
        model = _meta(MODEL, depth=1, **options)
        blocks[name] = model.blocks[0], _tokens(model, BATCH, device="meta")
    whole = _meta(MODEL)
    every = [_forward(*block, arch).count for block in blocks.values() for arch in launch.ARCHITECTURES]
    return {
        "launches_per_block": max(every),
        "launches_per_training_block": {
            f"sm_{arch}": _training_step(*blocks["plain"], arch).count for arch in launch.ARCHITECTURES
        },
        "launches_per_model": {name: _forward(_meta(name), _images(name, BATCH)).count for name in models},
        "bytes_per_block": {
            "forward": {name: _forward(*block).moved for name, block in blocks.items()},
            "training": {name: _training_step(*block).moved for name, block in blocks.items()},
        },
        "waterfall": {
            **{name: _waterfall(*block, BLOCK_FUSIONS) for name, block in blocks.items()},
            "model": _waterfall(whole, _images(MODEL, BATCH), _model_fusions(len(whole.blocks))),
        },
    }


def _waterfall(module: nn.Module, x: Tensor, fusions: Fusions) -> list[dict[str, Any]]:
    """Count launches and bytes of our forward with every op apart, then with one fusion after the other."""
    hooks = {
        name: [module.get_submodule(path).register_forward_hook(lambda *_: None) for path in paths]
        for name, paths in fusions
    }
    steps = []
    with compile_report.without_notes():
        for name in ("every op apart", *hooks):
            for hook in hooks.get(name, ()):
                hook.remove()
            steps.append({"fused": name, **_cost(_forward(module, x))})
    return steps


def _model_fusions(depth: int) -> Fusions:
    in_blocks = [
        (name, [f"blocks.{i}.{path}" for i in range(depth) for path in paths]) for name, paths in BLOCK_FUSIONS
    ]
    return [*in_blocks, *MODEL_FUSIONS]


def _cost(trace: compile_report.Trace) -> dict[str, int]:
    return {"launches": trace.count, "bytes": trace.moved}


def timm_eager() -> dict[str, dict[str, int]]:
    """Count launches and bytes of timm's eager forward, its ATen ops but views: of the block and of the model."""
    found = {}
    for name, options in SCALES.items():
        with _fake_timm(MODEL, depth=1, **options) as model:
            found[name] = _cost(_forward(model.blocks[0], _tokens(model, BATCH)))
    images = _images(MODEL, BATCH)
    with _fake_timm(MODEL) as model:
        found["model"] = _cost(_forward(model, torch.empty(images.shape, dtype=DTYPE)))
    return found


@contextmanager
def _fake_timm(name: str, **options: Any) -> Iterator[Any]:
    """Yield timm's model, whose ops run inside as on a CPU, but on tensors without data."""
    model = timm.create_model(name, device="meta", dtype=DTYPE, **options)
    with FakeTensorMode():
        for module in model.modules():
            for key, p in module.named_parameters(recurse=False):
                module.register_parameter(key, nn.Parameter(torch.empty(p.shape, dtype=p.dtype)))
        yield model


def _saved(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that the forward keeps for backward, per item of the batch."""
    with fastvit.backend("triton" if x.is_meta else "auto"):
        return compile_report.saved_bytes(model, partial(model, x.detach().requires_grad_())) // x.shape[0]


def saved(models: Iterable[str]) -> dict[str, Any]:
    """Count bytes kept for backward per image, ours beside timm's: of the block, and of whole models."""
    found: dict[str, dict[str, dict[str, Any]]] = {"block": {}, "model": {}}

    def note(kind: str, name: str, ours: int, timms: int) -> None:
        found[kind][name] = {"fastvit": ours, "timm": timms, "ratio": ours / timms}

    for name, options in SCALES.items():
        model = _meta(MODEL, depth=1, **options)
        ours = _saved(model.blocks[0], _tokens(model, 2, device="meta"))
        with _fake_timm(MODEL, depth=1, **options) as contender:
            timms = _saved(contender.blocks[0], _tokens(contender, 2))
        note("block", name, ours, timms)
    for name in models:
        images = _images(name, 2)
        ours = _saved(_meta(name), images)
        with _fake_timm(name) as contender:
            timms = _saved(contender, torch.empty(images.shape, dtype=DTYPE))
        note("model", name, ours, timms)
    return {"saved_bytes_per_image": found, "saved_bytes_ratio_to_timm": found["block"]["plain"]["ratio"]}


def compute(models: Iterable[str]) -> dict[str, Any]:
    """Count FLOPs per image of each model, and its floor on each GPU by data sheet."""
    counts, floors = {}, []
    for name in models:
        model = flops.count(_meta(name), training=True)
        counts[name] = {
            "forward": model.forward,
            "forward_executed": sum(one.flops for one in roofline.work(name, 1)),
            "training": model.total,
        }
        for gpu in roofline.GPUS.values():
            for batch in (1, BATCH):
                floor = roofline.floor(name, batch, gpu)
                row = {"model": name, "gpu": gpu.name, "batch": batch, "milliseconds": floor.seconds * 1e3}
                row |= {"images_per_s": floor.images_per_s, "memory_share": floor.memory_share}
                floors.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})
    sheets = [
        {"gpu": gpu.name, "flops_per_s": gpu.flops_per_s, "bytes_per_s": gpu.bytes_per_s, "source": gpu.source}
        for gpu in roofline.GPUS.values()
    ]
    launched = [{**one._asdict(), "times": times} for one, times in Counter(roofline.work(MODEL, BATCH)).items()]
    return {"flops_per_image": counts, "floors": floors, "data_sheets": sheets, "work": launched}


def table6(rows: Sequence[Row6] = TABLE6) -> list[dict[str, Any]]:
    """Return the paper's exaFLOPs of pre-training beside ours: 3 forwards an image, 2 FLOPs a multiply-add.

    The paper does not define its unit, so deviations are from its figures divided by the factor that makes
    :data:`REFERENCE` agree.
    """
    forward = {name: flops.count(_meta(name), 224).forward for name in dict.fromkeys(name for _, name, _, _ in rows)}
    ours = [3 * forward[name] * epochs * JFT_IMAGES / 1e18 for _, name, epochs, _ in rows]
    unit = next(paper / each for (name, _, _, paper), each in zip(rows, ours, strict=True) if name == REFERENCE)
    return [
        {
            "model": name,
            "epochs": epochs,
            "paper_exaflops": paper,
            "exaflops": round(each, 1),
            "deviation": round(each * unit / paper - 1, 4),
        }
        for (name, _, epochs, paper), each in zip(rows, ours, strict=True)
    ]


def derive(quick: bool = False) -> dict[str, Any]:
    """Count everything that needs no compiler, as in static.json; quick: of ViT-B/16 alone."""
    models = (MODEL,) if quick else MODELS
    table = table6(TABLE6[:2] if quick else TABLE6)
    counted = {**launches_and_bytes(models), "timm_eager": timm_eager()}
    return {**counted, **saved(models), **compute(models), "table6": table}

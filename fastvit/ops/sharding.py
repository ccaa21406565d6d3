"""DTensor strategies of the kernel ops: batches may be sharded, attention may be sharded by heads too.

Imported by :mod:`fastvit.parallel`, not by ``fastvit``: DTensor costs a second of import time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

# One letter an argument, then one a result. b: its first dimension is the batch's (or the batch's rows);
# a: angles of a rotation, the batch's if they have three dimensions, else whole as a parameter;
# r: a parameter, whole on every rank; p: a parameter's gradient, each rank holding its images' part; -: no tensor.
_BY_BATCH = {
    "patch_embed": ("b r r r r r r - -", "b"),
    "patch_embed_backward": ("b b - - r r r - - -", "b p p"),
    "layer_norm": ("b r r - b r b - -", "b b b b"),
    "layer_norm_backward": ("b b b r b b b r b - -", "b b p p p"),
    "linear": ("b r r r r - - b r b - -", "b b b b"),
    "linear_backward": ("b b r r r r - b b b - r b - -", "b p p p p p"),
    "mlp": ("b r r r r r r - - b - r b - -", "b b b b"),
    "mlp_backward": ("b b r r r r r r - b b b - - r b - -", "b p p p p p p p"),
    "rotate": ("b b a a - -", "b b"),
    "attention": ("b b b - -", "b b"),
    "attention_backward": ("b b b b b b b - -", "b b b"),
    "attention_qkvpacked": ("b - -", "b b"),
    "attention_qkvpacked_backward": ("b b b b b - -", "b"),
}
# Where the heads are, in each tensor argument and result of the attention ops; r: nowhere, whole on every rank.
_BY_HEADS: dict[str, tuple[tuple[int | str | None, ...], tuple[int, ...]]] = {
    "rotate": ((2, 2, "r", "r", None, None), (2, 2)),
    "attention": ((2, 2, 2, None, None), (2, 1)),
    "attention_backward": ((2, 1, 2, 2, 2, 2, 1, None, None), (2, 2, 2)),
    "attention_qkvpacked": ((3, None, None), (2, 1)),
    "attention_qkvpacked_backward": ((2, 1, 3, 2, 1, None, None), (3,)),
}
_BATCH: dict[str, Placement | None] = {"b": Shard(0), "r": Replicate(), "p": Partial(), "-": None}
_WHOLE: dict[str, Placement | None] = {"b": Replicate(), "r": Replicate(), "p": Replicate(), "-": None}

Placements = list[Placement | None]


def _strategies(name: str, args: tuple[Any, ...]) -> list[tuple[Placements, Placements]]:
    """The acceptable (results, arguments) placements of one call; absent tensors have none."""
    inputs, outputs = (letters.split() for letters in _BY_BATCH[name])
    inputs = [("b" if arg.ndim == 3 else "r") if i == "a" else i for i, arg in zip(inputs, args, strict=True)]
    found = [([m[o] for o in outputs], [m[i] for i in inputs]) for m in (_WHOLE, _BATCH)]
    if name in _BY_HEADS:
        dims_in, dims_out = _BY_HEADS[name]
        found.append(([Shard(d) for d in dims_out], [Shard(d) if isinstance(d, int) else _BATCH[d or "-"] for d in dims_in]))
    return [
        (results, [None if arg is None else place for place, arg in zip(places, args, strict=True)])
        for results, places in found
    ]


def _register(name: str) -> None:
    @register_sharding(getattr(torch.ops.fastvit, name).default)
    def strategy(*args: Any) -> list[tuple[Placements, Placements]]:
        return _strategies(name, args)


for _name in _BY_BATCH:
    _register(_name)

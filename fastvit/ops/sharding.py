"""DTensor strategies of the kernel ops: batches may be sharded, attention may be sharded by heads too.

Imported by :mod:`fastvit.integrations.parallel`, not by ``fastvit``: DTensor costs a second of import time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fastvit.attention_options import OPTIONS

# One letter an argument, then one a result. b: its first dimension is the batch's (or the batch's rows);
# r: a parameter, whole on every rank; p: a parameter's gradient, each rank holding its images' part; -: no tensor.
# Of attention's options (fastvit/attention_options.py has their letters): a: a bias, by batch where it has one, else as
# r; t: a table, by heads; k: relative position keys, by heads where each has its own; l: the gradient of the learned
# one of these; !: numbers of all images (packed images and sequences, a dropout's seed), which stay on one rank.
# c: a rotation's angles, by batch where they have one.
_OPTIONS = " ".join(option.by_batch for option in OPTIONS.values())
_BY_BATCH = {
    "patch_embed": ("b ! r r r r r r - -", "b"),
    "patch_embed_backward": ("b b - - ! r r r - - -", "b p p"),
    "layer_norm": ("b r r - b r b - -", "b b b b"),
    "layer_norm_backward": ("b b b r b b b r b - -", "b b p p p"),
    "linear": ("b r r r r - - b r b - -", "b b b b"),
    "linear_backward": ("b b r r r r - b b b - r b - -", "b p p p p p"),
    "mlp": ("b r r r r r r - - b - r b - -", "b b b b"),
    "mlp_backward": ("b b r r r r r r - b b b - - r b - -", "b p p p p p p p"),
    "rotate": ("b b c c - -", "b b"),
    "attention": (f"b b b - - {_OPTIONS}", "b b"),
    "attention_backward": (f"b b b b b b b - - {_OPTIONS} -", "b b b l"),
    "attention_qkvpacked": (f"b - - {_OPTIONS}", "b b"),
    "attention_qkvpacked_backward": (f"b b b b b - - {_OPTIONS} -", "b l"),
    "attention_rows": ("b b b r a - -", "b"),
    "attention_distance": ("b b b - - - -", "b"),
}
# Where the heads are, in each tensor argument and result of the attention ops; packed sequences allow that.
_OPTIONS_BY_HEADS = " ".join(option.by_heads for option in OPTIONS.values())
_BY_HEADS = {
    "rotate": ("2 2 c c - -", "2 2"),
    "attention": (f"2 2 2 - - {_OPTIONS_BY_HEADS}", "2 1"),
    "attention_backward": (f"2 1 2 2 2 2 1 - - {_OPTIONS_BY_HEADS} -", "2 2 2 l"),
    "attention_qkvpacked": (f"3 - - {_OPTIONS_BY_HEADS}", "2 1"),
    "attention_qkvpacked_backward": (f"2 1 3 2 1 - - {_OPTIONS_BY_HEADS} -", "3 l"),
    "attention_rows": ("2 2 1 r a - -", "1"),
    "attention_distance": ("2 2 1 - - - -", "1"),
}
_PLACES: dict[str, Placement | None] = {"b": Shard(0), "r": Replicate(), "p": Partial(), "!": Replicate(), "-": None}
_PLACES |= {"t": Shard(1), **{str(n): Shard(n) for n in (1, 2, 3)}}

Placements = list[Placement | None]


def _strategy(letters: tuple[str, str], args: tuple[Any, ...], dim: int) -> tuple[Placements, Placements] | None:
    """Return the (results, arguments) placements of one way to share a call, or None where it is impossible.

    A bias is split in dimension ``dim`` (images: 0, heads: 1); absent tensors have no placement.
    """
    inputs, outputs = (one.split() for one in letters)
    present = {
        letter: arg for letter, arg in zip(inputs, args, strict=True) if arg not in (None, []) and letter in "actk!"
    }
    if "!" in present:
        return None
    split = "a" in present and present["a"].shape[dim] > 1
    angles = "c" in present and dim == 0 and present["c"].ndim == 3
    own_keys = "k" in present and present["k"].ndim == 3
    places = {**_PLACES, "a": Shard(dim) if split else Replicate(), "c": Shard(0) if angles else Replicate()}
    places["k"] = Shard(0) if own_keys else Replicate()
    places["l"] = Shard(dim) if split or "t" in present else Shard(0) if own_keys else Partial()
    arguments = [None if arg in (None, []) else places[letter] for letter, arg in zip(inputs, args, strict=True)]
    return [places[o] for o in outputs], arguments


def _strategies(name: str, args: tuple[Any, ...]) -> list[tuple[Placements, Placements]]:
    """Return the acceptable (results, arguments) placements of one call."""
    inputs, outputs = (letters.split() for letters in _BY_BATCH[name])
    whole: Placements = [
        None if arg in (None, []) or i == "-" else Replicate() for i, arg in zip(inputs, args, strict=True)
    ]
    ways = [_strategy(_BY_BATCH[name], args, 0)]
    if name in _BY_HEADS:
        ways.append(_strategy(_BY_HEADS[name], args, 1))
    return [([Replicate() for _ in outputs], whole), *(way for way in ways if way is not None)]


def _register(name: str) -> None:
    @register_sharding(getattr(torch.ops.fastvit, name).default)
    def strategy(*args: Any) -> list[tuple[Placements, Placements]]:
        return _strategies(name, args)


for _name in _BY_BATCH:
    _register(_name)

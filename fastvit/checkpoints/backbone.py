"""A hybrid's ResNet in files: timm's names, which are ours, and Google's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

from torch import Tensor

from fastvit.checkpoints.rules import State, rename, same

BACKBONE = "patch_embed.backbone"
_BLOCK = f"{BACKBONE}.stages.{{i}}.blocks.{{j}}"
_NORMS = (
    *(f"{stem}.norm" for stem in (BACKBONE, f"{BACKBONE}.stem")),
    *(f"{_BLOCK}.norm{k}" for k in (1, 2, 3)),
    f"{_BLOCK}.downsample.norm",
)
_CONVS = tuple(f"{norm.replace('norm', 'conv')}.weight" for norm in _NORMS)

RULES = (*(rename(name, name) for name in _CONVS), *same(*((name, name) for name in _NORMS)))


def stem_of(names: Iterable[str]) -> str | None:
    """What precedes "conv.weight" in the stem of a backbone, which has no name of its own without stages."""
    stems = (f"{BACKBONE}.stem", BACKBONE)
    return next((stem for stem in stems if f"{stem}.conv.weight" in names), None)


def layers_of(names: Iterable[str]) -> tuple[int, ...] | None:
    """How many blocks each stage of the backbone has; None where there is no backbone."""
    names = list(names)
    if stem_of(names) is None:
        return None
    found: dict[int, set[int]] = {}
    for match in filter(None, (re.match(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.", n) for n in names)):
        found.setdefault(int(match[1]), set()).add(int(match[2]))
    return tuple(len(blocks) for _, blocks in sorted(found.items()))


def _modules(has: Callable[[str], bool]) -> Iterable[tuple[str, str, str, str]]:
    """(conv, norm) of ours and of Google's, for every pair that is there; ``has`` is asked for Google's units."""
    for i in count():
        if not has(f"block{i + 1}/unit1"):
            return
        for j in count():
            ours, theirs = f"{BACKBONE}.stages.{i}.blocks.{j}", f"block{i + 1}/unit{j + 1}"
            if not has(theirs):
                break
            for k in (1, 2, 3):
                yield f"{ours}.conv{k}", f"{ours}.norm{k}", f"{theirs}/conv{k}", f"{theirs}/gn{k}"
            if j == 0:
                yield f"{ours}.downsample.conv", f"{ours}.downsample.norm", f"{theirs}/conv_proj", f"{theirs}/gn_proj"


def from_npz(read: Any) -> State:
    """The backbone in an .npz under our names; {} where it has none.

    Args:
        read: gives the array of a name, and says which are there.

    Raises:
        ValueError: an array is missing.
    """
    if "conv_root/kernel" not in read:
        return {}
    units = list(_modules(lambda unit: f"{unit}/conv1/kernel" in read))
    stem = f"{BACKBONE}.stem" if units else BACKBONE
    out: State = {}
    for conv, norm, their_conv, their_norm in ((f"{stem}.conv", f"{stem}.norm", "conv_root", "gn_root"), *units):
        out[f"{conv}.weight"] = read(f"{their_conv}/kernel").permute(3, 2, 0, 1).contiguous()
        out[f"{norm}.weight"] = read(f"{their_norm}/scale").flatten()
        out[f"{norm}.bias"] = read(f"{their_norm}/bias").flatten()
    return out


def to_npz(state: Mapping[str, Tensor], take: Callable[[str], Tensor]) -> State:
    """The inverse of :func:`from_npz`; ``take`` gives the weights of a name in ``state``, which then are done with."""
    stem = stem_of(state)
    if stem is None:
        return {}

    def has(unit: str) -> bool:
        stage, block = (int(number) - 1 for number in re.findall(r"\d+", unit))
        return f"{BACKBONE}.stages.{stage}.blocks.{block}.conv1.weight" in state

    out: State = {}
    pairs = ((f"{stem}.conv", f"{stem}.norm", "conv_root", "gn_root"), *_modules(has))
    for conv, norm, their_conv, their_norm in pairs:
        out[f"{their_conv}/kernel"] = take(f"{conv}.weight").permute(2, 3, 1, 0)
        out[f"{their_norm}/scale"] = take(f"{norm}.weight").view(1, 1, 1, -1)
        out[f"{their_norm}/bias"] = take(f"{norm}.bias").view(1, 1, 1, -1)
    return out

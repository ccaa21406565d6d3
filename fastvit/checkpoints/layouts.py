"""The layouts of weights that are known: the families of :mod:`fastvit.models.families` register theirs here.

What a layout is, is in :mod:`fastvit.checkpoints.rules`. Several may have one name, that of a library whose kinds of
models have names of their own: the tensors tell which one a file has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastvit.checkpoints.rules import Layout, State

LAYOUTS: list[Layout] = []  # in the order in which recognise() tries them
REFUSED: dict[str, str] = {}  # a pattern of a tensor's name -> why weights with such a tensor are refused


def register(layouts: Sequence[Layout], refused: Mapping[str, str]) -> None:
    """Add layouts, which are tried after those registered before, and names that no :class:`fastvit.ViT` has."""
    LAYOUTS.extend(layouts)
    REFUSED.update(refused)


def unwrapped(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors without a prefix that all names share, such as a wrapper's "module."."""
    found = dict(given)
    while all("." in name for name in found) and len({name.split(".")[0] for name in found}) == 1:
        found = {name.split(".", 1)[1]: value for name, value in found.items()}
    return found


def recognise(names: Sequence[str]) -> Layout:
    """Return the layout of a file with tensors of these names.

    Raises:
        ValueError: no layout has such names; the message lists the accepted layouts and how the names begin.
    """
    for pattern, reason in REFUSED.items():
        found = next((name for name in names if re.fullmatch(pattern, name)), None)
        if found is not None:
            raise ValueError(f"{reason} ({found}): fastvit.ViT has no such thing")
    for layout in LAYOUTS:
        if layout.prefix(names) is not None:
            return layout
    accepted = ", ".join(sorted({layout.name for layout in LAYOUTS}))
    raise ValueError(
        f"its names are those of no layout that is known; accepted: {accepted}. They begin with {sorted(names)[:4]}"
    )


def written() -> list[str]:
    """Return the names of the layouts that :func:`fastvit.checkpoints.convert` writes, less Google's .npz."""
    return sorted({name for layout in LAYOUTS for name in layout.written})


def named(name: str, state: Mapping[str, Tensor]) -> Layout:
    """Return the layout written under ``name`` that has names for all weights of ``state``; else the plainest.

    Raises:
        ValueError: no layout is written under that name; the message lists those that are.
    """
    candidates = [layout for layout in reversed(LAYOUTS) if name in layout.written]
    if not candidates:
        raise ValueError(f"layout {name!r} can't be written; accepted: {', '.join([*written(), 'npz'])}")
    return next((layout for layout in candidates if layout.names(state)), candidates[0])


def to_layout(state: Mapping[str, Tensor], name: str) -> State:
    """Return weights under timm's names in the layout that is written under ``name``.

    Raises:
        ValueError: no layout is written under that name, or some weights have no name in it.
    """
    return named(name, state).from_ours(state)

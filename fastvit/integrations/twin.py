"""How a module of another library becomes one of fastvit: :class:`Twin`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Twin:
    """A class of fastvit that computes what another library's class does, from the same attributes.

    Args:
        kind: the class that a module becomes.
        usual: name of an attribute -> the only value, or class of a module, that ``kind`` implements.
        attributes: (module) -> attributes that ``kind`` needs added or replaced.
        reads: names of child modules whose parameters ``kind`` reads without calling them.
    """

    kind: type[nn.Module]
    usual: Mapping[str, Any] = field(default_factory=dict)
    attributes: Callable[[nn.Module], dict[str, Any]] = lambda module: {}
    reads: tuple[str, ...] = ()

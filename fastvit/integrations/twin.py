"""What a module of another library may become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


def _none(module: nn.Module) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Twin:
    """A class of ours that reads another library's attributes.

    Args:
        kind: the class that a module becomes.
        usual: values of attributes, or classes of modules, without which it would compute something else.
        attributes: (module) -> attributes that it needs besides, or otherwise.
        reads: names of modules in it whose parts it reads itself.
    """

    kind: type[nn.Module]
    usual: Mapping[str, Any] = field(default_factory=dict)
    attributes: Callable[[nn.Module], dict[str, Any]] = _none
    reads: tuple[str, ...] = ()

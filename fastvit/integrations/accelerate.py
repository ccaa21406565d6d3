"""``fastvit.accelerate``: a live model of timm, torchvision or transformers, running on fused ops.

Modules become instances of a class with the same parameters and another forward (a *twin*): so keys, parameters, hooks
and the modules around them stay what they are, and :func:`restore` gives each its class back.
"""

from __future__ import annotations

import copy as copies
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from fastvit.integrations import timm, torchvision, transformers
from fastvit.integrations.twin import Twin
from fastvit.layers import fuse
from fastvit.ops import onednn

__all__ = ["Report", "accelerate", "report", "restore"]

TWINS: dict[str, Twin] = {**timm.TWINS, **torchvision.TWINS, **transformers.TWINS}
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential)
_ORIGINAL = "_fastvit_original"  # in the __dict__ of a replaced module: its class and attributes before


class _Original(NamedTuple):
    kind: type[nn.Module]
    attributes: dict[str, Any]  # the replaced attributes, as they were
    added: tuple[str, ...]  # the names of attributes that the module did not have


@dataclass(frozen=True)
class Report:
    """What runs on fused ops in a model, and what does not and why; ``print`` shows it.

    Args:
        replaced: name of a module -> the class that it was.
        left: name of a module that has parameters and runs as it was -> the reason.
        attention: what transformers' attention layers call, where the model is of that library.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    attention: str | None = None

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for kind in self.replaced.values():
            counts[kind] = counts.get(kind, 0) + 1
        lines = [f"replaced: {count:4} {kind}" for kind, count in counts.items()]
        if self.attention is not None:
            lines.append(f"attention: {self.attention}")
        return "\n".join([*lines, *(f"left: {name or '(the model)'}: {why}" for name, why in self.left.items())])


def accelerate(model: nn.Module, *, copy: bool = False) -> Any:
    """Let a model's Transformer blocks run on :mod:`fastvit.ops`.

    Supported are timm's Vision Transformers, DeiTs and BEiTs, torchvision's, and transformers' ViT, DeiT, BEiT,
    DINOv2, CLIP and SigLIP (there attention, norms and MLPs). Of any other model the layers that those are made of.
    A module that is hooked, parametrised, wrapped or of an unknown class stays as it is: :func:`report` says why.

    Parameters are the very same and keep their names; results are equal to the rounding of the dtype, in training too.

    Args:
        model: it is changed in place.
        copy: change a copy instead, with the same parameters.

    Returns:
        The model, or the copy.
    """
    if copy:
        memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        model = copies.deepcopy(model, memo)
    for module in model.modules():
        twin = _twin(module)
        if twin is not None and refusal(module, twin) is None:
            _become(module, twin)
    transformers.set_attention(model)
    return model


def restore(model: nn.Module) -> Any:
    """Undo :func:`accelerate`, in place; the model is returned."""
    onednn.drop(model.parameters())
    transformers.reset_attention(model)
    for module in model.modules():
        original = module.__dict__.pop(_ORIGINAL, None)
        if original is not None:
            module.__class__ = original.kind
            for name in original.added:
                delattr(module, name)
            for name, value in original.attributes.items():
                setattr(module, name, value)
    return model


def report(model: nn.Module) -> Report:
    """Return which modules of a model :func:`accelerate` replaced, and why it left the others."""
    found = Report(attention=transformers.attention_of(model))
    _report(model, "", found)
    return found


def _report(module: nn.Module, name: str, found: Report, *, covered: bool = False, read: bool = False) -> None:
    """Add a module and those below to a report.

    Args:
        covered: the module above is reported as left, which covers its parts.
        read: the module above reads this one's parameters itself.
    """
    original = module.__dict__.get(_ORIGINAL)
    twin = _twin(module)
    reads: tuple[str, ...] = ()
    if original is not None:
        found.replaced[name] = _name(original.kind)
        covered, reads = False, TWINS[_name(original.kind)].reads
    elif twin is not None:
        found.left[name] = refusal(module, twin) or "accelerate() has not been called since it is there"
        covered = True
    elif not covered and type(module) not in _CONTAINERS and next(module.parameters(), None) is not None:
        reason = fuse.why_not_fusable(module, *fuse.PARTS, *((type(module),) if read else ()))
        if reason is not None:
            found.left[name] = reason
            covered = True
    for child, below in module.named_children():
        _report(below, f"{name}.{child}" if name else child, found, covered=covered, read=read or child in reads)


def _twin(module: nn.Module) -> Twin | None:
    """Return the twin of a module's exact class; None where it has none."""
    return TWINS.get(_name(type(module)))


def _name(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def refusal(module: nn.Module, twin: Twin) -> str | None:
    """Return why a module of a supported class is not replaced, or None."""
    reason = fuse.why_not_fusable(module, type(module))
    if reason is not None:
        return reason
    for name, usual in twin.usual.items():
        value = getattr(module, name, usual)
        same = type(value) is usual if isinstance(usual, type) else value is usual or value == usual
        if value is not usual and not same:
            return f"its {name} is {value!r}, which the fused one does not have"
    return None


def _become(module: nn.Module, twin: Twin) -> None:
    attributes = twin.attributes(module)
    before = {name: getattr(module, name) for name in attributes if hasattr(module, name)}
    for name, value in attributes.items():
        setattr(module, name, value)
    module.__dict__[_ORIGINAL] = _Original(type(module), before, tuple(set(attributes) - set(before)))
    module.__class__ = twin.kind

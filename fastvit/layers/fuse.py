"""When modules may be fused, and the calls that fuse them.

A layer here is a tree of ordinary modules, so that state_dict keys, hooks, LoRA wrappers, parametrisations
and quantised replacements work as anywhere. An op may stand in for several of these modules only where
calling them would do nothing else; :func:`is_fusable` alone decides that. What is not fusable runs as the
module it is, and the pieces around it stay fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from fastvit import activations, ops
from fastvit.layers.misc import DropPath, LayerScale
from fastvit.layers.norm import LayerNorm
from fastvit.ops.backends import note_fallback
from fastvit.packing import Sequences
from fastvit.reference import Norm

_HOOKS_ON_ALL = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)
Kind = TypeVar("Kind", bound=nn.Module)
_PLAIN = (nn.Parameter, Tensor)

# The forward of each class that may be fused, as it was at import, so that one replaced on the class is seen.
_FORWARD: dict[type[nn.Module], Callable[..., Any]] = {}
_BRANCHES: tuple[type[nn.Module], ...] = ()


def remember_forward(*kinds: type[nn.Module]) -> None:
    """Note the forward of classes that may be fused, as it is when fastvit is imported."""
    _FORWARD.update({kind: kind.forward for kind in kinds})


remember_forward(
    DropPath,
    LayerNorm,
    LayerScale,
    nn.Conv2d,
    nn.Dropout,
    nn.Identity,
    nn.LayerNorm,
    nn.Linear,
    nn.Sequential,
    *activations.MODULES.values(),
)


def branch(kind: type[Kind]) -> type[Kind]:
    """Register a class with a method ``branch``, which is residual(module(norm(x))), so that blocks fuse it."""
    global _BRANCHES
    _BRANCHES = (*_BRANCHES, kind)
    remember_forward(kind)
    return kind


def is_known(module: nn.Module) -> bool:
    """Return whether the module is exactly of a class that may be fused, with the forward of that class."""
    return _FORWARD.get(type(module)) is type(module).forward and "forward" not in module.__dict__


def is_ours(module: nn.Module) -> bool:
    """Return whether the module is exactly of a class that may be fused, and has no hooks."""
    kind = type(module)
    return is_fusable(module, *((kind,) if kind in _FORWARD else ()))


def has_branch(module: nn.Module) -> bool:
    """Return whether the norm before the module and the residual after it may go into its own ops."""
    return is_fusable(module, *_BRANCHES)


def why_not_fusable(module: nn.Module, *kinds: type[nn.Module], or_counted: bool = False) -> str | None:
    """Return why using the module's parameters is not the same as calling it, or None; see :func:`is_fusable`."""
    kind = type(module)
    if kind not in kinds:
        return "its class is not one that is fused"
    if "forward" in module.__dict__ or _FORWARD.get(kind, kind.forward) is not kind.forward:
        return "its forward was replaced"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return "it norms over more than the last dimension"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (not or_counted and any(_HOOKS_ON_ALL))
    ):
        return "it has hooks"
    for parameter in module._parameters.values():
        if parameter is not None and (type(parameter) not in _PLAIN or not parameter.is_floating_point()):
            return "its parameters are not plain floating tensors"
    return None


def is_fusable(module: nn.Module, *kinds: type[nn.Module], or_counted: bool = False) -> bool:
    """Return whether using the module's parameters directly is the same as calling it.

    It is exactly of one of ``kinds`` (a subclass, a LoRA wrapper or a parametrised class is not), its ``forward``
    is its class's, it has no hooks, and its parameters are plain floating tensors. Each reason against it is logged
    once.

    ``or_counted`` overlooks hooks on every module, as counters and profilers set them.
    """
    reason = why_not_fusable(module, *kinds, or_counted=or_counted)
    if reason is None:
        return True
    note_fallback(f"{type(module).__module__}.{type(module).__qualname__} runs as a module, not fused: {reason}")
    return False


def is_identity(module: nn.Module) -> bool:
    """Return whether the module is an Identity without hooks."""
    return type(module) is nn.Identity and is_fusable(module, nn.Identity)


def is_inactive(dropout: Any) -> bool:
    """Return whether a dropout does nothing now: rate 0 or not training, and no hooks."""
    if not is_fusable(dropout, nn.Dropout, nn.Identity):
        return False
    return type(dropout) is nn.Identity or not dropout.training or dropout.p == 0.0


def norm_arguments(norm: Any) -> Norm | None:
    """Return (weight, bias, eps) of a LayerNorm over the last dimension that may be fused, or None."""
    if not is_fusable(norm, LayerNorm, nn.LayerNorm):
        return None
    return norm.weight, norm.bias, norm.eps


PARTS = (LayerNorm, LayerScale, nn.Conv2d, nn.LayerNorm, nn.Linear)  # with parameters that the ops take


def activation_name(act: nn.Module, *, gates: bool = False) -> str | None:
    """Return the ops' name of an activation module, or None, logged once, where it has to run as the module it is.

    With ``gates`` return the name of the gated linear unit that has the module as its gate.
    """
    kind, name = type(act), activations.name_of(act)
    accepted = dict.fromkeys(activations.ACTIVATIONS, "") if not gates else {v: k for k, v in activations.GATED.items()}
    if name is None or name not in accepted:
        known = ", ".join(accepted)
        where = "in a gated MLP it is not fused" if gates else "its class is none of those that are fused"
        note_fallback(f"{kind.__module__}.{kind.__qualname__} runs as a module: {where}; accepted: {known}")
        return None
    if not is_fusable(act, kind):
        return None
    return accepted[name] or name


class Residual(NamedTuple):
    """The residual epilogue of a branch y: residual + drop_path(scale(y))."""

    residual: Tensor  # (B, T, D)
    scale: nn.Module | Tensor | None = None  # LayerScale or Identity; or gamma (D,) itself
    drop_path: nn.Module | None = None  # DropPath or Identity
    sequences: Sequences | None = None  # where packed images lie

    def as_modules(self, y: Tensor) -> Tensor:
        """Return the sum for y (B, T, D), module by module."""
        if isinstance(self.scale, nn.Module):
            y = self.scale(y)
        elif self.scale is not None:
            y = y * self.scale
        if isinstance(self.drop_path, DropPath) and self.sequences is not None:
            y = self.drop_path(y, self.sequences)
        elif self.drop_path is not None:
            y = self.drop_path(y)
        return self.residual + y

    def epilogue(self) -> dict[str, Tensor | None] | None:
        """Return residual, gamma and row_scale as an op takes them, or None where a module has to run."""
        gamma, row_scale = self.scale, None
        if isinstance(gamma, nn.Module):
            if not is_fusable(gamma, LayerScale, nn.Identity):
                return None
            gamma = gamma.gamma if isinstance(gamma, LayerScale) else None
        if self.drop_path is not None:
            if not is_fusable(self.drop_path, DropPath, nn.Identity):
                return None
            if isinstance(self.drop_path, DropPath):
                row_scale = self.drop_path.row_scale(self.residual, self.sequences)
        return {"residual": self.residual, "gamma": gamma, "row_scale": row_scale}


def fused(
    op: Callable[..., Tensor],
    x: Tensor,
    *weights: Tensor | None,
    norm: nn.Module | None = None,
    residual: Residual | None = None,
    **options: Any,
) -> Tensor:
    """Return residual(op(norm(x), *weights)); norm and residual are the op's prologue and epilogue where fusable."""
    prologue = None
    if norm is not None and not is_identity(norm):
        prologue = norm_arguments(norm)
        x = x if prologue else norm(x)
    epilogue = None if residual is None else residual.epilogue()
    y = op(x, *weights, norm=prologue, **options, **(epilogue or {}))
    return y if residual is None or epilogue is not None else residual.as_modules(y)


def linear(
    module: Any,
    x: Tensor,
    *,
    norm: nn.Module | None = None,
    bias: Tensor | None = None,
    act: nn.Module | None = None,
    dropout: nn.Module | None = None,
    residual: Residual | None = None,
) -> Tensor:
    """Return residual(dropout(act(module(norm(x)) + bias))), as much of it in one op as may be.

    Args:
        x: (..., K); the result is (..., N).
        bias: (N,), of a module that has none itself.
    """
    activation = None if act is None else activation_name(act)
    apart = (act is not None and activation is None) or (dropout is not None and not is_inactive(dropout))
    if is_fusable(module, nn.Linear):
        y = fused(
            ops.linear,
            x,
            module.weight,
            module.bias if bias is None else bias,
            norm=norm,
            activation=activation,
            residual=None if apart else residual,
        )
        if not apart:
            return y
        act = act if activation is None else None
    else:
        y = module(x if norm is None else norm(x))
        y = y if bias is None else y + bias
    if act is not None:
        y = act(y)
    if dropout is not None:
        y = dropout(y)
    return y if residual is None else residual.as_modules(y)

"""When modules may be fused, and the calls that fuse them.

A layer here is a tree of ordinary modules, so that state_dict keys, hooks, LoRA wrappers, parametrisations
and quantised replacements work as anywhere. An op may stand in for several of these modules only where
calling them would do nothing else: :func:`is_fusable` is that question, and the only place that asks it.
What is not fusable runs as the module it is, and the pieces around it stay fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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

_PLAIN = (nn.Parameter, Tensor)

# What the forward of PyTorch's classes is, so that one that was replaced on the class is seen; ours are added below
# and in fastvit.layers.
_FORWARD: dict[type[nn.Module], Callable[..., Any]] = {}


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


def _hooks_on_all() -> bool:
    return bool(
        _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    )


def why_not_fusable(module: nn.Module, *kinds: type[nn.Module], or_counted: bool = False) -> str | None:
    """Why using the module's parameters directly is not the same as calling it, or None; see :func:`is_fusable`."""
    if type(module) not in kinds:
        return "its class is not one that is fused"
    if "forward" in module.__dict__ or _FORWARD.get(type(module), type(module).forward) is not type(module).forward:
        return "its forward was replaced"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return "it norms over more than the last dimension"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (not or_counted and _hooks_on_all())
    ):
        return "it has hooks"
    for parameter in module._parameters.values():
        if parameter is not None and (type(parameter) not in _PLAIN or not parameter.is_floating_point()):
            return "its parameters are not plain floating tensors"
    return None


def is_fusable(module: nn.Module, *kinds: type[nn.Module], or_counted: bool = False) -> bool:
    """Whether using the module's parameters directly is the same as calling it.

    It is exactly of one of ``kinds`` (a subclass, a LoRA wrapper or a parametrised class is not), its ``forward``
    is its class's, no hook watches it, and its parameters are plain floating tensors. A no is logged once.

    Hooks on every module, as counters and profilers have, may be overlooked with ``or_counted``.
    """
    reason = why_not_fusable(module, *kinds, or_counted=or_counted)
    if reason is None:
        return True
    note_fallback(f"{type(module).__module__}.{type(module).__qualname__} runs as a module, not fused: {reason}")
    return False


def is_identity(module: nn.Module) -> bool:
    """Whether the module is an Identity that nobody watches."""
    return type(module) is nn.Identity and is_fusable(module, nn.Identity)


def is_inactive(dropout: Any) -> bool:
    """Whether a dropout does nothing now: rate 0 or not training, and nobody watches it."""
    if not is_fusable(dropout, nn.Dropout, nn.Identity):
        return False
    return type(dropout) is nn.Identity or not dropout.training or dropout.p == 0.0


def norm_arguments(norm: Any) -> Norm | None:
    """(weight, bias, eps) of a LayerNorm over the last dimension that may be fused, or None."""
    if not is_fusable(norm, LayerNorm, nn.LayerNorm):
        return None
    return norm.weight, norm.bias, norm.eps


PARTS = (LayerNorm, LayerScale, nn.Conv2d, nn.LayerNorm, nn.Linear)  # with parameters that the ops take


def activation_name(act: nn.Module, *, gates: bool = False) -> str | None:
    """Return the ops' name of an activation module, or None, logged once, where it has to run as the module it is.

    With ``gates`` the name is that of the gated linear unit whose gate the module is.
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


class Merge(NamedTuple):
    """What follows a branch of a block: residual + drop_path(scale(y))."""

    residual: Tensor  # (B, T, D)
    scale: nn.Module | Tensor | None  # LayerScale or Identity; or gamma (D,) itself, or none
    drop_path: nn.Module  # DropPath or Identity
    sequences: Sequences | None = None  # where the images are, if the tokens are those of packed ones

    def as_modules(self, y: Tensor) -> Tensor:
        """y (B, T, D) -> (B, T, D), module by module."""
        if isinstance(self.scale, nn.Module):
            y = self.scale(y)
        elif self.scale is not None:
            y = y * self.scale
        if self.sequences is None or not isinstance(self.drop_path, DropPath):
            return self.residual + self.drop_path(y)
        return self.residual + self.drop_path(y, self.sequences)

    def arguments(self) -> dict[str, Tensor | None] | None:
        """The same as arguments of an op, or None where a module has to run."""
        if not isinstance(self.scale, nn.Module):
            gamma = self.scale
        elif is_fusable(self.scale, LayerScale, nn.Identity):
            gamma = self.scale.gamma if isinstance(self.scale, LayerScale) else None
        else:
            return None
        if not is_fusable(self.drop_path, DropPath, nn.Identity):
            return None
        dropping = type(self.drop_path) is DropPath
        row_scale = self.drop_path.row_scale(self.residual, self.sequences) if dropping else None
        return {"residual": self.residual, "gamma": gamma, "row_scale": row_scale}


def folded(
    op: Callable[..., Tensor],
    x: Tensor,
    *weights: Tensor | None,
    norm: nn.Module | None = None,
    merge: Merge | None = None,
    **options: Any,
) -> Tensor:
    """op(norm(x), *weights) merged into the residual; norm and merge ride in the op where they are fusable."""
    norm_given = None
    if norm is not None and not is_identity(norm):
        norm_given = norm_arguments(norm)
        x = x if norm_given else norm(x)
    epilogue = None if merge is None else merge.arguments()
    y = op(x, *weights, norm=norm_given, **options, **(epilogue or {}))
    return y if merge is None or epilogue is not None else merge.as_modules(y)


def linear(
    module: Any,
    x: Tensor,
    *,
    norm: nn.Module | None = None,
    act: nn.Module | None = None,
    dropout: nn.Module | None = None,
    merge: Merge | None = None,
) -> Tensor:
    """merge(dropout(act(module(norm(x))))) with as much of it in one op as may be. x (..., K) -> (..., N)."""
    if not is_fusable(module, nn.Linear):
        y = module(x if norm is None else norm(x))
        activation = None
        apart = True
    else:
        activation = None if act is None else activation_name(act)
        apart = (act is not None and activation is None) or (dropout is not None and not is_inactive(dropout))
        y = folded(
            ops.linear,
            x,
            module.weight,
            module.bias,
            norm=norm,
            activation=activation,
            merge=None if apart else merge,
        )
    if not apart:
        return y
    if act is not None and activation is None:
        y = act(y)
    if dropout is not None:
        y = dropout(y)
    return y if merge is None else merge.as_modules(y)

"""The map of activations: one entry for each, read by layers, ops, checkpoint readers and kernels.

To add one: an entry here, with its formula in PyTorch; a function of its name in ``kernels/triton/activations.py``; a
function of its name in ``csrc/include/activations.cuh``. The tests run over this map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GELUTanh(nn.GELU):
    """GELU by its tanh approximation, which the paper's own (JAX) code uses."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(approximate="tanh")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU of the original CLIP."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x (...) -> (...)."""
        return quick_gelu(x)


class ReLUSquared(nn.Module):
    """relu(x)^2 (So et al., arXiv:2109.08668)."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x (...) -> (...)."""
        return relu_squared(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: Tensor) -> Tensor:
    """Return relu(x)^2."""
    return F.relu(x).square()


class Activation(NamedTuple):
    """An activation that the ops fuse."""

    formula: Callable[[Tensor], Tensor]  # the reference; autograd differentiates it
    module: type[nn.Module]  # act_layer="name" builds it
    classes: tuple[str, ...] = ()  # other libraries' classes that compute the same
    spellings: tuple[str, ...] = ()  # words in act_layer and config files; Hugging Face's first, even if it is the name
    onednn: tuple[str, str] | None = None  # its epilogue in mkldnn._linear_pointwise; None: a step of its own


ACTIVATIONS = {
    "gelu": Activation(
        F.gelu, nn.GELU,
        classes=("timm.layers.activations.GELU", "transformers.activations.GELUActivation"),
        onednn=("gelu", "none"),
    ),
    "gelu_tanh": Activation(
        gelu_tanh, GELUTanh,
        classes=(
            "timm.layers.activations.GELUTanh", "transformers.activations.GELUTanh",
            "transformers.activations.NewGELUActivation", "transformers.activations.FastGELUActivation",
        ),
        spellings=("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
        onednn=("gelu", "tanh"),
    ),
    "quick_gelu": Activation(
        quick_gelu, QuickGELU,
        classes=("timm.layers.activations.QuickGELU", "transformers.activations.QuickGELUActivation"),
    ),
    "relu": Activation(F.relu, nn.ReLU, onednn=("relu", "")),
    "relu_squared": Activation(
        relu_squared, ReLUSquared,
        classes=("transformers.activations.ReLUSquaredActivation",),
        spellings=("relu2", "relu^2"),
    ),
    "silu": Activation(
        F.silu, nn.SiLU,
        classes=("timm.layers.activations.Swish", "transformers.activations.SiLUActivation"),
        spellings=("silu", "swish"),
        onednn=("swish", ""),
    ),
}  # fmt: skip

#: Gated linear units, of ops.mlp only: the activation of the first half of the columns, which multiplies the second.
GATED = {"swiglu": "silu"}

#: Words that ``act_layer`` takes, and the modules that they build; those after the map's are not fused.
MODULES: dict[str, type[nn.Module]] = {
    **{word: one.module for name, one in ACTIVATIONS.items() for word in (name, *one.spellings)},
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
#: Hugging Face's words (``hidden_act``) and the names that they mean here; the first of a name is the one to write.
HUGGINGFACE = {word: name for name, one in ACTIVATIONS.items() for word in one.spellings or (name,)}

_CLASSES = {
    **{f"{kind.__module__}.{kind.__qualname__}": word for word, kind in reversed(MODULES.items())},
    **{theirs: name for name, one in ACTIVATIONS.items() for theirs in one.classes},
}


def name_of(module: nn.Module) -> str | None:
    """Return the name of a module's function, a key of MODULES, or None for an unknown class."""
    kind = type(module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _CLASSES.get(f"{kind.__module__}.{kind.__qualname__}")


def columns(activation: str | None) -> int:
    """Return how many columns an activation reads for each one that it writes: 2 for a gated one."""
    return 2 if activation in GATED else 1


def check(activation: str | None, *, gated: bool = False, optional: bool = True, where: str = "") -> None:
    """Raise ValueError for a name that is not in the map; ``gated`` ones and None pass where they are allowed."""
    if (activation is None and optional) or activation in ACTIVATIONS or (gated and activation in GATED):
        return
    accepted = [*(["None"] if optional else []), *ACTIVATIONS, *(GATED if gated else ())]
    raise ValueError(f"{where}unknown activation {activation!r}; accepted: {', '.join(accepted)}")

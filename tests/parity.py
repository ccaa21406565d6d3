"""Our model beside another library's, or beside itself: the same logits and gradients, by the rule of numerics.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.ops import backends
from numerics import assert_as_right_as_eager

Tensors = dict[str, Tensor]


def randomise(model: nn.Module) -> nn.Module:
    """Move every parameter off its start, so that zeros and ones hide nothing."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def logits_and_gradients(model: nn.Module, images: Tensor, forward: Callable[..., Tensor]) -> tuple[Tensor, Tensors]:
    torch.manual_seed(1)  # for the drop rates
    out = forward(model, images)
    model.zero_grad()
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape))
    missing = [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert not missing, f"no gradient for {missing}"
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_parity(
    ours: nn.Module,
    theirs: nn.Module,
    size: tuple[int, int],
    translate: Callable[[Tensors], Tensors] = dict,
    forward: Callable[..., Tensor] = lambda model, images: model(images),
    rounding: float = 1e-7,
) -> None:
    """Load their weights into ours and compare.

    Args:
        translate: their names (of weights, of gradients) -> ours.
        forward: how theirs gives what ours does.
        rounding: how far the two may be apart in float64, where theirs computes something in float32 even then.
    """
    randomise(theirs)
    ours.load_state_dict(translate(dict(theirs.state_dict())))
    images = torch.randn(2, ours.in_chans, *size)
    theirs_out, theirs_grads = logits_and_gradients(theirs, images, forward)
    with torch.no_grad():
        torch.manual_seed(1)
        assert (ours(images) - theirs_out).abs().max() <= 1e-4
    exact_out, exact_grads = logits_and_gradients(copy.deepcopy(theirs).double(), images.double(), forward)
    out, grads = logits_and_gradients(copy.deepcopy(ours).double(), images.double(), lambda m, x: m(x))
    theirs_grads, exact_grads = translate(theirs_grads), translate(exact_grads)
    assert set(grads) == set(exact_grads)
    assert_as_right_as_eager(
        [out, *grads.values()],
        [theirs_out, *(theirs_grads[name] for name in grads)],
        [exact_out, *(exact_grads[name] for name in grads)],
        names=["logits", *grads],
    )
    # The same mathematics, not just as right.
    assert (out - exact_out).abs().max() <= rounding * exact_out.abs().max()


def gradients(model: nn.Module, out: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True))


def assert_same(a: Any, b: Any) -> None:
    """Equal within float64's rounding, tensor by tensor."""
    for x, y in zip([a] if isinstance(a, Tensor) else a, [b] if isinstance(b, Tensor) else b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


class Calls:
    """Counts and records the ops that a forward calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = []
        for name in backends.OPS:
            monkeypatch.setattr(ops, name, partial(self._record, name, getattr(ops, name)))

    def _record(self, name: str, op: Callable[..., Any], x: Tensor, *args: Any, **options: Any) -> Any:
        used = tuple(key for key, value in options.items() if value is not None)
        self.made.append((name, tuple(x.shape), used))
        return op(x, *args, **options)

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.made]

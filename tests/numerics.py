"""How right is right: a kernel's error against float64 is at most twice eager PyTorch's in the same dtype.

(The FlashAttention rule.) It is applied to every output and to every gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Outputs = Tensor | Sequence[Tensor | None] | None


def strided(rows: int, width: int, dtype: torch.dtype, gap: int = 8) -> Tensor:
    """Random (rows, width) of which every row is followed by ``gap`` poisoned elements."""
    wide = torch.full((rows, width + gap), torch.nan, dtype=dtype)
    wide[:, :width] = torch.randn(rows, width)
    return wide[:, :width]


def tensors(outputs: Outputs) -> list[Tensor]:
    """The tensors of an op's result, in order."""
    return [t for t in ([outputs] if isinstance(outputs, Tensor) else outputs or []) if t is not None]


def assert_as_right_as_eager(
    kernel: Outputs, eager: Outputs, exact: Outputs, names: Sequence[str] | None = None
) -> None:
    """max|kernel - exact| <= 2 max|eager - exact| + tiny, tensor by tensor; NaN never passes.

    tiny is eight float32 roundings of the largest exact value, or of 1 (the scale of the tests' data) where that is
    larger: what is left where eager happens to be exact, or where terms of that size cancel to zero.
    """
    ours, theirs, truth = tensors(kernel), tensors(eager), tensors(exact)
    assert len(ours) == len(theirs) == len(truth)
    for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
        name = names[i] if names else f"output {i}"
        assert a.shape == c.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(c.shape)}"
        if c.numel() == 0:
            continue
        c = c.double()
        error, allowed = (a.double() - c).abs().max().item(), 2 * (b.double() - c).abs().max().item()
        tiny = 8 * torch.finfo(torch.float32).eps * max(1.0, c.abs().max().item())
        assert error <= allowed + tiny, f"{name}: error {error:.3e}, allowed {allowed:.3e} + {tiny:.1e}"


def assert_model_as_right_as_eager(kernel: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """The same rule for a whole model's logits and gradients taken together: root mean square of relative errors.

    (A model is a long chain of roundings: the largest error of a tensor of five elements is a matter of luck.)
    """

    def error(ours: Sequence[Tensor]) -> float:
        pairs = [(a.double(), c) for a, c in zip(ours, truth, strict=True) if c.norm() > nothing]
        relative = [((a - c).norm() / c.norm()).item() for a, c in pairs]
        return sum(e * e for e in relative) ** 0.5 / len(relative) ** 0.5

    truth = [c.double() for c in exact]
    nothing = 1e-12 * max(c.norm() for c in truth)  # a key norm's bias has no gradient: all are rounding there
    assert len(kernel) == len(eager) == len(truth)
    got, allowed = error(kernel), 2 * error(eager)
    assert got <= allowed, f"relative error {got:.3e}, allowed {allowed:.3e}"


def leaves_of(args: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Fresh leaves: floating tensors cast to ``dtype`` (if given), keeping requires_grad and strides."""

    def leaf(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf(v) for v in value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        cast = value.detach() if dtype is None else value.detach().to(dtype)
        return cast.requires_grad_(value.requires_grad)

    return {name: leaf(value) for name, value in args.items()}


def _flat(args: dict[str, Any]) -> dict[str, Tensor]:
    out = {}
    for name, value in args.items():
        for i, v in enumerate(value if isinstance(value, tuple) else [value]):
            if isinstance(v, Tensor) and v.requires_grad:
                out[f"{name}[{i}]" if isinstance(value, tuple) else name] = v
    return out


def check_op(kernel: Callable[..., Outputs], reference: Callable[..., Outputs], args: dict[str, Any]) -> None:
    """Hold ``kernel(**args)`` and its gradients against ``reference`` in float64 and in the same dtype.

    Tensors in ``args`` that require a gradient get one; the upstream gradient is random and shared.
    """
    runs = []
    upstream: list[Tensor] | None = None
    for fn, dtype in ((kernel, None), (reference, None), (reference, torch.float64)):
        leaves = leaves_of(args, dtype)
        outputs = tensors(fn(**leaves))
        wanted = _flat(leaves)
        gradients: tuple[Tensor | None, ...] = ()
        if wanted:
            if upstream is None:
                upstream = [torch.randn_like(o) for o in outputs]
            gradients = torch.autograd.grad(
                outputs, list(wanted.values()), [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
            )
        runs.append(([o.detach() for o in outputs], gradients))
    names = [f"output {i}" for i in range(len(runs[0][0]))] + [f"gradient of {n}" for n in wanted]
    assert_as_right_as_eager(*[[*outputs, *grads] for outputs, grads in runs], names=names)


def assert_same_bits_twice(op: Callable[..., Outputs], args: dict[str, Any]) -> None:
    """Two runs of ``op(**args)`` give the same gradients, bit for bit."""

    def gradients() -> tuple[Tensor, ...]:
        outputs = tensors(op(**args))
        return torch.autograd.grad(outputs, list(_flat(args).values()), [torch.ones_like(o) for o in outputs])

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)

"""Rotary position embeddings, which rotate queries and keys by their position before attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvit import reference
from fastvit.ops import backends, checks
from fastvit.ops.library import launchers, needs_grad, register, unit_stride


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return x cos + half(x) sin for x in (q, k), with half(x) = (-x[d/2:], x[:d/2]): q and k in one pass.

    (Su et al., 2021, equation 34, in the order of Hugging Face and DINOv3: pair i of a head is its elements i and
    i + d/2. timm's EVA pairs 2i and 2i + 1 instead, unless it is built with ``rotate_half``.)

    Args:
        q, k: (B, T, H, d) floating, d even. The last dimension is contiguous (else it is copied), the other strides
            are free: views of a packed projection need no copy.
        cos, sin: (T', d) or (B, T', d), float32 or q's dtype, T' <= T: of the last T' tokens. The tokens before them
            (class token, registers) stay as they are. See :func:`axial`.

    Returns:
        q' and k', (B, T, H, d) in q's dtype, computed in float32. q and k have gradients of any order.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or cos or sin require a gradient.
        BackendUnavailable: the backend that is set can't run this.
    """
    checks.floating("rotate", q=q, k=k, cos=cos, sin=sin)
    if q.ndim != 4 or q.shape != k.shape or 0 in q.shape[2:]:
        raise ValueError(f"ops.rotate: q {tuple(q.shape)}, k {tuple(k.shape)}; expected (B, T, H, d) of both")
    batch, tokens, _, head_dim = q.shape
    if head_dim % 2:
        raise ValueError(f"ops.rotate: head dim {head_dim} is odd; accepted: even ones, rotated in pairs")
    if cos.shape not in ((cos.shape[-2], head_dim), (batch, cos.shape[-2], head_dim)) or cos.shape[-2] > tokens:
        raise ValueError(
            f"ops.rotate: cos has shape {tuple(cos.shape)}, expected (T', {head_dim}) or ({batch}, T', {head_dim}) "
            f"with T' up to {tokens}"
        )
    checks.shape("rotate", "sin", sin, tuple(cos.shape))
    checks.same_device("rotate", q.device, k=k, cos=cos, sin=sin)
    checks.same_dtype("rotate", q=q, k=k)
    checks.same_dtype("rotate", cos=cos, sin=sin)
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("ops.rotate: cos and sin have no gradient; detach them")
    chosen = backends.choose("rotate", q, needs_grad=needs_grad(q, k))
    if chosen not in backends.KERNELS:
        return reference.rotate(q, k, cos, sin)
    return _rotate(q, k, cos, sin, False, chosen)


def axial(
    grid: tuple[int, int],
    head_dim: int,
    *,
    base: float = 100.0,
    periods: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the angles of a grid of patches as DINOv3 has them (Siméoni et al., 2025, section 3.2): (cos, sin).

    A patch's centre has coordinates from -1 to 1 down and across; each is multiplied by 2 pi / period, for d/4 periods.

    Args:
        grid: (rows, columns) of patches.
        head_dim: d, a multiple of 4.
        base: periods are base^(4 i / d) for i from 0 to d/4 - 1; DINOv3's is 100.
        periods: (d/4,) in place of them, as in DINOv3's checkpoints.
        device: of the result; by default that of ``periods``, or the CPU.
        dtype: of the result, float32 or float64. Periods are float32's numbers in both.

    Returns:
        cos and sin, (rows * columns, d) each, for :func:`rotate`.

    Raises:
        ValueError: d is no multiple of 4, or periods of another shape.
    """
    device = periods.device if device is None and periods is not None else device
    centres = [2 * (torch.arange(0.5, size, dtype=dtype, device=device) / size) - 1 for size in grid]
    coordinates = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1).flatten(0, 1)
    return angles(coordinates, head_dim, base=base, periods=periods)


def angles(
    coordinates: Tensor, head_dim: int, *, base: float = 100.0, periods: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the angles of patches anywhere: coordinates (N, 2), down and across -> cos and sin, (N, d) each."""
    if head_dim % 4:
        raise ValueError(f"rope.axial: head dim {head_dim}; accepted: multiples of 4, a quarter for each of two axes")
    quarter = head_dim // 4
    if periods is None:
        exponents = 2 * torch.arange(quarter, dtype=torch.float32, device=coordinates.device) / (head_dim // 2)
        periods = base**exponents
    elif periods.shape != (quarter,):
        raise ValueError(f"rope.axial: periods has shape {tuple(periods.shape)}, expected ({quarter},)")
    periods = periods.to(device=coordinates.device, dtype=torch.float32).to(coordinates.dtype)
    turns = (2 * math.pi * coordinates.unsqueeze(-1) / periods).flatten(1)  # (N, d / 2): down, then across
    return turns.cos().repeat(1, 2), turns.sin().repeat(1, 2)


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    cos, sin = cos.contiguous(), sin.contiguous()
    return launchers(backend).apply_rotary(unit_stride(q), unit_stride(k), cos, sin, inverse=inverse)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    """Rotate the gradients back: a rotation's transpose is its inverse."""
    return *_rotate(dq, dk, *ctx.saved_tensors, not ctx.inverse, ctx.backend), None, None, None, None


_rotate = register(
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse, str backend) -> (Tensor, Tensor)",
    _forward,
    lambda a: (a.q.new_empty(a.q.shape), a.k.new_empty(a.k.shape)),
    backward=_gradient,
    setup_context=_setup_context,
)

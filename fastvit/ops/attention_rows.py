"""Attention's weights from its saved log-sum-exp: rows of them, and how far each head looks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastvit import reference
from fastvit.ops import backends, checks
from fastvit.ops.library import autocast_dtype, cast_for_autocast, launchers, register, unit_stride


def attention_rows(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rows: Sequence[int] | Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    rel_pos_table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rel_pos_keys: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Return rows of the attention weights, exp(scale q[rows] k^T + bias - lse[rows]), in one pass over the keys.

    For looking into a model: no gradient flows, and the result requires none.

    Args:
        q: (B, Tq, H, d) floating; k: (B, Tk, H, d), as :func:`fastvit.ops.attention` takes them.
        lse: (B, H, Tq) floating, what ``attention(..., return_lse=True)`` returned for them.
        rows: the queries, R ints or an int64 tensor (R,) on q's device, from -Tq to Tq - 1. On a
            GPU the values of a tensor are not looked at: a row outside that range is NaN. Ints are copied there first,
            which a CUDA graph can't record.
        scale, bias, rel_pos_table, window, rel_pos_keys, key_mask: as attention had them. The bias of these rows is in
            memory, no larger than the result.

    Returns:
        (B, H, R, Tk) float32 (float64 for float64). A row with no key (lse -inf) is zeros.

    Raises:
        ValueError: a shape, dtype, device or row that does not fit.
        BackendUnavailable: the backend that is set can't run this.
    """
    q, k, lse = _accept("attention_rows", q, k, lse)
    queries = _rows(rows, q)
    checked = checks.attention(
        "attention_rows", q, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]),
        bias=bias, rel_pos_table=rel_pos_table, window=window, rel_pos_keys=rel_pos_keys, key_mask=key_mask,
    )  # fmt: skip
    names = ("bias", "rel_pos_table", "window", "rel_pos_keys", "key_mask")
    options = {name: getattr(checked, name) for name in names}
    chosen = backends.choose("attention_rows", q, needs_grad=False)
    with torch.no_grad(), _exact(q):
        if chosen not in backends.KERNELS:
            return reference.attention_rows(q, k, lse, queries, scale=scale, **options)
        added = reference.bias_of_rows(q, queries % q.shape[1], torch.float32, scale, **options)
        return _attention_rows(q, k, lse, queries, added, q.shape[-1] ** -0.5 if scale is None else scale, chosen)


def attention_distance(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    grid: tuple[int, int],
    *,
    patch_size: tuple[float, float] = (1.0, 1.0),
    scale: float | None = None,
) -> Tensor:
    """Return how far each head looks: the mean over patches i of sum_j p_ij |i - j|, j over all patches.

    (The mean attention distance of Dosovitskiy et al., 2021, figures 7 and 10.) |i - j| is the Euclidean distance
    between the centres of two patches. p are the weights as attention has them: what a patch gives to the class token
    and to registers counts as distance 0, and nothing is renormalised. The kernels add the weights up as they come:
    T x T is never in memory. No gradient flows, and the result requires none.

    Args:
        q, k: (B, T, H, d) floating, as :func:`fastvit.ops.attention` takes them. The last h * w tokens are patches in
            raster order, those before them the prefix.
        lse: (B, H, T) floating, what ``attention(..., return_lse=True)`` returned for them.
        grid: (h, w), in patches.
        patch_size: (height, width) of a patch, the unit of the distances: pixels, say.
        scale: of the scores, as attention had it; by default d ** -0.5.

    Returns:
        (B, H) float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a grid of more than T patches.
        BackendUnavailable: the backend that is set can't run this.
    """
    q, k, lse = _accept("attention_distance", q, k, lse)
    tokens = q.shape[1]
    if k.shape[1] != tokens:
        raise ValueError(f"ops.attention_distance: {tokens} queries and {k.shape[1]} keys; they must be as many")
    h, w = grid
    if h < 1 or w < 1 or h * w > tokens:
        raise ValueError(f"ops.attention_distance: a grid of {h}x{w} patches; accepted: from 1 to the {tokens} tokens")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = backends.choose("attention_distance", q, needs_grad=False)
    if chosen not in backends.KERNELS:
        with torch.no_grad(), _exact(q):
            return reference.attention_distance(q, k, lse, grid, patch_size=patch_size, scale=scale)
    return _attention_distance(q, k, lse, scale, [h, w], [float(size) for size in patch_size], chosen)


def _exact(q: Tensor) -> AbstractContextManager[Any]:
    """Return a context that keeps the dtype of the reference's products under autocast."""
    return torch.autocast(q.device.type, enabled=False) if autocast_dtype(q.device) else nullcontext()


def _accept(op: str, q: Tensor, k: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and lse checked, detached, and in the dtype that attention multiplied them in."""
    checks.floating(op, q=q, k=k, lse=lse)
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or 0 in q.shape[2:]:
        raise ValueError(f"ops.{op}: q {tuple(q.shape)}, k {tuple(k.shape)}; expected (B, Tq, H, d), (B, Tk, H, d)")
    checks.shape(op, "lse", lse, (q.shape[0], q.shape[2], q.shape[1]))
    checks.same_device(op, q.device, k=k, lse=lse)
    autocast = autocast_dtype(q.device)
    if autocast is None:
        checks.same_dtype(op, q=q, k=k)
    q, k = cast_for_autocast(autocast, q.detach(), k.detach())
    return q, k, lse.detach()


def _rows(rows: Sequence[int] | Tensor, q: Tensor) -> Tensor:
    """Return the rows as an int64 tensor on q's device; check values that are on the host."""
    tokens, values = q.shape[1], rows
    if isinstance(rows, Tensor):
        if rows.dtype != torch.int64 or rows.ndim != 1 or rows.device != q.device:
            raise ValueError(
                f"ops.attention_rows: rows has shape {tuple(rows.shape)} and dtype {rows.dtype} on {rows.device}; "
                f"expected (R,) of torch.int64 on {q.device}"
            )
        values = rows.tolist() if reference.readable(rows) else ()
    outside = [row for row in values if not -tokens <= row < tokens]
    if outside:
        raise ValueError(f"ops.attention_rows: rows {outside}; accepted: from {-tokens} to {tokens - 1}")
    return rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=torch.int64, device=q.device)


def _forward(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, bias: Tensor | None, scale: float, backend: str
) -> Tensor:
    bias = None if bias is None else bias.expand(q.shape[0], q.shape[2], rows.shape[0], k.shape[1])
    q, k, lse = unit_stride(q), unit_stride(k), lse.float().contiguous()
    return launchers(backend).attention_rows(q, k, lse, rows.contiguous(), scale, bias=bias)


def _distance(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, grid: list[int], patch_size: list[float], backend: str
) -> Tensor:
    lse = lse.float().contiguous()
    return launchers(backend).attention_distance(unit_stride(q), unit_stride(k), lse, scale, grid, patch_size)


_attention_rows = register(
    "attention_rows(Tensor q, Tensor k, Tensor lse, Tensor rows, Tensor? bias, float scale, str backend) -> Tensor",
    _forward,
    lambda a: a.q.new_empty((a.q.shape[0], a.q.shape[2], a.rows.shape[0], a.k.shape[1]), dtype=torch.float32),
)
_attention_distance = register(
    "attention_distance(Tensor q, Tensor k, Tensor lse, float scale, SymInt[] grid, float[] patch_size, str backend) "
    "-> Tensor",
    _distance,
    lambda a: a.q.new_empty((a.q.shape[0], a.q.shape[2]), dtype=torch.float32),
)

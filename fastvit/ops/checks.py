"""Argument checks shared by the ops. Messages name the value that was wrong and what is accepted."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastvit import reference
from fastvit.attention_options import AttentionOptions


def same_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Check that every tensor is on ``device``, that of the op's input."""
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"ops.{op}: {name} is on {t.device}, x is on {device}; all must be on one device")


def floating(op: str, **tensors: Tensor | None) -> None:
    """Check that every tensor is real floating point."""
    for name, t in tensors.items():
        if t is not None and not t.is_floating_point():
            raise ValueError(f"ops.{op}: {name} has dtype {t.dtype}; accepted: float32, float16, bfloat16 or float64")


def shape(op: str, name: str, t: Tensor | None, expected: tuple[int, ...]) -> None:
    """Check that t is None or has exactly the expected shape."""
    if t is not None and tuple(t.shape) != expected:
        raise ValueError(f"ops.{op}: {name} has shape {tuple(t.shape)}, expected {tuple(expected)}")


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Check that all tensors share one dtype."""
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"ops.{op}: dtypes differ: {listed}; they must share one")


def merging(
    op: str, batch: torch.Size, width: int, residual: Tensor | None, gamma: Tensor | None, row_scale: Tensor | None
) -> None:
    """Check residual (*batch, width), and gamma (width,) and row_scale, (batch[0],) or by rows, which need it."""
    if residual is None:
        if gamma is not None or row_scale is not None:
            raise ValueError(f"ops.{op}: gamma and row_scale need a residual")
        return
    shape(op, "residual", residual, (*batch, width))
    shape(op, "gamma", gamma, (width,))
    if row_scale is not None:
        if not batch:
            raise ValueError(f"ops.{op}: row_scale needs a leading batch dimension")
        if tuple(row_scale.shape) != (batch.numel(),):
            shape(op, "row_scale", row_scale, (batch[0],))
        if row_scale.requires_grad:
            raise ValueError(f"ops.{op}: row_scale (drop-path) has no gradient; detach it")


def attention(
    op: str,
    x: Tensor,
    sizes: tuple[int, int, int, int],
    *,
    bias: Tensor | None = None,
    rel_pos_table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rel_pos_keys: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> AttentionOptions:
    """Return the options of ``op`` on x's device, for sizes (B, H, Tq, Tk); a ValueError names the wrong one."""
    batch, heads, queries, keys = sizes
    learned = {"bias": bias, "rel_pos_table": rel_pos_table, "rel_pos_keys": rel_pos_keys}
    floating(op, **learned)
    same_device(op, x.device, **learned, key_mask=key_mask, seed=seed)
    if bias is not None and (
        bias.ndim != 4 or any(n not in (1, size) for n, size in zip(bias.shape, sizes, strict=True))
    ):
        raise ValueError(
            f"ops.{op}: bias has shape {tuple(bias.shape)}; accepted: 4 dimensions that broadcast to "
            f"(B, H, Tq, Tk) = {sizes}"
        )
    present = [name for name, t in learned.items() if t is not None]
    if len(present) > 1:
        raise ValueError(f"ops.{op}: {' and '.join(present)} exclude each other; accepted: one of them")
    if (rel_pos_table is None) != (window is None):
        missing = "rel_pos_table" if rel_pos_table is None else "window"
        raise ValueError(f"ops.{op}: {missing} is missing; rel_pos_table=(rows, H) and window=(h, w) go together")
    if rel_pos_table is not None and window is not None:
        _check_table(op, rel_pos_table, window, queries, keys, heads)
    if rel_pos_keys is not None:
        accepted = [(*of_heads, 2 * queries - 1, x.shape[-1]) for of_heads in ((), (heads,))]
        if queries != keys or tuple(rel_pos_keys.shape) not in accepted:
            raise ValueError(
                f"ops.{op}: rel_pos_keys has shape {tuple(rel_pos_keys.shape)} for {queries} queries and {keys} keys; "
                f"expected as many of both, and (2T-1, d) = {accepted[0]} or (H, 2T-1, d) = {accepted[1]}"
            )
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, keys)):
        raise ValueError(
            f"ops.{op}: key_mask has shape {tuple(key_mask.shape)} and dtype {key_mask.dtype}; expected "
            f"(B, Tk) = {(batch, keys)} of torch.bool, True = kept"
        )
    cu_q, cu_k, max_q, max_k = None, None, 0, 0
    if cu_seqlens is not None:
        for name, t in {**learned, "key_mask": key_mask}.items():
            if t is not None:
                raise ValueError(f"ops.{op}: cu_seqlens and {name} can't be combined; a packed row takes neither")
        cu_q, cu_k, max_q, max_k = _check_starts(op, x, batch, (queries, keys), cu_seqlens, max_seqlen)
    elif max_seqlen is not None:
        raise ValueError(f"ops.{op}: max_seqlen={max_seqlen} without cu_seqlens; they go together")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"ops.{op}: dropout_p={dropout_p}; accepted: from 0 to below 1")
    if dropout_p == 0:
        seed = None
    elif seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        got = "None" if seed is None else f"of shape {tuple(seed.shape)} and dtype {seed.dtype}"
        raise ValueError(f"ops.{op}: dropout_p={dropout_p} with a seed {got}; expected int64 of one element")
    grid = None if window is None else [int(size) for size in window]
    return AttentionOptions(
        bias, rel_pos_table, grid, rel_pos_keys, key_mask, cu_q, cu_k, max_q, max_k, float(dropout_p), seed
    )


def _check_table(op: str, table: Tensor, window: tuple[int, int], queries: int, keys: int, heads: int) -> None:
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"ops.{op}: window={window}; expected (height, width) in patches, both at least 1")
    h, w = window
    rows = (2 * h - 1) * (2 * w - 1)
    if table.ndim != 2 or (table.shape[0] != rows and table.shape[0] != rows + 3) or table.shape[1] != heads:
        raise ValueError(
            f"ops.{op}: rel_pos_table has shape {tuple(table.shape)}; a window of {h}x{w} and {heads} heads take "
            f"{(rows, heads)}, or {(rows + 3, heads)} with a class token"
        )
    tokens = h * w + (table.shape[0] > rows)
    if not queries == keys == tokens:
        raise ValueError(
            f"ops.{op}: {queries} queries and {keys} keys; a rel_pos_table of {table.shape[0]} rows for a window of "
            f"{h}x{w} takes {tokens} of both"
        )


def _check_starts(
    op: str,
    x: Tensor,
    batch: int,
    totals: tuple[int, int],
    cu_seqlens: Tensor | tuple[Tensor, Tensor],
    max_seqlen: int | tuple[int, int] | None,
) -> tuple[Tensor, Tensor, int, int]:
    starts = (cu_seqlens, cu_seqlens) if isinstance(cu_seqlens, Tensor) else tuple(cu_seqlens)
    longest = max_seqlen if isinstance(max_seqlen, tuple) else () if max_seqlen is None else (max_seqlen, max_seqlen)
    if len(starts) != 2 or len(longest) != 2:
        raise ValueError(
            f"ops.{op}: cu_seqlens with max_seqlen={max_seqlen}; expected one tensor and one int, or two of each: "
            "for the queries and for the keys"
        )
    if batch != 1:
        raise ValueError(f"ops.{op}: cu_seqlens with a batch of {batch}; sequences are packed in one row, B = 1")
    for side, cu, total, most in zip(("queries", "keys"), starts, totals, longest, strict=True):
        if cu.dtype != torch.int32 or cu.ndim != 1 or cu.shape[0] < 2 or cu.device != x.device:
            raise ValueError(
                f"ops.{op}: cu_seqlens for {side} has shape {tuple(cu.shape)} and dtype {cu.dtype} on {cu.device}; "
                f"expected (n + 1,) of torch.int32 on {x.device}, for n sequences from 1"
            )
        if reference.readable(cu):  # on a GPU this would wait for it
            _check_values(op, side, cu.tolist(), total, most)
    if starts[0].shape != starts[1].shape:
        counts = " and ".join(str(len(cu) - 1) for cu in starts)
        raise ValueError(f"ops.{op}: cu_seqlens for queries and keys hold {counts} sequences; they must be as many")
    return *starts, *longest


def _check_values(op: str, side: str, starts: list[int], total: int, longest: int) -> None:
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(
            f"ops.{op}: cu_seqlens for {side} goes from {starts[0]} to {starts[-1]}; expected 0 to {total}, the tokens"
        )
    for i, (start, end) in enumerate(pairwise(starts)):
        if not 0 <= end - start <= longest:
            raise ValueError(
                f"ops.{op}: cu_seqlens for {side} has {start} and then {end}, sequence {i}; they must not decrease, "
                f"nor be more than max_seqlen={longest} apart"
            )

"""What attention takes besides q, k, v and the scale: checked in one place, and carried as one through the ops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import reference
from fastvit.ops import checks

SCHEMA = (
    "Tensor? bias, Tensor? rel_pos_table, int[]? window, Tensor? rel_pos_keys, Tensor? key_mask, "
    "Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k, float dropout_p, Tensor? seed"
)


class Modifiers(NamedTuple):
    """The arguments of :data:`SCHEMA`, in its order; as they stand here they change nothing."""

    bias: Tensor | None = None  # broadcastable to (B, H, Tq, Tk)
    rel_pos_table: Tensor | None = None  # ((2h-1)(2w-1) [+3], H)
    window: list[int] | None = None  # [h, w]
    rel_pos_keys: Tensor | None = None  # (2T-1, d) or (H, 2T-1, d)
    key_mask: Tensor | None = None  # (B, Tk) bool
    cu_q: Tensor | None = None  # (n + 1,) int32, where each sequence's queries start
    cu_k: Tensor | None = None  # (n + 1,) int32
    max_q: int = 0
    max_k: int = 0
    dropout_p: float = 0.0
    seed: Tensor | None = None  # int64, one element; present if and only if dropout_p > 0

    @property
    def learned(self) -> Tensor | None:
        """The one that has a gradient; there is at most one."""
        return next((t for t in (self.bias, self.rel_pos_table, self.rel_pos_keys) if t is not None), None)

    def for_reference(self) -> dict[str, Any]:
        """Keywords of :func:`fastvit.reference.attention`."""
        given = self._asdict()
        starts = given.pop("cu_q"), given.pop("cu_k")
        del given["max_q"], given["max_k"]
        return given if self.cu_q is None else given | {"cu_seqlens": starts}

    def as_wide_as(self, q: Tensor, k: Tensor) -> Modifiers:
        """The same, with a bias of the shape of the scores, and keys of distances for every head: strides of 0."""
        batch, queries, heads, dim = q.shape
        bias, distances = self.bias, self.rel_pos_keys
        if bias is not None:
            bias = bias.expand(batch, heads, queries, k.shape[1])
        if distances is not None:
            distances = distances.expand(heads, 2 * queries - 1, dim)
        return self._replace(bias=bias, rel_pos_keys=distances)


UNMODIFIED = Modifiers()


def check(
    op: str,
    x: Tensor,
    sizes: tuple[int, int, int, int],
    *,
    bias: Tensor | None,
    rel_pos_table: Tensor | None,
    window: tuple[int, int] | None,
    rel_pos_keys: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None,
    max_seqlen: int | tuple[int, int] | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Modifiers:
    """The modifiers of ``op`` on x's device with sizes (B, H, Tq, Tk), or a ValueError that names the wrong one."""
    batch, heads, queries, keys = sizes
    checks.floating(op, bias=bias, rel_pos_table=rel_pos_table, rel_pos_keys=rel_pos_keys)
    checks.same_device(
        op, x, bias=bias, rel_pos_table=rel_pos_table, rel_pos_keys=rel_pos_keys, key_mask=key_mask, seed=seed
    )
    if bias is not None and (
        bias.ndim != 4 or any(n not in (1, size) for n, size in zip(bias.shape, sizes, strict=True))
    ):
        raise ValueError(
            f"ops.{op}: bias has shape {tuple(bias.shape)}; accepted: 4 dimensions that broadcast to "
            f"(B, H, Tq, Tk) = {sizes}"
        )
    learned = {"bias": bias, "rel_pos_table": rel_pos_table, "rel_pos_keys": rel_pos_keys}
    given = [name for name, t in learned.items() if t is not None]
    if len(given) > 1:
        raise ValueError(f"ops.{op}: {' and '.join(given)} exclude each other; accepted: one of them")
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
    return Modifiers(
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

"""The options of attention besides q, k, v and the scale, defined once.

:class:`AttentionOptions` is the only list of them. The schemas, fakes and autograd rules of ``ops/attention.py``, the
placements of ``ops/sharding.py``, the FLOPs, the reference's keywords and the CUDA call derive from it;
``tests/test_attention_options.py`` holds the public signatures to it, and ``tests/emulated/test_attention_options.py``
the C++ schemas. A new option is one field here and what each kernel does with it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from fastvit import reference
from fastvit.ops import checks


class Option(NamedTuple):
    """The properties of an option besides its type: its letters in ``ops/sharding.py``, and whether it is learned."""

    by_batch: str = "-"  # how ranks that share the batch hold it
    by_heads: str = "-"  # how ranks that share the heads hold it
    learned: bool = False  # it has a gradient; at most one such option is given


class AttentionOptions(NamedTuple):
    """The options in the order of every schema and launch; the defaults change nothing."""

    # Added to the scores: of 4 dimensions that broadcast to (B, H, Tq, Tk).
    bias: Annotated[Tensor | None, Option("a", "a", learned=True)] = None
    # BEiT's table of relative positions, ((2h-1)(2w-1) [+3], H), and the [h, w] that goes with it.
    rel_pos_table: Annotated[Tensor | None, Option("r", "t", learned=True)] = None
    window: Annotated[list[int] | None, Option()] = None
    # Relative position keys, (2T-1, d) or (H, 2T-1, d): scale * q_i . rel_pos_keys[i - j + T - 1] joins score (i, j).
    rel_pos_keys: Annotated[Tensor | None, Option("r", "k", learned=True)] = None
    # (B, Tk) bool, True = kept.
    key_mask: Annotated[Tensor | None, Option("b", "r")] = None
    # (n + 1,) int32: where each packed sequence's queries, and its keys, start; and the longest of either.
    cu_q: Annotated[Tensor | None, Option("!", "r")] = None
    cu_k: Annotated[Tensor | None, Option("!", "r")] = None
    max_q: Annotated[int, Option()] = 0
    max_k: Annotated[int, Option()] = 0
    # The probability that a weight is dropped, and the int64 seed of one element, given if and only if that is above 0.
    dropout_p: Annotated[float, Option()] = 0.0
    seed: Annotated[Tensor | None, Option("!", "!")] = None

    @property
    def learned(self) -> Tensor | None:
        """The option that has a gradient; there is at most one."""
        return next((t for t in (getattr(self, name) for name in LEARNED) if t is not None), None)

    def for_reference(self) -> dict[str, Any]:
        """Return the keywords of :func:`fastvit.reference.attention`."""
        keywords = self._asdict()
        starts = keywords.pop("cu_q"), keywords.pop("cu_k")
        del keywords["max_q"], keywords["max_k"]
        return keywords if self.cu_q is None else keywords | {"cu_seqlens": starts}

    def expanded(self, q: Tensor, k: Tensor) -> AttentionOptions:
        """Return the same with a bias of the shape of the scores and relative position keys for every head."""
        batch, queries, heads, dim = q.shape
        bias, keys = self.bias, self.rel_pos_keys
        if bias is not None:
            bias = bias.expand(batch, heads, queries, k.shape[1])
        if keys is not None:
            keys = keys.expand(heads, 2 * queries - 1, dim)
        return self._replace(bias=bias, rel_pos_keys=keys)


NO_OPTIONS = AttentionOptions()
_TYPES = {Tensor | None: "Tensor?", list[int] | None: "int[]?", int: "SymInt", float: "float"}
_HINTS = {name: get_args(hint) for name, hint in get_type_hints(AttentionOptions, include_extras=True).items()}
OPTIONS: dict[str, Option] = {name: option for name, (_, option) in _HINTS.items()}
SCHEMA = ", ".join(f"{_TYPES[kind]} {name}" for name, (kind, _) in _HINTS.items())
TENSORS = tuple(name for name, (kind, _) in _HINTS.items() if kind == Tensor | None)
LEARNED = tuple(name for name, option in OPTIONS.items() if option.learned)


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
) -> AttentionOptions:
    """Return the options of ``op`` on x's device, for sizes (B, H, Tq, Tk); a ValueError names the wrong one."""
    batch, heads, queries, keys = sizes
    learned = {"bias": bias, "rel_pos_table": rel_pos_table, "rel_pos_keys": rel_pos_keys}
    checks.floating(op, **learned)
    checks.same_device(op, x, **learned, key_mask=key_mask, seed=seed)
    if bias is not None and (
        bias.ndim != 4 or any(n not in (1, size) for n, size in zip(bias.shape, sizes, strict=True))
    ):
        raise ValueError(
            f"ops.{op}: bias has shape {tuple(bias.shape)}; accepted: 4 dimensions that broadcast to "
            f"(B, H, Tq, Tk) = {sizes}"
        )
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

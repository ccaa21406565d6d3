"""The options of attention besides q, k, v and the scale, defined once.

:class:`AttentionOptions` is the only list of them. The schemas, fakes and autograd rules of ``ops/attention.py``, the
placements of ``ops/sharding.py``, the FLOPs, the reference's keywords and the CUDA call derive from it;
``tests/test_attention_options.py`` holds the public signatures to it, and ``tests/emulated/test_attention_options.py``
the C++ schemas. A new option is one field here, its check (``checks.attention``)
and what each kernel does with it.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from torch import Tensor


class Option(NamedTuple):
    """The properties of an option besides its type: its letters in ``ops/sharding.py``, and whether it is learned."""

    by_batch: str = "-"  # how ranks that share the batch hold it
    by_heads: str = "-"  # how ranks that share the heads hold it
    learned: bool = False  # it has a gradient; at most one such option is present


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
    # The probability that a weight is dropped, and the int64 seed of one element, there exactly where that is above 0.
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

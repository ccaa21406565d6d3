"""Multi-head self-attention and the attention pools, on :mod:`fastvit.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops, reference
from fastvit.layers import fuse
from fastvit.layers.fuse import Merge
from fastvit.layers.mlp import Mlp
from fastvit.layers.packed import leading, reduce_tokens
from fastvit.layers.positions import Batches, Positions
from fastvit.packing import Sequences

Window = tuple[int, int]


def head_dim_of(width: int, num_heads: int) -> int:
    """Width of one head, or a ValueError where the heads do not divide the width."""
    if num_heads < 1 or width % num_heads:
        fits = [n for n in range(1, min(width, 64) + 1) if width % n == 0]
        raise ValueError(
            f"num_heads={num_heads} does not divide embed_dim={width}; accepted for this width: "
            f"{', '.join(map(str, fits))}"
        )
    return width // num_heads


def head_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Norm each head of x (B, T, H, d) -> (B, T, H, d)."""
    if fuse.is_identity(norm):
        return x
    given = fuse.norm_arguments(norm)
    # A module that is not ours sees timm's layout, (B, H, T, d).
    out: Any = ops.layer_norm(x, *given) if given else norm(x.transpose(1, 2)).transpose(1, 2)
    return out


def as_bias(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of F.scaled_dot_product_attention as what is added to the scores, of 4 dimensions; bool's in ``dtype``."""
    attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=dtype).masked_fill(~attn_mask, float("-inf"))


def mask_arguments(attn_mask: Tensor, x: Tensor) -> dict[str, Tensor]:
    """A mask for tokens x (B, T, D) as ops.attention takes it: of keys where it is one, else a bias."""
    if attn_mask.dtype == torch.bool and all(size == 1 for size in attn_mask.shape[:-1][-2:]):
        return {"key_mask": attn_mask.reshape(-1, attn_mask.shape[-1]).expand(x.shape[:2])}
    return {"bias": as_bias(attn_mask, x.dtype)}


def between(queries: Sequences, keys: Sequences) -> dict[str, Any]:
    """Arguments of ops.attention for queries of packed images to the keys of their own image."""
    return {
        "cu_seqlens": (queries.cu_seqlens, keys.cu_seqlens),
        "max_seqlen": (queries.longest, keys.longest),
    }


class Relative(NamedTuple):
    """What is added to the scores by how far apart two tokens are: nothing, or by a table, or by keys of distances."""

    table: Tensor | None = None  # with its window, as ops.attention takes them
    window: Window | None = None
    keys: Tensor | None = None  # ((H,) 2T-1, d)

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return self.keys is not None or self.table is not None

    def options(self) -> dict[str, Any]:
        """The same as arguments of ops.attention."""
        if self.keys is not None:
            return {"rel_pos_keys": self.keys}
        return {} if self.table is None else {"rel_pos_table": self.table, "window": self.window}

    def bias(self, q: Tensor, scale: float) -> Tensor | None:
        """The same as a bias of all queries q (B, T, H, d), of T x T."""
        if self.keys is not None:
            return reference.relative_bias(q, self.keys, scale).to(q.dtype)
        return None if self.table is None or self.window is None else reference.table_bias(self.table, self.window)

    def added_to(self, options: dict[str, Any], q: Tensor, scale: float) -> dict[str, Any]:
        """Arguments of ops.attention with these; one bias where there is one already, T x T as that is."""
        if "bias" in options and (bias := self.bias(q, scale)) is not None:
            return options | {"bias": options["bias"] + bias}
        return options | self.options()


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017; appendix A of the ViT paper); timm's arguments and keys.

    Args:
        dim: width D of the tokens.
        num_heads: heads H.
        attn_head_dim: width of a head; by default D / H.
        dim_out: width of the result; by default D.
        qkv_bias, proj_bias: whether the matrices have a bias.
        qk_norm: norm the queries and keys of each head.
        scale_norm: norm the heads' result before the projection.
        attn_drop, proj_drop: dropout rates on the attention weights and on the result.
        norm_layer: norm class for qk_norm and scale_norm.

    Attributes:
        fused_attn: False computes the attention weights explicitly and passes them through ``attn_drop``, where a
            hook can read them; so does a hook on ``attn_drop``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer")
        self.num_heads = num_heads
        self.head_dim = head_dim_of(dim, num_heads) if attn_head_dim is None else attn_head_dim
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.fused_attn = True

        def norm(wanted: bool, width: int) -> nn.Module:
            return norm_layer(width, **dd) if wanted and norm_layer is not None else nn.Identity()

        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **dd)
        self.q_norm = norm(qk_norm, self.head_dim)
        self.k_norm = norm(qk_norm, self.head_dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm(scale_norm, self.attn_dim)
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        sequences: Sequences | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D).

        Args:
            attn_mask, is_causal: as in F.scaled_dot_product_attention, broadcast to (B, H, T, T).
            sequences: where the images are of which x (1, total, D) is packed; each attends to itself alone.
            positions: where the tokens are, if queries and keys are turned or the scores biased by it.
        """
        return self.branch(x, attn_mask=attn_mask, is_causal=is_causal, sequences=sequences, positions=positions)

    def branch(
        self,
        x: Tensor,
        norm: nn.Module | None = None,
        merge: Merge | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        tokens: int | None = None,
        sequences: Sequences | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """merge(attention(norm(x))): the whole branch of a block, with the norm and the residual in the ops.

        Args:
            tokens: only the first so many tokens of the result are computed, of each image if packed. They read the
                keys and values of all.
        """
        rope = None if positions is None else positions.rope
        batches = None if positions is None else positions.batches
        relative = self._relative(positions)
        options = self._options(x, attn_mask, is_causal, sequences)
        every = batches is not None or relative.given  # which want as many queries as keys
        queries = None if every else tokens
        if queries is not None and rope is None and fuse.is_fusable(self.qkv, nn.Linear):
            q, k, v = self._few_queries(x, norm, queries, sequences)
            q, k = head_norm(self.q_norm, q), head_norm(self.k_norm, k)
        else:
            qkv = self._project_in(x, norm).unflatten(-1, (3, self.num_heads, self.head_dim))
            plain = rope is None and fuse.is_identity(self.q_norm) and fuse.is_identity(self.k_norm)
            if options is not None and plain:
                packed = self._fused(ops.attention_qkvpacked, [qkv], qkv[:, :, 0], options, relative, batches)
                return self._project(leading(packed, tokens, sequences), merge)
            q, k, v = qkv.unbind(2)
            q, k = head_norm(self.q_norm, q), head_norm(self.k_norm, k)
            if rope is not None:
                q, k = ops.rotate(q, k, *rope)
            q = leading(q, queries, sequences)
        if options is None:
            if (bias := relative.bias(q, self.scale)) is not None:
                if is_causal:
                    above = torch.ones(bias.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
                    bias, is_causal = bias.masked_fill(above, float("-inf")), False
                attn_mask = bias if attn_mask is None else bias + as_bias(attn_mask, q.dtype)
            out = self._attend(q, k, v, attn_mask, is_causal)
        else:
            if queries is not None and sequences is not None:
                options |= between(sequences.leading(queries), sequences)
            out = self._fused(ops.attention, [q, k, v], q, options, relative, batches)
        return self._project(out if queries is not None else leading(out, tokens, sequences), merge)

    def _relative(self, positions: Positions | None) -> Relative:
        """What the scores have by relative position."""
        return Relative() if positions is None else Relative(positions.table, positions.window)

    def _fused(
        self,
        op: Callable[..., Any],
        heads: list[Tensor],
        q: Tensor,
        options: dict[str, Any],
        relative: Relative,
        batches: Batches | None,
    ) -> Tensor:
        """op of heads (B, T, ...), whose queries are q; or packed (1, total, ...), one call for each size of image."""
        if batches is None:
            out: Tensor = op(*heads, **relative.added_to(options, q, self.scale))
            return out
        options = {name: value for name, value in options.items() if name not in ("cu_seqlens", "max_seqlen")}
        if batches.order is not None:
            heads = [t.index_select(1, batches.order) for t in heads]
        found, parts = [], [t[0].split([batch.images * batch.tokens for batch in batches.each]) for t in heads]
        for i, (batch, *part) in enumerate(zip(batches.each, *parts, strict=True)):
            own = options | ({"seed": options["seed"] + i} if "seed" in options else {})
            given = (t.unflatten(0, (batch.images, batch.tokens)) for t in part)
            found.append(op(*given, **own, **self._relative(batch.positions).options()).flatten(0, 1))
        out = torch.cat(found).unsqueeze(0)
        return out if batches.back is None else out.index_select(1, batches.back)

    def _few_queries(
        self, x: Tensor, norm: nn.Module | None, tokens: int, sequences: Sequences | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first tokens only, keys and values of all: the first third of the matrix's rows is theirs."""
        heads, rows = (self.num_heads, self.head_dim), self.attn_dim
        weight, bias = self.qkv.weight, self._bias_in()
        q_bias, kv_bias = (None, None) if bias is None else (bias[:rows], bias[rows:])
        q = fuse.folded(ops.linear, leading(x, tokens, sequences), weight[:rows], q_bias, norm=norm)
        kv = fuse.folded(ops.linear, x, weight[rows:], kv_bias, norm=norm)
        k, v = kv.unflatten(-1, (2, *heads)).unbind(2)
        return q.unflatten(-1, heads), k, v

    def _bias_in(self) -> Tensor | None:
        """The bias of queries, keys and values, (3 * H * d,)."""
        return self.qkv.bias

    def _project_in(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """x (B, T, D) -> queries, keys and values, (B, T, 3 * H * d)."""
        return fuse.linear(self.qkv, x, norm=norm)

    def _options(
        self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, sequences: Sequences | None
    ) -> dict[str, Any] | None:
        """Arguments for ops.attention, or None where the weights are to be seen, or more is wanted than it does."""
        drop = self.attn_drop
        rate = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        unseen = self.fused_attn and fuse.is_fusable(drop, nn.Dropout, nn.Identity, or_counted=sequences is not None)
        # While torch.fx traces, a mask is no tensor yet.
        known = attn_mask is None or (sequences is None and isinstance(attn_mask, Tensor))
        if not (unseen and known and is_causal is False and rate < 1.0):
            if sequences is None:
                return None
            raise ValueError(
                "attention among packed images takes no attn_mask or is_causal, and its weights can't be opened: leave "
                "fused_attn True and attn_drop without hooks"
            )
        options: dict[str, Any] = {"scale": self.scale}
        if attn_mask is not None:
            options |= mask_arguments(attn_mask, x)
        if rate > 0.0:  # drawn where it is read: nothing waits for it, and checkpointing draws it again
            options |= {"dropout_p": rate, "seed": torch.randint(2**63 - 1, (1,), device=x.device)}
        if sequences is not None:
            options |= {"cu_seqlens": sequences.cu_seqlens, "max_seqlen": sequences.longest}
        return options

    def _project(self, out: Tensor, merge: Merge | None) -> Tensor:
        """out (B, T, H, d) -> (B, T, D)."""
        norm = None if fuse.is_identity(self.norm) else self.norm
        return fuse.linear(self.proj, out.flatten(2), norm=norm, dropout=self.proj_drop, merge=merge)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Causal attention, or attention with its weights open to hooks. All (B, T, H, d)."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.fused_attn and fuse.is_fusable(self.attn_drop, nn.Dropout):
            dropout = self.attn_drop.p if self.attn_drop.training else 0.0
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
            )
            return out.transpose(1, 2)
        weights = (q * self.scale) @ k.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            weights = weights.masked_fill(~attn_mask, float("-inf")) if masked else weights + attn_mask
        return (self.attn_drop(weights.softmax(dim=-1)) @ v).transpose(1, 2)


class AttentionPoolLatent(nn.Module):
    """Pool the tokens by attention from a learned query, "MAP" (Zhai et al., "Scaling Vision Transformers", 2022).

    Args:
        in_features: width D.
        num_heads: heads H.
        mlp_ratio: hidden width of the MLP that follows, in units of D.
        norm_layer, act_layer: classes for that MLP.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = head_dim_of(in_features, num_heads)
        self.out_features = in_features
        self.latent = nn.Parameter(torch.zeros(1, 1, in_features, **dd))
        self.q = nn.Linear(in_features, in_features, **dd)
        self.kv = nn.Linear(in_features, 2 * in_features, **dd)
        self.proj = nn.Linear(in_features, in_features, **dd)
        self.proj_drop = nn.Dropout(0.0)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(in_features, **dd)
        self.mlp = Mlp(in_features, int(in_features * mlp_ratio), act_layer=act_layer, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the query from a normal of variance 1 / D, cut at two deviations."""
        std = self.out_features**-0.5
        nn.init.trunc_normal_(self.latent, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor, sequences: Sequences | None = None) -> Tensor:
        """x (B, T, D) -> (B, D), or packed images (1, total, D) -> (n, D)."""
        heads = (self.num_heads, self.head_dim)
        q = fuse.linear(self.q, self.latent).unflatten(-1, heads)  # (1, 1, H, d)
        k, v = fuse.linear(self.kv, x).unflatten(-1, (2, *heads)).unbind(2)
        if sequences is None:
            out: Any = ops.attention(q.expand(x.shape[0], -1, -1, -1), k, v)
        else:
            one = q.expand(-1, sequences.images, -1, -1)
            out = ops.attention(one, k, v, **between(sequences.leading(1), sequences)).transpose(0, 1)
        x = fuse.linear(self.proj, out.flatten(2), dropout=self.proj_drop)
        y = self.mlp.branch(x, self.norm) if fuse.is_fusable(self.mlp, Mlp) else self.mlp(self.norm(x))
        return (x + y)[:, 0]


class AttentionPoolPrr(nn.Module):
    """Let the tokens attend to each other once more, without parameters, then pool them; timm's "prr".

    Args:
        dim: width D.
        num_heads: heads H.
        pool_type: "token" (the first) or "avg".
    """

    def __init__(self, dim: int, num_heads: int = 8, pool_type: str = "token") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim_of(dim, num_heads)
        self.pool = pool_type
        self.out_features = dim

    def forward(self, x: Tensor, sequences: Sequences | None = None) -> Tensor:
        """x (B, T, D) -> (B, D), or packed images (1, total, D) -> (n, D)."""
        tokens = x.unflatten(-1, (self.num_heads, self.head_dim))
        queries = leading(tokens, 1 if self.pool == "token" else None, sequences)
        read = sequences.leading(1) if sequences is not None and self.pool == "token" else sequences
        options = {} if sequences is None or read is None else between(read, sequences)
        out: Any = ops.attention(queries, tokens, tokens, **options)
        return reduce_tokens(out.flatten(2), "mean", read)

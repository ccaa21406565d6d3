"""Multi-head self-attention and the attention pools, on :mod:`fastvit.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops, reference
from fastvit.layers import fuse
from fastvit.layers.fuse import Residual
from fastvit.layers.mlp import Mlp
from fastvit.layers.packed import leading, reduce_tokens
from fastvit.layers.token_context import NO_CONTEXT, Batches, TokenContext, with_masks
from fastvit.packing import Sequences

Window = tuple[int, int]


def head_dim_of(width: int, num_heads: int) -> int:
    """Return the width of one head, or raise a ValueError where the heads do not divide the width."""
    if num_heads < 1 or width % num_heads:
        fits = [n for n in range(1, min(width, 64) + 1) if width % n == 0]
        raise ValueError(
            f"num_heads={num_heads} does not divide embed_dim={width}; accepted for this width: "
            f"{', '.join(map(str, fits))}"
        )
    return width // num_heads


def head_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Return x (B, T, H, d) with each head normed."""
    if fuse.is_identity(norm):
        return x
    parameters = fuse.norm_arguments(norm)
    # A module that is not ours sees timm's layout, (B, H, T, d).
    out: Any = ops.layer_norm(x, *parameters) if parameters else norm(x.transpose(1, 2)).transpose(1, 2)
    return out


def as_bias(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of F.scaled_dot_product_attention as a bias of 4 dimensions; that of a bool mask in ``dtype``."""
    attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=dtype).masked_fill(~attn_mask, float("-inf"))


def mask_arguments(attn_mask: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Return a mask for tokens x (B, T, D) as ops.attention takes it: a key mask where it is one, else a bias."""
    if attn_mask.dtype == torch.bool and all(size == 1 for size in attn_mask.shape[:-1][-2:]):
        return {"key_mask": attn_mask.reshape(-1, attn_mask.shape[-1]).expand(x.shape[:2])}
    return {"bias": as_bias(attn_mask, x.dtype)}


def between(queries: Sequences, keys: Sequences) -> dict[str, Any]:
    """Return the arguments of ops.attention for queries of packed images to the keys of their own image."""
    return {
        "cu_seqlens": (queries.cu_seqlens, keys.cu_seqlens),
        "max_seqlen": (queries.longest, keys.longest),
    }


def relative_bias(
    q: Tensor,
    scale: float,
    rel_pos_keys: Tensor | None = None,
    rel_pos_table: Tensor | None = None,
    window: Window | None = None,
) -> Tensor:
    """Return the scores that relative positions add for queries q (B, T, H, d), as a bias of T x T."""
    if rel_pos_keys is not None:
        return reference.relative_bias(q, rel_pos_keys, scale).to(q.dtype)
    assert rel_pos_table is not None and window is not None
    return reference.table_bias(rel_pos_table, window)


@fuse.branch
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

    #: what the ranks of :func:`fastvit.integrations.parallel.plan` divide; a subclass states it for itself
    tensor_parallel = "heads"

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

        def norm(use: bool, width: int) -> nn.Module:
            return norm_layer(width, **dd) if use and norm_layer is not None else nn.Identity()

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
        context: TokenContext = NO_CONTEXT,
    ) -> Tensor:
        """Return the attention of x (B, T, D) among its tokens, (B, T, D).

        Args:
            attn_mask, is_causal: as in F.scaled_dot_product_attention, broadcast to (B, H, T, T).
            context: of the tokens; see :class:`fastvit.layers.token_context.TokenContext`.
        """
        return self.branch(x, context=with_masks(context, attn_mask, is_causal))

    def branch(
        self,
        x: Tensor,
        norm: nn.Module | None = None,
        residual: Residual | None = None,
        context: TokenContext = NO_CONTEXT,
    ) -> Tensor:
        """Return residual(attention(norm(x))), the branch of a block, with the norm and the residual in the ops."""
        relative = self.relative_options(context)
        # Biases by relative position are for as many queries as keys.
        keep = None if relative or context.batches is not None else context.keep
        options = self._fused_options(x, context, keep)
        if keep is not None and context.rope is None and fuse.is_fusable(self.qkv, nn.Linear):
            out = self._attend(*self._leading_qkv(x, norm, keep, context.sequences), options, relative, context)
        else:
            qkv = self._project(x, norm)
            if options is not None and keep is None and self._is_plain(context):
                out = self._fused(ops.attention_qkvpacked, [qkv], qkv[:, :, 0], options, relative, context.batches)
            else:
                q, k, v = self._rotated(qkv, context)
                out = self._attend(leading(q, keep, context.sequences), k, v, options, relative, context)
            if keep is None:
                out = leading(out, context.keep, context.sequences)
        return fuse.linear(self.proj, out.flatten(2), norm=self.norm, dropout=self.proj_drop, residual=residual)

    def heads(self, x: Tensor, norm: nn.Module | None, context: TokenContext) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of norm(x), (B, T, H, d) each, normed and rotated."""
        return self._rotated(self._project(x, norm), context)

    def _project(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Return the queries, keys and values of norm(x) as they are projected, (B, T, 3, H, d)."""
        qkv = fuse.linear(self.qkv, x, norm=norm, bias=self._qkv_bias())
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dim))

    def relative_options(self, context: TokenContext) -> dict[str, Any]:
        """Return the arguments of ops.attention for scores by relative position; none where there are no such."""
        if context.rel_pos_table is None:
            return {}
        return {"rel_pos_table": context.rel_pos_table, "window": context.window}

    def _qkv_bias(self) -> Tensor | None:
        """Return a bias of queries, keys and values (3 * H * d,) that the matrix does not hold itself."""
        return None

    def _leading_qkv(
        self, x: Tensor, norm: nn.Module | None, keep: int, sequences: Sequences | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of the first ``keep`` tokens, and keys and values of all."""
        heads, rows = (self.num_heads, self.head_dim), self.attn_dim  # the matrix's first third is the queries'
        weight, bias = self.qkv.weight, self._qkv_bias()
        bias = self.qkv.bias if bias is None else bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:rows], bias[rows:])
        q = fuse.fused(ops.linear, leading(x, keep, sequences), weight[:rows], q_bias, norm=norm)
        kv = fuse.fused(ops.linear, x, weight[rows:], kv_bias, norm=norm)
        k, v = kv.unflatten(-1, (2, *heads)).unbind(2)
        return head_norm(self.q_norm, q.unflatten(-1, heads)), head_norm(self.k_norm, k), v

    def _is_plain(self, context: TokenContext) -> bool:
        """Return whether queries and keys go into the scores as they are projected."""
        return context.rope is None and fuse.is_identity(self.q_norm) and fuse.is_identity(self.k_norm)

    def _rotated(self, qkv: Tensor, context: TokenContext) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of qkv (B, T, 3, H, d), with queries and keys normed and rotated."""
        q, k, v = qkv.unbind(2)
        q, k = head_norm(self.q_norm, q), head_norm(self.k_norm, k)
        if context.rope is not None:
            q, k = ops.rotate(q, k, *context.rope)
        return q, k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any] | None,
        relative: dict[str, Any],
        context: TokenContext,
    ) -> Tensor:
        """Return the attention of heads (B, T, H, d): by ops.attention, or without ``options`` step by step."""
        if options is not None:
            return self._fused(ops.attention, [q, k, v], q, options, relative, context.batches)
        attn_mask, is_causal = context.attn_mask, context.is_causal
        if relative:
            bias = relative_bias(q, self.scale, **relative)
            if is_causal:
                above = torch.ones(bias.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
                bias, is_causal = bias.masked_fill(above, float("-inf")), False
            attn_mask = bias if attn_mask is None else bias + as_bias(attn_mask, q.dtype)
        return self._unfused(q, k, v, attn_mask, is_causal)

    def _fused(
        self,
        op: Callable[..., Any],
        heads: list[Tensor],
        q: Tensor,
        options: dict[str, Any],
        relative: dict[str, Any],
        batches: Batches | None,
    ) -> Tensor:
        """Return op(heads), (B, T, ...) of queries q, or of packed images (1, total, ...) one call for each size."""
        if batches is None:
            if relative and "bias" in options:  # both are one bias of T x T
                options |= {"bias": options["bias"] + relative_bias(q, self.scale, **relative)}
                relative = {}
            out: Tensor = op(*heads, **options, **relative)
            return out
        if batches.order is not None:
            heads = [t.index_select(1, batches.order) for t in heads]
        found, parts = [], [t[0].split([batch.images * batch.tokens for batch in batches.each]) for t in heads]
        for i, (batch, *part) in enumerate(zip(batches.each, *parts, strict=True)):
            own = options | ({"seed": options["seed"] + i} if "seed" in options else {})
            each = (t.unflatten(0, (batch.images, batch.tokens)) for t in part)
            found.append(op(*each, **own, **self.relative_options(batch.context)).flatten(0, 1))
        out = torch.cat(found).unsqueeze(0)
        return out if batches.back is None else out.index_select(1, batches.back)

    def _fused_options(self, x: Tensor, context: TokenContext, keep: int | None = None) -> dict[str, Any] | None:
        """Return the arguments of ops.attention, or None where hooks see the weights, or a mask is none that it takes.

        ``keep``: how many leading tokens of each image are queries.
        """
        attn_mask, sequences, drop = context.attn_mask, context.sequences, self.attn_drop
        rate = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        unseen = self.fused_attn and fuse.is_fusable(drop, nn.Dropout, nn.Identity, or_counted=sequences is not None)
        # While torch.fx traces, a mask is no tensor yet.
        known = attn_mask is None or (sequences is None and isinstance(attn_mask, Tensor))
        if not (unseen and known and context.is_causal is False and rate < 1.0):
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
        if sequences is not None and context.batches is None:
            if keep is None:
                options |= {"cu_seqlens": sequences.cu_seqlens, "max_seqlen": sequences.longest}
            else:
                options |= between(sequences.leading(keep), sequences)
        return options

    def _unfused(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Return causal attention, or attention with its weights open to hooks. All (B, T, H, d)."""
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
        """Return the pooled tokens x (B, T, D), (B, D), or of packed images (1, total, D), (n, D)."""
        q, k, v = self._heads(x)
        if sequences is None:
            out: Any = ops.attention(q.expand(x.shape[0], -1, -1, -1), k, v)
        else:
            one = q.expand(-1, sequences.images, -1, -1)
            out = ops.attention(one, k, v, **between(sequences.leading(1), sequences)).transpose(0, 1)
        x = fuse.linear(self.proj, out.flatten(2), dropout=self.proj_drop)
        y = self.mlp.branch(x, self.norm) if fuse.is_fusable(self.mlp, Mlp) else self.mlp(self.norm(x))
        return (x + y)[:, 0]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query (1, 1, H, d), and the keys and values of x, (B, T, H, d) each."""
        heads = (self.num_heads, self.head_dim)
        k, v = fuse.linear(self.kv, x).unflatten(-1, (2, *heads)).unbind(2)
        return fuse.linear(self.q, self.latent).unflatten(-1, heads), k, v

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries (B, 1, H, d) and keys (B, T, H, d) of x (B, T, D)."""
        q, k, _ = self._heads(x)
        return q.expand(x.shape[0], -1, -1, -1), k


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
        """Return the pooled tokens x (B, T, D), (B, D), or of packed images (1, total, D), (n, D)."""
        tokens = x.unflatten(-1, (self.num_heads, self.head_dim))
        queries = leading(tokens, 1 if self.pool == "token" else None, sequences)
        read = sequences.leading(1) if sequences is not None and self.pool == "token" else sequences
        options = {} if sequences is None or read is None else between(read, sequences)
        out: Any = ops.attention(queries, tokens, tokens, **options)
        return reduce_tokens(out.flatten(2), "mean", read)

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries (B, 1 or T, H, d) and keys (B, T, H, d) of x (B, T, D)."""
        k = x.unflatten(-1, (self.num_heads, self.head_dim))
        return (k[:, :1] if self.pool == "token" else k), k

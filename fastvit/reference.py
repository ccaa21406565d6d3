"""The definition of every op in plain PyTorch: the judge of all kernels, and a backend of its own.

Notation: B images, T tokens, D width, H heads, d = D / H. Nothing here checks its arguments
(``fastvit.ops`` does) and nothing is clever, so that export, ``torch.compile``, ``torch.func`` and
double backward see through it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.activations import ACTIVATIONS, GATED
from fastvit.packing import Layout, PackedImages

Norm = tuple[Tensor, Tensor | None, float]  # weight (D,), bias (D,) or None, eps


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Apply a named activation; a gated one multiplies the second half of the last dimension by act(first half)."""
    if activation is None:
        return x
    if activation in GATED:
        gate, value = x.chunk(2, dim=-1)
        return ACTIVATIONS[GATED[activation]].formula(gate) * value
    return ACTIVATIONS[activation].formula(x)


def merge(y: Tensor, residual: Tensor, gamma: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """Return residual + row_scale * gamma * y in the residual's dtype; row_scale (B,) scales images, else rows."""
    if gamma is not None:
        y = y * gamma
    if row_scale is not None:
        images = row_scale.shape[0] == y.shape[0]
        y = y * row_scale.view(*(y.shape[:1] if images else y.shape[:-1]), *[1] * (y.ndim - 1 if images else 1))
    return (residual + y).to(residual.dtype)


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Apply LayerNorm over the last dimension, result in ``dtype``; float32 weights are not rounded."""
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if dtypes == {dtype}:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(dtype)


def normalise_pixels(images: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return (images - mean) / std in ``dtype``; images (..., C, H, W), uint8 ones in units of 255."""
    if images.dtype == torch.uint8:
        images = images.to(torch.promote_types(dtype, torch.float32)) / 255
    if mean is not None:
        images = images - mean.to(images.dtype).view(-1, 1, 1)
    if std is not None:
        images = images / std.to(images.dtype).view(-1, 1, 1)
    return images.to(dtype)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.patch_embed`. The strided convolution of the paper's equation 1, then the rows."""
    if images.dtype == torch.uint8 and images.shape[1] != weight.shape[1]:  # (B, H, W, C)
        images = images.permute(0, 3, 1, 2)
    images = normalise_pixels(images, mean, std, weight.dtype)
    x = F.conv2d(images, weight, None if bias is None else bias.to(weight.dtype), weight.shape[2:])
    x = x.flatten(2).transpose(1, 2).to(out_dtype or x.dtype)
    if pos_embed is not None and pos_embed.shape[1] == x.shape[1]:
        x = (x + pos_embed).to(x.dtype)
        pos_embed = None
    if prefix_tokens is not None:
        x = torch.cat([prefix_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
    return x if pos_embed is None else (x + pos_embed).to(x.dtype)


def patch_embed_packed(
    packed: PackedImages,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.patch_embed_packed`. The patches are gathered, then multiplied as any matrix."""
    x = F.linear(
        packed_patches(packed, mean, std, weight.dtype),
        weight.flatten(1),
        None if bias is None else bias.to(weight.dtype),
    )
    x = x.to(out_dtype or x.dtype)
    if pos_embed is not None:
        x = (x + pos_embed).to(x.dtype)
    return (x if prefix_tokens is None else with_prefix(x, packed.layout, prefix_tokens)).unsqueeze(0)


def packed_patches(packed: PackedImages, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the normalised pixels of each patch in the weight's order, (N, C * p * q)."""
    return normalise_pixels(packed.patches(), mean, std, dtype).flatten(1)


def with_prefix(x: Tensor, layout: Layout, prefix_tokens: Tensor) -> Tensor:
    """Return patches x (N, D) with the prefix tokens (1, P, D) before those of each image: (N + n * P, D)."""
    prefix = prefix_tokens.shape[1]
    at = layout.prefix_tokens(prefix)
    out = x.new_zeros(x.shape[0] + at.numel(), x.shape[1]).index_copy(0, layout.patch_tokens(prefix), x)
    return out.index_copy(0, at.flatten(), prefix_tokens.to(x.dtype).expand(len(at), -1, -1).flatten(0, 1))


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fastvit.ops.layer_norm`."""
    if residual is None:
        return normalise(x, weight, bias, eps, out_dtype or x.dtype)
    stream = merge(x, residual, gamma, row_scale)
    return normalise(stream, weight, bias, eps, out_dtype or stream.dtype), stream


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.linear`."""
    if norm is not None:
        x = normalise(x, *norm, weight.dtype)
    y = activate(F.linear(x, weight, None if bias is None else bias.to(weight.dtype)), activation)
    return y if residual is None else merge(y, residual, gamma, row_scale)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    norm: Norm | None = None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.mlp`."""
    hidden = linear(x, fc1_weight, fc1_bias, norm=norm, activation=activation)
    return linear(hidden, fc2_weight, fc2_bias, residual=residual, gamma=gamma, row_scale=row_scale)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastvit.ops.rotate`. x cos + half(x) sin for all but the first tokens of q and of k."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T', 1, d): the same for every head
    prefix = q.shape[1] - cos.shape[-3]

    def turn(x: Tensor) -> Tensor:
        untouched, x = x[:, :prefix], x[:, prefix:]
        first, second = x.chunk(2, dim=-1)
        turned = (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
        return torch.cat([untouched, turned], dim=1) if prefix else turned

    return turn(q), turn(k)


_WORD = 0xFFFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, seed: Tensor) -> Tensor:
    """Return word 0 of Philox4x32-10 (Salmon et al., 2011) of counter (c0, c1, c2, 0); the seed's halves are the key.

    All are int64 and broadcast; the counter's words, and the result, go from 0 to 2^32 - 1.
    """
    c3 = torch.zeros_like(seed)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the 64 bits of these products are right, whatever sign they have
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0


def dropout_factor(seed: Tensor, p: float, heads: int, image: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return 0 where attention's weight of query i and key j is dropped, with probability p, else 1 / (1 - p).

    Args:
        seed: int64 of one element.
        heads: H.
        image, i, j: int64, which image and which tokens inside it; broadcastable to (B, 1, Tq, Tk).

    Returns:
        (B, H, Tq, Tk) float32.
    """
    row = image * heads + torch.arange(heads, device=seed.device).view(-1, 1, 1)
    kept = philox(j, i, row, seed.reshape(())) >= math.floor(p * 2**32)
    return kept.float() / (1 - p)


def table_rows(
    n: int, window: tuple[int, int], device: torch.device | None = None, queries: Tensor | None = None
) -> Tensor:
    """Return the row of query i and key j in BEiT's table of n rows, as ``ops.attention`` defines it: (T, T) int64.

    With ``queries`` (R,) int64, from 0 to T - 1, of these alone: (R, T).
    """
    h, w = window
    prefix = int(n > (2 * h - 1) * (2 * w - 1))  # a class token
    j = torch.arange(prefix + h * w, device=device)
    i = (j if queries is None else queries)[:, None]
    down, across = (i - prefix) // w - (j - prefix) // w, (i - prefix) % w - (j - prefix) % w
    index = (down + h - 1) * (2 * w - 1) + across + w - 1
    if prefix:
        index = torch.where(j == 0, n - 2, index)
        index = torch.where(i == 0, torch.where(j == 0, n - 1, n - 3), index)
    return index


def table_bias(table: Tensor, window: tuple[int, int], queries: Tensor | None = None) -> Tensor:
    """Return BEiT's bias (1, H, T, T) from its table ((2h-1)(2w-1) [+3], H), or that of some queries (1, H, R, T)."""
    return table[table_rows(table.shape[0], window, table.device, queries)].permute(2, 0, 1)[None]


def relative_bias(q: Tensor, keys: Tensor, scale: float | None, queries: Tensor | None = None) -> Tensor:
    """Return q's scores (B, H, T, T) with relative position keys ((H,) 2T-1, d): row i - j + T - 1 for i and j.

    With ``queries`` (R,) those of some queries alone, (B, H, R, T).

    (The ViT paper's appendix D.3: extra attention with relative position embeddings for keys, added before softmax.)
    """
    tokens = q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    each = keys.to(wide).expand(q.shape[2], -1, -1)
    j = torch.arange(tokens, device=q.device)
    i, q = (j, q) if queries is None else (queries, q[:, queries])
    scores = torch.einsum("bihd,hrd->bhir", q.to(wide), each) * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows = i[:, None] - j + tokens - 1
    return scores.gather(-1, rows.expand(*scores.shape[:2], -1, -1))


def readable(t: Tensor) -> bool:
    """Return whether t's values can be read without waiting for a device or breaking a trace."""
    return type(t) is Tensor and t.device.type == "cpu" and not torch.compiler.is_compiling()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    return_lse: bool,
    mask: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return factor * softmax(q k^T * scale + mask) v (B, Tq, H, d), and lse (B, H, Tq) with ``return_lse``.

    mask and factor broadcast to (B, H, Tq, Tk). A row with no key, or with -inf for all, gives zeros and -inf.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    nothing, lse = None, None
    if k.shape[2] == 0:
        out = (q @ k.mT) @ v  # zeros, with a graph
        lse = q.new_full(q.shape[:-1], -math.inf, dtype=wide)
        return out.transpose(1, 2), lse
    if mask is not None:
        nothing = (mask == -math.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(nothing, 0).expand(-1, -1, q.shape[2], k.shape[2])

    def scores(dtype: torch.dtype) -> Tensor:
        s = q.to(dtype) @ k.to(dtype).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        return s if mask is None else s + mask.to(dtype)

    if factor is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype), scale=scale)
    else:
        out = (scores(q.dtype).softmax(-1) * factor.to(q.dtype)) @ v
    if return_lse:
        lse = scores(wide).logsumexp(-1)
    if nothing is not None:
        out = out.masked_fill(nothing, 0)
        lse = None if lse is None else lse.masked_fill(nothing.squeeze(-1), -math.inf)
    return out.transpose(1, 2), lse


def _positions(starts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the sequence of each token, and its place in it: (tokens,) int64 each."""
    token, starts = torch.arange(tokens, device=starts.device), starts.long()
    sequence = (token[:, None] >= starts[1:]).sum(-1)
    return sequence, token - starts[sequence]


def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    return_lse: bool,
    starts: tuple[Tensor, Tensor],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attend in each sequence by itself: one after the other, or under a mask where that can't be traced."""
    heads = q.shape[2]
    if all(map(readable, starts)):
        parts = []
        edges = (list(pairwise(s.tolist())) for s in starts)
        for image, ((a, b), (c, d)) in enumerate(zip(*edges, strict=True)):
            factor = None
            if seed is not None and dropout_p:
                at = (torch.arange(n, device=seed.device) for n in (b - a, d - c))
                i, j = next(at)[:, None], next(at)
                factor = dropout_factor(seed, dropout_p, heads, torch.tensor(image, device=seed.device), i, j)
            parts.append(_attend(q[:, a:b], k[:, c:d], v[:, c:d], scale, return_lse, factor=factor))
        outs, sums = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(sums, 2) if return_lse else None
    (of_query, i), (of_key, j) = (_positions(s, t.shape[1]) for s, t in zip(starts, (q, k), strict=True))
    of_query, i = of_query[:, None], i[:, None]
    mask = q.new_zeros(()).masked_fill(of_query != of_key, -math.inf)[None, None]
    factor = dropout_factor(seed, dropout_p, heads, of_query, i, j) if seed is not None and dropout_p else None
    return _attend(q, k, v, scale, return_lse, mask, factor)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    bias: Tensor | None = None,
    rel_pos_table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rel_pos_keys: Tensor | None = None,
    key_mask: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fastvit.ops.attention`. softmax(q k^T * scale + bias) v for each head, the bias materialised."""
    if rope is not None:
        q, k = rotate(q, k, *rope)
    if cu_seqlens is not None:
        starts = (cu_seqlens, cu_seqlens) if isinstance(cu_seqlens, Tensor) else cu_seqlens
        out, lse = _attend_packed(q, k, v, scale, return_lse, starts, dropout_p, seed)
    else:
        mask, factor = bias, None
        if rel_pos_table is not None and window is not None:
            mask = table_bias(rel_pos_table, window)
        elif rel_pos_keys is not None:
            mask = relative_bias(q, rel_pos_keys, scale)
        if key_mask is not None:
            absent = ~key_mask[:, None, None, :]
            mask = (q.new_zeros(()) if mask is None else mask).masked_fill(absent, -math.inf)
        if seed is not None and dropout_p:
            image, i, j = (torch.arange(n, device=seed.device) for n in (q.shape[0], q.shape[1], k.shape[1]))
            factor = dropout_factor(seed, dropout_p, q.shape[2], image.view(-1, 1, 1, 1), i[:, None], j)
        out, lse = _attend(q, k, v, scale, return_lse, mask, factor)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def attention_qkvpacked(qkv: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fastvit.ops.attention_qkvpacked`: :func:`attention` of its thirds."""
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, **options)


def bias_of_rows(
    q: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
    scale: float | None,
    bias: Tensor | None = None,
    rel_pos_table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rel_pos_keys: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor | None:
    """Return the bias of some rows of :func:`attention`'s scores, broadcastable to (B, H, R, Tk), or None.

    rows: (R,) int64, from 0 to Tq - 1. An absent key has -inf.
    """
    added = None
    if rel_pos_table is not None and window is not None:
        added = table_bias(rel_pos_table, window, rows).to(dtype)
    elif bias is not None:
        added = (bias if bias.shape[2] == 1 else bias[:, :, rows]).to(dtype)
    elif rel_pos_keys is not None:
        added = relative_bias(q, rel_pos_keys, scale, rows).to(dtype)
    if key_mask is not None:
        added = torch.zeros((), dtype=dtype, device=rows.device) if added is None else added
        added = added.masked_fill(~key_mask[:, None, None, :], -math.inf)
    return added


def attention_rows(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, *, scale: float | None = None, **options: Any
) -> Tensor:
    """See :func:`fastvit.ops.attention_rows`. exp(scores - lse) of the rows (R,), which may count from the end."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = rows % q.shape[1]
    added = bias_of_rows(q, rows, wide, scale, **options)
    scores = q[:, rows].transpose(1, 2).to(wide) @ k.permute(0, 2, 3, 1).to(wide)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    lse = lse[:, :, rows, None]
    weights = ((scores if added is None else scores + added) - lse).exp()
    return weights.masked_fill(lse == -math.inf, 0)


def attention_distance(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    grid: tuple[int, int],
    *,
    patch_size: tuple[float, float] = (1.0, 1.0),
    scale: float | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.attention_distance`."""
    patches = torch.arange(grid[0] * grid[1], device=q.device)
    prefix = q.shape[1] - len(patches)
    weights = attention_rows(q, k, lse, prefix + patches, scale=scale)[..., prefix:]
    return (weights * patch_distances(patches, grid, patch_size, weights.dtype)).sum(-1).mean(-1)


def patch_distances(rows: Tensor, grid: tuple[int, int], patch_size: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """Return the distances between some patches of a grid (h, w), by index (R,), and all of them: (R, h * w)."""
    patches, columns = torch.arange(grid[0] * grid[1], device=rows.device), grid[1]
    down = (patches // columns).to(dtype) * patch_size[0]
    across = (patches % columns).to(dtype) * patch_size[1]
    return torch.hypot(down[rows].unsqueeze(1) - down, across[rows].unsqueeze(1) - across)

"""The ViT paper's equations in plain PyTorch, with each of the position embeddings of its table 8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit
from fastvit.layers import Attention
from parity import randomise

SIZES: dict[str, Any] = {
    "img_size": (16, 24), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5,
}  # fmt: skip
H, W, T = 2, 3, 7


def small(**options: Any) -> fastvit.ViT:
    return randomise(fastvit.ViT(**{**SIZES, **options})).double()  # type: ignore[return-value]


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or SIZES["img_size"]), dtype=torch.float64)


def plain_attention(x: Tensor, attn: Attention, keys: Tensor | None) -> Tensor:
    """Appendix A, and for keys of the distances D.3: "we use the original query, but relative embeddings as keys"."""
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    if keys is not None:
        t = x.shape[1]
        for i in range(t):
            for j in range(t):  # the offset p_q - p_k
                extra = torch.zeros_like(scores)
                extra[:, :, i, j] = torch.einsum("bhd,hd->bh", q[:, i], keys[:, i - j + t - 1])
                scores = scores + extra
    weights = (scores / attn.head_dim**0.5).softmax(-1)
    return attn.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


def plain(
    model: fastvit.ViT, x: Tensor, stem: Callable[[], Tensor | None], layer: Callable[[int], Tensor | None]
) -> Tensor:
    """Equations 1 to 4, with positions (T, D) at the stem and before each block."""

    def added(tokens: Tensor, positions: Tensor | None) -> Tensor:
        return tokens if positions is None else tokens + positions

    patches = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8).flatten(2).mT
    tokens = added(torch.cat([model.cls_token.expand(len(x), -1, -1), patches], 1), stem())
    for i, block in enumerate(model.blocks):
        tokens = added(tokens, layer(i))
        normed = F.layer_norm(tokens, (32,), block.norm1.weight, block.norm1.bias, 1e-6)
        tokens = tokens + plain_attention(normed, block.attn, getattr(block.attn, "rel_pos_keys", None))
        normed = F.layer_norm(tokens, (32,), block.norm2.weight, block.norm2.bias, 1e-6)
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(normed)))
    return model.head(F.layer_norm(tokens, (32,), model.norm.weight, model.norm.bias, 1e-6)[:, 0])


def by_axis(prefix: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """ "We concatenate the X and Y embedding to get the final positional embedding for that patch"."""
    rows = [torch.cat([x[column], y[row]]) for row in range(H) for column in range(W)]
    return torch.cat([prefix, torch.stack(rows)])


def definition(model: fastvit.ViT, kind: str, place: str) -> Callable[[Tensor], Tensor]:
    def table(i: int) -> Tensor | None:
        if kind in ("none", "relative"):
            return None
        if kind == "learn" and place == "stem":
            return model.pos_embed[0]
        given = model.pos_embed_2d if place == "stem" else model.layer_pos_embed
        i = i if place == "layers" else 0
        if kind == "learn":
            return torch.cat([given.prefix[i], given.patches[i]])
        return by_axis(given.prefix[i], given.x[i], given.y[i])

    stem, layer = (table, lambda i: None) if place == "stem" else (lambda i: None, table)
    return lambda x: plain(model, x, lambda: stem(0), layer)

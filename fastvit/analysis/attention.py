"""Inspection of a Vision Transformer (section 4.5 of the ViT paper): the patch embedding's filters, the similarity of
positions, attention maps, attention rollout, mean attention distance.

Attention comes out of the fused kernels: they run as in inference, save the log-sum-exp of each row, and the weights
are computed from it, a row or a block of rows at a time. No T x T matrix is ever in memory.

The functions take any :class:`fastvit.ViT` on any backend, and ``images`` as its ``forward`` does. The model runs in
eval mode without gradients, and keeps its modes, weights and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastvit import ops, reference
from fastvit.layers import RelativeAttention, TokenContext
from fastvit.layers.block import run_block
from fastvit.layers.patch_embed import image_size
from fastvit.models import ViT

ROWS = 64  # rows of attention that are in memory at once

_Result = TypeVar("_Result")


class Rollout(NamedTuple):
    """The result of :func:`rollout`."""

    weights: Tensor  # (B, T): how much of each token that enters the first block; they sum to 1
    grid: Tensor  # (B, h, w): those of the patches, where they are in the image


class _Heads(NamedTuple):
    """Queries and keys of one block, or of a pool, and the log-sum-exp of their scores."""

    q: Tensor  # (B, R, H, d), R = T in a block
    k: Tensor  # (B, T, H, d)
    lse: Tensor  # (B, H, R)
    options: dict[str, Any]  # of ops.attention: the scale and relative positions

    def rows(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Return the attention weights of some rows, (B, H, R, T)."""
        return ops.attention_rows(self.q, self.k, self.lse, rows, **self.options)

    def distance(self, grid: tuple[int, int], patch_size: tuple[float, float]) -> Tensor:
        """Return ops.attention_distance (B, H), with relative positions by blocks of rows."""
        if self.options.keys() == {"scale"}:
            return ops.attention_distance(self.q, self.k, self.lse, grid, patch_size=patch_size, **self.options)
        patches = torch.arange(grid[0] * grid[1], device=self.q.device)
        prefix, sums = self.q.shape[1] - len(patches), []
        for some in patches.split(ROWS):
            weights = self.rows(prefix + some)[..., prefix:]
            sums.append((weights * reference.patch_distances(some, grid, patch_size, weights.dtype)).sum((-2, -1)))
        return torch.stack(sums).sum(0) / len(patches)


def patch_filters(model: ViT, count: int = 28) -> Tensor:
    """Return the principal components of the patch embedding's filters (figure 7, left).

    The D filters are D points in the space of a patch's pixels; the components are that space's directions in which
    they spread most, each of length 1. Which way round a direction points is arbitrary: the largest value is positive.

    Args:
        count: at most so many.

    Returns:
        (count, C, p, p) float32, the first component first; fewer where a patch has fewer pixels or D is smaller.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"count: {count}; accepted: 1 or more")
    weight = model.patch_embed.proj.weight.detach().float()
    flat = weight.flatten(1)
    components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:count]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return (components * largest.sign()).view(-1, *weight.shape[1:])


def position_similarity(model: ViT, block: int = 0) -> Tensor:
    """Return the cosine of the angle between the position embeddings of every two patches (figure 7, centre).

    Args:
        block: index of the block, in a model that adds other positions before each (``pos_embed_at="layers"``).

    Returns:
        (h, w, h, w) float32: of the patch in a row and column, with the patch in another row and column.

    Raises:
        ValueError: the model adds no position embeddings to its tokens, or ``block`` has none of its own.
    """
    grid = model.patch_embed.grid_size
    tables = model._positions(grid) if model.layer_pos_embed is None else model.layer_pos_embed(grid)
    if tables is None:
        raise ValueError(f"no position embeddings are added to the tokens; the model has {_other_positions(model)}")
    if not 0 <= block < len(tables):
        raise ValueError(f"block {block} has no position embeddings of its own; accepted: 0 to {len(tables) - 1}")
    patches = tables[block].detach().float()[model._prefix_positions() :]
    unit = nn.functional.normalize(patches, dim=1)
    return (unit @ unit.T).view(*grid, *grid)


def _other_positions(model: ViT) -> str:
    """Return the name of the positions that a model has in place of embeddings."""
    if model.windowed:
        return "biases by relative position"
    if model.rope is not None:
        return "queries and keys turned by position (rope)"
    relative = any(isinstance(module, RelativeAttention) for module in model.modules())
    return "relative position keys" if relative else "no positions at all"


def attention_maps(model: ViT, images: Tensor, rows: Sequence[int] = (0,)) -> Tensor:
    """Return the attention weights of some tokens in every block.

    Args:
        rows: tokens by their index, which may count from the end. 0 is the class token where there is one, which not
            every head reads: that of a BEiT pools patches.

    Returns:
        (blocks, B, H, R, T): the softmax of the scores, in float32. Tokens are prefix tokens, then patches in raster
        order; ``maps[..., model.num_prefix_tokens:].unflatten(-1, grid)`` are images.

    Raises:
        ValueError: a row that the model does not have.
        TypeError: a block, or its attention, of another class than ours.
    """
    return torch.stack(_each_block(model, images, lambda heads: heads.rows(rows))[0])


def rollout(model: ViT, images: Tensor) -> Rollout:
    """Compute attention rollout (Abnar and Zuidema, 2020; appendix D.7 of the ViT paper): where the output comes from.

    In each block the weights are averaged over the heads to A, and with the residual beside the attention to
    (A + I) / 2, whose rows sum to 1; the matrices of all blocks are multiplied. Of the product only what the head reads
    is computed: the class token's row; the mean of that and the distillation token's; the mean of the rows that an
    "avg", "max" or "avgmax" pool is over, of all tokens where the pool is ""; or the rows as an attention pool weighs
    them. That is a row vector times one matrix after the other, from the last block to the first, so that only q, k and
    the log-sum-exp of every block are kept.

    Returns:
        ``weights`` (B, T) and those of the patches as a ``grid`` (B, h, w), both float32 (float64 of a float64 model).

    Raises:
        TypeError: a block, its attention, or an attention pool of another class than ours.
    """
    return _rollout(model, images, *_each_block(model, images, lambda heads: heads))


def mean_attention_distance(model: ViT, images: Tensor) -> Tensor:
    """Return how far each head looks, in pixels (figures 7 and 10 of the ViT paper); see ``ops.attention_distance``.

    Returns:
        (blocks, B, H) float32 (float64 of a float64 model): the mean over the patches of the distance to the patches
        that they attend to.

    Raises:
        TypeError: a block, or its attention, of another class than ours.
    """
    return torch.stack(_each_block(model, images, _distance(model, images))[0])


def distance_and_rollout(model: ViT, images: Tensor) -> tuple[Tensor, Rollout]:
    """Compute :func:`mean_attention_distance` and :func:`rollout` in one pass through the model.

    Raises:
        TypeError: a block, its attention, or an attention pool of another class than ours.
    """
    distance = _distance(model, images)
    found, tokens = _each_block(model, images, lambda heads: (heads, distance(heads)))
    kept, distances = zip(*found, strict=True)
    return torch.stack(distances), _rollout(model, images, kept, tokens)


def _distance(model: ViT, images: Tensor) -> Callable[[_Heads], Tensor]:
    """Return the function that measures the distance (B, H), in pixels, of a block's heads."""
    grid = _grid(model, images)
    height, width = model.patch_embed.feat_ratio(as_scalar=False)  # pixels, through a backbone too
    patch = (float(height), float(width))
    return lambda heads: heads.distance(grid, patch)


def _rollout(model: ViT, images: Tensor, kept: Sequence[_Heads], tokens: Tensor) -> Rollout:
    """Return the rollout of the heads of every block, and of the tokens (B, T, D) that came out of the last."""
    with torch.no_grad():
        weights = _read(model, tokens)
        for heads in reversed(kept):
            weights = (weights + _through(heads, weights)) / 2
    return Rollout(weights, weights[:, model.num_prefix_tokens :].unflatten(-1, _grid(model, images)))


def _read(model: ViT, tokens: Tensor) -> Tensor:
    """Return how much of each of the last block's tokens (B, T, D) the head reads, (B, T); see ``ViT.pool``."""
    first, last = 0 if model.pool_include_prefix else model.num_prefix_tokens, tokens.shape[1]
    weights = tokens.new_zeros(tokens.shape[:2], dtype=torch.promote_types(tokens.dtype, torch.float32))
    if model.attn_pool is not None:
        weights[:, first:] = _read_by_attention(model.attn_pool, model.norm(tokens)[:, first:])
        return weights
    if model.head_dist is not None or model.global_pool == "token":
        first, last = 0, 1 if model.head_dist is None else 2
    elif model.global_pool == "":
        first = 0
    weights[:, first:last] = 1 / (last - first)
    return weights


def _read_by_attention(pool: Any, x: Tensor) -> Tensor:
    """Return how much of each of the tokens x (B, T, D) an attention pool reads, the mean over its heads: (B, T)."""
    if not hasattr(pool, "queries_and_keys"):
        raise TypeError(
            f"the pool is a {type(pool).__name__}; accepted: fastvit.layers' AttentionPoolLatent or AttentionPoolPrr"
        )
    q, k = pool.queries_and_keys(x)
    _, lse = ops.attention(q, k, k, return_lse=True)
    alike = torch.full(q.shape[:2], 1 / q.shape[1], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return _through(_Heads(q, k, lse, {}), alike)


def _through(heads: _Heads, weights: Tensor) -> Tensor:
    """Return weights of the queries (B, R) times their attention, averaged over the heads: (B, T)."""
    queries = torch.arange(weights.shape[1], device=weights.device)
    parts = [
        torch.einsum("br,bhrt->bt", weights[:, rows], heads.rows(rows)) / heads.q.shape[2]
        for rows in queries.split(ROWS)
    ]
    return torch.stack(parts).sum(0)


def _grid(model: ViT, images: Tensor) -> tuple[int, int]:
    """Return (h, w), the patches of these images."""
    h, w = model.patch_embed.dynamic_feat_size(image_size(images, model.in_chans))
    return h, w


def _each_block(model: ViT, images: Tensor, look: Callable[[_Heads], _Result]) -> tuple[list[_Result], Tensor]:
    """Return look(heads) for every block, as the images go through the model, and the tokens that come out."""
    found = []
    with _evaluated(model), torch.no_grad():
        x, context = model.embed(images)
        for i, block in enumerate(model.blocks):
            found.append(look(_heads(block, i, x, context)))
            x = run_block(block, x, context)
    return found, x


def _heads(block: Any, index: int, x: Tensor, context: TokenContext) -> _Heads:
    """Return the queries and keys that a block makes of its input x (B, T, D), and their log-sum-exp."""
    if not hasattr(block, "attention_inputs"):
        raise TypeError(f"block {index} is a {type(block).__name__}; accepted: fastvit.layers' Block or BeitBlock")
    try:
        q, k, v, options = block.attention_inputs(x, context)
    except TypeError as error:
        raise TypeError(f"block {index} is {error}") from None
    _, lse = ops.attention(q, k, v, return_lse=True, **options)
    return _Heads(q, k, lse, options)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and afterwards every module back in its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

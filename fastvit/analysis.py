"""What a Vision Transformer has learned and what it attends to (section 4.5 of the ViT paper): the patch embedding's
filters, how alike positions are, attention maps, attention rollout, mean attention distance.

What is about attention comes out of the fused kernels: they run as in inference, save the log-sum-exp of each row, and
the weights that are wanted are computed from it, a row or a block of rows at a time. No T x T matrix is ever in memory.

The functions take any :class:`fastvit.ViT` on any backend. The model runs in eval mode without gradients and is left as
it was. ``fastvit inspect`` draws what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastvit import ops, reference
from fastvit.layers import Attention, BeitAttention, BeitBlock, Block, Positions, RelativeAttention
from fastvit.layers.attention import head_norm
from fastvit.layers.patch_embed import image_size
from fastvit.models import ViT

ROWS = 64  # rows of attention that are in memory at once

_Result = TypeVar("_Result")


class Rollout(NamedTuple):
    """What :func:`rollout` returns."""

    weights: Tensor  # (B, T): how much of each token of the first block; they sum to 1
    grid: Tensor  # (B, h, w): those of the patches, where they are in the image


class _Heads(NamedTuple):
    """The attention of one block, before it is taken."""

    q: Tensor  # (B, T, H, d)
    k: Tensor
    lse: Tensor  # (B, H, T)
    options: dict[str, Any]  # the scale, and what its scores have by relative position, as ops.attention takes them

    def rows(self, rows: Sequence[int] | Tensor) -> Tensor:
        """(B, H, R, T)."""
        return ops.attention_rows(self.q, self.k, self.lse, rows, **self.options)

    def distance(self, grid: tuple[int, int], patch_size: tuple[float, float]) -> Tensor:
        """(B, H), as ops.attention_distance, which knows no relative positions: with them by blocks of rows."""
        if self.options.keys() == {"scale"}:
            return ops.attention_distance(self.q, self.k, self.lse, grid, patch_size=patch_size, **self.options)
        patches = torch.arange(grid[0] * grid[1], device=self.q.device)
        prefix, sums = self.q.shape[1] - len(patches), []
        for some in patches.split(ROWS):
            weights = self.rows(prefix + some)[..., prefix:]
            sums.append((weights * reference.patch_distances(some, grid, patch_size, weights.dtype)).sum((-2, -1)))
        return torch.stack(sums).sum(0) / len(patches)


def patch_filters(model: ViT, count: int = 28) -> Tensor:
    """The principal components of the patch embedding's filters (figure 7, left).

    The D filters are D points in the space of a patch's pixels; the components are that space's directions in which
    they spread most, each of length 1. Which way round a direction points is arbitrary: the largest value is positive.

    Args:
        model: the ViT.
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


def position_similarity(model: ViT) -> Tensor:
    """The cosine of the angle between the position embeddings of every two patches (figure 7, centre).

    Args:
        model: the ViT.

    Returns:
        (h, w, h, w) float32: of the patch in a row and column, with the patch in another row and column.

    Raises:
        ValueError: the model learns no position embeddings.
    """
    grid = model.patch_embed.grid_size
    positions = model._positions(grid)
    if positions is None:
        raise ValueError("the model has no position embeddings; accepted: one that adds learned ones to its tokens")
    patches = positions.detach().float()[0, model._prefix_positions() :]
    unit = nn.functional.normalize(patches, dim=1)
    return (unit @ unit.T).view(*grid, *grid)


def attention_maps(model: ViT, images: Tensor, rows: Sequence[int] = (0,)) -> Tensor:
    """What some tokens attend to, in every block.

    Args:
        model: the ViT.
        images: as its ``forward`` takes them.
        rows: tokens by their index, which may count from the end; the class token is 0.

    Returns:
        (blocks, B, H, R, T): the softmax of the scores, in float32. Tokens are prefix tokens, then patches in raster
        order; ``maps[..., model.num_prefix_tokens:].unflatten(-1, grid)`` are images.

    Raises:
        ValueError: a row that the model does not have.
        TypeError: a block, or its attention, of another class than ours.
    """
    return torch.stack(_each_block(model, images, lambda heads: heads.rows(rows)))


def rollout(model: ViT, images: Tensor) -> Rollout:
    """Attention rollout (Abnar and Zuidema, 2020; appendix D.7 of the ViT paper): where the output comes from.

    In each block the weights are averaged over the heads to A, and with the residual beside the attention to
    (A + I) / 2, whose rows sum to 1; the matrices of all blocks are multiplied. Of the product only the row of the
    class token is computed, or the mean of the patches' rows in a model without one: a row vector times one matrix
    after the other, from the last block to the first, so that only q, k and the log-sum-exp of every block are kept.

    Args:
        model: the ViT.
        images: as its ``forward`` takes them.

    Returns:
        ``weights`` (B, T) and those of the patches as a ``grid`` (B, h, w), both float32.

    Raises:
        TypeError: a block, or its attention, of another class than ours.
    """
    kept = _each_block(model, images, lambda heads: heads)
    prefix, grid = model.num_prefix_tokens, _grid(model, images)
    batch, tokens = kept[0].q.shape[:2] if kept else (images.shape[0], prefix + grid[0] * grid[1])
    first = torch.zeros(batch, tokens, device=next(model.parameters()).device)
    first[:, slice(1) if model.has_class_token else slice(prefix, None)] = 1
    weights = first / first.sum(-1, keepdim=True)
    with torch.no_grad():
        while kept:
            weights = (weights + _through(kept.pop(), weights)) / 2
    return Rollout(weights, weights[:, prefix:].unflatten(-1, grid))


def mean_attention_distance(model: ViT, images: Tensor) -> Tensor:
    """How far each head looks, in pixels (figures 7 and 10 of the ViT paper), see ``fastvit.ops.attention_distance``.

    Args:
        model: the ViT.
        images: as its ``forward`` takes them.

    Returns:
        (blocks, B, H) float32: the mean over the patches of the distance to the patches that they attend to.

    Raises:
        TypeError: a block, or its attention, of another class than ours.
    """
    grid = _grid(model, images)
    height, width = model.patch_embed.feat_ratio(as_scalar=False)  # pixels, through a backbone too
    patch = (float(height), float(width))
    return torch.stack(_each_block(model, images, lambda heads: heads.distance(grid, patch)))


def _through(heads: _Heads, weights: Tensor) -> Tensor:
    """weights (B, T) times the block's attention, averaged over its heads: (B, T)."""
    tokens = torch.arange(weights.shape[1], device=weights.device)
    parts = [
        torch.einsum("br,bhrt->bt", weights[:, rows], heads.rows(rows)) / heads.q.shape[2]
        for rows in tokens.split(ROWS)
    ]
    return torch.stack(parts).sum(0)


def _grid(model: ViT, images: Tensor) -> tuple[int, int]:
    """(h, w): the patches of these images."""
    h, w = model.patch_embed.dynamic_feat_size(image_size(images, model.in_chans))
    return h, w


def _each_block(model: ViT, images: Tensor, look: Callable[[_Heads], _Result]) -> list[_Result]:
    """look(the heads of a block) for every block, as the images go through the model."""
    found = []
    with _evaluated(model), torch.no_grad():
        x, told = model._tokens(images)
        for i, block in enumerate(model.blocks):
            found.append(look(_heads(block, i, x, **told)))
            if i + 1 < len(model.blocks):
                x = block(x, **told)
    return found


def _heads(block: Any, index: int, x: Tensor, positions: Positions | None = None) -> _Heads:
    """The queries and keys that a block makes of its input x (B, T, D), and their log-sum-exp."""
    attn: Any = getattr(block, "attn", None)
    # Another class may do anything with its norm and qkv.
    if type(block) not in (Block, BeitBlock) or type(attn) not in (Attention, BeitAttention, RelativeAttention):
        raise TypeError(
            f"block {index} is a {type(block).__name__} with {type(attn).__name__} for its attention; "
            "accepted: fastvit.layers' Block or BeitBlock with Attention, BeitAttention or RelativeAttention"
        )
    relative = attn._relative(positions)
    x = positions.before(x, index) if positions is not None and positions.added else x
    qkv = attn._project_in(x, block.norm1).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.unbind(2)
    q, k = head_norm(attn.q_norm, q), head_norm(attn.k_norm, k)
    if positions is not None and positions.rope is not None:
        q, k = ops.rotate(q, k, *positions.rope)
    options = {"scale": attn.scale, **relative.options()}
    _, lse = ops.attention(q, k, v, return_lse=True, **options)
    return _Heads(q, k, lse, options)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

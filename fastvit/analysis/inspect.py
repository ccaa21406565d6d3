"""Pictures of a Vision Transformer's attention and weights (figures 6, 7, 10 and 13 of its paper).

``fastvit inspect`` draws what :mod:`fastvit.analysis` computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from fastvit import analysis
from fastvit.checkpoints.files import pixel_statistics
from fastvit.checkpoints.load import Source
from fastvit.data.images import preprocess
from fastvit.models import ViT, from_checkpoint

__all__ = ["draw_distances", "draw_filters", "draw_rollout", "draw_similarity", "inspect"]

_COLUMNS = 7
_DPI = 150
_GAP = (0.62, 0.66, 0.74)  # between filters and around them: a grey that is none of theirs
_CHUNK = 16  # images that go through the model at once


def draw_filters(filters: Tensor) -> Figure:
    """Draw the filters (N, C, p, q) of :func:`fastvit.analysis.patch_filters`, each over its full range.

    Raises:
        ValueError: filters of neither 1 nor 3 channels.
    """
    count, channels = filters.shape[:2]
    if channels not in (1, 3):
        raise ValueError(f"filters of {channels} channels can't be drawn; accepted: 1 or 3")
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    images = ((filters - low) / (high - low).clamp(min=1e-12)).expand(-1, 3, -1, -1)
    rows = -(-count // _COLUMNS)
    gap = images.new_tensor(_GAP)
    blank = gap[:, None, None].expand(rows * _COLUMNS - count, *images.shape[1:])
    canvas = _tiled(torch.cat([images, blank]).permute(0, 2, 3, 1).unflatten(0, (rows, _COLUMNS)), gap)
    size = (_COLUMNS, rows * filters.shape[2] / filters.shape[3] + 0.5)
    figure = Figure(size, layout="constrained", facecolor=_GAP)
    axes = figure.subplots()
    axes.set_title(f"Filters of the patch embedding: the first {count} principal components", fontsize="medium")
    axes.imshow(canvas.cpu().numpy(), interpolation="nearest")
    axes.axis("off")
    return figure


def draw_similarity(similarity: Tensor, title: str = "Similarity of position embeddings") -> Figure:
    """Draw :func:`fastvit.analysis.position_similarity`, (h, w, h, w): a tile for each patch, of cosines.

    Of a large grid every second, third, ... row and column has a tile, so that there are at most 16.
    """
    h, w = similarity.shape[:2]
    rows, columns = (range(0, n, -(-n // 16)) for n in (h, w))
    canvas = _tiled(similarity[rows][:, columns], torch.nan)
    figure = Figure((0.45 * len(columns) + 1.8, 0.45 * len(rows) * h / w + 1.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(canvas.cpu().numpy(), cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    for axis, size, shown, name in ((axes.xaxis, w, columns, "column"), (axes.yaxis, h, rows, "row")):
        axis.set_ticks([(size + 1) * i + (size - 1) / 2 for i in range(len(shown))], [str(i + 1) for i in shown])
        axis.set_label_text(f"{name} of the patch")
    axes.tick_params(length=0, labelsize="small")
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=axes, fraction=0.04, shrink=0.8).set_label("cosine")
    return figure


def draw_distances(distances: Tensor) -> Figure:
    """Draw a dot for each head of :func:`fastvit.analysis.mean_attention_distance`, (blocks, B, H): the mean over B."""
    of_heads = distances.mean(1).cpu().numpy()
    blocks, heads = of_heads.shape
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for head in range(heads):
        axes.scatter(range(1, blocks + 1), of_heads[:, head], s=18, color=f"C{head % 10}", alpha=0.8)
    count = distances.shape[1]
    axes.set(
        title=f"Size of the attended area, {f'mean of {count} images' if count > 1 else 'of 1 image'}",
        xlabel=f"block (a dot for each of {heads} heads)" if heads > 1 else "block (a dot for its only head)",
        ylabel="mean attention distance (pixels)",
        ylim=(0, 1.05 * float(of_heads.max()) or 1),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_rollout(images: Tensor, grids: Tensor, names: Sequence[str]) -> Figure:
    """Draw each image, and beside it the attention that reaches the output as a heat map with its scale.

    The scale is the weight of a patch in units of the mean patch, from 0 to the largest, or to 2 at least: a map on
    which all patches are alike is of the one colour in the middle.

    Args:
        images: (N, C, H, W), C of 1 or 3, 0 to 1.
        grids: (N, h, w), the ``grid`` of :func:`fastvit.analysis.rollout`.
        names: of the images.
    """
    count, _, height, width = images.shape
    grids = grids[:, None].float().cpu()
    heat = interpolate(grids / grids.mean((2, 3), keepdim=True), (height, width), mode="bilinear")[:, 0].numpy()
    coloured = images.float().cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    across = math.ceil(math.sqrt(count / 2))  # pairs: a page about as wide as high
    rows = -(-count // across)
    figure = Figure((5 * across, (2.2 * height / width + 0.4) * rows + 0.4), layout="compressed")
    places = figure.subplots(rows, 2 * across, squeeze=False).reshape(-1, 2)
    for (left, right), pixels, map_, name in zip(places, coloured.numpy(), heat, names, strict=False):
        left.imshow(pixels)
        left.set_title(name, fontsize="small")
        right.imshow(pixels.mean(-1), cmap="gray", vmin=-1, vmax=1)  # pale, so that the map's colours are the scale's
        drawn = right.imshow(map_, cmap="turbo", alpha=0.6, vmin=0, vmax=max(2, map_.max()))
        right.set_title("attention", fontsize="small")
        figure.colorbar(drawn, ax=right, fraction=0.05).ax.tick_params(labelsize="x-small")
    for axes in places.flat:
        axes.axis("off")
    figure.suptitle("Attention rollout: where the output comes from (1 is the mean patch)", fontsize="medium")
    return figure


def _tiled(tiles: Tensor, gap: float | Tensor) -> Tensor:
    """Join tiles (rows, columns, h, w, ...) to one picture, with a pixel between them."""
    rows, columns, h, w, *rest = tiles.shape
    spaced = tiles.new_empty((rows, h + 1, columns, w + 1, *rest))
    spaced[:] = gap
    spaced[:, :h, :, :w] = tiles.transpose(1, 2)
    return spaced.flatten(2, 3).flatten(0, 1)[:-1, :-1]


def inspect(
    images: Sequence[str | Path],
    weights: Source | ViT,
    out: str | Path,
    *,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_heads: int | None = None,
) -> dict[str, Path | str]:
    """Draw a model's filters and positions, and its attention rollout and distances on some images.

    Args:
        images: files; attention distances are the mean over them.
        weights: what :func:`fastvit.from_checkpoint` takes, or a model.
        out: a folder for the pictures. Those of an earlier run that this model has not are removed.
        size: (height, width) the images are cut to; by default the model's. Positions are resampled for another.
        mean, std: of the pixels, in 0..1 units, as the model was trained with: one number for each channel, or for all;
            by default as the weights' folder says, else 0.5.
        num_heads: attention heads, where the weights do not say; by default what models of their width have.

    Returns:
        ``filters``, ``positions``, ``attention_distance`` and ``rollout``, each with its file, or why this model has
        no such picture.

    Raises:
        ValueError: no images, an image that can't be read, a mean or std that pixels can't have, or a model whose
            images have neither 1 channel nor 3.
        OSError: a file that can't be opened.
    """
    if not images:
        raise ValueError("no images; accepted: one file or more")
    if isinstance(weights, ViT):
        model = weights
        for name, value in (("size", size), ("num_heads", num_heads)):
            if value is not None:
                raise ValueError(f"{name}: {value}; accepted with weights; a model has its own")
    else:
        options: dict[str, Any] = {} if size is None else {"img_size": size}
        model = from_checkpoint(weights, num_heads=num_heads, **options)
        if not isinstance(model, ViT):
            raise ValueError(f"the weights are those of a {type(model).__name__}; accepted: a ViT's")
    channels = model.in_chans
    if channels not in (1, 3):
        raise ValueError(f"the model takes images of {channels} channels; accepted: 1 or 3")
    mean, std = pixel_statistics(weights, mean, std, channels)
    to = tuple(model.patch_embed.img_size)
    pixels = torch.stack([_read(Path(path), to, channels) for path in images])
    batch = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)

    @cache
    def attended() -> tuple[Tensor, Tensor]:
        return _attended(model, batch)

    each = model.layer_pos_embed is not None and model.layer_pos_embed.tables > 1
    of = "position embeddings" + " of the first block (each has its own)" * each
    drawings = {
        "filters": lambda: draw_filters(analysis.patch_filters(model)),
        "positions": lambda: draw_similarity(analysis.position_similarity(model), f"Similarity of {of}"),
        "attention_distance": lambda: draw_distances(attended()[0]),
        "rollout": lambda: draw_rollout(pixels, attended()[1], [Path(path).name for path in images]),
    }
    found: dict[str, Path | str] = {}
    for name, draw in drawings.items():
        path = out / f"{name}.png"
        try:
            figure = draw()
        except (TypeError, ValueError) as error:  # of another kind of model
            found[name] = str(error)
            path.unlink(missing_ok=True)  # an earlier run's would look like this one's
            continue
        found[name] = path
        figure.savefig(path, dpi=_DPI, bbox_inches="tight")
    return found


def _attended(model: ViT, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances (blocks, B, H) and rollout's grids (B, h, w) of a batch, computed some images at a time."""
    parameter = next(model.parameters())
    distances, grids = [], []
    with tqdm(total=len(batch), desc="inspect", unit="image", leave=False) as bar:
        for some in batch.split(_CHUNK):
            some = some.to(parameter.device, parameter.dtype)
            distance, rollout = analysis.distance_and_rollout(model, some)
            distances.append(distance)
            grids.append(rollout.grid)
            bar.update(len(some))
    return torch.cat(distances, 1), torch.cat(grids)


def _read(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    """Read an image as (channels, H, W), 0 to 1."""
    data = path.read_bytes()
    try:
        return preprocess(data, size, (0.0,), (1.0,), channels)
    except ValueError as error:
        raise ValueError(f"{path} can't be read as an image: {error}") from error

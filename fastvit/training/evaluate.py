"""Evaluation of a model or its features: accuracy, the paper's few-shot probe, nearest neighbours, ReaL labels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastvit.checkpoints.files import pixel_statistics, read
from fastvit.data.datasets import Data, Split, open_data
from fastvit.models import ViT, from_checkpoint
from fastvit.models.registry import is_resnet
from fastvit.models.resnet import ResNetV2
from fastvit.training.augment import Examples, evaluation_transform, loader

PENALTIES = tuple(2.0**power for power in range(-10, 21))  # of the few-shot probe, searched where none is given
CHUNK = 4096  # images that are in float64 at once


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the share of images whose greatest score is the label's: scores (N, K), labels (N,)."""
    return float((scores.argmax(1) == labels).double().mean())


def real_accuracy(scores: Tensor, labels: Sequence[Sequence[int]]) -> float:
    """Return the share of images whose greatest score is of one of their labels (ReaL; Beyer et al., 2020).

    Images without any label are left out.

    Args:
        scores: (N, K).
        labels: of each image, any number of them, as ReaL's real.json has them.

    Raises:
        ValueError: another number of images, or none with a label.
    """
    if len(labels) != len(scores):
        raise ValueError(f"{len(scores)} rows of scores for {len(labels)} images with labels")
    right = [guess in of for guess, of in zip(scores.argmax(1).tolist(), labels, strict=True) if len(of)]
    if not right:
        raise ValueError(f"none of {len(labels)} images has a label")
    return sum(right) / len(right)


def real_labels(file: str | Path, split: Split) -> list[list[int]]:
    """Read ReaL's labels of images of ImageNet's validation set, by the number in their names.

    Args:
        file: ReaL's real.json: of each of the 50,000 images, in their order, a list of labels.

    Raises:
        ValueError: another file, or an image without such a name or number.
    """
    known = json.loads(Path(file).read_text())
    if not isinstance(known, list) or not all(isinstance(of, list) for of in known):
        raise ValueError(f"{file} is no list of lists of labels, as ReaL's real.json is")
    found = []
    for name in map(split.name, range(len(split))):
        number = re.search(r"ILSVRC2012_val_(\d{8})", name)
        if number is None or not 1 <= int(number[1]) <= len(known):
            raise ValueError(f"{name} is none of the {len(known)} images that {file} has labels of, ILSVRC2012_val_*")
        found.append(known[int(number[1]) - 1])
    return found


class Ridge:
    """Least squares from features to targets in {-1, 1}^K, for any penalty by one eigendecomposition, in float64.

    Features are standardised by those of the training images, and a bias is fitted, which is not penalised. With
    X^T X = V S V^T of the standardised features the weights are V (S + penalty)^-1 V^T X^T Y.

    Besides the features, whose type they keep, it needs about 4 D^2 + 2 D K numbers in float64 and :data:`CHUNK`
    (3 D + 2 K) while it reads them: 0.3 GB for ImageNet's 1.28 million images, D 768 and K 1000.

    Args:
        features, labels: (N, D) and int64 (N,) of the training images.
        classes: K.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        self.count, width = features.shape
        parts = features.split(CHUNK)
        self.mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / self.count
        squares = torch.stack([(part.double() - self.mean).square().sum(0) for part in parts]).sum(0)
        std = (squares / self.count).sqrt()
        self.std = torch.where(std > 1e-12 * self.mean.abs(), std, 1.0)  # what is constant, but for rounding, stays 0
        self.centre = labels.bincount(minlength=classes).double() * (2 / self.count) - 1
        # Weights are sums of images' features: of fewer images than D only the N directions they span matter.
        self.directions = torch.eye(width, dtype=torch.float64)
        if self.count < width:
            self.directions = torch.linalg.qr(self.coordinates(features).T).Q
        rank = self.directions.shape[1]
        gram, sums = (torch.zeros(rows, rank, dtype=torch.float64) for rows in (rank, classes))
        for part, of in zip(parts, labels.split(CHUNK), strict=True):
            x = self.coordinates(part)
            gram += x.T @ x
            sums.index_add_(0, of, x)
        values, vectors = torch.linalg.eigh(gram)
        self.values = values.clamp(min=0)  # where they are 0 rounding may leave less
        self.directions = self.directions @ vectors
        self.products = 2 * (sums @ vectors).T  # X^T Y: X sums to 0, so that the targets' -1 add nothing

    def coordinates(self, features: Tensor) -> Tensor:
        """Standardise features (M, D) and return their coordinates along the eigenvectors, (M, min(N, D))."""
        return (features.double() - self.mean) / self.std @ self.directions

    def scores(self, coordinates: Tensor, penalty: float) -> Tensor:
        """Return the scores (M, K) of coordinates (M, min(N, D))."""
        return coordinates @ (self.products / (self.values + penalty)[:, None]) + self.centre

    def left_out(self, coordinates: Tensor, targets: Tensor, penalty: float) -> Tensor:
        """Return scores (M, K) of training images (M, min(N, D)), each by a fit without it.

        Targets are (M, K) of -1 and 1. Only the deviations that features are divided by are those of all images.
        """
        # The diagonal of the hat matrix; 1 / N is the bias's part.
        leverage = coordinates.square() @ (1 / (self.values + penalty)) + 1 / self.count
        return targets - (targets - self.scores(coordinates, penalty)) / (1 - leverage)[:, None]


def few_shot(features: Tensor, labels: Tensor, queries: Tensor, classes: int, penalty: float) -> Tensor:
    """Fit :class:`Ridge` and return the scores of other images (section 4.1 of the paper).

    Args:
        features, labels: (N, D) and (N,) of the training images.
        queries: (M, D).
        classes: K.
        penalty: of the squared weights, positive.

    Returns:
        scores (M, K), float64.
    """
    if not penalty > 0:
        raise ValueError(f"penalty={penalty} is not positive")
    ridge = Ridge(features, labels, classes)
    return torch.cat([ridge.scores(ridge.coordinates(part), penalty) for part in queries.split(CHUNK)])


def best_penalty(features: Tensor, labels: Tensor, classes: int) -> float:
    """Return the penalty of :data:`PENALTIES` that does best on training images, each left out of the fit in turn.

    All these fits follow from one :class:`Ridge`, with 2 N D K operations for each penalty and CHUNK x 6 K more numbers
    in memory: 0.6 GB in all for ImageNet. Images that are alone in their class don't count, as the others tell nothing
    of it. Of equal penalties, as all are with one image of each class, it is the middle one.
    """
    ridge = Ridge(features, labels, classes)
    sizes = labels.bincount(minlength=classes)
    several = sizes > 1
    right, errors = (torch.zeros(len(PENALTIES), dtype=torch.float64) for _ in range(2))
    for part, of in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        x, of = ridge.coordinates(part[several[of]]), of[several[of]]
        targets = F.one_hot(of, classes).double() * 2 - 1
        for i, penalty in enumerate(PENALTIES):
            scores = ridge.left_out(x, targets, penalty)
            right[i] += (scores.argmax(1) == of).sum()
            errors[i] += (targets - scores).square().sum()
    # By accuracy, as it is what is reported; of the penalties that it can't tell apart, within a standard error of the
    # best, by the squared error. That alone is mostly of the K - 1 targets of -1: with few images of many classes it is
    # least for penalties that make all weights 0.
    most, count = right.max(), sizes[several].sum().clamp(min=1)
    errors[right < most - (most * (1 - most / count)).sqrt()] = torch.inf
    best = (errors == errors.min()).nonzero()
    return PENALTIES[int(best[len(best) // 2])]


def shots(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Choose ``count`` images of each class at random and return their numbers."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in labels.unique():
        of = order[labels[order] == label][:count]
        if len(of) < count:
            raise ValueError(f"class {int(label)} has {len(of)} training images; shots={count}")
        chosen.append(of)
    return torch.cat(chosen)


def nearest(
    features: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Return scores (M, K) of k nearest neighbours by cosine, voting with exp(cosine / temperature) (Wu et al., 2018).

    Besides the arguments and the scores, in float64, it needs about 3 CHUNK^2 + 2 CHUNK (D + k) numbers: under 0.5 GB.
    """
    if not 1 <= k <= len(labels):
        raise ValueError(f"k={k}; accepted: 1 to {len(labels)}, the training images")
    scores = []
    for part in queries.split(CHUNK):
        query, best, of = F.normalize(part.double(), dim=1), torch.empty(len(part), 0), labels.new_empty(len(part), 0)
        for keys, names in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            near, place = (query @ F.normalize(keys.double(), dim=1).T).topk(min(k, len(keys)), dim=1)
            best, of = torch.cat([best, near], 1), torch.cat([of, names[place]], 1)
            best, place = best.topk(min(k, best.shape[1]), dim=1)
            of = of.gather(1, place)
        votes = torch.zeros(len(part), classes, dtype=torch.float64)
        scores.append(votes.scatter_add_(1, of, ((best - 1) / temperature).exp()))
    return torch.cat(scores)


@torch.inference_mode()
def outputs(
    call: Callable[[Tensor], Tensor], split: Split, transform: Any, batch: int = 256, workers: int = 0
) -> Tensor:
    """Return what ``call`` makes of all images, (N, ...) float32 on the CPU; while they are joined, twice in memory.

    Args:
        call: the model, or a part of it, for batches (B, C, H, W).
        split: whose images.
        transform: of an image; see :func:`fastvit.training.augment.evaluation_transform`.
        batch: images at a time.
        workers: processes that read them.

    Raises:
        ValueError: an output is NaN or infinite; the first such image is named.
    """
    where = [[(i, i) for i in range(k, min(k + batch, len(split)))] for k in range(0, len(split), batch)]
    batches = loader(Examples(split, transform, 0), where, workers)
    found = []
    for numbers, images in zip(where, tqdm(batches, desc="evaluate", unit="batch"), strict=True):
        rows = call(images["image"]).float().cpu()
        finite = rows.reshape(len(rows), -1).isfinite().all(1).tolist()
        if not all(finite):  # the greatest of scores with NaN among them would be some class
            name = split.name(numbers[finite.index(False)][0])
            raise ValueError(f"the model's outputs for {name} are NaN or infinite; accepted: finite numbers")
        found.append(rows)
    return torch.cat(found)


def evaluate(
    model: ViT | ResNetV2,
    data: Data,
    probe: str | None = None,
    count: int | None = None,
    *,
    size: int | None = None,
    middle: bool = False,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    workers: int = 0,
    real: Sequence[Sequence[int]] | None = None,
) -> dict[str, float]:
    """Return the accuracy on the test set, by the name of the classifier or probe.

    Args:
        model: whose classifier is judged, or with ``probe`` the features that it reads.
        probe: "few-shot" (by :func:`best_penalty`) or "knn"; None: the classifier.
        count: with a probe, training images of each class, chosen at random with seed 0; None: all.
        size: a side of the images; None: the model's, and for a ResNet 224.
        middle: show it the middle of each image, 224 of 256 pixels; else the whole, as a square.
        mean, std: of the pixels, 0 to 1, one value or one of each channel.
        workers: processes that read images.
        real: labels of the test images, any number of each, for the classifier's ReaL accuracy.

    Raises:
        ValueError: another probe, shots without one, outputs that are not finite, or a model of other classes or
            channels, or of images that are no squares.
    """
    height, width = (size, size) if size else model.patch_embed.img_size if isinstance(model, ViT) else (224, 224)
    if height != width:
        raise ValueError(f"the model takes images of {height} x {width} pixels; accepted: squares")
    transform = evaluation_transform(height, middle, *pixel_statistics(model, mean, std, data.channels))
    if model.in_chans != data.channels:
        raise ValueError(f"the model takes {model.in_chans} channels, and the images have {data.channels}")
    if probe not in (None, "few-shot", "knn"):
        raise ValueError(f"probe={probe!r}; accepted: 'few-shot', 'knn', or none")
    if probe is None and count is not None:
        raise ValueError(f"shots={count} are a probe's, and there is none; accepted with 'few-shot' or 'knn'")
    device = next(model.parameters()).device
    model.eval()
    if probe is None:
        if model.num_classes != data.classes:
            raise ValueError(f"the model has {model.num_classes} classes and the data {data.classes}; give a probe")
        scores = outputs(lambda images: model(images.to(device)), data.test, transform, workers=workers)
        found = {"classifier": accuracy(scores, data.test.labels)}
        return found if real is None else {**found, "ReaL": real_accuracy(scores, real)}
    if real is not None:
        raise ValueError("ReaL's labels judge a classifier; give them without a probe")
    if not len(data.train):
        raise ValueError(f"{probe} learns from training images, and there are none")

    def features(images: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(images.to(device)), pre_logits=True)

    train = data.train if count is None else data.train.subset(shots(data.train.labels, count).tolist())
    known = outputs(features, train, transform, workers=workers)
    queries = outputs(features, data.test, transform, workers=workers)
    if probe == "knn":
        scores = nearest(known, train.labels, queries, data.classes, min(20, len(train)))
        return {"knn": accuracy(scores, data.test.labels)}
    penalty = best_penalty(known, train.labels, data.classes)
    scores = few_shot(known, train.labels, queries, data.classes, penalty)
    return {"few-shot": accuracy(scores, data.test.labels)}


def main(
    weights: str,
    data: str,
    probe: str | None,
    shots: int | None,
    whole: bool,
    real: str | None,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    **options: Any,
) -> None:
    """Run ``fastvit evaluate`` and print a table; ``options`` are more of :func:`evaluate`."""
    sets = open_data(data, whole)
    labels = None if real is None else real_labels(real, sets.test)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    raw = read(weights)
    sizes: dict[str, Any] = {}
    if is_resnet(raw):
        size = size or (raw.config.get("pretrained_cfg") or {}).get("input_size", [None])[-1]
    elif size is not None:
        sizes["img_size"] = size
    model = from_checkpoint(raw, device=device, **sizes)
    mean, std = pixel_statistics(weights, mean, std)
    found = evaluate(model, sets, probe, shots, size=size, mean=mean, std=std, real=labels, **options)
    print(f"{'':<12}{'test images':>12}{'accuracy':>12}")
    for name, value in found.items():
        print(f"{name:<12}{len(sets.test):>12}{value:>12.2%}")

"""From images as they are to what a model takes, and batches of them in an order that a resumed run goes on with."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastvit.data.datasets import Split
from fastvit.training.recipes import Recipe


class Unreadable(ValueError):
    """An image can't be read; the message names it."""


def training_transform(recipe: Recipe) -> Any:
    """Return the transform of training images, augmented and normalised as the recipe says.

    It takes a PIL image or a tensor (C, H, W) to float32 (C, size, size).
    """
    from torchvision.transforms import v2

    size, bicubic = recipe.image_size, v2.InterpolationMode.BICUBIC
    large = round(size * 7 / 6)  # 448 for 384, as BiT's fine-tuning has it
    crops: dict[str, list[Any]] = {
        "inception": [v2.RandomResizedCrop(size, scale=(0.08, 1), interpolation=bicubic)],
        "random": [v2.Resize((large, large), bicubic), v2.RandomCrop(size)],
        "affine": [
            v2.Resize((size, size), bicubic),
            v2.RandomAffine(10, (0.06, 0.06), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
        ],
        "none": [v2.Resize((size, size), bicubic)],
    }
    steps = [v2.ToImage(), *crops[recipe.crop]]
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.randaugment:
        steps.append(v2.RandAugment(recipe.randaugment))
    return v2.Compose([*steps, *_normalised(recipe.mean, recipe.std)])


def evaluation_transform(
    size: int, middle: bool = False, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)
) -> Any:
    """Return the transform of test images: the whole image as a square, or its middle, 224 of 256 pixels."""
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    cut = [v2.Resize(round(size * 8 / 7), bicubic), v2.CenterCrop(size)]
    whole = [v2.Resize((size, size), bicubic)]
    return v2.Compose([v2.ToImage(), *(cut if middle else whole), *_normalised(mean, std)])


def _normalised(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    """Return the steps from pixels of any type to normalised ones; one mean and std, or one for each channel."""
    from torchvision.transforms import v2

    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]


class Examples(Dataset[dict[str, Any]]):
    """The images of a split as a loader reads them: (place in the order, number) -> {"image", "label"}.

    Randomness in a transform comes from the run's seed and the place only, so it is the same in every worker, process
    and resumed run.
    """

    def __init__(self, split: Split, transform: Any, seed: int) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __getitem__(self, where: tuple[int, int]) -> dict[str, Any]:
        place, number = where
        try:
            image = self.split.image(number)
        except ValueError as error:
            raise Unreadable(str(error)) from error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mixed(self.seed, place))
            return {"image": self.transform(image), "label": self.split.labels[number]}


def _mixed(seed: int, place: int) -> int:
    """Return a seed for each pair, far from its neighbours' (splitmix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + place + 1) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (2**64 - 1)
    return (x ^ x >> 31) & (2**63 - 1)


class Order(Sampler[list[tuple[int, int]]]):
    """Which images are in which step: each epoch in a new order, one after the other, cut into batches.

    Yields, from step ``begin`` on, this process's share of each batch in pieces of ``piece`` images.

    Args:
        count: images. batch: of a step, of all processes. piece: at most so many at a time.
        begin, end: steps.
    """

    def __init__(
        self, count: int, batch: int, piece: int, begin: int, end: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.count, self.batch, self.piece, self.begin, self.end = count, batch, piece, begin, end
        self.seed, self.rank, self.world = seed, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.world
        epoch, order = -1, list[int]()
        for step in range(self.begin, self.end):
            first = step * self.batch + self.rank * share
            chosen = []
            for place in range(first, first + share):
                if place // self.count != epoch:
                    epoch = place // self.count
                    generator = torch.Generator().manual_seed(_mixed(self.seed, -1 - epoch))
                    order = torch.randperm(self.count, generator=generator).tolist()
                chosen.append((place, order[place % self.count]))
            yield from (chosen[i : i + self.piece] for i in range(0, share, self.piece))


class _Loader(DataLoader[dict[str, Tensor]]):
    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except Unreadable as error:  # a worker's has its whole traceback for a message
            raise Unreadable(str(error).rstrip().rsplit("Unreadable: ", 1)[-1]) from error


def _leave_signals_to_the_run(number: int) -> None:
    """Let a worker ignore Ctrl-C, which reaches all processes and which the run handles; SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def loader(examples: Examples, batches: Any, workers: int) -> DataLoader[dict[str, Tensor]]:
    """Return a loader of batches, read ahead by ``workers`` processes; it leaves PyTorch's global generator alone."""
    return _Loader(
        examples,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_run,
        multiprocessing_context="fork" if workers else None,  # splits read by closures, which can't be pickled
    )

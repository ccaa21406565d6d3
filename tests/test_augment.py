"""Transforms, their randomness, and the order in which images come."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import png
from PIL import Image

from fastvit.data.datasets import Data, Split
from fastvit.data.images import decode
from fastvit.training import loop
from fastvit.training.augment import Examples, Order, evaluation_transform, loader, training_transform
from fastvit.training.objectives import Objective
from fastvit.training.recipes import Recipe


def test_pixels_become_minus_1_to_1() -> None:
    for transform in (
        evaluation_transform(8),
        evaluation_transform(8, middle=True),
        training_transform(Recipe(steps=20_000, image_size=8)),
    ):
        found = transform(decode(png(255)))
        assert type(found) is torch.Tensor
        assert (found.shape, found.dtype) == ((3, 8, 8), torch.float32)
        torch.testing.assert_close(found[:, 4, 4], torch.tensor([1.0, -1.0, 100 / 127.5 - 1]))


def test_middle() -> None:
    """224 of 256 pixels of the shorter side, from the middle of the longer."""
    pixels = np.zeros((256, 512, 3), dtype=np.uint8)
    pixels[16:240, 144:368] = 255
    found = evaluation_transform(224, middle=True)(Image.fromarray(pixels))
    assert found.min() == 1
    pixels[16, 144] = 0
    assert evaluation_transform(224, middle=True)(Image.fromarray(pixels)).min() == -1


@pytest.mark.parametrize("crop", ["inception", "random", "affine"])
def test_chance_is_of_the_seed_and_the_place_alone(crop: str) -> None:
    """Not of workers, batches or what the global generator is at, which stays where it is."""
    recipe = Recipe(steps=20_000, image_size=8, crop=crop, randaugment=2)  # type: ignore[arg-type]
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    split = Split(lambda i: Image.fromarray(pixels), torch.zeros(6, dtype=torch.int64), str)

    def seen(seed: int, batches: list[list[tuple[int, int]]], workers: int = 0) -> torch.Tensor:
        examples = Examples(split, training_transform(recipe), seed)
        return torch.cat([batch["image"] for batch in loader(examples, batches, workers)])

    places = [(i, i) for i in range(6)]
    state = torch.get_rng_state()
    one = seen(0, [places])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(seen(0, [places[:2], places[2:]], 2), one)
    assert not torch.equal(seen(1, [places]), one)
    assert not torch.equal(seen(0, [[(i + 6, i) for i in range(6)]]), one)
    assert len({image.numpy().tobytes() for image in one}) > 2


def seen(image: Any, count: int, **changes: Any) -> torch.Tensor:
    """Return one image transformed ``count`` times by a recipe: (count, C, size, size), 0 to 1."""
    recipe = Recipe(steps=20_000, **{"crop": "none", "flip": False} | changes)
    split = Split(lambda i: image, torch.zeros(1, dtype=torch.int64), str)
    examples = Examples(split, training_transform(recipe), 0)
    return torch.stack([examples[place, 0]["image"] for place in range(count)]) / 2 + 0.5


def coordinates(size: int) -> torch.Tensor:
    """Return an image of its pixels' coordinates: (3, size, size), 0 to 1 from left to right and top to bottom."""
    x = torch.linspace(0, 1, size).expand(size, size)
    return torch.stack([x, x.T, x])


def test_half_of_the_images_are_mirrored() -> None:
    image = coordinates(16)
    for flip in (True, False):
        mirrored = [torch.allclose(found, image.flip(-1)) for found in seen(image, 64, image_size=16, flip=flip)]
        kept = [torch.allclose(found, image) for found in seen(image, 64, image_size=16, flip=flip)]
        assert [a != b for a, b in zip(mirrored, kept, strict=True)] == [True] * 64
        assert 20 < sum(mirrored) < 44 if flip else not any(mirrored)


def test_areas_of_inception_crops() -> None:
    """From 8% to all of it."""
    found = seen(coordinates(128), 200, crop="inception", image_size=32)
    sides = [(channel.amax((1, 2)) - channel.amin((1, 2))) * 32 / 31 for channel in (found[:, 0], found[:, 1])]
    areas = sides[0] * sides[1]  # of the outermost pixels' centres, all but exact
    assert 0.07 < areas.min() < 0.12 and 0.9 < areas.max() < 1.05
    assert 0.4 < areas.mean() < 0.65


def test_random_crops_are_6_of_7() -> None:
    """384 of 448 pixels, wherever."""
    found = seen(coordinates(448), 20, crop="random", image_size=384) * 447
    for axis, step in ((0, found[:, 0, 0]), (1, found[:, 1, :, 0])):
        corners = step[:, 0].round()
        torch.testing.assert_close(step, corners[:, None] + torch.arange(384.0), atol=1e-3, rtol=0)
        assert len(set(corners.tolist())) > 10 and corners.min() < 20 and corners.max() > 44, axis


def test_randaugment_changes_pixels() -> None:
    pixels = torch.randint(256, (3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    plain = seen(pixels, 1, image_size=16)
    assert [torch.equal(found, plain[0]) for found in seen(pixels, 20, image_size=16, randaugment=2)].count(True) < 5


@pytest.mark.parametrize(("crop", "middle"), [("inception", True), ("random", False)])
def test_what_was_cropped_in_training_is_tested_in_the_middle(crop: str, middle: bool, tmp_path: Path) -> None:
    class Mean(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Linear(1, 1)

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"loss": batch["image"].mean() + 0 * self.model.weight.sum()}

    image = (coordinates(32) - 0.5).abs()
    split = Split(lambda i: image, torch.zeros(2, dtype=torch.int64), str)
    recipe = Recipe(steps=1, warmup_steps=0, batch_size=2, image_size=16, precision="float32", crop=crop)  # type: ignore[arg-type]
    test = loop.train(Mean(), Data(split, split, 2), recipe, tmp_path)["test"]
    expected = [float(evaluation_transform(16, cut)(image).mean()) for cut in (middle, not middle)]
    assert test["loss"] == pytest.approx(expected[0], abs=1e-5) != pytest.approx(expected[1], abs=1e-2)


# -- the order ------------------------------------------------------------------------------------------------------


def flat(order: Order) -> list[tuple[int, int]]:
    return [where for piece in order for where in piece]


def test_order() -> None:
    """Every image once an epoch, in another order each time; the same from the middle, and shared by processes."""
    whole = flat(Order(10, 4, 4, 0, 10, seed=3))
    assert [place for place, _ in whole] == list(range(40))
    epochs = [[number for _, number in whole[i : i + 10]] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert flat(Order(10, 4, 4, 6, 10, seed=3)) == whole[24:]
    assert flat(Order(10, 4, 4, 0, 10, seed=4)) != whole
    halves = [list(Order(10, 4, 4, 0, 10, 3, rank, 2)) for rank in (0, 1)]
    assert [w for a, b in zip(*halves, strict=True) for w in (*a, *b)] == whole
    pieces = list(Order(10, 8, 3, 0, 2, seed=3))
    assert [len(piece) for piece in pieces] == [3, 3, 2] * 2
    # A batch may be larger than the set.
    assert Counter(number for _, number in flat(Order(3, 9, 9, 0, 1, seed=0))) == {0: 3, 1: 3, 2: 3}

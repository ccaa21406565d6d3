"""Helpers of the data set tests: files of images, tables, and assertions about an opened set."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvit.data.datasets import Data, open_data
from fastvit.data.images import Split


def png(value: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """Return a PNG of one colour, (value, 0, 100)."""
    return saved(Image.new("RGB", size, (value, 0, 100)))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def first_pixels(split: Split) -> list[int]:
    return [split.image(i).getpixel((0, 0))[0] for i in range(len(split))]


def write(files: dict[Path, int]) -> None:
    """Write images of one level of grey each."""
    for path, level in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (level,) * 3).save(path)


def table(count: int, label: str = "label", image: str = "image", first: int = 0) -> dict[str, Any]:
    """Return rows as Hugging Face has them, with labels 0, 1, 0, ..."""
    rows = range(first, first + count)
    return {image: [{"bytes": png(i), "path": None} for i in rows], label: [(i - first) % 2 for i in rows]}


def check(data: Data, train: list[int], test: list[int], classes: int) -> None:
    assert (data.train.labels.tolist(), data.test.labels.tolist(), data.classes) == (train, test, classes)


def refuses(source: object, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(str(source), **options)

"""Images with labels: scikit-learn's digits, files in folders, .tar or .parquet, Hugging Face's and torchvision's sets.

An unreadable image is an error that names it, when its turn comes: a run that left it out would not be the run that its
recipe describes. ``fastvit embed`` lists all such images of a source in unreadable.txt.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit.data import torchvision_sets
from fastvit.data.images import IMAGE_COLUMNS, LABEL_COLUMNS, Images, decode, open_images
from fastvit.data.torchvision_sets import TORCHVISION

log = logging.getLogger("fastvit")

TEST_FOLDERS = ("test", "val", "valid", "validation")
VTAB_LISTS = ("train800val200.txt", "test.txt")  # of a task of VTAB-1k
HELD_OUT = 10  # one image of so many is for testing, where a source has one split alone
LABEL = re.compile("0*[0-9]{1,6}")  # larger is no class: a stray number would make a classifier of so many outputs


@dataclass(frozen=True)
class Split:
    """Labelled images in a fixed order.

    Args:
        read: number -> a PIL image, or a uint8 or 0-to-1 float tensor (C, H, W).
        labels: int64, (N,).
        name: number -> what messages call the image.
    """

    read: Callable[[int], Any]
    labels: Tensor
    name: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, number: int) -> Any:
        """One image.

        Raises:
            ValueError: it can't be read; it is named.
        """
        try:
            return self.read(number)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.name(number)} can't be read: {error}") from error

    def subset(self, numbers: Sequence[int]) -> Split:
        """Some of them, in this order."""
        chosen = torch.tensor(numbers, dtype=torch.int64).tolist()
        return Split(lambda i: self.read(chosen[i]), self.labels[chosen], lambda i: self.name(chosen[i]))


@dataclass(frozen=True)
class Data:
    """A training and a test set.

    Args:
        train, test: their images; there may be none for training, where a model is only judged.
        classes: how many; labels are below. 0: the images have no labels.
        channels: of the images, 1 or 3.

    Raises:
        ValueError: there is no image for testing, or one class alone, or a label is none of the classes.
    """

    train: Split
    test: Split
    classes: int
    channels: int = 3

    def __post_init__(self) -> None:
        if not len(self.test):
            raise ValueError("the test set has no images")
        if self.classes == 1:
            raise ValueError("classes=1: there is nothing to learn; accepted: 2 or more, or 0 for no labels")
        for split in (self.train, self.test) if self.classes else ():
            wrong = ((split.labels < 0) | (split.labels >= self.classes)).nonzero()
            if len(wrong):
                first = int(wrong[0])
                raise ValueError(
                    f"the label of {split.name(first)} is {int(split.labels[first])}; accepted: 0 to {self.classes - 1}"
                )

    def of(self, count: int, seed: int) -> Data:
        """The same with so many training images, chosen by chance.

        Raises:
            ValueError: there are fewer.
        """
        if count > len(self.train):
            raise ValueError(f"examples={count} of {len(self.train)} training images")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        return replace(self, train=self.train.subset(order[:count]))


def open_data(source: str, whole: bool = False, labels: bool = True) -> Data:
    """A data set by its name.

    Args:
        source: "digits"; one of :data:`TORCHVISION`, or NAME:FOLDER where its files are elsewhere than in data/; a
            folder of class folders, or of such in "train" and in one of :data:`TEST_FOLDERS` (the first with labels),
            or of a task of VTAB-1k with its :data:`VTAB_LISTS`; a .tar or .parquet, or a pattern with * for several;
            what ``datasets`` saved with save_to_disk; or hf:NAME for its hub. Of a source with one split alone a tenth
            is held out for testing, always the same.
        whole: for testing alone: all of a source with one split, and of torchvision's sets none but the test set.
        labels: whether labels are wanted; without, files need none, and folders are no classes.

    Raises:
        ValueError: it is no such source, has no images, or labels that are missing or out of range.
        FileNotFoundError: there is nothing of that name; where it was looked for.
        ImportError: a package is missing that reads it.
    """
    name, _, folder = source.partition(":")
    path = Path(source)
    if name == "digits":
        return digits()
    if name in TORCHVISION:
        parts = torchvision_sets.opened(name, Path(folder or "data"), whole)
        return _data([Split(read, _numbers(labels, called), called) for read, labels, called in parts], None, whole)
    if source.startswith("hf:") or any((path / told).is_file() for told in ("dataset_dict.json", "dataset_info.json")):
        return _huggingface(source, whole, labels)
    if (path / VTAB_LISTS[0]).is_file():
        return _listed([path / name for name in VTAB_LISTS[1 if whole else 0 :]], whole)
    tests = [part for part in TEST_FOLDERS if (path / part).is_dir()]
    if not labels:
        places = [[Path(found) for found in sorted(glob.glob(source))]]
        if (path / "train").is_dir():
            places = [[path / part] for part in ("train", *tests[:1])]
        if places[0]:
            return _data([_files([(p, _bare(open_images(p))) for p in of]) for of in places], (), whole)
    if (path / "train").is_dir():
        opened = cache(lambda part: open_images(path / part))
        test = _labelled(source, tests, lambda part: any(os.sep in key for key in opened(part).keys))
        if test is None:
            raise ValueError(
                f"{source} has a folder train and none with folders of classes for testing; accepted: "
                f"{', '.join(TEST_FOLDERS)}"
            )
        return _folders([(path / part, opened(part)) for part in ("train", test)], whole)
    if path.is_dir():
        return _folders([(path, open_images(path))], whole)
    sources = sorted(glob.glob(source))
    if not sources:
        raise FileNotFoundError(
            f"no data {source!r}: no such file or folder in {Path.cwd()}, and no known name: digits, "
            f"{', '.join(TORCHVISION)}, hf:NAME"
        )
    return _data([_files([(Path(s), open_images(s)) for s in sources])], None, whole)


def digits() -> Data:
    """Scikit-learn's 1,797 scanned digits, (1, 8, 8): 1,437 for training and 360 for testing, always the same."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    split = Split(lambda i: images[i], labels, lambda i: f"digit {i}")
    return Data(split.subset(order[:-360]), split.subset(order[-360:]), 10, 1)


def _numbers(labels: Sequence[object], name: Callable[[int], str]) -> Tensor:
    """The labels of any source as int64 (N,).

    Raises:
        ValueError: one is no class's number; the image is named.
    """
    for i, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, (int, str)) or not LABEL.fullmatch(str(label)):
            raise ValueError(f"the label of {name(i)} is {label!r:.40}; accepted: whole numbers from 0 to 999999")
    return torch.tensor([int(str(label)) for label in labels], dtype=torch.int64)


def _labelled(source: str, splits: Sequence[str], has_labels: Callable[[str], bool]) -> str | None:
    """The first of the splits for testing that has labels: of many sets those of "test" are not given away."""
    for split in splits:
        if has_labels(split):
            return split
        log.info("%s: %s has no labels and is left out", source, split)
    return None


def _data(splits: Sequence[Split], classes: Sequence[str] | None, whole: bool) -> Data:
    """A training and a test split; of one alone all is for testing, or a tenth.

    Args:
        classes: their names; None: as many as the first split's labels have.
    """
    names = [str(i) for i in range(int(splits[0].labels.max()) + 1)] if classes is None else classes
    if len(splits) == 2:
        return Data(splits[0], splits[1], len(names))
    (split,) = splits
    if whole:
        return Data(split.subset([]), split, len(names))
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).tolist()
    count = len(split) // HELD_OUT
    if not count:
        raise ValueError(f"{len(split)} images are too few to hold some out for testing; accepted: {HELD_OUT} or more")
    log.info("%d of %d images are held out for testing", count, len(split))
    data = Data(split.subset(sorted(order[count:])), split.subset(sorted(order[:count])), len(names))
    if lost := sorted(set(data.test.labels.tolist()) - set(data.train.labels.tolist())):
        log.warning("all images of these classes are held out for testing: %s", ", ".join(names[i] for i in lost))
    return data


def _bare(images: Images) -> Images:
    """The same without labels: all are 0."""
    return replace(images, labels=lambda: [0] * len(images.keys))


def _folders(parts: Sequence[tuple[Path, Images]], whole: bool) -> Data:
    """Classes are the names of folders, of the first part, numbered in the order of the alphabet."""
    root, train = parts[0]
    names = sorted({str(label) for label in train.labels()})
    numbers = {name: i for i, name in enumerate(names)}
    if len(names) < 2:
        raise ValueError(f"{root} has images in one folder alone, {names[0]!r}; accepted: a folder for each class")

    def split(where: Path, images: Images) -> Split:
        of = [str(label) for label in images.labels()]
        if unknown := sorted(set(of) - set(names)):
            raise ValueError(f"{where} has classes that {root} has not: {', '.join(unknown[:8])}")
        labels = torch.tensor([numbers[name] for name in of])
        return Split(lambda i: decode(images.read(i)), labels, lambda i: str(where / images.keys[i]))

    return _data([split(*part) for part in parts], names, whole)


def _files(sources: Sequence[tuple[Path, Images]]) -> Split:
    """The images of several .tar and .parquet files, whose labels are numbers."""
    places = [(path, images, i) for path, images in sources for i in range(len(images.keys))]

    def name(number: int) -> str:
        path, images, i = places[number]
        return f"{path}: {images.keys[i]}"

    def read(number: int) -> Any:
        _, images, i = places[number]
        return decode(images.read(i))

    return Split(read, _numbers([label for _, images in sources for label in images.labels()], name), name)


def _listed(lists: Sequence[Path], whole: bool) -> Data:
    """Images and labels by lists, "path label" in each line, where paths are below the list's folder."""

    def split(file: Path) -> Split:
        lines = [line.rsplit(maxsplit=1) for line in file.read_text().splitlines()]
        for i, line in enumerate(lines):
            if len(line) != 2:
                raise ValueError(f"{file}: line {i + 1} is {' '.join(line)!r}; accepted: a path and a label")
        paths = [file.parent / name for name, _ in lines]
        if not paths:
            raise ValueError(f"{file} has no images")
        labels = _numbers([label for _, label in lines], lambda i: str(paths[i]))
        return Split(lambda i: decode(paths[i].read_bytes()), labels, lambda i: str(paths[i]))

    splits = [split(file) for file in lists]
    classes = 1 + max(int(part.labels.max()) for part in splits)  # a thousand images need not show all
    return _data(splits, [str(i) for i in range(classes)], whole)


def _huggingface(source: str, whole: bool, labelled: bool) -> Data:
    """A ``datasets.DatasetDict`` with "train" and a test split, or one ``Dataset``, with columns image and label."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source}: pip install 'fastvit[train]', for datasets") from error

    if source.startswith("hf:"):
        if source == "hf:":
            raise ValueError("'hf:' names no data set; accepted: hf:NAME, of one on Hugging Face's hub")
        found = datasets.load_dataset(source.removeprefix("hf:"))
    else:
        try:
            found = datasets.load_from_disk(source)
        except Exception as error:  # whatever datasets makes of a broken folder
            raise ValueError(f"{source} is no folder of save_to_disk, or a broken or empty one: {error!r}") from error
    parts = found if isinstance(found, dict) else {"train": found}
    splits = {name: table.with_format(None) for name, table in parts.items()}  # a format may make tensors of images

    def column(name: str, accepted: Sequence[str]) -> str:
        of = splits[name].column_names
        if chosen := next((column for column in accepted if column in of), None):
            return chosen
        raise ValueError(
            f"{source}: split {name!r} has columns {', '.join(of)}; wanted: {' or '.join(IMAGE_COLUMNS)}, and "
            f"{' or '.join(LABEL_COLUMNS)}"
        )

    @cache
    def labels(name: str) -> list[object]:
        if not labelled:
            return [0] * len(splits[name])
        return list(splits[name][column(name, LABEL_COLUMNS)][:])

    def split(name: str) -> Split:
        table, images = splits[name], column(name, IMAGE_COLUMNS)
        try:
            table = table.select_columns([images]).cast_column(images, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{source}: column {images} of split {name!r} holds no images: {error}") from error

        def read(i: int) -> Any:
            cell = table[i][images]
            if cell is None or (cell["bytes"] is None and cell["path"] is None):
                raise ValueError("the row holds no image")
            return decode(Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"])

        def called(i: int) -> str:
            return f"{source}: row {i} of split {name!r}"

        if not len(table):
            raise ValueError(f"{source}: split {name!r} has no images")
        return Split(read, _numbers(labels(name), called), called)

    tests = [name for name in TEST_FOLDERS if name in splits]
    test = _labelled(source, tests, lambda name: any(label not in (-1, None) for label in labels(name)))
    wanted = [test or next(iter(tests), "train")] if whole else ["train", *([test] if test else [])]
    if "train" in wanted and "train" not in splits:
        raise ValueError(f"{source} has no split 'train'; its splits are {', '.join(splits)}")
    if not labelled:
        return _data([split(name) for name in wanted], (), whole)
    feature = splits[wanted[0]].features[column(wanted[0], LABEL_COLUMNS)]
    return _data([split(name) for name in wanted], getattr(feature, "names", None), whole)

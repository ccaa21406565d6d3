"""Data sets by name: scikit-learn's digits, folders, .tar and .parquet files, Hugging Face's and torchvision's sets.

An unreadable image is an error that names it, when its turn comes: a run that left it out would not be the run that its
recipe describes. ``fastvit embed`` lists all such images of a source in unreadable.txt.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from fastvit.data import torchvision_sets
from fastvit.data.images import (
    LABEL_COLUMNS,
    Images,
    Split,
    hugging_face,
    join,
    listed_images,
    open_images,
    table_images,
)
from fastvit.data.torchvision_sets import TORCHVISION

log = logging.getLogger("fastvit")

TEST_FOLDERS = ("test", "val", "valid", "validation")
VTAB_LISTS = ("train800val200.txt", "test.txt")  # of a task of VTAB-1k
HELD_OUT = 10  # one image in so many is for testing, where a source has only one split


@dataclass(frozen=True)
class Data:
    """A training and a test set.

    Args:
        train, test: their images. The training set may be empty, where a model is only evaluated.
        classes: how many; labels are smaller. 0: the images have no labels.
        channels: of the images, 1 or 3.

    Raises:
        ValueError: the test set is empty, there is only one class, or a label is too large.
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

    def limit(self, examples: int | None, seed: int) -> Data:
        """Return the same data with only ``examples`` training images, chosen at random; None keeps all."""
        if examples is None:
            return self
        if examples > len(self.train):
            raise ValueError(f"examples={examples} of {len(self.train)} training images")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        return replace(self, train=self.train.subset(order[:examples]))


def open_data(source: str, whole: bool = False, labels: bool = True) -> Data:
    """Open a data set by its name.

    Args:
        source: "digits"; one of :data:`TORCHVISION`, or NAME:FOLDER where its files are elsewhere than in data/; a
            folder of class folders, or of such in "train" and in one of :data:`TEST_FOLDERS` (the first with labels),
            or of a task of VTAB-1k with its :data:`VTAB_LISTS`; a .tar or .parquet, or a pattern with * for several;
            what ``datasets`` saved with save_to_disk; or hf:NAME for its hub. Of a source with only one split a tenth
            is held out for testing, always the same.
        whole: use the data for testing only: all of a source with one split, and of torchvision's sets the test set.
        labels: read labels. Without them files need none, and folders are not classes.

    Raises:
        ValueError: the source is of no such kind, has no images, or has labels that are missing or out of range.
        FileNotFoundError: nothing has that name; the message says where it was looked for.
        ImportError: a package that reads the source is missing.
    """
    name, _, folder = source.partition(":")
    path = Path(source)
    if name == "digits":
        return digits()
    if name in TORCHVISION:
        return _data(torchvision_sets.open_splits(name, Path(folder or "data"), whole), None, whole)
    if source.startswith("hf:") or any((path / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
        return _hugging_face(source, whole, labels)
    if (path / VTAB_LISTS[0]).is_file():
        splits = [join([listed_images(path / file)]) for file in VTAB_LISTS[1 if whole else 0 :]]
        classes = 1 + max(int(split.labels.max()) for split in splits)  # a thousand images need not show all
        return _data(splits, [str(i) for i in range(classes)], whole)
    parts = {"": path}
    if (path / "train").is_dir():
        parts = {part: path / part for part in ("train", *TEST_FOLDERS) if (path / part).is_dir()}
    if path.is_dir() and labels:
        return _folders(source, parts, whole)
    if path.is_dir():
        return _data([_unlabelled([open_images(part)]) for part in list(parts.values())[:2]], (), whole)
    sources = [open_images(file) for file in sorted(glob.glob(source))]
    if not sources:
        raise FileNotFoundError(
            f"no data {source!r}: no such file or folder in {Path.cwd()}, and no known name: digits, "
            f"{', '.join(TORCHVISION)}, hf:NAME"
        )
    return _data([join(sources)], None, whole) if labels else _data([_unlabelled(sources)], (), whole)


def digits() -> Data:
    """Return scikit-learn's 1,797 scanned digits, (1, 8, 8): always the same 1,437 to train and 360 to test on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    split = Split(lambda i: images[i], labels, lambda i: f"digit {i}")
    return Data(split.subset(order[:-360]), split.subset(order[-360:]), 10, 1)


def _data(splits: Sequence[Split], classes: Sequence[str] | None, whole: bool) -> Data:
    """Return a training and a test split; all of a single split is for testing, or a tenth.

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


def _unlabelled(parts: Sequence[Images]) -> Split:
    return join(parts, [0] * sum(len(images.keys) for images in parts))


def _labelled_test(source: str, splits: Sequence[str], has_labels: Callable[[str], bool]) -> str | None:
    """Return the first test split that has labels: many data sets don't publish those of "test"."""
    for split in splits:
        if has_labels(split):
            return split
        log.info("%s: %s has no labels and is left out", source, split)
    return None


def _folders(source: str, parts: dict[str, Path], whole: bool) -> Data:
    """Open folders of class folders: "train" and those for testing, or one alone.

    Classes are the names of folders of the first part, numbered in alphabetical order.
    """
    opened = cache(lambda part: open_images(parts[part]))
    first, *tests = parts
    chosen = [first]
    if first == "train":
        test = _labelled_test(source, tests, lambda part: any("/" in Path(key).as_posix() for key in opened(part).keys))
        if test is None:
            raise ValueError(
                f"{source} has a folder train and none with folders of classes for testing; accepted: "
                f"{', '.join(TEST_FOLDERS)}"
            )
        chosen.append(test)
    names = sorted({str(label) for label in opened(first).labels()})
    numbers = {name: i for i, name in enumerate(names)}
    if len(names) < 2:
        raise ValueError(
            f"{parts[first]} has images in one folder alone, {names[0]!r}; accepted: a folder for each class"
        )
    splits = []
    for part in chosen:
        labels = [str(label) for label in opened(part).labels()]
        if unknown := sorted(set(labels) - set(names)):
            raise ValueError(f"{parts[part]} has classes that {parts[first]} has not: {', '.join(unknown[:8])}")
        splits.append(join([opened(part)], [numbers[label] for label in labels]))
    return _data(splits, names, whole)


def _hugging_face(source: str, whole: bool, labelled: bool) -> Data:
    """Open a ``datasets.DatasetDict`` with "train" and a test split, or one ``Dataset``; see :func:`table_images`."""
    datasets = hugging_face(source)
    if source.startswith("hf:"):
        if source == "hf:":
            raise ValueError("'hf:' names no data set; accepted: hf:NAME, of one on Hugging Face's hub")
        found = datasets.load_dataset(source.removeprefix("hf:"))
    else:
        try:
            found = datasets.load_from_disk(source)
        except Exception as error:  # whatever datasets makes of a broken folder
            raise ValueError(f"{source} is no folder of save_to_disk, or a broken or empty one: {error!r}") from error
    tables = found if isinstance(found, dict) else {"train": found}
    opened = cache(lambda name: table_images(tables[name], f"{source}, split {name!r}"))
    labels = cache(lambda name: opened(name).labels())
    tests = [name for name in TEST_FOLDERS if name in tables]
    test = next(iter(tests), None)
    if labelled:
        test = _labelled_test(source, tests, lambda name: any(label not in (-1, None) for label in labels(name)))
    chosen = [test or next(iter(tests), "train")] if whole else ["train", *([test] if test else [])]
    if "train" in chosen and "train" not in tables:
        raise ValueError(f"{source} has no split 'train'; its splits are {', '.join(tables)}")
    for name in chosen:
        if not len(tables[name]):
            raise ValueError(f"{source}: split {name!r} has no images")
    if not labelled:
        return _data([_unlabelled([opened(name)]) for name in chosen], (), whole)
    splits = [join([opened(name)], labels(name)) for name in chosen]
    column = next(name for name in LABEL_COLUMNS if name in tables[chosen[0]].column_names)
    return _data(splits, getattr(tables[chosen[0]].features[column], "names", None), whole)

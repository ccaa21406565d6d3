"""Images with labels: scikit-learn's digits, files in folders, .tar or .parquet, Hugging Face's and torchvision's sets.

An unreadable image is an error that names it, when its turn comes: a run that left it out would not be the run that its
recipe describes. ``fastvit embed`` lists all such images of a source in unreadable.txt.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit.images import Images, decode, open_images

log = logging.getLogger("fastvit")

TEST_FOLDERS = ("test", "val", "valid", "validation")
HELD_OUT = 10  # one image of so many is for testing, where a source has one split alone


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
        classes: how many; labels are below.
        channels: of the images, 1 or 3.

    Raises:
        ValueError: there is no image for testing, or a label is none of the classes.
    """

    train: Split
    test: Split
    classes: int
    channels: int = 3

    def __post_init__(self) -> None:
        if not len(self.test):
            raise ValueError("the test set has no images")
        for split in (self.train, self.test):
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


def open_data(source: str, whole: bool = False) -> Data:
    """A data set by its name.

    Args:
        source: "digits"; one of :data:`TORCHVISION`, or NAME:FOLDER where its files are elsewhere than in data/; a
            folder of class folders, or of such in "train" and in one of :data:`TEST_FOLDERS`; a .tar or .parquet, or a
            pattern with * for several; what ``datasets`` saved with save_to_disk; or hf:NAME for its hub. Of a source
            with one split alone a tenth is held out for testing, always the same.
        whole: for testing alone: all of a source with one split, and of torchvision's sets none but the test set.

    Raises:
        ValueError: it is no such source, has no images, or labels that are missing or out of range.
        FileNotFoundError: there is nothing of that name; where it was looked for.
    """
    name, _, folder = source.partition(":")
    path = Path(source)
    if name == "digits":
        return digits()
    if name in TORCHVISION:
        return _torchvision(name, Path(folder or "data"), whole)
    if name == "hf":
        return _huggingface(_datasets(source).load_dataset(folder), whole)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _huggingface(_datasets(source).load_from_disk(source), whole)
    if (path / "train").is_dir():
        test = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
        if test is None:
            raise ValueError(f"{source} has a folder train and none for testing; accepted: {', '.join(TEST_FOLDERS)}")
        return _folders(open_images(path / "train"), path / "train", open_images(test), test)
    if path.is_dir():
        return _folders(open_images(path), path, whole=whole)
    sources = sorted(glob.glob(source))
    if not sources:
        raise FileNotFoundError(
            f"no data {source!r}: no such file or folder in {Path.cwd()}, and no known name: digits, "
            f"{', '.join(TORCHVISION)}, hf:NAME"
        )
    return _one(_files([(Path(s), open_images(s)) for s in sources]), None, whole)


def digits() -> Data:
    """Scikit-learn's 1,797 scanned digits, (1, 8, 8): 1,437 for training and 360 for testing, always the same."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    split = Split(lambda i: images[i], labels, lambda i: f"digit {i}")
    return Data(split.subset(order[:-360]), split.subset(order[-360:]), 10, 1)


def _one(split: Split, classes: int | None, whole: bool) -> Data:
    """A source's one split: all of it for testing, or a tenth."""
    known = int(split.labels.max()) + 1 if classes is None else classes
    if whole:
        return Data(split.subset([]), split, known)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).tolist()
    count = len(split) // HELD_OUT
    if not count:
        raise ValueError(f"{len(split)} images are too few to hold some out for testing; accepted: {HELD_OUT} or more")
    log.info("%d of %d images are held out for testing", count, len(split))
    return Data(split.subset(sorted(order[count:])), split.subset(sorted(order[:count])), known)


def _folders(
    train: Images, root: Path, test: Images | None = None, test_root: Path | None = None, whole: bool = False
) -> Data:
    """Classes are the names of folders, numbered in the order of the alphabet."""
    names = sorted({str(train.label(i)) for i in range(len(train.keys))})
    numbers = {name: i for i, name in enumerate(names)}

    def split(images: Images, where: Path) -> Split:
        of = [str(images.label(i)) for i in range(len(images.keys))]
        if unknown := sorted(set(of) - set(names)):
            raise ValueError(f"{where} has classes that {root} has not: {', '.join(unknown[:8])}")
        labels = torch.tensor([numbers[name] for name in of])
        return Split(lambda i: decode(images.read(i)), labels, lambda i: str(where / images.keys[i]))

    first = split(train, root)
    if test is None or test_root is None:
        return _one(first, len(names), whole)
    return Data(first, split(test, test_root), len(names))


def _files(sources: Sequence[tuple[Path, Images]]) -> Split:
    """The images of several .tar and .parquet files, whose labels are numbers."""
    places = [(path, images, i) for path, images in sources for i in range(len(images.keys))]

    def label(path: Path, images: Images, i: int) -> int:
        found = images.label(i)
        if isinstance(found, bool) or not str(found).lstrip("-").isdecimal():
            raise ValueError(f"the label of {path}: {images.keys[i]} is {found!r}; accepted: whole numbers from 0")
        return int(str(found))

    def read(number: int) -> Any:
        _, images, i = places[number]
        return decode(images.read(i))

    labels = torch.tensor([label(*place) for place in places])
    return Split(read, labels, lambda number: f"{places[number][0]}: {places[number][1].keys[places[number][2]]}")


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source}: pip install 'fastvit[train]', for datasets") from error
    return datasets


def _huggingface(found: Any, whole: bool) -> Data:
    """A ``datasets.DatasetDict`` with "train" and a test split, or one ``Dataset``, with columns image and label."""
    splits = dict(found) if hasattr(found, "keys") else {"train": found}
    wanted = [name for name in TEST_FOLDERS if name in splits][:1] + ["train"] * ("train" in splits)
    wanted = wanted[:1] if whole else wanted
    if "train" not in splits and not (whole and wanted):
        raise ValueError(f"the data set has no split 'train'; its splits are {', '.join(splits)}")

    def split(name: str) -> Split:
        table = splits[name]
        columns = {wanted: next((c for c in choice if c in table.column_names), None) for wanted, choice in _COLUMNS}
        if None in columns.values():
            raise ValueError(f"split {name!r} has columns {', '.join(table.column_names)}; wanted: image and label")
        import datasets

        raw = table.cast_column(columns["image"], datasets.Image(decode=False))

        def read(i: int) -> Any:
            cell = raw[i][columns["image"]]
            return decode(cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes())

        labels = torch.tensor(table[columns["label"]][:], dtype=torch.int64)
        return Split(read, labels, lambda i: f"row {i} of split {name!r}")

    found = [split(name) for name in wanted]
    features = splits[wanted[-1]].features
    feature = next(features[c] for c in _COLUMNS[1][1] if c in features)
    classes = getattr(feature, "num_classes", None) or int(found[-1].labels.max()) + 1
    return _one(found[0], classes, whole) if len(found) == 1 else Data(found[1], found[0], classes)


_COLUMNS = (("image", ("image", "img")), ("label", ("label", "labels", "fine_label")))

# Name -> class in torchvision.datasets, its arguments for training and, if it has such a split, for testing.
TORCHVISION: dict[str, tuple[str, Sequence[dict[str, Any]], Sequence[dict[str, Any]]]] = {
    "mnist": ("MNIST", [{"train": True}], [{"train": False}]),
    "cifar10": ("CIFAR10", [{"train": True}], [{"train": False}]),
    "cifar100": ("CIFAR100", [{"train": True}], [{"train": False}]),
    "flowers102": ("Flowers102", [{"split": "train"}, {"split": "val"}], [{"split": "test"}]),
    "pets": ("OxfordIIITPet", [{"split": "trainval"}], [{"split": "test"}]),
    "imagenet": ("ImageNet", [{"split": "train"}], [{"split": "val"}]),
    # Of VTAB, what torchvision has; some are one split, of which a tenth is held out.
    "caltech101": ("Caltech101", [{}], []),
    "clevr": ("CLEVRClassification", [{"split": "train"}], [{"split": "val"}]),
    "dtd": ("DTD", [{"split": "train"}, {"split": "val"}], [{"split": "test"}]),
    "eurosat": ("EuroSAT", [{}], []),
    "sun397": ("SUN397", [{}], []),
    "svhn": ("SVHN", [{"split": "train"}], [{"split": "test"}]),
}


def _torchvision(name: str, root: Path, whole: bool) -> Data:
    """One of torchvision's sets, whose files are in ``root``; the paper trains on Flowers' train and val together."""
    import torchvision.datasets

    kind, *options = TORCHVISION[name]

    def split(parts: Sequence[dict[str, Any]]) -> Split:
        opened: Any = torch.utils.data.ConcatDataset(
            [getattr(torchvision.datasets, kind)(root, **{**part, **_no_download(name)}) for part in parts]
        )
        labels = torch.tensor([label for part in opened.datasets for label in _labels(part)])
        files = [path for part in opened.datasets for path, _ in getattr(part, "samples", ())]
        return Split(
            lambda i: opened[i][0].convert("RGB"),
            labels,
            lambda i: files[i] if files else f"image {i} of {name} in {root}",
        )

    wanted = [parts for parts in options if parts]
    try:
        found = [split(parts) for parts in (wanted[-1:] if whole else wanted)]
    except (RuntimeError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{name}: torchvision's {kind} does not find its files in {root.resolve()} ({error}). Put them there, or "
            f"give --data {name}:FOLDER"
        ) from error
    classes = int(found[0].labels.max()) + 1
    return _one(found[0], classes, whole) if len(found) == 1 else Data(found[0], found[1], classes)


def _no_download(name: str) -> dict[str, Any]:
    return {} if name == "imagenet" else {"download": False}  # which has no such argument


def _labels(part: Any) -> list[int]:
    """torchvision's own lists: reading labels from images would decode them all."""
    found = next(getattr(part, name) for name in ("targets", "_labels", "labels", "y") if hasattr(part, name))
    return [int(label) for label in found]

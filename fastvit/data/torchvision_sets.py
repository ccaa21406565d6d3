"""torchvision's data sets, by the names that ``--data`` takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

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
    "pcam": ("PCAM", [{"split": "train"}], [{"split": "test"}]),
    "sun397": ("SUN397", [{}], []),
    "svhn": ("SVHN", [{"split": "train"}], [{"split": "test"}]),
}


def opened(name: str, root: Path, whole: bool) -> list[tuple[Callable[[int], Any], list[int], Callable[[int], str]]]:
    """The training and the test split of a set, or with ``whole`` the last alone; some have but one.

    Args:
        name: of :data:`TORCHVISION`.
        root: folder of its files; the paper trains on Flowers' train and val together.

    Returns:
        Of each split: number -> a PIL image, RGB; the labels; number -> what messages call the image.

    Raises:
        FileNotFoundError: the files are not there.
        ImportError: a package is missing that torchvision reads them with.
    """
    import torchvision.datasets

    kind, *options = TORCHVISION[name]

    def split(parts: Sequence[dict[str, Any]]) -> tuple[Callable[[int], Any], list[int], Callable[[int], str]]:
        given: dict[str, Any] = {} if name == "imagenet" else {"download": False}  # which has no such argument
        sets: Any = torch.utils.data.ConcatDataset(
            [getattr(torchvision.datasets, kind)(root, **part, **given) for part in parts]
        )
        labels = [int(label) for part in sets.datasets for label in _labels(part)]
        files = [path for part in sets.datasets for path, _ in getattr(part, "samples", ())]
        return (
            lambda i: sets[i][0].convert("RGB"),
            labels,
            lambda i: files[i] if files else f"image {i} of {name} in {root}",
        )

    wanted = [parts for parts in options if parts]
    try:
        return [split(parts) for parts in (wanted[-1:] if whole else wanted)]
    except (RuntimeError, FileNotFoundError) as error:
        if isinstance(error.__context__, ImportError):  # PCAM's, without h5py
            raise ImportError(f"{name}: {error}") from error
        raise FileNotFoundError(
            f"{name}: torchvision's {kind} does not find its files in {root.resolve()} ({error}). Put them there, or "
            f"give --data {name}:FOLDER"
        ) from error


def _labels(part: Any) -> Any:
    """torchvision's own lists: reading labels from images would decode them all."""
    if hasattr(part, "h5py"):  # PCAM, which has none
        with part.h5py.File(part._base_folder / part._FILES[part._split]["targets"][0]) as file:
            return file["y"][:].ravel()
    return next(getattr(part, name) for name in ("targets", "_labels", "labels", "y") if hasattr(part, name))

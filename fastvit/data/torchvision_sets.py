"""torchvision's data sets, by the names that ``--data`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvit.data.images import Split

# Name -> class in torchvision.datasets, its arguments for training and, if it has such a split, for testing. The paper
# trains on Flowers' train and val together.
TORCHVISION: dict[str, tuple[str, Sequence[dict[str, Any]], Sequence[dict[str, Any]]]] = {
    "mnist": ("MNIST", [{"train": True}], [{"train": False}]),
    "cifar10": ("CIFAR10", [{"train": True}], [{"train": False}]),
    "cifar100": ("CIFAR100", [{"train": True}], [{"train": False}]),
    "flowers102": ("Flowers102", [{"split": "train"}, {"split": "val"}], [{"split": "test"}]),
    "pets": ("OxfordIIITPet", [{"split": "trainval"}], [{"split": "test"}]),
    "imagenet": ("ImageNet", [{"split": "train"}], [{"split": "val"}]),
    # The tasks of VTAB that torchvision has; some are one split, of which a tenth is held out.
    "caltech101": ("Caltech101", [{}], []),
    "clevr": ("CLEVRClassification", [{"split": "train"}], [{"split": "val"}]),
    "dtd": ("DTD", [{"split": "train"}, {"split": "val"}], [{"split": "test"}]),
    "eurosat": ("EuroSAT", [{}], []),
    "pcam": ("PCAM", [{"split": "train"}], [{"split": "test"}]),
    "sun397": ("SUN397", [{}], []),
    "svhn": ("SVHN", [{"split": "train"}], [{"split": "test"}]),
}


def open_splits(name: str, root: Path, whole: bool) -> list[Split]:
    """Open the training and the test split of a set, or with ``whole`` only the last; some sets have only one.

    Args:
        name: of :data:`TORCHVISION`.
        root: folder of its files.

    Raises:
        FileNotFoundError: the files are not there.
        ImportError: a package that torchvision reads them with is missing.
    """
    import torchvision.datasets

    kind, *options = TORCHVISION[name]

    def split(parts: Sequence[dict[str, Any]]) -> Split:
        more: dict[str, Any] = {} if name == "imagenet" else {"download": False}  # ImageNet has no such argument
        sets: Any = torch.utils.data.ConcatDataset(
            [getattr(torchvision.datasets, kind)(root, **part, **more) for part in parts]
        )
        files = [path for part in sets.datasets for path, _ in getattr(part, "samples", ())]
        labels = torch.tensor([int(label) for part in sets.datasets for label in _labels(part)])
        return Split(
            lambda i: sets[i][0].convert("RGB"),
            labels,
            lambda i: files[i] if files else f"image {i} of {name} in {root}",
        )

    present = [parts for parts in options if parts]
    try:
        return [split(parts) for parts in (present[-1:] if whole else present)]
    except (RuntimeError, FileNotFoundError) as error:
        if isinstance(error.__context__, ImportError):  # PCAM's, without h5py
            raise ImportError(f"{name}: {error}") from error
        raise FileNotFoundError(
            f"{name}: torchvision's {kind} does not find its files in {root.resolve()} ({error}). Put them there, or "
            f"use --data {name}:FOLDER"
        ) from error


def _labels(part: Any) -> Any:
    """Return torchvision's own list of labels: taking them from its examples would decode all images."""
    if hasattr(part, "h5py"):  # PCAM, which has no such list
        with part.h5py.File(part._base_folder / part._FILES[part._split]["targets"][0]) as file:
            return file["y"][:].ravel()
    return next(getattr(part, name) for name in ("targets", "_labels", "labels", "y") if hasattr(part, name))

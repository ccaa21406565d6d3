"""The images of one source: a folder, a .tar, a .parquet or a table of ``datasets``; and their pixels.

Tables are read by ``datasets``. Folders and tars are read here, because ``datasets`` can't keep what is promised:

- imagefolder takes 0.9 ms a file at every start (20 minutes for ImageNet; the walk below takes 4 seconds), and takes
  the innermost folder for the class;
- webdataset copies the archive into its cache before the first image, ends silently at the first damaged header, and
  accepts missing labels; read as a stream, it has no random access, which a resumed and shuffled run needs.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Names of columns in a .parquet and in Hugging Face's data sets; the first that exists is read.
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")

LABEL = re.compile("0*[0-9]{1,6}")  # a larger number is no class, and would make a classifier of so many outputs


@dataclass(frozen=True)
class Images:
    """Images in a fixed order.

    Args:
        source: what messages put before a key.
        keys: a different name for each image.
        read: number -> the bytes of an image file. Raises a ValueError or an OSError where there is none.
        labels: -> a label for each image, read in one pass. Raises a ValueError where an image has none.
    """

    source: str
    keys: Sequence[str]
    read: Callable[[int], bytes]
    labels: Callable[[], Sequence[object]]

    def name(self, number: int) -> str:
        """Return what messages call an image."""
        return self.source + self.keys[number]


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
        """Read one image.

        Raises:
            ValueError: the image can't be read; the message names it.
        """
        try:
            return self.read(number)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.name(number)} can't be read: {error}") from error

    def subset(self, numbers: Sequence[int]) -> Split:
        """Return some of the images, in the order of ``numbers``."""
        chosen = torch.tensor(numbers, dtype=torch.int64).tolist()
        return Split(lambda i: self.read(chosen[i]), self.labels[chosen], lambda i: self.name(chosen[i]))


def join(parts: Sequence[Images], labels: Sequence[object] | None = None) -> Split:
    """Return the images of several sources as one split.

    Args:
        parts: the sources.
        labels: numbers of classes, in place of the sources' own labels.
    """
    places = [(images, i) for images in parts for i in range(len(images.keys))]

    def read(number: int) -> Any:
        images, i = places[number]
        return decode(images.read(i))

    def name(number: int) -> str:
        images, i = places[number]
        return images.name(i)

    if labels is None:
        labels = [label for images in parts for label in images.labels()]
    return Split(read, class_numbers(labels, name), name)


def class_numbers(labels: Sequence[object], name: Callable[[int], str]) -> Tensor:
    """Return labels of any source as int64 (N,).

    Raises:
        ValueError: a label is not the number of a class; the message names the image.
    """
    for i, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, (int, str)) or not LABEL.fullmatch(str(label)):
            raise ValueError(f"the label of {name(i)} is {label!r:.40}; accepted: whole numbers from 0 to 999999")
    return torch.tensor([int(str(label)) for label in labels], dtype=torch.int64)


def open_images(source: str | Path) -> Images:
    """Open the images of a folder (and of those below it), a .tar, or a .parquet file.

    In a folder a label is the name of the uppermost folder in it; links to folders are followed. In a .tar, as in
    webdataset, a label is the number in a .cls beside the image, or the "label" or "cls" of a .json. Names that begin
    with "." are left out of both. :func:`table_images` says how a .parquet is read.

    Raises:
        ValueError: there is no image in the source, or it is broken or of another kind.
    """
    source = Path(source)
    if source.is_dir():
        found = _folder(source)
    elif source.suffix == ".tar" and source.is_file():
        found = _tar(source)
    elif source.suffix == ".parquet" and source.is_file():
        found = _parquet(source)
    else:
        raise ValueError(f"{source} is no folder, .tar or .parquet file that is there")
    if not found.keys:
        raise ValueError(f"{source} has no images; known are {', '.join(SUFFIXES)}")
    return found


def _folder(source: Path) -> Images:
    inside = sorted(_below(source))

    def labels() -> list[str]:
        if bare := next((parts for parts in inside if len(parts) < 2), None):
            raise ValueError(f"{source.joinpath(*bare)} is in no folder of a class")
        return [parts[0] for parts in inside]

    keys = [os.sep.join(parts) for parts in inside]
    return Images(os.path.join(source, ""), keys, lambda i: source.joinpath(*inside[i]).read_bytes(), labels)


def _below(folder: Path, parts: tuple[str, ...] = (), above: frozenset[str] = frozenset()) -> Iterator[tuple[str, ...]]:
    """Yield the images below a folder, each as the parts of its path. Links to a folder above are not followed."""
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if os.path.realpath(entry.path) not in above:
                    yield from _below(Path(entry.path), (*parts, entry.name), above)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():
                yield *parts, entry.name


def _tar(source: Path) -> Images:
    try:
        with source.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            # Of two members of one name the last counts, as when tar unpacks them.
            places = {member.name: (member.offset_data, member.size) for member in archive if member.isfile()}
            file.seek(archive.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes whatever is no header for the end
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"{source} is no tar, or a broken or compressed one: {error}") from error

    images = (name for name in places if os.path.splitext(name)[1].lower() in SUFFIXES)
    keys = sorted(name for name in images if "/." not in f"/{os.path.normpath(name)}")

    def member(file: IO[bytes], name: str) -> bytes:
        offset, size = places[name]
        file.seek(offset)
        return file.read(size)

    def read(i: int) -> bytes:
        with source.open("rb") as file:
            return member(file, keys[i])

    def label(file: IO[bytes], key: str) -> object:
        folder, slash, name = key.rpartition("/")
        stem = folder + slash + name.partition(".")[0]  # to the first dot of the name, as in webdataset
        try:
            if (beside := f"{stem}.cls") in places:
                return member(file, beside).decode().strip()
            if (beside := f"{stem}.json") in places:
                fields = json.loads(member(file, beside))
                for field in ("label", "cls"):
                    if isinstance(fields, dict) and field in fields:
                        return fields[field]
        except ValueError as error:
            raise ValueError(f"{source}: {beside} can't be read: {error}") from error
        raise ValueError(f"{source}: {key} has no label: there is no {stem}.cls and no {stem}.json with a label")

    def labels() -> list[object]:
        with source.open("rb") as file:
            return [label(file, key) for key in keys]

    return Images(f"{source}: ", keys, read, labels)


def _parquet(source: Path) -> Images:
    datasets = hugging_face(source)
    try:  # a memory-mapped copy in the cache of `datasets`, where every row is as near as any other
        table = datasets.load_dataset("parquet", data_files=glob.escape(str(source)), split="train")
    except Exception as error:  # whatever `datasets` makes of a broken file
        raise ValueError(f"{source} is no parquet file, or a broken one: {error}") from error
    return table_images(table, str(source))


def hugging_face(source: object) -> Any:
    """Return the module ``datasets``, or raise an ImportError that says why ``source`` needs it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source}: pip install datasets (a part of 'fastvit[train]')") from error
    return datasets


def table_images(table: Any, source: str) -> Images:
    """Return the images of a ``datasets.Dataset``.

    They are in the first of :data:`IMAGE_COLUMNS` or in the only binary column, as bytes or, as Hugging Face has them,
    as a struct with "bytes" and "path". A key is the struct's "path" where every row has a path of its own, else the
    row's number. Labels are in the first of :data:`LABEL_COLUMNS`.

    Args:
        table: the data set.
        source: its name in messages.

    Raises:
        ValueError: no column, or more than one, may hold images.
    """
    datasets = hugging_face(source)
    import pyarrow.compute as pc

    def holds_bytes(feature: Any) -> bool:
        feature = feature.get("bytes") if isinstance(feature, dict) else feature
        return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")

    binary = [name for name, feature in table.features.items() if holds_bytes(feature)]
    image = next((name for name in IMAGE_COLUMNS if name in binary), binary[0] if len(binary) == 1 else None)
    label = next((name for name in LABEL_COLUMNS if name in table.column_names), None)
    if image is None:
        raise ValueError(
            f"{source} has no column {' or '.join(IMAGE_COLUMNS)} of images, and its binary ones are {binary}: "
            "which holds images?"
        )
    cells = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    cells = cells.with_format("arrow")[:].column(image)  # no copy of what is mapped
    paths = pc.struct_field(cells, "path").to_pylist()

    def read(i: int) -> bytes:
        cell = cells[i].as_py() or {"bytes": None, "path": None}
        if cell["bytes"] is None and cell["path"] is None:
            raise ValueError(f"row {i} holds no image")
        data: bytes = Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
        return data

    def labels() -> list[object]:
        if label is None:
            columns = ", ".join(table.column_names)
            raise ValueError(f"{source} has no column {' or '.join(LABEL_COLUMNS)}; its columns are {columns}")
        found: list[object] = table.with_format("arrow")[label][:].to_pylist()
        return found

    unique = None not in paths and len(set(paths)) == len(paths)
    return Images(f"{source}: ", paths if unique else [f"{i:09}" for i in range(len(paths))], read, labels)


def listed_images(file: Path) -> Images:
    """Open the images of a list, "path label" in each line, where paths are below the list's folder."""
    lines = [line.rsplit(maxsplit=1) for line in file.read_text().splitlines()]
    for i, line in enumerate(lines):
        if len(line) != 2:
            raise ValueError(f"{file}: line {i + 1} is {' '.join(line)!r}; accepted: a path and a label")
    if not lines:
        raise ValueError(f"{file} has no images")
    keys, labels = zip(*lines, strict=True)
    return Images(os.path.join(file.parent, ""), keys, lambda i: (file.parent / keys[i]).read_bytes(), lambda: labels)


def decode(data: bytes, mode: str = "RGB") -> Image.Image:
    """Return an image file's pixels, 8 bits a channel: "RGB", or "L" for grey.

    Alpha is dropped, as torchvision does; a palette's colours are looked up; 16-bit grey keeps its upper bits, which
    Pillow's own conversion clips.

    Raises:
        ValueError: the data is no image, or cut short, or has pixels of floats or 32-bit integers, of unknown range.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError("it is no image of a format that is known" if data else "it is empty") from error
    except Exception as error:  # whatever a decoder makes of a broken file
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if image.mode in ("F", "I"):
        raise ValueError(f"its pixels are of mode {image.mode!r}, whose range is unknown; accepted: 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    return image.convert(mode)


def preprocess(
    data: bytes, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], channels: int = 3
) -> Tensor:
    """Return an image file as (channels, H, W) float32, 3 for colour or 1 for grey.

    The shorter side is resized (bicubic) to cover H x W, and the middle is cut out.
    """
    from PIL import Image, ImageOps

    mode = {1: "L", 3: "RGB"}[channels]
    fitted = ImageOps.fit(decode(data, mode), (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).view(*size, channels)
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)

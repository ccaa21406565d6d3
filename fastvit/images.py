"""Images in files: those of a folder, a .tar or a .parquet in a fixed order, with their labels; and their pixels."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Images:
    """Images in a fixed order.

    Args:
        keys: a name of each, all different.
        read: number -> the bytes of its file.
        label: number -> its label: its folder, or what stands beside the image; a ValueError where there is none.
    """

    keys: Sequence[str]
    read: Callable[[int], bytes]
    label: Callable[[int], object]


def open_images(source: str | Path) -> Images:
    """The images of a folder (and those below it), a .tar, or a .parquet file.

    In a .parquet they are the column "image" or the only binary one, as bytes or, as Hugging Face has them, a struct
    with "bytes"; the key is the struct's "path" where every row has one of its own, else the row's number. Labels are
    its column "label"; in a .tar, as webdataset has them, the number in a .cls beside the image, or the "label" or
    "cls" of a .json; in a folder, the name of the uppermost folder in it.

    Raises:
        ValueError: there is no image in it, or it is no such source.
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
    paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    inside = [path.relative_to(source) for path in paths]

    def label(i: int) -> str:
        if len(inside[i].parts) < 2:
            raise ValueError(f"{paths[i]} is in no folder of a class")
        return inside[i].parts[0]

    return Images([str(path) for path in inside], lambda i: paths[i].read_bytes(), label)


def _tar(source: Path) -> Images:
    with tarfile.open(source) as archive:
        inside = [m for m in archive if m.isfile()]
    places = {m.name: (m.offset_data, m.size) for m in inside}  # of two of one name the last, as tar unpacks them
    keys = sorted(name for name in places if Path(name).suffix.lower() in SUFFIXES)

    def member(name: str) -> bytes:
        offset, size = places[name]
        with source.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def label(i: int) -> object:
        folder, slash, name = keys[i].rpartition("/")
        stem = folder + slash + name.partition(".")[0]  # to the first dot of the name, as in webdataset
        if f"{stem}.cls" in places:
            return member(f"{stem}.cls").decode().strip()
        beside = json.loads(member(f"{stem}.json")) if f"{stem}.json" in places else {}
        if named := [beside[name] for name in ("label", "cls") if name in beside]:
            return named[0]
        raise ValueError(f"{source}: {keys[i]} has no label: there is no {stem}.cls and no {stem}.json with a label")

    return Images(keys, lambda i: member(keys[i]), label)


def _parquet(source: Path) -> Images:
    import pyarrow.parquet as pq
    import pyarrow.types as kinds

    file = pq.ParquetFile(source)
    columns = [field.name for field in file.schema_arrow if kinds.is_struct(field.type) or kinds.is_binary(field.type)]
    name = "image" if "image" in columns else columns[0] if len(columns) == 1 else None
    if name is None:
        raise ValueError(f"{source} has no column 'image', and its binary ones are {columns}: which holds images?")
    column = file.read(columns=[name]).column(0)
    struct = kinds.is_struct(column.type)
    paths = [row["path"] for row in column.to_pylist()] if struct and column.type.get_field_index("path") >= 0 else []
    own = bool(paths) and None not in paths and len(set(paths)) == len(paths)
    keys = paths if own else [f"{i:09}" for i in range(len(column))]
    labels = file.read(columns=["label"]).column(0) if "label" in file.schema_arrow.names else None

    def read(i: int) -> bytes:
        value = column[i].as_py()
        data: bytes = value["bytes"] if struct else value
        return data

    def label(i: int) -> object:
        if labels is None:
            raise ValueError(f"{source} has no column 'label'; its columns are {', '.join(file.schema_arrow.names)}")
        return labels[i].as_py()

    return Images(keys, read, label)


def decode(data: bytes, mode: str = "RGB") -> Image.Image:
    """An image file's pixels, 8 bits a channel: "RGB", or "L" for grey.

    Alpha is dropped, as torchvision does; a palette's colours are looked up; 16-bit grey keeps its upper bits, which
    Pillow's own conversion clips.

    Raises:
        ValueError: it is no image, or cut short; or its pixels are floats or 32-bit integers, of no known range.
    """
    from PIL import Image

    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
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
    """An image file as (channels, H, W) float32, 3 of colour or 1 of grey: the shorter side resized (bicubic) to cover
    H x W, the middle cut out."""
    from PIL import Image, ImageOps

    mode = {1: "L", 3: "RGB"}[channels]
    fitted = ImageOps.fit(decode(data, mode), (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).view(*size, channels)
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)

"""Images in files: those of a folder, a .tar or a .parquet in a fixed order, with their labels; and their pixels."""

from __future__ import annotations

import io
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

# What columns of tables are called, in a .parquet as in Hugging Face's data sets; the first that is there.
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")

# Parquet is read by whole row groups. Small ones are read when an image of theirs is wanted, at some 10 ms, which is
# about what its decoding takes. Of larger ones (pyarrow writes a million rows as one) shuffled reading would take most
# of a second an image, so theirs stay in memory, once: workers are forked from the process that has them.
SMALL_GROUP = 16 * 2**20


@dataclass(frozen=True)
class Images:
    """Images in a fixed order.

    Args:
        keys: a name of each, all different.
        read: number -> the bytes of its file; a ValueError where there are none.
        labels: -> a label of each, read in one pass: its folder, or what stands beside the image; a ValueError where
            one has none.
    """

    keys: Sequence[str]
    read: Callable[[int], bytes]
    labels: Callable[[], Sequence[object]]


def open_images(source: str | Path) -> Images:
    """The images of a folder (and those below it), a .tar, or a .parquet file.

    In a .parquet they are the first of :data:`IMAGE_COLUMNS` or the only binary column, as bytes or, as Hugging Face
    has them, a struct with "bytes"; the key is the struct's "path" where every row has one of its own, else the row's
    number. Labels are the first of :data:`LABEL_COLUMNS`; in a .tar, as webdataset has them, the number in a .cls
    beside the image, or the "label" or "cls" of a .json; in a folder, the name of the uppermost folder in it. Links to
    folders are followed; what begins with "." is left out, of a .tar too.

    Raises:
        ValueError: there is no image in it, or it is no such source, or a broken one.
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

    return Images([os.sep.join(parts) for parts in inside], lambda i: source.joinpath(*inside[i]).read_bytes(), labels)


def _below(folder: Path, parts: tuple[str, ...] = (), above: frozenset[str] = frozenset()) -> Iterator[tuple[str, ...]]:
    """The images below a folder, each as the parts of its path; what links to a folder that it is in has none."""
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
            # Of two of one name the last, as tar unpacks them.
            places = {member.name: (member.offset_data, member.size) for member in archive if member.isfile()}
            file.seek(archive.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # where tarfile takes whatever is no header for the end
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

    return Images(keys, read, labels)


@dataclass(frozen=True, eq=False)  # a file that was opened twice may have been written anew
class _Groups:
    """The row groups of a column of a .parquet; no file is held open, as there may be thousands.

    Args:
        source, column: which.
        metadata: pyarrow's, of the file.
        firsts: the number of each group's first row.
    """

    source: Path
    column: str
    metadata: Any
    firsts: Sequence[int]

    def row(self, i: int) -> Any:
        """One row's value."""
        group = bisect_right(self.firsts, i) - 1
        return _group(self, group)[i - self.firsts[group]].as_py()


@lru_cache(maxsize=4)  # of all files together; enough for threads that read one after the other
def _group(groups: _Groups, number: int) -> Any:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(groups.source, metadata=groups.metadata)
    return file.read_row_group(number, [groups.column], use_threads=False).column(0)  # threads don't survive a fork


def _parquet(source: Path) -> Images:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source, memory_map=True)
        kinds = {field.name: field.type for field in file.schema_arrow}
        binary = [name for name, kind in kinds.items() if _holds_bytes(kind)]
        column = next((name for name in IMAGE_COLUMNS if name in binary), binary[0] if len(binary) == 1 else None)
        if column is None:
            raise ValueError(
                f"{source} has no column {' or '.join(IMAGE_COLUMNS)} of images, and its binary ones are {binary}: "
                "which holds images?"
            )
        paths = []
        if pa.types.is_struct(kinds[column]) and kinds[column].get_field_index("path") >= 0:
            paths = pc.struct_field(file.read([f"{column}.path"]).column(0), "path").to_pylist()
        told = next((name for name in LABEL_COLUMNS if name in kinds), None)
        values = None if told is None else file.read([told]).column(0)
        row = _rows(source, file, column)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source} is no parquet file, or a broken one: {error}") from error

    def read(i: int) -> bytes:
        value = row(i)
        data: bytes | None = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise ValueError(f"row {i} holds no image")
        return data

    def labels() -> list[object]:
        if values is None:
            raise ValueError(f"{source} has no column {' or '.join(LABEL_COLUMNS)}; its columns are {', '.join(kinds)}")
        found: list[object] = values.to_pylist()
        return found

    own = bool(paths) and None not in paths and len(set(paths)) == len(paths)
    return Images(paths if own else [f"{i:09}" for i in range(file.metadata.num_rows)], read, labels)


def _holds_bytes(kind: Any) -> bool:
    """Whether values of an Arrow type are bytes, or a struct with "bytes"."""
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))


def _rows(source: Path, file: Any, column: str) -> Callable[[int], Any]:
    """number -> that row's value; see :data:`SMALL_GROUP`."""
    import pyarrow as pa

    groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
    if all(group.total_byte_size <= SMALL_GROUP for group in groups):
        firsts = list(accumulate((group.num_rows for group in groups), initial=0))[:-1]
        return _Groups(source, column, file.metadata, firsts).row
    # In pieces, as pyarrow doubles the buffers of a whole column until it fits.
    pieces = [batch.column(0) for batch in file.iter_batches(64, columns=[column], use_threads=False)]
    pa.default_memory_pool().release_unused()
    held = pa.chunked_array(pieces, pieces[0].type)
    return lambda i: held[i].as_py()


def decode(data: bytes, mode: str = "RGB") -> Image.Image:
    """An image file's pixels, 8 bits a channel: "RGB", or "L" for grey.

    Alpha is dropped, as torchvision does; a palette's colours are looked up; 16-bit grey keeps its upper bits, which
    Pillow's own conversion clips.

    Raises:
        ValueError: it is no image, or cut short; or its pixels are floats or 32-bit integers, of no known range.
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
    """An image file as (channels, H, W) float32, 3 of colour or 1 of grey: the shorter side resized (bicubic) to cover
    H x W, the middle cut out."""
    from PIL import Image, ImageOps

    mode = {1: "L", 3: "RGB"}[channels]
    fitted = ImageOps.fit(decode(data, mode), (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).view(*size, channels)
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)

"""Data sets: every source, images of every mode, what can be wrong with them, and the order in which they come."""

from __future__ import annotations

import gzip
import io
import json
import logging
import random
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fastvit.data.datasets import Data, Split, open_data
from fastvit.data.images import decode, open_images
from fastvit.training import loop
from fastvit.training.augment import Examples, Order, evaluation_transform, loader, training_transform
from fastvit.training.objectives import Objective
from fastvit.training.recipes import Recipe


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")


def png(value: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """An image of one colour, (value, 0, 100)."""
    return saved(Image.new("RGB", size, (value, 0, 100)))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def first_pixels(split: Split) -> list[int]:
    return [split.image(i).getpixel((0, 0))[0] for i in range(len(split))]


# -- pixels ---------------------------------------------------------------------------------------------------------


def test_modes() -> None:
    """8 and 16 bits, grey, alpha, palette and CMYK: the colour that was meant."""
    grey16 = Image.fromarray(np.full((4, 4), 0xC8FF, dtype=np.uint16))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 10, 30])
    one_bit = Image.new("1", (4, 4), 1)
    cases = [
        (saved(Image.new("RGB", (4, 4), (200, 10, 30))), (200, 10, 30)),
        (saved(Image.new("L", (4, 4), 200)), (200, 200, 200)),
        (saved(Image.new("LA", (4, 4), (200, 9))), (200, 200, 200)),
        (saved(Image.new("RGBA", (4, 4), (200, 10, 30, 40))), (200, 10, 30)),
        (saved(palette), (200, 10, 30)),
        (saved(palette, "GIF"), (200, 10, 30)),
        (saved(Image.new("CMYK", (4, 4), (55, 245, 225, 0)), "TIFF"), (200, 10, 30)),
        (saved(grey16), (200, 200, 200)),
        (saved(grey16, "TIFF"), (200, 200, 200)),
        (saved(one_bit), (255, 255, 255)),
    ]
    for data, colour in cases:
        image = decode(data)
        assert image.mode == "RGB"
        assert image.getpixel((1, 2)) == colour
        assert image.getcolors() == [(16, colour)]
    jpeg = decode(saved(Image.new("CMYK", (8, 8), (55, 245, 225, 0)), "JPEG", quality=100))
    assert np.abs(np.asarray(jpeg, dtype=int) - [200, 10, 30]).max() <= 6
    assert decode(saved(grey16), "L").getpixel((0, 0)) == 200


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode '{mode}'"):
        decode(saved(Image.new(mode, (4, 4), 7), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_images_cut_short(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(pixels), kind)
    decode(whole)
    for data in (whole[: len(whole) // 2], b"", b"no image"):
        with pytest.raises(ValueError):
            decode(data)


# -- sources --------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    data = open_data("digits")
    assert (len(data.train), len(data.test), data.classes, data.channels) == (1437, 360, 10, 1)
    again = open_data("digits")
    assert torch.equal(data.test.labels, again.test.labels)
    everything = [
        tuple(split.image(i).flatten().tolist()) for split in (data.train, data.test) for i in range(len(split))
    ]
    from sklearn.datasets import load_digits

    assert Counter(everything) == Counter(tuple(row) for row in (load_digits().data / 16).tolist())
    assert min(min(e) for e in everything) == 0
    assert max(max(e) for e in everything) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes in train, of 3 and 2 images, and both in val."""
    for part, name, values in (
        ("train", "cat", (1, 2, 3)),
        ("train", "dog", (4, 5)),
        ("val", "dog", (6,)),
        ("val", "cat", (7,)),
    ):
        (tmp_path / part / name).mkdir(parents=True)
        for value in values:
            (tmp_path / part / name / f"{value}.png").write_bytes(png(value))
    return tmp_path


def test_folders(folder: Path) -> None:
    data = open_data(str(folder))
    assert first_pixels(data.train) == [1, 2, 3, 4, 5]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert (first_pixels(data.test), data.test.labels.tolist()) == ([7, 6], [0, 1])
    assert (data.classes, data.channels) == (2, 3)


def test_folder_mistakes(folder: Path, tmp_path: Path) -> None:
    (folder / "val" / "bird").mkdir()
    (folder / "val" / "bird" / "8.png").write_bytes(png(8))
    with pytest.raises(ValueError, match=r"classes that .*train has not: bird"):
        open_data(str(folder))
    (folder / "val" / "bird" / "8.png").rename(folder / "val" / "8.png")
    with pytest.raises(ValueError, match=r"8\.png is in no folder of a class"):
        open_data(str(folder))
    (folder / "val").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match="none with folders of classes for testing; accepted: test, val"):
        open_data(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        open_data(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"no data 'nothing'.*digits, mnist"):
        open_data("nothing")


def test_one_class(folder: Path, tmp_path: Path) -> None:
    """A folder too high up, of which training would make a perfect classifier."""
    (folder / "train").rename(tmp_path / "high")
    (folder / "val").rename(tmp_path / "high" / "val")
    (tmp_path / "high" / "cat").rename(tmp_path / "high" / "val" / "bird")
    (tmp_path / "high" / "dog").rename(tmp_path / "high" / "val" / "cow")
    with pytest.raises(ValueError, match=r"high has images in one folder alone, 'val'; accepted: a folder for each"):
        open_data(str(tmp_path / "high"))
    assert open_data(str(tmp_path / "high" / "val"), whole=True).classes == 4


def test_links_and_hidden_files(folder: Path, tmp_path: Path) -> None:
    """Folders of classes may be links; a link to where it is ends; what editors and macOS leave is no image."""
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(folder / "train" / name)
    (folder / "train" / "cat" / "again").symlink_to(folder / "train")
    (folder / "train" / "dog" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "train" / "dog" / "._4.png").write_bytes(b"no image")
    (tmp_path / "linked" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "linked" / ".ipynb_checkpoints" / "1.png").write_bytes(png(9))
    found = open_images(tmp_path / "linked")
    assert [key for key in found.keys if "again" not in key] == [
        *("cat/1.png", "cat/2.png", "cat/3.png", "dog/4.png", "dog/5.png")
    ]
    assert max(key.count("again") for key in found.keys) == 1
    tar(tmp_path / "hidden.tar", dict.fromkeys(("./a/1.png", "./a/._1.png", ".b/1.png", "2.png"), png(1)))
    assert open_images(tmp_path / "hidden.tar").keys == ["./a/1.png", "2.png"]


def test_test_splits_without_labels(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Are left out for the next: images in no folder of a class, or labels that are -1, as ImageNet's on the hub."""
    caplog.set_level(logging.INFO, "fastvit")
    (folder / "test").mkdir()
    (folder / "test" / "8.png").write_bytes(png(8))
    assert first_pixels(open_data(str(folder)).test) == [7, 6]
    assert caplog.messages == [f"{folder}: test has no labels and is left out"]

    def table(first: int, *labels: int) -> Any:
        return datasets.Dataset.from_dict(
            {"image": [{"bytes": png(first + i), "path": None} for i in range(len(labels))], "label": labels}
        )

    splits = {"train": table(0, *[0, 1] * 10), "test": table(30, -1, -1), "validation": table(40, 0, 1)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "three")
    for whole in (False, True):
        assert first_pixels(open_data(str(tmp_path / "three"), whole).test) == [40, 41]
    del splits["validation"]
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    caplog.clear()
    assert len(open_data(str(tmp_path / "two")).test) == 2
    assert "two: test has no labels and is left out" in caplog.text and "2 of 20 images are held out" in caplog.text
    with pytest.raises(ValueError, match=r"two, split 'test': 000000000 is -1; accepted: whole numbers from 0"):
        open_data(str(tmp_path / "two"), whole=True)


def test_classes_that_are_held_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(20):
        (tmp_path / f"class {i:02}").mkdir()
        (tmp_path / f"class {i:02}" / "1.png").write_bytes(png(i))
    lost = first_pixels(open_data(str(tmp_path)).test)
    named = ", ".join(f"class {i:02}" for i in lost)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"all images of these classes are held out for testing: {named}"
    ]


def test_an_unreadable_image_is_named(folder: Path) -> None:
    (folder / "train" / "dog" / "5.png").write_bytes(png(5)[:50])
    data = open_data(str(folder))
    with pytest.raises(ValueError, match=r"train/dog/5\.png can't be read"):
        data.train.image(4)
    examples = Examples(data.train, evaluation_transform(8), 0)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"train/dog/5\.png can't be read"):
            list(loader(examples, [[(4, 4)]], workers))


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_tars_as_webdataset_writes_them(tmp_path: Path) -> None:
    """Labels in .cls or .json, a name with dots, several shards; a tenth is held out, always the same."""
    members: dict[str, bytes] = {}
    for i in range(10):
        members[f"a/{i}.left.png"] = png(i)
        members[f"a/{i}.cls" if i % 2 else f"a/{i}.json"] = (
            str(i % 3).encode() if i % 2 else json.dumps({"label": i % 3}).encode()
        )
    tar(tmp_path / "train-0.tar", members)
    tar(
        tmp_path / "train-1.tar",
        {f"{i}{end}": data for i in range(10, 20) for end, data in ((".png", png(i)), (".cls", b"2\n"))},
    )
    data = open_data(f"{tmp_path}/train-*.tar")
    assert (len(data.train), len(data.test), data.classes) == (18, 2, 3)
    for split in (data.train, data.test):
        assert [i % 3 if i < 10 else 2 for i in first_pixels(split)] == split.labels.tolist()
    assert sorted(first_pixels(data.train) + first_pixels(data.test)) == list(range(20))
    assert first_pixels(open_data(f"{tmp_path}/train-*.tar").test) == first_pixels(data.test)


@pytest.mark.parametrize(
    ("end", "label", "message"),
    [
        ("txt", b"1", "3.png has no label"),
        ("cls", b"\xff", "images.tar: 3.cls can't be read: 'utf-8' codec"),
        ("json", b"{", "images.tar: 3.json can't be read: Expecting"),
        ("json", b"1", "images.tar: 3.png has no label"),
        ("json", b"[1]", "images.tar: 3.png has no label"),
        ("json", b'{"label": 1.5}', "images.tar: 3.png is 1.5; accepted: whole"),
        *(
            ("cls", text.encode(), f"images.tar: 3.png is '{text:.39}")
            for text in ("-1", "--5", "cat", "1.5", "1000000", "1" * 20, "9" * 5000)
        ),
    ],
)
def test_labels_of_a_tar_that_are_none(end: str, label: bytes, message: str, tmp_path: Path) -> None:
    members = {f"{i}{end}": data for i in range(12) for end, data in ((".png", png(i)), (".cls", b"%d" % (i % 3)))}
    del members["3.cls"]
    members[f"3.{end}"] = label
    tar(tmp_path / "images.tar", members)
    with pytest.raises(ValueError, match=message):
        open_data(str(tmp_path / "images.tar"))


@pytest.mark.parametrize("kind", ["parquet", "hugging face"])
@pytest.mark.parametrize("label", [0.7, 1.0, None, "cat", [0, 1], True, -1, 10**6, 2**40])
def test_labels_of_a_table_that_are_none(kind: str, label: object, tmp_path: Path) -> None:
    """The row is named, the third where its neighbours can be numbers."""
    numbers = label is None or type(label) is int
    labels = [0, 1, label, *[1] * 9] if numbers else [label] * 12
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(12)], "label": labels}
    if kind == "parquet":
        pq.write_table(pa.table(rows), tmp_path / "set")
        (tmp_path / "set").rename(tmp_path / "set.parquet")
        source, name = str(tmp_path / "set.parquet"), f"parquet: {2 * numbers:09}"
    else:
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
        source, name = str(tmp_path / "set"), f"set, split 'train': {2 * numbers:09}"
    with pytest.raises(ValueError) as raised:
        open_data(source)
    assert f"{name} is {label!r}; accepted: whole numbers from 0 to 999999" in str(raised.value)


def test_labels_with_zeros_in_front(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {**{f"{i}.png": png(i) for i in range(10)}, **{f"{i}.cls": b"%09d" % i for i in range(10)}})
    assert open_data(str(tmp_path / "a.tar"), whole=True).test.labels.tolist() == list(range(10))


@pytest.mark.parametrize("how", ["empty", "cut in an image", "cut in a header", "garbage", "garbage inside", "gzip"])
def test_tars_that_are_broken(how: str, tmp_path: Path) -> None:
    """Each is named; none loses the images behind where it is broken."""
    tar(tmp_path / "a.tar", {f"{i}{end}": data for i in range(12) for end, data in ((".png", png(i)), (".cls", b"1"))})
    whole, noise = (tmp_path / "a.tar").read_bytes(), random.Random(0).randbytes(2000)
    changed = {
        "empty": b"",
        "cut in an image": whole[: 2048 + 512 + 9],
        "cut in a header": whole[: 2048 + 100],
        "garbage": noise,
        "garbage inside": whole[:2048] + noise + whole[4048:],
        "gzip": gzip.compress(whole),
    }[how]
    (tmp_path / "a.tar").write_bytes(changed)
    with pytest.raises(ValueError, match=r"a\.tar is no tar, or a broken or compressed one: "):
        open_images(tmp_path / "a.tar")


def test_parquet(tmp_path: Path) -> None:
    """Columns may be called as Hugging Face's are."""
    table = {"image": [{"bytes": png(i), "path": None} for i in range(10)], "label": [i % 2 for i in range(10)]}
    for names in (("image", "label"), ("img", "fine_label"), ("image", "labels")):
        renamed = dict(zip(names, table.values(), strict=True)) | {"other": [b""] * 10}
        pq.write_table(pa.table(renamed), tmp_path / "images.parquet")
        data = open_data(str(tmp_path / "images.parquet"))
        assert (len(data.train), len(data.test), data.classes) == (9, 1, 2)
        assert [i % 2 for i in first_pixels(data.train)] == data.train.labels.tolist()
    pq.write_table(pa.table({"image": table["image"]}), tmp_path / "images.parquet")
    with pytest.raises(ValueError, match="no column label or labels or fine_label; its columns are image"):
        open_data(str(tmp_path / "images.parquet"))
    (tmp_path / "images.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"images\.parquet is no parquet file, or a broken one"):
        open_data(str(tmp_path / "images.parquet"))


def test_parquet_is_read_from_disk(tmp_path: Path) -> None:
    """By threads in any order, whatever the row groups; a file that is written anew is read anew."""
    path, chance = tmp_path / "images[1].parquet", random.Random(0)
    for size in (3, 20):
        values = [chance.randbytes(200_000) for _ in range(20)]
        rows = [{"bytes": value, "path": f"{i}.png"} for i, value in enumerate(values)]
        pq.write_table(pa.table({"image": rows}), path, row_group_size=size)
        before = pa.total_allocated_bytes()
        found = open_images(path)
        assert pa.total_allocated_bytes() - before < 400_000
        order = chance.choices(range(20), k=100)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(found.read, order)) == [values[i] for i in order]
        assert list(found.keys) == [f"{i}.png" for i in range(20)]


STRUCT, OWN = pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"bytes": png(1), "path": None}


@pytest.mark.parametrize(
    ("column", "kind"),
    [([None, OWN], STRUCT), ([{"bytes": None, "path": None}, OWN], STRUCT), ([None, png(1)], pa.binary())],
)
def test_rows_without_an_image(column: list[Any], kind: Any, tmp_path: Path) -> None:
    """Of a .parquet and of a Hugging Face set."""
    table = pa.table({"image": pa.array(column * 6, kind), "label": [0, 1] * 6})
    pq.write_table(table, tmp_path / "images.parquet")
    data = open_data(str(tmp_path / "images.parquet"), whole=True)
    with pytest.raises(ValueError, match=r"parquet: 000000002 can't be read: row 2 holds no image"):
        data.test.image(2)
    datasets.Dataset(table).save_to_disk(tmp_path / "set")
    data = open_data(str(tmp_path / "set"), whole=True)
    with pytest.raises(ValueError, match=r"set, split 'train': 000000002 can't be read: row 2 holds no image"):
        data.test.image(2)
    assert data.test.image(1).getpixel((0, 0)) == (1, 0, 100)


def test_hugging_face(tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})

    def table(*values: int) -> Any:
        rows = {"img": [{"bytes": png(v), "path": None} for v in values], "label": [v % 2 for v in values]}
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict({"train": table(1, 2, 3), "test": table(4, 5)}).save_to_disk(tmp_path / "both")
    data = open_data(str(tmp_path / "both"))
    assert (first_pixels(data.train), data.train.labels.tolist()) == ([1, 2, 3], [1, 0, 1])
    assert (first_pixels(data.test), data.test.labels.tolist(), data.classes) == ([4, 5], [0, 1], 3)
    table(*range(20)).save_to_disk(tmp_path / "one")
    assert len(open_data(str(tmp_path / "one")).test) == 2
    datasets.DatasetDict({"train": table(1).remove_columns("label")}).save_to_disk(tmp_path / "no labels")
    with pytest.raises(ValueError, match="no column label or labels or fine_label; its columns are img"):
        open_data(str(tmp_path / "no labels"))


def test_hugging_face_reads_the_images_alone(tmp_path: Path) -> None:
    """Not the other columns of their rows, nor as what a format would make of them."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "mask": datasets.Image()}
    )
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in range(12)],
        "label": [0, 1] * 6,
        "mask": [{"bytes": b"no image", "path": None}] * 12,
    }
    datasets.Dataset.from_dict(rows, features=features).with_format("torch").save_to_disk(tmp_path / "set")
    assert first_pixels(open_data(str(tmp_path / "set"), whole=True).test) == list(range(12))


def test_broken_hugging_face_sets(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"image": [1] * 12, "label": [0, 1] * 6})
    table.save_to_disk(tmp_path / "numbers")
    table.select([]).save_to_disk(tmp_path / "empty")
    table.save_to_disk(tmp_path / "broken")
    (tmp_path / "broken" / "dataset_info.json").write_text("{")
    for name, message in (
        ("numbers", "numbers, split 'train' has no column image or img of images, and its binary ones are"),
        ("empty", "empty is no folder of save_to_disk, or a broken or empty one"),
        ("broken", "broken is no folder of save_to_disk, or a broken or empty one: JSONDecodeError"),
    ):
        with pytest.raises(ValueError, match=message):
            open_data(str(tmp_path / name))
    with pytest.raises(ValueError, match="'hf:' names no data set; accepted: hf:NAME"):
        open_data("hf:")


def test_torchvision(tmp_path: Path) -> None:
    """CIFAR-10 in its own format; sets that are not there say where they were looked for."""
    import hashlib
    import pickle

    import torchvision.datasets as theirs

    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = np.full((2, 3072), len(name), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 9]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))

    def sums(names: list[list[str]]) -> list[list[str]]:
        return [[name, hashlib.md5((base / name).read_bytes()).hexdigest()] for name, _ in names]

    class Made(theirs.CIFAR10):
        train_list = sums(theirs.CIFAR10.train_list)
        test_list = sums(theirs.CIFAR10.test_list)
        meta = theirs.CIFAR10.meta | {"md5": sums([["batches.meta", ""]])[0][1]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "CIFAR10", Made)
        data = open_data(f"cifar10:{tmp_path}")
    assert (len(data.train), len(data.test), data.classes) == (10, 2, 10)
    assert data.train.labels.tolist() == [3, 9] * 5
    assert first_pixels(data.test) == [10, 10]
    for name in ("mnist", "cifar100", "flowers102", "pets", "imagenet", "svhn"):
        with pytest.raises(FileNotFoundError, match=f"{name}: .* does not find its files in {tmp_path}"):
            open_data(f"{name}:{tmp_path}")


def test_sets_of_torchvision_in_their_own_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files as the sets have them, but few; their checksums are all that is left out."""
    import torchvision.datasets as theirs
    from scipy.io import savemat

    def write(path: str, level: int) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / path)

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, labels in (("train", [7, 2, 9]), ("t10k", [4, 9])):
        pixels = np.repeat(np.array(labels, dtype=np.uint8), 28 * 28)
        header = np.array([2051, len(labels), 28, 28, 2049, len(labels)], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header[:16] + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header[16:] + bytes(labels))
    mnist = open_data(f"mnist:{tmp_path}")
    assert (mnist.train.labels.tolist(), mnist.test.labels.tolist(), mnist.classes) == ([7, 2, 9], [4, 9], 10)
    assert first_pixels(mnist.train) == [7, 2, 9]

    for part, labels in (("train", [10, 3]), ("test", [2, 1])):  # 10 is the digit 0
        x = np.broadcast_to(np.array(labels, dtype=np.uint8), (32, 32, 3, len(labels)))
        savemat(tmp_path / f"{part}_32x32.mat", {"X": x, "y": np.array(labels)[:, None]})
    monkeypatch.setattr(theirs.SVHN, "_check_integrity", lambda self: True)
    svhn = open_data(f"svhn:{tmp_path}")
    assert (svhn.train.labels.tolist(), svhn.test.labels.tolist()) == ([0, 3], [2, 1])
    assert first_pixels(svhn.train) == [10, 3]

    for number in range(1, 6):
        write(f"flowers-102/jpg/image_{number:05}.jpg", 40 * number)
    savemat(tmp_path / "flowers-102" / "setid.mat", {"trnid": [[1, 2]], "valid": [[4, 5]], "tstid": [[3, 1]]})
    savemat(tmp_path / "flowers-102" / "imagelabels.mat", {"labels": [[1, 2, 3, 2, 3]]})
    monkeypatch.setattr(theirs.Flowers102, "_check_integrity", lambda self: True)
    flowers = open_data(f"flowers102:{tmp_path}")
    assert (flowers.train.labels.tolist(), flowers.test.labels.tolist(), flowers.classes) == ([0, 1, 1, 2], [2, 0], 3)
    assert first_pixels(flowers.train) == [40, 80, 160, 200]

    (tmp_path / "oxford-iiit-pet" / "annotations").mkdir(parents=True)
    for part, names in (("trainval", ["Abyssinian_1", "beagle_7"]), ("test", ["beagle_8", "Abyssinian_2"])):
        for name in names:
            write(f"oxford-iiit-pet/images/{name}.jpg", int(name[-1]))
        lines = "".join(f"{name} {1 + (name[0] == 'b')} 1 1\n" for name in names)
        (tmp_path / "oxford-iiit-pet" / "annotations" / f"{part}.txt").write_text(lines)
    pets = open_data(f"pets:{tmp_path}")
    assert (pets.train.labels.tolist(), pets.test.labels.tolist(), pets.classes) == ([0, 1], [1, 0], 2)
    assert first_pixels(pets.test) == [8, 2]

    names = {f"n{i:08}": (f"thing {i}",) for i in range(2)}
    torch.save((names, list(names)), tmp_path / "meta.bin")
    for i, name in enumerate(names):
        write(f"val/{name}/ILSVRC2012_val_{i + 1:08}.JPEG", i)
    imagenet = open_data(f"imagenet:{tmp_path}", whole=True)
    assert (len(imagenet.train), imagenet.test.labels.tolist(), imagenet.classes) == (0, [0, 1], 2)
    assert imagenet.test.name(1).endswith("ILSVRC2012_val_00000002.JPEG")
    with pytest.raises(FileNotFoundError, match="imagenet"):
        open_data(f"imagenet:{tmp_path}")
    for name in names:
        write(f"train/{name}/{name}_1.JPEG", 9)
    assert first_pixels(open_data(f"imagenet:{tmp_path}").train) == [9, 9]


def test_whole(folder: Path, tmp_path: Path) -> None:
    """All is for testing, and a set for training isn't looked for."""
    data = open_data(str(folder / "train"), whole=True)
    assert (len(data.train), len(data.test)) == (0, len(open_data(str(folder)).train))
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=7)})
    table = datasets.Dataset.from_dict({"image": [Image.new("L", (4, 4))] * 2, "label": [5, 1]}, features=features)
    datasets.DatasetDict({"validation": table}).save_to_disk(tmp_path / "validation")
    data = open_data(str(tmp_path / "validation"), whole=True)
    assert (len(data.train), data.test.labels.tolist(), data.classes) == (0, [5, 1], 7)
    with pytest.raises(ValueError, match="no split 'train'; its splits are validation"):
        open_data(str(tmp_path / "validation"))


def test_images_without_labels(folder: Path, tmp_path: Path) -> None:
    """They need none where none are asked for: in a folder, beside those of a .tar, in a table."""
    shades = [Image.new("L", (4, 4), i) for i in range(20)]
    (tmp_path / "flat").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, image in enumerate(shades):
            image.save(path := tmp_path / "flat" / f"{i:02}.png")
            tar.add(path, f"{i:02}.png")
    files = [path.read_bytes() for path in sorted((tmp_path / "flat").iterdir())]
    pq.write_table(pa.table({"image": files}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"image": shades}).save_to_disk(tmp_path / "saved")
    for source in (tmp_path / name for name in ("flat", "a.tar", "a.parquet", "saved")):
        with pytest.raises(ValueError, match="label|in no folder of a class"):
            open_data(str(source))
        data = open_data(str(source), labels=False)
        assert (len(data.train), len(data.test), data.classes) == (18, 2, 0)
        assert sorted(first_pixels(data.train) + first_pixels(data.test)) == list(range(20))
    bare, labelled = open_data(str(folder), labels=False), open_data(str(folder))
    assert (len(bare.train), len(bare.test)) == (len(labelled.train), len(labelled.test))
    with pytest.raises(FileNotFoundError, match="no data"):
        open_data(str(tmp_path / "nowhere"), labels=False)


def test_examples() -> None:
    """So many training images, of the seed's choice; the test set stays."""
    data = open_data("digits")
    some, other = data.limit(144, 0), data.limit(144, 1)
    assert len(some.train) == len(other.train) == 144
    assert some.train.labels.tolist() == data.limit(144, 0).train.labels.tolist() != other.train.labels.tolist()
    assert len({some.train.name(i) for i in range(144)}) == 144 and some.test is data.test
    with pytest.raises(ValueError, match="examples=1438 of 1437 training images"):
        data.limit(1438, 0)


def test_tasks_of_vtab(tmp_path: Path) -> None:
    """Files as the sets have them; where there is no split for testing a tenth is held out."""

    def write(path: str, level: int) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / path)

    for label, name in enumerate(("crops", "river")):
        for i in range(10):
            write(f"eurosat/2750/{name}/{i}.png", 100 + label)
            write(f"caltech101/101_ObjectCategories/{name}/image_{i + 1:04}.jpg", 100 + label)
            write(f"SUN397/{name[0]}/{name}/sun_{i}.jpg", 100 + label)
    (tmp_path / "SUN397" / "ClassName.txt").write_text("/c/crops\n/r/river\n")
    write("caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg", 0)
    (tmp_path / "caltech101" / "Annotations").mkdir()
    for part, names in (("train", "ab"), ("val", "ba"), ("test", "ab")):
        for name in names:
            write(f"dtd/dtd/images/{name}/{part}.png", ord(name))
        labels = tmp_path / "dtd" / "dtd" / "labels" / f"{part}1.txt"
        labels.parent.mkdir(exist_ok=True)
        labels.write_text("".join(f"{name}/{part}.png\n" for name in names))
    for part, counts in (("train", (3, 5)), ("val", (5,))):
        scenes = [{"image_filename": f"{i}.png", "objects": [0] * count} for i, count in enumerate(counts)]
        for scene in scenes:
            write(f"clevr/CLEVR_v1.0/images/{part}/{scene['image_filename']}", 10)
        (tmp_path / "clevr/CLEVR_v1.0/scenes").mkdir(exist_ok=True)
        (tmp_path / f"clevr/CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json").write_text(json.dumps({"scenes": scenes}))
    for name in ("eurosat", "caltech101", "sun397"):
        data = open_data(f"{name}:{tmp_path}")
        assert (len(data.train), len(data.test), data.classes) == (18, 2, 2)
        for i in range(18):
            assert np.asarray(data.train.image(i)).flat[0] == 100 + int(data.train.labels[i])
    clevr = open_data(f"clevr:{tmp_path}")
    assert (clevr.train.labels.tolist(), clevr.test.labels.tolist(), clevr.classes) == ([3, 5], [5], 6)
    dtd = open_data(f"dtd:{tmp_path}")
    assert (dtd.train.labels.tolist(), dtd.test.labels.tolist(), dtd.classes) == ([0, 1, 1, 0], [0, 1], 2)
    assert first_pixels(dtd.train) == [97, 98, 98, 97]


def test_vtab_1k(tmp_path: Path) -> None:
    """Any of its tasks as a folder with lists; classes may be in the test set alone."""
    for part, labels in (("train800val200", (3, 1, 0)), ("test", (2, 4))):
        (tmp_path / "images" / part).mkdir(parents=True)
        for i in range(len(labels)):
            Image.new("RGB", (4, 4), (10 * len(labels) + i,) * 3).save(tmp_path / "images" / part / f"{i:06}.png")
        lines = [f"images/{part}/{i:06}.png {label}\n" for i, label in enumerate(labels)]
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    data = open_data(str(tmp_path))
    assert (data.train.labels.tolist(), data.test.labels.tolist(), data.classes) == ([3, 1, 0], [2, 4], 5)
    assert (first_pixels(data.train), first_pixels(data.test)) == ([30, 31, 32], [20, 21])
    assert (len(open_data(str(tmp_path), whole=True).train), len(open_data(str(tmp_path), labels=False).train)) == (
        0,
        3,
    )
    (tmp_path / "images" / "test" / "000001.png").unlink()
    with pytest.raises(ValueError, match=r"000001\.png can't be read"):
        data.test.image(1)
    for text, message in (
        ("a.png\n", "line 1 is 'a.png'; accepted: a path and a label"),
        ("a.png x\n", "label of .*a.png is 'x'"),
        ("", "test.txt has no images"),
    ):
        (tmp_path / "test.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_data(str(tmp_path))


def test_patch_camelyon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In files of h5py, one for labels."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ImportError, match="pcam: h5py is not found"):
            open_data(f"pcam:{tmp_path}")
    import h5py

    (tmp_path / "pcam").mkdir()
    for part, labels in (("train", [0, 1, 1]), ("test", [1, 0])):
        values = {"x": np.broadcast_to(np.array(labels, np.uint8)[:, None, None, None], (len(labels), 96, 96, 3))}
        values["y"] = np.array(labels, np.uint8)[:, None, None, None]
        for name, value in values.items():
            with h5py.File(tmp_path / "pcam" / f"camelyonpatch_level_2_split_{part}_{name}.h5", "w") as file:
                file[name] = value
    data = open_data(f"pcam:{tmp_path}")
    assert (data.train.labels.tolist(), data.test.labels.tolist(), data.classes) == ([0, 1, 1], [1, 0], 2)
    assert first_pixels(data.train) == [0, 1, 1]


def test_sets_are_checked() -> None:
    def split(*labels: int) -> Split:
        return Split(lambda i: torch.zeros(1, 8, 8), torch.tensor(labels, dtype=torch.int64), lambda i: f"number {i}")

    with pytest.raises(ValueError, match="the test set has no images"):
        Data(split(0, 1), split(), 2)
    with pytest.raises(ValueError, match="classes=1: there is nothing to learn; accepted: 2 or more"):
        Data(split(0, 0), split(0), 1)
    with pytest.raises(ValueError, match="label of number 1 is 2; accepted: 0 to 1"):
        Data(split(0, 1), split(1, 2), 2)


# -- what the model sees --------------------------------------------------------------------------------------------


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
    """What a recipe makes of one image, so many times: (count, C, size, size), 0 to 1."""
    recipe = Recipe(steps=20_000, **{"crop": "none", "flip": False} | changes)
    split = Split(lambda i: image, torch.zeros(1, dtype=torch.int64), str)
    examples = Examples(split, training_transform(recipe), 0)
    return torch.stack([examples[place, 0]["image"] for place in range(count)]) / 2 + 0.5


def coordinates(size: int) -> torch.Tensor:
    """An image whose pixels say where they are: (3, size, size), 0 to 1 from left to right and from top to bottom."""
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
    wanted = [float(evaluation_transform(16, cut)(image).mean()) for cut in (middle, not middle)]
    assert test["loss"] == pytest.approx(wanted[0], abs=1e-5) != pytest.approx(wanted[1], abs=1e-2)


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


def test_a_batch_may_be_larger_than_the_set() -> None:
    assert Counter(number for _, number in flat(Order(3, 9, 9, 0, 1, seed=0))) == {0: 3, 1: 3, 2: 3}

"""Data sets from files and tables: every source, images of every mode, and what can be wrong with them."""

from __future__ import annotations

import gzip
import io
import json
import logging
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_cases import check, first_pixels, png, refuses, saved, table, write
from PIL import Image
from sklearn.datasets import load_digits

from fastvit.data.datasets import Data, Split, open_data
from fastvit.data.images import decode, open_images
from fastvit.training.augment import Examples, evaluation_transform, loader


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")


# -- pixels ---------------------------------------------------------------------------------------------------------


def test_modes() -> None:
    """8 and 16 bits, grey, alpha, palette and CMYK: the colour that was meant."""
    grey16 = Image.fromarray(np.full((4, 4), 0xC8FF, dtype=np.uint16))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 10, 30])
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
        (saved(Image.new("1", (4, 4), 1)), (255, 255, 255)),
    ]
    for data, colour in cases:
        assert (decode(data).mode, decode(data).getcolors()) == ("RGB", [(16, colour)])
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
    both = [split.image(i).flatten().tolist() for split in (data.train, data.test) for i in range(len(split))]
    assert sorted(both) == sorted((load_digits().data / 16).tolist())
    assert (min(map(min, both)), max(map(max, both))) == (0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes in train, of 3 and 2 images, and both in val."""
    names = ("train/cat/1", "train/cat/2", "train/cat/3", "train/dog/4", "train/dog/5", "val/dog/6", "val/cat/7")
    write({tmp_path / f"{name}.png": int(name[-1]) for name in names})
    return tmp_path


def test_folders(folder: Path) -> None:
    data = open_data(str(folder))
    check(data, [0, 0, 0, 1, 1], [0, 1], 2)
    assert (first_pixels(data.train), first_pixels(data.test), data.channels) == ([1, 2, 3, 4, 5], [7, 6], 3)


def test_folder_mistakes(folder: Path, tmp_path: Path) -> None:
    write({folder / "val" / "bird" / "8.png": 8})
    refuses(folder, r"classes that .*train has not: bird")
    (folder / "val" / "bird" / "8.png").rename(folder / "val" / "8.png")
    refuses(folder, r"8\.png is in no folder of a class")
    (folder / "val").rename(folder / "elsewhere")
    refuses(folder, "none with folders of classes for testing; accepted: test, val")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "has no images")
    with pytest.raises(FileNotFoundError, match=r"no data 'nothing'.*digits, mnist"):
        open_data("nothing")


def test_one_class(folder: Path, tmp_path: Path) -> None:
    """A folder too high up, of which training would make a perfect classifier."""
    (folder / "train").rename(tmp_path / "high")
    (folder / "val").rename(tmp_path / "high" / "val")
    (tmp_path / "high" / "cat").rename(tmp_path / "high" / "val" / "bird")
    (tmp_path / "high" / "dog").rename(tmp_path / "high" / "val" / "cow")
    refuses(tmp_path / "high", r"high has images in one folder alone, 'val'; accepted: a folder for each")
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
    classes = ["cat/1.png", "cat/2.png", "cat/3.png", "dog/4.png", "dog/5.png"]
    assert [key for key in found.keys if "again" not in key] == classes
    assert max(key.count("again") for key in found.keys) == 1
    tar(tmp_path / "hidden.tar", dict.fromkeys(("./a/1.png", "./a/._1.png", ".b/1.png", "2.png"), png(1)))
    assert open_images(tmp_path / "hidden.tar").keys == ["./a/1.png", "2.png"]


def test_test_splits_without_labels(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Are left out for the next: images in no folder of a class, or labels that are -1, as ImageNet's on the hub."""
    caplog.set_level(logging.INFO, "fastvit")
    write({folder / "test" / "8.png": 8})
    assert first_pixels(open_data(str(folder)).test) == [7, 6]
    assert caplog.messages == [f"{folder}: test has no labels and is left out"]
    splits = {
        "train": datasets.Dataset.from_dict(table(20)),
        "test": datasets.Dataset.from_dict(table(2, first=30) | {"label": [-1, -1]}),
        "validation": datasets.Dataset.from_dict(table(2, first=40)),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "three")
    for whole in (False, True):
        assert first_pixels(open_data(str(tmp_path / "three"), whole).test) == [40, 41]
    del splits["validation"]
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    caplog.clear()
    assert len(open_data(str(tmp_path / "two")).test) == 2
    assert "two: test has no labels and is left out" in caplog.text and "2 of 20 images are held out" in caplog.text
    refuses(tmp_path / "two", r"two, split 'test': 000000000 is -1; accepted: whole numbers from 0", whole=True)


def test_classes_that_are_held_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write({tmp_path / f"class {i:02}" / "1.png": i for i in range(20)})
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
    """Labels in .cls (zeros in front too) or .json, names with dots, shards; a tenth is held out, always the same."""
    members: dict[str, bytes] = {}
    for i in range(10):
        members[f"a/{i}.left.png"] = png(i)
        name, label = (f"a/{i}.cls", f"{i % 3}") if i % 2 else (f"a/{i}.json", json.dumps({"label": i % 3}))
        members[name] = label.encode()
    tar(tmp_path / "train-0.tar", members)
    members = {f"{i}{end}": data for i in range(10, 20) for end, data in ((".png", png(i)), (".cls", b"00002\n"))}
    tar(tmp_path / "train-1.tar", members)
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
    refuses(tmp_path / "images.tar", message)


@pytest.mark.parametrize("kind", ["parquet", "hugging face"])
@pytest.mark.parametrize("label", [0.7, 1.0, None, "cat", [0, 1], True, -1, 10**6, 2**40])
def test_labels_of_a_table_that_are_none(kind: str, label: object, tmp_path: Path) -> None:
    """The row is named, the third where its neighbours can be numbers."""
    numbers = label is None or type(label) is int
    labels = [0, 1, label, *[1] * 9] if numbers else [label] * 12
    rows = table(12) | {"label": labels}
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
    path = tmp_path / "images.parquet"
    for image, label in (("image", "label"), ("img", "fine_label"), ("image", "labels")):
        pq.write_table(pa.table(table(10, label, image) | {"other": [b""] * 10}), path)
        data = open_data(str(path))
        assert (len(data.train), len(data.test), data.classes) == (9, 1, 2)
        assert [i % 2 for i in first_pixels(data.train)] == data.train.labels.tolist()
    pq.write_table(pa.table({"image": table(10)["image"]}), path)
    refuses(path, "no column label or labels or fine_label; its columns are image")
    path.write_bytes(b"PAR1 and no more")
    refuses(path, r"images\.parquet is no parquet file, or a broken one")


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
    rows = pa.table({"image": pa.array(column * 6, kind), "label": [0, 1] * 6})
    pq.write_table(rows, tmp_path / "a.parquet")
    datasets.Dataset(rows).save_to_disk(tmp_path / "set")
    for name, prefix in (("a.parquet", r"a\.parquet: "), ("set", "set, split 'train': ")):
        data = open_data(str(tmp_path / name), whole=True)
        with pytest.raises(ValueError, match=f"{prefix}000000002 can't be read: row 2 holds no image"):
            data.test.image(2)
        assert data.test.image(1).getpixel((0, 0)) == (1, 0, 100)


def test_hugging_face(tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})

    def rows(first: int, count: int) -> Any:
        return datasets.Dataset.from_dict(table(count, image="img", first=first), features=features)

    datasets.DatasetDict({"train": rows(1, 3), "test": rows(4, 2)}).save_to_disk(tmp_path / "both")
    data = open_data(str(tmp_path / "both"))
    check(data, [0, 1, 0], [0, 1], 3)
    assert (first_pixels(data.train), first_pixels(data.test)) == ([1, 2, 3], [4, 5])
    rows(0, 20).save_to_disk(tmp_path / "one")
    assert len(open_data(str(tmp_path / "one")).test) == 2
    datasets.DatasetDict({"train": rows(1, 1).remove_columns("label")}).save_to_disk(tmp_path / "no labels")
    refuses(tmp_path / "no labels", "no column label or labels or fine_label; its columns are img")


def test_hugging_face_reads_the_images_alone(tmp_path: Path) -> None:
    """Not the other columns of their rows, nor as what a format would make of them."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "mask": datasets.Image()}
    )
    rows = table(12) | {"mask": [{"bytes": b"no image", "path": None}] * 12}
    datasets.Dataset.from_dict(rows, features=features).with_format("torch").save_to_disk(tmp_path / "set")
    assert first_pixels(open_data(str(tmp_path / "set"), whole=True).test) == list(range(12))


def test_broken_hugging_face_sets(tmp_path: Path) -> None:
    numbers = datasets.Dataset.from_dict({"image": [1] * 12, "label": [0, 1] * 6})
    numbers.save_to_disk(tmp_path / "numbers")
    numbers.select([]).save_to_disk(tmp_path / "empty")
    numbers.save_to_disk(tmp_path / "broken")
    (tmp_path / "broken" / "dataset_info.json").write_text("{")
    broken = "is no folder of save_to_disk, or a broken or empty one"
    refuses(
        tmp_path / "numbers", "numbers, split 'train' has no column image or img of images, and its binary ones are"
    )
    refuses(tmp_path / "empty", f"empty {broken}")
    refuses(tmp_path / "broken", f"broken {broken}: JSONDecodeError")
    refuses("hf:", "'hf:' names no data set; accepted: hf:NAME")


def test_whole(folder: Path, tmp_path: Path) -> None:
    """All is for testing, and a set for training isn't looked for."""
    data = open_data(str(folder / "train"), whole=True)
    assert (len(data.train), len(data.test)) == (0, len(open_data(str(folder)).train))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=7)})
    rows = datasets.Dataset.from_dict(table(2) | {"label": [5, 1]}, features=features)
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "validation")
    data = open_data(str(tmp_path / "validation"), whole=True)
    check(data, [], [5, 1], 7)
    refuses(tmp_path / "validation", "no split 'train'; its splits are validation")


def test_images_without_labels(folder: Path, tmp_path: Path) -> None:
    """They need none where labels=False: in a folder, beside those of a .tar, in a table."""
    shades = [Image.new("L", (4, 4), i) for i in range(20)]
    files = {f"{i:02}.png": saved(image) for i, image in enumerate(shades)}
    (tmp_path / "flat").mkdir()
    for name, data in files.items():
        (tmp_path / "flat" / name).write_bytes(data)
    tar(tmp_path / "a.tar", files)
    pq.write_table(pa.table({"image": [*files.values()]}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"image": shades}).save_to_disk(tmp_path / "saved")
    for source in (tmp_path / name for name in ("flat", "a.tar", "a.parquet", "saved")):
        refuses(source, "label|in no folder of a class")
        found = open_data(str(source), labels=False)
        assert (len(found.train), len(found.test), found.classes) == (18, 2, 0)
        assert sorted(first_pixels(found.train) + first_pixels(found.test)) == list(range(20))
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


def test_sets_are_checked() -> None:
    def split(*labels: int) -> Split:
        return Split(lambda i: torch.zeros(1, 8, 8), torch.tensor(labels, dtype=torch.int64), lambda i: f"number {i}")

    with pytest.raises(ValueError, match="the test set has no images"):
        Data(split(0, 1), split(), 2)
    with pytest.raises(ValueError, match="classes=1: there is nothing to learn; accepted: 2 or more"):
        Data(split(0, 0), split(0), 1)
    with pytest.raises(ValueError, match="label of number 1 is 2; accepted: 0 to 1"):
        Data(split(0, 1), split(1, 2), 2)

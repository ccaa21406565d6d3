"""Data sets of torchvision and of VTAB, in files as their authors publish them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import check, first_pixels, refuses, write

from fastvit.data.datasets import open_data


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

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, labels in (("train", [7, 2, 9]), ("t10k", [4, 9])):
        pixels = np.repeat(np.array(labels, dtype=np.uint8), 28 * 28)
        header = np.array([2051, len(labels), 28, 28, 2049, len(labels)], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header[:16] + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header[16:] + bytes(labels))
    mnist = open_data(f"mnist:{tmp_path}")
    check(mnist, [7, 2, 9], [4, 9], 10)
    assert first_pixels(mnist.train) == [7, 2, 9]

    for part, labels in (("train", [10, 3]), ("test", [2, 1])):  # 10 is the digit 0
        x = np.broadcast_to(np.array(labels, dtype=np.uint8), (32, 32, 3, len(labels)))
        savemat(tmp_path / f"{part}_32x32.mat", {"X": x, "y": np.array(labels)[:, None]})
    monkeypatch.setattr(theirs.SVHN, "_check_integrity", lambda self: True)
    svhn = open_data(f"svhn:{tmp_path}")
    check(svhn, [0, 3], [2, 1], 4)
    assert first_pixels(svhn.train) == [10, 3]

    write({tmp_path / f"flowers-102/jpg/image_{number:05}.jpg": 40 * number for number in range(1, 6)})
    savemat(tmp_path / "flowers-102" / "setid.mat", {"trnid": [[1, 2]], "valid": [[4, 5]], "tstid": [[3, 1]]})
    savemat(tmp_path / "flowers-102" / "imagelabels.mat", {"labels": [[1, 2, 3, 2, 3]]})
    monkeypatch.setattr(theirs.Flowers102, "_check_integrity", lambda self: True)
    flowers = open_data(f"flowers102:{tmp_path}")
    check(flowers, [0, 1, 1, 2], [2, 0], 3)
    assert first_pixels(flowers.train) == [40, 80, 160, 200]

    (tmp_path / "oxford-iiit-pet" / "annotations").mkdir(parents=True)
    for part, names in (("trainval", ["Abyssinian_1", "beagle_7"]), ("test", ["beagle_8", "Abyssinian_2"])):
        for name in names:
            write({tmp_path / f"oxford-iiit-pet/images/{name}.jpg": int(name[-1])})
        lines = "".join(f"{name} {1 + (name[0] == 'b')} 1 1\n" for name in names)
        (tmp_path / "oxford-iiit-pet" / "annotations" / f"{part}.txt").write_text(lines)
    pets = open_data(f"pets:{tmp_path}")
    check(pets, [0, 1], [1, 0], 2)
    assert first_pixels(pets.test) == [8, 2]

    names = {f"n{i:08}": (f"thing {i}",) for i in range(2)}
    torch.save((names, list(names)), tmp_path / "meta.bin")
    for i, name in enumerate(names):
        write({tmp_path / f"val/{name}/ILSVRC2012_val_{i + 1:08}.JPEG": i})
    imagenet = open_data(f"imagenet:{tmp_path}", whole=True)
    assert (len(imagenet.train), imagenet.test.labels.tolist(), imagenet.classes) == (0, [0, 1], 2)
    assert imagenet.test.name(1).endswith("ILSVRC2012_val_00000002.JPEG")
    with pytest.raises(FileNotFoundError, match="imagenet"):
        open_data(f"imagenet:{tmp_path}")
    for name in names:
        write({tmp_path / f"train/{name}/{name}_1.JPEG": 9})
    assert first_pixels(open_data(f"imagenet:{tmp_path}").train) == [9, 9]


def test_tasks_of_vtab(tmp_path: Path) -> None:
    """Files as the sets have them; where there is no split for testing a tenth is held out."""

    for label, name in enumerate(("crops", "river")):
        for i in range(10):
            write({tmp_path / f"eurosat/2750/{name}/{i}.png": 100 + label})
            write({tmp_path / f"caltech101/101_ObjectCategories/{name}/image_{i + 1:04}.jpg": 100 + label})
            write({tmp_path / f"SUN397/{name[0]}/{name}/sun_{i}.jpg": 100 + label})
    (tmp_path / "SUN397" / "ClassName.txt").write_text("/c/crops\n/r/river\n")
    write({tmp_path / "caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg": 0})
    (tmp_path / "caltech101" / "Annotations").mkdir()
    for part, names in (("train", "ab"), ("val", "ba"), ("test", "ab")):
        for name in names:
            write({tmp_path / f"dtd/dtd/images/{name}/{part}.png": ord(name)})
        labels = tmp_path / "dtd" / "dtd" / "labels" / f"{part}1.txt"
        labels.parent.mkdir(exist_ok=True)
        labels.write_text("".join(f"{name}/{part}.png\n" for name in names))
    for part, counts in (("train", (3, 5)), ("val", (5,))):
        scenes = [{"image_filename": f"{i}.png", "objects": [0] * count} for i, count in enumerate(counts)]
        for scene in scenes:
            write({tmp_path / f"clevr/CLEVR_v1.0/images/{part}/{scene['image_filename']}": 10})
        (tmp_path / "clevr/CLEVR_v1.0/scenes").mkdir(exist_ok=True)
        (tmp_path / f"clevr/CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json").write_text(json.dumps({"scenes": scenes}))
    for name in ("eurosat", "caltech101", "sun397"):
        data = open_data(f"{name}:{tmp_path}")
        assert (len(data.train), len(data.test), data.classes) == (18, 2, 2)
        for i in range(18):
            assert np.asarray(data.train.image(i)).flat[0] == 100 + int(data.train.labels[i])
    clevr = open_data(f"clevr:{tmp_path}")
    check(clevr, [3, 5], [5], 6)
    dtd = open_data(f"dtd:{tmp_path}")
    check(dtd, [0, 1, 1, 0], [0, 1], 2)
    assert first_pixels(dtd.train) == [97, 98, 98, 97]


def test_vtab_1k(tmp_path: Path) -> None:
    """Any of its tasks as a folder with lists; classes may be in the test set alone."""
    for part, labels in (("train800val200", (3, 1, 0)), ("test", (2, 4))):
        count = len(labels)
        write({tmp_path / "images" / part / f"{i:06}.png": 10 * count + i for i in range(count)})
        lines = [f"images/{part}/{i:06}.png {label}\n" for i, label in enumerate(labels)]
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    data = open_data(str(tmp_path))
    check(data, [3, 1, 0], [2, 4], 5)
    assert (first_pixels(data.train), first_pixels(data.test)) == ([30, 31, 32], [20, 21])
    assert len(open_data(str(tmp_path), whole=True).train) == 0
    assert len(open_data(str(tmp_path), labels=False).train) == 3
    (tmp_path / "images" / "test" / "000001.png").unlink()
    with pytest.raises(ValueError, match=r"000001\.png can't be read"):
        data.test.image(1)
    for text, message in (
        ("a.png\n", "line 1 is 'a.png'; accepted: a path and a label"),
        ("a.png x\n", "label of .*a.png is 'x'"),
        ("", "test.txt has no images"),
    ):
        (tmp_path / "test.txt").write_text(text)
        refuses(tmp_path, message)


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
    check(data, [0, 1, 1], [1, 0], 2)
    assert first_pixels(data.train) == [0, 1, 1]

"""``fastvit embed``: features of folders, tars and parquet files; resumed, shared by processes, each image once."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastvit
from fastvit.cli import main
from fastvit.data.images import open_images, preprocess
from fastvit.training import embed as module
from fastvit.training.embed import embed


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")


SIZES = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 32, "patch_size": 8, "num_classes": 3}


def encoded(seed: int, kind: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40 + seed, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(fastvit.ViT(**SIZES).state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten images in shards of three, one of them broken, and a file that is none."""
    monkeypatch.setattr(module, "SHARD", 3)
    images = tmp_path / "images"
    (images / "below").mkdir(parents=True)
    for i in range(10):
        name = f"below/{i}.jpg" if i % 2 else f"{i}.png"
        (images / name).write_bytes(encoded(i, "jpeg" if i % 2 else "png"))
    (images / "4.png").write_bytes(encoded(4)[:200])
    (images / "notes.txt").write_text("no image")
    return images


def expected(folder: Path, weights: Path) -> dict[str, np.ndarray]:
    model = fastvit.from_checkpoint(weights, num_classes=0).eval()
    found = {}
    for path in sorted(folder.rglob("*.[pj]*g")):
        if path.name != "4.png":
            pixels = preprocess(path.read_bytes(), (32, 32), (0.5,) * 3, (0.5,) * 3)
            with torch.inference_mode():
                found[str(path.relative_to(folder))] = model(pixels[None])[0].numpy()
    return found


def check(out: Path, features: dict[str, np.ndarray]) -> None:
    keys = (out / "keys.txt").read_text().splitlines()
    assert sorted(keys) == sorted(features)
    np.testing.assert_allclose(np.load(out / "features.npy"), [features[key] for key in keys], atol=2e-5)


def test_a_folder(folder: Path, weights: Path, tmp_path: Path) -> None:
    assert embed(folder, weights, tmp_path / "out", batch=2, parquet=True) == (9, 1)
    check(tmp_path / "out", expected(folder, weights))
    assert (tmp_path / "out" / "unreadable.txt").read_text().startswith("4.png\t")
    table = pq.read_table(tmp_path / "out" / "features.parquet")
    assert table["key"].to_pylist() == (tmp_path / "out" / "keys.txt").read_text().splitlines()
    np.testing.assert_array_equal(
        np.array(table["features"].to_pylist(), np.float32), np.load(tmp_path / "out" / "features.npy")
    )


def test_tar_and_parquet(folder: Path, weights: Path, tmp_path: Path) -> None:
    features = expected(folder, weights)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.add(path, str(path.relative_to(folder)))
    embed(tmp_path / "images.tar", weights, tmp_path / "tar")
    check(tmp_path / "tar", features)

    rows = [{"bytes": (folder / key).read_bytes(), "path": key} for key in features]
    pq.write_table(pa.table({"label": list(range(9)), "image": rows}), tmp_path / "images.parquet")
    embed(tmp_path / "images.parquet", weights, tmp_path / "parquet")
    check(tmp_path / "parquet", features)

    pq.write_table(pa.table({"data": [*(row["bytes"] for row in rows), None]}), tmp_path / "plain.parquet")
    assert embed(tmp_path / "plain.parquet", weights, tmp_path / "plain") == (9, 1)
    check(tmp_path / "plain", {f"{i:09}": value for i, value in enumerate(features.values())})
    assert (tmp_path / "plain" / "unreadable.txt").read_text() == "000000009\trow 9 holds no image\n"


def test_pixels_are_normalised_as_the_weights_folder_says(folder: Path, weights: Path, tmp_path: Path) -> None:
    pixels: dict[str, Any] = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.3]}
    (tmp_path / "w").mkdir()
    shutil.copy(weights, tmp_path / "w" / "model.safetensors")
    (tmp_path / "w" / "config.json").write_text(json.dumps({"pretrained_cfg": pixels}))
    embed(folder, tmp_path / "w", tmp_path / "config")
    embed(folder, weights, tmp_path / "arguments", **pixels)
    embed(folder, weights, tmp_path / "half", mean=[0.5])
    config, arguments, half = (np.load(tmp_path / n / "features.npy") for n in ("config", "arguments", "half"))
    assert np.array_equal(config, arguments) and not np.allclose(config, half, atol=1e-3)
    check(tmp_path / "half", expected(folder, weights))
    with pytest.raises(ValueError, match=r"std: .0\.0.; accepted: finite numbers, above 0"):
        embed(folder, weights, tmp_path / "wrong", std=[0.0])
    with pytest.raises(ValueError, match="mean: 2 numbers; accepted: 1, or 3"):
        embed(folder, weights, tmp_path / "wrong", mean=[0.1, 0.2])


def test_what_is_done_is_not_done_again(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends in the third of four shards, and one that goes on."""
    decoded: list[int] = []
    right = module.Job._decode

    def fails(self: Any, i: int) -> Any:
        decoded.append(i)
        if i >= 6:
            raise SystemExit
        return right(self, i)

    out = tmp_path / "out"
    monkeypatch.setattr(module.Job, "_decode", fails)
    with pytest.raises(SystemExit):
        embed(folder, weights, out)
    assert sorted(path.name for path in out.glob("shard*")) == ["shard-000000.npz", "shard-000001.npz"]
    assert not (out / "features.npy").exists()
    decoded.clear()
    monkeypatch.setattr(module.Job, "_decode", lambda self, i: decoded.append(i) or right(self, i))
    assert embed(folder, weights, out) == (9, 1)
    assert sorted(decoded) == [6, 7, 8, 9]
    check(out, expected(folder, weights))
    decoded.clear()
    assert embed(folder, weights, out) == (9, 1) and decoded == []


def test_two_processes_share_the_images(folder: Path, weights: Path, tmp_path: Path) -> None:
    """Each decodes its own, and the first waits for the second, which is late."""
    (tmp_path / "run.py").write_text(
        """
import sys, time
import fastvit.training.embed as e
from fastvit.cli import main

e.SHARD, run, decode = 3, e.Job.run, e.Job._decode
decoded = []

def late(job):
    time.sleep(3 * job.rank)
    run(job)
    with open(job.out / f"decoded-{job.rank}", "w") as file:
        file.write(" ".join(map(str, sorted(decoded))))

e.Job.run = late
e.Job._decode = lambda job, i: decoded.append(i) or decode(job, i)
sys.exit(main(sys.argv[1:]))
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [tmp_path / "run.py", "embed", folder, "--weights", weights, "--out", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("9 images, 1 unreadable") == 1
    check(tmp_path / "out", expected(folder, weights))
    assert [(tmp_path / "out" / f"decoded-{rank}").read_text() for rank in (0, 1)] == ["0 1 2 6 7 8", "3 4 5 9"]
    assert len(list((tmp_path / "out").glob("shard-*.npz"))) == 4 and not list((tmp_path / "out").glob("*.part*"))


def test_wrong_input_is_named(folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"a": [b"1"], "b": [b"2"]}), tmp_path / "two.parquet")
    for source, message in (
        (tmp_path / "empty", "has no images; known are .bmp, .gif"),
        (tmp_path / "nothing", "no folder, .tar or .parquet file"),
        (tmp_path / "two.parquet", r"no column image or img of images, and its binary ones are \['a', 'b'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            open_images(source)
    out = tmp_path / "out"
    embed(folder, weights, out)
    with pytest.raises(ValueError, match="holds features of other weights, size, mean; give another folder"):
        embed(folder, weights, out, size=(40, 32), mean=(0.4, 0.5, 0.6))
    resnet = fastvit.create_model("R50x1", num_classes=2).state_dict()
    with pytest.raises(ValueError, match="the weights are those of a ResNetV2; accepted: a ViT's"):
        embed(folder, resnet, tmp_path / "resnet")
    assert not (tmp_path / "resnet").exists()
    assert main(["embed", str(folder), "--weights", str(tmp_path / "none.pth"), "--out", str(out)]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


def test_all_images_unreadable(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    assert embed(tmp_path / "images", weights, tmp_path / "out") == (0, 1)
    assert np.load(tmp_path / "out" / "features.npy").shape[0] == 0

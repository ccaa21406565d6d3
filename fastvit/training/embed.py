"""``fastvit embed``: the features of many images, on as many processes as torchrun starts, resumable.

Images are numbered in a fixed order and cut into shards of :data:`SHARD`; a process takes every W-th shard and writes
each as one file, whole or not at all. So the shards do not depend on the number of processes, a run that was cut off
goes on with those that are missing, and each image is in one of them exactly once.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fastvit.checkpoints.files import pixel_statistics
from fastvit.checkpoints.load import Source
from fastvit.data.images import Images, open_images, preprocess
from fastvit.models import ViT, from_checkpoint
from fastvit.training.logger import fingerprint, write

log = logging.getLogger("fastvit")

SHARD = 1024


@dataclass
class Job:
    """One process's part of a run.

    Args:
        images: the source.
        model: images (B, 3, H, W) -> features (B, D), on ``device``.
        out: folder of the results.
        size: (height, width) of the model's images.
        mean, std: of the pixels, in 0..1 units.
        batch: images at a time.
        threads: how many read and decode, ahead of the model.
        rank, world: this process, and the number of processes.
    """

    images: Images
    model: Callable[[Tensor], Tensor]
    out: Path
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    batch: int = 64
    threads: int = 4
    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"

    def shard(self, number: int) -> Path:
        """Return the path of a shard, which exists once all of its features are there."""
        return self.out / f"shard-{number:06}.npz"

    def run(self) -> None:
        """Compute those of this process's shards that are missing."""
        count = len(self.images.keys)
        mine = range(self.rank, -(-count // SHARD), self.world)
        missing = [number for number in mine if not self.shard(number).exists()]
        total = sum(min(SHARD, count - number * SHARD) for number in missing)
        with (
            ThreadPoolExecutor(self.threads) as pool,
            tqdm(total=total, unit="image", desc="embed", disable=self.rank != 0) as bar,
        ):
            for number in missing:
                self._shard(number, range(number * SHARD, min((number + 1) * SHARD, count)), pool, bar)

    def _shard(self, number: int, indices: range, pool: ThreadPoolExecutor, bar: Any) -> None:
        features, kept = [], []
        unreadable: dict[int, str] = {}
        with torch.inference_mode():
            for batch in self._batches(indices, pool):
                good = [(i, pixels) for i, pixels in batch if isinstance(pixels, Tensor)]
                unreadable |= {i: str(pixels) for i, pixels in batch if not isinstance(pixels, Tensor)}
                if good:
                    images = torch.stack([pixels for _, pixels in good]).to(self.device, non_blocking=True)
                    features.append(self.model(images).float().cpu().numpy())
                    kept += [i for i, _ in good]
                bar.update(len(batch))
        buffer = io.BytesIO()
        np.savez(
            buffer,
            index=np.array(kept, dtype=np.int64),
            features=np.concatenate(features) if features else np.zeros((0, 0), dtype=np.float32),
            unreadable=np.array(json.dumps(unreadable)),
        )
        write(self.shard(number), buffer.getvalue())

    def _batches(self, indices: range, pool: ThreadPoolExecutor) -> Iterator[list[tuple[int, Tensor | str]]]:
        """Yield batches of (number, pixels or why there are none), decoded while the model runs on earlier ones."""
        cuts = [indices[i : i + self.batch] for i in range(0, len(indices), self.batch)]
        ahead = [[pool.submit(self._decode, i) for i in cut] for cut in cuts[:2]]
        for k in range(len(cuts)):
            if k + 2 < len(cuts):
                ahead.append([pool.submit(self._decode, i) for i in cuts[k + 2]])
            yield [(i, done.result()) for i, done in zip(cuts[k], ahead.pop(0), strict=True)]

    def _decode(self, i: int) -> Tensor | str:
        try:
            return preprocess(self.images.read(i), self.size, self.mean, self.std)
        except (ValueError, OSError) as error:
            return str(error)

    def merge(self) -> tuple[int, int]:
        """Write features.npy from all shards, and return the numbers of images and of unreadable ones."""
        shards = [np.load(self.shard(n)) for n in range(-(-len(self.images.keys) // SHARD))]
        index = np.concatenate([shard["index"] for shard in shards])
        features = np.concatenate([shard["features"] for shard in shards if shard["index"].size] or [np.zeros((0, 0))])
        unreadable = {int(i): why for shard in shards for i, why in json.loads(str(shard["unreadable"])).items()}
        keys = [_line(self.images.keys[i]) for i in index]
        lines = [f"{_line(self.images.keys[i])}\t{_line(why)}" for i, why in sorted(unreadable.items())]
        write(self.out / "unreadable.txt", "".join(f"{line}\n" for line in lines))
        write(self.out / "keys.txt", "".join(f"{key}\n" for key in keys))
        buffer = io.BytesIO()
        np.save(buffer, features.astype(np.float32))
        write(self.out / "features.npy", buffer.getvalue())
        return len(keys), len(unreadable)


def _line(text: str) -> str:
    return text.replace("\n", "\\n")


def to_parquet(out: Path) -> Path:
    """Write features.parquet from features.npy and keys.txt: columns "key" and "features" (D float32 a row)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = np.load(out / "features.npy")
    keys = (out / "keys.txt").read_text().splitlines()
    column = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), max(features.shape[1], 1))
    part = out / "features.parquet.part"
    pq.write_table(pa.table({"key": pa.array(keys), "features": column}), part)
    os.replace(part, out / "features.parquet")
    return out / "features.parquet"


def embed(
    source: str | Path,
    weights: Source,
    out: str | Path,
    *,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch: int = 64,
    threads: int = 4,
    dtype: torch.dtype = torch.float32,
    parquet: bool = False,
) -> tuple[int, int]:
    """Write the features of all images of ``source`` to ``out``; under torchrun, on as many processes as there are.

    Results: ``features.npy`` (N, D) float32, ``keys.txt`` with as many lines, ``unreadable.txt`` with those that could
    not be decoded and why, and with ``parquet`` ``features.parquet``. Called again it goes on where it was.

    Args:
        source: a folder, .tar or .parquet; see :func:`open_images`.
        weights: what :func:`fastvit.from_checkpoint` takes.
        out: a folder.
        size: (height, width) the images are cut to; by default the model's. Positions are resampled for another.
        mean, std: of the pixels, in 0..1 units, as the model was trained with; by default as the weights' folder says,
            else 0.5.
        batch: images at a time.
        threads: how many decode images ahead of the model.
        dtype: of the model.
        parquet: write ``features.parquet`` too.

    Returns:
        (images, unreadable ones), on the first process; elsewhere (0, 0).

    Raises:
        ValueError: no images, or ``out`` holds the features of other images, weights or sizes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    images = open_images(source)
    options: dict[str, Any] = {} if size is None else {"img_size": size}
    model = from_checkpoint(weights, num_classes=0, device=device, dtype=dtype, **options).eval()
    if not isinstance(model, ViT):
        raise ValueError(f"the weights are those of a {type(model).__name__}; accepted: a ViT's")
    size = tuple(model.patch_embed.img_size)
    mean, std = pixel_statistics(weights, mean, std, channels=3)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, images, model, {"size": size, "mean": list(mean), "std": list(std), "dtype": str(dtype)})

    def features(pixels: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(pixels.to(dtype)), pre_logits=True)

    job = Job(images, features, out, size, mean, std, batch, threads, rank, world, device)
    job.run()
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        dist.barrier()  # until every shard is there
        dist.destroy_process_group()
    if rank:
        return 0, 0
    counts = job.merge()
    if parquet:
        to_parquet(out)
    return counts


def _claim(out: Path, images: Images, model: ViT, options: dict[str, Any]) -> None:
    """Write embed.json, which says what the features in ``out`` are of, or refuse to add others to them."""
    keys = hashlib.sha256("\n".join(images.keys).encode()).hexdigest()
    mine = {"images": keys, "weights": fingerprint(model), **json.loads(json.dumps(options))}
    path = out / "embed.json"
    if not path.exists():
        write(path, json.dumps(mine, indent=1))
    theirs = json.loads(path.read_text())
    if other := [name for name in mine if theirs.get(name) != mine[name]]:
        raise ValueError(f"{out} holds features of other {', '.join(other)}; give another folder")

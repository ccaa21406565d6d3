"""The log of a run: scalars as lines of JSON, and in TensorBoard; and files that are whole or not there."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

log = logging.getLogger("fastvit")


def write(path: Path, data: str | bytes) -> None:
    """Write a file, as a whole or not at all. Several processes may write the same."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(part, path)


def fingerprint(module: nn.Module) -> str:
    """Return what tells weights from others, wherever their files are: a SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Logger:
    """Writes scalars to log.jsonl and TensorBoard, in the first process only.

    Args:
        out: folder.
        step: where the run goes on; lines of later steps are dropped.
        writes: whether this process writes.
    """

    def __init__(self, out: Path, step: int, writes: bool) -> None:
        self.path, self.writes, self.board = out / "log.jsonl", writes, None
        if not writes:
            return
        lines = self.path.read_text().splitlines(keepends=True) if step and self.path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a run that was killed may have written a part of one
        try:
            write(self.path, "".join(line for line in whole if json.loads(line)["step"] <= step))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} is no log of a run ({error}); move it away") from error
        if importlib.util.find_spec("tensorboard") is None:
            log.info("TensorBoard is not installed (pip install 'fastvit[train]'): the log is in %s alone", self.path)
        else:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
        """Write one line of the log."""
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split, **scalars}) + "\n")
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Write what TensorBoard's writer still holds."""
        if self.board is not None:
            self.board.close()

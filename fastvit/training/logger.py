"""What a run writes down: scalars as lines of JSON, and to TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger("fastvit")


def write(path: Path, text: str) -> None:
    """A text file, as a whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


class Logger:
    """Scalars to log.jsonl and TensorBoard, by the first process alone.

    Args:
        out: folder.
        step: of what the log has already, lines of later steps are dropped.
        writes: whether this process does.

    Raises:
        ValueError: there is a log.jsonl that is no log.
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
        """One line of the log."""
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

"""Tests of several gloo processes: jobs run in each, what rank 0 finds comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Job = tuple[Callable[..., Any], tuple[Any, ...]]  # a function of a module, and its arguments


def _process(rank: int, world: int, out: Path, jobs: dict[str, Job]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    found = {name: function(*arguments) for name, (function, arguments) in jobs.items()}
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def spawn(world: int, out: Path, jobs: dict[str, Job]) -> Any:
    """What each job gives on rank 0 of so many processes, by its name; ``out`` is a new file."""
    mp.spawn(_process, args=(world, out, jobs), nprocs=world)
    return torch.load(out)

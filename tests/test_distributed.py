"""Data parallel training on PyTorch's own engine: DDP and FSDP2 with gloo processes, and checkpoints that go on.

Every run sees the same eight images a step, however many processes share them, so that all give one process's losses.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

import fastvit
from processes import spawn

pytestmark = pytest.mark.slow  # a minute and a half: four times two or four processes, which import PyTorch first

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
STEPS, SAVED = 6, 3  # of training; after so many a checkpoint is written
BATCH = 8


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step % 2)  # seen again, to be learned
    return torch.randn(BATCH, 3, 32, 32, generator=generator), torch.randint(5, (BATCH,), generator=generator)


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with the same start everywhere, as it is or as "ddp", "fsdp", "fsdp bfloat16" have it."""
    torch.manual_seed(0)
    model: Any = fastvit.ViT(**SIZES)
    nn.init.normal_(model.head.weight, std=0.1)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind.startswith("fsdp"):
        model.set_grad_checkpointing()
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if "bfloat16" in kind else MixedPrecisionPolicy()
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    # Not Adam, which makes steps of one size out of the rounding errors that are a key bias's whole gradient.
    return model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def train(kind: str, folder: Path, begin: int = 0, dies: int | None = None) -> tuple[list[float], dict[str, Tensor]]:
    """(loss of each step, the whole model's weights); from step ``begin`` on with the checkpoint in ``folder``."""
    parallel = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    model, optimizer = build(kind)
    if begin:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses = []
    for step in range(begin, STEPS):
        images, labels = (t.chunk(world)[rank] for t in batch(step))
        loss = nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        if step == dies and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        total = loss.detach().clone()
        if parallel:
            dist.all_reduce(total)
        losses.append(float(total / world))
        if step + 1 == SAVED and kind == "fsdp" and not begin:
            states = get_state_dict(model, optimizer)
            dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)
    return losses, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone() -> Iterator[tuple[list[float], dict[str, Tensor]]]:
    """One process, with plain PyTorch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastvit.backend("reference"):
        yield train("plain", Path())
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def four(folder: Path) -> Any:
    """Four processes; the FSDP run leaves a checkpoint."""
    kinds = ("ddp", "fsdp", "fsdp bfloat16")
    return spawn(4, folder / "four", {kind: (train, (kind, folder / "of four")) for kind in kinds})


@pytest.fixture(scope="module")
def two(folder: Path, four: Any) -> Any:
    """Two processes: all steps, and those after the checkpoint of four."""
    jobs = {
        "fsdp": (train, ("fsdp", folder / "of two")),
        "resumed": (train, ("fsdp", folder / "of four", SAVED)),
    }
    return spawn(2, folder / "two", jobs)


def check(found: tuple[list[float], dict[str, Tensor]], expected: tuple[list[float], dict[str, Tensor]]) -> None:
    losses, weights = found
    torch.testing.assert_close(losses, expected[0][-len(losses) :], atol=1e-5, rtol=0)
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    assert weights.keys() == expected[1].keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[1][name], atol=1e-5, rtol=1e-4)


def test_losses_change(alone: Any) -> None:
    """Or they could tell nothing apart."""
    assert max(alone[0]) - min(alone[0]) > 0.5


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_four_processes_train_as_one(kind: str, four: Any, alone: Any) -> None:
    """The loss of every step, and the weights in the end; FSDP with activation checkpointing."""
    check(four[kind], alone)


def test_mixed_precision_trains(four: Any, alone: Any) -> None:
    """Products in bfloat16, weights and their updates in float32."""
    losses, weights = four["fsdp bfloat16"]
    torch.testing.assert_close(losses, alone[0], atol=3e-2, rtol=0)
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_two_processes_train_as_one(two: Any, alone: Any) -> None:
    check(two["fsdp"], alone)


def test_a_checkpoint_of_four_goes_on_with_two(two: Any, alone: Any) -> None:
    assert len(two["resumed"][0]) == STEPS - SAVED
    check(two["resumed"], alone)


def test_a_killed_run_ends_as_an_uninterrupted_one(folder: Path, two: Any) -> None:
    """A process is killed two steps after the checkpoint; from there the run goes on, bit for bit as it would have."""
    where = folder / "killed"
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(2, folder / "dead", {"killed": (train, ("fsdp", where, 0, SAVED + 1))})
    assert not (folder / "dead").exists()
    again = spawn(2, folder / "again", {"again": (train, ("fsdp", where, SAVED))})["again"]
    assert again[0] == two["fsdp"][0][SAVED:]
    assert all(torch.equal(value, two["fsdp"][1][name]) for name, value in again[1].items())

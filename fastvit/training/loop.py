"""The training loop: any objective, by a recipe, to a folder; killed, it goes on bit for bit as it would have."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fastvit.checkpoints import files
from fastvit.training.augment import Examples, Order, evaluation_transform, loader, training_transform
from fastvit.training.data import Data
from fastvit.training.objectives import Objective
from fastvit.training.recipes import Recipe

log = logging.getLogger("fastvit")

# Of states that are sharded or not: whole in the first process, where they are written.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Diverged(RuntimeError):
    """The loss or its gradients are no finite numbers."""


@dataclass(frozen=True)
class Place:
    """This process among those of a run, and its device."""

    rank: int
    world: int
    device: torch.device

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world


@contextmanager
def processes() -> Iterator[Place]:
    """Where this process is; under torchrun, with the group of all processes meanwhile."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


def optimizer_of(objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; vectors and what the objective names are not decayed."""
    exempt = objective.no_weight_decay()
    parameters = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in parameters if p.ndim > 1 and name not in exempt]},
        {"params": [p for name, p in parameters if p.ndim <= 1 or name in exempt], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(groups, recipe.lr, (0.9, recipe.beta2), weight_decay=recipe.weight_decay)


@dataclass(frozen=True)
class Options:
    """How a run is done, which does not change what comes out.

    Args:
        checkpoint_every: steps between checkpoints; the last step has one too.
        evaluate_every: steps between evaluations; None: only after the last.
        log_every: steps between lines of the log.
        workers: processes that read images ahead, for each process of the run; 0: none.
        fsdp: parameters, gradients and optimizer are sharded over the processes (FSDP2), not copied to each (DDP).
    """

    checkpoint_every: int = 500
    evaluate_every: int | None = None
    log_every: int = 10
    workers: int = 0
    fsdp: bool = False


def options_of(arguments: argparse.Namespace) -> Options:
    """Those of a command line."""
    return Options(arguments.checkpoint_every, arguments.evaluate_every, workers=arguments.workers, fsdp=arguments.fsdp)


def shard(objective: Objective) -> None:
    """FSDP2: the parameters of a block are gathered while it runs, those outside of blocks for a whole pass."""
    for block in getattr(objective.model, "blocks", ()):
        fully_shard(block)
    fully_shard(objective)


class Run:
    """One process's part of a run: its state, and what is done with it.

    Args: as :func:`train`.
    """

    def __init__(
        self, objective: Objective, data: Data, recipe: Recipe, out: Path, seed: int, options: Options, place: Place
    ) -> None:
        self.out, self.seed, self.options, self.place = out, seed, options, place
        self.data = data = data if recipe.examples is None else data.of(recipe.examples, seed)
        self.recipe = recipe = recipe.for_images(len(data.train))
        assert recipe.steps is not None
        self.steps = recipe.steps
        if recipe.batch_size % place.world:
            raise ValueError(f"batch_size={recipe.batch_size} can't be shared by {place.world} processes")
        self.share = recipe.batch_size // place.world
        self.step = 0
        self.objective = objective.to(place.device).train()
        self.average: AveragedModel | None = None
        if recipe.polyak:
            average = get_ema_multi_avg_fn(recipe.polyak)
            self.average = AveragedModel(objective, multi_avg_fn=average, use_buffers=True)
        self.kind = type(objective).__name__
        sharded = options.fsdp and place.world > 1
        if options.fsdp and not sharded:
            log.info("fsdp: there is one process, which holds the whole model")
        if sharded:
            shard(objective)
            if self.average is not None:
                shard(self.result())
        self.optimizer = optimizer_of(objective, recipe)
        self.wrapped: nn.Module = objective
        if place.world > 1 and not sharded:
            device_ids = [place.device] if place.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(objective, device_ids=device_ids)
        torch.manual_seed(seed + place.rank)  # what was drawn before is in the weights

    @property
    def checkpoint(self) -> Path:
        """Where the newest state is."""
        return self.out / "checkpoint.pt"

    def autocast(self) -> Any:
        """The recipe's precision."""
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    # -- what is in the folder ------------------------------------------------------------------------------------

    def claim(self, described: Mapping[str, Any]) -> None:
        """Say in ``out`` which run it is of, or refuse to mix another one with it."""
        shapes = [(name, tuple(p.shape)) for name, p in self.objective.named_parameters()]
        labels = self.data.train.labels.numpy().tobytes() + self.data.test.labels.numpy().tobytes()
        mine = {
            **described,
            **{f"recipe.{name}": value for name, value in asdict(self.recipe).items() if name != "model"},
            "objective": self.kind,
            "parameters": hashlib.sha256(repr(shapes).encode()).hexdigest(),
            "labels": hashlib.sha256(labels).hexdigest(),
            "seed": self.seed,
            "processes": self.place.world,
        }
        mine = json.loads(json.dumps(mine))
        path = self.out / "run.json"
        if path.exists():
            theirs = json.loads(path.read_text())
            other = [
                f"{name} (there {theirs.get(name)!r}, now {mine.get(name)!r})"
                for name in sorted({*mine, *theirs})
                if theirs.get(name) != mine.get(name)
            ]
            if other:
                raise ValueError(f"{self.out} holds a run with another {', '.join(other)}; give another folder")
        elif self.place.rank == 0:
            _write(path, json.dumps(mine, indent=1))

    def save(self) -> None:
        """Write all of the run's state, whole or not at all."""
        chance = [self.chance()]
        if self.place.world > 1:
            chance = [{} for _ in range(self.place.world)]
            dist.all_gather_object(chance, self.chance())
        objective, optimizer = get_state_dict(self.objective, self.optimizer, options=WHOLE)
        state = {
            "step": self.step,  # which is the place in the data's order, too
            "objective": objective,
            "optimizer": optimizer,
            "average": None if self.average is None else get_model_state_dict(self.average, options=WHOLE),
            "chance": chance,
        }
        if self.place.rank == 0:
            part = self.checkpoint.with_suffix(".part")
            with part.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.checkpoint)

    def chance(self) -> dict[str, Tensor]:
        """The states of PyTorch's generators in this process."""
        states = {"cpu": torch.get_rng_state()}
        if self.place.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.place.device)
        return states

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.step = state["step"]
        set_state_dict(
            self.objective,
            self.optimizer,
            model_state_dict=state["objective"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )
        if self.average is not None:
            set_model_state_dict(self.average, state["average"], options=WHOLE)
        chance = state["chance"][self.place.rank]
        torch.set_rng_state(chance["cpu"])
        if "cuda" in chance:
            torch.cuda.set_rng_state(chance["cuda"], self.place.device)
        log.info("%s: goes on after step %d", self.out, self.step)

    # -- the steps ------------------------------------------------------------------------------------------------

    def train(self, logger: Logger) -> dict[str, float]:
        """All steps that are left -> the test set's scalars after the last."""
        test = dict[str, float]()
        examples = Examples(self.data.train, training_transform(self.recipe), self.seed)
        piece = min(self.recipe.micro_batch or self.share, self.share)
        order = Order(
            len(self.data.train), self.recipe.batch_size, piece, self.step, self.steps, self.seed, self.place.rank,
            self.place.world,
        )  # fmt: skip
        pieces = iter(loader(examples, order, self.options.workers))
        with tqdm(total=self.steps, initial=self.step, unit="step", desc="train", disable=self.place.rank != 0) as bar:
            while self.step < self.steps:
                lr, self.objective.progress = self.recipe.lr_at(self.step), self.step / self.steps
                scalars = self.one_step([next(pieces) for _ in range(-(-self.share // piece))], lr)
                self.step += 1
                bar.update()
                last = self.step == self.steps
                if last or self.step % self.options.log_every == 0:
                    logger.write(self.step, "train", {**scalars, "lr": lr})
                    bar.set_postfix(loss=f"{scalars['loss']:.4f}")
                if last or (self.options.evaluate_every and self.step % self.options.evaluate_every == 0):
                    test = self.evaluate()
                    logger.write(self.step, "test", test)
                if last or self.step % self.options.checkpoint_every == 0:
                    self.save()  # after what is logged of the step, which a run that goes on does not repeat
        return test or self.evaluate()

    def one_step(self, pieces: list[Mapping[str, Tensor]], lr: float) -> dict[str, float]:
        """Gradients of all pieces, and a step of the optimizer -> the batch's scalars.

        Raises:
            Diverged: before the weights are changed.
        """
        sums: dict[str, Tensor] = {}
        for i, piece in enumerate(pieces):
            batch = {name: value.to(self.place.device, non_blocking=True) for name, value in piece.items()}
            part = len(batch["image"]) / self.share
            last = i == len(pieces) - 1
            if isinstance(self.objective, FSDPModule):
                self.objective.set_requires_gradient_sync(last)
            apart = isinstance(self.wrapped, DistributedDataParallel) and not last
            with self.wrapped.no_sync() if apart else nullcontext():  # type: ignore[operator]
                with self.autocast():
                    found = self.wrapped(batch)
                (found["loss"] * part).backward()
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * part
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.recipe.clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        means = self.place.mean(torch.stack([*sums.values()])).tolist()
        scalars = {**dict(zip(sums, means, strict=True)), "grad_norm": float(norm)}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(scalars[name]):
                kept = f"the last checkpoint, in {self.checkpoint}, is good" if self.checkpoint.exists() else (
                    "there is no checkpoint yet"
                )  # fmt: skip
                raise Diverged(f"{name} is {scalars[name]} at step {self.step + 1}, lr {lr:.3g}; {kept}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.objective)
        return scalars

    # -- what comes out -------------------------------------------------------------------------------------------

    def result(self) -> Objective:
        """What is evaluated and saved: the average where the recipe has one."""
        found: Any = self.objective if self.average is None else self.average.module
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The objective's scalars, averaged over the test set; the same whenever it is called, and it draws nothing."""
        objective, count = self.result().eval(), len(self.data.test)
        numbers = range(self.place.rank, count, self.place.world)
        size = min(self.share, 256)
        whole = range(0, -(-count // self.place.world), size)  # as many batches in each process, as FSDP wants
        batches = [[(i, i) for i in numbers[k : k + size]] or [(0, 0)] for k in whole]
        examples = Examples(
            self.data.test, evaluation_transform(self.recipe.image_size, self.recipe.crop == "inception"), self.seed
        )
        sums: dict[str, Tensor] = {}
        devices = [self.place.device] if self.place.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.autocast():
            torch.manual_seed(self.seed)
            for k, batch in zip(whole, loader(examples, batches, self.options.workers), strict=True):
                batch = {name: value.to(self.place.device) for name, value in batch.items()}
                for name, value in objective(batch).items():
                    sums[name] = sums.get(name, 0) + value.double() * len(numbers[k : k + size])
        self.objective.train()
        means = self.place.mean(torch.stack([*sums.values()])) * self.place.world / count
        return dict(zip(sums, means.tolist(), strict=True))


class Logger:
    """Scalars to log.jsonl and TensorBoard, by the first process alone."""

    def __init__(self, out: Path, step: int, writes: bool) -> None:
        self.path, self.writes, self.board = out / "log.jsonl", writes, None
        if not writes:
            return
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a run that was killed may have written a part of one
        _write(self.path, "".join(line for line in whole if json.loads(line)["step"] <= step))
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


def train(
    objective: Objective,
    data: Data,
    recipe: Recipe,
    out: str | Path,
    *,
    seed: int = 0,
    options: Options = Options(),
    described: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train by a recipe; called again with the same arguments it goes on where it was, bit for bit.

    In ``out``: checkpoint.pt, all that going on needs; log.jsonl and tensorboard/; and in the end model.safetensors,
    the weights of ``objective.model`` (averaged where the recipe says so), and metrics.json. Under torchrun, DDP shares
    each batch among the processes.

    Args:
        objective: a model and its loss.
        data: training and test set.
        recipe: what is done. ``mixup``, ``label_smoothing`` and ``dropout`` are the objective's and the model's matter.
        out: a folder.
        seed: of the order of images, augmentation and all else that is drawn from here on.
        options: how it is done.
        described: what else the run is, by name; another such run is refused in the same folder.

    Returns:
        {"steps", "images", "test": {"loss", ...}}, what is in metrics.json.

    Raises:
        ValueError: ``out`` holds another run, or the recipe fits neither data nor processes.
        Diverged: loss or gradients are not finite. The last checkpoint stays.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with processes() as place:
        run = Run(objective, data, recipe, out, seed, options, place)
        run.claim(described or {})
        run.resume()
        logger = Logger(out, run.step, place.rank == 0)
        try:
            test = run.train(logger)
            found = {"steps": run.step, "images": run.step * recipe.batch_size, "test": test}
        finally:
            logger.close()
        weights = get_model_state_dict(run.result().model, options=WHOLE)
        if place.rank == 0:
            files.write(out / "model.safetensors", weights)
            _write(out / "metrics.json", json.dumps(found, indent=1))
        return found


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)

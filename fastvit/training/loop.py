"""The training loop: any objective, by a recipe, to a folder; killed, it goes on bit for bit as it would have."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
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
from fastvit.data.datasets import Data
from fastvit.training.augment import Examples, Order, Unreadable, evaluation_transform, loader, training_transform
from fastvit.training.logger import Logger, write
from fastvit.training.objectives import Objective
from fastvit.training.processes import Interruption, Place, processes
from fastvit.training.recipes import Recipe

log = logging.getLogger("fastvit")

# Of states that are sharded or not: whole in the first process, where they are written.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Diverged(FloatingPointError):
    """The loss or its gradients are not finite."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the run, which can go on."""


def optimizer_of(objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer; vectors and what the objective names are not decayed."""
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
    """Options of a run that do not change its results.

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


def shard(objective: Objective) -> None:
    """Shard by FSDP2: parameters of a block are gathered while it runs, those outside of blocks for a whole pass."""
    for block in getattr(objective.model, "blocks", ()):
        fully_shard(block)
    fully_shard(objective)


class Run:
    """One process's part of a run: its state, and the steps that change it.

    Args: as :func:`train`.
    """

    def __init__(
        self, objective: Objective, data: Data, recipe: Recipe, out: Path, seed: int, options: Options, place: Place
    ) -> None:
        self.out, self.seed, self.options, self.place = out, seed, options, place
        self.checkpoint = out / files.RUN
        self.data = data = data.limit(recipe.examples, seed)
        self.recipe = recipe = recipe.for_images(len(data.train))
        assert recipe.steps is not None
        self.steps = recipe.steps
        if recipe.batch_size % place.world:
            raise ValueError(f"batch_size={recipe.batch_size} can't be shared by {place.world} processes")
        files.pixel_statistics(None, recipe.mean, recipe.std, data.channels)  # or an error
        self.share = recipe.batch_size // place.world
        self.piece = min(recipe.micro_batch or self.share, self.share)
        self.step = 0
        self.test: dict[str, float] | None = None  # the test set's scalars, when all is done
        self.description: dict[str, Any] = {}
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
        self.rng = self.rng_states()

    def autocast(self) -> Any:
        """Return a context of the recipe's precision."""
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def rng_states(self) -> dict[str, Tensor]:
        """Return the states of PyTorch's generators in this process; ``rng`` has those at the beginning of a step."""
        states = {"cpu": torch.get_rng_state()}
        if self.place.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.place.device)
        return states

    # -- what is in the folder ------------------------------------------------------------------------------------

    def describe(self, described: Mapping[str, Any]) -> None:
        """Describe the run, as its checkpoints do."""
        shapes = [(name, tuple(p.shape)) for name, p in self.objective.named_parameters()]
        labels = self.data.train.labels.numpy().tobytes() + self.data.test.labels.numpy().tobytes()
        mine = {
            **described,
            **{f"recipe.{name}": value for name, value in asdict(self.recipe).items() if name != "model"},
            "objective": self.kind,
            "seed": self.seed,
            "processes": self.place.world,
            "parameters": hashlib.sha256(repr(shapes).encode()).hexdigest(),
            "labels": hashlib.sha256(labels).hexdigest(),
        }
        self.description = json.loads(json.dumps(mine))

    def save(self) -> None:
        """Write all of the run's state between two steps, whole or not at all."""
        rng = [self.rng]
        if self.place.world > 1:
            rng = [{} for _ in range(self.place.world)]
            dist.all_gather_object(rng, self.rng)
        objective, optimizer = get_state_dict(self.objective, self.optimizer, options=WHOLE)
        state = {
            "run": self.description,
            "step": self.step,  # which is the place in the data's order, too
            "objective": objective,
            "optimizer": optimizer,
            "average": None if self.average is None else get_model_state_dict(self.average, options=WHOLE),
            "chance": rng,
            "test": self.test,
        }
        if self.place.rank == 0:
            part = self.checkpoint.with_suffix(".part")
            try:
                with part.open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, self.checkpoint)
            except RuntimeError as error:  # which is what torch.save makes of a full disk
                raise OSError(f"{self.checkpoint} can't be written: {error}") from error
            finally:
                part.unlink(missing_ok=True)

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one.

        Raises:
            ValueError: it is another run's, or no checkpoint.
        """
        if not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            theirs, rng = state["run"], state["chance"]
        except Exception as error:  # whatever a damaged file makes torch.load raise
            raise ValueError(
                f"{self.checkpoint} is no checkpoint of a run, or is cut short ({type(error).__name__}); move it away "
                "to begin anew"
            ) from error
        mine = self.description
        if others := [name for name in sorted({*mine, *theirs}) if theirs.get(name) != mine.get(name)]:
            differences = [
                f"{name} (there {theirs.get(name)!r}, now {mine.get(name)!r})"
                for name in others
                if name not in ("parameters", "labels")  # hashes, which say nothing to a reader
            ]
            raise ValueError(
                f"{self.out} holds a run with another {', '.join(differences or others)}; give another folder"
            )
        self.step, self.test = state["step"], state["test"]
        set_state_dict(
            self.objective,
            self.optimizer,
            model_state_dict=state["objective"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )
        if self.average is not None:
            set_model_state_dict(self.average, state["average"], options=WHOLE)
        self.rng = rng[self.place.rank]
        torch.set_rng_state(self.rng["cpu"])
        if "cuda" in self.rng:
            torch.cuda.set_rng_state(self.rng["cuda"], self.place.device)
        log.info("%s: goes on after step %d", self.out, self.step)

    # -- the steps ------------------------------------------------------------------------------------------------

    def train(self, logger: Logger, interruption: Interruption) -> dict[str, float]:
        """Do what is left of the run and return the test set's scalars at its end."""
        if self.test is None:
            try:
                self.remaining_steps(logger, interruption)
                self.test = self.evaluate()
            except Unreadable:
                if self.place.world == 1 and self.step:  # of several processes the others don't know
                    self.save()
                raise
            logger.write(self.step, "test", self.test)
            self.save()
        return self.test

    def remaining_steps(self, logger: Logger, interruption: Interruption) -> None:
        """Do the steps that are left."""
        begin = self.step
        examples = Examples(self.data.train, training_transform(self.recipe), self.seed)
        order = Order(
            len(self.data.train), self.recipe.batch_size, self.piece, begin, self.steps, self.seed, self.place.rank,
            self.place.world,
        )  # fmt: skip
        pieces = iter(loader(examples, order, self.options.workers))
        with tqdm(total=self.steps, initial=begin, unit="step", desc="train", disable=self.place.rank != 0) as bar:
            while self.step < self.steps:
                lr, self.objective.progress = self.recipe.lr_at(self.step), self.step / self.steps
                scalars = self.gradients(pieces, interruption, lr)
                stops = scalars.pop("stops") > 0
                # Only now, when the loss of these weights is known to be finite.
                if self.step > begin and (stops or self.step % self.options.checkpoint_every == 0):
                    self.save()
                if stops:
                    raise Stopped(f"stopped after step {self.step}; the same command goes on from there")
                self.update(lr)
                bar.update()
                last = self.step == self.steps
                if last or self.step % self.options.log_every == 0:
                    logger.write(self.step, "train", {**scalars, "lr": lr})
                    bar.set_postfix(loss=f"{scalars['loss']:.4f}")
                if not last and self.options.evaluate_every and self.step % self.options.evaluate_every == 0:
                    logger.write(self.step, "test", self.evaluate())

    def gradients(
        self, pieces: Iterator[Mapping[str, Tensor]], interruption: Interruption, lr: float
    ) -> dict[str, float]:
        """Accumulate a batch's gradients; return its scalars, and as "stops" whether a signal reached any process.

        Raises:
            Diverged: they are not finite; the weights are as they were.
        """
        sums: dict[str, Tensor] = {}
        count = -(-self.share // self.piece)
        for i in range(count):
            batch = {name: value.to(self.place.device, non_blocking=True) for name, value in next(pieces).items()}
            part = len(batch["image"]) / self.share
            last = i == count - 1
            if isinstance(self.objective, FSDPModule):
                self.objective.set_requires_gradient_sync(last)
            apart = isinstance(self.wrapped, DistributedDataParallel) and not last
            with self.wrapped.no_sync() if apart else nullcontext():  # type: ignore[operator]
                with self.autocast():
                    found = self.wrapped(batch)
                (found["loss"] * part).backward()
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * part
        sums["stops"] = torch.tensor(float(interruption.requested), device=self.place.device)
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.recipe.clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        means = self.place.mean(torch.stack([*sums.values()])).tolist()
        scalars = {**dict(zip(sums, means, strict=True)), "grad_norm": float(norm)}
        self._finite(scalars, f"at step {self.step + 1}, lr {lr:.3g}")
        return scalars

    def _finite(self, scalars: Mapping[str, float], where: str) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(value := scalars.get(name, 0.0)):
                kept = "there is no checkpoint yet"
                if self.checkpoint.exists():
                    kept = (
                        f"the last checkpoint, {self.checkpoint}, is good, and --weights {self.out} starts another run "
                        "from it"
                    )
                raise Diverged(f"{name} is {value} {where}; {kept}")

    def update(self, lr: float) -> None:
        """Do a step of the optimizer, and of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.objective)
        self.step += 1
        self.rng = self.rng_states()

    # -- what comes out -------------------------------------------------------------------------------------------

    def result(self) -> Objective:
        """Return what is evaluated and saved: the average where the recipe has one."""
        found: Any = self.objective if self.average is None else self.average.module
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the objective's scalars, averaged over the test set. Random states stay as they are.

        Raises:
            Diverged: they are not finite.
        """
        objective, count = self.result().eval(), len(self.data.test)
        numbers = range(self.place.rank, count, self.place.world)
        size = min(self.share, 256)
        whole = range(0, -(-count // self.place.world), size)  # as many batches in each process, as FSDP wants
        batches = [[(i, i) for i in numbers[k : k + size]] or [(0, 0)] for k in whole]
        recipe = self.recipe
        seen = evaluation_transform(recipe.image_size, recipe.crop == "inception", recipe.mean, recipe.std)
        examples = Examples(self.data.test, seen, self.seed)
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
        scalars = dict(zip(sums, means.tolist(), strict=True))
        self._finite(scalars, f"on the test set after step {self.step}")
        return scalars


def train(
    objective: Objective,
    data: Data,
    recipe: Recipe,
    out: str | Path,
    *,
    seed: int = 0,
    options: Options = Options(),
    described: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train by a recipe; called again with the same arguments it goes on where it was, bit for bit.

    In ``out``: run.json (what the run is) and config.json; checkpoint.pt, all that going on needs; log.jsonl and
    tensorboard/; and in the end model.safetensors, the weights of ``objective.model`` (averaged where the recipe says
    so), and metrics.json. Under torchrun, DDP shares each batch among the processes. Ctrl-C and SIGTERM stop it with a
    checkpoint.

    Args:
        objective: a model and its loss.
        data: training and test set.
        recipe: how to train. ``mixup``, ``label_smoothing`` and ``dropout`` are the objective's and the model's matter.
        out: a folder.
        seed: of the order of images, augmentation and all else that is drawn from here on.
        options: those that do not change the results.
        described: what else the run is, by name; another such run is refused in the same folder.
        config: what config.json says of the model; None writes none.

    Returns:
        {"steps", "images", "test": {"loss", ...}}, what is in metrics.json.

    Raises:
        ValueError: ``out`` holds another run, the recipe fits neither data nor processes, or an image can't be read.
        Diverged: loss or gradients are not finite. The last checkpoint stays.
        Stopped: by a signal, with a checkpoint.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    place = processes()
    with Interruption() as interruption:
        run = Run(objective, data, recipe, out, seed, options, place)
        run.describe(described or {})
        run.resume()
        if place.rank == 0:
            for name, content in (("run.json", run.description), ("config.json", config)):
                if content is not None:
                    write(out / name, json.dumps(content, indent=1))
        logger = Logger(out, run.step, place.rank == 0)
        try:
            test = run.train(logger, interruption)
            found = {"steps": run.step, "images": run.step * recipe.batch_size, "test": test}
        finally:
            logger.close()
        weights = get_model_state_dict(run.result().model, options=WHOLE)
        if place.rank == 0:
            files.write(out / "model.safetensors", weights)
            write(out / "metrics.json", json.dumps(found, indent=1))
        place.wait()  # others may read what the first has written
        return found

"""``fastvit train``: recipes, the loop, its checkpoints; killed runs, other runs in the same folder, lost runs."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import fastvit
from fastvit import cli
from fastvit.training import build, loop
from fastvit.training.data import Data, open_data
from fastvit.training.objectives import Batch, Classification, Objective
from fastvit.training.recipes import RECIPES, Recipe, recipe_of
from processes import spawn


def plain(**changes: Any) -> Recipe:
    """A recipe for a few steps on small images, where nothing is left to chance but the order."""
    given: dict[str, Any] = {
        "steps": 6, "batch_size": 16, "lr": 0.02, "warmup_steps": 2, "crop": "none", "flip": False, "image_size": 8,
        "precision": "float32",
    }  # fmt: skip
    return Recipe(**given | changes)


def some() -> Data:
    """48 digits, and 20 to test on."""
    data = open_data("digits")
    return Data(data.train.subset(range(48)), data.test.subset(range(20)), 10, 1)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def lines(out: Path, split: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def train(out: Path, recipe: Recipe, model: nn.Module | None = None, **options: Any) -> dict[str, Tensor]:
    """The weights that a linear model, or another, ends with."""
    objective = options.pop("objective", None) or Classification(model or linear(), 10)
    loop.train(objective, some(), recipe, out, options=loop.Options(log_every=1, **options))
    return weights(out)


def by_hand(recipe: Recipe, out: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, their average): the same with PyTorch alone, in float64, of the images in the loop's order."""
    from fastvit.training.augment import Order

    data, model = some(), linear().double()
    decayed = {"params": [p for p in model.parameters() if p.ndim > 1]}
    rest = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    kind: Any = torch.optim.AdamW if recipe.optimizer == "adam" else torch.optim.SGD
    momenta: Any = {"betas": (0.9, recipe.beta2)} if recipe.optimizer == "adam" else {"momentum": 0.9}
    optimizer = kind([decayed, rest], lr=1.0, weight_decay=recipe.weight_decay, **momenta)
    average: dict[str, Tensor] = {}
    for step, chosen in enumerate(Order(48, 16, 16, 0, 6, seed=0)):
        images = torch.stack([data.train.image(i) for _, i in chosen]).double() * 2 - 1
        labels = data.train.labels[[i for _, i in chosen]]
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))
        for p in model.parameters():
            if recipe.clip is not None and norm > recipe.clip and p.grad is not None:
                p.grad.mul_(recipe.clip / norm)
        done = (step - 2) / 4
        fall = 1 - done if recipe.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * ((step + 1) / 2 if step < 2 else fall)
        optimizer.step()
        now = {name: value.detach().clone() for name, value in model.state_dict().items()}
        average = {n: recipe.polyak * average.get(n, v) + (1 - recipe.polyak) * v for n, v in now.items()}
    return now, average


# -- recipes --------------------------------------------------------------------------------------------------------


def test_recipes_are_the_papers() -> None:
    """Tables 3 and 4."""
    table3 = {  # epochs, lr, decay, weight decay, dropout
        "vit_jft": (7, 8e-4, "linear", 0.1, 0.0),
        "vit_jft_l32": (7, 6e-4, "linear", 0.1, 0.0),
        "vit_jft_l16": (14, 4e-4, "linear", 0.1, 0.0),
        "vit_jft_h14": (14, 3e-4, "linear", 0.1, 0.0),
        "hybrid_jft": (7, 8e-4, "linear", 0.1, 0.0),
        "hybrid_jft_l32": (7, 2e-4, "linear", 0.1, 0.0),
        "hybrid_jft_l16": (14, 4e-4, "linear", 0.1, 0.0),
        "resnet_jft_r50": (7, 1e-3, "linear", 0.1, 0.0),
        "resnet_jft_r101": (7, 8e-4, "linear", 0.1, 0.0),
        "resnet_jft_r152": (7, 6e-4, "linear", 0.1, 0.0),
        "vit_imagenet21k": (90, 1e-3, "linear", 0.03, 0.1),
        "vit_imagenet21k_l": (90, 1e-3, "linear", 0.03, 0.1),
        "vit_imagenet": (300, 3e-3, "cosine", 0.3, 0.1),
    }
    for name, expected in table3.items():
        recipe = recipe_of(name)
        assert (recipe.epochs, recipe.lr, recipe.decay, recipe.weight_decay, recipe.dropout) == expected
        assert (recipe.optimizer, recipe.batch_size, recipe.warmup_steps, recipe.image_size) == (
            "adam",
            4096,
            10_000,
            224,
        )
        assert recipe.clip == (1.0 if name == "vit_imagenet" else None)
        assert recipe.beta2 == 0.999
        fastvit.create_model(recipe.model, device="meta")
    table4 = {  # steps, learning rates, size, Polyak factor
        "finetune_imagenet": (20_000, (0.003, 0.01, 0.03, 0.06), 384, 0.0),
        "finetune_imagenet_512": (20_000, (0.003, 0.01, 0.03, 0.06), 512, 0.9999),
        "finetune_imagenet_518": (20_000, (0.003, 0.01, 0.03, 0.06), 518, 0.9999),
        "finetune_cifar": (10_000, (0.001, 0.003, 0.01, 0.03), 384, 0.0),
        "finetune_pets": (500, (0.001, 0.003, 0.01, 0.03), 384, 0.0),
        "finetune_flowers": (500, (0.001, 0.003, 0.01, 0.03), 384, 0.0),
        "finetune_vtab": (2_500, (0.01,), 384, 0.0),
    }
    for name, (steps, rates, size, polyak) in table4.items():
        recipe = recipe_of(name)
        assert (recipe.steps, recipe.image_size, recipe.polyak) == (steps, size, polyak)
        assert recipe.lr in rates
        assert (recipe.optimizer, recipe.decay, recipe.batch_size) == ("sgd", "cosine", 512)
        assert (recipe.weight_decay, recipe.clip, recipe.dropout) == (0.0, 1.0, 0.0)
        assert recipe.examples == (1000 if name == "finetune_vtab" else None)
    assert {*table3, *table4, "deit_imagenet", "digits"} == set(RECIPES)


def test_learning_rates() -> None:
    recipe = Recipe(lr=2.0, epochs=3, batch_size=100, warmup_steps=10).for_images(1000)
    assert recipe.steps == 30
    assert [recipe.lr_at(step) for step in (0, 4, 9, 10, 20)] == [0.2, 1.0, 2.0, 2.0, 1.0]
    assert recipe.lr_at(29) == pytest.approx(0.1)
    cosine = recipe.override(["decay=cosine"])
    assert [cosine.lr_at(step) for step in (4, 10)] == [1.0, 2.0]
    assert cosine.lr_at(20) == pytest.approx(1.0)
    assert cosine.lr_at(15) == pytest.approx(1 + math.sqrt(0.5))
    with pytest.raises(ValueError, match="warmup_steps=10 of 9 steps"):
        recipe.override(["steps=9"]).for_images(1000)


def test_overriding() -> None:
    recipe = recipe_of("vit_imagenet").override(["lr=1e-3", "clip=none", "flip=false", "steps=20000", "decay=linear"])
    assert (recipe.lr, recipe.clip, recipe.flip, recipe.decay) == (1e-3, None, False, "linear")
    assert (recipe.steps, recipe.epochs) == (20_000, None)
    assert recipe.override(["epochs=2.5"]).epochs == 2.5
    assert recipe_of("vit_imagenet").lr == 3e-3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rat=1", "no field 'learning_rat'.*Accepted: optimizer, lr, batch_size"),
        ("label_smothing=0.1", "did you mean 'label_smoothing'"),
        ("lr", "'lr'; accepted: field=value"),
        ("lr=fast", "lr='fast'; accepted: float"),
        ("lr=-1", "lr=-1.0 is not positive"),
        ("lr=nan", "lr=nan is not positive and finite"),
        ("batch_size=1.5", "batch_size='1.5'; accepted: int"),
        ("clip=low", "clip='low'; accepted: float or none"),
        ("flip=maybe", "flip='maybe'; accepted: bool"),
        ("decay=step", "decay='step'; accepted: 'linear', 'cosine'"),
        ("dropout=1", r"dropout=1\.0; accepted: 0 up to"),
        ("steps=none", "steps=None and epochs=None"),
        ("warmup_steps=-1", "warmup_steps=-1 is negative"),
    ],
)
def test_overrides_that_are_none(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_of("digits").override([setting])


def test_recipes_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--data", "digits", "--recipe", "vit"], "no recipe 'vit'; accepted: vit_imagenet, "),
        (["--data", "digits", "--set", "lrr=1"], "did you mean 'lr'"),
        (["--data", "no/folder"], "give one with --recipe"),
        (["--data", "no/folder", "--recipe", "digits"], "no data 'no/folder'"),
        (["--data", "digits", "--model", "vit_bas"], "unknown model 'vit_bas'"),
        (["--data", "digits", "--model", "digits", "--weights", "W"], "the model is that of --weights W"),
        (["--data", "digits", "--weights", "W"], "no checkpoint at W"),
        (["--data", "cifar10"], "finetune_cifar is for a model that is trained"),
    ):
        assert cli.main(["train", "--out", "unused", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not Path("unused").exists()


# -- the objective and the model --------------------------------------------------------------------------------------


def test_label_smoothing_is_of_training_alone() -> None:
    model = linear()
    objective = Classification(model, 10, label_smoothing=0.2)
    batch = {"image": torch.randn(4, 1, 8, 8), "label": torch.tensor([1, 2, 3, 4])}
    logs = F.log_softmax(model(batch["image"]), 1)
    right, all_alike = -logs[range(4), batch["label"]].mean(), -logs.mean()
    torch.testing.assert_close(objective.train()(batch)["loss"], 0.8 * right + 0.2 * all_alike)
    torch.testing.assert_close(objective.eval()(batch)["loss"], right)


def test_mixup() -> None:
    """Images and targets in the same shares, in training alone."""
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.flatten(1)

    objective = Classification(Watching(), 4, mixup=1.0)
    images = torch.eye(4).reshape(4, 1, 2, 2) * 4
    batch = {"image": images, "label": torch.arange(4)}
    loss = objective.train()(batch)["loss"]
    share = float(seen[0][1, 0, 0, 1]) / 4
    assert 0 < share < 1
    mixed = share * images + (1 - share) * images.roll(1, 0)
    torch.testing.assert_close(seen[0], mixed)
    targets = share * torch.eye(4) + (1 - share) * torch.eye(4).roll(1, 0)
    torch.testing.assert_close(loss, -(targets * F.log_softmax(mixed.flatten(1), 1)).sum(1).mean())
    objective.eval()(batch)
    assert torch.equal(seen[1], images)


def test_dropout_is_where_the_paper_has_it() -> None:
    """After every dense layer but qkv, and after the positions."""
    recipe = recipe_of("vit_imagenet").override(["image_size=32", "drop_path=0.2"])
    model = build.model_of("vit_tiny_patch16_224", recipe, some())
    assert isinstance(model, fastvit.ViT)
    dropping = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p}
    blocks = {f"blocks.{i}.{name}" for i in range(12) for name in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")}
    assert dropping == dict.fromkeys({"pos_drop", *blocks}, 0.1)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert (model.num_classes, model.in_chans, model.patch_embed.img_size) == (10, 1, (32, 32))


def test_fine_tuning_starts_from_a_run(tmp_path: Path) -> None:
    """At another resolution, with a head of zeros; a run's folder is a checkpoint."""
    data, recipe = some(), plain(steps=3, image_size=16)
    torch.manual_seed(0)
    model = build.model_of("digits", plain(), data)
    config = build.describe(model, plain())
    loop.train(Classification(model, 10), data, plain(steps=3), tmp_path, config=config)
    again = fastvit.from_checkpoint(tmp_path)
    assert again.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.eval()(images), model.eval()(images))
    tuned = build.model_of("anything", recipe, data, str(tmp_path))
    assert isinstance(tuned, fastvit.ViT)
    assert tuned.patch_embed.grid_size == (4, 4)
    assert not tuned.head.weight.any()
    assert not tuned.head.bias.any()
    assert torch.equal(tuned.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


# -- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.5},
        {"optimizer": "sgd", "lr": 0.5, "decay": "cosine", "clip": 0.05, "weight_decay": 0.0, "polyak": 0.8},
        {"polyak": 0.7, "clip": 0.1, "beta2": 0.9},
    ],
    ids=["adam", "sgd", "average"],
)
def test_steps_by_hand(changes: dict[str, Any], tmp_path: Path) -> None:
    """Schedule, clipping, decay of matrices alone and averaging, written out in float64."""
    recipe = plain(**changes)
    found = train(tmp_path, recipe)
    now, average = by_hand(recipe, tmp_path)
    start = linear().state_dict()
    for name, value in (average if recipe.polyak else now).items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
        assert (value - start[name]).abs().max() > 1e-3
    assert [line["lr"] for line in lines(tmp_path)] == [recipe.lr_at(step) for step in range(6)]


def test_accumulated_gradients_are_the_batchs(tmp_path: Path) -> None:
    """Pieces of 5, 5, 5 and 1: the same losses and weights as 16 at once."""
    whole, parts = (train(tmp_path / str(size), plain(optimizer="sgd", micro_batch=size)) for size in (16, 5))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-7)
    for a, b in zip(lines(tmp_path / "16"), lines(tmp_path / "5"), strict=True):
        assert a["step"] == b["step"]
        assert [a["loss"], a["grad_norm"]] == pytest.approx([b["loss"], b["grad_norm"]], rel=1e-5)


def test_bfloat16_is_of_products_alone(tmp_path: Path) -> None:
    kinds = []
    model = linear()
    model.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    found = train(tmp_path, plain(precision="bfloat16"), model)
    assert set(kinds) == {torch.bfloat16}
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_evaluation_draws_nothing(tmp_path: Path) -> None:
    """An objective that draws, here dropout in evaluation too, trains and is judged alike, evaluated often or not."""

    class Drawing(Classification):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            noisy = batch["image"] + torch.randn_like(batch["image"])
            return super().forward({**batch, "image": noisy})

    often, never = (
        train(tmp_path / str(every), plain(), objective=Drawing(linear(), 10), evaluate_every=every)
        for every in (1, None)
    )
    assert all(torch.equal(often[name], value) for name, value in never.items())
    assert lines(tmp_path / "1", "test")[-1] == lines(tmp_path / "None", "test")[-1]
    assert [line["step"] for line in lines(tmp_path / "1", "test")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(tmp_path / "None", "test")] == [6]


def test_metrics_are_of_the_whole_test_set(tmp_path: Path) -> None:
    model = linear()
    found = loop.train(Classification(model, 10), some(), plain(), tmp_path)
    test = some().test
    logits = model(torch.stack([test.image(i) for i in range(20)]) * 2 - 1)
    assert found["test"]["accuracy"] == pytest.approx(float((logits.argmax(1) == test.labels).double().mean()))
    assert found["test"]["loss"] == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-5)
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    assert (found["steps"], found["images"]) == (6, 96)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The same scalars as in the log; where it is not installed, one line says so."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "with", plain())
    events = EventAccumulator(str(tmp_path / "with" / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(
        [v["loss"] for v in lines(tmp_path / "with")]
    )
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    with caplog.at_level("INFO", "fastvit"):
        train(tmp_path / "without", plain())
    assert [message for message in caplog.messages if "TensorBoard is not installed" in message]
    assert not (tmp_path / "without" / "tensorboard").exists()
    assert (tmp_path / "without" / "log.jsonl").read_text() == (tmp_path / "with" / "log.jsonl").read_text()


# -- runs that end, and go on -----------------------------------------------------------------------------------------


class Bad(Classification):
    """Its loss, or its gradient, is no number in the step after ``good``."""

    def __init__(self, good: int, where: str) -> None:
        super().__init__(linear(), 10)
        self.good, self.where = good, where

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        found = super().forward(batch)
        if self.training:
            self.good -= 1
            if self.good < 0 and self.where == "loss":
                found["loss"] = found["loss"] * math.nan
            if self.good < 0 and self.where == "gradient":
                found["loss"] = found["loss"] + 0 * torch.sqrt(self.model[1].bias - self.model[1].bias.detach()).sum()
        return found


@pytest.mark.parametrize(("where", "name"), [("loss", "loss"), ("gradient", "grad_norm")])
def test_a_run_without_numbers_stops(where: str, name: str, tmp_path: Path) -> None:
    """The weights are as before that step, and so is the checkpoint."""
    objective = Bad(3, where)
    with pytest.raises(loop.Diverged, match=rf"{name} is nan at step 4, lr .*; the last checkpoint.*checkpoint\.pt"):
        train(tmp_path, plain(), objective=objective, checkpoint_every=2)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["objective"].values())
    assert all(p.isfinite().all() for p in objective.parameters())
    assert not (tmp_path / "metrics.json").exists()
    with pytest.raises(loop.Diverged, match="there is no checkpoint yet"):
        train(tmp_path / "other", plain(), objective=Bad(0, where))


def test_other_runs_are_refused(tmp_path: Path) -> None:
    """Of another recipe, model, objective, seed or data; nothing is changed."""
    train(tmp_path, plain())
    before = (tmp_path / "checkpoint.pt").read_bytes()

    class Other(Classification):
        pass

    small = some()
    cut = Data(small.train.subset(range(40)), small.test, 10, 1)
    deep = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 10))
    for objective, data, recipe, seed, message in (
        (Classification(linear(), 10), small, plain(lr=0.5), 0, r"another recipe\.lr \(there 0\.02, now 0\.5\)"),
        (Classification(linear(), 10), small, plain(steps=7), 0, r"recipe\.steps \(there 6, now 7\)"),
        (Classification(deep, 10), small, plain(), 0, "another parameters;"),
        (Other(linear(), 10), small, plain(), 0, "objective .there 'Classification', now 'Other'"),
        (Classification(linear(), 10), cut, plain(), 0, "another labels;"),
        (Classification(linear(), 10), small, plain(), 1, "seed .there 0, now 1"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.train(objective, data, recipe, tmp_path, seed=seed)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_finished_run_says_the_same_again(tmp_path: Path) -> None:
    first = train(tmp_path, plain(polyak=0.5))
    log, metrics = (tmp_path / "log.jsonl").read_text(), (tmp_path / "metrics.json").read_text()
    again = train(tmp_path, plain(polyak=0.5), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert (tmp_path / "metrics.json").read_text() == metrics
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of writing: the run ends as it would have, started again."""
    expected = train(tmp_path / "whole", plain(optimizer="sgd"), checkpoint_every=2)
    save, calls = torch.save, []

    def filled(state: Any, file: Any) -> None:
        calls.append(state["step"])
        if len(calls) == 2:
            file.write(b"a part")
            raise OSError("No space left on device")
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", filled)
        with pytest.raises(OSError, match="No space"):
            train(tmp_path / "cut", plain(optimizer="sgd"), checkpoint_every=2)
    assert calls == [2, 4]
    with (tmp_path / "cut" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "spl')
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 2
    found = train(tmp_path / "cut", plain(optimizer="sgd"), checkpoint_every=2)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_an_objectives_own_parameters_are_trained_and_stay_in_checkpoints_alone(tmp_path: Path) -> None:
    class Scaled(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.model = linear()
            self.scale = nn.Parameter(torch.ones(1, 1))

        def forward(self, batch: Batch) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.model(batch["image"]) * self.scale, batch["label"])}

        def no_weight_decay(self) -> set[str]:
            return {"scale"}

    objective = Scaled()
    optimizer = loop.optimizer_of(objective, plain())
    assert [p is objective.scale for p in optimizer.param_groups[1]["params"]] == [True, False]
    start = copy.deepcopy(objective)
    found = train(tmp_path, plain(), objective=objective)
    assert not torch.equal(objective.scale, start.scale)
    assert set(found) == {"1.weight", "1.bias"}
    assert "scale" in torch.load(tmp_path / "checkpoint.pt", weights_only=True)["objective"]


def test_examples_are_what_a_run_learns_from() -> None:
    place, recipe = loop.Place(0, 1, torch.device("cpu")), plain(examples=20)
    run = loop.Run(Classification(linear(), 10), some(), recipe, Path(), 3, loop.Options(), place)
    assert run.data.train.labels.tolist() == some().of(20, 3).train.labels.tolist()
    with pytest.raises(ValueError, match="examples=49 of 48 training images"):
        loop.Run(Classification(linear(), 10), some(), plain(examples=49), Path(), 3, loop.Options(), place)
    nothing = replace(some(), train=some().train.subset([]))
    with pytest.raises(ValueError, match="the training set has no images"):
        loop.Run(Classification(linear(), 10), nothing, plain(), Path(), 0, loop.Options(), place)


def test_a_batch_is_shared_evenly_or_not_at_all() -> None:
    place = loop.Place(0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="batch_size=16 can't be shared by 3 processes"):
        loop.Run(Classification(linear(), 10), some(), plain(), Path(), 0, loop.Options(), place)


def command(out: Path, *more: str) -> list[str]:
    return [
        "train", "--data", "digits", "--out", str(out), "--steps", "24", "--checkpoint-every", "4", "--set",
        "batch_size=32", "warmup_steps=2", "dropout=0.1", "mixup=0.2", "micro_batch=24", "crop=affine", *more,
    ]  # fmt: skip


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, averages and the log, bit for bit; with dropout, accumulation, and images that a worker augments."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main(command(whole)) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvit", *command(cut, "--workers", "1")], stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    while not (cut / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < torch.load(cut / "checkpoint.pt", weights_only=True)["step"] < 24
    assert not (cut / "metrics.json").exists()
    capsys.readouterr()
    assert cli.main(command(cut)) == 0
    accuracy = json.loads((whole / "metrics.json").read_text())["test"]["accuracy"]
    assert capsys.readouterr().out == f"test accuracy: {accuracy:.2%}\n"
    found = weights(cut)
    assert all(torch.equal(found[name], value) for name, value in weights(whole).items())
    for name in ("log.jsonl", "metrics.json", "run.json"):
        assert (cut / name).read_text() == (whole / name).read_text()
    assert sorted(os.listdir(cut)) == sorted(os.listdir(whole))


def torchrun(world: int, arguments: list[str]) -> list[str]:
    """The command line."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return [*run, "-m", "fastvit", *arguments]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The loss of every tenth step to 1e-5, and the accuracy; gradients accumulated too; copied and sharded."""
    more = ("--set", "dropout=0", "mixup=0", "micro_batch=10", "optimizer=sgd", "lr=0.2", "crop=none", "--steps", "60")
    subprocess.run(torchrun(1, command(tmp_path / "one", *more)), check=True)
    one = lines(tmp_path / "one")
    assert len(one) == 6
    assert max(line["loss"] for line in one) - min(line["loss"] for line in one) > 0.1  # or nothing is told apart
    for name, fsdp in (("copied", ()), ("sharded", ("--fsdp",))):
        out = tmp_path / name
        subprocess.run(torchrun(2, command(out, *more, *fsdp)), check=True)
        for a, b in zip(one, lines(out), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        tests = [lines(run, "test")[0] for run in (tmp_path / "one", out)]
        assert tests[0]["loss"] == pytest.approx(tests[1]["loss"], abs=1e-5)
        assert tests[0]["accuracy"] == tests[1]["accuracy"]
        for key, value in weights(tmp_path / "one").items():
            torch.testing.assert_close(weights(out)[key], value, rtol=1e-3, atol=1e-4)


def evaluated(out: Path, fsdp: bool) -> dict[str, float]:
    """Test scalars of an untrained model on one image; called in each of several processes, or in one."""
    torch.manual_seed(0)
    data = some()
    data = Data(data.train, data.test.subset([3]), data.classes, data.channels)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place = loop.Place(rank, world, torch.device("cpu"))
    model = build.model_of("digits", plain(), data)
    return loop.Run(Classification(model, 10), data, plain(), out, 0, loop.Options(fsdp=fsdp), place).evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_fewer_test_images_than_processes(fsdp: bool, tmp_path: Path) -> None:
    found = spawn(2, tmp_path / "found", {"test": (evaluated, (tmp_path, fsdp))})["test"]
    assert found == pytest.approx(evaluated(tmp_path, False), abs=1e-6)


@pytest.mark.slow
def test_a_killed_sharded_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Both of its processes killed; Adam's moments, averages and dropout go on in each."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(torchrun(2, command(whole, "--fsdp")), check=True)
    process = subprocess.Popen(torchrun(2, command(cut, "--fsdp")), start_new_session=True)
    while not (cut / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < torch.load(cut / "checkpoint.pt", weights_only=True)["step"] < 24
    subprocess.run(torchrun(2, command(cut, "--fsdp")), check=True)
    found = weights(cut)
    assert all(torch.equal(found[name], value) for name, value in weights(whole).items())
    assert (cut / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_digits(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The defaults reach 98% of the 360 test images, in less than 200 seconds of CPU."""
    began = time.process_time()
    assert cli.main(["train", "--data", "digits", "--out", str(tmp_path), "--seed", str(seed)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["accuracy"] >= 0.98
    assert time.process_time() - began < 200

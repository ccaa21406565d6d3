"""``fastvit train``: recipes, the models that it trains, and the loop, step by step."""

from __future__ import annotations

import importlib.util
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_cases import linear, lines, plain, some, train

import fastvit
from fastvit import cli
from fastvit.data.datasets import Data
from fastvit.training import build, loop
from fastvit.training.objectives import Batch, Classification
from fastvit.training.recipes import RECIPES, Recipe, recipe_of


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
        assert (recipe.optimizer, recipe.beta2, recipe.batch_size) == ("adam", 0.999, 4096)
        assert (recipe.warmup_steps, recipe.image_size) == (10_000, 224)
        assert recipe.clip == (1.0 if name == "vit_imagenet" else None)
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
        (["--data", "no/folder"], "choose one with --recipe"),
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
    """After every dense layer but qkv, and after the positions; a ResNet has none."""
    recipe = recipe_of("vit_imagenet").override(["image_size=32", "drop_path=0.2"])
    model = build.model_of("vit_tiny_patch16_224", recipe, some())
    assert isinstance(model, fastvit.ViT)
    dropping = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p}
    blocks = {f"blocks.{i}.{name}" for i in range(12) for name in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")}
    assert dropping == dict.fromkeys({"pos_drop", *blocks}, 0.1)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert (model.num_classes, model.in_chans, model.patch_embed.img_size) == (10, 1, (32, 32))
    with pytest.raises(ValueError, match=r"dropout=0\.1: of a ResNet, accepted is 0"):
        build.model_of("R50x1", plain(dropout=0.1), some())


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
    assert not tuned.head.weight.any() and not tuned.head.bias.any()
    assert torch.equal(tuned.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    "name",
    [
        "digits_beit", "vit_tiny_r_s16_p8_224", "R+ViT-Ti/16", "vit_small_plus_patch16_dinov3_qkvb", "Axial-ViT-Ti/16",
        "axial_resnet50", "R50x1", "deit_tiny_distilled_patch16_224",
    ],
)  # fmt: skip
def test_every_family_can_be_trained_and_read_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the command, on two digits; its folder is the model, and one to fine-tune."""
    few = Data(some().train.subset(range(2)), some().test.subset(range(2)), 10, 1)
    monkeypatch.setattr(build, "open_data", lambda source: few)
    out, size = tmp_path / "out", 16 if name == "digits_beit" else 32
    options = ["--recipe", "digits", "--steps", "1", "--set", "warmup_steps=0", "batch_size=2", "mixup=0"]
    options += [f"image_size={size}", "polyak=0", "lr=1e-3"]
    assert cli.main(["train", "--data", "digits", "--model", name, "--out", str(out), *options]) == 0
    state = torch.load(out / "checkpoint.pt", weights_only=True)["objective"]
    torch.manual_seed(0)
    recipe = recipe_of("digits").override([f"image_size={size}"])
    model = build.model_of(name, recipe, few)
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    again = fastvit.from_checkpoint(out)
    images = torch.randn(2, 1, size, size)
    assert torch.equal(again.eval()(images), model.eval()(images))
    tuned = ["--weights", str(out), "--out", str(tmp_path / "tuned"), *options, "lr=1e-9"]
    assert cli.main(["train", "--data", "digits", *tuned]) == 0
    heads = [value for key, value in load_file(tmp_path / "tuned" / "model.safetensors").items() if "head" in key]
    assert heads and all(value.abs().max() < 1e-6 for value in heads)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_a_folder_tells_what_shapes_do_not(pool: str, tmp_path: Path) -> None:
    model = fastvit.ViT(
        img_size=(16, 32), patch_size=8, embed_dim=48, depth=1, num_heads=3, act_layer="quick_gelu", class_token=False,
        norm_layer=partial(fastvit.layers.LayerNorm, eps=1e-3), global_pool=pool, rope=50.0, pos_embed="none",
        num_classes=3, pool_include_prefix=True, reg_tokens=2,
    ).eval()  # fmt: skip
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(build.describe(model, plain(mean=(0.1,), std=(0.2,)))))
    images = torch.randn(2, 3, 16, 32)
    assert torch.equal(fastvit.from_checkpoint(tmp_path).eval()(images), model(images))
    recipe = build.recipe_for("digits", "x", [], weights=str(tmp_path))
    assert (recipe.mean, recipe.std) == ((0.1,), (0.2,))
    assert build.recipe_for("digits", "x", ["mean=0.4,0.5,0.6"], weights=str(tmp_path)).mean == (0.4, 0.5, 0.6)
    (tmp_path / "config.json").write_text("{}")
    known = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(known))
    assert build.recipe_for("digits", "x", [], weights=str(tmp_path)).mean == (0.48, 0.46, 0.41)


def test_the_recipe_of_a_data_set() -> None:
    assert build.recipe_for(None, "imagenet:/data", []) == recipe_of("vit_imagenet")
    assert build.recipe_for(None, "imagenet:/data", [], weights="vit.npz") == recipe_of("finetune_imagenet")
    assert build.recipe_for(None, "dtd", [], weights="vit.npz") == recipe_of("finetune_vtab")
    with pytest.raises(ValueError, match="finetune_cifar is for a model that is trained"):
        build.recipe_for(None, "cifar10", [])


def test_pixels_are_normalised_as_the_recipe_says(tmp_path: Path) -> None:
    seen = []

    class Watching(Classification):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            seen.append(batch["image"])
            return super().forward(batch)

    train(tmp_path, plain(mean=(0.25,), std=(0.5,)), objective=Watching(linear(), 10))
    last = torch.stack([some().test.image(i) for i in range(16, 20)])
    torch.testing.assert_close(seen[-1], (last - 0.25) / 0.5)
    with pytest.raises(ValueError, match="mean: 3 numbers; accepted: 1, or 1"):
        train(tmp_path / "other", plain(mean=(0.1, 0.2, 0.3)))


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
    losses = [line["loss"] for line in lines(tmp_path / "with")]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    with caplog.at_level("INFO", "fastvit"):
        train(tmp_path / "without", plain())
    assert [message for message in caplog.messages if "TensorBoard is not installed" in message]
    assert not (tmp_path / "without" / "tensorboard").exists()
    assert (tmp_path / "without" / "log.jsonl").read_text() == (tmp_path / "with" / "log.jsonl").read_text()

"""Runs of ``fastvit pretrain``: resumed, shared by processes, refused, fine-tuned; and the recipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import cli
from fastvit.models import ViT
from fastvit.training import loop
from fastvit.training.build import MODELS
from fastvit.training.pretrain import DVAE, Tokenizing
from fastvit.training.pretrain.build import TOKENIZERS, pretrain
from fastvit.training.recipes import PRETRAINING
from parity import assert_same


def short(steps: int, checkpoint_every: int = 500) -> dict[str, Any]:
    """Return the arguments of a run of ``steps`` steps."""
    settings = ["batch_size=16", "warmup_steps=1", f"steps={steps}"]
    return {"settings": settings, "options": loop.Options(checkpoint_every=checkpoint_every)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tokenizer that was trained for two steps."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pretrain("tokenizer", "digits", folder, **short(2))
    return str(folder)


@pytest.mark.parametrize("method", ["masked", "beit", "tokenizer"])
def test_a_resumed_run_draws_what_it_would_have(
    method: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, codes and schedules go on bit for bit: the weights are those of an uninterrupted run."""
    options = {**short(6, checkpoint_every=3), "tokenizer": tokenizer if method == "beit" else None}
    pretrain(method, "digits", tmp_path / "whole", **options)
    save = loop.Run.save

    def save_and_stop(run: loop.Run) -> None:
        save(run)
        if run.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop.Run, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(method, "digits", tmp_path / "cut", **options)
    torch.rand(7)
    pretrain(method, "digits", tmp_path / "cut", **options)
    whole, cut = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    for name, value in whole["objective"].items():
        assert torch.equal(value, cut["objective"][name]), name


def test_the_loop_tells_an_objective_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], Tokenizing.forward

    def watched(self: Tokenizing, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.extend([self.progress] * self.training)
        return forward(self, batch)

    monkeypatch.setattr(Tokenizing, "forward", watched)
    settings = [*short(4)["settings"], "micro_batch=8"]
    pretrain("tokenizer", "digits", tmp_path, settings=settings)
    assert seen == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


@pytest.fixture
def short_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tokenizer that BEiT trains for itself take two steps."""
    monkeypatch.setitem(PRETRAINING, "tokenizer_digits", PRETRAINING["tokenizer_digits"].override(short(2)["settings"]))


@pytest.mark.usefixtures("short_tokenizer")
def test_beit_trains_its_tokenizer_where_none_is_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It logs that, hands on the settings of the machine, and resumes wherever the folder is moved."""
    run = short(3)
    run["settings"] = [*run["settings"], "micro_batch=8"]
    with caplog.at_level("INFO", "fastvit"):
        pretrain("beit", "digits", tmp_path / "run", codes=32, share=0.3, **run)
    assert f"one for 2 steps by the recipe tokenizer_digits, in {tmp_path / 'run' / 'tokenizer'}" in caplog.text
    out = (tmp_path / "run").rename(tmp_path / "moved")
    trained, record = DVAE.from_checkpoint(out / "tokenizer"), json.loads((out / "tokenizer" / "run.json").read_text())
    state = torch.load(out / "checkpoint.pt")["objective"]
    assert all(torch.equal(value, state[f"tokenizer.{name}"]) for name, value in trained.state_dict().items())
    assert (trained.codes, record["codes"], record["recipe.steps"], record["recipe.micro_batch"]) == (32, 32, 2, 8)
    assert json.loads((out / "run.json").read_text())["share"] == 0.3
    pretrain("beit", "digits", out, codes=32, share=0.3, **run)
    with pytest.raises(ValueError, match=r"another share \(there 0\.3, now 0\.4\)"):
        pretrain("beit", "digits", out, codes=32, **run)
    with pytest.raises(ValueError, match=r"another codes \(there 32, now 64\)"):
        pretrain("beit", "digits", out, share=0.3, **run)


def test_beit_and_its_tokenizer_by_two_processes(tmp_path: Path) -> None:
    """Two runs, one after the other, of the same processes; each reads the tokenizer that the first has written."""
    script = tmp_path / "script.py"
    script.write_text(
        "from fastvit.training.pretrain.build import pretrain\n"
        "from fastvit.training.recipes import PRETRAINING\n"
        f"settings = {short(2)['settings']}\n"
        "PRETRAINING['tokenizer_digits'] = PRETRAINING['tokenizer_digits'].override(settings)\n"
        f"pretrain('beit', 'digits', {str(tmp_path / 'run')!r}, settings=settings)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(command, check=True, timeout=300)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 2


def test_a_tokenizer_is_known_by_its_weights(tokenizer: str, tmp_path: Path) -> None:
    """Not by its path: another one in the same place is refused, the same one in another place is not."""
    place = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, place)
    pretrain("beit", "digits", tmp_path / "run", tokenizer=place, **short(2))
    pretrain("beit", "digits", tmp_path / "run", tokenizer=f"{tmp_path}/./tokenizer/", **short(2))
    pretrain("beit", "digits", tmp_path / "run", tokenizer=tokenizer, **short(2))
    shutil.rmtree(place)
    pretrain("tokenizer", "digits", place, **short(3))
    with pytest.raises(ValueError, match="another tokenizer"):
        pretrain("beit", "digits", tmp_path / "run", tokenizer=place, **short(2))
    with pytest.raises(ValueError, match="whose tokenizer is elsewhere"):
        pretrain("beit", "digits", tmp_path / "run", **short(2))


@pytest.mark.usefixtures("short_tokenizer")
def test_a_tokenizer_reads_pixels_as_its_own_were(tokenizer: str, tmp_path: Path) -> None:
    settings = [*short(2)["settings"], "mean=0.4"]
    with pytest.raises(ValueError, match=r"mean=\[0\.4\].* by mean=\[0\.5\], std=\[0\.5\]"):
        pretrain("beit", "digits", tmp_path, tokenizer=tokenizer, settings=settings)
    pretrain("beit", "digits", tmp_path, settings=settings)
    assert DVAE.from_checkpoint(tmp_path / "tokenizer").pixels.mean.item() == pytest.approx(0.4)


@pytest.mark.usefixtures("short_tokenizer")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nonesuch"}, "nonesuch"),
        ({"model": "R50x1"}, "'R50x1' is of the class ResNetV2"),
        ({"share": 0.01}, r"share=0\.01"),
        ({"share": 2.0}, "share"),
        ({"codes": 1}, "codes=1"),
        ({"steps": 50}, "warmup_steps=100 of 50 steps"),
        ({"settings": ["examples=2000"]}, "examples=2000"),
    ],
)
def test_beit_is_checked_before_a_tokenizer_is_trained(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain("beit", "digits", tmp_path, **options)
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("method", ["masked", "beit"])
def test_pretrain_and_fine_tune(
    method: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line: `fastvit train --weights` takes up all but the classifier, and so does load_checkpoint."""
    brief = ["--data", "digits", "--steps", "3", "--set", "batch_size=16", "warmup_steps=1", "polyak=0"]
    out, fine = tmp_path / "pretrained", tmp_path / "fine"
    own = ["--tokenizer", tokenizer] if method == "beit" else []
    assert cli.main(["pretrain", "--method", method, "--out", str(out), *brief, *own]) == 0
    assert "test loss" in capsys.readouterr().out
    model = fastvit.from_checkpoint(out)
    assert model.windowed == (method == "beit") and model.num_classes == 0
    assert cli.main(["train", "--weights", str(out), "--out", str(fine), *brief, "lr=1e-9"]) == 0
    tuned = fastvit.from_checkpoint(fine)
    assert tuned.num_classes == 10
    for name, value in model.state_dict().items():  # which a learning rate of nothing leaves as they were
        torch.testing.assert_close(tuned.state_dict()[name], value, rtol=0, atol=1e-6)
    classifier = ViT(**{**MODELS["digits_beit" if model.windowed else "digits"], "in_chans": 1, "num_classes": 10})
    head = classifier.head.weight.clone()
    fastvit.load_checkpoint(classifier, out)
    assert torch.equal(classifier.head.weight, head)
    images = torch.randn(2, 1, 16, 16)
    assert_same(classifier.forward_features(images), model.forward_features(images))


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str) -> str:
        assert cli.main(["pretrain", "--data", "digits", "--out", str(tmp_path / "x"), *arguments]) == 2
        return capsys.readouterr().err

    assert "no tokenizer 'vqgan'" in fails("--method", "tokenizer", "--model", "vqgan")
    assert "no checkpoint" in fails("--method", "beit", "--tokenizer", str(tmp_path / "nowhere"))
    assert "did you mean 'lr'" in fails("--method", "masked", "--set", "lrr=1")
    assert "target=pixels is of the method masked" in fails("--method", "beit", "--target", "pixels")
    assert "tokenizer=x is of the method beit" in fails("--method", "masked", "--tokenizer", "x")
    assert "share=0.3 is of the method masked or beit" in fails("--method", "tokenizer", "--share", "0.3")
    assert "codes=8 is of the method beit or tokenizer" in fails("--method", "masked", "--codes", "8")
    assert "has its own" in fails("--method", "beit", "--tokenizer", "x", "--codes", "8")
    assert "ViTs alone; model 'R50x1' is of the class ResNetV2" in fails("--method", "masked", "--model", "R50x1")
    with pytest.raises(ValueError, match=r"'mae'.*masked, beit, tokenizer"):
        pretrain("mae", "digits", tmp_path)


def test_published_recipes() -> None:
    """Appendix B.1.2 of the ViT paper; BEiT's command for ImageNet and its defaults; DALL-E's appendix A.2."""
    masked, beit, tokenizer = (PRETRAINING[name] for name in ("masked", "beit", "tokenizer"))
    assert (masked.lr, masked.steps, masked.batch_size, masked.warmup_steps) == (2e-4, 1_000_000, 4096, 10_000)
    assert (masked.optimizer, masked.decay) == ("adam", "cosine")
    assert (beit.lr, beit.beta2, beit.weight_decay, beit.clip, beit.drop_path) == (1.5e-3, 0.98, 0.05, 3.0, 0.1)
    assert (beit.optimizer, beit.decay, beit.batch_size, beit.epochs) == ("adam", "cosine", 2048, 800)
    assert beit.warmup_steps == round(10 * 1_281_167 / 2048)  # 10 epochs of ImageNet
    assert (tokenizer.lr, tokenizer.beta2, tokenizer.weight_decay, tokenizer.polyak) == (1e-4, 0.999, 1e-4, 0.999)
    assert (tokenizer.optimizer, tokenizer.decay, tokenizer.batch_size) == ("adam", "cosine", 512)
    assert TOKENIZERS[tokenizer.model] == ({"codes": 8192, "halvings": 3, "width": 256}, 6.6)
    assert tokenizer.image_size == 112 and beit.image_size == 224

"""Accuracy, the few-shot probe against scikit-learn's ridge regression, neighbours against a loop; the command."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

import fastvit
from fastvit import cli
from fastvit.data.datasets import Data, Split, open_data
from fastvit.training import build, evaluate
from fastvit.training.augment import evaluation_transform
from fastvit.training.recipes import recipe_of


def features(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(features around a centre of each of three classes, labels)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(9)) * 2
    labels = torch.arange(count) % 3
    return centres[labels] + torch.randn(count, width, generator=generator), labels


def some() -> Data:
    data = open_data("digits")
    return Data(data.train.subset(range(300)), data.test.subset(range(50)), 10, 1)


def test_accuracy() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.0, 0.1, 0.9], [0.2, 0.7, 0.1]])
    assert evaluate.accuracy(scores, torch.tensor([1, 0, 2, 2])) == 0.75
    # ReaL: any of an image's labels is right, and an image without one does not count.
    scores = torch.eye(3)[[0, 1, 2, 0]]
    assert evaluate.real_accuracy(scores, [[0, 2], [0, 2], [2], []]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="4 rows of scores for 3 images"):
        evaluate.real_accuracy(scores, [[0], [1], [2]])
    with pytest.raises(ValueError, match="none of 4 images has a label"):
        evaluate.real_accuracy(scores, [[]] * 4)


@pytest.mark.parametrize(("count", "width"), [(60, 8), (12, 40)])
@pytest.mark.parametrize("penalty", [0.01, 30.0])
def test_the_probe_is_ridge_regression_to_plus_and_minus_1(count: int, width: int, penalty: float) -> None:
    """With more images than features, and fewer; a feature that never changes says nothing."""
    x, labels = features(count, width)
    queries, _ = features(7, width, seed=1)
    x[:, 3] = queries[:, 3] = 2.5
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    std[3] = 1
    targets = torch.full((count, 3), -1.0, dtype=torch.float64)
    targets[range(count), labels] = 1
    ridge = Ridge(alpha=penalty, solver="svd").fit(((x.double() - mean) / std).numpy(), targets.numpy())
    expected = torch.from_numpy(ridge.predict(((queries.double() - mean) / std).numpy()))
    found = evaluate.few_shot(x, labels, queries, 3, penalty)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"penalty=0\.0 is not positive"):
        evaluate.few_shot(x, labels, queries, 3, 0.0)


@pytest.mark.parametrize(("count", "width"), [(24, 5), (12, 30)])
def test_scores_of_images_left_out_are_those_of_refits(count: int, width: int) -> None:
    """And of the penalties within a standard error of the refits' best accuracy that of the least squared error."""
    x, labels = features(count, width, seed=3)
    x += torch.randn(count, width, generator=torch.Generator().manual_seed(4)) * 4
    standard = ((x - x.double().mean(0)) / x.double().std(0, correction=0)).numpy()
    targets = torch.full((count, 3), -1.0, dtype=torch.float64)
    targets[range(count), labels] = 1
    ridge = evaluate.Ridge(x, labels, 3)
    merits = {}
    for penalty in evaluate.PENALTIES:
        expected = torch.empty(count, 3, dtype=torch.float64)
        for i in range(count):
            rest = [k for k in range(count) if k != i]
            fit = Ridge(alpha=penalty, solver="svd").fit(standard[rest], targets[rest].numpy())
            expected[i] = torch.from_numpy(fit.predict(standard[i : i + 1]))[0]
        found = ridge.left_out(ridge.coordinates(x), targets, penalty)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
        merits[penalty] = evaluate.accuracy(expected, labels), float((targets - expected).square().sum())
    best = max(right for right, _ in merits.values())
    good = {p: error for p, (right, error) in merits.items() if right >= best - math.sqrt(best * (1 - best) / count)}
    assert 1 < len(good) < len(merits)
    assert evaluate.best_penalty(x, labels, 3) == min(good, key=lambda p: good[p])


# Images of each class, features, deviation of the noise along its first axis and its last. Small penalties fit noise;
# great ones know the largest class alone, or with few images of many classes have the least squared error.
PROBED = {"unlike": ([60, 20, 10], 80, 2.0, 2.0), "few": ([2] * 60, 160, 12.0, 0.12)}


@pytest.mark.parametrize("counts, width, first, last", PROBED.values(), ids=PROBED)
def test_the_chosen_penalty_does_well_on_other_images(counts: list[int], width: int, first: float, last: float) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(len(counts), width, generator=generator)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    noise = axes * torch.logspace(math.log10(first), math.log10(last), width)

    def images(labels: Tensor) -> Tensor:
        return centres[labels] + torch.randn(len(labels), width, generator=generator) @ noise.T

    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x, others = images(labels), labels.repeat(20)
    queries = images(others)
    right = {
        p: evaluate.accuracy(evaluate.few_shot(x, labels, queries, len(counts), p), others) for p in evaluate.PENALTIES
    }
    best = max(right.values())
    assert right[evaluate.best_penalty(x, labels, len(counts))] > best - 0.02
    assert sum(one > best - 0.02 for one in right.values()) < 6
    assert max(right[evaluate.PENALTIES[0]], right[evaluate.PENALTIES[-1]]) < best - 0.05


def test_images_that_are_alone_in_their_class_choose_no_penalty() -> None:
    """Without it the rest tells nothing of its class; with none but such the middle is chosen."""
    x, _ = features(9, 6)
    assert evaluate.best_penalty(x, torch.arange(9), 9) == evaluate.PENALTIES[15] == 32
    assert evaluate.best_penalty(x[:1], torch.zeros(1, dtype=torch.int64), 3) == 32


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = call(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in pytree.tree_leaves(found) if isinstance(t, Tensor))])
        return found


def test_probes_never_hold_all_images_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces they find the same, and make nothing that has more elements than there are images."""
    x, labels = features(700, 6)
    queries, _ = features(40, 6, seed=1)

    def probes() -> tuple[Tensor, Tensor, float]:
        return (
            evaluate.few_shot(x, labels, queries, 3, 2.0),
            evaluate.nearest(x, labels, queries, 3, k=20),
            evaluate.best_penalty(x, labels, 3),
        )

    whole = probes()
    monkeypatch.setattr(evaluate, "CHUNK", 16)
    with Largest() as largest:
        pieces = probes()
    assert largest.numel <= 700
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


def test_shots() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    chosen = evaluate.shots(labels, 3)
    assert sorted(labels[chosen].tolist()) == [0, 0, 0, 1, 1, 1]
    assert len(set(chosen.tolist())) == 6
    assert {tuple(evaluate.shots(labels, 1, seed).tolist()) for seed in range(8)} > {(0, 1)}
    with pytest.raises(ValueError, match="class 1 has 3 training images; shots=4"):
        evaluate.shots(labels, 4)


def test_neighbours_vote_by_their_likeness() -> None:
    x, labels = features(40, 5)
    queries, _ = features(6, 5, seed=2)
    found = evaluate.nearest(x, labels, queries, 3, k=7, temperature=0.2)
    for row, query in zip(found, queries, strict=True):
        cosine = [float(torch.cosine_similarity(query.double(), other.double(), dim=0)) for other in x]
        best = sorted(range(40), key=lambda i: -cosine[i])[:7]
        votes = [sum(math.exp((cosine[i] - 1) / 0.2) for i in best if labels[i] == k) for k in range(3)]
        assert row.tolist() == pytest.approx(votes)
    for k in (0, 41):
        with pytest.raises(ValueError, match=f"k={k}; accepted: 1 to 40"):
            evaluate.nearest(x, labels, queries, 3, k=k)


@pytest.fixture
def model() -> fastvit.ViT:
    torch.manual_seed(0)
    found = build.model_of("digits", recipe_of("digits"), some())
    assert isinstance(found, fastvit.ViT)
    return found


def test_evaluate(model: fastvit.ViT) -> None:
    """Each figure is what the pieces say, on what the classifier reads."""
    data = some()
    small = (torch.stack([s.image(i) for i in range(len(s))]) for s in (data.train, data.test))
    images = [resize(i, [16, 16], InterpolationMode.BICUBIC) * 2 - 1 for i in small]
    model.eval()
    with torch.no_grad():
        logits = model(images[1])
        train, test = (model.forward_head(model.forward_features(i), pre_logits=True) for i in images)
    of = data.train.labels
    right = evaluate.accuracy(logits, data.test.labels)
    assert evaluate.evaluate(model, data) == {"classifier": right}
    guesses = logits.argmax(1).tolist()
    real = [[guess, 3] if i % 4 else [] for i, guess in enumerate(guesses)]
    real[1] = [(guesses[1] + 1) % 10]
    count = len(guesses) - len(guesses[::4])
    assert evaluate.evaluate(model, data, real=real) == {"classifier": right, "ReaL": (count - 1) / count}
    votes = evaluate.nearest(train, of, test, 10)
    assert evaluate.evaluate(model, data, "knn") == {"knn": evaluate.accuracy(votes, data.test.labels)}
    chosen = evaluate.shots(of, 10)
    penalty = evaluate.best_penalty(train[chosen], of[chosen], 10)
    scores = evaluate.few_shot(train[chosen], of[chosen], test, 10, penalty)
    found = evaluate.evaluate(model, data, "few-shot", 10)["few-shot"]
    assert found == pytest.approx(evaluate.accuracy(scores, data.test.labels), abs=0.021)  # an image on the border
    assert found > 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_name_the_image(bad: float) -> None:
    shades = Split(lambda i: torch.full((1, 8, 8), i / 10), torch.zeros(10, dtype=torch.int64), lambda i: f"shade {i}")
    with pytest.raises(ValueError, match="the model's outputs for shade 6 are NaN or infinite"):
        evaluate.outputs(
            lambda images: torch.where(images.flatten(1) > 0.1, bad, 0.0), shades, evaluation_transform(8), batch=4
        )


def test_a_model_with_nan_has_no_accuracy(model: fastvit.ViT) -> None:
    data = some()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = math.nan
    for probe in (None, "few-shot", "knn"):
        with pytest.raises(ValueError, match=f"outputs for {(data.train if probe else data.test).name(0)} are NaN"):
            evaluate.evaluate(model, data, probe)


def test_pixels_and_sizes_are_those_of_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run's folder, ResNets' too, which take any size; unless the command names others."""
    monkeypatch.setattr(evaluate, "open_data", lambda source, whole: some())
    recipe = recipe_of("digits").override(["image_size=32", "mean=0.1", "std=0.3"])
    images = torch.stack([resize(some().test.image(i), [32, 32], InterpolationMode.BICUBIC) for i in range(50)])
    for name in ("R50x1", "digits"):
        torch.manual_seed(0)
        model = build.model_of(name, recipe, some()).eval()
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(build.describe(model, recipe)))
        run = ["evaluate", "--weights", str(tmp_path), "--data", "digits"]
        for more, mean, std in (([], 0.1, 0.3), (["--mean", "0.9", "--std", "0.1"], 0.9, 0.1)):
            with torch.no_grad():
                expected = evaluate.accuracy(model((images - mean) / std), some().test.labels)
            assert cli.main([*run, *more]) == 0
            assert capsys.readouterr().out.split()[-1] == f"{expected:.2%}"
    assert cli.main([*run, "--mean", "1", "2", "3"]) == 2
    assert "mean: 3 numbers; accepted: 1, or 1" in capsys.readouterr().err


def test_evaluate_refuses(model: fastvit.ViT) -> None:
    data = some()
    with pytest.raises(ValueError, match="probe='svm'; accepted: 'few-shot', 'knn'"):
        evaluate.evaluate(model, data, "svm")
    with pytest.raises(ValueError, match="shots=5 are a probe's"):
        evaluate.evaluate(model, data, count=5)
    with pytest.raises(ValueError, match="without a probe"):
        evaluate.evaluate(model, data, "knn", real=[[0]] * len(data.test))
    with pytest.raises(ValueError, match="knn learns from training images, and there are none"):
        evaluate.evaluate(model, replace(data, train=data.train.subset([])), "knn")
    model.reset_classifier(7)
    with pytest.raises(ValueError, match="the model has 7 classes and the data 10"):
        evaluate.evaluate(model, data)
    with pytest.raises(ValueError, match="takes 1 channels, and the images have 3"):
        evaluate.evaluate(model, Data(data.train, data.test, 10, 3))


def test_command(model: fastvit.ViT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(build.describe(model, recipe_of("digits"))))
    expected = evaluate.evaluate(model, open_data("digits"), "knn")["knn"]
    capsys.readouterr()
    assert cli.main(["evaluate", "--weights", str(tmp_path), "--data", "digits", "--probe", "knn"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["test", "images", "accuracy"]
    assert row.split() == ["knn", "360", f"{expected:.2%}"]
    assert cli.main(["evaluate", "--weights", str(tmp_path / "none"), "--data", "digits"]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert cli.main(["evaluate", "--weights", str(tmp_path), "--data", "digits", "--shots", "5"]) == 2
    assert "shots=5 are a probe's" in capsys.readouterr().err


def test_command_says_what_it_assumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints what the library logs: here that a folder without a test set is split."""
    for i in range(20):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), i).save(path)
    command = ["evaluate", "--weights", str(tmp_path / "none"), "--data", str(tmp_path / "images")]
    with monkeypatch.context() as fresh:  # a process in which nothing has configured logging
        fresh.setattr(logging.root, "handlers", [])
        fresh.setattr(logging.root, "level", logging.WARNING)
        assert cli.main(command) == 2
        assert "2 of 20 images are held out for testing\n" in capsys.readouterr().err


def test_real_labels(model: fastvit.ViT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They go by the number in an image's name, wherever it stands in the order."""
    for place, number in enumerate((3, 1, 2)):
        path = tmp_path / "val" / f"n{place}" / f"ILSVRC2012_val_{number:08}.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (16, 16)).save(path)
    (tmp_path / "real.json").write_text("[[1], [], [0, 2]]")
    source = str(tmp_path / "val")
    data = open_data(source, whole=True)
    assert (len(data.train), data.test.labels.tolist(), data.classes) == (0, [0, 1, 2], 3)
    assert evaluate.real_labels(tmp_path / "real.json", data.test) == [[0, 2], [1], []]

    torch.manual_seed(0)
    color = build.model_of("digits", recipe_of("digits"), replace(data, channels=3))
    save_file(color.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(build.describe(color, recipe_of("digits"))))
    command = ["evaluate", "--weights", str(tmp_path), "--data", source, "--whole", "--real"]
    assert cli.main([*command, str(tmp_path / "real.json")]) == 0
    assert capsys.readouterr().out.split()[-3:-1] == ["ReaL", "3"]
    (tmp_path / "short.json").write_text("[[1], []]")
    assert cli.main([*command, str(tmp_path / "short.json")]) == 2
    assert "ILSVRC2012_val_00000003.png is none of the 2 images" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is no list of lists"):
        evaluate.real_labels(tmp_path / "other.json", data.test)


def few_shot_of_pixels(data: Data, count: int | None) -> float:
    """Return the accuracy of the probe on raw pixels."""
    known, queries = (
        evaluate.outputs(lambda images: images.flatten(1), s, evaluation_transform(8)) for s in (data.train, data.test)
    )
    chosen = torch.arange(len(known)) if count is None else evaluate.shots(data.train.labels, count)
    known, labels = known[chosen], data.train.labels[chosen]
    scores = evaluate.few_shot(known, labels, queries, 10, evaluate.best_penalty(known, labels, 10))
    return evaluate.accuracy(scores, data.test.labels)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_features_of_trained_digits_beat_pixels(seed: int, tmp_path: Path) -> None:
    """The few-shot probe, of all training images and of ten of each class."""
    assert cli.main(["train", "--data", "digits", "--out", str(tmp_path), "--seed", str(seed)]) == 0
    model, data = fastvit.from_checkpoint(tmp_path), open_data("digits")
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["accuracy"] > 0.95
    for count in (None, 10):
        found = evaluate.evaluate(model, data, "few-shot", count)["few-shot"]
        assert found > few_shot_of_pixels(data, count)


@pytest.mark.slow
def test_features_without_labels_beat_pixels(tmp_path: Path) -> None:
    """The few-shot probe of all training images, on an encoder that has learned to fill in masked pixels."""
    run = ["pretrain", "--method", "masked", "--target", "pixels", "--data", "digits", "--out", str(tmp_path)]
    assert cli.main([*run, "--set", "crop=affine"]) == 0
    data = open_data("digits")
    found = evaluate.evaluate(fastvit.from_checkpoint(tmp_path), data, "few-shot")["few-shot"]
    assert found > few_shot_of_pixels(data, None) + 0.01

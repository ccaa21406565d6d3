"""Accuracy, the few-shot probe against scikit-learn's ridge regression, neighbours against a loop; the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import Ridge
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

import fastvit
from fastvit import cli, evaluation
from fastvit.training import build
from fastvit.training.data import Data, open_data
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
    assert evaluation.accuracy(scores, torch.tensor([1, 0, 2, 2])) == 0.75


def test_real_accuracy() -> None:
    """Any of an image's labels is right, and an image without one does not count."""
    scores = torch.eye(3)[[0, 1, 2, 0]]
    assert evaluation.real_accuracy(scores, [[0, 2], [0, 2], [2], []]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="4 rows of scores for 3 images"):
        evaluation.real_accuracy(scores, [[0], [1], [2]])
    with pytest.raises(ValueError, match="none of 4 images has a label"):
        evaluation.real_accuracy(scores, [[]] * 4)


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
    found = evaluation.few_shot(x, labels, queries, 3, penalty)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"penalty=0\.0 is not positive"):
        evaluation.few_shot(x, labels, queries, 3, 0.0)


def test_the_penalty_is_chosen_on_images_that_are_held_out() -> None:
    """Two features that tell, among many that don't: some penalty is better than nearly none."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    x = torch.cat([torch.eye(3)[labels], torch.randn(60, 200, generator=generator)], 1)
    queries = torch.cat([torch.eye(3)[labels], torch.randn(60, 200, generator=generator)], 1)
    chosen = evaluation.best_penalty(x, labels, 3)
    assert chosen in evaluation.PENALTIES
    right = {
        p: evaluation.accuracy(evaluation.few_shot(x, labels, queries, 3, p), labels) for p in evaluation.PENALTIES
    }
    assert right[chosen] >= max(right.values()) - 0.1
    assert evaluation.best_penalty(x, labels, 3) == chosen


def test_shots() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    chosen = evaluation.shots(labels, 3)
    assert sorted(labels[chosen].tolist()) == [0, 0, 0, 1, 1, 1]
    assert len(set(chosen.tolist())) == 6
    assert {tuple(evaluation.shots(labels, 1, seed).tolist()) for seed in range(8)} > {(0, 1)}
    with pytest.raises(ValueError, match="class 1 has 3 training images; 4 shots"):
        evaluation.shots(labels, 4)


def test_neighbours_vote_by_their_likeness() -> None:
    x, labels = features(40, 5)
    queries, _ = features(6, 5, seed=2)
    found = evaluation.nearest(x, labels, queries, 3, k=7, temperature=0.2)
    for row, query in zip(found, queries, strict=True):
        cosine = [float(torch.cosine_similarity(query.double(), other.double(), dim=0)) for other in x]
        best = sorted(range(40), key=lambda i: -cosine[i])[:7]
        votes = [sum(math.exp((cosine[i] - 1) / 0.2) for i in best if labels[i] == k) for k in range(3)]
        assert row.tolist() == pytest.approx(votes)
    for k in (0, 41):
        with pytest.raises(ValueError, match=f"k={k}; accepted: 1 to 40"):
            evaluation.nearest(x, labels, queries, 3, k=k)


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
    right = evaluation.accuracy(logits, data.test.labels)
    assert evaluation.evaluate(model, data) == {"classifier": right}
    guesses = logits.argmax(1).tolist()
    real = [[guess, 3] if i % 4 else [] for i, guess in enumerate(guesses)]
    real[1] = [(guesses[1] + 1) % 10]
    count = len(guesses) - len(guesses[::4])
    assert evaluation.evaluate(model, data, real=real) == {"classifier": right, "ReaL": (count - 1) / count}
    votes = evaluation.nearest(train, of, test, 10)
    assert evaluation.evaluate(model, data, "knn") == {"knn": evaluation.accuracy(votes, data.test.labels)}
    chosen = evaluation.shots(of, 10)
    penalty = evaluation.best_penalty(train[chosen], of[chosen], 10)
    scores = evaluation.few_shot(train[chosen], of[chosen], test, 10, penalty)
    found = evaluation.evaluate(model, data, "few-shot", 10)["few-shot"]
    assert found == pytest.approx(evaluation.accuracy(scores, data.test.labels), abs=0.021)  # an image on the border
    assert found > 0.5


def test_evaluate_refuses(model: fastvit.ViT) -> None:
    data = some()
    with pytest.raises(ValueError, match="probe='svm'; accepted: 'few-shot', 'knn'"):
        evaluation.evaluate(model, data, "svm")
    with pytest.raises(ValueError, match="without a probe"):
        evaluation.evaluate(model, data, "knn", real=[[0]] * len(data.test))
    with pytest.raises(ValueError, match="knn learns from training images, and there are none"):
        evaluation.evaluate(model, replace(data, train=data.train.subset([])), "knn")
    model.reset_classifier(7)
    with pytest.raises(ValueError, match="the model has 7 classes and the data 10"):
        evaluation.evaluate(model, data)
    with pytest.raises(ValueError, match="takes 1 channels, and the images have 3"):
        evaluation.evaluate(model, Data(data.train, data.test, 10, 3))


def test_command(model: fastvit.ViT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(build.describe(model, recipe_of("digits"))))
    expected = evaluation.evaluate(model, open_data("digits"), "knn")["knn"]
    capsys.readouterr()
    assert cli.main(["evaluate", "--weights", str(tmp_path), "--data", "digits", "--probe", "knn"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["test", "images", "accuracy"]
    assert row.split() == ["knn", "360", f"{expected:.2%}"]
    assert cli.main(["evaluate", "--weights", str(tmp_path / "none"), "--data", "digits"]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


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
    assert evaluation.real_labels(tmp_path / "real.json", data.test) == [[0, 2], [1], []]

    torch.manual_seed(0)
    color = build.model_of("digits", recipe_of("digits"), replace(data, channels=3))
    save_file(color.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(build.describe(color, recipe_of("digits"))))
    told = ["evaluate", "--weights", str(tmp_path), "--data", source, "--whole", "--real"]
    assert cli.main([*told, str(tmp_path / "real.json")]) == 0
    assert capsys.readouterr().out.split()[-3:-1] == ["ReaL", "3"]
    (tmp_path / "short.json").write_text("[[1], []]")
    assert cli.main([*told, str(tmp_path / "short.json")]) == 2
    assert "ILSVRC2012_val_00000003.png is none of the 2 images" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is no list of lists"):
        evaluation.real_labels(tmp_path / "other.json", data.test)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_features_of_trained_digits_beat_pixels(seed: int, tmp_path: Path) -> None:
    """The few-shot probe, of all training images and of ten of each class."""
    assert cli.main(["train", "--data", "digits", "--out", str(tmp_path), "--seed", str(seed)]) == 0
    model, data = fastvit.from_checkpoint(tmp_path), open_data("digits")
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["accuracy"] > 0.95
    pixels = [evaluation.outputs(lambda images: images.flatten(1), s, 8) for s in (data.train, data.test)]
    for count in (None, 10):
        chosen = torch.arange(len(data.train)) if count is None else evaluation.shots(data.train.labels, count)
        known, labels = pixels[0][chosen], data.train.labels[chosen]
        penalty = evaluation.best_penalty(known, labels, 10)
        raw = evaluation.accuracy(evaluation.few_shot(known, labels, pixels[1], 10, penalty), data.test.labels)
        found = evaluation.evaluate(model, data, "few-shot", count)["few-shot"]
        print(f"seed {seed}, {count or 'all'} shots: features {found:.2%}, pixels {raw:.2%}")
        assert found > raw

"""`fastvit inspect`: what is drawn, for which models, and what it says of bad input."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit import ViT, cli, create_model
from fastvit.analysis import inspect
from fastvit.training.pretrain import DVAE

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
PICTURES = ["filters", "positions", "attention_distance", "rollout"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_every_picture(image: Path, tmp_path: Path, channels: int) -> None:
    model = ViT(**SMALL, in_chans=channels).train()
    found = inspect.inspect([image, image], model, tmp_path / "out", mean=[0.4] * channels)
    assert list(found) == PICTURES
    for name, path in found.items():
        assert path == tmp_path / "out" / f"{name}.png"
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.std() > 10, f"{name} is blank"
    assert model.training


def test_the_model_sees_normalised_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (51, 102, 255)).save(tmp_path / "plain.png")
    model, seen = ViT(**SMALL), list[torch.Tensor]()
    model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inspect.inspect([tmp_path / "plain.png"], model, tmp_path / "out", mean=(0.2, 0.3, 0.5), std=(0.5, 0.2, 0.25))
    [images] = seen
    torch.testing.assert_close(images, torch.tensor([0.0, 0.5, 2.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32))


def test_images_go_through_the_model_once_and_some_at_a_time(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (32, 32), (51, 102, 255)).save(tmp_path / "plain.png")
    images, model = [tmp_path / "plain.png", image, image], ViT(**SMALL)
    drawn: list[torch.Tensor] = []
    for name, at in (("draw_distances", 0), ("draw_rollout", 1)):
        draw = getattr(inspect, name)
        monkeypatch.setattr(inspect, name, lambda *a, draw=draw, at=at: (drawn.append(a[at]), draw(*a))[1])
    inspect.inspect(images, model, tmp_path / "out")
    monkeypatch.setattr(inspect, "_CHUNK", 2)
    sizes: list[int] = []
    model.patch_embed.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    inspect.inspect(images, model, tmp_path / "out")
    assert sizes == [2, 1]
    for whole, chunked in zip(drawn[:2], drawn[2:], strict=True):
        torch.testing.assert_close(whole, chunked)


def test_what_a_model_does_not_have_is_said(image: Path, tmp_path: Path) -> None:
    inspect.inspect([image], ViT(**SMALL), tmp_path)
    assert (tmp_path / "positions.png").exists()
    found = inspect.inspect([image], ViT(**SMALL, pos_embed="none"), tmp_path)
    assert "no position embeddings" in str(found["positions"])
    assert [name for name in PICTURES if isinstance(found[name], Path)] == ["filters", "attention_distance", "rollout"]
    assert not (tmp_path / "positions.png").exists()  # nor an earlier model's


@pytest.mark.parametrize("place", ["layers", "shared"])
def test_positions_that_blocks_add_are_drawn(image: Path, tmp_path: Path, place: str, monkeypatch: Any) -> None:
    titles: list[str] = []
    draw = inspect.draw_similarity
    monkeypatch.setattr(inspect, "draw_similarity", lambda *a: (titles.append(a[1]), draw(*a))[1])
    found = inspect.inspect([image], ViT(**SMALL, pos_embed_at=place), tmp_path)
    assert found["positions"] == tmp_path / "positions.png"
    assert ("of the first block (each has its own)" in titles[0]) == (place == "layers")


def test_tiles() -> None:
    tiles = torch.arange(24.0).view(2, 3, 2, 2)
    whole = inspect._tiled(tiles, -1)
    assert whole.tolist() == [
        [0, 1, -1, 4, 5, -1, 8, 9],
        [2, 3, -1, 6, 7, -1, 10, 11],
        [-1] * 8,
        [12, 13, -1, 16, 17, -1, 20, 21],
        [14, 15, -1, 18, 19, -1, 22, 23],
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_lie_on_a_grey_that_is_none_of_theirs(channels: int) -> None:
    figure = inspect.draw_filters(torch.rand(9, channels, 4, 4))
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape == (9, 34, 3)
    for gap in (canvas[4], canvas[:, 4], canvas[5:, 10:]):
        np.testing.assert_allclose(gap, np.broadcast_to(inspect._GAP, gap.shape), rtol=1e-6)
    np.testing.assert_allclose(figure.get_facecolor()[:3], inspect._GAP)


def test_rollout_is_a_heat_map_with_its_scale_and_the_images_name() -> None:
    images = torch.full((2, 1, 32, 32), 0.8)
    grids = torch.full((2, 4, 4), 0.02)
    grids[0, 1, 2] = 0.3  # 0.6 in all: 8 times the mean
    figure = inspect.draw_rollout(images, grids, ["a.png", "b.png"])
    (one, heat, other, flat), bars = figure.axes[:4], figure.axes[4:]
    assert [axes.get_title() for axes in (one, other)] == ["a.png", "b.png"]
    np.testing.assert_allclose(one.images[0].get_array(), 0.8, rtol=1e-6)
    drawn = heat.images[1]
    assert drawn.get_array()[8:16, 16:24].max() == pytest.approx(8, rel=0.3)
    assert drawn.get_clim() == (0, drawn.get_array().max())
    np.testing.assert_allclose(flat.images[1].get_array(), 1, rtol=1e-6)
    assert flat.images[1].get_clim() == (0, 2)  # a colour in the middle
    assert [bar.get_ylim() for bar in bars] == [drawn.get_clim(), (0, 2)]


def test_distances_are_means_over_images() -> None:
    distances = torch.arange(12.0).view(2, 2, 3)
    [axes] = inspect.draw_distances(distances).axes
    drawn = [points.get_offsets().tolist() for points in axes.collections]
    assert drawn == [[[1, head + 1.5], [2, head + 7.5]] for head in range(3)]
    assert axes.get_ylim() == pytest.approx((0, 1.05 * 9.5))  # no dot is cut by the frame
    assert axes.get_xlabel() == "block (a dot for each of 3 heads)"
    assert axes.get_title().endswith("mean of 2 images")
    [axes] = inspect.draw_distances(torch.zeros(2, 1, 1)).axes
    assert axes.get_xlabel() == "block (a dot for its only head)"
    assert axes.get_title().endswith("of 1 image")


def test_similarity_of_a_large_grid_has_at_most_16_tiles_a_side() -> None:
    axes = inspect.draw_similarity(torch.eye(40 * 3).view(40, 3, 40, 3)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(row) for row in range(1, 41, 3)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]


def test_command(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(ViT(**SMALL).state_dict(), tmp_path / "vit.pth")
    command = ["inspect", str(image), "--weights", str(tmp_path / "vit.pth"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--size", "48", "64"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"saved {tmp_path / 'out' / name}.png" for name in PICTURES]
    assert cli.main([*command, "--size", "64", "128", "32"]) == 2
    assert "--size 64 128 32: accepted: one number, or height and width" in capsys.readouterr().err
    (tmp_path / "image.png").write_bytes(b"no image")
    assert cli.main(command) == 2
    assert "image.png can't be read as an image" in capsys.readouterr().err
    assert cli.main([*command[:-2], "--out", str(tmp_path / "vit.pth")]) == 2


def test_the_command_says_that_heads_are_guessed_or_takes_them(image: Path, tmp_path: Path) -> None:
    torch.save(ViT(**SMALL).state_dict(), tmp_path / "vit.pth")
    command = [sys.executable, "-m", "fastvit", "inspect", image, "--weights", "vit.pth", "--out", "out"]
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "vit.pth: 1 attention heads, 64 features each" in run(command).stderr
    assert "attention heads" not in run([*command, "--num-heads", "2"]).stderr


@pytest.mark.parametrize("heads", [1, 4])
def test_heads_are_those_of_the_argument(image: Path, tmp_path: Path, heads: int, monkeypatch: Any) -> None:
    seen: list[torch.Tensor] = []
    draw = inspect.draw_distances
    monkeypatch.setattr(inspect, "draw_distances", lambda distances: (seen.append(distances), draw(distances))[1])
    inspect.inspect([image], ViT(**SMALL).state_dict(), tmp_path, num_heads=heads)
    assert seen[0].shape == (2, 1, heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "no images; accepted: one file or more"),
        ({"mean": [0.5] * 2}, "mean: 2 numbers; accepted: 1, or 3 as the images have channels"),
        ({"std": []}, "std: 0 numbers; accepted: 1, or 3"),
        ({"std": [0.2, 0.0, 0.2]}, r"std: \[0.2, 0.0, 0.2\]; accepted: finite numbers, above 0"),
        ({"std": [float("inf")]}, r"std: \[inf\]; accepted: finite numbers, above 0"),
        ({"mean": [float("nan")]}, r"mean: \[nan\]; accepted: finite numbers$"),
        ({"num_heads": 2}, "num_heads: 2; accepted with weights; a model has its own"),
        (
            {"weights": dict.fromkeys(("stages.0.blocks.0.conv1.weight", "norm.bias"), torch.ones(1))},
            "it is a ResNet, of fastvit.resnet",
        ),
        ({"weights": create_model("R50x1", num_classes=2).state_dict()}, "those of a ResNetV2; accepted: a ViT's"),
        (
            {"weights": create_model("R50x1").state_dict(), "size": (8, 8)},
            "has the names of a ResNetV2, but: .* 'img_size'",
        ),
        ({"weights": DVAE([0.5], [0.5], 4, 1, 4).state_dict()}, "it is a tokenizer, fastvit.training.pretrain.DVAE"),
        ({"weights": ViT(**SMALL, in_chans=4)}, "images of 4 channels; accepted: 1 or 3"),
        ({"size": (64, 64)}, r"size: \(64, 64\); accepted with weights; a model has its own"),
    ],
)
def test_bad_input(image: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": [image], "weights": ViT(**SMALL), "out": tmp_path / "out", **change}
    with pytest.raises(ValueError, match=message):
        inspect.inspect(**arguments)
    assert not (tmp_path / "out").exists()

"""`fastvit inspect`: what is drawn, for which models, and what it says of bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit import ViT, cli, inspect

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
    assert len(seen) == 2
    for images in seen:
        torch.testing.assert_close(images, torch.tensor([0.0, 0.5, 2.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32))


def test_what_a_model_does_not_have_is_said(image: Path, tmp_path: Path) -> None:
    found = inspect.inspect([image], ViT(**SMALL, pos_embed="none"), tmp_path)
    assert "no position embeddings" in str(found["positions"])
    assert [name for name in PICTURES if isinstance(found[name], Path)] == ["filters", "attention_distance", "rollout"]
    assert not (tmp_path / "positions.png").exists()


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


def test_rollout_lights_what_it_weighs() -> None:
    images = torch.full((1, 1, 32, 32), 0.8)
    grid = torch.zeros(1, 4, 4)
    grid[0, 1, 2] = 0.3
    before, lit = (axes.images[0].get_array() for axes in inspect.draw_rollout(images, grid).axes)
    np.testing.assert_allclose(before, 0.8, rtol=1e-6)
    assert lit[8:16, 16:24].max() == pytest.approx(0.8, rel=0.2)
    assert lit[24:].max() == 0


def test_distances_are_means_over_images() -> None:
    distances = torch.arange(12.0).view(2, 2, 3)
    [axes] = inspect.draw_distances(distances).axes
    drawn = [points.get_offsets().tolist() for points in axes.collections]
    assert drawn == [[[1, head + 1.5], [2, head + 7.5]] for head in range(3)]


def test_similarity_of_a_large_grid_has_at_most_16_tiles_a_side() -> None:
    axes = inspect.draw_similarity(torch.eye(40 * 3).view(40, 3, 40, 3)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(row) for row in range(1, 41, 3)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]


def test_command(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(ViT(**SMALL).state_dict(), tmp_path / "vit.pth")
    asked = ["inspect", str(image), "--weights", str(tmp_path / "vit.pth"), "--out", str(tmp_path / "out")]
    assert cli.main([*asked, "--size", "48", "64"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"saved {tmp_path / 'out' / name}.png" for name in PICTURES]
    (tmp_path / "image.png").write_bytes(b"no image")
    assert cli.main(asked) == 2
    assert "image.png can't be read as an image" in capsys.readouterr().err
    assert cli.main([*asked[:-2], "--out", str(tmp_path / "vit.pth")]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "no images; accepted: one file or more"),
        ({"mean": [0.5] * 2}, "mean: 2 numbers; accepted: 1, or 3 as the model's channels"),
        ({"std": []}, "std: 0 numbers; accepted: 1, or 3"),
        ({"weights": ViT(**SMALL, in_chans=4)}, "images of 4 channels; accepted: 1 or 3"),
        ({"size": (64, 64)}, "size: accepted with weights; a model has its own"),
    ],
)
def test_bad_input(image: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": [image], "weights": ViT(**SMALL), "out": tmp_path / "out", **change}
    with pytest.raises(ValueError, match=message):
        inspect.inspect(**arguments)
    assert not (tmp_path / "out").exists()

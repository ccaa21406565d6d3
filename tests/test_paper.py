"""The ViT paper's numbers and equations against the model; docs/explanation/paper.md lists where the rest is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastvit import ViT, create_model
from fastvit.training.recipes import RECIPES

# Table 1: layers, hidden size, MLP size, heads, parameters in millions.
TABLE_1 = {
    "ViT-B/16": (12, 768, 3072, 12, 86),
    "ViT-L/16": (24, 1024, 4096, 16, 307),
    "ViT-H/14": (32, 1280, 5120, 16, 632),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name: str) -> None:
    layers, width, hidden, heads, millions = TABLE_1[name]
    model = create_model(name, device="meta")
    assert (len(model.blocks), model.embed_dim) == (layers, width)
    assert (model.blocks[0].mlp.fc1.out_features, model.blocks[0].attn.num_heads) == (hidden, heads)
    block = 4 * width * width + 4 * width + 2 * width * hidden + hidden + width + 4 * width
    patch = 14 if name == "ViT-H/14" else 16
    tokens = (224 // patch) ** 2 + 1
    outside = (3 * patch * patch + 1) * width + (tokens + 1) * width + 2 * width + 1000 * (width + 1)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == layers * block + outside
    assert abs(count / 1e6 - millions) <= 0.011 * millions  # which head and patch the paper counts it doesn't say


def test_equations() -> None:
    """Equations 1 to 8, letter by letter, in float64."""
    side, patch, width, layers, heads = 24, 8, 32, 3, 4
    model = ViT(img_size=side, patch_size=patch, embed_dim=width, depth=layers, num_heads=heads, num_classes=5)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    state = model.state_dict()
    image = torch.randn(2, 3, side, side, dtype=torch.float64)

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(name: str, z: Tensor) -> Tensor:
        per_head = width // heads
        q, k, v = dense(f"{name}.qkv", z).chunk(3, -1)  # 5: U_qkv of all heads side by side
        found = []
        for head in range(heads):
            mine = slice(head * per_head, (head + 1) * per_head)
            weights = (q[..., mine] @ k[..., mine].transpose(1, 2) / math.sqrt(per_head)).softmax(-1)  # 6
            found.append(weights @ v[..., mine])  # 7
        return dense(f"{name}.proj", torch.cat(found, -1))  # 8

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    patches = [
        image[:, :, i : i + patch, j : j + patch].flatten(1)
        for i in range(0, side, patch)
        for j in range(0, side, patch)
    ]
    embedded = dense("patch_embed.proj", torch.stack(patches, 1))
    z = torch.cat([state["cls_token"].expand(2, -1, -1), embedded], 1) + state["pos_embed"]  # 1
    for layer in range(layers):
        block = f"blocks.{layer}"
        z = attention(f"{block}.attn", norm(f"{block}.norm1", z)) + z  # 2
        z = dense(f"{block}.mlp.fc2", gelu(dense(f"{block}.mlp.fc1", norm(f"{block}.norm2", z)))) + z  # 3
    y = norm("norm", z[:, 0])  # 4
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_head(model.forward_features(image), pre_logits=True), y, rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(model(image), dense("head", y), rtol=1e-10, atol=1e-12)


def test_what_the_table_of_the_paper_names_is_there() -> None:
    """Recipes and models of docs/explanation/paper.md; tests/test_docs.py has its files, links and commands."""
    text = (Path(__file__).parent.parent / "docs" / "explanation" / "paper.md").read_text()
    assert len(re.findall(r"`(?:tests|fastvit|examples|benchmarks)/", text)) > 10
    assert len(re.findall(r"`(fastvit [a-z]+ [^`]+)`", text)) >= 5
    recipes = re.findall(r"`((?:vit|finetune|resnet|hybrid)_(?:jft|imagenet|cifar|vtab)\w*)`", text)
    patterns = re.findall(r"`(\w+_\w*)\*`", text)
    models = re.findall(r"create_model\(\"([^\"*]+)\"\)", text)
    assert len(recipes) >= 3 and len(patterns) >= 4 and len(models) >= 2
    for name in recipes:
        assert name in RECIPES, name
    for pattern in patterns:
        assert any(name.startswith(pattern) for name in RECIPES), pattern
    for name in models:
        create_model(name, device="meta")

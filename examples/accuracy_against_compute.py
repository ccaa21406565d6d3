"""Accuracy against training compute of ViTs, hybrids and ResNets on scanned digits: the ViT paper's figure 5, small.

Run: python examples/accuracy_against_compute.py [--out accuracy-against-compute] [--seeds 0] [--epochs 2 6 18]

Every model of three families is trained by one recipe for each number of epochs. OUT gets compute.csv and compute.png;
runs in it that were cut off go on.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from fastvit import ViT
from fastvit.data.datasets import digits
from fastvit.models import HybridEmbed, ResNetV2
from fastvit.training import loop
from fastvit.training.objectives import Classification
from fastvit.training.recipes import recipe_of
from fastvit.tuning import flops

SIZE = 32  # pixels a side, as a ResNet halves them five times
VIT: Any = partial(ViT, img_size=SIZE, in_chans=1, num_classes=10)
PATCHES: Any = partial(VIT, patch_size=4)
HYBRID: Any = partial(VIT, patch_size=1, embed_layer=partial(HybridEmbed, layers=(1, 1)))
RESNET: Any = partial(ResNetV2, in_chans=1, num_classes=10)
MODELS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "ViT": {
        "4 x 64": partial(PATCHES, embed_dim=64, depth=4, num_heads=2),
        "6 x 128": partial(PATCHES, embed_dim=128, depth=6, num_heads=4),
    },
    "hybrid": {
        "R(1, 1) + 4 x 64": partial(HYBRID, embed_dim=64, depth=4, num_heads=2),
        "R(1, 1) + 6 x 128": partial(HYBRID, embed_dim=128, depth=6, num_heads=4),
    },
    "ResNet": {"R(1, 1, 1, 1)": partial(RESNET, (1, 1, 1, 1)), "R(2, 2, 2, 2)": partial(RESNET, (2, 2, 2, 2))},
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("accuracy-against-compute"))
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--epochs", type=float, nargs="+", default=[2, 6, 18])
parser.add_argument("--warmup", type=int, default=20, help="steps")
parser.add_argument("--families", nargs="+", choices=MODELS, default=list(MODELS))
arguments = parser.parse_args()
data = digits()


def accuracy(build: Callable[[], nn.Module], epochs: float, seed: int, out: Path) -> float:
    """Percent right of the test set."""
    settings = [f"epochs={epochs}", f"image_size={SIZE}", f"warmup_steps={arguments.warmup}", "polyak=0"]
    torch.manual_seed(seed)
    objective = Classification(build(), data.classes)
    found = loop.train(objective, data, recipe_of("digits").override(settings), out, seed=seed)
    return 100 * found["test"]["accuracy"]


rows = []
for family in arguments.families:
    for name, build in MODELS[family].items():
        each = flops.count(build(), SIZE, training=True).total
        for epochs in arguments.epochs:
            compute = each * epochs * len(data.train)
            folders = [arguments.out / f"{family} {name} {epochs:g} {seed}" for seed in arguments.seeds]
            right = [accuracy(build, epochs, *run) for run in zip(arguments.seeds, folders, strict=True)]
            rows.append([family, name, epochs, compute / 1e12, *right])
            print(f"{family:7} {name:18} {epochs:4g} epochs {compute / 1e12:7.3f} TFLOP: {mean(right):.2f}%")

with (arguments.out / "compute.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["family", "model", "epochs", "TFLOP", *(f"accuracy (%), seed {seed}" for seed in arguments.seeds)])
    writer.writerows(rows)

lines = defaultdict(list)
for family, name, _, compute, *right in rows:
    lines[family, name].append((compute, mean(right)))
figure = Figure((8, 4.2), layout="constrained")
axes = figure.subplots()
for (family, name), points in lines.items():
    at = list(MODELS).index(family)
    marker = "o" if name == next(iter(MODELS[family])) else "s"
    axes.plot(*zip(*points, strict=True), color=f"C{at}", marker=marker, label=f"{family} {name}")
axes.set(xscale="log", xlabel="training compute (TFLOP)", ylabel="accuracy on 360 test images (%)")
runs = "one run each" if len(arguments.seeds) == 1 else f"mean of {len(arguments.seeds)} runs each"
axes.set_title(f"Scanned digits, {runs}", fontsize="medium")
axes.grid(alpha=0.3)
figure.legend(loc="outside right center", fontsize="small")
figure.savefig(arguments.out / "compute.png", dpi=150)
print(f"saved {arguments.out / 'compute.csv'} and compute.png")

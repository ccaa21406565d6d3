"""Pre-train on all digits without labels, then learn from a tenth of the labels; beside learning from scratch.

Run: python examples/pretrain_digits.py [--start scratch masked scratch_beit beit] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from fastvit.data.datasets import digits
from fastvit.training import loop
from fastvit.training.build import model_of
from fastvit.training.objectives import Classification
from fastvit.training.pretrain.build import pretrain
from fastvit.training.recipes import recipe_of

LABELS = 144  # of 1,437
MODELS = {"scratch": "digits", "masked": "digits", "scratch_beit": "digits_beit", "beit": "digits_beit"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--start", choices=MODELS, nargs="+", default=["scratch", "masked"])
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--pretraining-steps", type=int, default=1000)
parser.add_argument("--steps", type=int, default=600, help="with labels")
parser.add_argument("--lr", type=float, nargs="+", default=[3e-3], help="of training with labels; each is tried")
parser.add_argument("--out", type=Path, help="folder to keep the runs in; runs in it go on where they were cut off")
arguments = parser.parse_args()
out = arguments.out or Path(tempfile.mkdtemp())
data = digits()


def accuracy(start: str, seed: int, lr: float) -> float:
    """Percent right, after learning from the seed's labels."""
    weights = None
    if not start.startswith("scratch"):
        pretrain(start, "digits", weights := out / f"{start}-{seed}", steps=arguments.pretraining_steps, seed=seed)
    recipe = recipe_of("digits").override([f"steps={arguments.steps}", f"lr={lr}", "mixup=0", f"examples={LABELS}"])
    torch.manual_seed(seed)
    model = model_of(MODELS[start], recipe, data, None if weights is None else str(weights))
    run = out / f"{start}-{seed}-{arguments.steps}-{lr}"
    found = loop.train(Classification(model, data.classes), data, recipe, run, seed=seed)
    return 100 * found["test"]["accuracy"]


print(f"{LABELS} labels, {arguments.steps} steps; percent right of {len(data.test)} test images")
for start in arguments.start:
    for lr in arguments.lr:
        found = torch.tensor([accuracy(start, seed, lr) for seed in arguments.seeds])
        each = ", ".join(f"{value:.1f}" for value in found)
        spread = f" ± {found.std():.1f}" if len(found) > 1 else ""
        print(f"{start:12} lr {lr:g}: {found.mean():.1f}{spread} ({each})", flush=True)

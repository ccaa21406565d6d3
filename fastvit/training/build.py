"""A run from the names on a command line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvit.models import ViT, create_model, from_checkpoint, list_models
from fastvit.training import loop
from fastvit.training.data import Data, open_data
from fastvit.training.objectives import Classification
from fastvit.training.recipes import Recipe, recipe_of

# Models of this room, for `digits` at twice their size: 16 patches and a class token.
MODELS: dict[str, dict[str, Any]] = {
    "digits": {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "global_pool": "avg",
    }
}
# The same as a BEiT.
MODELS["digits_beit"] = {
    **MODELS["digits"],
    "init_values": 0.1,
    "pos_embed": "none",
    "use_rel_pos_bias": True,
}

# The recipe of a data set for which none is named.
DEFAULTS = {
    "digits": "digits",
    "cifar10": "finetune_cifar",
    "cifar100": "finetune_cifar",
    "pets": "finetune_pets",
    "flowers102": "finetune_flowers",
    "imagenet": "vit_imagenet",
}


def recipe_for(
    name: str | None, data: str, settings: list[str], steps: int | None = None, weights: str | None = None
) -> Recipe:
    """The recipe that is named, or the data set's own, with what is overridden.

    Raises:
        ValueError: no such recipe, none for this data set, a setting that fits none, or fine-tuning without weights.
    """
    name = name or DEFAULTS.get(data.partition(":")[0])
    if name is None:
        raise ValueError(f"there is no recipe for {data} alone: give one with --recipe; see docs/training.md")
    if name.startswith("finetune_") and weights is None:
        raise ValueError(f"{name} is for a model that is trained: give its --weights, or another --recipe")
    return recipe_of(name).override([*settings, *([] if steps is None else [f"steps={steps}"])])


def model_of(name: str, recipe: Recipe, data: Data, weights: str | None = None, **arguments: Any) -> nn.Module:
    """The model that a run trains, with the recipe's dropout and image size and the data's classes and channels.

    Args:
        name: of :data:`MODELS`, or what :func:`fastvit.create_model` takes. With ``weights`` it is the file's model.
        weights: a checkpoint to start from, resampled to the image size; a new classifier starts at zero.
        **arguments: more of :class:`fastvit.ViT`.
    """
    given: dict[str, Any] = {"in_chans": data.channels, **arguments}
    if name in list_models("resnetv2_*") or name.startswith("R"):
        if weights is not None:
            raise ValueError(f"weights={weights}: of a ResNet, accepted is none")
        return create_model(name, num_classes=data.classes, **given)
    given |= {
        "img_size": recipe.image_size,
        "pos_drop_rate": recipe.dropout,
        "proj_drop_rate": recipe.dropout,
        "drop_path_rate": recipe.drop_path,
    }
    if weights is not None:
        model = from_checkpoint(weights, num_classes=0, **given)
        model.reset_classifier(data.classes)
        return model
    given["num_classes"] = data.classes
    return ViT(**MODELS[name] | given) if name in MODELS else create_model(name, **given)


def describe(model: nn.Module, out: str | Path) -> None:
    """Write config.json, as timm has it: with model.safetensors the folder is one that ``from_checkpoint`` takes."""
    if isinstance(model, ViT):
        heads = model.blocks[0].attn.num_heads  # type: ignore[union-attr]
        told = {"img_size": list(model.patch_embed.img_size), "num_heads": heads, "global_pool": model.global_pool}
        (Path(out) / "config.json").write_text(json.dumps({"model_args": told}, indent=1))


def main(arguments: argparse.Namespace) -> int:
    """``fastvit train``."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        recipe = recipe_for(arguments.recipe, arguments.data, arguments.set, arguments.steps, arguments.weights)
        data = open_data(arguments.data)
        if arguments.model and arguments.weights:
            raise ValueError(f"--model {arguments.model}: the model is that of --weights {arguments.weights}")
        name = arguments.model or recipe.model
        torch.manual_seed(arguments.seed)
        model = model_of(name, recipe, data, arguments.weights)
        objective = Classification(model, data.classes, recipe.label_smoothing, recipe.mixup)
        found = loop.train(
            objective,
            data,
            recipe,
            arguments.out,
            seed=arguments.seed,
            options=loop.options_of(arguments),
            described={"data": arguments.data, "model": name, "weights": arguments.weights},
        )
    except (ValueError, OSError, ImportError, loop.Diverged) as error:
        print(f"fastvit train: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        describe(model, arguments.out)
        print(f"test accuracy: {found['test']['accuracy']:.2%}")
    return 0

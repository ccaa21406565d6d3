"""A run from the names on a command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastvit.checkpoints import files
from fastvit.checkpoints.infer import arguments_not_in_shapes
from fastvit.data.datasets import Data, open_data
from fastvit.models import ViT, create_model, from_checkpoint
from fastvit.models.axial import AxialResNet
from fastvit.models.registry import is_resnet, model_class
from fastvit.models.resnet import ResNetV2
from fastvit.training import loop
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
    **dict.fromkeys(("caltech101", "clevr", "dtd", "eurosat", "pcam", "sun397", "svhn"), "finetune_vtab"),
}
FINETUNING = {"vit_imagenet": "finetune_imagenet"}  # in its place where there are weights to start from


def recipe_for(
    name: str | None, data: str, settings: list[str], steps: int | None = None, weights: str | None = None
) -> Recipe:
    """The recipe that is named, or the data set's own, with what is overridden; pixels are normalised as ``weights``
    say that theirs were.

    Raises:
        ValueError: no such recipe, none for this data set, a setting that fits none, or fine-tuning without weights.
    """
    if name is None:
        name = DEFAULTS.get(data.partition(":")[0])
        name = FINETUNING.get(name or "", name) if weights is not None else name
    if name is None:
        raise ValueError(f"there is no recipe for {data} alone: give one with --recipe; see docs/training.md")
    if name.startswith("finetune_") and weights is None:
        raise ValueError(f"{name} is for a model that is trained: give its --weights, or another --recipe")
    recipe = recipe_of(name)
    if weights is not None:
        mean, std = files.pixel_statistics(weights)
        recipe = replace(recipe, mean=mean, std=std)
    return recipe.override([*settings, *([] if steps is None else [f"steps={steps}"])])


def model_of(name: str, recipe: Recipe, data: Data, weights: str | None = None, **arguments: Any) -> nn.Module:
    """The model that a run trains, with the recipe's dropout and image size and the data's classes and channels.

    Args:
        name: of :data:`MODELS`, or what :func:`fastvit.create_model` takes. With ``weights`` it is the file's model.
        weights: a checkpoint to start from, resampled to the image size; a new classifier starts at zero.
        **arguments: more of :class:`fastvit.ViT`.

    Raises:
        ValueError: no such model or weights, or a ResNet with what it can't have: dropout, images of other channels.
    """
    given: dict[str, Any] = {"in_chans": data.channels, "drop_path_rate": recipe.drop_path, **arguments}
    raw = None if weights is None else files.read(weights)
    if raw is not None:
        kind: type[nn.Module] = ResNetV2 if is_resnet(raw) else ViT
    else:
        kind = ViT if name in MODELS else model_class(name)
    if issubclass(kind, ResNetV2):
        if recipe.dropout:
            raise ValueError(f"dropout={recipe.dropout}: of a ResNet, accepted is 0 (--set dropout=0)")
        if issubclass(kind, AxialResNet):
            given["img_size"] = recipe.image_size
    else:
        given |= {
            "img_size": recipe.image_size,
            "pos_drop_rate": recipe.dropout,
            "proj_drop_rate": recipe.dropout,
        }
    if raw is not None:
        model = from_checkpoint(raw, num_classes=0, **given)
        model.reset_classifier(data.classes)
        return model
    given["num_classes"] = data.classes
    return ViT(**MODELS[name] | given) if name in MODELS else create_model(name, **given)


def describe(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """A config.json, as timm has it: with model.safetensors the folder is one that ``from_checkpoint`` takes."""
    size = [model.in_chans, recipe.image_size, recipe.image_size]
    pixels = {"input_size": size, "mean": list(recipe.mean), "std": list(recipe.std)}
    return {"model_args": arguments_not_in_shapes(model) if isinstance(model, ViT) else {}, "pretrained_cfg": pixels}


def run(command: str, call: Callable[[], str]) -> int:
    """Do what a command is for, print what it says, and return the exit status; what goes wrong is told in a line."""
    try:
        told = call()
    except loop.Stopped as stopped:
        print(f"fastvit {command}: {stopped}", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        print(f"fastvit {command}: {error}\nFewer images at a time need less: --set micro_batch=64", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, loop.Diverged) as error:
        print(f"fastvit {command}: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(told)
    return 0


def main(arguments: argparse.Namespace) -> int:
    """``fastvit train``."""

    def train() -> str:
        recipe = recipe_for(arguments.recipe, arguments.data, arguments.set, arguments.steps, arguments.weights)
        data = open_data(arguments.data)
        if arguments.model and arguments.weights:
            raise ValueError(f"--model {arguments.model}: the model is that of --weights {arguments.weights}")
        name = arguments.model or recipe.model
        torch.manual_seed(arguments.seed)
        model = model_of(name, recipe, data, arguments.weights)
        found = loop.train(
            Classification(model, data.classes, recipe.label_smoothing, recipe.mixup),
            data,
            recipe,
            arguments.out,
            seed=arguments.seed,
            options=loop.options_of(arguments),
            described={"data": os.path.normpath(arguments.data), "model": name, "weights": arguments.weights},
            config=describe(model, recipe),
        )
        return f"test accuracy: {found['test']['accuracy']:.2%}"

    return run("train", train)

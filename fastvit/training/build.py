"""A run by names: of a data set, a recipe, a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvit.checkpoints import files
from fastvit.checkpoints.infer import arguments_not_in_shapes
from fastvit.data.datasets import Data, open_data
from fastvit.models import ViT, create_model, from_checkpoint
from fastvit.models.axial import AxialResNet
from fastvit.models.families import family_of
from fastvit.models.registry import model_class
from fastvit.models.resnet import ResNetV2
from fastvit.training import loop
from fastvit.training.objectives import Classification
from fastvit.training.recipes import Recipe, recipe_of

# Models of this package, for `digits` at twice their size: 16 patches and a class token.
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
MODELS["digits_beit"] = {**MODELS["digits"], "init_values": 0.1, "pos_embed": "none", "use_rel_pos_bias": True}

# The recipe of a data set, where --recipe names none.
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
    name: str | None, data: str, settings: Sequence[str], steps: int | None = None, weights: str | None = None
) -> Recipe:
    """Return the recipe of a name, or the data set's own, with what is overridden.

    Pixels are normalised as those that ``weights`` were trained with.
    """
    if name is None:
        name = DEFAULTS.get(data.partition(":")[0])
        name = FINETUNING.get(name or "", name) if weights is not None else name
    if name is None:
        raise ValueError(f"no recipe belongs to {data}: choose one with --recipe (docs/explanation/training.md)")
    if name.startswith("finetune_") and weights is None:
        raise ValueError(f"{name} is for a model that is trained: give its --weights, or another --recipe")
    recipe = recipe_of(name)
    if weights is not None:
        mean, std = files.pixel_statistics(weights)
        recipe = replace(recipe, mean=mean, std=std)
    return recipe.override(settings, steps)


def model_of(name: str, recipe: Recipe, data: Data, weights: str | None = None, **arguments: Any) -> nn.Module:
    """Build the model that a run trains, with the recipe's dropout and image size and the data's classes and channels.

    Args:
        name: of :data:`MODELS`, or what :func:`fastvit.create_model` takes. With ``weights`` it is the file's model.
        weights: a checkpoint to start from, resampled to the image size; a new classifier starts at zero.
        **arguments: more of :class:`fastvit.ViT`.

    Raises:
        ValueError: no such model or weights, or a ResNet with what it can't have: dropout, images of other channels.
    """
    options: dict[str, Any] = {"in_chans": data.channels, "drop_path_rate": recipe.drop_path, **arguments}
    raw = None if weights is None else files.read(weights)
    kind: Any = ViT
    if raw is not None:
        kind = family_of(raw.tensors).build
    elif name not in MODELS:
        kind = model_class(name)
    if issubclass(kind, ResNetV2):
        if recipe.dropout:
            raise ValueError(f"dropout={recipe.dropout}: of a ResNet, accepted is 0 (--set dropout=0)")
        if issubclass(kind, AxialResNet):
            options["img_size"] = recipe.image_size
    else:
        options |= {"img_size": recipe.image_size, "pos_drop_rate": recipe.dropout, "proj_drop_rate": recipe.dropout}
    if raw is not None:
        model = from_checkpoint(raw, num_classes=0, **options)
        model.reset_classifier(data.classes)
        return model
    options["num_classes"] = data.classes
    return ViT(**MODELS[name] | options) if name in MODELS else create_model(name, **options)


def describe(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """Return a config.json as timm has it; with it the folder is one that ``from_checkpoint`` takes."""
    size = [model.in_chans, recipe.image_size, recipe.image_size]
    pixels = {"input_size": size, "mean": list(recipe.mean), "std": list(recipe.std)}
    return {"model_args": arguments_not_in_shapes(model) if isinstance(model, ViT) else {}, "pretrained_cfg": pixels}


def train(
    data: str,
    out: str | Path,
    *,
    recipe: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    settings: Sequence[str] = (),
    steps: int | None = None,
    seed: int = 0,
    options: loop.Options | None = None,
) -> dict[str, Any]:
    """Train a classifier: ``fastvit train``.

    Args:
        data: as :func:`fastvit.data.datasets.open_data` takes it.
        out: folder of the run.
        recipe: a name in :data:`fastvit.training.recipes.RECIPES`, by default the data set's own.
        model: a name, by default the recipe's; see :func:`model_of`.
        weights: a checkpoint to start from.
        settings, steps: what is overridden in the recipe, "field=value".
        seed, options: as in :func:`fastvit.training.loop.train`.

    Returns:
        What is in metrics.json.
    """
    chosen = recipe_for(recipe, data, settings, steps, weights)
    sets = open_data(data)
    if model and weights:
        raise ValueError(f"--model {model}: the model is that of --weights {weights}")
    name = model or chosen.model
    torch.manual_seed(seed)
    network = model_of(name, chosen, sets, weights)
    return loop.train(
        Classification(network, sets.classes, chosen.label_smoothing, chosen.mixup),
        sets,
        chosen,
        out,
        seed=seed,
        options=options or loop.Options(),
        described={"data": os.path.normpath(data), "model": name, "weights": weights},
        config=describe(network, chosen),
    )

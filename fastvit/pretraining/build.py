"""A run from the names on a command line: ``fastvit pretrain``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvit.models import ViT
from fastvit.pretraining.beit import Beit
from fastvit.pretraining.dvae import DVAE, Tokenizing
from fastvit.pretraining.masked import MaskedPatches
from fastvit.pretraining.recipes import recipe_for
from fastvit.training import loop
from fastvit.training.build import describe, model_of, run
from fastvit.training.data import Data, open_data
from fastvit.training.objectives import Objective
from fastvit.training.recipes import Recipe

METHODS = ("masked", "beit", "tokenizer")

# Arguments of DVAE, and the weight of the divergence, which DALL-E has relative to 8 x 8 pixels of a code.
TOKENIZERS: dict[str, tuple[dict[str, Any], float]] = {
    "dvae": ({"codes": 8192, "halvings": 3, "width": 256}, 6.6),
    "digits_dvae": ({"codes": 64, "halvings": 1, "width": 32}, 0.2),
}


def encoder_of(name: str, recipe: Recipe, data: Data) -> ViT:
    """The model to pre-train, without a classifier.

    Raises:
        ValueError: it is no ViT.
    """
    model = model_of(name, recipe, data)
    if not isinstance(model, ViT):
        raise ValueError(f"model {name!r} is no ViT, which pre-training takes alone")
    model.reset_classifier(0)
    return model


def pixels_of(recipe: Recipe, data: Data) -> tuple[list[float], list[float]]:
    """(mean, std) that the recipe normalises pixels by, a value of each channel."""
    mean, std = (list(values) * (data.channels if len(values) == 1 else 1) for values in (recipe.mean, recipe.std))
    return mean, std


def tokenizer_of(name: str, recipe: Recipe, data: Data) -> Tokenizing:
    """A new tokenizer, with its loss.

    Raises:
        ValueError: an unknown name.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"no tokenizer {name!r}; accepted: {', '.join(TOKENIZERS)}")
    sizes, divergence = TOKENIZERS[name]
    return Tokenizing(DVAE(*pixels_of(recipe, data), **sizes), divergence)


def pretrain(
    method: str,
    source: str,
    out: str | Path,
    *,
    model: str | None = None,
    target: str | None = None,
    tokenizer: str | Path | None = None,
    settings: Sequence[str] = (),
    steps: int | None = None,
    seed: int = 0,
    options: loop.Options | None = None,
) -> dict[str, Any]:
    """Pre-train on a data set's training images, never their labels, by :func:`fastvit.training.loop.train`.

    Args:
        method: "masked", "beit", or "tokenizer", which "beit" needs.
        source: as :func:`fastvit.training.data.open_data` takes it.
        out: folder of the run; ``fastvit train --weights`` takes it.
        model: another model (or tokenizer) than the recipe's, by name.
        target: what "masked" predicts, by default "colour"; see :class:`fastvit.pretraining.MaskedPatches`.
        tokenizer: folder of a trained one, for "beit"; None trains one in ``out``/tokenizer, by its own recipe.
        settings, steps: what is overridden in the recipe, "field=value".

    Returns:
        What is in metrics.json.

    Raises:
        ValueError: an argument that does not fit.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; accepted: {', '.join(METHODS)}")
    for name, value, takes in (("target", target, "masked"), ("tokenizer", tokenizer, "beit")):
        if value is not None and method != takes:
            raise ValueError(f"{name}={str(value)!r} with method {method!r}, which has none; {takes!r} has")
    data, recipe = open_data(source), recipe_for(method, source, list(settings), steps)
    described = {"method": method, "data": os.path.normpath(source), "model": model or recipe.model}
    if method == "beit" and tokenizer is None:
        tokenizer = Path(out) / "tokenizer"
        pretrain("tokenizer", source, tokenizer, seed=seed, options=options)
    torch.manual_seed(seed)
    objective: Objective
    if method == "tokenizer":
        objective = tokenizer_of(described["model"], recipe, data)
    elif method == "masked":
        described["target"] = target = target or "colour"
        encoder = encoder_of(described["model"], recipe, data)
        objective = MaskedPatches(encoder, *pixels_of(recipe, data), target)
    else:
        assert tokenizer is not None
        described["tokenizer"] = str(tokenizer)
        encoder = encoder_of(described["model"], recipe, data)
        least = max(1, round(16 / 14**2 * encoder.patch_embed.num_patches))  # BEiT's 16 of 14 x 14, in proportion
        objective = Beit(encoder, DVAE.from_checkpoint(tokenizer), least=least)
    return loop.train(
        objective,
        data,
        recipe,
        out,
        seed=seed,
        options=options or loop.Options(),
        described=described,
        config=describe(objective.model, recipe),
    )


def main(arguments: argparse.Namespace) -> int:
    """``fastvit pretrain``."""

    def told() -> str:
        found = pretrain(
            arguments.method,
            arguments.data,
            arguments.out,
            model=arguments.model,
            target=arguments.target,
            tokenizer=arguments.tokenizer,
            settings=arguments.set,
            steps=arguments.steps,
            seed=arguments.seed,
            options=loop.options_of(arguments),
        )
        return ", ".join(f"test {name}: {value:.4f}" for name, value in found["test"].items())

    return run("pretrain", told)

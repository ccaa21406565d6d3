"""A run of pre-training by names: ``fastvit pretrain``."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvit.data.datasets import Data, open_data
from fastvit.models import ViT
from fastvit.training import loop
from fastvit.training.build import describe, model_of
from fastvit.training.logger import fingerprint
from fastvit.training.pretrain.beit import Beit
from fastvit.training.pretrain.dvae import DVAE, Tokenizing
from fastvit.training.pretrain.masked import MaskedPatches
from fastvit.training.recipes import PRETRAINING, Recipe

log = logging.getLogger("fastvit")

METHODS = ("masked", "beit", "tokenizer")
# Settings of a run of BEiT that hold for the tokenizer that is trained for it: what concerns machine and pixels.
SHARED = ("micro_batch", "precision", "mean", "std")

# Arguments of DVAE, and the weight of the divergence, which DALL-E has relative to 8 x 8 pixels of a code.
TOKENIZERS: dict[str, tuple[dict[str, Any], float]] = {
    "dvae": ({"codes": 8192, "halvings": 3, "width": 256}, 6.6),
    "digits_dvae": ({"codes": 64, "halvings": 1, "width": 32}, 0.2),
}


def name_of(method: str, data: str) -> str:
    """Return the key in :data:`PRETRAINING` of a method on a data set."""
    own = f"{method}_{data.partition(':')[0]}"
    return own if own in PRETRAINING else method


def recipe_for(method: str, data: str, settings: Sequence[str], steps: int | None = None) -> Recipe:
    """Return the recipe of a method on a data set, with some of its fields overridden."""
    return PRETRAINING[name_of(method, data)].override(settings, steps)


def encoder_of(name: str, recipe: Recipe, data: Data) -> ViT:
    """Build the ViT to pre-train, without a classifier."""
    model = model_of(name, recipe, data)
    if not isinstance(model, ViT):
        raise ValueError(f"pre-training takes ViTs alone; model {name!r} is of the class {type(model).__name__}")
    model.reset_classifier(0)
    return model


def pixels_of(recipe: Recipe, data: Data) -> tuple[list[float], list[float]]:
    """Return (mean, std) that the recipe normalises pixels by, a value for each channel."""
    mean, std = (list(values) * (data.channels if len(values) == 1 else 1) for values in (recipe.mean, recipe.std))
    return mean, std


def tokenizer_of(name: str, recipe: Recipe, data: Data, codes: int | None = None) -> Tokenizing:
    """Build a new tokenizer with its loss; ``codes`` replaces its own number of codes."""
    if name not in TOKENIZERS:
        raise ValueError(f"no tokenizer {name!r}; accepted: {', '.join(TOKENIZERS)}")
    sizes, divergence = TOKENIZERS[name]
    replaced = {} if codes is None else {"codes": codes}
    return Tokenizing(DVAE(*pixels_of(recipe, data), **sizes | replaced), divergence)


def _same_pixels(dvae: DVAE, mean: list[float], std: list[float]) -> None:
    """Raise a ValueError where images are normalised otherwise than those that the tokenizer was trained on."""
    theirs = torch.stack([dvae.pixels.mean, dvae.pixels.std]).flatten(1)
    if not torch.equal(torch.tensor([mean, std]), theirs):
        means, stds = ([round(value, 6) for value in values] for values in theirs.tolist())
        raise ValueError(
            f"mean={mean}, std={std}: the tokenizer's images were normalised by mean={means}, std={stds}; --set these"
        )


def _own_tokenizer(
    source: str, out: Path, codes: int | None, settings: list[str], seed: int, options: loop.Options | None
) -> DVAE:
    """Train a tokenizer for a run of BEiT in ``out``/tokenizer, or go on with it."""
    folder = out / "tokenizer"
    if (out / "checkpoint.pt").exists() and not folder.exists():
        raise ValueError(f"{out} holds a run whose tokenizer is elsewhere: give it, or another folder for this run")
    log.info(
        "no --tokenizer: training one for %s steps by the recipe %s, in %s; of --set and --steps only %s hold for it",
        recipe_for("tokenizer", source, settings).steps, name_of("tokenizer", source), folder, ", ".join(SHARED),
    )  # fmt: skip
    pretrain("tokenizer", source, folder, codes=codes, settings=settings, seed=seed, options=options)
    return DVAE.from_checkpoint(folder)


def pretrain(
    method: str,
    data: str,
    out: str | Path,
    *,
    model: str | None = None,
    target: str | None = None,
    share: float | None = None,
    tokenizer: str | Path | None = None,
    codes: int | None = None,
    settings: Sequence[str] = (),
    steps: int | None = None,
    seed: int = 0,
    options: loop.Options | None = None,
) -> dict[str, Any]:
    """Pre-train on a data set's training images, never their labels, by :func:`fastvit.training.loop.train`.

    Args:
        method: "masked", "beit", or "tokenizer", which "beit" needs.
        data: as :func:`fastvit.data.datasets.open_data` takes it.
        out: folder of the run; ``fastvit train --weights`` takes it.
        model: another model (or tokenizer) than the recipe's, by name.
        target: what "masked" predicts, by default "colour"; see :class:`fastvit.training.pretrain.MaskedPatches`.
        share: of the patches that "masked" corrupts, by default 0.5, or that "beit" masks, by default at most 0.4.
        tokenizer: folder of a trained one, for "beit"; None trains one in ``out``/tokenizer, by its own recipe.
        codes: of "tokenizer", or of the one that "beit" trains, by default the model's.
        settings, steps: what is overridden in the recipe, "field=value"; of the recipe of a tokenizer that "beit"
            trains, :data:`SHARED` alone.

    Returns:
        What is in metrics.json.

    Raises:
        ValueError: an argument that does not fit; "beit" finds that before it trains a tokenizer.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; accepted: {', '.join(METHODS)}")
    for name, value, takes in (
        ("target", target, ("masked",)),
        ("share", share, ("masked", "beit")),
        ("tokenizer", tokenizer, ("beit",)),
        ("codes", codes, ("beit", "tokenizer")),
    ):
        if value is not None and method not in takes:
            raise ValueError(f"{name}={value} is of the method {' or '.join(takes)}, and this is {method}")
    if tokenizer is not None and codes is not None:
        raise ValueError(f"codes={codes}: the tokenizer in {tokenizer} has its own; give one of the two")
    sets, recipe = open_data(data, labels=False), recipe_for(method, data, list(settings), steps)
    chosen = sets.limit(recipe.examples, seed)
    recipe.for_images(len(chosen.train))  # refuses what the loop would, before a tokenizer is trained for it
    described: dict[str, Any] = {"method": method, "data": os.path.normpath(data), "model": model or recipe.model}
    part: dict[str, Any] = {} if share is None else {"share": share}
    torch.manual_seed(seed)
    objective: Tokenizing | MaskedPatches | Beit
    if method == "tokenizer":
        objective = tokenizer_of(described["model"], recipe, sets, codes)
        described["codes"] = objective.model.codes
    elif method == "masked":
        described["target"] = target = target or "colour"
        encoder = encoder_of(described["model"], recipe, sets)
        objective = MaskedPatches(encoder, *pixels_of(recipe, sets), target, **part)
        described["share"] = objective.share
    else:
        encoder = encoder_of(described["model"], recipe, sets)
        least = max(1, round(16 / 14**2 * encoder.patch_embed.num_patches))  # BEiT's 16 of 14 x 14, in proportion
        if tokenizer is None:
            shared = [setting for setting in settings if setting.partition("=")[0] in SHARED]
            own = recipe_for("tokenizer", data, shared)
            dvae = tokenizer_of(own.model, own, sets, codes).model
        else:
            dvae = DVAE.from_checkpoint(tokenizer)
        objective = Beit(encoder, dvae, least=least, **part)
        _same_pixels(dvae, *pixels_of(recipe, sets))
        if tokenizer is None:  # trained now that all else is known to fit
            dvae.load_state_dict(_own_tokenizer(data, Path(out), codes, shared, seed, options).state_dict())
        described |= {"share": objective.share, "tokenizer": fingerprint(dvae)}
    return loop.train(
        objective,
        sets,
        recipe,
        out,
        seed=seed,
        options=options or loop.Options(),
        described=described,
        config=describe(objective.model, recipe) if isinstance(objective.model, ViT) else None,
    )

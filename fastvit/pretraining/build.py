"""A run from the names on a command line: ``fastvit pretrain``."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvit.models import ViT
from fastvit.pretraining.beit import Beit
from fastvit.pretraining.dvae import DVAE, Tokenizing
from fastvit.pretraining.masked import MaskedPatches
from fastvit.pretraining.recipes import RECIPES, name_of, recipe_for
from fastvit.training import loop
from fastvit.training.augment import MEAN, STD
from fastvit.training.build import describe, model_of
from fastvit.training.data import Data, open_data
from fastvit.training.recipes import Recipe

log = logging.getLogger("fastvit")

METHODS = ("masked", "beit", "tokenizer")
MACHINE = ("micro_batch", "precision")  # settings of a run of BEiT that hold for the tokenizer trained for it

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
        raise ValueError(f"pre-training takes ViTs alone; model {name!r} is of the class {type(model).__name__}")
    model.reset_classifier(0)
    return model


def tokenizer_of(name: str, data: Data, codes: int | None = None) -> Tokenizing:
    """A new tokenizer, with its loss; with another number of codes than its own, where one is given.

    Raises:
        ValueError: an unknown name, or fewer than 2 codes.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"no tokenizer {name!r}; accepted: {', '.join(TOKENIZERS)}")
    sizes, divergence = TOKENIZERS[name]
    sizes = sizes if codes is None else sizes | {"codes": codes}
    return Tokenizing(DVAE([MEAN] * data.channels, [STD] * data.channels, **sizes), divergence)


def fingerprint(module: nn.Module) -> str:
    """What tells weights from others, wherever they lie: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]


def _own_tokenizer(
    source: str, out: Path, codes: int | None, settings: Sequence[str], seed: int, options: loop.Options | None
) -> DVAE:
    """The tokenizer of a run of BEiT that is given none, trained in ``out``/tokenizer."""
    folder = out / "tokenizer"
    if (out / "checkpoint.pt").exists() and not folder.exists():
        raise ValueError(f"{out} holds a run whose tokenizer is elsewhere: give it, or another folder for this run")
    machine = [setting for setting in settings if setting.partition("=")[0] in MACHINE]
    log.info(
        "no --tokenizer: training one for %s steps by the recipe %s, in %s; of --set and --steps it takes %s alone",
        recipe_for("tokenizer", source, machine).steps, name_of("tokenizer", source), folder, " and ".join(MACHINE),
    )  # fmt: skip
    pretrain("tokenizer", source, folder, codes=codes, settings=machine, seed=seed, options=options)
    return DVAE.from_checkpoint(folder)


def pretrain(
    method: str,
    source: str,
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
        source: as :func:`fastvit.training.data.open_data` takes it.
        out: folder of the run; ``fastvit train --weights`` takes it.
        model: another model (or tokenizer) than the recipe's, by name.
        target: what "masked" predicts, by default "colour"; see :class:`fastvit.pretraining.MaskedPatches`.
        share: of the patches that "masked" corrupts, by default 0.5, or that "beit" masks, by default at most 0.4.
        tokenizer: folder of a trained one, for "beit"; None trains one in ``out``/tokenizer, by its own recipe.
        codes: of "tokenizer", or of the one that "beit" trains, by default the model's.
        settings, steps: what is overridden in the recipe, "field=value"; of the recipe of a tokenizer that "beit"
            trains, :data:`MACHINE` alone.

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
    data, recipe = open_data(source), recipe_for(method, source, list(settings), steps)
    chosen = data if recipe.examples is None else data.of(recipe.examples, seed)
    recipe.for_images(len(chosen.train))  # refuses what the loop would, before a tokenizer is trained for it
    described: dict[str, Any] = {"method": method, "data": source, "model": model or recipe.model}
    part = {} if share is None else {"share": share}
    torch.manual_seed(seed)
    objective: Tokenizing | MaskedPatches | Beit
    if method == "tokenizer":
        objective = tokenizer_of(described["model"], data, codes)
        described["codes"] = objective.model.codes
    elif method == "masked":
        described["target"] = target = target or "colour"
        encoder = encoder_of(described["model"], recipe, data)
        objective = MaskedPatches(encoder, [MEAN] * data.channels, [STD] * data.channels, target, **part)
        described["share"] = objective.share
    else:
        encoder = encoder_of(described["model"], recipe, data)
        least = max(1, round(16 / 14**2 * encoder.patch_embed.num_patches))  # BEiT's 16 of 14 x 14, in proportion
        name = RECIPES[name_of("tokenizer", source)].model
        dvae = tokenizer_of(name, data, codes).model if tokenizer is None else DVAE.from_checkpoint(tokenizer)
        objective = Beit(encoder, dvae, least=least, **part)
        if tokenizer is None:  # trained now that all else is known to fit
            dvae.load_state_dict(_own_tokenizer(source, Path(out), codes, settings, seed, options).state_dict())
        described |= {"share": objective.share, "tokenizer": fingerprint(objective.tokenizer)}
    found = loop.train(objective, data, recipe, out, seed=seed, options=options or loop.Options(), described=described)
    if os.environ.get("RANK", "0") == "0":
        describe(objective.model, out)
    return found


def main(arguments: argparse.Namespace) -> int:
    """``fastvit pretrain``."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        found = pretrain(
            arguments.method,
            arguments.data,
            arguments.out,
            model=arguments.model,
            target=arguments.target,
            share=arguments.share,
            tokenizer=arguments.tokenizer,
            codes=arguments.codes,
            settings=arguments.set,
            steps=arguments.steps,
            seed=arguments.seed,
            options=loop.options_of(arguments),
        )
    except (ValueError, OSError, ImportError, loop.Diverged) as error:
        print(f"fastvit pretrain: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(", ".join(f"test {name}: {value:.4f}" for name, value in found["test"].items()))
    return 0

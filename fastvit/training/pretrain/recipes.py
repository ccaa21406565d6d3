"""How models are pre-trained: the papers' recipes, and ours for the digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastvit.training.recipes import Recipe

_DIGITS = Recipe(
    lr=2e-3,
    batch_size=64,
    steps=1000,
    warmup_steps=100,
    decay="cosine",
    weight_decay=0.05,
    clip=1.0,
    crop="none",
    flip=False,
    image_size=16,
    polyak=0.99,
    precision="float32",
    model="digits",
)

# By method, or method_data for a data set with one of its own.
RECIPES: dict[str, Recipe] = {
    # Appendix B.1.2; weight decay as of all its models pre-trained on JFT.
    "masked": Recipe(lr=2e-4, steps=1_000_000, decay="cosine", weight_decay=0.1),
    # The command that BEiT's authors published, and its defaults: 800 epochs of ImageNet, warmed up over 10. What
    # differs is in docs/explanation/pretraining.md.
    "beit": Recipe(
        lr=1.5e-3,
        beta2=0.98,
        batch_size=2048,
        epochs=800,
        warmup_steps=6_256,
        decay="cosine",
        weight_decay=0.05,
        clip=3.0,
        drop_path=0.1,
        model="beit_base_patch16_224",
    ),
    # DALL-E's appendix A.2, on the images of 112 pixels that BEiT has tokens of; for a tenth of its 3,000,000 steps,
    # with a warm-up, and without the floor of its learning rate.
    "tokenizer": Recipe(
        lr=1e-4,
        batch_size=512,
        steps=300_000,
        warmup_steps=1_000,
        decay="cosine",
        weight_decay=1e-4,
        polyak=0.999,
        image_size=112,
        model="dvae",
    ),
    "masked_digits": _DIGITS,
    "beit_digits": replace(_DIGITS, model="digits_beit"),
    "tokenizer_digits": replace(_DIGITS, weight_decay=1e-4, image_size=8, model="digits_dvae"),
}


def name_of(method: str, data: str) -> str:
    """Return the key in :data:`RECIPES` of a method on a data set."""
    own = f"{method}_{data.partition(':')[0]}"
    return own if own in RECIPES else method


def recipe_for(method: str, data: str, settings: Sequence[str], steps: int | None = None) -> Recipe:
    """Return the recipe of a method on a data set, with what is overridden.

    Raises:
        ValueError: a setting that fits none.
    """
    return RECIPES[name_of(method, data)].override(settings, steps)

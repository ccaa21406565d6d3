"""How models are trained: the recipes of "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021), and ours.

Values are of its tables 3 (training) and 4 (fine-tuning), sections 4.1 and B.1. What the paper leaves open is said
beside its field in :class:`Recipe`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Recipe:
    """The settings of a run; each field can be overridden, on the command line by ``--set field=value``.

    Args:
        optimizer: "adam" (b1 0.9, decoupled weight decay: AdamW) or "sgd" (momentum 0.9).
        lr: the peak.
        batch_size: images of a step, of all processes together.
        steps, epochs: how long; one of them.
        warmup_steps: over which the learning rate rises from 0, linearly.
        decay: then it falls to 0, "linear" or as a "cosine".
        weight_decay: lr * weight_decay of each weight is taken off in a step, as in the paper's code. Not of vectors
            (biases, norms) and what the model's no_weight_decay names; the paper doesn't say.
        beta2: of Adam.
        clip: greatest global norm of the gradients, or None.
        dropout: after every dense layer but qkv, and after positions are added to patch embeddings (B.1).
        drop_path: stochastic depth of the last block, rising linearly to it. Not in the paper.
        label_smoothing: of the targets, over all classes.
        mixup: alpha of its Beta distribution; 0 is none. Not in the paper.
        randaugment: how many operations of RandAugment, at magnitude 9. Not in the paper.
        crop: of training images: "inception" (a random part, 8% to 100% of the area), "random" (a random square, 6/7 of
            the side), "affine" (turned by up to 10 degrees, moved by 6%, scaled by 10%) or "none".
        flip: half of the training images left to right.
        image_size: pixels a side.
        mean, std: of the pixels, 0 to 1, by which they are normalised: one value, or one of each channel with commas
            between. The paper's code has 0.5.
        polyak: factor of the running average of the weights, which then is what is evaluated and saved; 0 is none.
        precision: "float32", or "bfloat16": products in it, weights and sums in float32.
        micro_batch: images at a time in a process; their gradients are added up to the batch. None: all.
        examples: how many training images there are, chosen by the run's seed; None: all. VTAB's tasks have 1,000.
        model: what a run trains that names none; see :func:`fastvit.training.build.model_of`.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    batch_size: int = 4096
    steps: int | None = None
    epochs: float | None = None
    warmup_steps: int = 10_000
    decay: Literal["linear", "cosine"] = "linear"
    weight_decay: float = 0.1
    beta2: float = 0.999
    clip: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    randaugment: int = 0
    crop: Literal["inception", "random", "affine", "none"] = "inception"
    flip: bool = True
    image_size: int = 224
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    polyak: float = 0.0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    micro_batch: int | None = None
    examples: int | None = None
    model: str = "vit_base_patch16_224"

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}: give one of them, the other as none")
        for name, hint in get_type_hints(Recipe).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                accepted = ", ".join(map(repr, get_args(hint)))
                raise ValueError(f"{name}={getattr(self, name)!r}; accepted: {accepted}")
        for name in ("lr", "batch_size", "steps", "epochs", "clip", "image_size", "micro_batch", "examples"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} is not positive and finite")
        for name in ("warmup_steps", "weight_decay", "mixup", "randaugment"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is negative or not finite")
        for name in ("beta2", "dropout", "drop_path", "label_smoothing", "polyak"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; accepted: 0 up to, and without, 1")

    def for_images(self, count: int) -> Recipe:
        """Return the recipe in steps for a training set of ``count`` images; its warm-up must end within them."""
        if not count:
            raise ValueError("the training set has no images")
        steps = self.steps or math.ceil((self.epochs or 0) * count / self.batch_size)
        if self.warmup_steps >= steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} of {steps} steps: train longer, or set warmup_steps to fewer"
            )
        return replace(self, steps=steps, epochs=None)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0. The recipe must be in steps."""
        assert self.steps is not None
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.lr * (1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)

    def override(self, settings: Iterable[str], steps: int | None = None) -> Recipe:
        """Return the recipe with other values, each "field=value", and ``steps``.

        Steps and epochs take each other's place.

        Raises:
            ValueError: no such field (with the nearest), or a value of another type.
        """
        hints, changes = get_type_hints(Recipe), dict[str, Any]()
        for setting in (*settings, *([] if steps is None else [f"steps={steps}"])):
            name, equals, text = setting.partition("=")
            if not equals:
                raise ValueError(f"{setting!r}; accepted: field=value")
            if name not in hints:
                near = difflib.get_close_matches(name, hints, 1, 0)[0]
                raise ValueError(f"no field {name!r} in a recipe; did you mean {near!r}? Accepted: {', '.join(hints)}")
            changes[name] = _parse(name, text, hints[name])
        if "steps" in changes and "epochs" not in changes:
            changes["epochs"] = None
        elif "epochs" in changes and "steps" not in changes:
            changes["steps"] = None
        return replace(self, **changes)


def _parse(name: str, text: str, hint: Any) -> Any:
    """Parse ``text`` as a value of the type ``hint``."""
    if get_origin(hint) is tuple:
        return tuple(_parse(name, part, get_args(hint)[0]) for part in text.split(","))
    kinds = (str,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    if text.lower() == "none" and type(None) in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        names = [k.__name__ for k in kinds if k is not type(None)] + ["none"] * (type(None) in kinds)
        raise ValueError(f"{name}={text!r}; accepted: {' or '.join(names)}") from None


def _finetune(steps: int, lr: float, image_size: int = 384, polyak: float = 0.0) -> Recipe:
    return Recipe(
        optimizer="sgd",
        lr=lr,
        batch_size=512,
        steps=steps,
        warmup_steps=500 if steps > 2500 else 100,  # the paper doesn't say
        decay="cosine",
        weight_decay=0.0,
        clip=1.0,
        crop="random",
        image_size=image_size,
        polyak=polyak,
    )


RECIPES: dict[str, Recipe] = {
    # Table 3. Where it has two numbers of epochs ("7/14", "30/90"), the greater one.
    "vit_imagenet": Recipe(lr=3e-3, epochs=300, decay="cosine", weight_decay=0.3, clip=1.0, dropout=0.1),
    "vit_imagenet21k": (imagenet21k := Recipe(lr=1e-3, epochs=90, weight_decay=0.03, dropout=0.1)),
    "vit_imagenet21k_l": replace(imagenet21k, model="vit_large_patch16_224"),
    "vit_jft": Recipe(lr=8e-4, epochs=7, model="vit_base_patch16_224"),
    "vit_jft_l32": Recipe(lr=6e-4, epochs=7, model="vit_large_patch32_224"),
    "vit_jft_l16": Recipe(lr=4e-4, epochs=14, model="vit_large_patch16_224"),
    "vit_jft_h14": Recipe(lr=3e-4, epochs=14, model="vit_huge_patch14_224"),
    "hybrid_jft": Recipe(lr=8e-4, epochs=7, model="vit_base_r50_s16_224"),
    "hybrid_jft_l32": Recipe(lr=2e-4, epochs=7, model="vit_large_r50_s32_224"),
    "hybrid_jft_l16": Recipe(lr=4e-4, epochs=14, model="vit_large_r50_s16_224"),
    "resnet_jft_r50": Recipe(lr=1e-3, epochs=7, model="resnetv2_50x1_bit"),
    "resnet_jft_r101": Recipe(lr=8e-4, epochs=7, model="resnetv2_101x1_bit"),
    "resnet_jft_r152": Recipe(lr=6e-4, epochs=7, model="resnetv2_152x2_bit"),
    # DeiT's (Touvron et al., 2021) for ImageNet without more data, but for CutMix, erasing and repeated augmentation.
    "deit_imagenet": Recipe(
        lr=1e-3,
        batch_size=1024,
        epochs=300,
        warmup_steps=6_255,  # 5 epochs
        decay="cosine",
        weight_decay=0.05,
        drop_path=0.1,
        label_smoothing=0.1,
        mixup=0.8,
        randaugment=2,
    ),
    # Table 4. It gives ranges of learning rates, to be searched on a part of the training set: 0.003 to 0.06 for
    # ImageNet, 0.001 to 0.03 for CIFAR, Pets and Flowers. These are from their middles.
    "finetune_imagenet": _finetune(20_000, 0.03),
    "finetune_imagenet_512": _finetune(20_000, 0.03, 512, 0.9999),  # ViT-L/16 in table 2
    "finetune_imagenet_518": _finetune(20_000, 0.03, 518, 0.9999),  # ViT-H/14 in table 2
    "finetune_cifar": _finetune(10_000, 0.01),
    "finetune_pets": _finetune(500, 0.01),
    "finetune_flowers": _finetune(500, 0.01),
    "finetune_vtab": replace(_finetune(2_500, 0.01), examples=1000),
    # Ours, for 1,437 images of 8 x 8 pixels.
    "digits": Recipe(
        lr=2e-3,
        batch_size=64,
        epochs=60,
        warmup_steps=100,
        decay="cosine",
        weight_decay=0.1,
        clip=1.0,
        mixup=0.4,
        crop="affine",
        flip=False,
        image_size=16,
        polyak=0.99,
        precision="float32",
        model="digits",
    ),
}


_DIGITS = replace(RECIPES["digits"], steps=1000, epochs=None, weight_decay=0.05, mixup=0.0, crop="none")

# Recipes of pre-training, by method, or method_data for a data set with one of its own.
PRETRAINING: dict[str, Recipe] = {
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


def recipe_of(name: str) -> Recipe:
    """Return a recipe by its name; a ValueError lists the names that exist."""
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; accepted: {', '.join(RECIPES)}")
    return RECIPES[name]

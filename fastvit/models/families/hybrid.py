"""The paper's hybrids: a ViT on the features of a BiT ResNet (section 4.1), and timm's smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastvit.checkpoints.backbone import layers_of, stem_of
from fastvit.models.families.family import Family, Model
from fastvit.models.families.vit import VARIANTS
from fastvit.models.hybrid import HybridEmbed, reduction

# Hybrids: the blocks of each stage, for a depth and how many pixels of the image are one of the feature map. With 16
# the blocks of the last stage are in the one before it (section 4.1 of the paper). The first four are the paper's.
_STAGES = {
    ("50", 32): (3, 4, 6, 3),
    ("50", 16): (3, 4, 9),
    ("26", 32): (2, 2, 2, 2),
    ("", 16): (),
}
HYBRIDS = (
    ("base", "50", 32),
    ("base", "50", 16),
    ("large", "50", 32),
    ("large", "50", 16),
    ("small", "26", 32),
    ("base", "26", 32),
    ("tiny", "", 16),
)


def _model(size: str, depth: str, stride: int, img_size: int) -> Model:
    layers = _STAGES[depth, stride]
    return Model(
        {
            **VARIANTS[size].arguments,
            "img_size": img_size,
            "patch_size": 1 if layers else 8,
            "embed_layer": partial(HybridEmbed, layers=layers),
        },
        {"first_conv": "patch_embed.backbone.stem.conv" if layers else "patch_embed.backbone.conv"},
    )


def _name(size: str, depth: str, stride: int) -> str:
    return f"vit_{size}_r{depth}_s{stride}{'' if _STAGES[depth, stride] else '_p8'}"


def _infer(state: Mapping[str, Any]) -> dict[str, Any]:
    layers = layers_of(state) or ()
    return {
        "embed_layer": partial(HybridEmbed, layers=layers),
        "in_chans": state[f"{stem_of(state)}.conv.weight"].shape[1],
    }


FAMILY = Family(
    models={f"{_name(*hybrid)}_{img_size}": _model(*hybrid, img_size) for hybrid in HYBRIDS for img_size in (224, 384)},
    aliases={
        f"R{depth}+ViT-{VARIANTS[size].paper}/{stride}": _name(size, depth, stride) for size, depth, stride in HYBRIDS
    },
    refused={
        r"(.*\.)?patch_embed\.backbone\.(?!(stem\.|stages\.|conv\.|norm\.)).*": (
            "its patches are the features of another network than BiT's ResNet"
        )
    },
    recognise=lambda names: stem_of(names) is not None,
    infer=_infer,
    reduction=lambda state: reduction(layers_of(state) or ()),
)

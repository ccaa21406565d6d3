"""The BiT ResNets of "Big Transfer" (Kolesnikov et al., 2020), with which the ViT paper compares (figure 11)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from fastvit.models.families.family import Family, Model
from fastvit.models.resnet import CHANNELS, STEM_CHANNELS, ResNetV2

SIZES = ("50x1", "50x2", "50x3", "101x1", "101x3", "152x1", "152x2", "152x4", "200x3")  # depth x width
LAYERS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3), "200": (3, 24, 36, 3)}


def is_resnet(names: Collection[str]) -> bool:
    """Return whether weights with these names are a ResNet's."""
    return "stem.conv.weight" in names and "patch_embed.proj.weight" not in names


def infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of :class:`fastvit.resnet.ResNetV2` for weights under its names, which are timm's."""
    stem, classifier = state["stem.conv.weight"], state.get("head.fc.weight")
    depths = [
        sum(f"stages.{i}.blocks.{j}.norm1.weight" in state for j in range(len(state))) for i in range(len(CHANNELS))
    ]
    return {
        "layers": depths,
        "width_factor": stem.shape[0] // STEM_CHANNELS,
        "in_chans": stem.shape[1],
        "num_classes": 0 if classifier is None else classifier.shape[0],
    }


def _model(size: str) -> Model:
    depth, width = size.split("x")
    return Model({"layers": LAYERS[depth], "width_factor": int(width)})


FAMILY = Family(
    models={f"resnetv2_{size}_bit": _model(size) for size in SIZES},
    aliases={f"R{size}": f"resnetv2_{size}_bit" for size in SIZES},
    build=ResNetV2,
    refused={r"stages\.\d+\.blocks\..*": "it is a ResNet, of fastvit.resnet"},
    recognise=is_resnet,
    infer=infer,
    own_names=True,
    in_timm=False,
)

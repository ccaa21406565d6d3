"""AxialResNet: a ResNet with axial attention in place of its 3 x 3 convolutions (appendix D.6 of the ViT paper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastvit.models.axial import AxialResNet
from fastvit.models.families import bit
from fastvit.models.families.family import Family, Model

_ATTENTION = "stages.0.blocks.0.conv2"


def _infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments; the relative position keys tell the size of the images and the heads."""
    keys = [state[f"{_ATTENTION}.{axis}.rel_pos_keys"] for axis in ("column", "row")]
    return {
        **bit.infer(state),
        "img_size": tuple(4 * ((len(axis) + 1) // 2) for axis in keys),
        "num_heads": state[f"{_ATTENTION}.row.qkv.weight"].shape[1] // keys[1].shape[1],
    }


FAMILY = Family(
    models={"axial_resnet50": Model({"layers": bit.LAYERS["50"]})},
    aliases={"AxialResNet50": "axial_resnet50"},
    build=AxialResNet,
    recognise=lambda names: bit.is_resnet(names) and f"{_ATTENTION}.row.rel_pos_keys" in names,
    infer=_infer,
    own_names=True,
    in_timm=False,
)

"""fastvit's models under timm's ``create_model``, for code that builds its models there."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fastvit.models import create_model, families, list_models

__all__ = ["register"]  # timm adds the names of the models, as it does in its own modules

SUFFIX = "_fastvit"

default_cfgs: dict[str, dict[str, Any]] = {}  # timm's register_model reads it here, by model name


def register() -> list[str]:
    """Register every ViT of :func:`fastvit.list_models` in timm's registry, DINOv3, BEiT and DeiT among them.

    ``vit_base_patch16_224`` becomes ``timm.create_model("vit_base_patch16_224_fastvit")``. (It is a
    suffix since timm and its tools know a Vision Transformer by ``vit_*``, and ``fastvit_*`` there is
    Apple's network.) Calling it again changes nothing.

    Returns:
        The names in timm.

    Raises:
        ImportError: timm is not installed.
    """
    from timm.models import is_model, register_model

    names = []
    for name in (name for name in list_models() if not name.startswith(("resnetv2_", "axial_"))):
        if not is_model(name + SUFFIX):
            default_cfgs[name + SUFFIX] = _default_cfg(name)
            globals()[name + SUFFIX] = register_model(_entrypoint(name))
        names.append(name + SUFFIX)
    return names


def _default_cfg(name: str) -> dict[str, Any]:
    size, options = re.search(r"_(\d+)$", name), families.arguments(name) or {}
    pixels = options.get("img_size", int(size[1]) if size else 224)
    stem = "proj" if re.search(r"_r\d*_s", name) is None else "backbone.conv" if "_r_" in name else "backbone.stem.conv"
    imagenet = name.startswith(("beitv2_", "deit_")) or "dinov3" in name
    return {
        "num_classes": options.get("num_classes", 1000),
        "input_size": (3, pixels, pixels),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0 if "dinov3" in name else 0.9,
        "mean": (0.485, 0.456, 0.406) if imagenet else (0.5, 0.5, 0.5),
        "std": (0.229, 0.224, 0.225) if imagenet else (0.5, 0.5, 0.5),
        "first_conv": f"patch_embed.{stem}",
        "classifier": ("head", "head_dist") if options.get("distilled") else "head",
        "license": "apache-2.0",
    }


def _entrypoint(name: str) -> Any:
    from timm.models import build_model_with_cfg

    def build(**arguments: Any) -> nn.Module:
        return create_model(name, **arguments)

    def entrypoint(pretrained: bool = False, **arguments: Any) -> nn.Module:
        feature_cfg = {"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"}
        model: nn.Module = build_model_with_cfg(
            build, entrypoint.__name__, pretrained, feature_cfg=feature_cfg, **arguments
        )
        return model

    entrypoint.__name__ = name + SUFFIX
    entrypoint.__doc__ = f"fastvit.create_model({name!r})."
    return entrypoint

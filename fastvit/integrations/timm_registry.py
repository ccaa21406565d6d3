"""fastvit's models under timm's ``create_model``, for code that builds its models there."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvit.models import create_model, families

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
    for family in families.FAMILIES.values():
        for name, model in family.models.items() if family.in_timm else ():
            if not is_model(name + SUFFIX):
                default_cfgs[name + SUFFIX] = families.pretrained_cfg(model)
                globals()[name + SUFFIX] = register_model(_entrypoint(name))
            names.append(name + SUFFIX)
    return names


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

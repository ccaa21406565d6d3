"""The families of models, one file each: what a file declares is a :class:`~fastvit.models.families.family.Family`."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Collection, Mapping
from typing import Any

from fastvit.checkpoints import layouts
from fastvit.models.families.family import PRETRAINED_CFG, Family, Model
from fastvit.models.families.vit import FAMILY as PLAIN

__all__ = ["FAMILIES", "Family", "Model", "family_of", "find", "matching", "pretrained_cfg"]


def _declared() -> dict[str, Family]:
    """Return the families of this package by the name of their file, the plain ViT first."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in ("family", "vit"))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {"vit": PLAIN} | {name: module.FAMILY for name, module in modules.items()}


FAMILIES = _declared()
for _family in (*(family for family in FAMILIES.values() if family is not PLAIN), PLAIN):  # others have its names too
    layouts.register(_family.layouts, _family.refused)


def find(name: str) -> tuple[Family, Model] | None:
    """Return the family and the model of a name, in the image size that it ends in; None for an unknown name."""
    sized = re.fullmatch(r"(.+)[-_](\d+)", name)
    for base, size in ((name, None), *(((sized[1], int(sized[2])),) if sized else ())):
        for family in FAMILIES.values():
            base_name = family.aliases.get(base, base)
            for full, model in family.models.items():
                if base_name not in (full, re.sub(r"_\d+$", "", full)):
                    continue
                if size is None:
                    return family, model
                if "img_size" in model.arguments:
                    return family, model._replace(arguments={**model.arguments, "img_size": size})
    return None


def pretrained_cfg(model: Model) -> dict[str, Any]:
    """Return timm's ``pretrained_cfg`` of a model."""
    size = model.arguments["img_size"]
    classes = {key: model.arguments[key] for key in ("num_classes",) if key in model.arguments}
    return {**PRETRAINED_CFG, **classes, "input_size": (3, size, size), **model.cfg}


def matching(names: Collection[str]) -> list[Family]:
    """Return the families that recognise weights with these names of ours."""
    return [family for family in FAMILIES.values() if family.recognise(names)]


def family_of(names: Collection[str]) -> Family:
    """Return the family whose class holds weights with these names of ours: the plain ViT where none has its own."""
    return next((family for family in matching(names) if family.build is not PLAIN.build), PLAIN)


def infer(state: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the arguments that families see in weights under our names, and the reduction of their patches' input."""
    arguments: dict[str, Any] = {}
    reduction = 1
    for family in matching(state):
        arguments |= family.infer(state)
        reduction *= family.reduction(state)
    return arguments, reduction

"""Axial-ViT: attention along rows, then along columns (appendix D.6 of the ViT paper)."""

from __future__ import annotations

from fastvit.models.axial import AxialViT
from fastvit.models.families import vit
from fastvit.models.families.family import Family

_ROW = "blocks.0.row."

FAMILY = Family(
    models={f"axial_{name}": model for name, model in vit.FAMILY.models.items()},
    aliases={f"Axial-{alias}": f"axial_{name}" for alias, name in vit.FAMILY.aliases.items()},
    build=AxialViT,
    recognise=lambda names: any(name.startswith(_ROW) for name in names),
    plain=lambda state: {name.replace(".row.", "."): value for name, value in state.items()},  # columns' are as large
    in_timm=False,
)

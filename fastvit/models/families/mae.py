"""Masked autoencoders (He et al., 2022): ViTs whose files have a decoder, which nothing reads after pre-training."""

from __future__ import annotations

from fastvit.checkpoints.configs import timm_options
from fastvit.checkpoints.rules import Layout
from fastvit.models.families.family import Family
from fastvit.models.families.vit import TIMM_RULES

MAE = Layout(
    "timm",
    "patch_embed.proj.weight",
    TIMM_RULES,
    also=r"decoder_.*",
    dropped=r"mask_token|decoder_.*",
    options=timm_options,
)
FAMILY = Family(layouts=(MAE,))

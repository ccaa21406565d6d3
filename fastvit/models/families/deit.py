"""DeiT with a distillation token and its own classifier (Touvron et al., 2021). Without them a DeiT is a plain ViT."""

from __future__ import annotations

from fastvit.checkpoints.rules import HuggingFace, Layout, State, rename, same
from fastvit.models.families.family import IMAGENET, Family, Model
from fastvit.models.families.vit import (
    HUGGINGFACE_5_QUERY,
    HUGGINGFACE_QUERY,
    PLAIN,
    VARIANTS,
    plain_config,
    vit_of_huggingface,
)

_KIND = HuggingFace("deit", "DeiTModel", "DeiTForImageClassificationWithTeacher", PLAIN, plain_config)


def _a_token_that_no_head_reads(state: State) -> None:
    """Rename the tokens of a model with one classifier: it reads the class token, and the other is a register."""
    if "head.weight" in state and "head_dist.weight" not in state:
        state["reg_token"] = state.pop("dist_token")


def _deit_of_huggingface(name: str, also: str) -> Layout:
    return vit_of_huggingface(
        name,
        also,
        (
            rename("embeddings.distillation_token", "dist_token"),
            *same(("/cls_classifier", "head"), ("/distillation_classifier", "head_dist")),
        ),
        tower="deit.",
        finish=_a_token_that_no_head_reads,
        mark="embeddings.distillation_token",
        kind=_KIND,
    )


FAMILY = Family(
    models={
        f"deit_{size}_distilled_patch16_224": Model(
            {**VARIANTS[size].arguments, "img_size": 224, "patch_size": 16, "distilled": True},
            {**IMAGENET, "classifier": ("head", "head_dist")},
        )
        for size in ("tiny", "small", "base")
    },
    layouts=(
        _deit_of_huggingface("huggingface-5", HUGGINGFACE_5_QUERY),
        _deit_of_huggingface("huggingface", HUGGINGFACE_QUERY),
    ),
)

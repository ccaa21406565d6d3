"""What names stand for: sizes of ViTs, and the models whose names stand for more than sizes, as timm builds those."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NamedTuple

from fastvit.layers import BeitBlock, LayerNorm, SwiGLU
from fastvit.models.hybrid import HybridEmbed


class Variant(NamedTuple):
    """The sizes that a variant's name stands for."""

    paper: str
    width: int
    depth: int
    mlp: int
    heads: int

    @property
    def mlp_ratio(self) -> float:
        """mlp / width, such that int(width * mlp_ratio) is mlp: half a feature keeps rounding from landing below."""
        exact = self.mlp % self.width == 0
        return self.mlp / self.width if exact else (self.mlp + 0.5) / self.width

    @property
    def arguments(self) -> dict[str, Any]:
        """The same as arguments of :class:`fastvit.ViT`."""
        return {
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
        }


# B, L and H are the ViT paper's (table 1), Ti, S and M DeiT's and timm's, So400m SigLIP's, g and G those of
# "Scaling Vision Transformers" (table 2).
VARIANTS = {
    "tiny": Variant("Ti", 192, 12, 768, 3),
    "small": Variant("S", 384, 12, 1536, 6),
    "medium": Variant("M", 512, 12, 2048, 8),
    "base": Variant("B", 768, 12, 3072, 12),
    "large": Variant("L", 1024, 24, 4096, 16),
    "huge": Variant("H", 1280, 32, 5120, 16),
    "so400m": Variant("So400m", 1152, 27, 4304, 16),
    "giant": Variant("g", 1408, 40, 6144, 16),
    "gigantic": Variant("G", 1664, 48, 8192, 16),
}

# Of DINOv3 (Siméoni et al., 2025), and whether their MLPs have a gate; mlp is the width of each half.
DINOV3 = {
    **{size: (VARIANTS[size], False) for size in ("tiny", "small", "base", "large")},
    "small_plus": (VARIANTS["small"], True),
    "huge_plus": (Variant("H+", 1280, 32, 5120, 20), True),
    "7b": (Variant("7B", 4096, 40, 8192, 32), True),
}

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


def _hybrid(variant: Variant, layers: tuple[int, ...], img_size: int) -> dict[str, Any]:
    return {
        **variant.arguments,
        "img_size": img_size,
        "patch_size": 1 if layers else 8,
        "embed_layer": partial(HybridEmbed, layers=layers),
    }


def _dinov3(variant: Variant, gated: bool, biases: bool) -> dict[str, Any]:
    return {
        **variant.arguments,
        "img_size": 256,
        "patch_size": 16,
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,
        "qkv_bias": biases,
        "init_values": 1e-5,
        "reg_tokens": 4,
        "pos_embed": "none",
        "rope": 100.0,
        "block_fn": BeitBlock,
        "norm_layer": partial(LayerNorm, eps=1e-5),
        "dynamic_img_size": True,
        "fix_init": True,
        **({"mlp_layer": SwiGLU, "mlp_ratio": 2 * variant.mlp_ratio} if gated else {}),
    }


def _beit(variant: Variant, img_size: int, init_values: float) -> dict[str, Any]:
    return {
        **variant.arguments,
        "img_size": img_size,
        "patch_size": 16,
        "global_pool": "avg",
        "init_values": init_values,
        "pos_embed": "none",
        "use_rel_pos_bias": True,
        "fix_init": True,
    }


def _names() -> dict[str, dict[str, Any]]:
    found = {}
    for size, (variant, gated) in DINOV3.items():
        for biases in ("", "_qkvb"):
            if size + biases not in ("tiny", "7b_qkvb"):  # which nobody has
                found[f"vit_{size}_patch16_dinov3{biases}"] = _dinov3(variant, gated, bool(biases))
    for version, size, pixels in (
        ("", "base", (224, 384)),
        ("", "large", (224, 384, 512)),
        ("v2", "base", (224,)),
        ("v2", "large", (224,)),
    ):
        init_values = 0.1 if version + size == "base" else 1e-5
        for img_size in pixels:
            found[f"beit{version}_{size}_patch16_{img_size}"] = _beit(VARIANTS[size], img_size, init_values)
    for size in ("tiny", "small", "base"):
        found[f"deit_{size}_distilled_patch16_224"] = {**VARIANTS[size].arguments, "patch_size": 16, "distilled": True}
    for size, depth, stride in HYBRIDS:
        layers = _STAGES[depth, stride]
        for img_size in (224, 384):
            name = f"vit_{size}_r{depth}_s{stride}{'' if layers else '_p8'}_{img_size}"
            found[name] = _hybrid(VARIANTS[size], layers, img_size)
    return found


FAMILIES = _names()
# The paper's names of hybrids, which an image size may follow; the number is the total reduction.
PAPERS = {
    f"R{depth}+ViT-{VARIANTS[size].paper}/{stride}": f"vit_{size}_r{depth}_s{stride}{'' if depth else '_p8'}"
    for size, depth, stride in HYBRIDS
}


def arguments(name: str) -> dict[str, Any] | None:
    """Arguments of :class:`fastvit.ViT` that a name stands for, None of no family; any image size may end one."""
    if paper := re.fullmatch(r"(R\d*\+.*?)(?:[-_](\d+))?", name):
        name = f"{PAPERS.get(paper[1], paper[1])}_{paper[2] or 224}"
    base = re.sub(r"_\d+$", "", name)
    known = next((options for one, options in FAMILIES.items() if re.sub(r"_\d+$", "", one) == base), None)
    size = re.search(r"_(\d+)$", name)
    if known is None or (size is None and name not in FAMILIES):
        return None
    return known | ({"img_size": int(size[1])} if size else {})

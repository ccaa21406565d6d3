"""Model names: ``create_model("vit_base_patch16_224")``, ``create_model("ViT-B/16")``, ``list_models()``."""

from __future__ import annotations

import difflib
import fnmatch
import re
from pathlib import Path
from typing import Any, NamedTuple

from fastvit.checkpoints import load_checkpoint
from fastvit.models.vit import ViT


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
PATCHES = (8, 14, 16, 32)

_BY_PAPER = {variant.paper: name for name, variant in VARIANTS.items()}
_TIMM = re.compile(r"vit_(?P<size>[a-z0-9]+)_patch(?P<patch>\d+)(?:_(?P<image>\d+))?")
_PAPER = re.compile(r"ViT-(?P<size>[A-Za-z0-9]+)/(?P<patch>\d+)(?:[-_](?P<image>\d+))?")


def _parse(name: str) -> tuple[Variant, int, int]:
    """(variant, patch, image size) of a name, or a ValueError with the nearest names."""
    timm, paper = _TIMM.fullmatch(name), _PAPER.fullmatch(name)
    match = timm or paper
    size = timm["size"] if timm else _BY_PAPER.get(paper["size"], "") if paper else ""
    if match is None or size not in VARIANTS or int(match["patch"]) not in PATCHES:
        known = [*list_models(), *(f"ViT-{v.paper}/{p}" for v in VARIANTS.values() for p in PATCHES)]

        def likeness(other: str) -> float:
            return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

        near = sorted(known, key=likeness, reverse=True)[:4]
        raise ValueError(f"unknown model {name!r}; the nearest names are {', '.join(near)} (list_models() has all)")
    return VARIANTS[size], int(match["patch"]), int(match["image"] or 224)


def list_models(filter: str = "") -> list[str]:
    """The names that :func:`create_model` takes; any image size may stand for their 224.

    Args:
        filter: a part of the name, or a pattern with * and ?.
    """
    names = [f"vit_{size}_patch{patch}_224" for size in VARIANTS for patch in PATCHES]
    pattern = filter if any(c in filter for c in "*?[") else f"*{filter}*"
    return fnmatch.filter(names, pattern)


def create_model(name: str, pretrained: bool = False, checkpoint_path: str | Path | None = None, **kwargs: Any) -> ViT:
    """Build a :class:`fastvit.ViT` by name.

    Args:
        name: "vit_{tiny, small, medium, base, large, huge, so400m, giant, gigantic}_patch{8, 14, 16, 32}_{image size}"
            or "ViT-{Ti, S, M, B, L, H, So400m, g, G}/{patch}", which may end in "-384" for another image size than 224.
        pretrained: must be False: weights come from a file.
        checkpoint_path: weights to load: .npz (Google's), .safetensors or a torch.save'd state_dict.
        **kwargs: arguments of :class:`fastvit.ViT`; they override the name's.

    Raises:
        ValueError: an unknown name (the nearest ones are listed), or pretrained=True.
    """
    if pretrained:
        raise ValueError(
            "pretrained=True would download weights, which fastvit does not; give checkpoint_path= a file, or "
            "load_state_dict(timm.create_model(..., pretrained=True).state_dict())"
        )
    variant, patch, image = _parse(name)
    sizes: dict[str, Any] = {
        "img_size": image,
        "patch_size": patch,
        "embed_dim": variant.width,
        "depth": variant.depth,
        "num_heads": variant.heads,
        "mlp_ratio": variant.mlp_ratio,
    }
    model = ViT(**{**sizes, **kwargs})
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model

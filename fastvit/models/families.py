"""Names for more than sizes: DINOv3's models, as timm's functions of these names build them."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from fastvit.layers import BeitBlock, LayerNorm, SwiGLU


def _dinov3(width: int, depth: int, heads: int, mlp_ratio: float = 4, gated: bool = False) -> dict[str, Any]:
    return {
        "img_size": 256,
        "patch_size": 16,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": 2 * mlp_ratio if gated else mlp_ratio,
        "mlp_layer": SwiGLU if gated else None,
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,
        "qkv_bias": False,
        "init_values": 1e-5,
        "reg_tokens": 4,
        "pos_embed": "none",
        "rope": 100.0,
        "block_fn": BeitBlock,
        "norm_layer": partial(LayerNorm, eps=1e-5),
        "dynamic_img_size": True,
        "fix_init": True,
    }


_DINOV3 = {
    "tiny": _dinov3(192, 12, 3),
    "small": _dinov3(384, 12, 6),
    "small_plus": _dinov3(384, 12, 6, gated=True),
    "base": _dinov3(768, 12, 12),
    "large": _dinov3(1024, 24, 16),
    "huge_plus": _dinov3(1280, 32, 20, gated=True),
    "7b": _dinov3(4096, 40, 32, mlp_ratio=2, gated=True),
}
DINOV3_HEADS = {sizes["embed_dim"]: sizes["num_heads"] for sizes in _DINOV3.values()}

FAMILIES: dict[str, dict[str, Any]] = {
    f"vit_{size}_patch16_dinov3{biases}": sizes | {"qkv_bias": bool(biases)}
    for size, sizes in _DINOV3.items()
    for biases in ("", "_qkvb")
    if size + biases not in ("tiny", "7b_qkvb")  # which nobody has
}


def arguments(name: str) -> dict[str, Any] | None:
    """Arguments of :class:`fastvit.ViT` that a name stands for, which may end in an image size; None of no family."""
    match = re.fullmatch(r"(.+?)(?:_(\d+))?", name)
    if match is None or match[1] not in FAMILIES:
        return None
    return FAMILIES[match[1]] | ({"img_size": int(match[2])} if match[2] else {})

"""How a ViT's weights start: timm's scheme by default, the paper's JAX code, MoCo v3, or each layer's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

MODES = ("", "jax", "jax_nlhb", "moco", "reset", "skip")


def check_mode(mode: str) -> str:
    """Return ``mode``, or raise a ValueError that lists the modes."""
    if mode not in MODES:
        raise ValueError(f"unknown weight_init {mode!r}; accepted: {', '.join(map(repr, MODES))}")
    return mode


def _by_name(mode: str, name: str, module: nn.Module, head_bias: float) -> bool:
    """Start a linear layer or a patch projection as ``mode`` says; False where the mode has no rule for it."""
    if mode == "reset" or not isinstance(module, (nn.Linear, nn.Conv2d)):
        return False
    if isinstance(module, nn.Conv2d):
        if not mode.startswith("jax"):
            return False
        # A normal of variance 1 / fan-in, cut at two deviations; the cut lowers the deviation by this factor.
        std = math.sqrt(1.0 / module.weight[0].numel()) / 0.87962566103423978
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    elif mode.startswith("jax") and name.startswith("head"):
        nn.init.zeros_(module.weight)
        if module.bias is not None:
            nn.init.constant_(module.bias, head_bias)
        return True
    elif mode == "":
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif mode == "moco" and "qkv" in name:  # each of query, key and value on its own
        bound = math.sqrt(6.0 / (module.weight.shape[0] // 3 + module.weight.shape[1]))
        nn.init.uniform_(module.weight, -bound, bound)
    else:
        nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        if mode.startswith("jax") and "mlp" in name:
            nn.init.normal_(module.bias, std=1e-6)
        else:
            nn.init.zeros_(module.bias)
    return True


@torch.no_grad()
def init_vit(model: Any, mode: str, *, reset: bool) -> None:
    """Start the tokens and positions of a ViT, and every module below it.

    Args:
        mode: "" normal(0.02) for matrices; "jax" as the paper's code, with a zero head; "jax_nlhb" the same with the
            head's bias at -log(num_classes); "moco" as MoCo v3; "reset" each layer's own reset_parameters.
        reset: whether modules without a rule are reset too (not needed right after construction).
    """
    head_bias = -math.log(model.num_classes) if mode == "jax_nlhb" and model.num_classes > 0 else 0.0

    def start(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            start(f"{name}.{child_name}" if name else child_name, child)
        if name and not _by_name(mode, name, module, head_bias):
            if mode != "reset" and hasattr(module, "init_weights"):
                module.init_weights()
            elif reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    if model.pos_embed is not None:
        nn.init.trunc_normal_(model.pos_embed, std=0.02)
    for token in (model.cls_token, model.reg_token):
        if token is not None:
            nn.init.normal_(token, std=1e-6)
    if model.dist_token is not None:
        nn.init.trunc_normal_(model.dist_token, std=0.02)
    start("", model)
    if model.fix_init:
        for i, block in enumerate(model.blocks):
            scale = (2.0 * (i + 1)) ** 0.5
            block.attn.proj.weight.div_(scale)
            block.mlp.fc2.weight.div_(scale)

"""A BEiT block of ours and timm's with the same weights, and what a step of either gives."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Block as TimmBlock
from torch import Tensor, nn

from fastvit.layers import BeitBlock

WINDOW, WIDTH, HEADS = (3, 4), 32, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "BEiT": {"qkv_bias": True, "init_values": 0.3, "window_size": WINDOW},
    "without a table": {"qkv_bias": True},
    "bare": {"window_size": WINDOW},
    "a norm in the MLP": {"window_size": WINDOW, "scale_mlp": True},
}


def pair(dtype: torch.dtype, **options: Any) -> tuple[BeitBlock, TimmBlock]:
    ours, theirs = BeitBlock(WIDTH, HEADS, **options), TimmBlock(WIDTH, HEADS, **options)
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def run(block: nn.Module, x: Tensor, *rest: Any) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = block(x, *rest)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}

"""FLOPs of a model: counted by PyTorch on meta tensors, and derived by hand for a Vision Transformer.

Both count matrix products and convolutions only, 2 FLOPs for each multiply-add, as ``FlopCounterMode`` does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fastvit.ops import backends
from fastvit.tuning import compile_report

Size = int | tuple[int, int]


class Flops(NamedTuple):
    """FLOPs of one pass over a batch."""

    forward: int
    backward: int  # 0 without training
    parts: dict[str, int]  # the forward's by the model's children ("patch_embed", "blocks", "head"); they sum to it

    @property
    def total(self) -> int:
        """Return forward and backward together."""
        return self.forward + self.backward


def count(model: nn.Module, image_size: Size | None = None, batch: int = 1, training: bool = False) -> Flops:
    """Count the FLOPs of a model that takes images, on meta tensors: nothing is computed.

    The counter watches modules with hooks, and a watched ViT computes every token: the counts are the nominal ones,
    without the class token's saving (see :func:`vit_formula`).

    Args:
        model: takes (B, C, height, width), C being its ``in_chans`` (3 where it has none).
        image_size: (height, width), or one int; by default that of the model's patch embedding, or 224 without one.
        batch: images B.
        training: count the backward pass too: gradients of all parameters that require one, not of the images.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    size = getattr(getattr(model, "patch_embed", None), "img_size", 224) if image_size is None else image_size
    shape = (batch, getattr(model, "in_chans", 3), *_pair(size))
    weights = {name: _on_meta(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    images = torch.empty(shape, device="meta", dtype=next(model.parameters()).dtype)
    with (
        backends.backend("reference"),
        compile_report.without_notes(),
        torch.set_grad_enabled(training),
        FlopCounterMode(display=False) as counter,
    ):
        output = functional_call(model, weights, (images,))
        forward, top = counter.get_total_flops(), type(model).__name__
        by_module = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
        if training:
            output.sum().backward()
        backward = counter.get_total_flops() - forward
    parts = {name: by_module.get(f"{top}.{name}", 0) for name, _ in model.named_children()}
    return Flops(forward, backward, {name: flops for name, flops in parts.items() if flops})


def vit_formula(
    *,
    image_size: Size,
    patch_size: Size,
    width: int,
    depth: int,
    mlp: int,
    classes: int = 1000,
    channels: int = 3,
    prefix_tokens: int = 1,
    gated: bool = False,
    class_token_only: bool = False,
) -> dict[str, int]:
    """Return the forward FLOPs of a Vision Transformer for one image, by part, from its sizes. Heads do not matter.

    With N patches of K pixels, T = N + prefix_tokens, width D, L blocks and an MLP of M hidden features, in
    multiply-adds: N K D, then in each block T D 3D (qkv), T T D (scores), T T D (values), T D D (projection),
    T D M + T M D (MLP), then D classes. (Dosovitskiy et al., 2021, equations 1 to 4 and appendix A.)

    Args:
        image_size, patch_size: (height, width), or one int.
        width, depth, mlp: D, L, M. classes: of the head; 0 leaves it out. channels: of the images.
        prefix_tokens: class and register tokens.
        gated: the MLP's second product reads M / 2 features (SwiGLU).
        class_token_only: only the class token of the last block is computed (its keys and values are those of all),
            as ``fastvit.ViT`` does with ``global_pool="token"``: what is executed, not the nominal count.

    Returns:
        {"patch_embed", "qkv", "scores", "values", "proj", "mlp", "head"}: FLOPs; with a backward pass they are three
        times as many, less one "patch_embed", as images need no gradient.
    """
    (height, wide), (p, q) = _pair(image_size), _pair(patch_size)
    patches = (height // p) * (wide // q)
    tokens = patches + prefix_tokens
    # How many tokens are computed, summed over the blocks; keys and values are always all tokens'.
    rows = depth * tokens - (tokens - 1 if class_token_only else 0)
    multiply_adds = {
        "patch_embed": patches * (channels * p * q) * width,
        "qkv": rows * width * width + depth * tokens * width * 2 * width,
        "scores": rows * tokens * width,
        "values": rows * tokens * width,
        "proj": rows * width * width,
        "mlp": rows * width * mlp + rows * (mlp // 2 if gated else mlp) * width,
        "head": width * classes,
    }
    return {part: 2 * each for part, each in multiply_adds.items()}


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_like(t, device="meta").requires_grad_(t.requires_grad)

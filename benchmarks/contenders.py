"""Who is compared: each row of a comparison, and how to build it with the weights of one timm model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastvit
from fastvit.ops import backends

TIMM = "timm"
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """One row: a library's model, and the backend that runs it."""

    name: str
    backend: str
    build: Callable[[VisionTransformer], nn.Module]  # from timm's model, whose weights it takes
    context: Callable[[], AbstractContextManager[object]] = nullcontext  # around every call
    same_network: bool = True  # computes timm's logits
    channels_last: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} ({self.backend})"


class Logits(nn.Module):
    """A Hugging Face classifier that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits


def timm_vit(name: str, seed: int = 0) -> VisionTransformer:
    """timm's model with random weights, in eval mode: every one, so that biases and norms take part too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def to_torchvision(weights: Weights) -> Weights:
    """timm's state_dict in torchvision's layout."""
    rules = [
        (r"^cls_token$", "class_token"),
        (r"^pos_embed$", "encoder.pos_embedding"),
        (r"^patch_embed\.proj\.", "conv_proj."),
        (r"^norm\.", "encoder.ln."),
        (r"^head\.", "heads.head."),
        (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.encoder_layer_\1.ln_\2."),
        (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
        (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
        (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
    ]
    return {_rename(key, rules): value for key, value in weights.items()}


def to_hugging_face(weights: Weights) -> Weights:
    """timm's state_dict in the layout of transformers 5's ViTForImageClassification."""
    rules = [
        (r"^cls_token$", "vit.embeddings.cls_token"),
        (r"^pos_embed$", "vit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
        (r"^norm\.", "vit.layernorm."),
        (r"^head\.", "classifier."),
        (r"^blocks\.(\d+)\.norm1\.", r"vit.layers.\1.layernorm_before."),
        (r"^blocks\.(\d+)\.norm2\.", r"vit.layers.\1.layernorm_after."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"vit.layers.\1.attention.o_proj."),
        (r"^blocks\.(\d+)\.mlp\.", r"vit.layers.\1.mlp."),
    ]
    renamed = {}
    for key, value in weights.items():
        if ".attn.qkv." in key:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[re.sub(r"^blocks\.(\d+)\.attn\.qkv", rf"vit.layers.\1.attention.{letter}_proj", key)] = part
        else:
            renamed[_rename(key, rules)] = value
    return renamed


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key, found = re.subn(pattern, replacement, key)
        if found:
            return key
    raise ValueError(f"no rule for the weight {key!r}")


def _loaded(model: nn.Module, weights: Weights) -> nn.Module:
    model.load_state_dict(weights)
    return model


def _torchvision(source: VisionTransformer) -> nn.Module:
    from torchvision.models import VisionTransformer as TorchvisionViT

    block = source.blocks[0]
    model = TorchvisionViT(
        image_size=source.patch_embed.img_size[0],
        patch_size=source.patch_embed.patch_size[0],
        num_layers=len(source.blocks),
        num_heads=block.attn.num_heads,
        hidden_dim=source.embed_dim,
        mlp_dim=block.mlp.fc1.out_features,
        num_classes=source.num_classes,
    )
    return _loaded(model, to_torchvision(source.state_dict()))


def _hugging_face(source: VisionTransformer) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    block = source.blocks[0]
    config = ViTConfig(
        image_size=source.patch_embed.img_size[0],
        patch_size=source.patch_embed.patch_size[0],
        num_hidden_layers=len(source.blocks),
        num_attention_heads=block.attn.num_heads,
        hidden_size=source.embed_dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_labels=source.num_classes,
        layer_norm_eps=source.norm.eps,
        attn_implementation="sdpa",
    )
    return Logits(_loaded(ViTForImageClassification(config), to_hugging_face(source.state_dict())))


def _resnet50(source: VisionTransformer) -> nn.Module:
    from torchvision.models import resnet50

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resnet50(num_classes=source.num_classes)


def fastvit_backends() -> list[str]:
    """The backends that can run every op on this device, fastest expected first."""
    reasons = list(backends.availability().values())
    return [name for name in ("triton", "onednn", "reference") if all(op.get(name) is None for op in reasons)]


def contenders(model: str) -> list[Contender]:
    """Every row for one model name that timm and fastvit share (and a ResNet-50), timm's first."""

    def build_fastvit(source: VisionTransformer) -> nn.Module:
        return _loaded(fastvit.create_model(model), source.state_dict())

    def under(backend: str) -> Callable[[], AbstractContextManager[object]]:
        return lambda: fastvit.backend(backend)

    return [
        Contender(TIMM, "eager", copy.deepcopy),
        *[Contender("fastvit", name, build_fastvit, under(name)) for name in fastvit_backends()],
        Contender("torchvision", "eager", _torchvision),
        Contender("Hugging Face", "sdpa", _hugging_face),
        Contender("ResNet-50", "channels last", _resnet50, same_network=False, channels_last=True),
    ]

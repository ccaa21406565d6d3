"""Other libraries' models, small, with weights of which no two are alike, and what they give for the same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

SIZES = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 7}
HF_SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 32, 32)


def randomise(model: nn.Module) -> nn.Module:
    """No weight at a value that two of them share, so that none can be mistaken for another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter) + (parameter.ndim == 1) * parameter)
    return model.eval()


def timms(**options: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = randomise(timm.models.vision_transformer.VisionTransformer(**SIZES | options))
    return model, lambda: model(IMAGES)


def huggingfaces(
    config: Any, model: Any, output: Callable[[Any], Tensor], **options: Any
) -> tuple[nn.Module, Callable[[], Tensor]]:
    made = randomise(model(config(**HF_SIZES | options)))
    return made, lambda: output(made(pixel_values=IMAGES))


def named(name: str, **options: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    """timm's model of that name, with its own choices but for the sizes."""
    model = randomise(timm.create_model(name, **SIZES | options))
    return model, lambda: model(IMAGES)


def timms_beit(**options: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = randomise(timm.models.beit.Beit(**SIZES | options))
    return model, lambda: model(IMAGES)


def torchvisions() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = randomise(torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 128, num_classes=7))
    return model, lambda: model(IMAGES)


def classes(out: Any) -> Tensor:
    return out.logits


def pooled(out: Any) -> Tensor:
    return out.pooler_output


GATED = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4}
MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[], Tensor]]]] = {
    "timm": timms,
    "timm, registers": lambda: timms(reg_tokens=3, no_embed_class=True, init_values=0.1),
    "timm, average": lambda: timms(global_pool="avg", qkv_bias=False, qk_norm=True),
    "timm, no class token": lambda: timms(class_token=False, global_pool="avg", fc_norm=False),
    "timm, map": lambda: timms(global_pool="map", class_token=False),
    "timm, CLIP": lambda: timms(pre_norm=True),
    "timm, gated": lambda: timms(**GATED),
    "timm, DINOv3": lambda: named("vit_small_patch16_dinov3"),
    "timm, DINOv3 with biases": lambda: named("vit_base_patch16_dinov3_qkvb"),
    "timm, DINOv3 plus": lambda: named("vit_small_plus_patch16_dinov3_qkvb"),
    "timm, BEiT": lambda: named("beit_base_patch16_224"),
    "timm, BEiT, shared": lambda: timms_beit(use_shared_rel_pos_bias=True),
    "timm, BEiT, class token": lambda: timms_beit(use_rel_pos_bias=True, global_pool="token", qkv_bias=False),
    "timm, distilled": lambda: named("deit_tiny_distilled_patch16_224"),
    "torchvision": torchvisions,
    "huggingface": lambda: huggingfaces(
        transformers.ViTConfig, transformers.ViTForImageClassification, classes, intermediate_size=128, num_labels=7
    ),
    "dinov2": lambda: huggingfaces(transformers.Dinov2Config, transformers.Dinov2Model, pooled),
    "dinov2, gated": lambda: huggingfaces(
        transformers.Dinov2Config, transformers.Dinov2Model, pooled, use_swiglu_ffn=True
    ),
    "dinov2, registers": lambda: huggingfaces(
        transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel, pooled
    ),
    "dinov3": lambda: huggingfaces(
        transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel, pooled, intermediate_size=128, num_register_tokens=4
    ),
    "dinov3, gated": lambda: huggingfaces(
        transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel, pooled, intermediate_size=128,
        num_register_tokens=2, use_gated_mlp=True, hidden_act="silu",
    ),
    "beit": lambda: huggingfaces(
        transformers.BeitConfig, transformers.BeitForImageClassification, classes, intermediate_size=128, num_labels=7,
        use_relative_position_bias=True,
    ),
    "beit, shared": lambda: huggingfaces(
        transformers.BeitConfig, transformers.BeitModel, pooled, intermediate_size=128, use_mask_token=True,
        use_shared_relative_position_bias=True, use_relative_position_bias=True, use_mean_pooling=False,
        use_absolute_position_embeddings=True, layer_scale_init_value=0.0,
    ),
    "deit, distilled": lambda: huggingfaces(
        transformers.DeiTConfig, transformers.DeiTForImageClassificationWithTeacher, classes, intermediate_size=128,
        num_labels=7,
    ),
    "deit, one classifier": lambda: huggingfaces(
        transformers.DeiTConfig, transformers.DeiTForImageClassification, classes, intermediate_size=128, num_labels=7
    ),
    "clip": lambda: huggingfaces(
        transformers.CLIPVisionConfig, transformers.CLIPVisionModelWithProjection, lambda out: out.image_embeds,
        intermediate_size=128, projection_dim=9,
    ),
    "siglip": lambda: huggingfaces(
        transformers.SiglipVisionConfig, transformers.SiglipVisionModel, pooled, intermediate_size=128
    ),
}  # fmt: skip


def save(model: Any, folder: Path) -> Path:
    """The model as its own library saves it: a folder with a configuration, or a file."""
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
        return folder
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "model.pth")
    return folder / "model.pth"

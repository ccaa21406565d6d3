"""The networks that are compared, with weights that are the same in every process: names, sizes, who defines them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import timm
import torch
from torch import nn

from benchmarks import images
from fastvit.models import list_models
from fastvit.models.families import bit
from fastvit.models.families.vit import VARIANTS

# Figure 11 of the ViT paper, and the ResNets that most people run.
FIGURE_11 = (
    "vit_base_patch32_224",
    "vit_base_patch16_224",
    "vit_large_patch32_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "resnetv2_50x1_bit",
    "resnetv2_50x2_bit",
    "resnetv2_101x1_bit",
    "resnetv2_152x2_bit",
    "resnetv2_200x3_bit",
)
RESNETS = ("resnet50", "resnet101", "resnet152")
BIT = {f"resnetv2_{size}_bit": size for size in bit.SIZES}


@dataclass(frozen=True)
class Network:
    """A network by name at one image size; ``source`` has the weights that every contender takes."""

    name: str
    family: str  # "vit", "bit" or "resnet"
    size: int  # pixels, height and width: the one asked for, or the next smaller one that patches divide
    source: nn.Module


def family(name: str) -> str:
    """Which libraries have the network: "vit" (timm and fastvit names), "bit" (ResNet v2) or "resnet" (torchvision).

    Raises:
        ValueError: no network has the name.
    """
    if name in RESNETS:
        return "resnet"
    if name in BIT:
        return "bit"
    vits = [vit for vit in list_models("vit_*_224") if timm.is_model(vit)]
    if name in vits:
        return "vit"
    raise ValueError(f"{name!r} is no network of the benchmarks; these are {', '.join([*vits, *BIT, *RESNETS])}")


def title(name: str) -> str:
    """The name as papers write it: ViT-B/16, R50x1, ResNet-50."""
    if name in BIT:
        return f"R{BIT[name]}"
    if name in RESNETS:
        return "ResNet-" + name.removeprefix("resnet")
    variant = name.removeprefix("vit_").partition("_patch")[0]
    known = VARIANTS.get(variant)
    return f"ViT-{known.paper if known else variant}/{_patch(name)}"


def _patch(name: str) -> int:
    return int(name.partition("_patch")[2].partition("_")[0])


def check_size(name: str, size: int) -> None:
    """Raises:
    ValueError: the network can't see images of that size.
    """
    least = _patch(name) if family(name) == "vit" else 32
    if size < least:
        raise ValueError(f"{size} pixels are too few for {name}; accepted: {least} and more")


def _create(name: str, size: int) -> tuple[nn.Module, int]:
    """The network with its library's own initial weights, and the image size that it gets."""
    kind = family(name)
    if kind == "resnet":
        import torchvision

        return torchvision.models.get_model(name, weights=None), size
    if kind == "bit":
        from timm.layers import StdConv2d
        from timm.models.resnetv2 import ResNetV2

        depth, width = BIT[name].split("x")  # timm has names for some only; these are the arguments of all
        conv, layers = partial(StdConv2d, eps=1e-8), bit.LAYERS[depth]
        return ResNetV2(layers, width_factor=int(width), stem_type="fixed", conv_layer=conv), size
    size = size // _patch(name) * _patch(name)
    return timm.create_model(name, img_size=size, num_classes=1000), size  # timm has no head for some names


def build(name: str, size: int, seed: int = 0) -> Network:
    """The network on the CPU, float32, in eval mode, without gradients.

    Every weight is random and none is zero or one, so that biases, norms and heads take part. Batch norms have the
    statistics of photographs. The same arguments give the same bits in every process.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, size = _create(name, size)
        model = model.eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0  # take the statistics of one batch as they are
        if norms:
            model.train()(images.crops(4, 64))
            model.eval()
        for norm in norms:
            norm.momentum = 0.1
    return Network(name, family(name), size, model)

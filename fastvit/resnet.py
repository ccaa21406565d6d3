"""The ResNets that the ViT paper compares with: the public name of :mod:`fastvit.models.resnet`."""

from fastvit.models.resnet import Bottleneck, GroupNormReLU, ResNetV2, StdConv2d

__all__ = ["Bottleneck", "GroupNormReLU", "ResNetV2", "StdConv2d"]

"""What a family of models declares: :class:`Family`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fastvit.checkpoints.rules import Layout
from fastvit.models.vit import ViT

# timm's pretrained_cfg where a model says nothing else.
PRETRAINED_CFG: dict[str, Any] = {
    "num_classes": 1000,
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Model(NamedTuple):
    """A named model.

    Args:
        arguments: of the family's class. "img_size" is the size that the name ends in; any other may stand there.
        cfg: entries of timm's ``pretrained_cfg`` that differ from :data:`PRETRAINED_CFG`: pixel statistics, crop.
    """

    arguments: Mapping[str, Any]
    cfg: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Family:
    """A family of models: everything about it that code outside of its file reads.

    A file of this package that holds a ``FAMILY`` adds one: ``create_model``, ``list_models``, ``from_checkpoint``,
    ``fastvit convert``, timm's registry and ``fastvit.accelerate`` read it from there. For example::

        LAYOUT = Layout("acme", "stem.proj.weight", (*same(("stem.proj", "patch_embed.proj"), ...),), written=("acme",))
        FAMILY = Family(
            models={"acme_small_patch16_224": Model({**VARIANTS["small"].arguments, "img_size": 224}, IMAGENET)},
            layouts=(LAYOUT,),
        )

    Args:
        models: name -> model, the names of timm where timm has the model. Any image size may follow in place of the
            name's own.
        aliases: another name, as a paper writes it, without an image size -> a name of ``models`` without it.
        build: class of the models, which takes the arguments.
        layouts: the weight layouts of every library that has such models. They are tried in this order, before those
            of the plain ViT.
        refused: a pattern of a tensor's name -> why weights with such a tensor are no model of ours.
        recognise: whether weights, by their names under ours, are of this family, where the plain ViT's inference
            (:mod:`fastvit.checkpoints.infer`) needs more.
        infer: arguments that such weights tell besides, from the weights under our names.
        reduction: pixels of the image that are one pixel of what the patch embedding projects, from the weights.
        plain: the weights with the names of a plain ViT's blocks, for its inference.
        own_names: whether weights have this class's own names, no layout, and ``infer`` returns all arguments.
        in_timm: whether :func:`fastvit.timm_registry.register` adds the models.
    """

    models: Mapping[str, Model] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    build: Callable[..., Any] = ViT
    layouts: tuple[Layout, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    recognise: Callable[[Collection[str]], bool] = lambda names: False
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]] = lambda state: {}
    reduction: Callable[[Mapping[str, Tensor]], int] = lambda state: 1
    plain: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda state: state
    own_names: bool = False
    in_timm: bool = True

"""Model names: ``create_model("vit_base_patch16_224")``, or ``"ViT-B/16"``, or ``"R50x1"``; ``list_models()``."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastvit.checkpoints import files
from fastvit.checkpoints.load import Checkpoint, Source, fit, load_checkpoint, read_checkpoint
from fastvit.models import families
from fastvit.models.architecture import architecture, resnet_architecture
from fastvit.models.axial import AxialResNet, AxialViT
from fastvit.models.families import VARIANTS
from fastvit.models.resnet import ResNetV2
from fastvit.models.vit import ViT

PATCHES = (8, 14, 16, 32)

# The BiT ResNets of "Big Transfer" and of the ViT paper (figure 11): depth x width.
RESNETS = ("50x1", "50x2", "50x3", "101x1", "101x3", "152x1", "152x2", "152x4", "200x3")
RESNET_LAYERS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3), "200": (3, 24, 36, 3)}

_BY_PAPER = {variant.paper: name for name, variant in VARIANTS.items()}
_TIMM = re.compile(r"vit_(?P<size>[a-z0-9]+)_patch(?P<patch>\d+)(?:_(?P<image>\d+))?")
_PAPER = re.compile(r"ViT-(?P<size>[A-Za-z0-9]+)/(?P<patch>\d+)(?:[-_](?P<image>\d+))?")
_AXIAL = re.compile("axial_(?=vit_)|Axial-(?=ViT-)")
_AXIAL_RESNETS = {name: depth for depth in ("50",) for name in (f"axial_resnet{depth}", f"AxialResNet{depth}")}
_RESNET_SIZES = {name: size for size in RESNETS for name in (f"resnetv2_{size}_bit", f"R{size}")}


def _parse(name: str) -> tuple[type[ViT] | type[ResNetV2], dict[str, Any]]:
    """(class, sizes) that a name stands for, or a ValueError with the nearest names."""
    if name in _RESNET_SIZES:
        depth, width = _RESNET_SIZES[name].split("x")
        return ResNetV2, {"layers": RESNET_LAYERS[depth], "width_factor": int(width)}
    if name in _AXIAL_RESNETS:
        return AxialResNet, {"layers": RESNET_LAYERS[_AXIAL_RESNETS[name]]}
    if (of_family := families.arguments(name)) is not None:
        return ViT, of_family
    plain = _AXIAL.sub("", name)
    timm, paper = _TIMM.fullmatch(plain), _PAPER.fullmatch(plain)
    match = timm or paper
    size = timm["size"] if timm else _BY_PAPER.get(paper["size"], "") if paper else ""
    if match is None or size not in VARIANTS or int(match["patch"]) not in PATCHES:
        papers = [f"ViT-{v.paper}/{p}" for v in VARIANTS.values() for p in PATCHES] + [f"R{size}" for size in RESNETS]
        papers += families.PAPERS

        def likeness(other: str) -> float:
            return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

        near = sorted([*list_models(), *papers], key=likeness, reverse=True)[:4]
        raise ValueError(f"unknown model {name!r}; the nearest names are {', '.join(near)} (list_models() has all)")
    variant = VARIANTS[size]
    return ViT if plain == name else AxialViT, {
        "img_size": int(match["image"] or 224),
        "patch_size": int(match["patch"]),
        **variant.arguments,
    }


def model_class(name: str) -> type[ViT] | type[ResNetV2]:
    """The class of a model's name.

    Raises:
        ValueError: an unknown name; the nearest ones are listed.
    """
    return _parse(name)[0]


def list_models(filter: str = "") -> list[str]:
    """The names that :func:`create_model` takes; any image size may stand for a ViT's 224.

    Args:
        filter: a part of the name, or a pattern with * and ?: "vit_*" are the Vision Transformers.
    """
    names = [f"vit_{size}_patch{patch}_224" for size in VARIANTS for patch in PATCHES]
    names += families.FAMILIES
    names += ["axial_vit_base_patch16_224", "axial_vit_base_patch32_224", "axial_resnet50"]
    names += [f"resnetv2_{size}_bit" for size in RESNETS]
    pattern = filter if any(c in filter for c in "*?[") else f"*{filter}*"
    return fnmatch.filter(names, pattern)


def create_model(
    name: str, pretrained: bool = False, checkpoint_path: str | Path | None = None, **kwargs: Any
) -> ViT | Any:
    """Build a :class:`fastvit.ViT`, or one of the :mod:`fastvit.resnet` that it is compared with, by name.

    Args:
        name: "vit_{tiny, small, medium, base, large, huge, so400m, giant, gigantic}_patch{8, 14, 16, 32}_{image size}"
            or "ViT-{Ti, S, M, B, L, H, So400m, g, G}/{patch}", which may end in "-384" for another image size than 224;
            "vit_{small, small_plus, base, large, huge_plus, 7b}_patch16_dinov3", which but for the last may end in
            "_qkvb", and "vit_tiny_patch16_dinov3_qkvb";
            "beit_{base, large}_patch16_{image size}", "beitv2_{base, large}_patch16_{image size}";
            "deit_{tiny, small, base}_distilled_patch16_{image size}";
            "vit_{base, large}_r50_{s16, s32}_{image size}" or "R50+ViT-{B, L}/{16, 32}", and timm's other hybrids,
            "vit_{small, base}_r26_s32_{image size}", "vit_tiny_r_s16_p8_{image size}";
            "axial_" before a ViT's name or "Axial-" before the paper's ("Axial-ViT-B/16"), and "axial_resnet50";
            "resnetv2_{50x1, 50x2, 50x3, 101x1, 101x3, 152x1, 152x2, 152x4, 200x3}_bit" or "R{50x1, ...}".
        pretrained: must be False: weights come from a file.
        checkpoint_path: weights to load into a ViT with :func:`fastvit.load_checkpoint`; into a ResNet, .safetensors or
            a torch.save'd state_dict.
        **kwargs: arguments of :class:`fastvit.ViT` or :class:`fastvit.resnet.ResNetV2`; they override the name's.

    Returns:
        A ViT, or for a ResNet's name a ResNetV2 (which is typed as Any, so that a ViT needs no cast).

    Raises:
        ValueError: an unknown name (the nearest ones are listed), pretrained=True, or an .npz file for a ResNet.
    """
    if pretrained:
        raise ValueError(
            "pretrained=True would download weights, which fastvit does not; give checkpoint_path= a file, or "
            "load_state_dict(timm.create_model(..., pretrained=True).state_dict())"
        )
    model_class, sizes = _parse(name)
    if issubclass(model_class, ResNetV2) and checkpoint_path is not None and Path(checkpoint_path).suffix == ".npz":
        raise ValueError(f"{checkpoint_path}: .npz files are for ViTs; a ResNet takes .safetensors or a state_dict")
    model = model_class(**{**sizes, **kwargs})
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model


def from_checkpoint(
    source: Source,
    *,
    num_classes: int | None = None,
    num_heads: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> ViT | Any:
    """The :class:`fastvit.ViT` that weights are of, with them: its architecture is read off their shapes.

    What shapes don't tell (attention heads, the norms' eps, the activation, the image's size) comes from the
    configuration beside them where there is one, else from what models of that layout and width have; it is logged.

    Args:
        source: a file, a folder of Hugging Face, "hf-hub:org/name" or a state_dict, in any layout that
            :func:`fastvit.load_checkpoint` takes; or of a BiT ResNet under timm's names, or an AxialResNet.
        num_classes: another number than the file's starts a new classifier; 0 leaves it out.
        num_heads: attention heads, in place of what is found.
        device, dtype: of the model; by default the CPU and PyTorch's default dtype.
        **kwargs: arguments of ViT that go before what is found: img_size and patch_size resample, for example.

    Returns:
        A ViT, or for a ResNet's weights a ResNetV2 (which is typed as Any, so that a ViT needs no cast).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of no known layout, or does not fit what is asked for.
    """
    copy = isinstance(source, Mapping | Checkpoint)
    if not isinstance(source, Checkpoint):
        source = files.read(source)
        if is_resnet(source):
            return _resnet(source, num_classes, device, dtype, kwargs)
    checkpoint = read_checkpoint(source)
    del source  # or the file's tensors would outlive the checkpoint's
    told = checkpoint.options if num_heads is None else {**checkpoint.options, "num_heads": num_heads}
    heads = {variant.width: variant.heads for variant in VARIANTS.values()}
    if "rope" in told:
        heads |= {variant.width: variant.heads for variant, _ in families.DINOV3.values()}
    kind: type[ViT] = ViT
    state = checkpoint.state
    if any(name.startswith("blocks.0.row.") for name in state):  # of which the columns' blocks have the shapes too
        kind, state = AxialViT, {name.replace(".row.", "."): value for name, value in state.items()}
    found = architecture(state, told, checkpoint.name, heads) | kwargs
    dtype = dtype or torch.get_default_dtype()
    if num_classes not in (None, found["num_classes"]):
        model = kind(**found | {"num_classes": num_classes}, device=device, dtype=dtype)
        load_checkpoint(model, checkpoint, head="drop")
        return model
    # Never twice in memory: the model takes a file's tensors for its parameters. Those read before are somebody's own.
    model = kind(**found, device="meta", dtype=dtype)
    values = fit(model, checkpoint, "keep")
    if not copy:
        checkpoint.state.clear()
    model.load_state_dict(
        {name: values.pop(name).to(device or "cpu", dtype, copy=copy) for name in list(values)}, assign=True
    )
    return model


def is_resnet(raw: files.Raw) -> bool:
    """Whether weights are a ResNet's, which :func:`fastvit.load_checkpoint` reads by no other names than its own."""
    return "stem.conv.weight" in raw.tensors and "patch_embed.proj.weight" not in raw.tensors


def _resnet(
    raw: files.Raw,
    num_classes: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
) -> ResNetV2:
    """The ResNet that weights are of; see :func:`from_checkpoint`.

    Raises:
        ValueError: weights are missing, unexpected or of other shapes; or an option is none of a ResNet's.
    """
    try:
        found = resnet_architecture(raw.tensors)
        kind = AxialResNet if "num_heads" in found else ResNetV2
        model = kind(**found | dict(options), device=device, dtype=dtype)
        model.load_state_dict(raw.tensors)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{raw.name} is a ResNet's, but: {error}") from error
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
    return model

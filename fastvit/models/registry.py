"""Model names: ``create_model("vit_base_patch16_224")``, or ``"ViT-B/16"``, or ``"R50x1"``; ``list_models()``."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastvit.checkpoints import files
from fastvit.checkpoints.infer import infer_arguments
from fastvit.checkpoints.load import Checkpoint, Source, fit, load_checkpoint, read_checkpoint
from fastvit.models import families
from fastvit.models.families.vit import VARIANTS, by_width
from fastvit.models.vit import ViT


def _find(name: str) -> tuple[families.Family, families.Model]:
    """Return the family and the model of a name, or raise a ValueError with the nearest names."""
    found = families.find(name)
    if found is not None:
        return found

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

    known = [*list_models(), *(alias for family in families.FAMILIES.values() for alias in family.aliases)]
    near = sorted(known, key=likeness, reverse=True)[:4]
    raise ValueError(f"unknown model {name!r}; the nearest names are {', '.join(near)} (list_models() has all)")


def model_class(name: str) -> Any:
    """Return the class of a model's name.

    Raises:
        ValueError: an unknown name; the nearest ones are listed.
    """
    return _find(name)[0].build


def list_models(filter: str = "") -> list[str]:
    """Return the names that :func:`create_model` takes; any image size may stand for a ViT's own.

    Args:
        filter: a part of the name, or a pattern with * and ?: "vit_*" are the Vision Transformers.
    """
    names = [name for family in families.FAMILIES.values() for name in family.models]
    pattern = filter if any(c in filter for c in "*?[") else f"*{filter}*"
    return fnmatch.filter(names, pattern)


def create_model(
    name: str, pretrained: bool = False, checkpoint_path: str | Path | None = None, **kwargs: Any
) -> ViT | Any:
    """Build a :class:`fastvit.ViT`, or one of the :mod:`fastvit.resnet` that it is compared with, by name.

    Args:
        name: one of :func:`list_models`, where another image size may stand at the end, or a name as in the papers:
            "ViT-B/16", "ViT-L/16-384", "R50+ViT-B/16", "Axial-ViT-B/16" or "R50x1".
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
    family, known = _find(name)
    if family.own_names and checkpoint_path is not None and Path(checkpoint_path).suffix == ".npz":
        raise ValueError(f"{checkpoint_path}: .npz files are for ViTs; {name} takes .safetensors or a state_dict")
    model = family.build(**{**known.arguments, **kwargs})
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
    """Build a :class:`fastvit.ViT` with the architecture that the weights' shapes imply, and load the weights.

    Shapes don't imply attention heads, the norms' eps, the activation and the image's size: these come from the
    configuration beside the weights, else from the usual models of that layout and width, and are logged.

    Args:
        source: a file, a folder of Hugging Face, "hf-hub:org/name" or a state_dict, in any layout that
            :func:`fastvit.load_checkpoint` takes; or of a BiT ResNet under timm's names, or an AxialResNet.
        num_classes: another number than the file's starts a new classifier; 0 leaves it out.
        num_heads: attention heads, in place of the inferred number.
        device, dtype: of the model; by default the CPU and PyTorch's default dtype.
        **kwargs: arguments of ViT, in place of the inferred ones: img_size and patch_size resample, for example.

    Returns:
        A ViT, or for a ResNet's weights a ResNetV2 (which is typed as Any, so that a ViT needs no cast).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of no known layout, or does not fit the arguments.
    """
    copy = isinstance(source, Mapping | Checkpoint)
    if not isinstance(source, Checkpoint):
        source = files.read(source)
        if is_resnet(source):
            return _with_own_names(source, num_classes, device, dtype, kwargs)
    checkpoint = read_checkpoint(source)
    del source  # or the file's tensors would outlive the checkpoint's
    options = checkpoint.options if num_heads is None else {**checkpoint.options, "num_heads": num_heads}
    family, state = families.family_of(checkpoint.state), checkpoint.state
    heads = {**by_width(VARIANTS), **checkpoint.heads}
    found = infer_arguments(family.plain(state), options, checkpoint.name, heads, *families.infer(state)) | kwargs
    dtype = dtype or torch.get_default_dtype()
    if num_classes not in (None, found["num_classes"]):
        model = family.build(**found | {"num_classes": num_classes}, device=device, dtype=dtype)
        load_checkpoint(model, checkpoint, head="drop")
        return model
    # Never twice in memory: the model takes a file's tensors for its parameters. The caller owns those of a state_dict.
    model = family.build(**found, device="meta", dtype=dtype)
    values = fit(model, checkpoint, "keep")
    if not copy:
        checkpoint.state.clear()
    model.load_state_dict(
        {name: values.pop(name).to(device or "cpu", dtype, copy=copy) for name in list(values)}, assign=True
    )
    return model


def is_resnet(raw: files.Raw) -> bool:
    """Return whether weights are a ResNet's, which :func:`fastvit.load_checkpoint` reads by its own names alone."""
    return families.family_of(raw.tensors).own_names


def _with_own_names(
    raw: files.Raw,
    num_classes: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
) -> Any:
    """Return the model of weights under its class's own names; see :func:`from_checkpoint`.

    Raises:
        ValueError: weights are missing, unexpected or of other shapes; or an option is not of that class.
    """
    family = families.family_of(raw.tensors)
    try:
        model = family.build(**family.infer(raw.tensors) | dict(options), device=device, dtype=dtype)
        model.load_state_dict(raw.tensors)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{raw.name} has the names of a {family.build.__name__}, but: {error}") from error
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
    return model

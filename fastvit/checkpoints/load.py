"""Weights into a model, whatever layout they come in: all of them or, where they don't fit, none."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.checkpoints import files
from fastvit.checkpoints.backbone import stem_of
from fastvit.checkpoints.huggingface import folder_of
from fastvit.checkpoints.layouts import named, recognise, unwrapped
from fastvit.checkpoints.npz import from_npz, to_npz
from fastvit.checkpoints.rules import State
from fastvit.checkpoints.sizes import heads_of
from fastvit.layers.resample import (
    adapt_channels,
    resample_patch_embed,
    resample_pos_embed,
    resample_rel_pos_table,
    window_of,
)
from fastvit.ops import onednn

log = logging.getLogger("fastvit")

HEADS = ("auto", "keep", "drop")


@dataclass
class Checkpoint:
    """Weights under timm's names.

    Args:
        name: of the file, for messages.
        layout: that they came in.
        state: the weights.
        options: arguments of :class:`fastvit.ViT` that the file or its configuration tells, and "eps" of its norms.
        heads: attention heads by width of the models in that layout, where they are not the plain ViT's.
    """

    name: str
    layout: str
    state: State
    options: dict[str, Any] = field(default_factory=dict)
    heads: Mapping[int, int] = field(default_factory=dict)


Source = str | os.PathLike[str] | Mapping[str, Any] | files.Raw | Checkpoint


def read_checkpoint(source: Source, prefix: str = "") -> Checkpoint:
    """The weights of a file, folder, ``hf-hub:`` name or state_dict, in whichever layout, or those read before.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of no layout that is known, or has weights that nothing is known about.
    """
    if isinstance(source, Checkpoint):
        return source
    raw = files.read(source)
    if raw.npz:
        state, heads = from_npz(raw.tensors, Path(raw.name), prefix)
        return Checkpoint(raw.name, "npz", state, {"num_heads": heads})
    try:
        tensors = unwrapped(raw.tensors)
        layout = recognise(list(tensors))
        state, useless, unknown = layout.to_ours(tensors)
        options = layout.options(raw.config)
    except ValueError as error:
        raise ValueError(f"{raw.name}: {error}") from error
    if whole := [name for name, value in state.items() if not value.is_floating_point()]:
        raise ValueError(
            f"{raw.name} has weights of integers, quantised ones: {_listed(whole)}; accepted: floating point"
        )
    if unknown:
        raise ValueError(f"{raw.name} looks like {layout.name}, but has {_listed(unknown)}, which no ViT has")
    if useless:
        log.info("%s: %s left out", raw.name, _listed(useless))
    log.info("%s: layout %s, %d tensors", raw.name, layout.name, len(state))
    return Checkpoint(raw.name, layout.name, state, options, layout.heads)


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def load_checkpoint(model: nn.Module, source: Source, *, head: str = "auto", prefix: str = "") -> None:
    """Load weights into a model with timm's names, from the layouts of timm, torchvision, Hugging Face and others.

    Position embeddings, tables of relative positions, patch projections and image channels of another size are
    resampled; what was done is logged.

    Args:
        model: a :class:`fastvit.ViT`; any other module takes a file of its own names.
        source: a file (.safetensors, .npz, or torch.save's), a folder of Hugging Face, "hf-hub:org/name", a state_dict.
        head: "keep" loads the classifier and refuses one of other classes, "drop" leaves the model's own as it is, and
            "auto" loads it where the classes are as many.
        prefix: of an .npz's arrays, if they lie elsewhere than usual.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such checkpoint, or weights are missing, unexpected or misshapen: each is named. The model
            then is as it was.
    """
    if not hasattr(model, "patch_embed") and not isinstance(source, Checkpoint):
        model.load_state_dict(files.read(source).tensors)
        return
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device and can't hold weights: model.to_empty(device=...) first")
    values = fit(model, read_checkpoint(source, prefix), head)
    onednn.drop(model.parameters())
    with torch.no_grad():
        own = model.state_dict(keep_vars=True)
        for name, value in values.items():
            own[name].copy_(value)


def fit(model: Any, checkpoint: Checkpoint, head: str = "auto") -> State:
    """A checkpoint's weights in the sizes of a model, which are all of the model's (but for a head that is left out).

    Raises:
        ValueError: as :func:`load_checkpoint`.
    """
    if head not in HEADS:
        raise ValueError(f"head={head!r}; accepted: {', '.join(map(repr, HEADS))}")
    name, values, own = checkpoint.name, dict(checkpoint.state), model.state_dict(keep_vars=True)
    if checkpoint.layout == "npz" and "fc_norm.weight" in own and "norm.weight" not in own:
        for kind in ("weight", "bias"):  # the paper's code pools before its last norm, or after it
            values[f"fc_norm.{kind}"] = values.pop(f"norm.{kind}")
    left_out = _head(values, own, head, name)
    _resample(model, values, own, checkpoint)
    wrong = [
        f"{key}: the file has {tuple(values[key].shape)}, the model {tuple(own[key].shape)}"
        for key in sorted(set(values) & set(own))
        if values[key].shape != own[key].shape
    ]
    absent, unexpected = sorted(set(own) - set(values) - left_out), sorted(set(values) - set(own))
    if absent:
        wrong.append(f"the file has no {_listed(absent)}")
    if unexpected:
        wrong.append(
            f"the model has no {_listed(unexpected)}; build it with the file's options, as from_checkpoint does"
        )
    turned, rope = checkpoint.options.get("rope"), getattr(model, "rope", None)
    if turned is not None and rope is None:  # no tensor would tell
        wrong.append(f"the file's queries and keys are turned by position; build the model with rope={turned}")
    elif turned is not None and rope != turned:
        log.warning("%s: rope is %s there and %s in the model, which keeps it", name, turned, rope)
    if wrong:
        raise ValueError(f"{name} does not fit the model, which is as it was:\n  " + "\n  ".join(wrong))
    return values


def _head(values: State, own: Mapping[str, Tensor], head: str, name: str) -> set[str]:
    """Take the classifier out of ``values`` where it is not to be loaded -> the model's names that are left alone."""
    names = {key for key in (*values, *own) if key.startswith(("head.", "head_dist.", "pre_logits."))}
    same = all(key in own and key in values and own[key].shape == values[key].shape for key in names)
    if head == "keep" or (head == "auto" and same):
        return set()
    for key in names:
        values.pop(key, None)
    if names & set(own):
        log.warning("%s: its classifier is not loaded, the model keeps its own", name)
    return names


def _resample(model: Any, values: State, own: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Positions, tables, patches and channels in the model's sizes."""
    projection, stem = values.get("patch_embed.proj.weight"), f"{stem_of(own)}.conv.weight"
    if stem in values and values[stem].shape != own[stem].shape:  # a hybrid's channels are those of its stem
        values[stem] = adapt_channels(values[stem], own[stem].shape[1])
        log.info("%s: %d channels adapted to %d", checkpoint.name, checkpoint.state[stem].shape[1], own[stem].shape[1])
    if projection is not None and projection.shape != own["patch_embed.proj.weight"].shape:
        _, channels, p, q = own["patch_embed.proj.weight"].shape
        values["patch_embed.proj.weight"] = resample_patch_embed(adapt_channels(projection, channels), (p, q))
        log.info("%s: patches of %s resampled to %s", checkpoint.name, tuple(projection.shape[1:]), (channels, p, q))
    grid, old, size = model.patch_embed.grid_size, None, checkpoint.options.get("img_size")
    if size is not None and projection is not None:
        height, width = (size, size) if isinstance(size, int) else size
        pixels = getattr(model.patch_embed, "reduction", 1)  # of a pixel that is projected
        old = height // (pixels * projection.shape[2]), width // (pixels * projection.shape[3])
    positions = values.get("pos_embed")
    tables = [name for name in values if name.endswith("relative_position_bias_table") and name in own]
    try:
        if positions is not None and "pos_embed" in own and positions.shape != own["pos_embed"].shape:
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            # linearly in Google's files, as their own code and timm do
            how = ("bilinear", False) if checkpoint.layout == "npz" else ("bicubic", True)
            values["pos_embed"] = resample_pos_embed(positions, grid, old, prefix, *how)
            log.info("%s: %d positions resampled to %dx%d, %s", checkpoint.name, positions.shape[1], *grid, how[0])
        for name in tables:
            rows = values[name].shape[0]
            values[name] = resample_rel_pos_table(values[name], grid, window_of(rows, old or grid))
            if values[name].shape[0] != rows:
                log.info("%s: %s, of %d rows, resampled to %dx%d patches", checkpoint.name, name, rows, *grid)
    except ValueError as error:
        raise ValueError(f"{checkpoint.name} does not fit the model, which is as it was: {error}") from error


def mismatch_advice(model: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """What to do about keys of ``state_dict`` whose shape is not the model's, one line each; "" if all fit."""
    own = model.state_dict()
    wrong = {
        name: (tuple(value.shape), tuple(own[name].shape))
        for name, value in state_dict.items()
        if name in own and hasattr(value, "shape") and value.shape != own[name].shape
    }
    advice = []
    for name, (given, wanted) in wrong.items():
        if len(given) != len(wanted):
            advice.append(f"{name}: the file has {given}, the model {wanted}: another number of dimensions")
        elif name == "pos_embed" and given[-1] == wanted[-1]:
            advice.append(
                f"pos_embed: the file has {given[1]} positions, the model {wanted[1]}. Build the model with the file's "
                "img_size (and patch_size, class_token, reg_tokens, no_embed_class), load, then call "
                "set_input_size(img_size=...), which resamples"
            )
        elif name.endswith("relative_position_bias_table") and given[-1] == wanted[-1]:
            advice.append(
                f"{name}: the file has {given[0]} relative positions, the model {wanted[0]}. Build the model with the "
                "file's img_size (and patch_size), load, then call set_input_size(img_size=...), which resamples"
            )
        elif name == "patch_embed.proj.weight" and given[:2] == wanted[:2]:
            advice.append(
                f"patch_embed.proj.weight: the file's patches are {given[2]}x{given[3]}, the model's "
                f"{wanted[2]}x{wanted[3]}. Build the model with patch_size=({given[2]}, {given[3]}), load, then call "
                "set_input_size(patch_size=...)"
            )
        elif name.startswith(("head.", "head_dist.")):
            advice.append(
                f"{name}: the file has {given[0]} classes, the model {wanted[0]}. Build the model with "
                f"num_classes={given[0]}, load, then call reset_classifier({wanted[0]})"
            )
        else:
            advice.append(f"{name}: the file has {given}, the model {wanted}: it is another architecture")
    if not wrong and not set(own) & set(state_dict):
        advice.append(f"no key of the file is the model's, another layout? It begins with {sorted(state_dict)[:3]}")
    return "\n".join(f"  {line}" for line in advice)


def convert(source: Source, path: str | os.PathLike[str], layout: str = "timm", num_heads: int | None = None) -> None:
    """Write the weights of ``source`` to ``path`` in another layout; the values stay what they are, bit for bit.

    Args:
        source: as in :func:`load_checkpoint`.
        path: .safetensors, .npz (of layout "npz" alone), else torch.save's. In Hugging Face's layouts a path without a
            suffix is a folder, with the config.json that transformers' ``from_pretrained`` reads.
        layout: "npz" or one of :func:`fastvit.checkpoints.layouts.written`.
        num_heads: attention heads, which an .npz and a folder need, where the source does not tell.

    Raises:
        ValueError: an unknown layout, or weights that it has no place for.
    """
    path = Path(path)
    if layout != "npz":
        named(layout, {})  # or an error
    if (path.suffix == ".npz") != (layout == "npz"):
        raise ValueError(f"{path} in layout {layout!r}: .npz files and the layout 'npz' go together")
    checkpoint = read_checkpoint(source)
    if layout == "npz":
        files.write(path, to_npz(checkpoint.state, _heads(checkpoint, num_heads, "an .npz")))
        return
    found = named(layout, checkpoint.state)
    if found.huggingface is not None and (path.is_dir() or not path.suffix):
        heads = _heads(checkpoint, num_heads, "a config.json")
        files.write_folder(path, *folder_of(checkpoint.state, found, checkpoint.options, heads, checkpoint.name))
    else:
        files.write(path, found.from_ours(checkpoint.state))


def _heads(checkpoint: Checkpoint, num_heads: int | None, needs: str) -> int:
    """The attention heads that the caller gives, else those that the source or its tensors tell."""
    heads = num_heads or checkpoint.options.get("num_heads") or heads_of(checkpoint.state)
    if heads is None:
        raise ValueError(f"{checkpoint.name} does not tell its attention heads, which {needs} needs: give num_heads=")
    return int(heads)

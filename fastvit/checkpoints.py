"""Weights from files: the resampling of positions and patches, Google's .npz layout, and state_dict files.

Nothing here knows a model class: the loaders take any module with timm's names.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.ops.library import autocasting
from fastvit.packing import Layout

Pair = tuple[int, int]


@torch.fx.wrap
def resample_pos_embed(
    pos_embed: Tensor,
    new_size: Pair,
    old_size: Pair | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Position embeddings for another grid, interpolated in 2-D (section 3.2 of the ViT paper), with gradients.

    Args:
        pos_embed: (1, P + h * w, D), the grid in row-major order.
        new_size: (h', w').
        old_size: (h, w); by default the grid is square.
        num_prefix_tokens: P leading rows that are kept as they are.
        interpolation, antialias: as in F.interpolate; timm's defaults.

    Returns:
        (1, P + h' * w', D) in the dtype of ``pos_embed``, interpolated in float32 at least.

    Raises:
        ValueError: the rows are not a grid of ``old_size``.
    """
    rows = pos_embed.shape[1] - num_prefix_tokens
    if old_size is None:
        side = math.isqrt(max(rows, 0))
        old_size = (side, side)
    if rows < 1 or old_size[0] * old_size[1] != rows:
        raise ValueError(
            f"pos_embed has {pos_embed.shape[1]} rows, {num_prefix_tokens} of them for prefix tokens: "
            f"the other {rows} are no {old_size[0]}x{old_size[1]} grid"
        )
    if old_size[0] == new_size[0] and old_size[1] == new_size[1]:
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = grid.unflatten(1, old_size).permute(0, 3, 1, 2).to(torch.promote_types(pos_embed.dtype, torch.float32))
    grid = F.interpolate(grid, size=new_size, mode=interpolation, antialias=antialias)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def resample_pos_embed_at(
    pos_embed: Tensor, layout: Layout, patch_size: Pair, old_size: Pair, num_prefix_tokens: int
) -> Tensor:
    """:func:`resample_pos_embed` for every patch of packed images, each for the grid of its own image.

    Interpolation is linear, so it is one product: each patch's weights (along both axes) with the embeddings. Grids are
    values of tensors here: any mix of them takes the same few operations, and the gradient is a product too.

    Args:
        pos_embed: (1, P + h * w, D), the grid of ``old_size`` = (h, w) in row-major order.
        layout: of N patches of ``patch_size``.
        num_prefix_tokens: P leading rows, which are left out.

    Returns:
        (N, D) in the dtype of ``pos_embed``, interpolated in float32 at least.
    """
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    p, q = patch_size
    height, width = layout.sizes[layout.image].unbind(1)
    down = _bicubic_weights(layout.row, height // p, old_size[0], dtype)
    across = _bicubic_weights(layout.column, width // q, old_size[1], dtype)
    weights = (down.unsqueeze(2) * across.unsqueeze(1)).flatten(1)  # (N, h * w)
    with torch.autocast(pos_embed.device.type, enabled=False) if autocasting(pos_embed) else nullcontext():
        return (weights @ pos_embed[0, num_prefix_tokens:].to(dtype)).to(pos_embed.dtype)


def _bicubic_weights(place: Tensor, size: Tensor, old_size: int, dtype: torch.dtype) -> Tensor:
    """What each of ``old_size`` samples counts at ``place`` of ``size``, (N, old_size): F.interpolate's, antialiased.

    Keys' cubic convolution (1981) with a = -1/2, stretched where samples become fewer, cut off at the border.
    """
    scale = old_size / size.to(dtype)
    centre = scale * (place + 0.5)
    samples = torch.arange(old_size, device=place.device) + 0.5
    x = (samples - centre.unsqueeze(1)).abs() / scale.clamp(min=1.0).unsqueeze(1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def resample_patch_embed(weight: Tensor, new_size: Pair) -> Tensor:
    """A patch projection for another patch size, by pseudo-inverse resize (Beyer et al., "FlexiViT", 2023).

    Resizing a patch is a matrix B; the new weights are pinv(B^T) w, so that tokens of resized patches change least.

    Args:
        weight: (D, C, p, q).
        new_size: (p', q').

    Returns:
        (D, C, p', q') in the dtype of ``weight``.
    """
    old_size = (weight.shape[2], weight.shape[3])
    if old_size == tuple(new_size):
        return weight
    pixels = old_size[0] * old_size[1]
    basis = torch.eye(pixels, device=weight.device).reshape(pixels, 1, *old_size)
    resize = F.interpolate(basis, size=tuple(new_size), mode="bicubic", antialias=True).flatten(1).T  # (p'q', pq)
    new = weight.flatten(2).to(resize.dtype) @ torch.linalg.pinv(resize)
    return new.unflatten(2, tuple(new_size)).to(weight.dtype)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch projection (D, C, p, q) for images of another number of channels, (D, channels, p, q).

    One channel sums the file's; more repeat them, scaled so that the tokens keep their size.
    """
    given = weight.shape[1]
    if channels == given:
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, -(-channels // given), 1, 1)[:, :channels] * (given / channels)


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
        elif name == "patch_embed.proj.weight" and given[:2] == wanted[:2]:
            advice.append(
                f"patch_embed.proj.weight: the file's patches are {given[2]}x{given[3]}, the model's "
                f"{wanted[2]}x{wanted[3]}. Build the model with patch_size=({given[2]}, {given[3]}), load, then call "
                "set_input_size(patch_size=...)"
            )
        elif name.startswith("head."):
            advice.append(
                f"{name}: the file has {given[0]} classes, the model {wanted[0]}. Build the model with "
                f"num_classes={given[0]}, load, then call reset_classifier({wanted[0]})"
            )
        else:
            advice.append(f"{name}: the file has {given}, the model {wanted}: it is another architecture")
    if not wrong and not set(own) & set(state_dict):
        advice.append(f"no key of the file is the model's, another layout? It begins with {sorted(state_dict)[:3]}")
    return "\n".join(f"  {line}" for line in advice)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load the weights of a file into a model with timm's names: .npz (Google's), .safetensors, or torch.save's.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: keys are missing, unexpected or misshapen (each is named).
        ValueError: the file is not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".npz":
        load_npz(model, path)
        return
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Any = load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is no file of tensors alone, and nothing else is unpickled; "
                "save model.state_dict() instead of the model"
            ) from error
    for key in ("state_dict", "model"):  # training scripts wrap it so
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state_dict")
    model.load_state_dict(state)


_NPZ_PREFIXES = ("", "opt/target/", "params/", "params/img/")


class _Npz:
    """The arrays of one .npz file below a prefix, as float tensors; a missing one is a ValueError with its name."""

    def __init__(self, arrays: Mapping[str, np.ndarray], prefix: str, path: Path) -> None:
        self.arrays, self.prefix, self.path = arrays, prefix, path

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def __call__(self, name: str, index: int | None = None) -> Tensor:
        if name not in self:
            raise ValueError(f"{self.path} has no array {self.prefix + name!r}")
        array = self.arrays[self.prefix + name]
        if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # bfloat16, unknown to numpy
            array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return torch.from_numpy(np.array(array if index is None else array[index], dtype=np.float32))


@torch.no_grad()
def load_npz(model: nn.Module, path: str | Path, prefix: str = "") -> None:
    """Load the ViT paper's own weights (google-research/vision_transformer, big_vision) into a model with timm's names.

    Position embeddings and patches of another size are resampled: positions linearly, as the paper's code and timm do
    for these files. The classifier is loaded where its classes are the model's, and left as it is where not.

    Args:
        model: with timm's module names.
        path: the .npz file; its arrays may lie below "", "opt/target/", "params/" or "params/img/".
        prefix: where they lie, if elsewhere.

    Raises:
        ValueError: an array is missing or misshapen; it is named with both shapes. The model then is as it was.
    """
    path = Path(path)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on the meta device and can't hold weights: model.to_empty(device=...) first")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file (a zip of arrays), or it is cut short")
    with np.load(path, allow_pickle=False) as file:
        prefixes = (prefix,) if prefix else _NPZ_PREFIXES
        found = next((p for p in prefixes if f"{p}embedding/kernel" in file), None)
        if found is None:
            wanted = " or ".join(f"{p}embedding/kernel" for p in prefixes)
            raise ValueError(f"{path} is no ViT checkpoint in Google's layout: it has no {wanted}")
        values = _from_npz(model, _Npz(file, found, path))
    own = dict(model.named_parameters())
    for name, value in values.items():
        if name not in own:
            raise ValueError(f"{path} has weights for {name}, which the model lacks; build it with the file's options")
        if value.shape != own[name].shape:
            raise ValueError(f"{path}: {name} has shape {tuple(value.shape)}, the model's is {tuple(own[name].shape)}")
    left = set(own) - set(values) - {"head.weight", "head.bias"}
    if left:
        raise ValueError(f"{path} has no weights for {', '.join(sorted(left))}")
    for name, value in values.items():
        own[name].copy_(value)


def _from_npz(model: Any, read: _Npz) -> dict[str, Tensor]:
    """Google's arrays under timm's names: dense kernels (in, out) become (out, in), heads are merged."""
    out: dict[str, Tensor] = {}
    big_vision = any("Transformer" in name and "MultiHeadDotProductAttention_0" in name for name in read.arrays)
    stacked = "Transformer/encoderblock/LayerNorm_0/scale" in read

    kernel = read("embedding/kernel").permute(3, 2, 0, 1)  # (p, q, C, D) -> (D, C, p, q)
    _, channels, *patch = model.patch_embed.proj.weight.shape
    out["patch_embed.proj.weight"] = resample_patch_embed(adapt_channels(kernel, channels), (patch[0], patch[1]))
    if model.patch_embed.proj.bias is not None:
        out["patch_embed.proj.bias"] = read("embedding/bias")
    if model.cls_token is not None:
        out["cls_token"] = read("cls").reshape(1, 1, -1)
    if model.pos_embed is not None:
        positions = read("pos_embedding" if "pos_embedding" in read else "Transformer/posembed_input/pos_embedding")
        prefix_rows = 0 if model.no_embed_class else model.num_prefix_tokens
        grid = model.patch_embed.grid_size
        positions = positions.reshape(1, -1, positions.shape[-1])
        out["pos_embed"] = resample_pos_embed(positions, grid, None, prefix_rows, "bilinear", antialias=False)

    def dense(target: str, source: str, index: int | None = None, *, joined: int = 1) -> None:
        """``joined`` leading dimensions of the kernel are the input's; the others the output's."""
        kernel = read(f"{source}/kernel", index)
        out[f"{target}.weight"] = kernel.flatten(0, joined - 1).flatten(1).T
        out[f"{target}.bias"] = read(f"{source}/bias", index).flatten()

    def norm(target: str, source: str, index: int | None = None) -> None:
        out[f"{target}.weight"] = read(f"{source}/scale", index)
        out[f"{target}.bias"] = read(f"{source}/bias", index)

    def heads(target: str, source: str, names: tuple[str, ...], index: int | None = None) -> None:
        """Kernels (D, H, d) and biases (H, d) of ``names``, stacked along the output."""
        out[f"{target}.weight"] = torch.cat([read(f"{source}/{n}/kernel", index).flatten(1).T for n in names])
        out[f"{target}.bias"] = torch.cat([read(f"{source}/{n}/bias", index).flatten() for n in names])

    mha, mlp, norm2 = (0, 0, 1) if big_vision else (1, 3, 2)
    for i in range(len(model.blocks)):
        source, index = ("Transformer/encoderblock", i) if stacked else (f"Transformer/encoderblock_{i}", None)
        block = f"blocks.{i}."
        norm(f"{block}norm1", f"{source}/LayerNorm_0", index)
        norm(f"{block}norm2", f"{source}/LayerNorm_{norm2}", index)
        attention = f"{source}/MultiHeadDotProductAttention_{mha}"
        heads(f"{block}attn.qkv", attention, ("query", "key", "value"), index)
        dense(f"{block}attn.proj", f"{attention}/out", index, joined=2)
        for r in range(2):
            dense(f"{block}mlp.fc{r + 1}", f"{source}/MlpBlock_{mlp}/Dense_{r}", index)

    for name in ("norm", "fc_norm"):
        if not isinstance(getattr(model, name), nn.Identity):
            norm(name, "Transformer/encoder_norm")
    if isinstance(getattr(model.pre_logits, "fc", None), nn.Linear):
        dense("pre_logits.fc", "pre_logits")
    if model.global_pool == "map":
        out["attn_pool.latent"] = read("MAPHead_0/probe")
        attention = "MAPHead_0/MultiHeadDotProductAttention_0"
        heads("attn_pool.q", attention, ("query",))
        heads("attn_pool.kv", attention, ("key", "value"))
        dense("attn_pool.proj", f"{attention}/out", joined=2)
        norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        for r in range(2):
            dense(f"attn_pool.mlp.fc{r + 1}", f"MAPHead_0/MlpBlock_0/Dense_{r}")
    if isinstance(model.head, nn.Linear) and "head/bias" in read and read("head/bias").numel() == model.num_classes:
        dense("head", "head")
    return out

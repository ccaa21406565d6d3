"""Google's .npz layout (google-research/vision_transformer, big_vision), read and written under timm's names.

Dense kernels there are (in, out), heads a dimension of their own, queries, keys and values apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvit.checkpoints import backbone

PREFIXES = ("", "opt/target/", "params/", "params/img/")
_MLP = ("Dense_0", "Dense_1")


class _Arrays:
    """The arrays below a prefix, as float tensors; a missing one is a ValueError with its name."""

    def __init__(self, arrays: Mapping[str, np.ndarray], prefix: str, path: Path) -> None:
        self.arrays, self.prefix, self.path = arrays, prefix, path
        self.names = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def __call__(self, name: str, index: int | None = None) -> Tensor:
        if name not in self:
            raise ValueError(f"{self.path} has no array {self.prefix + name!r}")
        array = self.arrays[self.prefix + name]
        if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # bfloat16, unknown to numpy
            array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return torch.from_numpy(np.array(array if index is None else array[index], dtype=np.float32))


def from_npz(arrays: Mapping[str, np.ndarray], path: Path, prefix: str = "") -> tuple[dict[str, Tensor], int]:
    """(weights under timm's names, attention heads) of a ViT's arrays.

    Args:
        arrays: of the file, by name.
        path: for messages.
        prefix: where they lie; by default below one of :data:`PREFIXES`.

    Raises:
        ValueError: it is no such file, or an array is missing.
    """
    prefixes = (prefix,) if prefix else PREFIXES
    found = next((p for p in prefixes if f"{p}embedding/kernel" in arrays), None)
    if found is None:
        wanted = " or ".join(f"{p}embedding/kernel" for p in prefixes)
        raise ValueError(f"{path} is no ViT checkpoint in Google's layout: it has no {wanted}")
    read = _Arrays(arrays, found, path)
    out = backbone.from_npz(read)

    def dense(target: str, source: str, index: int | None = None, *, joined: int = 1) -> None:
        """``joined`` leading dimensions of the kernel are the input's; the others the output's."""
        out[f"{target}.weight"] = read(f"{source}/kernel", index).flatten(0, joined - 1).flatten(1).T.contiguous()
        out[f"{target}.bias"] = read(f"{source}/bias", index).flatten()

    def norm(target: str, source: str, index: int | None = None) -> None:
        out[f"{target}.weight"] = read(f"{source}/scale", index)
        out[f"{target}.bias"] = read(f"{source}/bias", index)

    def heads(target: str, source: str, names: tuple[str, ...], index: int | None = None) -> None:
        """Kernels (D, H, d) and biases (H, d) of ``names``, stacked along the output."""
        out[f"{target}.weight"] = torch.cat([read(f"{source}/{n}/kernel", index).flatten(1).T for n in names])
        out[f"{target}.bias"] = torch.cat([read(f"{source}/{n}/bias", index).flatten() for n in names])

    out["patch_embed.proj.weight"] = read("embedding/kernel").permute(3, 2, 0, 1).contiguous()  # from (p, q, C, D)
    out["patch_embed.proj.bias"] = read("embedding/bias")
    if "cls" in read:
        out["cls_token"] = read("cls").reshape(1, 1, -1)
    positions = "pos_embedding" if "pos_embedding" in read else "Transformer/posembed_input/pos_embedding"
    if positions in read:
        embedding = read(positions)
        out["pos_embed"] = embedding.reshape(1, -1, embedding.shape[-1])

    stacked, many, number_of_heads = "Transformer/encoderblock/LayerNorm_0/scale" in read, _many(read), 0
    for i in range(many):
        source, index = ("Transformer/encoderblock", i) if stacked else (f"Transformer/encoderblock_{i}", None)
        big_vision = f"{source}/MultiHeadDotProductAttention_0/out/kernel" in read
        mha, mlp, norm2 = (0, 0, 1) if big_vision else (1, 3, 2)
        attention, block = f"{source}/MultiHeadDotProductAttention_{mha}", f"blocks.{i}."
        number_of_heads = read(f"{attention}/query/bias", index).shape[0]
        norm(f"{block}norm1", f"{source}/LayerNorm_0", index)
        norm(f"{block}norm2", f"{source}/LayerNorm_{norm2}", index)
        heads(f"{block}attn.qkv", attention, ("query", "key", "value"), index)
        dense(f"{block}attn.proj", f"{attention}/out", index, joined=2)
        for r, one in enumerate(_MLP):
            dense(f"{block}mlp.fc{r + 1}", f"{source}/MlpBlock_{mlp}/{one}", index)
    norm("norm", "Transformer/encoder_norm")
    if "pre_logits/kernel" in read:
        dense("pre_logits.fc", "pre_logits")
    if "MAPHead_0/probe" in read:
        out["attn_pool.latent"] = read("MAPHead_0/probe").reshape(1, 1, -1)
        attention = "MAPHead_0/MultiHeadDotProductAttention_0"
        heads("attn_pool.q", attention, ("query",))
        heads("attn_pool.kv", attention, ("key", "value"))
        dense("attn_pool.proj", f"{attention}/out", joined=2)
        norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        for r, one in enumerate(_MLP):
            dense(f"attn_pool.mlp.fc{r + 1}", f"MAPHead_0/MlpBlock_0/{one}")
    if "head/kernel" in read:
        dense("head", "head")
    return out, number_of_heads


def _many(read: _Arrays) -> int:
    """How many blocks there are."""
    if "Transformer/encoderblock/LayerNorm_0/scale" in read:
        return len(read("Transformer/encoderblock/LayerNorm_0/scale"))
    numbers = {name.split("/")[1] for name in read.names if name.startswith("Transformer/encoderblock_")}
    if not numbers:
        raise ValueError(f"{read.path} has no array {read.prefix + 'Transformer/encoderblock_0/LayerNorm_0/scale'!r}")
    return len(numbers)


def to_npz(state: Mapping[str, Tensor], heads: int) -> dict[str, np.ndarray]:
    """The inverse of :func:`from_npz`, in google-research's names.

    Raises:
        ValueError: some weights have no place there; they are listed.
    """
    left = {name: value.detach().to("cpu", torch.float32) for name, value in state.items()}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"the layout 'npz' has no place for a model without {name}")
        return left.pop(name)

    out = backbone.to_npz(state, take)

    def dense(source: str, target: str, *, joined: bool = False) -> None:
        kernel = take(f"{source}.weight").T
        out[f"{target}/kernel"] = kernel.unflatten(0, (heads, -1)) if joined else kernel
        out[f"{target}/bias"] = take(f"{source}.bias")

    def norm(source: str, target: str) -> None:
        out[f"{target}/scale"], out[f"{target}/bias"] = take(f"{source}.weight"), take(f"{source}.bias")

    def split(source: str, target: str, names: tuple[str, ...]) -> None:
        weights, biases = take(f"{source}.weight").chunk(len(names)), take(f"{source}.bias").chunk(len(names))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            out[f"{target}/{name}/kernel"] = weight.T.unflatten(1, (heads, -1))
            out[f"{target}/{name}/bias"] = bias.unflatten(0, (heads, -1))

    out["embedding/kernel"] = take("patch_embed.proj.weight").permute(2, 3, 1, 0)
    out["embedding/bias"] = take("patch_embed.proj.bias")
    for ours, theirs in (("cls_token", "cls"), ("pos_embed", "Transformer/posembed_input/pos_embedding")):
        if ours in left:
            out[theirs] = take(ours)
    for i in _block_numbers(state):
        block, target = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{target}/MultiHeadDotProductAttention_1"
        norm(f"{block}.norm1", f"{target}/LayerNorm_0")
        norm(f"{block}.norm2", f"{target}/LayerNorm_2")
        split(f"{block}.attn.qkv", attention, ("query", "key", "value"))
        dense(f"{block}.attn.proj", f"{attention}/out", joined=True)
        for r, one in enumerate(_MLP):
            dense(f"{block}.mlp.fc{r + 1}", f"{target}/MlpBlock_3/{one}")
    if "norm.weight" in left:
        norm("norm", "Transformer/encoder_norm")
    for ours, theirs in (("pre_logits.fc", "pre_logits"), ("head", "head")):
        if f"{ours}.weight" in left:
            dense(ours, theirs)
    if "attn_pool.latent" in left:
        out["MAPHead_0/probe"] = take("attn_pool.latent")
        attention = "MAPHead_0/MultiHeadDotProductAttention_0"
        split("attn_pool.q", attention, ("query",))
        split("attn_pool.kv", attention, ("key", "value"))
        dense("attn_pool.proj", f"{attention}/out", joined=True)
        norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        for r, one in enumerate(_MLP):
            dense(f"attn_pool.mlp.fc{r + 1}", f"MAPHead_0/MlpBlock_0/{one}")
    if left:
        raise ValueError(f"the layout 'npz' has no names for {', '.join(sorted(left))}")
    return {name: value.contiguous().numpy() for name, value in out.items()}


def _block_numbers(state: Mapping[str, Tensor]) -> Iterator[int]:
    yield from sorted({int(name.split(".")[1]) for name in state if name.startswith("blocks.")})

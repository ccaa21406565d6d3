"""A folder that transformers' own ``from_pretrained`` takes: the weights, and the configuration that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvit.activations import HUGGINGFACE
from fastvit.checkpoints.rules import HuggingFace, Layout, State, blocks, is_gated
from fastvit.checkpoints.sizes import position_arguments

_ALL = (
    *("patch_embed.proj.weight", "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
    *("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
)


def folder_of(
    state: State, layout: Layout, options: Mapping[str, Any], num_heads: int, name: str
) -> tuple[State, dict[str, Any]]:
    """(tensors of model.safetensors, config.json) for weights under our names.

    Args:
        layout: one that has names for all of them, of a kind that transformers knows.
        options: arguments of :class:`fastvit.ViT` that shapes don't tell, and "eps" of its norms.
        name: of the source, for messages.

    Raises:
        ValueError: that kind has something which the weights have not, or computes something else with them.
    """
    tensors = layout.from_ours(state)
    assert layout.huggingface is not None
    kind = layout.huggingface(state)
    classified = "head.weight" in state
    absent = [each for each in (*_ALL, *kind.needs) if each not in state and f"blocks.0.{each}" not in state]
    if absent:
        raise ValueError(f"{name} has no {', '.join(absent)}, which transformers' {kind.model} has")
    if is_gated(state) and not kind.gated:
        raise ValueError(f"{name} has gated MLPs, which transformers' {kind.model} has not")
    pool = "avg" if "fc_norm.weight" in state else "token"
    if classified and options.get("global_pool", pool) != pool:
        raise ValueError(
            f"{name}: global_pool is {options['global_pool']!r}; accepted with these weights in transformers' "
            f"{kind.classifier}: {pool!r}"
        )
    config = _common(state, options, num_heads) | _image(state, options, kind, name)
    config |= {"model_type": kind.model_type, "architectures": [kind.classifier if classified else kind.model]}
    config |= kind.config(state, options, name)
    if classified and kind.labels:
        labels = [f"LABEL_{i}" for i in range(len(state["head.weight"]))]
        config |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return tensors | kind.unused(state), config


def _common(state: State, options: Mapping[str, Any], num_heads: int) -> dict[str, Any]:
    act = options.get("act_layer", "gelu")
    theirs = {ours: name for name, ours in reversed(HUGGINGFACE.items())}  # the first of several
    if act not in theirs:
        raise ValueError(f"act_layer is {act!r}; accepted: {', '.join(theirs)}")
    width, channels, p, q = state["patch_embed.proj.weight"].shape
    return {
        "dtype": str(state["patch_embed.proj.weight"].dtype).removeprefix("torch."),
        "hidden_act": theirs[act],
        "hidden_size": width,
        "layer_norm_eps": options.get("eps", 1e-6),
        "num_attention_heads": num_heads,
        "num_channels": channels,
        "num_hidden_layers": len(list(blocks(state))),
        "patch_size": p if p == q else [p, q],
    }


def _image(state: State, options: Mapping[str, Any], kind: HuggingFace, name: str) -> dict[str, Any]:
    """image_size, of a model to which it matters."""
    p, q = state["patch_embed.proj.weight"].shape[2:]
    found = position_arguments(state, (p, q), options, name) | {k: v for k, v in options.items() if k == "img_size"}
    if found.get("no_embed_class", False) != kind.no_embed_class:
        raise ValueError(
            f"{name} has {state['pos_embed'].shape[1]} positions; transformers' {kind.model} has one for "
            "the class token, and none for registers"
        )
    if "img_size" not in found:
        return {}
    size = found["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    if kind.square and height != width:
        raise ValueError(f"{name} is for images of {height}x{width}; transformers' {kind.model_type} takes square ones")
    return {"image_size": height if height == width else [height, width]}

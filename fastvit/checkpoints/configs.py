"""Read what a library's configuration says of a model: arguments of :class:`fastvit.ViT`, and "eps" of its norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastvit.activations import HUGGINGFACE
from fastvit.checkpoints.rules import Config


def huggingface_options(eps: float, activation: str) -> Callable[[Config], dict[str, Any]]:
    """Return a reader of transformers' config.json, with the defaults of that kind of model."""

    def options(config: Config) -> dict[str, Any]:
        config = config.get("vision_config", config)
        act = config.get("hidden_act", activation)
        if act not in HUGGINGFACE:
            raise ValueError(f"config.json: hidden_act is {act!r}; accepted: {', '.join(HUGGINGFACE)}")
        found = {"eps": config.get("layer_norm_eps", eps), "act_layer": HUGGINGFACE[act]}
        for theirs, ours in (("num_attention_heads", "num_heads"), ("image_size", "img_size")):
            if theirs in config:
                found[ours] = config[theirs]
        return found

    return options


def timm_options(config: Config) -> dict[str, Any]:
    """Return what the config.json beside a timm model's weights says."""
    given = dict(config.get("model_args", {}))
    if "global_pool" in config:
        given.setdefault("global_pool", config["global_pool"])
    known = (
        "img_size",
        "num_heads",
        "global_pool",
        "class_token",
        "no_embed_class",
        "init_values",
        "fc_norm",
        "act_layer",
        "eps",
        "rope",
        "pool_include_prefix",
    )
    return {name: given[name] for name in known if name in given}

"""Contenders: a library and a way to run it, for example ``timm-compile``.

A new library is an entry of :data:`LIBRARIES` (a function Network -> nn.Module for each family of networks that it
has), a new way to run any library an entry of :data:`WAYS`. :class:`Contender` is one of each, and
:class:`benchmarks.networks.Network` has the weights that every contender gets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastvit
from benchmarks.measurements import Unavailable
from benchmarks.networks import Network
from fastvit.checkpoints.layouts import to_layout
from fastvit.checkpoints.rules import State
from fastvit.ops.backends import BACKENDS

Build = Callable[[Network], nn.Module]


class Logits(nn.Module):
    """A Hugging Face classifier that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits


def _loaded(model: nn.Module, weights: State) -> nn.Module:
    model.load_state_dict(weights)
    return model


def _itself(network: Network) -> nn.Module:
    return copy.deepcopy(network.source)


def _fastvit(network: Network) -> nn.Module:
    sized: dict[str, Any] = {"img_size": network.size} if network.family == "vit" else {}
    return _loaded(fastvit.create_model(network.name, **sized), network.source.state_dict())


def _torchvision(network: Network) -> nn.Module:
    from torchvision.models import VisionTransformer as TorchvisionViT

    source = network.source
    assert isinstance(source, VisionTransformer)
    block = source.blocks[0]
    model = TorchvisionViT(
        image_size=network.size,
        patch_size=source.patch_embed.patch_size[0],
        num_layers=len(source.blocks),
        num_heads=block.attn.num_heads,
        hidden_dim=source.embed_dim,
        mlp_dim=block.mlp.fc1.out_features,
        num_classes=source.num_classes,
    )
    return _loaded(model, to_layout(source.state_dict(), "torchvision"))


def _hugging_face(network: Network) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    source = network.source
    assert isinstance(source, VisionTransformer)
    block = source.blocks[0]
    config = ViTConfig(
        image_size=network.size,
        patch_size=source.patch_embed.patch_size[0],
        num_hidden_layers=len(source.blocks),
        num_attention_heads=block.attn.num_heads,
        hidden_size=source.embed_dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_labels=source.num_classes,
        layer_norm_eps=source.norm.eps,
        attn_implementation="sdpa",
    )
    return Logits(_loaded(ViTForImageClassification(config), to_layout(source.state_dict(), "huggingface-5")))


def _xformers(network: Network) -> nn.Module:
    """timm's model with xformers' attention in its blocks."""
    import timm
    from timm.layers import Attention
    from xformers.ops import memory_efficient_attention

    if not torch.cuda.is_available():
        raise Unavailable("xformers' attention runs on CUDA devices only")

    class XformersAttention(Attention):
        def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
            batch, tokens, width = x.shape
            q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).unbind(2)
            out = memory_efficient_attention(self.q_norm(q), self.k_norm(k), v, scale=self.scale)
            projected: Tensor = self.proj_drop(self.proj(self.norm(out.reshape(batch, tokens, width))))
            return projected

    model = timm.create_model(network.name, img_size=network.size, attn_layer=XformersAttention)
    return _loaded(model, network.source.state_dict())


def _accelerated(build: Build) -> Build:
    """Return a build of another library's model on fastvit's ops."""
    return lambda network: fastvit.accelerate(build(network))


class Floor(nn.Module):
    """No network, but the work that none with these shapes avoids: every product by cuBLAS (on a CPU, oneDNN), alone,
    and a copy of the bytes that LayerNorm and attention read and write. Forward only.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        source = network.source
        assert isinstance(source, VisionTransformer)
        block = source.blocks[0]
        self.depth = len(source.blocks)
        products = {
            "embed": source.patch_embed.proj.weight.flatten(1),
            "qkv": block.attn.qkv.weight,
            "proj": block.attn.proj.weight,
            "fc1": block.mlp.fc1.weight,
            "fc2": block.mlp.fc2.weight,
            "head": source.head.weight,
        }
        self.weights = nn.ParameterDict({name: weight.clone() for name, weight in products.items()})
        self.tokens = source.patch_embed.num_patches + source.num_prefix_tokens
        self.inputs: list[Tensor] = []  # of the latest batch: random, as zeros would be quicker

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, classes), of no meaning."""
        batch, weights = len(images), self.weights
        rows = batch * self.tokens
        if not self.inputs or len(self.inputs[0]) != rows:
            width, hidden_width = weights["fc2"].shape
            widths = (width, 2 * width, hidden_width)
            self.inputs = [torch.randn(rows, n, device=images.device, dtype=images.dtype) for n in widths]
        x, qkv, hidden = self.inputs
        F.linear(images.reshape(-1, weights["embed"].shape[1]), weights["embed"])  # as many bytes as real patches
        for _ in range(self.depth):
            x.clone()  # LayerNorm
            F.linear(x, weights["qkv"])
            qkv.clone()  # attention: 3 T D in and T D out are a copy of 2 T D
            F.linear(x, weights["proj"])
            x.clone()
            F.linear(x, weights["fc1"])
            F.linear(hidden, weights["fc2"])
        return F.linear(x[:batch], weights["head"])


@dataclass(frozen=True)
class Library:
    """A library, or a backend of fastvit, that builds models."""

    title: str
    builds: Mapping[str, Build]  # by the network's family
    how: str = "eager"
    backend: str = "auto"  # of fastvit's ops
    same_function: bool = True  # computes the network
    trains: bool = True


LIBRARIES = {
    "timm": Library("timm", {"vit": _itself, "bit": _itself}),
    "fastvit": Library("fastvit", {"vit": _fastvit, "bit": _fastvit}),
    **{f"fastvit-{name}": Library("fastvit", {"vit": _fastvit}, how=name, backend=name) for name in BACKENDS[1:]},
    "torchvision": Library("torchvision", {"vit": _torchvision, "resnet": _itself}),
    "huggingface": Library("Hugging Face", {"vit": _hugging_face}, how="sdpa"),
    **{
        f"{name}-accelerated": Library(title, {"vit": _accelerated(build)}, how="fastvit.accelerate")
        for name, title, build in (
            ("timm", "timm", _itself),
            ("torchvision", "torchvision", _torchvision),
            ("huggingface", "Hugging Face", _hugging_face),
        )
    },
    "timm-xformers": Library("timm", {"vit": _xformers}, how="xformers attention"),
    "floor": Library("floor", {"vit": Floor}, how="products and copies alone", same_function=False, trains=False),
}


@dataclass(frozen=True)
class Way:
    """A way to run a model."""

    title: str = ""
    compile: str | None = None  # torch.compile's mode
    autocast: bool = False  # float32 weights under torch.autocast, else weights in the dtype that is compared
    graph: bool = False  # captured in a CUDA graph


WAYS = {
    "": Way(),
    "compile": Way("torch.compile", compile="default"),
    "compile-max": Way("torch.compile, max-autotune", compile="max-autotune"),
    "autocast": Way("autocast", autocast=True),
    "graph": Way("CUDA graph", graph=True),
}


@dataclass(frozen=True)
class Contender:
    """A library and a way to run it: one row of a comparison."""

    id: str
    library: Library
    way: Way

    @property
    def how(self) -> str:
        """Describe it beside the library's name."""
        parts = [self.way.title, self.library.how if self.library.how != "eager" or not self.way.title else ""]
        return ", ".join(part for part in parts if part)

    def context(self, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
        """Return the context manager for its calls."""
        return torch.autocast(device.type, dtype) if self.way.autocast else nullcontext()

    def model(self, network: Network, dtype: torch.dtype, device: torch.device, *, training: bool) -> nn.Module:
        """Build the network's model, ready to be called in :meth:`context`.

        Raises:
            Unavailable: this can't be had, for a reason that is no defect.
        """
        if self.way.autocast and dtype == torch.float32:
            raise Unavailable("autocast is for float16 and bfloat16")
        if self.way.graph and device.type != "cuda":
            raise Unavailable("CUDA graphs need a CUDA device")
        if training and not self.library.trains:
            raise Unavailable("it is for inference only")
        if training and self.way.graph:
            raise Unavailable("the benchmarks capture no training steps")
        try:
            model = self.library.builds[network.family](network)
        except ImportError as error:
            raise Unavailable(f"it can't be imported: {error}") from error
        model = model.to(device, torch.float32 if self.way.autocast else dtype)
        if network.family != "vit":  # what convolutions are quickest in
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its types
        model = model.train(training).requires_grad_(training)
        if self.library.title == "fastvit":
            fastvit.backend(self.library.backend)  # for good: the process is this contender's alone
        if self.way.compile is not None:
            if device.type == "cpu" and not training:
                torch._inductor.config.freezing = True  # what makes inductor quickest on a CPU
            # For the batch that is timed, once: torch.compile would else make the second batch that it sees dynamic.
            model = torch.compile(model, mode=self.way.compile, dynamic=False)  # type: ignore[assignment]  # a module, for a module
        return model


def find(id: str) -> Contender:
    """Return the contender of a name: a library's, or a library's and a way's, as ``timm-compile``.

    Raises:
        ValueError: no contender has the name.
    """
    for way in sorted(WAYS, key=len, reverse=True):
        library = id.removesuffix(f"-{way}") if way else id
        if library in LIBRARIES and (not way or id.endswith(f"-{way}")):
            return Contender(id, LIBRARIES[library], WAYS[way])
    raise ValueError(
        f"no contender {id!r}; accepted: {', '.join(LIBRARIES)}, each also with -{', -'.join(w for w in WAYS if w)}"
    )


def baseline(family: str) -> str:
    """Return the library that the others of a family of networks are compared with."""
    return "torchvision" if family == "resnet" else "timm"

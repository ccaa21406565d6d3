"""The ops as a Vision Transformer calls them, and every library's implementation of each, on the same arguments.

A new implementation is a function (op, arguments) -> function in one of the tables :data:`COMMON`, :data:`LINEAR`,
:data:`ATTENTION`, :data:`BIASED` and :data:`PACKED`; a new op is an entry of :data:`CASES`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from benchmarks import networks
from benchmarks.measurements import Unavailable
from benchmarks.roofline import Work
from fastvit import ops, reference
from fastvit.cuda import cublas
from fastvit.ops import rope
from fastvit.ops.backends import BACKENDS
from fastvit.tuning import compile_report

Arguments = dict[str, Any]
Random = Callable[..., nn.Parameter]  # of a shape; a Parameter, since oneDNN packs nothing else
Function = Callable[..., Any]  # takes the arguments, returns a tensor or several
Make = Callable[[str, Arguments], Function]  # (name of the op, its arguments) -> implementation

BASELINE = "torch"


class Sizes(NamedTuple):
    """The sizes that make up the shapes of a Vision Transformer's ops."""

    batch: int
    pixels: int
    patch: int
    tokens: int
    width: int
    heads: int
    hidden: int


def sizes(model: str, pixels: int, batch: int) -> Sizes:
    """Return a model's sizes on square images of ``pixels``, or of the next smaller number that patches divide.

    Raises:
        ValueError: no Vision Transformer has the name, or the images are too small for it.
    """
    if networks.family(model) != "vit":
        raise ValueError(f"{model} has none of the ops; accepted: vit_base_patch16_224 and other Vision Transformers")
    networks.check_size(model, pixels)
    vit = fastvit.create_model(model, depth=1, device="meta")
    patch = vit.patch_embed.patch_size[0]
    block: Any = vit.blocks[0]
    return Sizes(
        batch,
        pixels // patch * patch,
        patch,
        (pixels // patch) ** 2 + vit.num_prefix_tokens,
        vit.embed_dim,
        block.attn.num_heads,
        block.mlp.fc1.out_features,
    )


# --- implementations ---------------------------------------------------------------------------------------------


def _eager(op: str, arguments: Arguments) -> Function:
    """PyTorch's ops one after the other, as timm calls them: fastvit's reference."""
    function: Function = getattr(reference, op)
    return function


def _compiled(op: str, arguments: Arguments) -> Function:
    torch._functorch.config.donated_buffer = False  # it forbids to run one backward pass again and again
    return torch.compile(_eager(op, arguments), dynamic=False)


def _fastvit(backend: str) -> Make:
    def make(op: str, arguments: Arguments) -> Function:
        fastvit.backend(backend)  # for good: the process is this contender's alone
        function: Function = getattr(ops, op)
        return function

    return make


def _sdpa(name: str) -> Make:
    """F.scaled_dot_product_attention with one of its backends only."""

    def make(op: str, arguments: Arguments) -> Function:
        for other in ("flash", "cudnn", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{other}_sdp")(other == name)  # for good, and on CPUs too
        function = _eager(op, arguments)
        with warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            try:
                function(**arguments)
            except RuntimeError as error:
                if not str(error).startswith(("No viable backend", "No available kernel")):
                    raise
                device = arguments["qkv"].device.type
                said = "".join(f"; {reason.message}" for reason in reasons)
                raise Unavailable(f"this backend has no kernel for these tensors ({device}){said}") from error
        return function

    return make


def _xformers(op: str, arguments: Arguments) -> Function:
    if arguments["qkv"].device.type != "cuda":
        raise Unavailable("xformers' attention runs on CUDA devices only")
    try:
        from xformers.ops import fmha, memory_efficient_attention
    except ImportError as error:
        raise Unavailable(f"xformers can't be imported: {error}") from error
    packed: Any = None
    if "cu_seqlens" in arguments:
        packed = fmha.attn_bias.BlockDiagonalMask.from_seqlens(arguments["cu_seqlens"].diff().tolist())

    def run(qkv: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        added = packed
        if bias is not None:  # its rows begin at multiples of 8 elements
            tokens = qkv.shape[1]
            added = F.pad(bias, (0, -tokens % 8))[..., :tokens].expand(len(qkv), -1, -1, -1)
        out: Tensor = memory_efficient_attention(*qkv.unbind(2), attn_bias=added)
        return out

    try:
        run(**arguments)
    except NotImplementedError as error:  # its word for: none of its kernels takes these tensors
        raise Unavailable(str(error)) from error
    return run


def _varlen(op: str, arguments: Arguments) -> Function:
    """PyTorch's attention for sequences of different lengths: packed ones, or a batch of one length."""
    qkv = arguments["qkv"]
    if qkv.device.type != "cuda":
        raise Unavailable("varlen_attn runs on CUDA devices only")
    if qkv.dtype == torch.float32:
        raise Unavailable("varlen_attn takes float16 and bfloat16")
    batch, tokens = qkv.shape[:2]
    starts = arguments.get("cu_seqlens")
    if starts is None:
        starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=qkv.device)
    longest = arguments.get("max_seqlen", tokens)

    def run(qkv: Tensor, **_: Any) -> Tensor:
        q, k, v = qkv.flatten(0, 1).unbind(1)
        out = varlen_attn(q, k, v, starts, starts, longest, longest)
        assert isinstance(out, Tensor)
        return out.unflatten(0, (batch, tokens))

    return run


# --- attention with a bias or mask, or with several images in one row --------------------------


def _score(arguments: Arguments) -> Callable[..., Tensor]:
    """Return flex_attention's score_mod, of a score s of image b, head h, query i and key j."""
    bias, table, mask = (arguments.get(name) for name in ("bias", "rel_pos_table", "key_mask"))
    if bias is not None:
        return lambda s, b, h, i, j: s + bias[0, h, i, j]
    if table is not None:
        rows = reference.table_rows(table.shape[0], arguments["window"], table.device)  # once for all calls, as in timm
        return lambda s, b, h, i, j: s + table[rows[i, j], h]
    assert mask is not None
    return lambda s, b, h, i, j: torch.where(mask[b, j], s, -torch.inf)


def flex(arguments: Arguments, attend: Function) -> Function:
    """Call flex_attention, compiled or not, on the arguments of :func:`fastvit.ops.attention_qkvpacked`."""
    options: Arguments = {}
    if "cu_seqlens" in arguments:
        starts, total = arguments["cu_seqlens"], arguments["qkv"].shape[1]
        image = torch.bucketize(torch.arange(total, device=starts.device), starts[1:], right=True)
        options["block_mask"] = create_block_mask(
            lambda b, h, i, j: image[i] == image[j], None, None, total, total, device=starts.device
        )  # made before the clock runs

    def run(qkv: Tensor, **rest: Any) -> Tensor:
        scores = {} if "cu_seqlens" in rest else {"score_mod": _score(rest)}
        out: Tensor = attend(*(t.transpose(1, 2) for t in qkv.unbind(2)), **scores, **options)
        return out.transpose(1, 2)

    return run


def _flex(op: str, arguments: Arguments) -> Function:
    if arguments["qkv"].device.type != "cuda":
        raise Unavailable("flex_attention has no backward pass on CPUs, and takes a compiler there; CUDA devices only")
    torch._functorch.config.donated_buffer = False  # it forbids to run one backward pass again and again
    return flex(arguments, torch.compile(flex_attention, dynamic=False))


def _cublaslt(op: str, arguments: Arguments) -> Function:
    """cuBLASLt with its own epilogues where PyTorch reaches them, and PyTorch's kernels for the rest."""
    if tensors(arguments)[0].device.type != "cuda":
        raise Unavailable("cuBLASLt multiplies on CUDA devices only")
    return with_epilogues(op)


def with_epilogues(op: str) -> Function:
    """Return ``linear`` or ``mlp`` by ``addmm``, ``_addmm_activation`` and the like: backend cuda's library path.

    Autograd differentiates them. With gradients the pre-activation is kept: ``_addmm_activation`` has no derivative.
    """

    def linear(x: Tensor, weight: Tensor, bias: Tensor, *, norm: reference.Norm | None = None, **rest: Any) -> Tensor:
        if norm is not None:
            x = reference.normalise(x, *norm, weight.dtype)
        fused = {"activation": None, "residual": None, "gamma": None, "row_scale": None, **rest}
        if fused["residual"] is not None:
            fused["residual"] = fused["residual"].flatten(0, -2)
        out, _ = cublas.linear_forward(x.flatten(0, -2), weight, bias, **fused, save_preact=torch.is_grad_enabled())
        return out.unflatten(0, x.shape[:-1])

    def mlp(
        x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, *, norm: Any, **rest: Any
    ) -> Tensor:
        hidden = linear(x, fc1_weight, fc1_bias, norm=norm, activation="gelu")
        return linear(hidden, fc2_weight, fc2_bias, **rest)

    functions: dict[str, Function] = {"linear": linear, "mlp": mlp}
    return functions[op]


def _unfolded(op: str, arguments: Arguments) -> Function:
    """The patches copied out as rows, then one matrix product."""

    def run(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix_tokens: Tensor) -> Tensor:
        patch = weight.shape[-1]
        x = F.linear(F.unfold(images, patch, stride=patch).mT, weight.flatten(1), bias)
        return torch.cat([prefix_tokens.expand(len(x), -1, -1), x], dim=1) + pos_embed

    return run


OURS = {"fastvit": _fastvit("auto")} | {f"fastvit-{name}": _fastvit(name) for name in BACKENDS[1:]}
COMMON: dict[str, Make] = {BASELINE: _eager, "torch-compile": _compiled, **OURS}
LINEAR: dict[str, Make] = {**COMMON, "cublaslt": _cublaslt}
ATTENTION: dict[str, Make] = {  # torch.compile has nothing to fuse in it
    BASELINE: _eager,
    "sdpa-flash": _sdpa("flash"),
    "sdpa-cudnn": _sdpa("cudnn"),
    "sdpa-efficient": _sdpa("mem_efficient"),
    "sdpa-math": _sdpa("math"),
    "xformers": _xformers,
    "varlen": _varlen,
    **OURS,
}

_SDPA = {name: make for name, make in ATTENTION.items() if name.startswith("sdpa")}  # the reference ends in it
BIASED = {BASELINE: _eager, **_SDPA, "flex": _flex, **OURS}
PACKED = {BASELINE: _eager, "flex": _flex, "xformers": _xformers, "varlen": _varlen, **OURS}

# --- ops and arguments -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An op with a model's arguments.

    Args:
        op: the function's name in :mod:`fastvit.ops` and :mod:`fastvit.reference`.
        arguments: makes random ones of a model's scale.
        impls: its implementations by name; the first is the baseline.
        flops: of the forward, from the sizes, where PyTorch's counter can't know them; a backward has 5/2 of them.
    """

    op: str
    arguments: Callable[[Random, Sizes], Arguments]
    impls: Mapping[str, Make] = field(default_factory=lambda: COMMON)
    flops: Callable[[Sizes], int] | None = None


def _norm(random: Random, width: int) -> tuple[Tensor, Tensor, float]:
    return random(width), random(width), 1e-6


def _product(random: Random, s: Sizes, out: int) -> Arguments:
    return {
        "x": random(s.batch, s.tokens, s.width),
        "weight": random(out, s.width, scale=0.02),
        "bias": random(out),
    }


def _mlp(random: Random, s: Sizes) -> Arguments:
    x = random(s.batch, s.tokens, s.width)
    return {
        "x": x,
        "fc1_weight": random(s.hidden, s.width, scale=0.02),
        "fc1_bias": random(s.hidden),
        "fc2_weight": random(s.width, s.hidden, scale=0.02),
        "fc2_bias": random(s.width),
        "norm": _norm(random, s.width),
        "residual": x,
    }


def _patch_embed(random: Random, s: Sizes) -> Arguments:
    return {
        "images": random(s.batch, 3, s.pixels, s.pixels).detach(),  # need no gradient
        "weight": random(s.width, 3, s.patch, s.patch, scale=0.02),
        "bias": random(s.width),
        "pos_embed": random(1, s.tokens, s.width),
        "prefix_tokens": random(1, s.tokens - (s.pixels // s.patch) ** 2, s.width),
    }


def _layer_norm(random: Random, s: Sizes) -> Arguments:
    return {"x": random(s.batch, s.tokens, s.width), "weight": random(s.width), "bias": random(s.width)}


def _residual(random: Random, s: Sizes) -> Arguments:
    return {"residual": random(s.batch, s.tokens, s.width)}


def _qkv(random: Random, s: Sizes) -> Arguments:
    return {"qkv": random(s.batch, s.tokens, 3, s.heads, s.width // s.heads)}


def _table(random: Random, s: Sizes) -> Arguments:
    """BEiT's learned table of relative positions, with a class token."""
    side = s.pixels // s.patch
    table = random((2 * side - 1) ** 2 + 3, s.heads)
    return {"qkv": random(s.batch, side**2 + 1, 3, s.heads, s.width // s.heads), "rel_pos_table": table,
            "window": (side, side)}  # fmt: skip


def _relative_keys(random: Random, s: Sizes) -> Arguments:
    """The ViT paper's relative position keys: one for each distance along the sequence, shared by all heads."""
    return {**_qkv(random, s), "rel_pos_keys": random(2 * s.tokens - 1, s.width // s.heads)}


def _masked(random: Random, s: Sizes) -> Arguments:
    """From a quarter of the keys to all of them, by image."""
    arguments = _qkv(random, s)
    kept = torch.arange(s.batch, device=arguments["qkv"].device) % 4 + 1
    return {**arguments, "key_mask": torch.arange(s.tokens, device=kept.device) < (kept * s.tokens / 4).ceil()[:, None]}


def _lengths(s: Sizes) -> list[int]:
    """Return tokens of each image of a mix such as NaFlex's: about the model's on average, from 1/4 to 2 times."""
    return [math.ceil(s.tokens * (0.25, 2.0, 0.5, 1.25)[image % 4]) for image in range(s.batch)]


def _packed(random: Random, s: Sizes) -> Arguments:
    lengths = _lengths(s)
    qkv = random(1, sum(lengths), 3, s.heads, s.width // s.heads)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=qkv.device)
    return {"qkv": qkv, "cu_seqlens": starts, "max_seqlen": max(lengths)}


def _rotated(random: Random, s: Sizes) -> Arguments:
    """Queries and keys of DINOv3: the prefix tokens stay as they are."""
    q, k = (random(s.batch, s.tokens, s.heads, s.width // s.heads) for _ in range(2))
    cos, sin = rope.axial((s.pixels // s.patch,) * 2, s.width // s.heads, device=q.device)
    return {"q": q, "k": k, "cos": cos, "sin": sin}


CASES = {
    "attention": Case("attention_qkvpacked", _qkv, ATTENTION),
    "attention+bias": Case(
        "attention_qkvpacked",
        lambda random, s: {**_qkv(random, s), "bias": random(1, s.heads, s.tokens, s.tokens)},
        {**BIASED, "xformers": _xformers},
    ),
    "attention+table": Case("attention_qkvpacked", _table, BIASED),
    "attention+distances": Case("attention_qkvpacked", _relative_keys, {BASELINE: _eager, **_SDPA, **OURS}),
    "attention+mask": Case("attention_qkvpacked", _masked, BIASED),
    "attention+packed": Case(
        "attention_qkvpacked", _packed, PACKED, lambda s: 4 * s.width * sum(n * n for n in _lengths(s))
    ),
    "rotate": Case("rotate", _rotated),
    "linear+norm": Case(
        "linear", lambda random, s: {**_product(random, s, 3 * s.width), "norm": _norm(random, s.width)}, LINEAR
    ),
    "linear+residual": Case(
        "linear", lambda random, s: {**_product(random, s, s.width), **_residual(random, s)}, LINEAR
    ),
    "linear+gelu": Case("linear", lambda random, s: {**_product(random, s, s.hidden), "activation": "gelu"}, LINEAR),
    # The JAX checkpoints' GELU, and the only one that is an epilogue of cuBLASLt.
    "linear+gelu_tanh": Case(
        "linear", lambda random, s: {**_product(random, s, s.hidden), "activation": "gelu_tanh"}, LINEAR
    ),
    "mlp": Case("mlp", _mlp, LINEAR),
    "layer_norm": Case("layer_norm", _layer_norm),
    "layer_norm+residual": Case("layer_norm", lambda random, s: {**_layer_norm(random, s), **_residual(random, s)}),
    "patch_embed": Case("patch_embed", _patch_embed, {**COMMON, "unfold": _unfolded}),
}


def tensors(found: Any) -> list[Tensor]:
    """Return the tensors in nested arguments or results, each once."""
    return list({id(t): t for t in tree_leaves(found) if isinstance(t, Tensor)}.values())


def leaves(arguments: Arguments) -> list[Tensor]:
    """Return the tensors that require a gradient."""
    return [t for t in tensors(arguments) if t.requires_grad]


def shapes(case: Case, s: Sizes, dtype: torch.dtype) -> Arguments:
    """Return the arguments without data."""

    def empty(*shape: int, scale: float = 1.0) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))

    return case.arguments(empty, s)


def work(case: Case, s: Sizes, dtype: torch.dtype, *, backward: bool) -> Work:
    """Return the least work: FLOPs of the matrix products, and bytes.

    PyTorch's counter counts FLOPs by the formulas of :mod:`fastvit.ops.flops`. Bytes count every input read once and
    every output written once. A backward pass reads the outputs' gradients and the arguments and
    writes the arguments' gradients; a residual has no part in it, for its gradient is the outputs' own.
    """
    arguments = shapes(case, s, dtype)
    with fastvit.backend("triton"), FlopCounterMode(display=False) as counter:
        outputs = tensors(getattr(ops, case.op)(**arguments))
        flops = counter.get_total_flops() if case.flops is None else case.flops(s)
        if backward and case.flops is not None:
            flops = flops * 5 // 2
        elif backward:
            upstream = [torch.empty_like(output) for output in outputs]
            torch.autograd.grad(outputs, leaves(arguments), upstream)
            flops = counter.get_total_flops() - flops
    if not backward:
        return Work(case.op, flops, compile_report.distinct_bytes((arguments, outputs)))
    arguments.pop("residual", None)
    return Work(case.op, flops, sum(map(compile_report.distinct_bytes, (outputs, arguments, leaves(arguments)))))

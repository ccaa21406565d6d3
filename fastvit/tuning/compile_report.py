"""Launches, bytes, FLOPs and the compiler's report of the Triton kernels, without a GPU.

Models run on meta tensors: launchers record their launches instead of running them, for any architecture. Each launch
can then be compiled for that architecture, exactly as a GPU would get it.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvit import ops
from fastvit.layers import SwiGLU
from fastvit.ops import backends
from fastvit.ops.library import KERNELS
from fastvit.packing import pack

# Shared memory that one program may use, in KiB (CUDA programming guide, compute capabilities).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


class AtenOp(NamedTuple):
    """An ATen op that ran, and the bytes of its inputs and outputs."""

    name: str
    moved: int


@dataclass
class Trace:
    """The kernel launches inside :func:`trace`, and the ATen ops that are neither views nor allocations."""

    launches: list[Any] = field(default_factory=list)
    aten: list[AtenOp] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Return launches plus ATen ops, as ``launches_per_block`` counts them."""
        return len(self.launches) + len(self.aten)

    @property
    def moved(self) -> int:
        """Return the bytes moved if each reads its inputs once and writes its outputs once."""
        return sum(moved(one) for one in self.launches) + sum(op.moved for op in self.aten)


@dataclass(frozen=True)
class Workload:
    """A model at a batch and dtype, whose kernels ship. With a mean and std among its options it takes uint8 images."""

    model: str
    batch: int
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False  # images (B, H, W, C)
    packed: bool = False  # images of three sizes in turn, half the model's, the model's and twice its

    def __str__(self) -> str:
        options = "".join(f"-{k}" for k in self.options) + "-channels_last" * self.channels_last
        options += "-packed" * self.packed
        return f"{self.model}-{self.batch}-{str(self.dtype).removeprefix('torch.')}{options}"


# Each adds kernels that those before it don't have: tiles by batch and width, attention by head dim and tokens.
WORKLOADS = (
    Workload("vit_base_patch16_224", 256, torch.bfloat16),
    Workload("vit_base_patch16_224", 1, torch.bfloat16),
    Workload("vit_base_patch16_224", 32, torch.float16),
    Workload("vit_base_patch16_224", 8, torch.float32),
    Workload("vit_base_patch16_384", 32, torch.bfloat16, {"init_values": 1e-5, "drop_path_rate": 0.1}),
    Workload("vit_tiny_patch16_224", 256, torch.bfloat16),
    Workload("vit_small_patch32_224", 256, torch.bfloat16),
    Workload("vit_large_patch16_224", 64, torch.bfloat16),
    Workload("vit_huge_patch14_224", 64, torch.bfloat16),
    Workload("vit_so400m_patch14_224", 64, torch.bfloat16),
    Workload("vit_giant_patch14_224", 32, torch.bfloat16),
    Workload("vit_gigantic_patch14_224", 32, torch.bfloat16),
)

# Each changes the code of a kernel but not its tiles: activations, image formats, rows that no descriptor can address.
_PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
VARIATIONS = (
    Workload("vit_base_patch16_224", 8, torch.bfloat16, {"act_layer": "quick_gelu", **_PIXELS}),
    Workload("vit_base_patch16_224", 8, torch.bfloat16, {"act_layer": "gelu_tanh", **_PIXELS}, channels_last=True),
    Workload("vit_base_patch16_224", 8, torch.bfloat16, {"mlp_layer": SwiGLU}),
    Workload("vit_base_patch16_224", 8, torch.bfloat16, {"embed_dim": 196, "num_heads": 7}),
    Workload("vit_base_patch16_224", 32, torch.bfloat16, packed=True),
    Workload("vit_base_patch16_224", 4, torch.bfloat16, _PIXELS, packed=True),
    Workload("vit_huge_patch14_224", 32, torch.bfloat16, {"embed_dim": 768, "num_heads": 12}, packed=True),
)


def launches(workload: Workload, arch: int) -> Trace:
    """Record a training step of the workload at depth 2: every launch of the whole model (its blocks are alike)."""
    from fastvit.models import create_model

    model = create_model(workload.model, depth=2, device="meta", dtype=workload.dtype, **workload.options)
    shape = (*model.patch_embed.img_size, 3) if workload.channels_last else (3, *model.patch_embed.img_size)
    dtype = workload.dtype if model.mean is None else torch.uint8
    images: Any = torch.empty(workload.batch, *shape, device="meta", dtype=dtype, requires_grad=dtype.is_floating_point)
    if workload.packed:
        (height, width), steps = model.patch_embed.img_size, (0.5, 1, 2)
        sizes = [(int(height * step), int(width * step)) for step in steps * workload.batch][: workload.batch]
        each = [torch.empty(3, *size, device="meta", dtype=dtype) for size in sizes]
        images = pack(each, model.patch_embed.patch_size)
    with trace(arch) as result:
        logits = model(images)
        logits.backward(torch.empty_like(logits))
    return result


@dataclass(frozen=True)
class Attention:
    """A call of packed attention with options, whose kernels ship: of ``window`` patches and a class token."""

    name: str
    head_dim: int = 64
    window: tuple[int, int] = (14, 14)
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.name}-{self.head_dim}-{self.window[0]}x{self.window[1]}-{str(self.dtype).removeprefix('torch.')}"


# With dropout and a mask wherever they can be had: what needs the most registers.
ATTENTIONS = (
    *(Attention(name, d) for d in (64, 80, 128) for name in ("bias", "table", "packed")),
    *(Attention(name, dtype=torch.float32) for name in ("bias", "table", "packed")),
    *(Attention("rel_pos_keys", d) for d in (64, 128)),
    Attention("rel_pos_keys", dtype=torch.float32),
    Attention("key mask"),
    Attention("table", window=(24, 24)),  # a tile of 32 rows for its gradient
    Attention("table", window=(64, 64)),  # rows of the window in parts
)


def attention_launches(call: Attention, arch: int) -> Trace:
    """Record forward and backward of one of :data:`ATTENTIONS`, with every gradient."""
    (h, w), heads, batch = call.window, 12, 8
    tokens = h * w + 1
    meta: dict[str, Any] = {"device": "meta"}
    options: dict[str, Any] = {"dropout_p": 0.1, "seed": torch.empty(1, dtype=torch.int64, **meta)}
    kept = torch.empty(batch, tokens, dtype=torch.bool, **meta)
    if call.name == "bias":
        bias = torch.empty(1, heads, tokens, tokens, requires_grad=True, dtype=call.dtype, **meta)
        options |= {"bias": bias, "key_mask": kept}
    elif call.name == "table":
        table = torch.empty((2 * h - 1) * (2 * w - 1) + 3, heads, requires_grad=True, **meta)
        options |= {"rel_pos_table": table, "window": call.window, "key_mask": kept}
    elif call.name == "rel_pos_keys":
        keys = torch.empty(heads, 2 * tokens - 1, call.head_dim, requires_grad=True, **meta)
        options |= {"rel_pos_keys": keys, "key_mask": kept}
    elif call.name == "packed":
        options |= {"cu_seqlens": torch.empty(batch + 1, dtype=torch.int32, **meta), "max_seqlen": tokens}
        batch, tokens = 1, batch * tokens
    else:
        options = {"key_mask": kept}
    qkv = torch.empty(batch, tokens, 3, heads, call.head_dim, dtype=call.dtype, requires_grad=True, **meta)
    with trace(arch) as result:
        out: Any = ops.attention_qkvpacked(qkv, **options)
        out.backward(torch.empty_like(out))
    return result


_ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")


class _Tracer(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastvit":
            return KERNELS[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        nothing_runs = func.is_view or func.overloadpacket.__name__ in (*_ALLOCATIONS, "_unsafe_view")
        if func.namespace != "prim" and not nothing_runs:
            self.trace.aten.append(AtenOp(str(func), distinct_bytes((args, kwargs)) + distinct_bytes(out)))
        return out


@contextmanager
def without_notes() -> Iterator[None]:
    """Neither log nor keep fallbacks inside: hooks that only watch change no user's model."""
    noted, disabled = dict(backends._fallbacks), backends.log.disabled
    backends.log.disabled = True
    try:
        yield
    finally:
        backends.log.disabled = disabled
        backends._fallbacks.clear()
        backends._fallbacks.update(noted)


@contextmanager
def trace(arch: int, backend: str = "triton") -> Iterator[Trace]:
    """Record what models on meta tensors run inside, as on a GPU of compute capability ``arch`` (90 for Hopper).

    With the backend "cuda" no launch is recorded, and :func:`fastvit.cuda.extension.no_launches` must be on.
    """
    from fastvit.triton import launch

    result = Trace()
    with backends.backend(backend), launch.record(arch) as result.launches, _Tracer(result):
        yield result


def distinct_bytes(tree: Any) -> int:
    """Return the bytes of the tensors in nested arguments, each once, and of an expanded one those in memory."""
    seen: dict[tuple[Any, ...], int] = {}
    for t in tree_leaves(tree):
        t = getattr(t, "base", t)  # a tensor descriptor's tensor
        if isinstance(t, Tensor):
            sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride]
            key = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride())
            seen[key] = math.prod(sizes) * t.element_size()
    return sum(seen.values())


def moved(launch: Any) -> int:
    """Return the bytes that a launch moves if it reads every input once and writes every output once."""
    return distinct_bytes(launch.args)


def flops(launch: Any) -> int:
    """Return the FLOPs of a forward kernel's matrix products, 2 for each multiply-add; 0 where it has none.

    Raises:
        LookupError: a kernel with products that has no formula here (those of backward passes).
    """
    args, name = launch.args, launch.kernel.fn.__name__
    match name:
        case "linear_pointer_kernel" | "linear_tma_kernel":
            return 2 * args["M"] * args["N"] * args["K"]
        case "attention_forward_kernel" if args["option_ptrs"].cu_q_ptr is None:  # else only the device knows
            return 4 * args["q_ptr"].numel() * args["k_ptr"].shape[1]
        case "patch_embed_forward_kernel":
            return 2 * args["images_ptr"].numel() * args["D"]
    if "PRECISION" in args:  # of a product; every kernel with one has it
        raise LookupError(f"fastvit.tuning.compile_report.flops has no formula for {name}")
    return 0


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Return the bytes that ``run`` keeps for backward: unique storages without ``model``'s parameters."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a storage must not be freed and its address reused while we count

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


@dataclass(frozen=True)
class Compiled:
    """The compiler's report on one launch."""

    name: str
    arch: int
    constants: str
    hot: bool
    registers: int
    spill_bytes: int
    shared_bytes: int
    has_dot: bool
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    def instructions(self) -> set[str]:
        """Return the SASS mnemonics in the binary (HMMA, HGMMA...), without modifiers."""
        text = _cuobjdump("-sass", self.cubin)
        return set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text, re.MULTILINE))


def _cuobjdump(flag: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [knobs.nvidia.cuobjdump.path, flag, file.name], check=True, capture_output=True, text=True
        ).stdout


def _specialise(launch: Any, arch: int) -> tuple[Any, ...]:
    """Return (target, options, signature, constants, attributes) that Triton's JIT would compile for a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    options = dict(launch.options, debug=False)
    bound, specialization, options = binder(**launch.args, **options)
    return target, *launch.kernel._pack_args(backend, options, bound, specialization, options)


def configuration(launch: Any) -> tuple[Any, ...]:
    """Return the choice of a table: the kernel, its numeric constants, the element size, warps and stages.

    Launches of one configuration differ by their epilogue and by the divisibility of their sizes only.
    """
    sizes = {
        name: value
        for name, value in launch.args.items()
        if launch.kernel.params[launch.kernel.arg_names.index(name)].is_constexpr
        and not (isinstance(value, str) or callable(value))
    }
    element = next(a.dtype.itemsize for a in launch.args.values() if isinstance(a, Tensor) and a.is_floating_point())
    return launch.kernel.fn.__name__, element, repr(sizes), repr(launch.options)


def specialisation(launch: Any, arch: int) -> str:
    """Return the key of Triton's JIT: launches with equal keys share one compilation."""
    _, options, signature, constants, attributes = _specialise(launch, arch)
    return repr((launch.kernel.fn.__name__, options, signature, constants, attributes))


def distinct(launches: Iterable[Any], arch: int) -> list[Any]:
    """Return the launches that compile to different code, in order of first appearance."""
    seen: dict[str, Any] = {}
    for one in launches:
        seen.setdefault(specialisation(one, arch), one)
    return list(seen.values())


def compile_launch(launch: Any, arch: int) -> Compiled:
    """Compile one recorded launch for ``arch`` and read its resources from the binary. Needs no GPU."""
    import triton
    from triton.compiler import ASTSource

    target, options, signature, constants, attributes = _specialise(launch, arch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    cubin = compiled.asm["cubin"]
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", cubin)))
    names = launch.kernel.arg_names
    return Compiled(
        name=launch.kernel.fn.__name__,
        arch=arch,
        constants=", ".join(f"{names[k[0]]}={v}" for k, v in constants.items() if len(k) == 1) + f" {launch.options}",
        hot=launch.hot,
        registers=int(usage["REG"]),
        spill_bytes=max(int(usage["STACK"]), int(usage["LOCAL"])),
        shared_bytes=compiled.metadata.shared,
        has_dot="tt.dot" in compiled.asm["ttir"],
        ptx=compiled.asm["ptx"],
        cubin=cubin,
    )

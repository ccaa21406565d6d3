"""Every op's cases, shared: the interpreter runs them on the CPU, a GPU runs them natively.

A case builds the op's arguments for a dtype and a device; tensors that want a gradient require it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastvit import ops, pack, reference
from fastvit.activations import ACTIVATIONS, GATED, columns

Make = Callable[..., Tensor]  # make(*shape, dtype=None) -> a leaf that requires a gradient


@dataclass(frozen=True)
class Case:
    """One call of one op."""

    op: str
    name: str
    build: Callable[[Make], dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def kernel(self) -> Callable[..., Any]:
        return getattr(ops, self.op)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.op)

    def args(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """Fresh random arguments, parameters scaled as in a network, seeded by the caller."""

        def make(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0, grad: bool = True) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(grad)

        return self.build(make)


F32 = torch.float32
_LSE = {"return_lse": True}


def _norm(make: Make, width: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, float]:
    kw = {} if dtype is None else {"dtype": dtype}
    return make(width, **kw), make(width, **kw), 1e-6


def _row_scale(make: Make, batch: int) -> Tensor:
    """Drop-path at rate 0.5: images kept twice as strong, or dropped."""
    kept = torch.arange(batch, device=make(1).device) % 2
    return kept.to(F32) * 2


def _patch(make: Make, b: int, c: int, hw: tuple[int, int], d: int, pq: tuple[int, int], **kw: Any) -> dict[str, Any]:
    n = (hw[0] // pq[0]) * (hw[1] // pq[1])
    prefix = kw.get("prefix", 1)
    args: dict[str, Any] = {"images": make(b, c, *hw), "weight": make(d, c, *pq, scale=0.1)}
    if kw.get("bias", True):
        args["bias"] = make(d)
    if kw.get("pos", True):
        args["pos_embed"] = make(1, n + (prefix if kw.get("pos_prefix", True) else 0), d, dtype=kw.get("params", F32))
    if prefix:
        args["prefix_tokens"] = make(1, prefix, d, dtype=kw.get("params", F32))
    return args


def _uint8(make: Make, shape: tuple[int, ...], d: int, p: int, c: int) -> dict[str, Any]:
    device = make(1).device
    return {
        "images": torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
        "weight": make(d, c, p, p, scale=0.1),
        "bias": make(d),
        "mean": torch.rand(c, device=device),
        "std": torch.rand(c, device=device) + 0.2,
    }


def _packed(make: Make, sizes: list[tuple[int, int]], d: int, pq: tuple[int, int], **kw: Any) -> dict[str, Any]:
    c, prefix, device = kw.get("channels", 3), kw.get("prefix", 1), make(1).device
    args: dict[str, Any] = {}
    if kw.get("uint8"):
        images = [torch.randint(0, 256, (c, *hw), dtype=torch.uint8, device=device) for hw in sizes]
        args["mean"], args["std"] = torch.rand(c, device=device), torch.rand(c, device=device) + 0.2
    else:
        images = [make(c, *hw, grad=False) for hw in sizes]
    args["packed"] = pack(images, pq, channels=c)
    args["weight"] = make(d, c, *pq, scale=0.1)
    if kw.get("rows", True):
        args |= {"bias": make(d), "pos_embed": make(args["packed"].layout.image.shape[0], d, dtype=F32)}
    if prefix:
        args["prefix_tokens"] = make(1, prefix, d, dtype=F32)
    return args


def _angles(make: Make, *shape: int) -> dict[str, Tensor]:
    """cos and sin in float32; every element has its own, so that none can stand for another."""
    return {name: make(*shape, dtype=F32, grad=False) for name in ("cos", "sin")}


def _qkv(make: Make, batch: int, queries: int, keys: int) -> dict[str, Any]:
    return {name: make(batch, queries if name == "q" else keys, 2, 32) for name in "qkv"}


def _mask(make: Make, batch: int, keys: int) -> dict[str, Any]:
    """Every second key of all images but the first, which has none."""
    kept = torch.arange(keys, device=make(1).device) % 2 == 0
    return {"key_mask": torch.stack([kept & (image > 0) for image in range(batch)])}


def _sequences(make: Make, *starts: int) -> dict[str, Any]:
    """Sequences packed in one row; the longest is said to be longer than it is."""
    longest = max(end - start for start, end in pairwise(starts)) + 3
    return {"cu_seqlens": torch.tensor(starts, dtype=torch.int32, device=make(1).device), "max_seqlen": longest}


def _seed(make: Make) -> Tensor:
    return torch.tensor([-0x123456789ABCDEF], device=make(1).device)


CASES = [
    Case("patch_embed", "square", lambda m: _patch(m, 2, 3, (12, 12), 20, (4, 4))),
    Case("patch_embed", "oblong", lambda m: _patch(m, 1, 5, (8, 18), 17, (4, 6), prefix=5, pos_prefix=False)),
    Case("patch_embed", "bare", lambda m: _patch(m, 3, 1, (14, 28), 8, (14, 14), prefix=0, pos=False, bias=False)),
    Case("patch_embed", "uint8-nchw", lambda m: _uint8(m, (2, 3, 8, 8), 12, 4, 3)),
    Case("patch_embed", "uint8-nhwc", lambda m: _uint8(m, (2, 8, 12, 3), 12, 4, 3)),
    Case("patch_embed_packed", "mix", lambda m: _packed(m, [(8, 18), (4, 6), (12, 6)], 24, (4, 6), prefix=2)),
    Case(
        "patch_embed_packed",
        "uint8",
        lambda m: _packed(m, [(14, 14), (14, 28)], 8, (14, 14), channels=1, prefix=0, rows=False, uint8=True),
    ),
    Case("layer_norm", "odd", lambda m: dict(zip(("x", "weight", "bias"), (m(3, 5, 17), m(17), m(17)), strict=True))),
    Case("layer_norm", "plain", lambda m: {"x": m(7, 96), "weight": None, "bias": None, "eps": 1e-5}),
    Case(
        "layer_norm",
        "merge",
        lambda m: {
            "x": m(4, 3, 48),
            "weight": m(48, dtype=F32),
            "bias": m(48, dtype=F32),
            "residual": m(4, 3, 48, dtype=F32),
            "gamma": m(48, dtype=F32),
            "row_scale": _row_scale(m, 4),
        },
    ),
    Case(
        "layer_norm",
        "merge-bare",
        lambda m: {"x": m(2, 5, 40), "weight": m(40), "bias": m(40), "residual": m(2, 5, 40)},
    ),
    Case("linear", "plain", lambda m: {"x": m(3, 5, 40), "weight": m(24, 40, scale=0.2), "bias": m(24)}),
    Case(
        "linear",
        "norm-gelu",
        lambda m: {
            "x": m(17, 48),
            "weight": m(72, 48, scale=0.2),
            "bias": m(72),
            "norm": _norm(m, 48),
            "activation": "gelu",
        },
    ),
    Case(
        "linear",
        "merge",
        lambda m: {
            "x": m(4, 5, 32),
            "weight": m(48, 32, scale=0.2),
            "bias": m(48, dtype=F32),
            "residual": m(4, 5, 48, dtype=F32),
            "gamma": m(48, dtype=F32),
            "row_scale": _row_scale(m, 4),
        },
    ),
    Case(
        "linear",
        "norm-float32-stream",
        lambda m: {"x": m(2, 7, 48, dtype=F32), "weight": m(40, 48, scale=0.2), "norm": _norm(m, 48, F32)},
    ),
    *(
        Case(
            "mlp",
            activation,
            lambda m, activation=activation: {
                "x": m(2, 11, 32),
                "fc1_weight": m(64, 32, scale=0.2),
                "fc1_bias": m(64),
                "fc2_weight": m(32, 64 // columns(activation), scale=0.2),
                "fc2_bias": m(32),
                "norm": _norm(m, 32),
                "activation": activation,
                "residual": m(2, 11, 32),
                "gamma": m(32),
                "row_scale": _row_scale(m, 2),
            },
        )
        for activation in (*ACTIVATIONS, *GATED)
    ),
    Case(
        "mlp",
        "bare",
        lambda m: {
            "x": m(19, 24),
            "fc1_weight": m(40, 24, scale=0.2),
            "fc1_bias": None,
            "fc2_weight": m(16, 40, scale=0.2),
            "fc2_bias": None,
        },
    ),
    Case("rotate", "grid", lambda m: {"q": m(2, 6, 3, 32), "k": m(2, 6, 3, 32)} | _angles(m, 6, 32)),
    Case("rotate", "prefix", lambda m: {"q": m(2, 11, 2, 40), "k": m(2, 11, 2, 40)} | _angles(m, 2, 8, 40)),
    *(
        Case(
            "attention",
            f"{tq}x{tk}x{d}",
            lambda m, tq=tq, tk=tk, d=d: {"q": m(2, tq, 2, d), "k": m(2, tk, 2, d), "v": m(2, tk, 2, d)},
        )
        for tq, tk, d in ((5, 9, 32), (1, 50, 64), (33, 1, 80))
    ),
    Case("attention", "lse", lambda m: {"q": m(1, 7, 3, 16), "k": m(1, 21, 3, 16), "v": m(1, 21, 3, 16)} | _LSE),
    *(
        Case("attention_qkvpacked", f"{t}x{d}", lambda m, t=t, d=d: {"qkv": m(1, t, 3, 2, d)} | _LSE)
        for t, d in ((17, 64), (65, 72), (197, 32))
    ),
    Case("attention_qkvpacked", "scale", lambda m: {"qkv": m(2, 5, 3, 2, 24), "scale": 0.4}),
    Case("attention", "bias", lambda m: _qkv(m, 2, 5, 19) | {"bias": m(1, 2, 5, 19, dtype=F32)} | _mask(m, 2, 19)),
    Case("attention", "dropout", lambda m: _qkv(m, 2, 17, 9) | {"dropout_p": 0.4, "seed": _seed(m)} | _LSE),
    Case(
        "attention",
        "rope-packed",
        lambda m: _qkv(m, 1, 21, 21) | {"rope": tuple(_angles(m, 21, 32).values())} | _sequences(m, 0, 4, 4, 21),
    ),
    Case(
        "attention_qkvpacked",
        "table",
        lambda m: {"qkv": m(2, 7, 3, 2, 32), "rel_pos_table": m(18, 2, dtype=F32), "window": (2, 3)} | _LSE,
    ),
    Case(
        "attention_qkvpacked",
        "distances",
        lambda m: {"qkv": m(2, 17, 3, 2, 32), "rel_pos_keys": m(33, 32)} | _LSE,
    ),
    Case(
        "attention_qkvpacked",
        "packed",
        lambda m: {"qkv": m(1, 30, 3, 2, 32), "dropout_p": 0.2, "seed": _seed(m)} | _sequences(m, 0, 17, 17, 18, 30),
    ),
]


# Cases that the CUDA kernels refuse, and of what: widths that 8 does not divide, head dims below 32.
_REFUSED_BY_CUDA = {
    "patch_embed-square": r"\(20, 3, 4, 4\)",
    "patch_embed-oblong": r"\(17, 5, 4, 6\)",
    "patch_embed-uint8-nchw": r"\(12, 3, 4, 4\)",
    "patch_embed-uint8-nhwc": r"\(12, 3, 4, 4\)",
    "attention-lse": "head dim 16",
    "attention_qkvpacked-scale": "head dim 24",
}
FLOAT32_REFUSED = "float32 is not supported; accepted: float16, bfloat16"


def refused_by_cuda(case: Case, dtype: torch.dtype) -> str | None:
    """What backend cuda says of a case that it does not take, as a pattern; None for all others."""
    if dtype == torch.float32 and case.op != "layer_norm":
        return FLOAT32_REFUSED
    said = _REFUSED_BY_CUDA.get(str(case))
    return said and f"{said} is not supported; accepted: .*multiples of 8"


def with_shared_residual(op: Callable[..., Any]) -> Callable[..., Any]:
    """op with the residual being x itself, as every block calls ``mlp``."""
    return lambda x, **kw: op(x, residual=x, **kw)

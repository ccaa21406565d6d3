"""The problems of a model, a launcher's call for each, and candidate configs. Nothing here needs a GPU.

A problem (:class:`fastvit.triton.tiles.Problem`) is a shape with the other keys of a tile table: a model runs once on
meta tensors, and each lookup of its launchers is one. For backend ``cuda`` a config says which implementation runs a
linear layer's product: {"run": "kernel"}, the default, or a library's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.activations import columns
from fastvit.cuda import extension
from fastvit.cuda import linear as cuda_linear
from fastvit.triton import launch, tiles
from fastvit.triton.attention import attention_forward
from fastvit.triton.attention_backward import attention_key_value_gradient, attention_query_gradient
from fastvit.triton.linear import linear_forward
from fastvit.triton.linear_backward import linear_input_gradient, linear_weight_gradient
from fastvit.triton.patch_embed import patch_embed_forward, patch_embed_image_gradient, patch_embed_weight_gradient
from fastvit.triton.tiles import Problem, Row
from fastvit.tuning import compile_report

SLACK = 1.75  # candidates are tried up to this many times the least time that the model of time predicts


# --- problems -------------------------------------------------------------------------------------------------


def find_problems(
    model: nn.Module, images: Tensor, arch: int, *, training: bool, backend: str = "triton"
) -> dict[Problem, Row]:
    """Return the problems of ``model`` on ``images`` (both on meta) on ``arch``, with their derived tiles."""
    with extension.no_launches(), compile_report.trace(arch, backend), tiles.record_problems() as found:
        if training:
            logits = model.train()(images)
            logits.backward(torch.empty_like(logits))
        else:
            with torch.no_grad():
                model.eval()(images)
    return found


@dataclass(frozen=True)
class LauncherCall:
    """A launcher's call that looks up the tile of one problem and of no other."""

    launcher: Callable[..., Any]
    arguments: dict[str, Any]
    written: tuple[str, ...] = ()  # arguments that the launcher writes

    def run(self, tile: Row | None = None) -> list[Tensor]:
        """Call the launcher and return every tensor that it wrote."""
        out = self.launcher(**self.arguments, tile=tile)
        returned = [] if out is None else [out] if isinstance(out, Tensor) else [t for t in out if t is not None]
        return [*returned, *(self.arguments[name] for name in self.written)]

    def in_float32(self) -> LauncherCall:
        """Return the same call on the same values in float32."""

        def wide(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.float() if value.is_floating_point() else value
            return torch.float32 if isinstance(value, torch.dtype) else value

        return LauncherCall(self.launcher, {name: wide(value) for name, value in self.arguments.items()}, self.written)


def launcher_call(problem: Problem, dtype: torch.dtype, device: torch.device | str) -> LauncherCall:
    """Make a call with random operands in ``dtype`` on ``device`` (or meta) that looks up ``problem``."""

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    make: dict[str, Any] = {"linear": _linear, "attention": _attention, "patch_embed": _patch_embed, "cuda": _cuda}
    call: LauncherCall = make[problem.family](random, size=problem.size, **problem.fields)
    return call


def is_reproducible(problem: Problem, dtype: torch.dtype, arch: int) -> bool:
    """Return whether :func:`launcher_call` looks up this problem: calls with odd operand layouts have no copy."""
    with extension.no_launches(), launch.record(arch), tiles.record_problems() as found:
        launcher_call(problem, dtype, "meta").run()
    return any((p.family, p.dtype, p.key) == (problem.family, problem.dtype, problem.key) for p in found)


def _linear(
    random: Any, size: int, op: str, allows: str, activation: str | None, scaled: bool, residual: bool, n: int, k: int
) -> LauncherCall:
    if op == "weight":
        return LauncherCall(linear_weight_gradient, {"dout": random(size, n), "x": random(size, k)})
    arguments: dict[str, Any] = {"activation": activation}
    if op == "input":
        preact = None if activation is None else random(size, n)
        gamma = random(k) if scaled else None
        arguments |= {"dout": random(size, k), "weight": random(k, n), "preact": preact, "gamma": gamma}
        return LauncherCall(linear_input_gradient, arguments)
    arguments |= {
        "x": random(size, k),
        "weight": random(n, k),
        "bias": random(n),
        "save_preact": activation is not None,
    }
    return LauncherCall(linear_forward, {**arguments, "residual": random(size, n) if residual else None})


def _attention(random: Any, size: int, kernel: str, heads: int, head_dim: int, owned: int, length: int) -> LauncherCall:
    queries, keys = (length, owned) if kernel == "key_value_gradient" else (owned, length)

    def operands() -> tuple[Tensor, ...]:
        if queries == keys:
            return random(size, queries, 3, heads, head_dim).unbind(2)
        return random(size, queries, heads, head_dim), *random(size, keys, 2, heads, head_dim).unbind(2)

    q, k, v = operands()
    scale = head_dim**-0.5
    if kernel == "forward":
        return LauncherCall(attention_forward, {"q": q, "k": k, "v": v, "scale": scale})
    dq, dk, dv = operands()
    # Random scores have a variance of one: with this log-sum-exp their probabilities sum to about one.
    lse = torch.full((size, heads, queries), math.log(keys) + 0.5, device=q.device)
    arguments = {"dout": random(size, queries, heads, head_dim), "q": q, "k": k, "v": v, "lse": lse, "scale": scale}
    if kernel == "query_gradient":
        arguments |= {"dlse": None, "out": random(size, queries, heads, head_dim), "dq": dq}
        return LauncherCall(attention_query_gradient, arguments, ("dq",))
    delta = random(size, heads, queries, dtype=torch.float32)
    return LauncherCall(attention_key_value_gradient, {**arguments, "delta": delta, "dk": dk, "dv": dv}, ("dk", "dv"))


def _patch_embed(
    random: Any, size: int, kernel: str, pixels: str, dim: int, channels: int, patch_height: int, patch_width: int
) -> LauncherCall:
    """Square images of at most 14 x 14 patches with one prefix token: as many as make ``size`` rows, nearly."""
    grid = min(14, math.isqrt(max(size - 1, 1)))
    batch, tokens = max(1, size // (grid * grid + 1)), grid * grid + 1
    weight = random(dim, channels, patch_height, patch_width)
    images = random(batch, channels, grid * patch_height, grid * patch_width)
    arguments: dict[str, Any] = {}
    if pixels == "uint8":
        images = (images.abs() * 64).clamp(max=255).to(torch.uint8)
        mean = torch.full((channels,), 0.5, device=weight.device)
        arguments = {"mean": mean, "std": mean.clone()}
    if kernel == "forward":
        arguments |= {"images": images, "weight": weight, "bias": random(dim)}
        arguments |= {"pos_embed": random(1, tokens, dim), "prefix_tokens": random(1, 1, dim)}
        return LauncherCall(patch_embed_forward, arguments)
    arguments |= {"dout": random(batch, tokens, dim), "prefix": 1}
    if kernel == "weight_gradient":
        return LauncherCall(patch_embed_weight_gradient, {**arguments, "images": images, "weight_shape": weight.shape})
    arguments |= {"weight": weight, "image_shape": images.shape, "dtype": weight.dtype}
    return LauncherCall(patch_embed_image_gradient, arguments)


def _cuda(
    random: Any,
    size: int,
    op: str,
    activation: str | None,
    scaled: bool,
    residual: str | None,
    saves: bool,
    n: int,
    k: int,
) -> LauncherCall:
    if op == "weight":
        arguments = {"dout": random(size, n), "x": random(size, k), "need_bias": saves}
        if scaled:
            arguments |= {"weight": random(n, k), "gamma": random(n)}
        return LauncherCall(cuda_linear.linear_weight_gradient, arguments)
    if op == "input":
        preact = None if activation is None else random(size, columns(activation) * n)
        arguments = {"dout": random(size, k), "weight": random(k, n), "gamma": random(k) if scaled else None}
        return LauncherCall(
            cuda_linear.linear_input_gradient, {**arguments, "preact": preact, "activation": activation}
        )
    arguments = {"x": random(size, k), "weight": random(n, k), "bias": random(n), "activation": activation}
    if op == "normed":  # rows that lie two deviations from zero: a mean is what folding has to take off
        norm = (random(k), random(k), 1e-6)
        return LauncherCall(cuda_linear.linear_normed_forward, {**arguments, "x": arguments["x"] + 2, "norm": norm})
    if residual is not None:
        wide = {"dtype": torch.float32} if residual == "float32" else {}
        arguments |= {"residual": random(size, n, **wide), "gamma": random(n) if scaled else None}
    return LauncherCall(cuda_linear.linear_forward, {**arguments, "save_preact": saves})


# --- candidates ----------------------------------------------------------------------------------------------


def shared_bytes(arch: int) -> int:
    """Return the shared memory of one program on ``arch``, or on the nearest older known architecture."""
    return compile_report.SHARED_KIB[max(known for known in compile_report.SHARED_KIB if known <= arch)] * 1024


def candidate_configs(problem: Problem, arch: int, programs: int) -> list[Row]:
    """Return configs to try, the most promising first: those that the kernel allows and a simple time model keeps.

    Args:
        problem: the shape and the keys.
        arch: the compute capability, for the limit of shared memory.
        programs: the GPU's multiprocessors.
    """
    if problem.family == "attention":
        return list(_attention_tiles(problem))
    key = problem.fields
    if problem.family == "cuda":
        return [{"run": run} for run in tiles.RUNS[key["op"]]]
    if problem.family == "linear":
        m, n = (key["n"], key["k"]) if key["op"] == "weight" else (problem.size, key["n"])
        length = problem.size if key["op"] == "weight" else None
        found = []
        for form in ("tma", "pointer") if key["allows"] == "tma" else (key["allows"],):
            for tile in _product_tiles(m, n, length, problem.dtype, arch, programs):
                # The form that comes second takes one depth only; the TMA form has no use for short steps.
                if key["allows"] == "tma" and (tile["block_k"] < 64 or (form == "pointer" and tile["stages"] > 3)):
                    continue
                values = tile["block_m"] * tile["block_n"] // (32 * tile["warps"])
                parts = 1 if key["op"] == "weight" else 4 if form == "unaligned" else min(max(values // 32, 1), 4)
                found.append({"form": form, **tile, "parts": parts})
        return found
    pixels = key["channels"] * key["patch_height"] * key["patch_width"]
    m, n = {"forward": (problem.size, key["dim"]), "weight_gradient": (key["dim"], pixels)}.get(
        key["kernel"], (problem.size, pixels)
    )
    length = problem.size if key["kernel"] == "weight_gradient" else None
    return _product_tiles(m, n, length, problem.dtype, arch, programs)


def _product_tiles(m: int, n: int, length: int | None, dtype: str, arch: int, programs: int) -> list[Row]:
    """Return tiles of a product with (m, n) results; with a ``length``, programs share each sum.

    They are those within SLACK of the least predicted time: whole waves of tiles, each of which costs its products
    and the loads for them.
    """
    half = dtype == "half"
    blocks = (32, 64, 128, 256) if half else (32, 64, 128)
    depths = ((64, 4), (64, 3), (32, 4)) if half else ((32, 3), (32, 2), (16, 3))
    costs = {}
    for block_m, block_n, warps in product(blocks, blocks, (4, 8)):
        area = block_m * block_n
        # 16 to 128 sums in each thread's registers; eight warps only where four would have 128 or more.
        least, most = (2048, 16384) if warps == 4 else (16384, 32768)
        if not least <= area <= (most if half else most // 2):
            continue
        tiles_total = math.ceil(m / block_m) * math.ceil(n / block_n)
        splits = min(max(length // 256, 1), 16) if length else 1
        waves = math.ceil(tiles_total * splits / programs) / splits
        costs[block_m, block_n, warps] = waves * area * (1 + 64 / block_m + 64 / block_n)
    found = []
    for (block_m, block_n, warps), cost in sorted(costs.items(), key=lambda one: one[1]):
        if cost <= SLACK * min(costs.values()):
            for block_k, stages in depths:
                if (block_m + block_n) * block_k * (2 if half else 4) * stages <= shared_bytes(arch):
                    sizes = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
                    found.append({**sizes, "warps": warps, "stages": stages})
    return found


def _attention_tiles(problem: Problem) -> Iterator[Row]:
    key, half = problem.fields, problem.dtype == "half"
    head_piece = 64 if half else 16
    most_rows = max(16, 2 ** math.ceil(math.log2(key["owned"])))
    for rows, warps in (
        ((64, 4), (128, 8), (128, 4), (32, 4), (16, 4)) if half else ((32, 4), (64, 4), (64, 8), (16, 4))
    ):
        if rows > most_rows or (rows < 64 and half and most_rows >= 64):
            continue
        if key["kernel"] == "forward" and half and key["length"] <= 272:  # every score in registers at once
            for piece in (128, 64):
                yield _attention_tile(rows, 0, piece, head_piece, warps, 1)
        for block in (128, 64, 32, 16) if half else (32, 16, 64):
            if block < 2 * max(key["length"], 16):
                for stages in (2, 3) if half else (1, 2):
                    yield _attention_tile(rows, block, block, head_piece, warps, stages)


def _attention_tile(rows: int, block: int, piece: int, head_piece: int, warps: int, stages: int) -> Row:
    return {"rows": rows, "block": block, "piece": piece, "head_piece": head_piece, "warps": warps, "stages": stages}


def rejection(problem: Problem, dtype: torch.dtype, tile: Row, arch: int) -> str | None:
    """Compile a candidate (into Triton's cache, where the launch finds it); return why it is rejected, or None."""
    if problem.family == "cuda":  # compiled long ago
        return None
    try:
        with launch.record(arch) as launches:
            launcher_call(problem, dtype, "meta").run(tile)
        compiled = compile_report.compile_launch(launches[0], arch)
    except Exception as error:  # a compiler's error of any type rejects the tile
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if compiled.spill_bytes:
        return f"spills {compiled.spill_bytes} bytes"
    if compiled.shared_bytes > shared_bytes(arch):
        return f"overflows shared memory with {compiled.shared_bytes} bytes"
    return None

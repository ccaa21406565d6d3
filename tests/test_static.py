"""Counts and compiler reports without a GPU: launches, saved bytes, every shipped kernel for six targets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvit
from fastvit.triton import launch
from fastvit.tuning import compile_report

ARCHITECTURES = launch.ARCHITECTURES
SLOW_BUT_90 = [pytest.param(a, marks=() if a == 90 else pytest.mark.slow) for a in ARCHITECTURES]
TABLES = Path(launch.__file__).parent / "tables"


# --- launches and saved bytes ---------------------------------------------------------------------------------


def _block(**options: object) -> torch.nn.Module:
    model = fastvit.create_model("vit_base_patch16_224", depth=1, device="meta", dtype=torch.bfloat16, **options)
    return model.blocks[0]


@pytest.mark.parametrize("options", [{}, {"init_values": 1e-5}], ids=["plain", "LayerScale"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_block_is_at_most_seven_launches(arch: int, options: dict[str, float]) -> None:
    block, x = _block(**options).eval(), torch.empty(256, 197, 768, device="meta", dtype=torch.bfloat16)
    with compile_report.trace(arch) as trace, torch.no_grad():
        block(x)
    assert trace.aten == []
    assert len(trace.launches) == 7  # two norms, four products, one attention


@pytest.mark.parametrize(("options", "limit"), [({}, 0.63), ({"init_values": 1e-5}, 0.56)], ids=["plain", "LayerScale"])
def test_a_block_keeps_at_most_its_share_of_timms(options: dict[str, float], limit: float) -> None:
    import timm

    theirs = timm.create_model("vit_base_patch16_224", depth=1, **options).blocks[0].bfloat16()
    x = torch.randn(2, 197, 768, dtype=torch.bfloat16, requires_grad=True)
    timms = compile_report.saved_bytes(theirs, lambda: theirs(x))
    ours = _block(**options)
    meta = torch.empty(2, 197, 768, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with fastvit.backend("triton"):
        kept = compile_report.saved_bytes(ours, lambda: ours(meta))
    assert 0.3 < kept / timms <= limit
    assert timms / x.nbytes == pytest.approx(18.04 if options else 16.04, abs=0.05)


def test_an_image_in_two_blocks_runs_only_our_kernels() -> None:
    """Nothing of a whole inference is left to ATen but views and the choice of the class token."""
    model = fastvit.create_model("vit_base_patch16_224", depth=2, device="meta", dtype=torch.bfloat16).eval()
    images = torch.empty(8, 3, 224, 224, device="meta", dtype=torch.bfloat16)
    with compile_report.trace(90) as trace, torch.no_grad():
        model(images)
    assert len(trace.launches) <= 1 + 2 * 8 + 2
    assert trace.aten == []


# --- compiled for every target --------------------------------------------------------------------------------


def _rows(family: str) -> dict[tuple[int, str], list[dict]]:
    table = json.loads((TABLES / f"{family}.json").read_text())["tiles"]
    return {(int(arch[2:]), dtype): rows for arch, by in table.items() for dtype, rows in by.items()}


def test_tables_have_every_architecture() -> None:
    for family in ("linear", "attention", "patch_embed"):
        assert set(_rows(family)) == {(arch, dtype) for arch in ARCHITECTURES for dtype in ("half", "float32")}


def _check(compiled: compile_report.Compiled, half: bool) -> None:
    """The gates of one kernel: no spills where it is hot, shared memory that fits, the right matrix instructions."""
    where = f"{compiled.name} on sm_{compiled.arch}: {compiled.constants}"
    assert compiled.shared_bytes <= compile_report.SHARED_KIB[compiled.arch] * 1024, (
        f"{where}: {compiled.shared_bytes} B shared"
    )
    if compiled.hot:
        assert compiled.spill_bytes == 0, f"{where}: {compiled.spill_bytes} B spilled, {compiled.registers} registers"
    if not half:
        assert "tf32" not in compiled.ptx, f"{where}: tf32 in a float32 kernel"
    elif compiled.has_dot:
        # One query, a row of a window, or tiles for many registers: wgmma and tcgen05 start at 64 rows.
        owned = "BLOCK_N" if "key_value" in compiled.name else "ROWS" if "rel_pos_keys" in compiled.name else "BLOCK_M"
        attention = compiled.name.startswith("attention")
        few_rows = attention and any(f"{owned}={n}," in compiled.constants for n in (16, 32))
        mnemonic = "HMMA" if few_rows else {90: "HGMMA", 100: "tcgen05"}.get(compiled.arch, "HMMA")
        assert mnemonic in (compiled.ptx if mnemonic == "tcgen05" else compiled.instructions()), (
            f"{where}: no {mnemonic}"
        )


def _check_all(launches: Iterable[Any], arch: int, dtype: torch.dtype) -> None:
    for one in launches:
        _check(compile_report.compile_launch(one, arch), half=dtype != torch.float32)


@cache
def _added(index: int, arch: int) -> dict[tuple[Any, ...], Any]:
    """The configurations that a workload adds to those before it, and a launch of each."""
    known = {key for i in range(index) for key in _added(i, arch)}
    launches = compile_report.launches(compile_report.WORKLOADS[index], arch).launches
    return {key: one for one in launches if (key := compile_report.configuration(one)) not in known}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("index", range(len(compile_report.WORKLOADS)), ids=[str(w) for w in compile_report.WORKLOADS])
def test_every_configuration_compiles_and_passes_its_gates(index: int, arch: int) -> None:
    """Each kernel in each tile, head dim and key split that a workload adds to those before it."""
    _check_all(_added(index, arch).values(), arch, compile_report.WORKLOADS[index].dtype)


@pytest.mark.parametrize("arch", SLOW_BUT_90)
@pytest.mark.parametrize("workload", compile_report.VARIATIONS, ids=str)
def test_every_variation_compiles_and_passes_its_gates(workload: compile_report.Workload, arch: int) -> None:
    """Kernels of an option that the plain model does not have: other epilogues of the same tiles."""
    plain = compile_report.Workload(workload.model, workload.batch, workload.dtype)
    known = {compile_report.specialisation(one, arch) for one in compile_report.launches(plain, arch).launches}
    added = compile_report.distinct(compile_report.launches(workload, arch).launches, arch)
    added = [one for one in added if compile_report.specialisation(one, arch) not in known]
    assert added
    _check_all(added, arch, workload.dtype)


@pytest.mark.parametrize("arch", SLOW_BUT_90)
@pytest.mark.parametrize("call", compile_report.ATTENTIONS, ids=str)
def test_attention_with_modifiers_compiles_and_passes_its_gates(call: compile_report.Attention, arch: int) -> None:
    _check_all(compile_report.attention_launches(call, arch).launches, arch, call.dtype)


def _tile(one: Any) -> tuple[Any, ...]:
    """A launch as its row in the tables: (kernel, tile sizes, warps, stages)."""
    name, sizes = one.kernel.fn.__name__, one.args
    blocks = (
        ("BLOCK_N", "BLOCK_K", "BLOCK_M")
        if name == "linear_weight_gradient_kernel"
        else ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    )
    if name.startswith("linear"):
        name = "weight" if "weight" in name else "input" if sizes["BACKWARD"] else "forward"
    return name, *(sizes[block] for block in blocks), one.options["num_warps"], one.options["num_stages"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_row_of_the_linear_table_is_compiled(arch: int, dtype: torch.dtype) -> None:
    """By a workload above; the few rows that none of them takes are compiled here, on their own shape."""
    from fastvit.triton import linear, linear_backward, tiles

    taken = set()
    for workload in (*compile_report.WORKLOADS, *compile_report.VARIATIONS):
        if (workload.dtype == torch.float32) == (dtype == torch.float32):
            launches = compile_report.launches(workload, arch).launches
            taken |= {_tile(o) for o in launches if o.kernel.fn.__name__.startswith("linear") and "BLOCK_M" in o.args}
    fields = ("op", "block_m", "block_n", "block_k", "warps", "stages")
    rows = {tuple(row[field] for field in fields): row for row in tiles.rows("linear", arch, dtype)}
    left = {key: row for key, row in rows.items() if key not in taken}
    for row in left.values():
        m, n, k = row["m"], row["n"], row["k"]
        launcher, *sizes = {
            "forward": (linear.linear_forward, (m, k), (n, k)),
            "input": (linear_backward.linear_input_gradient, (m, k), (k, n)),
            "weight": (linear_backward.linear_weight_gradient, (k, m), (k, n)),
        }[row["op"]]
        a, b = (torch.empty(size, device="meta", dtype=dtype) for size in sizes)
        with launch.record(arch) as launches:
            launcher(a, b, tile=row)
        _check_all(launches[:1], arch, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", SLOW_BUT_90)
def test_what_no_workload_runs_compiles_and_passes_its_gates(arch: int, dtype: torch.dtype) -> None:
    """Rotations, and rows and distances of attention's weights, at head dims with and without a rest."""
    from fastvit.triton.launchers import apply_rotary, attention_distance, attention_rows

    with launch.record(arch) as launches:
        for head_dim in (64, 72, 128):
            q, k, _ = torch.empty(64, 201, 3, 12, head_dim, dtype=dtype, device="meta").unbind(2)
            lse = torch.empty(64, 12, 201, device="meta")
            cos, sin = torch.empty(2, 196, head_dim, device="meta")
            for inverse in (False, True):
                apply_rotary(q, k, cos, sin, inverse=inverse)
            for count in (1, 64):
                bias = torch.empty(1, 1, count, 201, device="meta").expand(64, 12, -1, -1) if count > 1 else None
                attention_rows(q, k, lse, torch.empty(count, dtype=torch.int64, device="meta"), 0.125, bias=bias)
            attention_distance(q, k, lse, 0.125, (14, 14), (16.0, 16.0))
    _check_all(compile_report.distinct(launches, arch), arch, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("workload", compile_report.WORKLOADS, ids=str)
def test_every_specialisation_compiles_and_passes_its_gates(workload: compile_report.Workload, arch: int) -> None:
    """As above, but every epilogue and every divisibility that the JIT tells apart."""
    _check_all(compile_report.distinct(compile_report.launches(workload, arch).launches, arch), arch, workload.dtype)


def test_another_batch_size_seldom_compiles_anything() -> None:
    """No kernel is compiled for a batch size as such: it only enters through the tables, which have tiles by size.

    A training step of ViT-B takes 24 kernels, and its head of 1000 classes 3 of its own. Larger batches take larger
    tiles (of the forward and input-gradient GEMMs, of the patch embedding), cut the weight gradients' long sums, which
    adds their reduction, and sum more partial results at a time.
    """
    seen: set[str] = set()
    totals = {}
    for batch in (1, 2, 3, 7, 8, 32, 64, 100, 256):
        workload = compile_report.Workload("vit_base_patch16_224", batch, torch.bfloat16)
        seen |= {compile_report.specialisation(one, 90) for one in compile_report.launches(workload, 90).launches}
        totals[batch] = len(seen)
    assert totals[1] == totals[2] <= 27
    assert totals[100] == totals[256] <= 39


def test_no_mix_of_sizes_compiles_again() -> None:
    """Every launch of a step is, to Triton's JIT, the same for any lengths, totals and counts of sequences."""
    seen = set()
    for total, longest, count in ((4096, 1024, 8), (1999, 777, 3), (16, 16, 1), (33, 1, 40)):
        qkv = torch.empty(1, total, 3, 12, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        cu = torch.empty(count + 1, dtype=torch.int32, device="meta")
        with compile_report.trace(90) as trace:
            seed = torch.empty(1, dtype=torch.int64, device="meta")
            out = fastvit.ops.attention_qkvpacked(qkv, cu_seqlens=cu, max_seqlen=longest, dropout_p=0.1, seed=seed)
            out.backward(torch.empty_like(out))
        assert len(trace.launches) == 3 and trace.aten == []
        seen |= {compile_report.specialisation(one, 90) for one in trace.launches}
    assert len(seen) == 3


def test_the_gate_sees_a_spill() -> None:
    """A tile that is too large for its registers is caught: the gate can fail."""
    from fastvit.triton.linear import linear_forward

    x, weight = (torch.empty(4096, 768, device="meta", dtype=torch.bfloat16) for _ in range(2))
    tile = {"form": "pointer", "block_m": 256, "block_n": 256, "block_k": 32, "warps": 4, "stages": 2}
    with launch.record(80) as launches:
        linear_forward(x, weight, activation="gelu", tile=tile)
    with pytest.raises(AssertionError, match="spilled"):
        _check(compile_report.compile_launch(launches[0], 80), half=True)

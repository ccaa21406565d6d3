"""``python -m benchmarks static``: launches, bytes, FLOPs, floors and the compiler's report, without a GPU.

Nothing here is timed, so two runs write the same bytes. :func:`gate` fails where a figure passes a limit or is worse
than in the committed ``results/static.json``.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import triton
from tqdm import tqdm

from benchmarks.measurements import RESULTS
from benchmarks.suites.static_counts import derive
from fastvit.triton import launch
from fastvit.tuning import compile_report

HELP = "launches, bytes, FLOPs, floors, registers and spills, against the committed baseline; needs no GPU"
DESCRIPTION = (
    "Derive and compile, with no GPU: launches and bytes of a block, bytes kept for backward beside timm's, FLOPs, "
    "roofline floors from data sheets, table 6 of the ViT paper, and registers, spills and shared memory of every "
    "kernel configuration on six architectures. Writes static.json, static.csv (the kernels) and static.png. "
    "Exit status 1: a limit is passed, or a figure is worse than in benchmarks/results/static.json (--accept "
    "rewrites it). The first run compiles for minutes; Triton caches the rest."
)
BASELINE = RESULTS / "static.json"

MAX_LAUNCHES_PER_BLOCK = 7
MAX_SAVED_RATIO = 0.63


# --- compiling --------------------------------------------------------------------------------------------------

Task = tuple[int, int, tuple[int, ...]]  # architecture, index of the workload, positions among its launches


def _tasks(architectures: Iterable[int], workloads: int) -> Iterator[Task]:
    """Yield one launch of every configuration, by the first workload that has it."""
    for arch in architectures:
        known: set[Any] = set()
        for index in range(workloads):
            found: dict[Any, int] = {}
            for i, one in enumerate(compile_report.launches(compile_report.WORKLOADS[index], arch).launches):
                found.setdefault(compile_report.configuration(one), i)
            yield arch, index, tuple(i for key, i in found.items() if key not in known)
            known |= found.keys()


def _compile(task: Task) -> list[dict[str, Any]]:
    """Return the compiler's report on a task's launches, recorded again here: they can't be pickled."""
    arch, index, positions = task
    workload = compile_report.WORKLOADS[index]
    launches = compile_report.launches(workload, arch).launches
    reports = [compile_report.compile_launch(launches[i], arch) for i in positions]
    return [
        {
            "name": one.name,
            "target": f"sm_{one.arch}",
            "registers": one.registers,
            "spill_bytes": one.spill_bytes,
            "shared_bytes": one.shared_bytes,
            "hot": one.hot,
            "constants": one.constants,
            "workload": str(workload),
        }
        for one in reports
    ]


def compile_kernels(quick: bool = False) -> list[dict[str, Any]]:
    """Compile every configuration of every workload for every architecture, on all cores (see :func:`collect`)."""
    tasks = [
        task
        for task in (_tasks((90,), 1) if quick else _tasks(launch.ARCHITECTURES, len(compile_report.WORKLOADS)))
        if task[2]
    ]
    rows: list[dict[str, Any]] = []
    workers = min(len(tasks), len(os.sched_getaffinity(0)))
    with tqdm(total=sum(len(task[2]) for task in tasks), desc="compiling kernels", unit="kernel") as bar:

        def collect(results: Iterable[list[dict[str, Any]]]) -> None:
            for found in results:
                rows.extend(found)
                bar.update(len(found))

        if workers == 1:
            collect(map(_compile, tasks))
        else:
            # Not forked: PyTorch has threads.
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                collect(pool.imap_unordered(_compile, tasks))
    return sorted(rows, key=lambda row: (int(row["target"][3:]), row["name"], row["constants"], row["workload"]))


# --- gates -----------------------------------------------------------------------------------------------------


def limits(found: dict[str, Any]) -> list[str]:
    """Return the figures that pass a limit, whatever the baseline says."""
    failures = []
    if found["launches_per_block"] > MAX_LAUNCHES_PER_BLOCK:
        failures.append(f"launches_per_block: {found['launches_per_block']}, at most {MAX_LAUNCHES_PER_BLOCK} allowed")
    if found["saved_bytes_ratio_to_timm"] > MAX_SAVED_RATIO:
        ratio = found["saved_bytes_ratio_to_timm"]
        failures.append(f"saved_bytes_ratio_to_timm: {ratio:.4f}, at most {MAX_SAVED_RATIO} allowed")
    for row in found["kernels"]:
        if row["hot"] and row["spill_bytes"]:
            failures.append(
                f"{row['name']} on {row['target']} spills {row['spill_bytes']} bytes: {row['constants']} "
                f"({row['workload']})"
            )
    return failures


def figures(found: dict[str, Any]) -> dict[str, float]:
    """Return the figures of the baseline, by name; less is better in all. Of the kernels, the most of each."""
    held = {
        "launches_per_block": found["launches_per_block"],
        "saved_bytes_ratio_to_timm": round(found["saved_bytes_ratio_to_timm"], 6),
    }
    for key in ("launches_per_training_block", "launches_per_model"):
        held |= {f"{key} {name}": value for name, value in found[key].items()}
    for kind, by_scale in found["bytes_per_block"].items():
        held |= {f"bytes_per_block {kind} {scale}": value for scale, value in by_scale.items()}
    for kind, by_name in found["saved_bytes_per_image"].items():
        held |= {f"saved_bytes_per_image {kind} {name}": value["fastvit"] for name, value in by_name.items()}
    for row in found["kernels"]:
        for what in ("spill_bytes", "shared_bytes"):
            key = f"{row['target']} {row['name']} {what}"
            held[key] = max(held.get(key, 0), row[what])
    return dict(sorted(held.items()))


def compare(held: dict[str, float], baseline: dict[str, float], complete: bool) -> tuple[list[str], list[str]]:
    """Return (worse figures, better figures) than the baseline's.

    A ``complete`` run fails as well where it has a figure that the baseline lacks, or lacks one that it has.
    """
    worse, better = [], []
    for key in sorted(held.keys() | baseline.keys()):
        if key in held and key in baseline:
            line = f"{key}: {held[key]}, baseline {baseline[key]}"
            if held[key] > baseline[key]:
                worse.append(line)
            elif held[key] < baseline[key] and complete:
                better.append(line)
        elif complete:
            worse.append(f"{key}: in {'the run' if key in held else 'the baseline'} only")
    return worse, better


def collect(quick: bool = False) -> dict[str, Any]:
    """Count and compile everything; return the content of static.json. quick: ViT-B/16 alone, and only sm_90.

    Raises:
        RuntimeError: TRITON_INTERPRET=1.
    """
    if launch.INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET=1 is set: Triton interprets kernels and can't compile them; unset it")
    versions = {"timm": timm.__version__, "torch": torch.__version__, "triton": triton.__version__}
    return {"versions": versions, **derive(quick), "kernels": compile_kernels(quick)}


def write(found: dict[str, Any], out: Path) -> list[Path]:
    """Write static.json and static.csv (the kernels) into a folder, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "static.json").write_text(json.dumps(found, indent=1) + "\n")
    with (out / "static.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(found["kernels"][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found["kernels"])
    return [out / "static.json", out / "static.csv"]


def gate(found: dict[str, Any], complete: bool) -> int:
    """Print what passes a limit or is worse than the baseline; return the exit status, 1 where anything is."""
    failures = limits(found)
    worse, better = against_baseline(figures(found), found["versions"]["triton"], complete)
    failures += worse
    if better:
        print("Better than the baseline; `python -m benchmarks static --accept` keeps it:", *better, sep="\n  ")
    if failures:
        print("Failed:", *failures, sep="\n  ")
    return 1 if failures else 0


def against_baseline(held: dict[str, float], triton_version: str, complete: bool) -> tuple[list[str], list[str]]:
    """:func:`compare` with the committed baseline; kernels only where the same version of Triton compiled them."""
    baseline = json.loads(BASELINE.read_text())
    kept = figures(baseline)
    if baseline["versions"]["triton"] != triton_version:
        theirs = baseline["versions"]["triton"]
        print(f"The baseline is for triton {theirs}, this is {triton_version}: kernels are not compared")
        held, kept = ({k: v for k, v in d.items() if not k.startswith("sm_")} for d in (held, kept))
    return compare(held, kept, complete)

"""README.md's part of the results: a headline for each device and the derived table, from the result files alone."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measurements import Row
from benchmarks.report import OUT, derived, tables
from benchmarks.report.results import Device, is_floor, is_ours, short_commit, title, usual_size

BEGIN = "<!-- begin: python -m benchmarks report -->"
END = "<!-- end -->"
NO_GPU = "**GPUs: not measured yet.** No result from a GPU is in [`benchmarks/results/`](benchmarks/results)."
NO_STATIC = "Derived figures: not measured yet (`python -m benchmarks static`)."
PAGE = (
    "Training, latency, memory, kernels, errors, Figure 11 of the ViT paper and the rooflines: `python -m benchmarks "
    f"report` makes one page (`{OUT}/index.html`) of all rows and plots in [`benchmarks/results/`](benchmarks/results)."
)
MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")  # one is shown, the first measured
COLUMNS: tables.Columns = (
    ("contender", "contender"),
    ("images/s", "images_per_s"),
    ("x timm", "ratio"),
    ("peak MiB", "peak_bytes"),
    ("spread", "spread"),
)


def render(devices: Sequence[Device], static: derived.Found | None) -> str:
    """Return the text between the marks."""
    parts = [] if any(device.is_gpu for device in devices) else [NO_GPU]
    parts += [part for device in devices for part in _device(device)]
    parts += [NO_STATIC] if static is None else _static(static)
    return "\n\n".join([*parts, PAGE])


def updated(text: str, part: str) -> str:
    """Return ``text`` (README.md's) with ``part`` between the marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def _device(device: Device) -> list[str]:
    """Return the device's name and its headline: timm, the best other library and fastvit on one network."""
    rows = device.rows("throughput", mode="inference")
    model = next((name for name in MODELS if any(row["model"] == name for row in rows)), None)
    group = _headline([row for row in rows if row["model"] == model])
    if not group:
        return [f"**{device.name}**: inference throughput is not measured yet."]
    first = group[0]
    batches = " or ".join(dict.fromkeys(str(row["batch"]) for row in group if "batch" in row))
    number = {row["run"] for row in group}
    runs = [device.files["throughput"]["runs"][i] for i in sorted(number)]
    commits = " and ".join(dict.fromkeys(f"`{short_commit(run)}`" for run in runs))
    where = f"{title(first)} in {first['dtype']}, {first['size']} pixels, batch {batches}, inference"
    settings = "; ".join(device.settings())
    return [
        f"**{device.name}** ({settings}), {where}: timm, the best other library, fastvit. Commit {commits}.",
        tables.markdown(tables.of_rows(group, COLUMNS)),
    ]


def _headline(rows: Sequence[Row]) -> list[Row]:
    """Choose the baseline, the best other contender and fastvit, at one size, in the baseline's quickest dtype."""
    done = [row for row in rows if row["status"] == "ok"]
    if not done:
        return []
    size = usual_size(done)
    standards = [row for row in done if row["contender"] == "timm" and row["size"] == size]
    if not standards:
        return []
    standard = max(standards, key=lambda row: row["images_per_s"])
    same = [row for row in rows if row["size"] == size and row["dtype"] == standard["dtype"]]
    others = [row for row in same if row in done and row is not standard and not (is_ours(row) or is_floor(row))]
    best = sorted(others, key=lambda row: -row["images_per_s"])[:1]
    return [standard, *best, *(row for row in same if row["contender"] == "fastvit")]


def _static(static: derived.Found) -> list[str]:
    """Return the table of a block, and a sentence on the kernels."""
    table, compiled = derived.block(static), derived.compiled(static).lines
    targets = ", ".join(target for target, *_ in compiled)
    configurations, spilling = (sum(int(line[i]) for line in compiled) for i in (1, 2))
    return [
        f"**Derived and compiled**, not timed: a block of {table.title} ({derived.versions(static)}).",
        tables.markdown(table),
        f"{configurations} kernel configurations compiled for {targets}; hot ones that spill registers: {spilling}.",
    ]

"""README.md's part of the results: what a reader wants to know first, from the result files and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks import contenders, networks
from benchmarks.measurements import Row
from benchmarks.report import OUT, derived, tables
from benchmarks.report.results import Device, distinct, is_floor, is_ours, short_commit, title, usual_size

BEGIN = "<!-- begin: python -m benchmarks report -->"
END = "<!-- end -->"
NO_GPU = "**GPUs: not measured yet.** No result from a GPU is in [`benchmarks/results/`](benchmarks/results)."
NO_STATIC = "Derived figures: not measured yet (`python -m benchmarks static`)."
PAGE = (
    "Every row and every plot, Figure 11 of the ViT paper and the rooflines among them: `python -m benchmarks report` "
    f"makes one page of them (`{OUT}/index.html`), from the files in [`benchmarks/results/`](benchmarks/results)."
)
# The models shown where more were measured.
MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224", "resnetv2_50x1_bit", "resnet50")


def render(devices: Sequence[Device], static: derived.Found | None) -> str:
    """What stands between the marks."""
    parts = [] if any(device.is_gpu for device in devices) else [NO_GPU]
    parts += [part for device in devices for part in _device(device)]
    parts += [NO_STATIC] if static is None else _static(static)
    return "\n\n".join([*parts, PAGE])


def updated(text: str, part: str) -> str:
    """``text`` (README.md's) with ``part`` between the marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def _device(device: Device) -> list[str]:
    """The device's name and how it was found, its table of inference, and a line for each of the other suites."""
    runs = [run for suite in device.files for run, _ in device.runs(suite)]
    commits = " and ".join(dict.fromkeys(f"`{short_commit(run)}`" for run in runs))
    parts = [f"**{device.name}** ({'; '.join(device.settings())}). Commit {commits}, {_versions(runs)}."]
    inference = device.rows("throughput", mode="inference")
    parts.append(_inference(inference) if inference else "Inference throughput: not measured yet.")
    latency = device.done("latency")
    if latency:
        least = min(row["batch"] for row in latency)
        latency = [row for row in latency if row["batch"] == least]
    lines = [
        _line("Training step, images/s", device.done("throughput", mode="training"), "images_per_s", 1),
        _line("Latency, median ms", latency, "median_s", -1),
        _line("Activations of a training step, MiB", device.done("memory", mode="training"), "activation_bytes", -1),
        _errors([row for row in device.done("accuracy") if is_ours(row) and row.get("error_ratio")]),
    ]
    return [*parts, "\n".join(f"- {line}" for line in lines if line)]


def _versions(runs: Sequence[Row]) -> str:
    newest = max(runs, key=lambda run: run["started"])["versions"]
    names = ("torch", "triton", "timm", "torchvision", "transformers")
    return ", ".join(f"{name} {newest[name]}" for name in names if newest.get(name))


def _usual(rows: Sequence[Row]) -> list[Row]:
    """The rows of one image size and, where many models were measured, of a few."""
    size = usual_size(rows)
    some = [row for row in rows if row["size"] == size]
    many = len(distinct(some, "model")) > len(MODELS)
    return [row for row in some if row["model"] in MODELS] if many else some


def _groups(rows: Sequence[Row], field: str, sign: int) -> Iterator[tuple[list[Row], list[Row]]]:
    """(what is shown, everyone) of each group that was compared.

    Shown are the baseline, the other library that is best, fastvit as it is, with or without result, and fastvit's
    best; best is the largest ``sign * field``.
    """
    for model, dtype in distinct(rows, "model", "dtype"):
        everyone = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        done = [row for row in everyone if row["status"] == "ok" and row.get(field) and not is_floor(row)]
        named = (contenders.baseline(networks.family(model)), "fastvit")
        chosen = [row for row in everyone if row["contender"] in named]
        for ours in (False, True):
            side = [row for row in done if is_ours(row) is ours]
            chosen += sorted(side, key=lambda row: -sign * row[field])[:1]
        once = {id(row): row for row in chosen}
        yield sorted(once.values(), key=is_ours), everyone


def _inference(rows: Sequence[Row]) -> str:
    """The table."""
    rows = _usual(rows)
    shown, floors = [], {}
    for group, everyone in _groups(rows, "images_per_s", 1):
        shown += group
        for row in everyone:
            if is_floor(row) and row["status"] == "ok":
                floors[row["model"], row["dtype"]] = row["images_per_s"]

    for i, row in enumerate(shown):
        timm = row.get("ratio") if networks.family(row["model"]) != "resnet" else None
        floor = floors.get((row["model"], row["dtype"]))
        of_floor = row["images_per_s"] / floor if floor and row["status"] == "ok" else None
        shown[i] = row | {"timm_ratio": timm, "floor_ratio": of_floor}
    columns: list[tuple[str, str | Callable[[Row], str]]] = [
        ("model", title),
        ("dtype", "dtype"),
        ("contender", "contender"),
        ("batch", "batch"),
        ("images/s", "images_per_s"),
        ("x timm", "timm_ratio"),
        *([("x floor", "floor_ratio")] if floors else []),
        ("peak MiB", "peak_bytes"),
        ("spread", "spread"),
    ]
    what = f"Inference at {rows[0]['size']} pixels: the baseline, the best other library, fastvit, and its best."
    return f"{what}\n\n{tables.markdown(shown, columns)}"


def _line(name: str, rows: Sequence[Row], field: str, sign: int) -> str:
    """The same choice of contenders for another suite, in one line; empty where there are no rows."""
    if not rows:
        return ""
    rows = _usual(rows)
    parts = []
    for group, _ in _groups(rows, field, sign):
        found = [f"{row['contender']} {tables.text(row, field)}" for row in group if row.get(field)]
        if found:
            parts.append(f"{title(group[0])} {group[0]['dtype']}: {', '.join(found)}")
    if not parts:
        return ""
    batch = {row["batch"] for row in rows}
    at = f", batch {batch.pop()}" if len(batch) == 1 else ""
    return f"{name}, {rows[0]['size']} pixels{at}: {'; '.join(parts)}."


def _errors(rows: Sequence[Row]) -> str:
    """How far logits are from float64, beside timm's; empty where there are no rows."""
    if not rows:
        return ""
    ratios = [row["error_ratio"] for row in rows]
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
    return f"Largest logit error against float64, of timm's eager: {min(ratios):.2f}x to {max(ratios):.2f}x ({dtypes})."


def _static(static: derived.Found) -> list[str]:
    """The table of a block, and a sentence on the kernels."""
    table = derived.block(static)
    lines = [table.header, [":--", *("--:" for _ in table.header[1:])], *table.lines]
    compiled = derived.compiled(static).lines
    targets = ", ".join(target for target, *_ in compiled)
    configurations = sum(int(line[1]) for line in compiled)
    spilling = sum(int(line[2]) for line in compiled)
    return [
        f"**Derived and compiled**, not timed: a block of {table.title} ({derived.versions(static)}).",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
        f"{configurations} kernel configurations compiled for {targets}; hot ones that spill registers: {spilling}.",
    ]

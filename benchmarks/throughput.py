"""``python -m benchmarks throughput``: images per second, peak memory and logits, side by side."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from benchmarks import images
from benchmarks.contenders import TIMM, Contender, contenders, timm_vit
from benchmarks.measure import interleaved, peak_memory, plan, quantiles

ROUNDS = (3, 50)


@dataclass(frozen=True)
class Settings:
    """What to run."""

    model: str = "vit_base_patch16_224"
    batch: int = 4
    dtypes: Sequence[str] = ("float32", "bfloat16")
    budget: float = 40.0  # seconds of timed rounds per dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


FULL = {"cpu": Settings(), "cuda": Settings(batch=256)}  # on two cores: under three minutes
QUICK = Settings("vit_tiny_patch16_224", batch=2, budget=2.0)


@dataclass
class Row:
    """One line of the table. None where a contender failed (``error`` says why) or a value has no meaning."""

    name: str
    backend: str
    dtype: str
    batch: int
    images_per_s: float | None = None  # batch / median time
    ratio_to_timm: float | None = None  # of images_per_s, in the same dtype
    peak_memory_bytes: int | None = None  # see measure.peak_memory
    max_abs_logit_diff: float | None = None  # to timm in the same dtype with the same weights
    images_per_s_p20_p80: tuple[float, float] | None = None
    spread: float | None = None  # (p80 - p20) / median of the times
    timings: int = 0
    error: str | None = None


Run = Callable[[], Tensor]


def _prepare(contender: Contender, source: VisionTransformer, batch: Tensor) -> tuple[torch.nn.Module, Run]:
    """The contender's model on the batch's device in its dtype, and a call of it."""
    model = contender.build(source).eval().requires_grad_(False).to(batch.device, batch.dtype)
    inputs = batch
    if contender.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from its types
        inputs = batch.to(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.no_grad(), contender.context():
            logits: Tensor = model(inputs)
        return logits

    return model, run


def measure(settings: Settings) -> list[Row]:
    """Run the comparison with a progress bar and return its rows, dtype by dtype."""
    source = timm_vit(settings.model)
    photographs = images.crops(settings.batch, source.patch_embed.img_size[0])
    rows = []
    entries = contenders(settings.model)
    pace = 0.1 if sys.stderr.isatty() else 15  # seconds between the bar's lines; a log wants few
    with tqdm(total=len(settings.dtypes) * len(entries), unit="step", dynamic_ncols=True, mininterval=pace) as bar:
        for dtype in settings.dtypes:
            batch = photographs.to(settings.device, getattr(torch, dtype))
            rows += _measure_dtype(settings, dtype, entries, source, batch, bar)
            gc.collect()
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def _measure_dtype(
    settings: Settings, dtype: str, entries: list[Contender], source: VisionTransformer, batch: Tensor, bar: tqdm
) -> list[Row]:
    rows = {c.label: Row(c.name, c.backend, dtype, settings.batch) for c in entries}
    runs: dict[str, Run] = {}
    expected: Tensor | None = None
    for contender in entries:
        row = rows[contender.label]
        bar.set_description(f"{dtype}: preparing {contender.label}", refresh=False)
        try:
            model, run = _prepare(contender, source, batch)
            row.peak_memory_bytes = peak_memory(model, run, settings.device)
            logits = run().float()
        except Exception as error:  # a contender that fails is a row that says so; the others go on
            row.error = f"{type(error).__name__}: {error}".splitlines()[0]
            bar.write(f"{contender.label} in {dtype} failed: {row.error}")
        else:
            runs[contender.label] = run
            if contender.name == TIMM:
                expected = logits
            if contender.same_network and expected is not None:
                row.max_abs_logit_diff = (logits - expected).abs().max().item()
        bar.update()

    samples: dict[str, list[float]] = {label: [] for label in runs}
    repeats, rounds = plan(runs, settings.device, settings.budget, ROUNDS)
    bar.total += rounds * len(runs)
    for label, duration in interleaved(runs, settings.device, repeats, rounds):
        samples[label].append(duration)
        bar.set_description(f"{dtype}: timing {label}", refresh=False)
        bar.update()

    for label, times in samples.items():
        fast, median, slow = quantiles(times)
        row = rows[label]
        row.images_per_s = settings.batch / median
        row.images_per_s_p20_p80 = (settings.batch / slow, settings.batch / fast)
        row.spread = (slow - fast) / median
        row.timings = len(times)
    baseline = rows[entries[0].label].images_per_s
    for row in rows.values():
        if row.images_per_s is not None and baseline is not None:
            row.ratio_to_timm = row.images_per_s / baseline
    return list(rows.values())


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    """The rows as they stand in throughput.json."""
    return [asdict(row) for row in rows]

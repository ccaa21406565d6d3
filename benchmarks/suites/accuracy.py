"""``python -m benchmarks accuracy``: errors against float64 of logits and blocks, by backend and dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.measurements import Measurement, MeasurementFailed, Row
from benchmarks.race import alone
from benchmarks.subjects import ModelSubject, baseline, measurements_by_batch, starter
from benchmarks.suite import GPU, QUICK, Bar, Options, Suite, setting_columns

BY_BLOCK = ("timm", "fastvit")  # libraries with forward_intermediates


class Accuracy(ModelSubject):
    """Errors of a model against the same network in float64."""

    def errors(self) -> Row:
        """Return the largest and mean error of the logits, and each block's largest, relative to its largest value."""
        batch = self.measurement["batch"]
        exact_model = copy.deepcopy(self.network.source).to(self.device, torch.float64)
        with torch.no_grad():
            exact = exact_model(self._images(batch, torch.float64)).cpu()
            with self.contender.context(self.dtype, self.device):
                logits = self.model(self._images(batch)).double().cpu()
            row: Row = {
                "status": "ok",
                "reason": None,
                "max_abs_logit_error": (logits - exact).abs().max().item(),
                "mean_abs_logit_error": (logits - exact).abs().mean().item(),
                "max_abs_logit": exact.abs().max().item(),
                "block_errors": None,
            }
            if self._has_blocks():
                theirs = _blocks(exact_model, self._images(batch, torch.float64))
                with self.contender.context(self.dtype, self.device):
                    ours = _blocks(self.model, self._images(batch))
                pairs = zip(ours, theirs, strict=True)
                row["block_errors"] = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
        if row["max_abs_logit_error"] != row["max_abs_logit_error"]:
            raise MeasurementFailed("the logits are not numbers")
        return row

    def _has_blocks(self) -> bool:
        plain = self.contender.way.compile is None and self.network.family == "vit"
        return plain and self.contender.library.title in BY_BLOCK


def _blocks(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return every block's output, float64 on the CPU: (B, tokens without the class token, D) each."""
    found = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)  # type: ignore[operator]
    return [tensor.double().cpu() for tensor in found]


def _measure(group: Sequence[Measurement], options: Options, bar: Bar) -> Iterator[tuple[Measurement, Row]]:
    start, standard = starter(Accuracy, options), baseline(group[0])
    rows: dict[Measurement, Row] = {}
    for measurement in dict.fromkeys([standard, *group]):
        bar.say(str(measurement))
        row = rows[measurement] = alone(start(measurement), "errors")
        eager = rows[standard].get("max_abs_logit_error")
        if row["status"] == "ok" and eager is not None:
            row["error_ratio"] = row["max_abs_logit_error"] / eager
        if measurement in group:
            bar.update(2)
            yield measurement, row


ALL = [
    "timm",
    "timm-autocast",
    "timm-compile",
    "fastvit-reference",
    "fastvit-onednn",
    "fastvit-triton",
    "fastvit-cuda",
    "fastvit-autocast",
    "torchvision",
    "huggingface",
]
SUITE = Suite(
    name="accuracy",
    help="errors of logits and blocks against float64, beside eager's",
    description="The largest and the mean error of the logits against the same weights in float64, for every backend "
    "and dtype, and how many times timm's eager error that is; for timm and fastvit also the error after every block, "
    "relative to its largest value.",
    defaults={
        "cpu": Options(contenders=tuple(name for name in ALL if name != "fastvit-cuda"), batches=(2,)),
        "cuda": replace(
            GPU,
            dtypes=("float32", "bfloat16", "float16"),
            batches=(8,),
            contenders=tuple(name for name in ALL if name != "fastvit-onednn"),
        ),
        "quick": replace(
            QUICK,
            contenders=("timm", "fastvit-reference", "fastvit-onednn", "fastvit-triton", "torchvision", "huggingface"),
        ),
    },
    measurements=measurements_by_batch,
    measure=_measure,
    columns=(
        *setting_columns("model", "size", "dtype", "contender"),
        ("largest logit", "max_abs_logit"),
        ("max error", "max_abs_logit_error"),
        ("mean error", "mean_abs_logit_error"),
        ("x eager's", "error_ratio"),
        ("last block", lambda row: "-" if not row.get("block_errors") else f"{row['block_errors'][-1]:.1e}"),
    ),
)

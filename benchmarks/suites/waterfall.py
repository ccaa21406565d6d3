"""``python -m benchmarks waterfall``: the gain of every fusion, switched on one after the other in one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

import fastvit
from benchmarks import networks
from benchmarks.contenders import LIBRARIES, WAYS, Contender, Library
from benchmarks.measurements import Measurement, Row, grid
from benchmarks.networks import Network
from benchmarks.race import race
from benchmarks.subjects import starter
from benchmarks.suite import GPU, QUICK, Bar, Options, Suite, setting_columns
from benchmarks.suites.throughput import Throughput
from fastvit.ops.backends import ONEDNN_OPS, OPS

# By device; each has all that stand before it. The first is plain PyTorch with every token computed to the end.
STEPS = {
    "cpu": ("reference", *ONEDNN_OPS, "class-token"),
    "cuda": ("reference", "attention", "linear", "mlp", "layer_norm", "patch_embed", "class-token", "cuda-graph"),
}
BACKEND = {"cpu": "onednn", "cuda": "triton"}


def step_of(op: str) -> str:
    """Return the step that switches an op on."""
    return "attention" if op.startswith(("attention", "rotate")) else op


class EveryToken(nn.Module):
    """A model without the class token's saving: its last block computes all tokens."""

    def __init__(self, model: fastvit.ViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> logits (B, classes)."""
        logits: Tensor = self.model.forward_head(self.model.forward_features(images))
        return logits


class Step(Throughput):
    """A model with the fusions up to a step."""

    def __init__(self, measurement: Measurement, device: str, batches: Sequence[int]) -> None:
        self.steps = STEPS[device][: STEPS[device].index(measurement.contender) + 1]
        super().__init__(measurement, device, batches)
        fused = [op for op in OPS if step_of(op) in self.steps]
        fastvit.backend(BACKEND[device], only=fused)  # for good: the process is this step's alone

    def _find(self, name: str) -> Contender:
        library = Library("fastvit", {"vit": self._model}, backend="reference", trains=False)
        return Contender(name, library, WAYS["graph" if "cuda-graph" in self.steps else ""])

    def _model(self, network: Network) -> nn.Module:
        model = LIBRARIES["fastvit"].builds["vit"](network)
        assert isinstance(model, fastvit.ViT)
        return model if "class-token" in self.steps else EveryToken(model)


def _measurements(options: Options) -> list[Measurement]:
    steps = STEPS[options.device]
    for name in options.contenders:
        if name not in steps:
            raise ValueError(f"no step {name!r} on a {options.device}; accepted: {', '.join(steps)}")
    for model in options.models:
        if networks.family(model) != "vit":
            raise ValueError(
                f"{model} has nothing to fuse; accepted: vit_base_patch16_224 and other Vision Transformers"
            )
        for size in options.sizes:
            networks.check_size(model, size)
    settings = grid(model=options.models, size=options.sizes, mode=["inference"], dtype=options.dtypes)
    return [Measurement(step, setting) for setting in settings for step in steps if step in options.contenders]


def _measure(group: Sequence[Measurement], options: Options, bar: Bar) -> Iterator[tuple[Measurement, Row]]:
    start = starter(Step, options, options.batches)
    for measurement, row in race(group, Measurement("reference", group[0].setting), start, options.budget, bar):
        if row["status"] == "ok":
            row["images_per_s"] = row["batch"] / row["median_s"]
        yield measurement, row


SUITE = Suite(
    name="waterfall",
    help="the gain of every fusion, one after the other",
    description="Images per second of one model in inference, in steps: first every op by PyTorch and all tokens "
    "computed to the end; then one op after the other on oneDNN (on a GPU, in Triton), the class token alone in the "
    "last block, and on a GPU a CUDA graph. Each step has all that stand before it. --contenders takes steps.",
    defaults={
        "cpu": Options(contenders=STEPS["cpu"]),
        "cuda": replace(GPU, batches=(256,), contenders=STEPS["cuda"], budget=20.0),
        "quick": replace(QUICK, contenders=STEPS["cpu"]),
    },
    measurements=_measurements,
    measure=_measure,
    extras=("budget",),
    columns=(
        *setting_columns("model", "size", "dtype"),
        ("step", "contender"),
        ("batch", "batch"),
        ("images/s", "images_per_s"),
        ("spread", "spread"),
        ("x first step", "ratio"),
        ("peak MiB", "peak_bytes"),
    ),
)

"""``python -m benchmarks waterfall``: what every fusion brings, switched on one after the other in one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

import fastvit
from benchmarks import networks
from benchmarks.cells import Cell, Row
from benchmarks.contenders import LIBRARIES, WAYS, Contender, Library
from benchmarks.networks import Network
from benchmarks.race import race
from benchmarks.subjects import starter
from benchmarks.suites import Bar, Options, Suite
from benchmarks.throughput import Throughput
from fastvit.ops.backends import ONEDNN_OPS, OPS

# By device; each has all that stand before it. The first is plain PyTorch with every token computed to the end.
STEPS = {
    "cpu": ("reference", *ONEDNN_OPS, "class-token"),
    "cuda": ("reference", "attention", "linear", "mlp", "layer_norm", "patch_embed", "class-token", "cuda-graph"),
}
BACKEND = {"cpu": "onednn", "cuda": "triton"}


def step_of(op: str) -> str:
    """The step that switches an op on."""
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

    def __init__(self, cell: Cell, device: str, batches: Sequence[int]) -> None:
        self.steps = STEPS[device][: STEPS[device].index(cell.contender) + 1]
        super().__init__(cell, device, batches)
        fused = [op for op in OPS if step_of(op) in self.steps]
        fastvit.backend(BACKEND[device], only=fused)  # for good: the process is this step's alone

    def _find(self, name: str) -> Contender:
        library = Library("fastvit", {"vit": self._model}, backend="reference", trains=False)
        return Contender(name, library, WAYS["graph" if "cuda-graph" in self.steps else ""])

    def _model(self, network: Network) -> nn.Module:
        model = LIBRARIES["fastvit"].builds["vit"](network)
        assert isinstance(model, fastvit.ViT)
        return model if "class-token" in self.steps else EveryToken(model)


def _cells(options: Options) -> list[Cell]:
    steps = STEPS[options.device]
    for peer in options.peers:
        if peer not in steps:
            raise ValueError(f"no step {peer!r} on a {options.device}; accepted: {', '.join(steps)}")
    found = []
    for model in options.models:
        if networks.family(model) != "vit":
            raise ValueError(
                f"{model} has nothing to fuse; accepted: vit_base_patch16_224 and other Vision Transformers"
            )
        for size in options.sizes:
            networks.check_size(model, size)
            for dtype in options.dtypes:
                what = (("model", model), ("size", size), ("mode", "inference"), ("dtype", dtype))
                found += [Cell(step, what) for step in steps if step in options.peers]
    return found


def _measure(group: Sequence[Cell], options: Options, bar: Bar) -> Iterator[tuple[Cell, Row]]:
    start = starter(Step, options, options.batches)
    for cell, row in race(group, Cell("reference", group[0].what), start, options.budget, bar):
        if row["status"] == "ok":
            row["images_per_s"] = row["batch"] / row["median_s"]
        yield cell, row


SUITE = Suite(
    name="waterfall",
    help="what every fusion brings, one after the other",
    description="Images per second of one model in inference, in steps: first every op by PyTorch and all tokens "
    "computed to the end; then one op after the other on oneDNN (on a GPU, in Triton), the class token alone in the "
    "last block, and on a GPU a CUDA graph. Each step has all that stand before it. --peers takes steps.",
    defaults={
        "cpu": Options(peers=STEPS["cpu"]),
        "cuda": Options(
            device="cuda",
            dtypes=("bfloat16",),
            models=("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"),
            batches=(256,),
            peers=STEPS["cuda"],
            budget=20.0,
        ),
        "quick": Options(models=("vit_tiny_patch16_224",), sizes=(64,), batches=(2,), peers=STEPS["cpu"], budget=1.0),
    },
    cells=_cells,
    measure=_measure,
    extras=("budget",),
    columns=(
        ("model", lambda row: networks.title(row["model"])),
        ("px", "size"),
        ("dtype", "dtype"),
        ("step", "contender"),
        ("batch", "batch"),
        ("images/s", "images_per_s"),
        ("spread", "spread"),
        ("x first step", "ratio"),
        ("peak MiB", "peak_bytes"),
    ),
)

"""The subject of a model's measurement: it builds the model in a process, checks it against float64 and calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import contenders, images, measure, networks
from benchmarks.measurements import Measurement, MeasurementFailed, grid
from benchmarks.suite import Options
from benchmarks.workers import Worker
from fastvit.integrations.graphs import capture

CHECKED = 8  # images whose logits, and in training the gradients of whose loss, are checked
DISTINCT = 32  # different images in a batch, which repeats them: more would take long to make and change no timing
Run = Callable[[], object]


class Expected(NamedTuple):
    """The results that a contender must reach, from its baseline's process."""

    exact: list[Tensor]  # float64: logits, and in training the first layer's gradient
    eager: list[Tensor]  # the baseline's own, in the dtype that is compared
    errors: list[float]  # its largest absolute error in each


class ModelSubject:
    """A contender's model on a device.

    Args:
        measurement: has model, size, dtype and mode ("inference" or "training").
        device: "cpu" or "cuda".
    """

    def __init__(self, measurement: Measurement, device: str) -> None:
        self.measurement, self.device = measurement, torch.device(device)
        self.dtype: torch.dtype = getattr(torch, measurement["dtype"])
        self.training: bool = measurement["mode"] == "training"
        self.contender = self._find(measurement.contender)
        self.network = networks.build(measurement["model"], measurement["size"])
        self.model: nn.Module = self.contender.model(self.network, self.dtype, self.device, training=self.training)
        self.photographs = torch.empty(0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True) if self.training else None

    def _find(self, name: str) -> contenders.Contender:
        """Return the contender of a name; a suite with contenders of its own overrides this."""
        return contenders.find(name)

    def _images(self, batch: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return photographs (batch, 3, size, size) in the layout and dtype that the model takes."""
        dtype = dtype or (torch.float32 if self.contender.way.autocast else self.dtype)
        distinct = min(batch, DISTINCT)
        if len(self.photographs) < distinct:
            self.photographs = images.crops(distinct, self.network.size)
        found = self.photographs[:distinct].to(self.device, dtype)
        found = found[torch.arange(batch, device=self.device) % distinct]
        return found if self.network.family == "vit" else found.to(memory_format=torch.channels_last)

    def _labels(self, batch: int) -> Tensor:
        return torch.arange(batch, device=self.device) * 7 % 1000

    def _outputs(self, model: nn.Module, batch: Tensor) -> list[Tensor]:
        """Return logits of the first images, and in training the first layer's gradient, in float64 on the CPU."""

        def forward() -> Tensor:
            with self.contender.context(self.dtype, self.device), torch.set_grad_enabled(self.training):
                logits: Tensor = model(batch)
            return logits

        logits = (capture(forward) if self.contender.way.graph else forward)()[:CHECKED]
        found = [logits]
        if self.training:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(logits.float(), self._labels(len(logits))).backward()
            first = next(p for p in model.parameters() if p.ndim == 4 and p.shape[1] == 3)  # (D, 3, p, q)
            assert first.grad is not None
            found.append(first.grad)
        return [tensor.detach().double().cpu() for tensor in found]

    def expected(self) -> Expected:
        """Compute the network in float64, and how far this contender is from it."""
        exact_model = copy.deepcopy(self.network.source).to(self.device, torch.float64).train(self.training)
        exact = self._outputs(exact_model.requires_grad_(self.training), self._images(CHECKED, torch.float64))
        eager = self._outputs(self.model, self._images(CHECKED))
        return Expected(exact, eager, [_error(a, b) for a, b in zip(eager, exact, strict=True)])

    def check(self, expected: Expected | None, batch: int = CHECKED) -> dict[str, Any]:
        """Check the results: at most twice the baseline's error, as the kernels' tests demand.

        Args:
            expected: from the baseline.
            batch: images in a call. A model that is compiled for one batch is checked on that batch, by its first
                images; but not with batch norms, where all images of a batch matter.

        Raises:
            MeasurementFailed: it computes something else (see :func:`largest_error`).
        """
        row: dict[str, Any] = {"max_abs_logit_error": None, "max_abs_logit_diff": None}
        if expected is None or not self.contender.library.same_function:
            return row
        together = self.training and (batch < CHECKED or self.network.family == "resnet")
        if self.contender.way.compile is None or together:
            batch = CHECKED
        found = self._outputs(self.model, self._images(batch))
        rows = len(found[0])
        row["max_abs_logit_diff"] = _error(found[0], expected.eager[0][:rows])
        exact = [expected.exact[0][:rows], *expected.exact[1:]]
        whats = ("logits", "gradients")[: len(found)]
        for what, tensor, right, eager in zip(whats, found, exact, expected.errors, strict=True):
            error = largest_error(what, tensor, right, eager)
            row["max_abs_logit_error"] = row["max_abs_logit_error"] or error
        return row

    def call(self, batch: int) -> Run:
        """Return a function that runs one step: the logits, or in training forward, loss, backward and AdamW."""
        inputs, labels, optimizer = self._images(batch), self._labels(batch), self.optimizer

        def infer() -> Tensor:
            with torch.no_grad(), self.contender.context(self.dtype, self.device):
                logits: Tensor = self.model(inputs)
            return logits

        def step() -> None:
            assert optimizer is not None
            optimizer.zero_grad(set_to_none=True)
            with self.contender.context(self.dtype, self.device):
                logits = self.model(inputs)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

        if self.contender.way.graph:
            return capture(infer)
        return step if self.training else infer

    def first_calls(self, batch: int) -> int:
        """Return bytes held from the first calls on: weights, optimizer states, and a backend's packed copies."""
        run, packed = self.call(batch), 0
        if self.training or self.contender.way.compile is not None:
            run()  # what it keeps are the optimizer's states, and what a compiler keeps
        else:
            packed = measure.memory(run, self.device)[1]
        states = [] if self.optimizer is None else self.optimizer.state.values()
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return measure.held_bytes(self.model) + packed + sum(tensor.nbytes for tensor in tensors)

    def peak_bytes(self, held: int, run: Run) -> int | None:
        """Return ``held`` and the highest that a step adds; None where a CUDA graph has memory of its own, unseen."""
        if self.device.type == "cuda" and (self.contender.way.graph or self.contender.way.compile == "max-autotune"):
            return None
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)  # so that gradients are the step's
        return held + measure.memory(run, self.device)[0]


def model_measurements(options: Options) -> list[Measurement]:
    """Return every model, size, mode and dtype with every contender that has the model's family.

    Raises:
        ValueError: a model, contender or size that does not exist.
    """
    found = []
    for model in options.models:
        family = networks.family(model)
        names = [name for name in options.contenders if family in contenders.find(name).library.builds]
        for size in options.sizes:
            networks.check_size(model, size)
        for setting in grid(model=[model], size=options.sizes, mode=options.modes, dtype=options.dtypes):
            found += [Measurement(name, setting) for name in names]
    return found


def measurements_by_batch(options: Options) -> list[Measurement]:
    """Return :func:`model_measurements` for every batch."""
    found = model_measurements(options)
    return [Measurement(one.contender, (*one.setting, ("batch", batch))) for batch in options.batches for one in found]


def starter(subject: Callable[..., object], options: Options, *arguments: Any) -> Callable[[Measurement], Worker]:
    """Return a function that starts the process of a measurement's subject."""
    return lambda measurement: Worker(subject, measurement, options.device, *arguments)


def baseline(measurement: Measurement) -> Measurement:
    """Return the measurement that ``measurement`` is checked against and compared with."""
    return Measurement(contenders.baseline(networks.family(measurement["model"])), measurement.setting)


def largest_error(what: str, found: Tensor, exact: Tensor, eager: float) -> float:
    """Return the largest absolute error, which may be twice the baseline's, ``eager``.

    Raises:
        MeasurementFailed: it is larger, or not a number.
    """
    error, tiny = _error(found, exact), 1e-6 * exact.abs().max().item()
    if not error <= 2 * eager + tiny:
        raise MeasurementFailed(
            f"wrong {what}: the largest error is {error:.2g}, the baseline's {eager:.2g} (accepted: twice that)"
        )
    return error


def _error(found: Tensor, exact: Tensor) -> float:
    """Return the largest absolute difference; NaN where there is one, which no limit accepts."""
    return (found - exact).abs().max().item()

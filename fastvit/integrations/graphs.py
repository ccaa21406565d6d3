"""CUDA graphs of a model's inference: small batches without the host's launches between the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_WARM_UP = 3  # calls before the capture: what is made once (tables, workspaces, compiled kernels) is made in them


def capture(run: Callable[[], T], pool: Any = None) -> Callable[[], T]:
    """``run`` captured in a CUDA graph, to be replayed; its result is the same memory every time.

    ``pool``: of ``torch.cuda.graph_pool_handle()``, where several graphs share memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def graphed(
    model: nn.Module, shapes: Sequence[Sequence[int]], *, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """Capture inference of ``model`` once for each shape of images.

    The graphs share one pool of memory. They read the model's own weights: a change in place is seen, but a model that
    is moved, cast or given other tensors has to be graphed again. The setting of ``fastvit.backend`` is the one here.

    Args:
        model: in evaluation mode, on a CUDA device; images to one tensor.
        shapes: of the images, (B, C, H, W) each.
        dtype: of the images (default: of the model's first parameter).

    Returns:
        A function of images of one of these shapes that replays its graph; the result is the caller's own.

    Raises:
        ValueError: a model in training or not on a CUDA device, no shapes; when called, other images than captured.
    """
    weight = next(model.parameters())
    dtype = dtype or weight.dtype
    if not shapes:
        raise ValueError("no shapes to capture; accepted: (B, C, H, W), one or more")
    if model.training:
        raise ValueError("the model is in training; accepted: evaluation, model.eval()")
    if weight.device.type != "cuda":
        raise ValueError(f"the model is on {weight.device}; accepted: a CUDA device")
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[tuple[int, ...], tuple[Tensor, Callable[[], Tensor]]] = {}
    with torch.cuda.device(weight.device), torch.no_grad():
        for shape in map(tuple, shapes):
            images = torch.zeros(shape, dtype=dtype, device=weight.device)
            graphs[shape] = images, capture(lambda images=images: model(images), pool)  # type: ignore[misc]

    def run(images: Tensor) -> Tensor:
        found = graphs.get(tuple(images.shape))
        if found is None or images.dtype != dtype:
            raise ValueError(f"images {tuple(images.shape)} in {images.dtype}; captured: {list(graphs)} in {dtype}")
        own, replay = found
        with torch.cuda.device(own.device), torch.no_grad():
            own.copy_(images)
            return replay().clone()

    return run

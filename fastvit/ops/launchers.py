"""The launchers of a kernel backend: what ``fastvit.triton.launchers`` and ``fastvit.cuda.launchers`` both have.

A launcher allocates its outputs and launches kernels; ``kernels/triton/`` documents each. A backend may take more
keywords (``tile``), never fewer: mypy checks the CUDA module, ``tests/test_launchers.py`` both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastvit.attention_options import AttentionOptions
from fastvit.packing import Layout


class Launchers(Protocol):
    """The functions of a launcher module."""

    def patch_embed_forward(
        self,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        layout: Layout | None = None,
        pos_embed: Tensor | None = None,
        prefix_tokens: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor: ...

    def patch_embed_weight_gradient(
        self,
        dout: Tensor,
        images: Tensor,
        weight_shape: Sequence[int],
        *,
        layout: Layout | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor: ...

    def patch_embed_image_gradient(
        self,
        dout: Tensor,
        weight: Tensor,
        image_shape: Sequence[int],
        *,
        std: Tensor | None = None,
        prefix: int,
        dtype: torch.dtype,
    ) -> Tensor: ...

    def patch_embed_row_gradients(self, dout: Tensor) -> Tensor: ...

    def layer_norm_forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        row_scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]: ...

    def layer_norm_backward(
        self,
        dy: Tensor,
        dstream: Tensor | None,
        normalised: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        *,
        branch: Tensor | None = None,
        gamma: Tensor | None = None,
        row_scale: Tensor | None = None,
        need_params: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...

    def linear_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        row_scale: Tensor | None = None,
        save_preact: bool = False,
    ) -> tuple[Tensor, Tensor | None]: ...

    def linear_input_gradient(
        self,
        dout: Tensor,
        weight: Tensor,
        *,
        gamma: Tensor | None = None,
        row_scale: Tensor | None = None,
        preact: Tensor | None = None,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...

    def linear_weight_gradient(
        self,
        dout: Tensor,
        x: Tensor,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        gamma: Tensor | None = None,
        row_scale: Tensor | None = None,
        need_bias: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...

    def scale_rows(self, x: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None) -> Tensor: ...

    def activation_gradient(self, dout: Tensor, preact: Tensor, activation: str) -> tuple[Tensor, Tensor]: ...

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, options: AttentionOptions = ...
    ) -> tuple[Tensor, Tensor]: ...

    def attention_backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        options: AttentionOptions = ...,
        dlearned: Tensor | None = None,
    ) -> None: ...

    def attention_rows(
        self, q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, scale: float, *, bias: Tensor | None = None
    ) -> Tensor: ...

    def attention_distance(
        self, q: Tensor, k: Tensor, lse: Tensor, scale: float, grid: Sequence[int], patch_size: Sequence[float]
    ) -> Tensor: ...

    def apply_rotary(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False
    ) -> tuple[Tensor, Tensor]: ...

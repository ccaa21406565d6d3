"""Attention on the CUDA kernels (``csrc/attention*.cu``), float16 and bfloat16."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvit.attention_options import NO_OPTIONS, TENSORS, AttentionOptions
from fastvit.cuda import extension
from fastvit.cuda.extension import aligned


def _arguments(options: AttentionOptions, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the options as csrc/include/ops.h lists them, tensors first, for a q of ``dtype``."""
    values = options._asdict()
    for name in ("bias", "rel_pos_table"):
        t = values[name]
        values[name] = t.float() if t is not None and t.dtype == torch.float64 else t
    keys = options.rel_pos_keys
    if keys is not None:
        shared = keys.stride(0) == 0
        values["rel_pos_keys"] = aligned((keys[:1] if shared else keys).to(dtype).contiguous()).expand_as(keys)
    if options.key_mask is not None:
        values["key_mask"] = options.key_mask.view(torch.uint8)
    if options.seed is not None:
        values["seed"] = options.seed.reshape(1)
    tensors = [values.pop(name) for name in TENSORS]
    return *tensors, *(values.pop("window") or (0, 0)), *values.values()


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    options: AttentionOptions = NO_OPTIONS,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as :func:`fastvit.triton.attention.attention_forward`; d is a multiple of 8 from 32 to 128."""
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    values = _arguments(options, q.dtype)
    extension.library.attention_forward(q, *values, aligned(q), aligned(k), aligned(v), float(scale), out, lse)
    return out, lse


def attention_backward(
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
    options: AttentionOptions = NO_OPTIONS,
    dlearned: Tensor | None = None,
) -> None:
    """Write dq, dk, dv and, if present, dlearned: :func:`fastvit.triton.attention_backward.attention_backward`."""
    if 0 in (q.shape[0], q.shape[1], k.shape[1]):
        for gradient in (dq, dk, dv, dlearned):
            if gradient is not None:
                gradient.zero_()
        return
    dout, q, k, v, out = map(aligned, (dout, q, k, v, out))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    dlse = None if dlse is None else dlse.contiguous()
    values, scale = _arguments(options, q.dtype), float(scale)
    extension.library.attention_query_gradient(q, *values, dout, dlse, q, k, v, out, lse, scale, dq, delta)
    extension.library.attention_key_value_gradient(q, *values, dout, q, k, v, lse, delta, scale, dk, dv)
    if dlearned is not None:
        kernel = "attention_bias_gradient"
        if options.rel_pos_table is not None:
            kernel = "attention_table_gradient"
        elif options.rel_pos_keys is not None:
            kernel, dlearned = "attention_rel_pos_keys_gradient", dlearned.view(-1, *dlearned.shape[-2:])
        getattr(extension.library, kernel)(q, *values, dout, q, k, v, lse, delta, scale, dlearned)

"""Whether PyTorch is tracing or transforming the call of an op."""

from __future__ import annotations

import torch


def exporting() -> bool:
    """Return whether torch.export is tracing. (Dynamo makes torch.compiler.is_exporting() True under torch.compile.)"""
    return torch.compiler._is_exporting_flag


def transformed() -> bool:
    """Return whether a torch.func transform (grad, vmap, jvp...) is active."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None

"""Every place that names attention's options, held to their one definition (fastvit/attention_options.py)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastvit import ops, reference
from fastvit.attention_options import LEARNED, NO_OPTIONS, TENSORS, AttentionOptions
from fastvit.ops import checks

# Public functions take starts and lengths of packed sequences in pairs.
PUBLIC = {name: {"cu": "cu_seqlens", "max": "max_seqlen"}.get(name.split("_")[0], name) for name in NO_OPTIONS._fields}
CU, TABLE, SEED = torch.tensor([0, 4], dtype=torch.int32), torch.zeros(9, 2), torch.tensor([7])
EXAMPLES: dict[str, dict[str, Any]] = {  # an option, and the others that it needs
    "bias": {"bias": torch.zeros(1, 2, 4, 4)},
    "rel_pos_table": {"rel_pos_table": TABLE, "window": [2, 2]},
    "window": {"rel_pos_table": TABLE, "window": [2, 2]},
    "rel_pos_keys": {"rel_pos_keys": torch.zeros(2, 7, 8)},
    "key_mask": {"key_mask": torch.ones(1, 4, dtype=torch.bool)},
    **{name: {"cu_q": CU, "cu_k": CU, "max_q": 4, "max_k": 4} for name in ("cu_q", "cu_k", "max_q", "max_k")},
    "dropout_p": {"dropout_p": 0.5, "seed": SEED},
    "seed": {"dropout_p": 0.5, "seed": SEED},
}


@pytest.mark.parametrize(
    "function",
    [ops.attention, ops.attention_qkvpacked, checks.attention, reference.attention],
    ids=lambda function: f"{function.__module__}.{function.__name__}",
)
def test_public_functions_take_every_option(function: Callable[..., Any]) -> None:
    assert set(PUBLIC.values()) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("op", ["attention", "attention_qkvpacked"])
def test_schemas_end_with_every_option(op: str) -> None:
    arguments = [argument.name for argument in getattr(torch.ops.fastvit, op).default._schema.arguments]
    assert arguments[-len(NO_OPTIONS) :] == list(NO_OPTIONS._fields)
    arguments = [argument.name for argument in getattr(torch.ops.fastvit, f"{op}_backward").default._schema.arguments]
    assert arguments[-len(NO_OPTIONS) - 1 : -1] == list(NO_OPTIONS._fields)


@pytest.mark.parametrize("name", NO_OPTIONS._fields)
def test_triton_reads_every_option(name: str) -> None:
    from fastvit.triton.attention_scores import NONE, option_pointers

    given = AttentionOptions(**EXAMPLES[name])
    assert getattr(given, name) is not None
    assert option_pointers(given) != NONE


def test_autograd_saves_every_tensor_and_finds_the_learned_one() -> None:
    """The names that derive from the types and the properties of the fields."""
    given = {name: value for example in EXAMPLES.values() for name, value in example.items()}
    assert {name for name, value in given.items() if isinstance(value, torch.Tensor)} == set(TENSORS)
    for name in LEARNED:
        assert AttentionOptions(**EXAMPLES[name]).learned is EXAMPLES[name][name]

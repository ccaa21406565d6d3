"""The launcher modules of Triton and CUDA, held to :class:`fastvit.ops.launchers.Launchers`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, get_type_hints

import pytest

from fastvit.ops.launchers import Launchers

NAMES = [name for name, member in vars(Launchers).items() if inspect.isfunction(member) and not name.startswith("_")]


def mismatch(launcher: Any, name: str) -> str | None:
    """Return what keeps a launcher from standing for the protocol's function of that name, or None."""
    expected = inspect.signature(getattr(Launchers, name))
    parameters = dict(inspect.signature(launcher).parameters)
    hints, expected_hints = get_type_hints(launcher), get_type_hints(getattr(Launchers, name))
    for parameter in list(expected.parameters.values())[1:]:
        own = parameters.pop(parameter.name, None)
        optional = parameter.default is not inspect.Parameter.empty
        if own is None or own.kind != parameter.kind:
            return f"{parameter.name} is missing or of another kind"
        if optional != (own.default is not inspect.Parameter.empty):
            return f"{parameter.name} is optional in one of them"
    if any(own.default is inspect.Parameter.empty for own in parameters.values()):
        return f"needs {', '.join(parameters)} besides"
    differing = [at for at, hint in expected_hints.items() if hints.get(at) != hint]
    return f"the types of {', '.join(differing)} differ" if differing else None


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_launchers_have_the_protocol_s_signatures(backend: str, name: str) -> None:
    launcher = getattr(importlib.import_module(f"fastvit.{backend}.launchers"), name)
    assert mismatch(launcher, name) is None


def test_another_signature_is_seen() -> None:
    def apply_rotary(q: int, k: int, cos: int, sin: int) -> None: ...

    assert mismatch(apply_rotary, "apply_rotary") == "inverse is missing or of another kind"
    assert mismatch(lambda dout, more: None, "patch_embed_row_gradients") == "needs more besides"
    assert mismatch(lambda dout: None, "patch_embed_row_gradients") == "the types of dout, return differ"

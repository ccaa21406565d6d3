"""Hooks of mkdocs.yml: insert the ``--help`` texts of the commands, and show Sphinx's roles as plain code."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Any

from griffe import Alias, Extension, Object

ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):`~?([^`]+)`")
HELP = re.compile(r"<!-- help: (fastvit|python -m benchmarks) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help of every subcommand where a page has ``<!-- help: COMMAND -->``."""
    return HELP.sub(lambda match: helps(match[1]), markdown)


def helps(program: str) -> str:
    """Return one section for each subcommand of a program, with the text that ``--help`` prints."""
    os.environ["COLUMNS"] = "100"
    parser = _parsers()[program]()
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return "\n".join(
        f"### `{program} {name}`\n\n```text\n{command.format_help()}```\n"
        for name, command in subparsers.choices.items()
    )


def _parsers() -> dict[str, Callable[[], argparse.ArgumentParser]]:
    from benchmarks import __main__ as benchmarks
    from fastvit import cli

    return {"fastvit": cli.parser, "python -m benchmarks": benchmarks.parser}


class Roles(Extension):
    """Replace Sphinx's roles in docstrings, :func:`x`, with code, `x`."""

    def on_package(self, *, pkg: Object, **_: Any) -> None:
        pending: list[Object | Alias] = [pkg]
        while pending:
            found = pending.pop()
            if found.is_alias:
                continue
            if found.docstring is not None:
                found.docstring.value = ROLE.sub(r"`\1`", found.docstring.value)
            pending += found.members.values()

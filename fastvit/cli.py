"""The ``fastvit`` command (``python -m fastvit`` is the same)."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Sequence


def _env(arguments: argparse.Namespace) -> int:
    from fastvit import env

    found = env.report()
    print(json.dumps(found, indent=2) if arguments.json else env.render(found))
    return 0


def _models(arguments: argparse.Namespace) -> int:
    import fastvit

    names = fastvit.list_models(arguments.filter)
    if not names:
        print(f"no model name contains {arguments.filter!r}; `fastvit models` lists all")
        return 1
    print("\n".join(names))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line, so that ``--help`` suffices."""
    top = argparse.ArgumentParser(
        prog="fastvit",
        description="Vision Transformers on hand-written kernels. Use from Python: from fastvit import ViT.",
        epilog="`make bench` and `python -m benchmarks --help`, in a clone, compare it with other libraries.",
    )
    top.add_argument("--version", action="version", version=f"fastvit {importlib.metadata.version('fastvit')}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    env = commands.add_parser(
        "env",
        help="device, versions, and which backend can run each op here",
        description="Print the device, the versions, and for every op which backends are available and why not the "
        "others. Put this into a bug report.",
    )
    env.add_argument("--json", action="store_true", help="as JSON; a backend's value is null, or why it can't run")
    env.set_defaults(run=_env)

    models = commands.add_parser(
        "models",
        help="names that fastvit.create_model takes",
        description="List the names that fastvit.create_model takes. It also takes the papers' names, ViT-B/16 or "
        "ViT-L/14-384, and any image size.",
    )
    models.add_argument("filter", nargs="?", default="", help="only names that match, for example base")
    models.set_defaults(run=_models)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit status."""
    top = parser()
    arguments = top.parse_args(argv)
    if not hasattr(arguments, "run"):
        top.print_help()
        return 0
    status: int = arguments.run(arguments)
    return status

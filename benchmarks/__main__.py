"""``python -m benchmarks``: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.measurements import RESULTS, identity, slug
from benchmarks.report import tables
from benchmarks.suite import Options, Suite, run
from benchmarks.suites import SUITES, static
from fastvit import env


def options(arguments: argparse.Namespace, device: str) -> Options:
    """Return the suite's defaults for a device, with the options of the command line in their place."""
    defaults = arguments.suite.defaults["quick" if arguments.quick else device]
    names = [field.name for field in fields(Options) if field.name != "device"]
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    return replace(defaults, device=device, **given)


def _suite(arguments: argparse.Namespace) -> int:
    suite: Suite = arguments.suite
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: PyTorch sees no CUDA device", file=sys.stderr)
        return 2
    folder = RESULTS / slug(identity(env.device(device))) if arguments.keep else Path(arguments.out)
    try:
        rows = run(suite, options(arguments, device), folder, arguments.command, arguments.retry)
    except ValueError as error:
        print(f"python -m benchmarks {suite.name}: {error}", file=sys.stderr)
        return 2
    print("\n" + tables.terminal(tables.of_rows(rows, suite.columns)))
    if any(field == "spread" for _, field in suite.columns):
        print("\nspread: half the distance from the 20th to the 80th percentile")
    pictures = report.draw(folder / f"{suite.name}.json")
    print("saved " + ", ".join(map(str, [folder / f"{suite.name}.json", folder / f"{suite.name}.csv", *pictures])))
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def _static(arguments: argparse.Namespace) -> int:
    try:
        found = static.collect(arguments.quick)
    except RuntimeError as error:
        print(f"python -m benchmarks static: {error}", file=sys.stderr)
        return 2
    out = Path(arguments.out)
    written = [*static.write(found, out), out / "static.png", *([static.BASELINE] if arguments.accept else [])]
    print(report.static(found, out / "static.png"))
    if arguments.accept:
        shutil.copyfile(out / "static.json", static.BASELINE)
    print("wrote " + ", ".join(map(str, written)))
    return static.gate(found, complete=not arguments.quick)


def _report(arguments: argparse.Namespace) -> int:
    try:
        if arguments.check:
            current = report.is_current(arguments.results, report.STATIC, report.README)
            if not current:
                print("README.md is behind its results: run `python -m benchmarks report`", file=sys.stderr)
            return 0 if current else 1
        readme = None if arguments.no_readme else report.README
        written = report.write(arguments.results, report.STATIC, arguments.out, readme)
    except ValueError as error:
        print(f"python -m benchmarks report: {error}", file=sys.stderr)
        return 2
    print("wrote " + "\n      ".join(str(path) for path in written))
    return 0


def _add_suite(commands: Any, suite: Suite) -> None:
    command = commands.add_parser(
        suite.name,
        help=suite.help,
        description=f"{suite.description} Measurements that are finished in the output folder are not taken "
        "again. Exit status 1: a contender failed (its row says why); one that can't be had here is no failure.",
    )
    cpu, gpu = suite.defaults["cpu"], suite.defaults["cuda"]

    def add(name: str, option: str, **keywords: Any) -> None:
        if getattr(cpu, name) == getattr(gpu, name):
            default = f"default: {_shown(getattr(cpu, name))}"
        else:
            default = f"default: {_shown(getattr(cpu, name))}; on a GPU {_shown(getattr(gpu, name))}"
        keywords["help"] = f"{keywords['help']} ({default})"
        command.add_argument(option, dest=name, **keywords)

    command.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("dtypes", "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], help="of weights and images")
    add("models", "--models", nargs="+", metavar="NAME", help="networks")
    add("sizes", "--sizes", nargs="+", type=_count, metavar="PIXELS", help="image sizes")
    add("batches", "--batch", nargs="+", type=_count, metavar="N", help="batch sizes")
    add("contenders", "--contenders", nargs="+", metavar="NAME", help="contenders")
    if "modes" in suite.extras:
        add("modes", "--modes", nargs="+", choices=["inference", "training"], help="what to do")
    if "budget" in suite.extras:
        add("budget", "--budget", type=_positive, metavar="S", help="seconds of timing for each group that is compared")
    if "limit" in suite.extras:
        add("limit", "--limit", type=_positive, metavar="GIB", help="memory that may be used")
    command.add_argument("--quick", action="store_true", help="a small network, seconds: does it run?")
    command.add_argument("--retry", action="store_true", help="run measurements again that have no result")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--out", default="bench-out", metavar="DIR", help="where to write (default: %(default)s)")
    where.add_argument("--keep", action="store_true", help="write to benchmarks/results/<device>, to be committed")
    command.set_defaults(run=_suite, suite=suite)


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return "all of the device's" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Benchmarks of fastvit beside the libraries that people use."
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for suite in SUITES:
        _add_suite(commands, suite)

    derived = commands.add_parser("static", help=static.HELP, description=static.DESCRIPTION)
    either = derived.add_mutually_exclusive_group()  # a quick run would drop most of the baseline
    either.add_argument("--quick", action="store_true", help="ViT-B/16 alone, and only sm_90")
    either.add_argument("--accept", action="store_true", help="keep static.json as the baseline")
    derived.add_argument("--out", default="bench-out", metavar="DIR", help="where to write (default: %(default)s)")
    derived.set_defaults(run=_static)

    shown = commands.add_parser(
        "report",
        help="README.md's tables, plots and a page, from results",
        description="Make README.md's tables (between their marks), the plots and one self-contained page from result "
        "files: DIR/<device>/<suite>.json, or DIR/<suite>.json for one device. Nothing is measured.",
    )
    shown.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    shown.add_argument("--out", type=Path, default=report.OUT, metavar="DIR", help="default: bench-out/report")
    readme = shown.add_mutually_exclusive_group()
    readme.add_argument("--no-readme", action="store_true", help="leave README.md alone")
    readme.add_argument("--check", action="store_true", help="write nothing; exit status 1 where README.md is behind")
    shown.set_defaults(run=_report)
    return top


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    arguments.command = shlex.join(["python", "-m", "benchmarks", *argv])
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        return 130
    except OSError as error:  # a folder that can't be written, say
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())

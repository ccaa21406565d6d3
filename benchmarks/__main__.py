"""``python -m benchmarks``: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

import fastvit
from benchmarks import report, tables, throughput
from fastvit import env


def _throughput(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: PyTorch sees no CUDA device", file=sys.stderr)
        return 2
    if arguments.keep and device.type == "cpu":
        print("--keep is for GPUs: benchmarks/results holds what README's GPU tables show; use --out", file=sys.stderr)
        return 2
    settings = throughput.QUICK if arguments.quick else throughput.FULL[device.type]
    given: dict[str, Any] = {key: getattr(arguments, key) for key in ("model", "batch", "budget", "dtypes")}
    settings = replace(settings, device=device, **{key: value for key, value in given.items() if value is not None})

    found = env.device(device.type)
    slug = re.sub(r"[^a-z0-9]+", "-", found["name"].lower()).strip("-")
    folder = tables.RESULTS / slug if arguments.keep else Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of measuring, not after
    print(f"{settings.model}, batch {settings.batch}, on {found['name']}; batches are cut from real photographs")
    rows = throughput.as_json(throughput.measure(settings))
    result = report.document(arguments.command, settings.model, device.type, rows)
    print("\n" + report.table(rows) + "\n")
    print("spread: half the distance from the 20th to the 80th percentile; logit diff: to timm, same weights and dtype")
    print("saved " + " and ".join(str(path) for path in report.save(result, folder)))
    return 1 if any(row["error"] for row in rows) else 0


def _tables(arguments: argparse.Namespace) -> int:
    if arguments.check:
        text = tables.README.read_text()
        if tables.updated(text) != text:
            print("README.md's tables differ from benchmarks/results: run `python -m benchmarks tables`")
            return 1
        return 0
    print(f"wrote {tables.write()}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line, so that ``--help`` suffices."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Benchmarks of fastvit beside the libraries that people use."
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    cpu, gpu = throughput.FULL["cpu"], throughput.FULL["cuda"]
    run = commands.add_parser(
        "throughput",
        help="inference: images/s, peak memory and logits",
        description="Inference throughput of fastvit (every backend that can run here) beside timm, torchvision and "
        "Hugging Face with the same weights, and a channels-last ResNet-50. Contenders take turns, so that drift hits "
        "all alike. Writes throughput.json and throughput.png. Exit status 1: a contender failed (its row says why).",
    )
    run.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    run.add_argument(
        "--model", type=_shared, metavar="NAME", help="a ViT of timm and fastvit (default: vit_base_patch16_224)"
    )
    run.add_argument(
        "--batch", type=_count, metavar="N", help=f"images per batch (default: {cpu.batch}; on a GPU {gpu.batch})"
    )
    run.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], help="default: float32 bfloat16"
    )
    run.add_argument(
        "--budget", type=_duration, metavar="S", help=f"seconds of rounds per dtype (default: {cpu.budget:.0f})"
    )
    run.add_argument("--quick", action="store_true", help="ViT-Ti/16, batch 2, two seconds per dtype: does it run?")
    where = run.add_mutually_exclusive_group()
    where.add_argument("--out", default="bench-out", metavar="FOLDER", help="where to write (default: %(default)s)")
    where.add_argument("--keep", action="store_true", help="write to benchmarks/results/<device>, to be committed")
    run.set_defaults(run=_throughput)

    write = commands.add_parser(
        "tables",
        help="write README.md's GPU tables from benchmarks/results",
        description="Write README.md's GPU tables from benchmarks/results/*/*.json.",
    )
    write.add_argument("--check", action="store_true", help="change nothing; exit status 1 where they differ")
    write.set_defaults(run=_tables)
    return top


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _shared(text: str) -> str:
    if text not in fastvit.list_models() or not timm.is_model(text):
        known = ", ".join(name for name in fastvit.list_models() if timm.is_model(name))
        raise argparse.ArgumentTypeError(f"{text!r} is no model of both timm and fastvit; these are: {known}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    arguments.command = shlex.join(["python", "-m", "benchmarks", *argv])
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""``make gpu`` and ``make tune``: the stages that need a GPU, in order of value.

A stage is a command with a time limit. It is finished once that command succeeded with this code: it does not run again
then, and a benchmark that was cut off goes on where it was. The stages use the installed Python with PyTorch and
Triton, and no network. Any Python prints the list: this file imports the rest only to run it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 470  # seconds: under 8 minutes


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: of the stage.
        command: arguments of Python.
        about: what it runs on, and what for.
        rehearsal: the same on a CPU at toy size; {out} is a folder.
        limit: seconds.
        always: run it even if it has succeeded before: the machine or the results may be others now.
    """

    name: str
    command: str
    about: str
    rehearsal: str
    limit: int = LIMIT
    always: bool = False


def _suite(name: str, suite: str, options: str, about: str, limit: int = LIMIT) -> Stage:
    """Return a stage that runs a suite of ``python -m benchmarks``; at toy size they are one command a suite."""
    command = f"-m benchmarks {suite} --device cuda --keep {options}".rstrip()
    return Stage(name, command, about, f"-m benchmarks {suite} --device cpu --quick --out {{out}}/{suite}", limit)


def _kernels(name: str, model: str, batch: int) -> Stage:
    options = f"--models {model} --batch {batch}"
    about = f"each op by every library that has it, cold L2, at the shapes of ViT-{name}, batch {batch}"
    return _suite(f"kernels-{name}", "kernels", options, about)


EAGER = (
    "timm fastvit fastvit-cuda floor timm-autocast fastvit-autocast fastvit-reference torchvision huggingface "
    "timm-xformers"
)
COMPILED = "timm timm-compile timm-compile-max fastvit-compile"


def _at_224(name: str, model: str, mode: str) -> list[Stage]:
    """Return two stages, since an interrupted race is lost and compilers take minutes."""
    options = f"--models {model} --sizes 224 --modes {mode}"
    about = f"{mode} of ViT-{name} at 224 px, best batch of 32 to 1024"
    stage = "throughput" if mode == "inference" else "training"
    kinds = (("", EAGER, 60, "eager"), ("-compiled", COMPILED, 30, "compiled"))
    return [
        _suite(
            f"{stage}-{name}{end}",
            "throughput",
            f"{options} --contenders {names} --budget {budget}",
            f"{about}, {kind} contenders",
        )
        for end, names, budget, kind in kinds
    ]


def _accuracy(name: str, model: str) -> Stage:
    about = f"ViT-{name} against float64, every backend and dtype"
    return _suite(f"accuracy-{name}", "accuracy", f"--models {model}", about)


def _memory(part: str, models: str) -> Stage:
    about = "peak bytes at batch 64, and the largest batch by bisection"
    return _suite(f"memory-{part}", "memory", f"--models {models} --sizes 224", about)


def _figure_11(part: str, models: str, contenders: str) -> Stage:
    options = f"--models {models} --modes inference --contenders {contenders} --budget 3"
    return _suite(f"figure-11-{part}", "throughput", options, "images/s at 64, 128, 224, 384 and 512 px")


def _tune(name: str, model: str, batch: int) -> Stage:
    options = f"--models {model} --batch {batch} --training"
    return Stage(
        f"tune-{name}-{batch}",
        f"-m fastvit tune {options} --budget 420 --out kernels/triton/tables/measured",
        f"the tiles of a training step of ViT-{name} at batch {batch}",
        f"-m fastvit tune {options} --dry-run --arch 90",
    )


_LIBRARY = "--backend cuda --models vit_base_patch16_224 vit_large_patch16_224 vit_huge_patch14_224 --batch 256 32 1"

INSTALL = Stage(
    "install",
    "-m pip install --no-index --no-deps --no-build-isolation --quiet -e .",
    "this checkout, editable, into this Python, with the CUDA extension for its GPU",
    "-m pip install --no-index --no-deps --no-build-isolation --quiet -e .",
    always=True,
)
TUNING = (
    INSTALL,
    _tune("B", "vit_base_patch16_224", 256),
    _tune("L", "vit_large_patch16_224", 256),
    _tune("H", "vit_huge_patch14_224", 128),
    _tune("B", "vit_base_patch16_224", 32),
    _tune("B", "vit_base_patch16_224", 1),
    Stage(
        "tune-cuda",
        f"-m fastvit tune {_LIBRARY} --budget 420 --out kernels/triton/tables/measured",
        "kernels or cuBLASLt for the products of backend cuda, and norms folded in or not",
        f"-m fastvit tune {_LIBRARY} --dry-run --arch 90",
    ),
)
STAGES = (
    INSTALL,
    Stage(
        "tests",
        # compiling the kernels is most of it
        "-m pytest -q -n 8 -m gpu tests --ignore tests/interpreted --ignore tests/emulated",
        "every op and model at real sizes on the GPU",
        "-m pytest -q -n 2 -m gpu tests --ignore tests/interpreted --ignore tests/emulated",
    ),
    _kernels("B", "vit_base_patch16_224", 256),
    *_at_224("B", "vit_base_patch16_224", "inference"),
    *_at_224("L", "vit_large_patch16_224", "inference"),
    *_at_224("H", "vit_huge_patch14_224", "inference"),
    *_at_224("B", "vit_base_patch16_224", "training"),
    *_at_224("L", "vit_large_patch16_224", "training"),
    _kernels("L", "vit_large_patch16_224", 256),
    _kernels("H", "vit_huge_patch14_224", 128),
    _suite("latency", "latency", "", "batch 1, 8 and 32, eager and as a CUDA graph"),
    _memory("B", "vit_base_patch16_224"),
    _memory("L", "vit_large_patch16_224"),
    _memory("resnets", "resnet50 resnetv2_50x1_bit resnetv2_152x2_bit"),
    _suite("waterfall", "waterfall", "", "ViT-B, L and H, one fusion after another"),
    _accuracy("B", "vit_base_patch16_224"),
    _accuracy("L", "vit_large_patch16_224"),
    _accuracy("H", "vit_huge_patch14_224"),
    _figure_11("B16", "vit_base_patch16_224", "timm fastvit timm-compile"),
    _figure_11("resnets", "resnet50 resnet152", "torchvision torchvision-compile"),
    _figure_11("bits", "resnetv2_50x1_bit resnetv2_101x1_bit", "timm timm-compile"),
    _figure_11("L16", "vit_large_patch16_224", "timm fastvit timm-compile"),
    _figure_11("wide-bits", "resnetv2_50x2_bit resnetv2_152x2_bit resnetv2_200x3_bit", "timm timm-compile"),
    _figure_11("H14", "vit_huge_patch14_224", "timm fastvit timm-compile"),
    _figure_11("patches-32", "vit_base_patch32_224 vit_large_patch32_224", "timm fastvit timm-compile"),
    _memory("H", "vit_huge_patch14_224"),
    Stage(
        "report",
        "-m benchmarks report",
        "README.md's tables, the plots and the page, from every result so far",
        "-m benchmarks report --results {out} --out {out}/report --no-readme",
        120,
        always=True,
    ),
)


def listing(stages: Sequence[Stage]) -> str:
    """Format the stages with their limits, commands and inputs."""
    lines = []
    for number, stage in enumerate(stages, 1):
        lines += [f"{number:2}. {stage.name} (at most {stage.limit} s): {stage.about}", f"    python {stage.command}"]
    return "\n".join([*lines, f"in all at most {sum(stage.limit for stage in stages) / 60:.0f} minutes"])


def run(command: Sequence[str], limit: float, log: Path) -> tuple[int, float]:
    """Run a command in the checkout and return (exit status, seconds); its output goes to ``log`` and the terminal.

    A command past its limit is ended with all its processes and has status 124.
    """
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        alarm = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGTERM))
        alarm.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                file.write(line)
            status = process.wait()
        finally:
            alarm.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
    seconds = time.monotonic() - begun
    return 124 if seconds >= limit else status, seconds


class Record:
    """``stages.json``: the status of each stage, with the code and versions that it ran.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = folder / "stages.json", identity
        try:
            self.stages: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete it, and stages run again") from error

    def finished(self, stage: Stage) -> bool:
        """Return whether the stage succeeded with this code and these versions."""
        found = self.stages.get(stage.name)
        return found is not None and found["status"] == 0 and self.identity.items() <= found.items()

    def add(self, stage: Stage, status: int, seconds: float) -> None:
        """Write a stage's status to the file."""
        self.stages[stage.name] = {"status": status, "seconds": round(seconds, 1), **self.identity}
        temporary = self.path.with_suffix(".json.part")
        temporary.write_text(json.dumps(self.stages, indent=1) + "\n")
        os.replace(temporary, self.path)


def _folder(rehearse: str | None) -> Path:
    """Return the folder of stages.json, beside the GPU's results; exit with a message where there is no GPU."""
    if rehearse:
        return Path(rehearse)
    try:
        import torch
    except ImportError:
        sys.exit(f"make gpu: {sys.executable} has no PyTorch; choose another Python: make PYTHON=... gpu")
    if not torch.cuda.is_available():
        sys.exit(
            "make gpu: PyTorch sees no CUDA device (torch.cuda.is_available() is False). `make gpu DRY=1` lists the "
            "stages, and `make rehearse` runs them on a CPU at toy size"
        )
    from benchmarks.measurements import RESULTS, slug

    return RESULTS / slug(torch.cuda.get_device_name())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's); 0 where every stage succeeded."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="list the stages and run none; needs no GPU")
    parser.add_argument(
        "--tune", action="store_true", help="the stages that measure tiles, instead of those of make gpu"
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only stages of these names")
    parser.add_argument("--rehearse", metavar="DIR", help="every stage on the CPU at toy size, results into DIR")
    arguments = parser.parse_args(argv)
    all_stages = TUNING if arguments.tune else STAGES
    unknown = set(arguments.only or ()) - {stage.name for stage in all_stages}
    if unknown:
        parser.error(
            f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage.name for stage in all_stages)}"
        )
    stages = [stage for stage in all_stages if not arguments.only or stage.name in arguments.only]
    if arguments.dry_run:
        print(listing(stages))
        return 0
    sys.path.insert(0, str(ROOT))
    folder = _folder(arguments.rehearse)
    from benchmarks.measurements import code
    from fastvit import env

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage is ended too
    folder.mkdir(parents=True, exist_ok=True)
    logs = Path(arguments.rehearse or ROOT / "bench-out") / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        record = Record(folder, {"code": code(), "versions": env.versions()})
    except ValueError as error:
        sys.exit(f"make gpu: {error}")
    for number, stage in enumerate(stages, 1):
        print(f"== {number}/{len(stages)} {stage.name}: {stage.about}", flush=True)
        if record.finished(stage) and not stage.always:
            print("   finished before")
            continue
        command = stage.rehearsal.format(out=folder) if arguments.rehearse else stage.command
        status, seconds = run([sys.executable, *shlex.split(command)], stage.limit, logs / f"{stage.name}.log")
        record.add(stage, status, seconds)
        print(f"   {'finished' if status == 0 else f'exit status {status}'} after {seconds:.0f} s", flush=True)
        if stage is INSTALL and status:
            print("nothing runs without it; its setuptools must be 77 or later, and its pip allowed to install")
            return 1
    failed = [stage.name for stage in stages if not record.finished(stage)]
    print(f"not finished: {', '.join(failed)}" if failed else "every stage finished")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

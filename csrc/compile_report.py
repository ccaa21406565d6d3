"""What the compiler made of the CUDA kernels: registers, spills, shared memory and instructions, from the binary.

``python -m csrc.compile_report`` compiles ``csrc/`` as an install does, reads the objects that the extension is linked
from, and prints a row for every kernel. It needs nvcc, from a toolkit or from pip, and no GPU. The twin of
:mod:`fastvit.tuning.compile_report`, which reads the Triton kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from csrc import build

# Instructions that tell how a kernel works: products (HMMA of compute capability 8.0, HGMMA of 9.0) and their operands
# (LDSM is ldmatrix), copies from global to shared memory (LDGSTS is cp.async, UTMALDG and UBLKCP are Hopper's), memory
# that stands in for registers (LDL, STL), and products that round float32 to tf32.
MNEMONICS = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "UBLKCP", "LDL", "STL", "TF32")


@dataclass(frozen=True)
class Kernel:
    """A kernel in a binary, for one architecture."""

    family: str  # the file that it was compiled from
    name: str  # linear_kernel<bfloat16, 128, 256>
    arch: str  # sm_80
    registers: int
    stack_bytes: int  # where spilled registers go, and arrays with indices that the compiler doesn't know
    shared_bytes: int  # static: what a launch adds is in none of these files
    instructions: dict[str, int]  # of MNEMONICS, those that occur
    warnings: list[str]  # what ptxas found slow in it

    def __str__(self) -> str:
        return f"{self.family}: {self.name} on {self.arch}"


def cuobjdump() -> Path:
    """Return NVIDIA's disassembler: the one that Triton brings, else a toolkit's."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return tool
    found = shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump: neither Triton's nor a CUDA toolkit's is installed")
    return Path(found)


def _dump(flag: str, path: Path) -> list[str]:
    tool = cuobjdump()
    here = {"PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}  # nvdisasm lies beside it
    run = subprocess.run([tool, flag, path], capture_output=True, text=True, env={**os.environ, **here})
    if run.returncode:
        raise RuntimeError(f"{tool} {flag} {path}: {run.stderr or run.stdout}")
    return run.stdout.splitlines()


def _demangle(symbol: str) -> str:
    """Return a kernel's name without namespaces, return type and parameters."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = library.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not text:
        return symbol
    name = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    return short(name)


def short(name: str) -> str:
    """Return ``f<int, (E)1>`` for ``void fastvit::f<int, (fastvit::E)1>(float*)``."""
    name = re.sub(r"\(anonymous namespace\)::|\w+::", "", name.removeprefix("void "))
    name = name.replace("__nv_bfloat16", "bfloat16").replace("__half", "half").replace("> >", ">>")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def instructions(lines: Iterable[str]) -> Counter[str]:
    """Count each of :data:`MNEMONICS` in lines of SASS."""
    counts: Counter[str] = Counter()
    for line in lines:
        if found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            opcode = found[1]
            counts[opcode.partition(".")[0]] += 1
            counts["TF32"] += ".TF32" in opcode
    return Counter({name: counts[name] for name in MNEMONICS if counts[name]})


def _sections(lines: Iterable[str], function: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (architecture, symbol, lines) of each function in cuobjdump's output."""
    arch, symbol, body = "", "", list[str]()
    for line in lines:
        if found := re.match(r"arch = (\w+)", line):
            if symbol:
                yield arch, symbol, body
            arch, symbol, body = found[1], "", []
        elif found := re.match(function, line):
            if symbol:
                yield arch, symbol, body
            symbol, body = found[1], []
        else:
            body.append(line)
    if symbol:
        yield arch, symbol, body


def warnings(path: Path) -> dict[str, list[str]]:
    """Return ptxas's own complaints about kernels in an object of ``csrc/build.py``: symbol to sentences.

    "Potential Performance Loss" is one: instructions of Hopper that it had to run one after the other.
    """
    log = path.with_suffix(".log")
    found: dict[str, list[str]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        if loss := re.search(r"(Potential Performance Loss: .*) in the function '(\w+)'", line):
            found.setdefault(loss[2], []).append(loss[1])
    return found


def read(path: Path, family: str = "") -> list[Kernel]:
    """Return the kernels in an object or the extension, for every architecture that they were compiled for."""
    usage = {}
    for arch, symbol, lines in _sections(_dump("-res-usage", path), r"\s*Function (\S+?):"):
        usage[arch, symbol] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", " ".join(lines))}
    losses = warnings(path)
    sass = {
        (arch, symbol): instructions(lines)
        for arch, symbol, lines in _sections(_dump("-sass", path), r"\s*Function : (\S+)")
    }
    return [
        Kernel(
            family=family or path.stem,
            name=_demangle(symbol),
            arch=arch,
            registers=found["REG"],
            stack_bytes=max(found["STACK"], found["LOCAL"]),
            shared_bytes=found["SHARED"],
            instructions=dict(sass[arch, symbol]),
            warnings=losses.get(symbol, []),
        )
        for (arch, symbol), found in usage.items()
    ]


def kernels(archs: Sequence[str], families: Sequence[str] = ()) -> list[Kernel]:
    """Compile ``csrc/``, or some files of it, for architectures ("8.0", "9.0a") and read the kernels. Results are kept.

    Raises:
        Missing: of ``csrc/build.py``: there is no nvcc, or something else is missing; the message says what.
    """
    plan = build.Build.find(archs)
    sources = [path for path in plan.sources() if path.suffix == ".cu" and path.stem in (families or (path.stem,))]
    objects = plan.compile(sources)
    with build.lock(), ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(_kept, objects.values(), [source.stem for source in objects])
        return [one for report in reports for one in report]


def _kept(target: Path, family: str) -> list[Kernel]:
    """Call :func:`read` once for each object: disassembling takes seconds."""
    kept = target.with_suffix(".json")
    version = Path(__file__).stat().st_mtime_ns  # the object is named after its contents; the rest is this file's doing
    if kept.exists() and (report := json.loads(kept.read_text()))["version"] == version:
        return [Kernel(**one) for one in report["kernels"]]
    found = read(target, family)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"version": version, "kernels": [asdict(one) for one in found]}))
    partial.replace(kept)
    return found


def render(found: Sequence[Kernel]) -> str:
    """Format a table of kernels, by family."""
    lines = [f"{'kernel':<72} {'arch':<7} {'regs':>4} {'stack':>5} {'static':>6}  instructions"]
    for family in sorted({one.family for one in found}):
        lines += ["", f"{family}.cu"]
        for one in sorted((one for one in found if one.family == family), key=lambda one: (one.name, one.arch)):
            what = " ".join(f"{name} {count}" for name, count in one.instructions.items())
            numbers = f"{one.registers:>4} {one.stack_bytes:>5} {one.shared_bytes:>6}"
            lines.append(f"{one.name:<72} {one.arch:<7} {numbers}  {what}")
            lines += [f"    {warning}" for warning in one.warnings]
    spilling = sum(one.stack_bytes > 0 for one in found)
    return "\n".join([*lines, "", f"{len(found)} kernels, {spilling} with a stack"])


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m csrc.compile_report``."""
    parser = argparse.ArgumentParser(prog="python -m csrc.compile_report", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="objects or extensions to read (default: csrc/)")
    parser.add_argument(
        "--arch", nargs="+", default=["sm_80", "sm_90a"], metavar="ARCH", help="sm_80 sm_90a (the default) ..."
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="FAMILY", help="files of csrc/: layer_norm ...")
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    names = {f"sm_{build.number(arch)}": arch for arch in build.ARCHITECTURES}
    if wrong := [arch for arch in arguments.arch if arch not in names]:
        parser.error(f"--arch {wrong[0]}: accepted are {', '.join(names)}")
    try:
        if arguments.files:
            found = [one for path in arguments.files for one in read(path)]
        else:
            found = kernels([names[arch] for arch in arguments.arch], arguments.only)
    except (build.Missing, build.CompileError, FileNotFoundError, RuntimeError) as error:
        print(f"csrc.compile_report: {error}", file=sys.stderr)
        return 1
    print(json.dumps([asdict(one) for one in found], indent=2) if arguments.json else render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

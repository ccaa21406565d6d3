"""The CUDA extension without a GPU: what is built when, what the compiler made of every kernel, and that it loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csrc import build
from csrc import compile_report as cuda_report
from fastvit.tuning import compile_report

ROOT = Path(__file__).resolve().parent.parent

# --- what the compiler made of the kernels --------------------------------------------------------------------

# Families whose kernels are products, and what must be in each.
AMPERE, HOPPER = {"HMMA", "LDSM", "LDGSTS"}, {"HGMMA"}
PRODUCTS = {
    "attention_backward_sm80": AMPERE,
    "attention_rows": AMPERE,
    "attention_bias_sm80": AMPERE,
    "attention_rel_pos_keys_sm80": {"HMMA", "LDSM"},  # copies of its own warp alone: nothing to run ahead of
    "attention_sm80": AMPERE,
    "attention_sm90": HOPPER,
    "linear_sm80": AMPERE,
    "linear_sm90": HOPPER,
    "patch_embed": AMPERE,
    "patch_embed_packed": AMPERE,
}

# Kernels that may use a stack, by name: (family, kernel) and why.
STACK_ALLOWED = {
    ("layer_norm", r"layer_norm_backward_kernel<Any, Any, Any, 1, 16>"): "mixed dtypes, one value at a time: never hot",
}


@pytest.fixture(scope="session")
def kernels() -> list[cuda_report.Kernel]:
    return cuda_report.kernels(build.DEFAULT)


def check_stack(kernels: Sequence[cuda_report.Kernel]) -> None:
    bad = [
        f"{one}: {one.stack_bytes} B of stack, {one.registers} registers"
        for one in kernels
        if one.stack_bytes and not any(f == one.family and re.match(k, one.name) for f, k in STACK_ALLOWED)
    ]
    assert not bad, "\n".join(bad)


def check_shared(kernels: Sequence[cuda_report.Kernel]) -> None:
    """Static shared memory; what a launch adds is held to the device's limit where it runs, in tests/emulated."""
    for one in kernels:
        limit = compile_report.SHARED_KIB[int(re.sub(r"\D", "", one.arch))] * 1024
        assert one.shared_bytes <= limit, f"{one}: {one.shared_bytes} B of {limit}"


def check_products(kernels: Sequence[cuda_report.Kernel]) -> None:
    for one in kernels:
        wanted = PRODUCTS.get(one.family, set())
        missing = wanted - one.instructions.keys()
        assert not missing, f"{one}: no {', '.join(sorted(missing))}"
        if wanted is HOPPER:
            assert {"UTMALDG", "UBLKCP"} & one.instructions.keys(), f"{one}: no bulk copy"
            assert "HMMA" not in one.instructions, f"{one}: products of compute capability 8.0"


def check_no_tf32(kernels: Sequence[cuda_report.Kernel]) -> None:
    assert not [str(one) for one in kernels if "TF32" in one.instructions]


def check_warnings(kernels: Sequence[cuda_report.Kernel]) -> None:
    """wgmma that ptxas could not leave asynchronous, above all."""
    assert not [f"{one}: {one.warnings}" for one in kernels if one.warnings]


GATES = (check_stack, check_shared, check_products, check_no_tf32, check_warnings)


@pytest.mark.parametrize("gate", GATES)
def test_every_kernel_passes(gate: object, kernels: list[cuda_report.Kernel]) -> None:
    gate(kernels)  # type: ignore[operator]


def test_every_file_has_kernels_for_its_architectures(kernels: list[cuda_report.Kernel]) -> None:
    found = {(one.family, one.arch) for one in kernels}
    files = {path.stem for path in (ROOT / "csrc").glob("*/*.cu")}
    assert found == {
        (file, arch) for file in files for arch in ("sm_80", "sm_90a") if arch == "sm_90a" or not file.endswith("_sm90")
    }


def test_every_exception_is_needed(kernels: list[cuda_report.Kernel]) -> None:
    for family, name in STACK_ALLOWED:
        assert any(one.family == family and re.match(name, one.name) and one.stack_bytes for one in kernels)


@pytest.mark.slow
def test_every_kernel_passes_on_every_architecture() -> None:
    found = cuda_report.kernels(build.ARCHITECTURES)
    assert {one.arch for one in found} == {f"sm_{build.number(arch)}" for arch in build.ARCHITECTURES}
    for gate in GATES:
        gate(found)


def test_the_report_lists_every_kernel(kernels: list[cuda_report.Kernel], capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_report.main([]) == 0
    said = capsys.readouterr().out
    assert all(one.name in said for one in kernels)
    assert f"{len(kernels)} kernels" in said


# A kernel with more values alive than the compiler is allowed registers, and one with nothing to find fault with.
SPILLING = """
template <int n> __global__ void spilling_kernel(const float* x, float* y) {
  float v[n];
  for (int i = 0; i < n; ++i) v[i] = x[threadIdx.x + 32 * i];
  __syncthreads();
  for (int i = 0; i < n; ++i) y[threadIdx.x + 32 * i] = v[i] * v[(i * 7 + 3) % n];
}
template __global__ void spilling_kernel<64>(const float*, float*);
"""


@pytest.fixture(scope="session")
def toolkit() -> object:
    return build.find_toolkit(torch.version.cuda)


def test_the_gate_sees_a_spill(toolkit: object, tmp_path: Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    command = [toolkit.nvcc, "-fatbin", "-O3", *(f"-I{path}" for path in toolkit.includes)]  # type: ignore[attr-defined]
    for limit, stack in (("255", False), ("24", True)):
        build.run([*command, f"-maxrregcount={limit}", "-arch=sm_80", source, "-o", tmp_path / "spilling.fatbin"])
        (found,) = cuda_report.read(tmp_path / "spilling.fatbin")
        assert (found.name, found.arch, found.family) == ("spilling_kernel<64>", "sm_80", "spilling")
        assert (found.stack_bytes > 0) == ({"LDL", "STL"} <= found.instructions.keys()) == stack
    with pytest.raises(AssertionError, match=r"spilling: spilling_kernel<64> on sm_80: \d+ B of stack, 24 registers"):
        check_stack([found])


def test_the_gates_see_the_wrong_instructions(kernels: list[cuda_report.Kernel]) -> None:
    lines = [
        "        /*0540*/                   HMMA.1688.F32.TF32 R4, R8, R10, R4 ;   /* 0x0000000a0804723c */",
        "        /*0550*/              @!P0 LDGSTS.E.BYPASS.128 [R3], [R6.64] ;    /* 0x0000000006037fae */",
        "                                                                          /* 0x000fe20000101d44 */",
        "        /*0560*/             @!UP1 UTMALDG.4D [UR8], [UR6] ;              /* 0x00000000080073b4 */",
        "        /*0570*/                   HFMA2.MMA R4, -RZ, RZ, 0, 2 ;          /* 0x00000004ff047435 */",
    ]
    assert cuda_report.instructions(lines) == {"HMMA": 1, "TF32": 1, "LDGSTS": 1, "UTMALDG": 1}
    for family, wanted in PRODUCTS.items():
        one = next(one for one in kernels if one.family == family)
        with pytest.raises(AssertionError, match=f"{family}: .* no {', '.join(sorted(wanted))}"):
            check_products([replace(one, instructions={})])
        with pytest.raises(AssertionError, match=re.escape(str(one))):
            check_no_tf32([replace(one, instructions={"TF32": 1})])
        with pytest.raises(AssertionError, match="of 101376"):
            check_shared([replace(one, arch="sm_86", shared_bytes=101377)])
        with pytest.raises(AssertionError, match="Potential"):
            check_warnings([replace(one, warnings=["Potential Performance Loss: serialized"])])


def test_names_are_short() -> None:
    assert cuda_report.short("void fastvit::(anonymous namespace)::f<__half, 3>(__half const*)") == "f<half, 3>"
    assert cuda_report.short("fastvit::sm90::g<fastvit::Tile<128, (fastvit::Kind)1> >(int)") == "g<Tile<128, (Kind)1>>"


# --- what is built when ---------------------------------------------------------------------------------------

FAKE_TORCH = """
from types import SimpleNamespace
__version__ = {version!r}
version = SimpleNamespace(cuda={cuda!r})
cuda = SimpleNamespace(device_count=lambda: len({gpus}), get_device_capability=lambda i: {gpus}[i])
"""


def setup(
    tmp_path: Path, *, version: str = "2.11.0", cuda: str | None = torch.version.cuda, gpus: Sequence = (), **env: str
) -> tuple[int, str]:
    """Exit status and output of setup.py beside a PyTorch of this kind."""
    fake = tmp_path / "modules" / "torch" / "__init__.py"
    fake.parent.mkdir(parents=True, exist_ok=True)
    fake.write_text(FAKE_TORCH.format(version=version, cuda=cuda, gpus=list(gpus)))
    kept = {k: v for k, v in os.environ.items() if k not in ("FASTVIT_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST")}
    # The pip packages of the real environment stay visible behind the fake.
    path = os.pathsep.join([str(fake.parent.parent), *(p for p in sys.path if p and Path(p) != ROOT)])
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.returncode, run.stdout


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """An environment in which no nvcc is found."""
    (tmp_path / "empty").mkdir()
    return {"CUDA_HOME": str(tmp_path / "empty")}


def test_with_a_gpu_its_kernels_are_built(tmp_path: Path) -> None:
    status, said = setup(tmp_path, gpus=[(9, 0)])
    assert status == 0
    assert "build with the CUDA extension for 9.0a (CUDA " in said
    assert "for 8.0 8.9 9.0a 10.0 (" in setup(tmp_path, gpus=[(8, 9), (10, 3), (9, 0), (9, 0), (8, 0)])[1]
    assert "for 8.6 12.0+PTX (" in setup(tmp_path, gpus=[(9, 0)], TORCH_CUDA_ARCH_LIST="8.6;12.0+PTX")[1]


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({}, "PyTorch sees no GPU"),
        ({"gpus": [(7, 5)]}, "the GPU has compute capability 7.5, and the kernels are for 8.0, "),
        ({"gpus": [(9, 0)], "version": "2.9.1+cu130"}, "PyTorch 2.9.1 cu130 is older than 2.10"),
        ({"gpus": [(9, 0)], "cuda": None}, "PyTorch 2.11.0 is a build without CUDA"),
        ({"gpus": [(9, 0)], "cuda": "11.8"}, "no nvcc for PyTorch's CUDA 11.8: .*nvcc is of CUDA "),
        ({"gpus": [(9, 0)], "FASTVIT_BUILD_CUDA": "0"}, "FASTVIT_BUILD_CUDA=0"),
        ({"gpus": [(9, 0)], "CXX": "", "PATH": ""}, "no C.. compiler"),
    ],
)
def test_without_what_it_takes_the_build_is_pure_python_and_says_why(
    tmp_path: Path, machine: dict, reason: str
) -> None:
    status, said = setup(tmp_path, **machine)
    assert status == 0
    assert re.search(f"pure-Python build .* no CUDA extension: {reason}", said.replace("+", " ")), said


def test_without_nvcc_the_build_is_pure_python_unless_the_extension_is_demanded(
    tmp_path: Path, nowhere: dict[str, str]
) -> None:
    status, said = setup(tmp_path, gpus=[(9, 0)], **nowhere)
    assert status == 0
    assert re.search(r"pure-Python build .*no nvcc: CUDA_HOME=\S+ has no bin/nvcc", said)
    status, said = setup(tmp_path, FASTVIT_BUILD_CUDA="1", **nowhere)
    assert status == 1
    assert re.search(r"FASTVIT_BUILD_CUDA=1, but the CUDA extension can't be built: no nvcc: CUDA_HOME", said)


def test_on_demand_it_is_built_without_a_gpu(tmp_path: Path) -> None:
    status, said = setup(tmp_path, FASTVIT_BUILD_CUDA="1")
    assert status == 0
    assert "build with the CUDA extension for 8.0 9.0a (" in said


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "8.0;7.5"}, "TORCH_CUDA_ARCH_LIST: CUDA architecture '7.5'; accepted: 8.0, 8.6, "),
        ({"FASTVIT_BUILD_CUDA": "yes"}, "FASTVIT_BUILD_CUDA=yes: accepted are 0, 1 and nothing"),
    ],
)
def test_what_is_set_wrong_is_an_error(tmp_path: Path, env: dict[str, str], message: str) -> None:
    status, said = setup(tmp_path, **{"FASTVIT_BUILD_CUDA": "1", **env})
    assert status == 1
    assert message in said


def test_architecture_lists() -> None:
    assert build.architectures("8.0 9.0, 9.0a;12.0+PTX") == ("8.0", "9.0a", "12.0+PTX")
    assert build.gencode("9.0a+PTX") == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert [build.nearest(*gpu) for gpu in ((8, 0), (8, 7), (8, 9), (10, 3), (12, 1))] == [
        *("8.0", "8.6", "8.9", "10.0", "12.0")
    ]


def test_head_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVIT_HEAD_DIMS", "32 64 128")
    assert build.head_dims() == f"-DFASTVIT_HEAD_DIMS={1 | 1 << 4 | 1 << 12:#x}"
    monkeypatch.delenv("FASTVIT_HEAD_DIMS")
    assert build.head_dims() == "-DFASTVIT_HEAD_DIMS=0x1fff"
    monkeypatch.setenv("FASTVIT_HEAD_DIMS", "64 63")
    with pytest.raises(ValueError, match="FASTVIT_HEAD_DIMS: '63'; accepted: 32, 40, .*128"):
        build.head_dims()


def test_a_compiler_behind_a_script_is_found_where_it_is(
    toolkit: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {toolkit.nvcc} "$@"\n')  # type: ignore[attr-defined]
    script.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert build.find_toolkit(torch.version.cuda) == toolkit


def test_what_has_changed_is_compiled_again_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", copy, ignore=shutil.ignore_patterns("__pycache__"))
    plan = build.Build.find(("8.0",))

    def names() -> dict[str, str]:
        return {path.name: plan.object(path).name for path in plan.sources()}

    here = names()
    monkeypatch.setattr(build, "CSRC", copy)
    assert names() == here  # a copy of the clone makes the same objects
    with open(copy / "include" / "ptx.cuh", "a") as file:
        file.write("// changed\n")
    changed = {name for name, target in names().items() if target != here[name]}
    includes = {path.name for path in copy.glob("*/*.cu") if copy / "include" / "ptx.cuh" in build.closure(path)}
    assert changed == {name for name in includes if not name.endswith("_sm90.cu")}
    assert "linear_sm80.cu" in changed
    assert "library.cpp" not in changed


# --- the extension itself -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its extension, unpacked from a wheel that setup.py built."""
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    tree.mkdir()
    for name in ("fastvit", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.txt"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build.CACHE.mkdir(parents=True, exist_ok=True)
    (tree / "build").mkdir()
    (tree / "build" / "cuda").symlink_to(build.CACHE)
    code = "from setuptools import build_meta; print('wheel:', build_meta.build_wheel('.'))"
    env = {**os.environ, "FASTVIT_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ";".join(build.DEFAULT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "build with the CUDA extension for 8.0 9.0a" in run.stdout
    (wheel,) = tree.glob("*.whl")
    assert re.fullmatch(r"fastvit-\S+-cp311-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as zipped:
        zipped.extractall(tree.parent / "installed")
    return tree.parent / "installed"


def python(code: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code beside what is installed in a folder, in a fresh interpreter."""
    settings = {**os.environ, "PYTHONPATH": str(folder), **env}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=settings, capture_output=True, text=True)


def test_the_wheel_holds_the_extension_and_not_its_sources(installed: Path) -> None:
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert "fastvit/_C.abi3.so" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fastvit"}
    assert not [name for name in names if name.endswith((".cu", ".cuh", ".cpp", ".h"))]


def test_it_loads_and_registers_its_ops_without_a_gpu(installed: Path) -> None:
    run = python(
        "import torch, fastvit, fastvit._C, json; from fastvit.cuda import extension; "
        "print(json.dumps({'missing': extension.MISSING, 'file': fastvit._C.__file__, "
        "'archs': fastvit._C.ARCHITECTURES, 'ops': sorted(name for name in torch._C._dispatch_get_all_op_names() "
        "if name.startswith('fastvit_cuda::'))}))",
        installed,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["missing"] is None
    assert found["file"] == str(installed / "fastvit" / "_C.abi3.so")
    assert found["archs"] == "8.0 9.0a"
    declared = re.findall(r"^(?:void|int64_t) (\w+)\(", (ROOT / "csrc/include/ops.h").read_text(), re.MULTILINE)
    assert len(declared) >= 15
    assert {f"fastvit_cuda::{name}" for name in declared} <= set(found["ops"])


def test_fastvit_env_lists_it(installed: Path) -> None:
    run = python("from fastvit.cli import main; main(['env'])", installed)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^extension +\S+/_C.abi3.so: for 8.0 9.0a, by CUDA \d+\.\d+$", run.stdout, re.MULTILINE)


def test_it_shares_pytorchs_cuda_runtime_and_needs_no_driver(installed: Path) -> None:
    text = build.run(["readelf", "-d", installed / "fastvit" / "_C.abi3.so"])
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", text))
    major = str(torch.version.cuda).partition(".")[0]
    assert {f"libcudart.so.{major}", "libtorch_cpu.so", "libtorch_cuda.so"} <= needed
    assert not [name for name in needed if name.startswith(("libcuda.", "libpython", "libtorch_python", "libc10"))]
    assert "RPATH" not in text
    assert "RUNPATH" not in text


@pytest.mark.parametrize("library", ["not a library", "another PyTorch's"])
def test_one_that_does_not_fit_is_one_clear_line_and_no_crash(installed: Path, tmp_path: Path, library: str) -> None:
    shutil.copytree(installed / "fastvit", tmp_path / "fastvit")
    extension = tmp_path / "fastvit" / "_C.abi3.so"
    extension.write_bytes(b"no ELF")
    if library == "another PyTorch's":
        (tmp_path / "other.cpp").write_text("extern int aoti_torch_future(); int x = aoti_torch_future();")
        build.run([*build.host_compiler(), "-shared", "-fPIC", tmp_path / "other.cpp", "-o", extension])
    (installed.parent / "metadata").mkdir(exist_ok=True)
    for folder in installed.glob("*.dist-info"):
        shutil.copytree(folder, tmp_path / folder.name)
    run = python(
        "import torch, fastvit; from fastvit.cli import main; main(['env']); q = torch.ones(1, 3, 2, 32); "
        "print(fastvit.ops.attention(q, q, q).shape)",
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(
        rf"^extension +the CUDA extension does not match torch {re.escape(torch.__version__)}", run.stdout, re.MULTILINE
    )
    assert "torch.Size([1, 3, 2, 32])" in run.stdout


def test_where_it_is_absent_fastvit_env_says_how_it_was_installed(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(installed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "fastvit" / "_C.abi3.so").unlink()
    (tmp_path / "fastvit" / "_build.txt").write_text("pure-Python build (no CUDA extension: PyTorch sees no GPU)\n")
    run = python("from fastvit.cli import main; main(['env'])", tmp_path)
    assert re.search(
        r"^extension +the CUDA .* not built.*\n +installed by a pure-Python build", run.stdout, re.MULTILINE
    )

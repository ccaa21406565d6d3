"""The report shows what result files say, all of it, and nothing else. Every result here is made up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from benchmarks import measurements, report
from benchmarks.report import page, plots, readme, results, tables
from benchmarks.suites import SUITES as ALL_SUITES

Row = dict[str, Any]
GPU = {"type": "cuda", "name": "Synthetic GPU", "memory_bytes": 2**36, "driver": "1.2", "power_limit": None}
CPU = {"type": "cpu", "name": "Synthetic CPU", "threads": 2, "instructions": "AVX2"}
REASON = 'broken: <script>alert("x")</script> | a & b'
BASE: Row = {"status": "ok", "reason": None, "run": 0}
TIMES: Row = {"median_s": 0.1, "p20_s": 0.09, "p80_s": 0.12, "p99_s": 0.2, "spread": 0.3, "timings": 9}


def _what(model: str = "vit_base_patch16_224", size: int = 224, mode: str = "inference") -> Row:
    return {"model": model, "size": size, "mode": mode, "dtype": "bfloat16"}


def _throughput() -> Iterator[Row]:
    speeds = {"timm": 111.0, "timm-compile": 133.0, "huggingface": 99.0, "fastvit": 155.0, "fastvit-compile": 177.0}
    for size in (128, 224):
        for mode in ("inference", "training"):
            for contender, speed in {**speeds, "floor": 222.0}.items():
                row = _what(size=size, mode=mode) | {"contender": contender, "batch": 8} | BASE | TIMES
                yield row | {"images_per_s": speed, "ratio": speed / 111, "peak_bytes": 7 * 2**20, "pixels": size}
        yield _what("resnet50", size) | {"contender": "torchvision", "batch": 8, "images_per_s": 88.0} | BASE | TIMES
    yield _what() | {"contender": "timm-xformers", "status": "failed", "reason": REASON, "run": 0}


def _latency() -> Iterator[Row]:
    for contender in ("timm", "fastvit", "fastvit-graph"):
        for batch in (1, 8):
            p99 = {"p99_s": None if batch == 8 else 0.2}
            yield _what() | {"contender": contender, "batch": batch, "ratio": 1.0} | BASE | TIMES | p99


def _memory() -> Iterator[Row]:
    for contender in ("timm", "timm-compile", "timm-compile-max", "fastvit"):
        for mode in ("inference", "training"):
            peak = None if contender == "timm-compile-max" else 9 * 2**20  # not seen from outside
            row = _what(mode=mode) | {"contender": contender, "batch": 4, "peak_bytes": peak} | BASE
            activations = {"activation_bytes": 5 * 2**20 if mode == "training" else None, "limit_bytes": 2**30}
            largest = None if "compile" in contender else 77  # is not searched for
            yield row | activations | {"weights_bytes": 2**20, "largest_batch": largest, "too_large_batch": largest}


def _accuracy() -> Iterator[Row]:
    for contender in ("timm", "fastvit-reference", "torchvision"):
        errors = None if contender == "torchvision" else [1e-3, 2e-3, 3e-3]
        row = _what() | {"contender": contender, "batch": 2, "error_ratio": 0.97, "block_errors": errors} | BASE
        yield row | {"max_abs_logit": 1.5, "max_abs_logit_error": 1e-2, "mean_abs_logit_error": 1e-3}


def _kernels() -> Iterator[Row]:
    for op, flops, moved in (("attention", 3e10, 3e8), ("linear+norm", 1.8e11, 3e8), ("layer_norm", 0, 1.5e8)):
        for contender in ("torch", "fastvit"):
            row = {"op": op, "model": "vit_base_patch16_224", "size": 224, "batch": 8, "direction": "forward"}
            row |= {"dtype": "bfloat16", "contender": contender, "shape": "8x197x768", "ratio": 1.0} | BASE | TIMES
            row |= {"flops": flops, "bytes": moved, "tflops_per_s": flops / 1e11, "gb_per_s": moved / 1e8}
            yield row | {"floor_s": 0.05, "floor_percent": 50.0, "peak_tflops_per_s": 2.0, "copy_gb_per_s": 9.0}


def _waterfall() -> Iterator[Row]:
    for contender, speed in (("reference", 50.0), ("attention", 60.0), ("mlp", 75.0)):
        row = _what() | {"contender": contender, "batch": 8, "images_per_s": speed, "ratio": speed / 50}
        yield row | BASE | TIMES
    yield _what() | {"contender": "cuda-graph", "status": "unavailable", "reason": "no graph", "run": 0}


SUITES = {
    "throughput": _throughput,
    "latency": _latency,
    "memory": _memory,
    "accuracy": _accuracy,
    "kernels": _kernels,
    "waterfall": _waterfall,
}


def _write(folder: Path, device: Row, suites: dict[str, list[Row]]) -> None:
    versions = {"torch": "2.11", "timm": "1.0", "xformers": None}
    run = {"command": "python -m benchmarks <suite>", "commit": "abc" * 13 + "a-dirty", "code": "c"}
    run |= {"versions": versions, "started": "2026-01-02T03:04:05+00:00", "device": device}
    folder.mkdir(parents=True)
    for name, rows in suites.items():
        content = {"suite": name, "device": device["name"], "runs": [run], "measurements": rows}
        (folder / f"{name}.json").write_text(json.dumps(content))


def _static() -> Row:
    steps = [{"fused": "every op apart", "launches": 17, "bytes": 4e9}, {"fused": "GELU", "launches": 7, "bytes": 2e9}]
    model, gpu = "vit_base_patch16_224", "H200 SXM"
    kept = {"fastvit": 3_000_000, "timm": 5_000_000, "ratio": 0.6}
    eager = {"launches": 10, "bytes": 3_000_000_000}
    kernel = {"name": "linear_kernel", "target": "sm_90", "registers": 168, "spill_bytes": 0, "shared_bytes": 65536}
    return {
        "versions": {"torch": "2.11", "triton": "3.6"},
        "launches_per_block": 7,
        "bytes_per_block": {"forward": {"plain": 2_000_000_000}},
        "timm_eager": {"plain": eager, "model": eager},
        "waterfall": {"plain": steps, "model": steps},
        "saved_bytes_per_image": {"block": {"plain": kept, "LayerScale": kept}, "model": {model: kept}},
        "flops_per_image": {model: {"forward": 35_127_656_448}},
        "floors": [{"model": model, "gpu": gpu, "batch": 256, "images_per_s": 26627.0}],
        "data_sheets": [{"gpu": gpu, "flops_per_s": 989e12, "bytes_per_s": 4.8e12, "source": "a data sheet"}],
        "work": [
            {"kernel": "linear_kernel", "flops": 178e9, "bytes": 3e8, "times": 12},
            {"kernel": "attention_kernel", "flops": 3e10, "bytes": 3e8, "times": 12},
        ],
        "table6": [{"model": "R50+ViT", "epochs": 7, "paper_exaflops": 274, "exaflops": 93.7, "deviation": 0.0}],
        "kernels": [kernel | {"hot": True, "constants": "TILE=<64>", "workload": "vit"}],
    }


class Page(HTMLParser):
    """A page taken apart: tables as lists of lines, headings, attributes; tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.sections: dict[str, list[list[list[str]]]] = {}  # tables by the id of the heading before them
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("h2", "h3"):
            self.section = dict(attrs).get("id") or self.section
        if tag == "table":
            self.sections.setdefault(self.section, []).append([])
        if tag == "tr":
            self.sections[self.section][-1].append([])
        if tag in ("td", "th"):
            self.sections[self.section][-1][-1].append("")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.sections[self.section][-1][-1][-1] += data


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A made-up GPU with every suite, a CPU with two, static figures; and what the report makes of them."""
    root = tmp_path_factory.mktemp("report")
    _write(root / "results" / "synthetic-gpu", GPU, {name: list(rows()) for name, rows in SUITES.items()})
    _write(root / "results" / "a-cpu", CPU, {"latency": list(_latency()), "memory": list(_memory())})
    (root / "static.json").write_text(json.dumps(_static()))
    (root / "README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    found = {name: root / name for name in ("results", "static.json", "out", "README.md")}
    written = report.write(*found.values())
    assert all(path.is_file() for path in written)
    return found


def test_every_plot_is_a_picture_of_something(places: dict[str, Path]) -> None:
    figures = {f"synthetic-gpu/{name}.png" for _, name, _ in plots.FIGURES}
    figures |= {"a-cpu/latency.png", "a-cpu/memory.png", "static/fusions.png", "static/roofline.png"}
    paths = {str(path.relative_to(places["out"])): path for path in places["out"].rglob("*.png")}
    assert paths.keys() == figures
    for name, path in paths.items():
        picture = imread(path)[..., :3]
        assert picture.shape[1] > 1000, name
        ink = (picture.min(axis=2) < 0.9).mean()  # titles, bars or lines; and not everything
        assert 0.005 < ink < 0.6, (name, ink)
        color = (picture.max(axis=2) - picture.min(axis=2) > 0.3).mean()
        assert color > 0.0003, (name, color)  # bars, lines or points, and not words alone


def test_the_page_needs_nothing_else(places: dict[str, Path]) -> None:
    text = (places["out"] / "index.html").read_text()
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    found = Page(text)
    ids = [attributes["id"] for _, attributes in found.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert sum(tag == "script" for tag, _ in found.tags) == 1
    assert sum(tag == "svg" for tag, _ in found.tags) == len(list(places["out"].rglob("*.png")))
    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "embed")
        assert "src" not in attributes
        for name in ("href", "clip-path"):
            target = (attributes.get(name) or "").removeprefix("url(").removesuffix(")")
            assert not target or target[1:] in ids, (tag, target)


def test_every_row_is_on_the_page(places: dict[str, Path]) -> None:
    found = Page((places["out"] / "index.html").read_text())
    for folder, suites in (("synthetic-gpu", tuple(SUITES)), ("a-cpu", ("latency", "memory"))):
        for suite in ALL_SUITES:
            shown = found.sections.get(f"{folder}-{suite.name}", [])
            if suite.name not in suites:
                assert shown == []
                continue
            rows = list(SUITES[suite.name]())
            table = tables.of_rows(rows, suite.columns)
            assert shown == [[table.header, *table.lines]]
    (where,) = found.sections["where"]
    assert len(where) == 1 + len(SUITES) + 2
    assert {"abcabcabcabc-dirty", "python -m benchmarks <suite>", "torch 2.11, timm 1.0"} <= set(where[1])


def test_a_row_without_result_says_why(places: dict[str, Path]) -> None:
    text = (places["out"] / "index.html").read_text()
    assert "<li>broken: &lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; | a &amp; b</li>" in text
    rows = [_what() | {"contender": name, "status": "failed", "reason": REASON} for name in ("fastvit", "timm")]
    table = tables.of_rows(rows, (("contender", "contender"), ("images/s", "images_per_s")))
    lines = tables.markdown(table).splitlines()
    assert lines[2:] == [
        "| fastvit | failed [1] |",
        "| timm | failed [1] |",
        "",
        '1. broken: &lt;script>alert("x")&lt;/script> \\| a & b',
    ]


def test_readme_has_what_a_reader_wants(places: dict[str, Path]) -> None:
    text = places["README.md"].read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    headline = [line for line in text.splitlines() if line.startswith(("| timm", "| hugging", "| torch", "| fastvit"))]
    # timm, the best other library, fastvit; not the others, not fastvit compiled, not the floor.
    assert headline == [
        "| timm | 111 | 1.00 | 7 | ± 15% |",
        "| timm-compile | 133 | 1.20 | 7 | ± 15% |",
        "| fastvit | 155 | 1.40 | 7 | ± 15% |",
    ]
    assert "**Synthetic GPU** (" in text and "`abcabcabcabc-dirty`" in text
    assert "ViT-B/16 in bfloat16, 224 pixels, batch 8, inference" in text
    assert "**Synthetic CPU AVX2**: inference throughput is not measured yet." in text
    assert "| launches per block | 7 | 10 | 0.70x |" in text
    assert readme.NO_GPU not in text
    assert len(text.splitlines()) < 35


def test_readme_is_current_until_a_result_changes(places: dict[str, Path], tmp_path: Path) -> None:
    assert report.is_current(places["results"], places["static.json"], places["README.md"])
    assert not report.is_current(tmp_path, places["static.json"], places["README.md"])


def test_this_readme_shows_the_committed_results() -> None:
    assert report.is_current(measurements.RESULTS, report.STATIC, report.README), "run `python -m benchmarks report`"


def test_nothing_measured_and_nothing_twice(tmp_path: Path) -> None:
    """Without files, page and README say so; and the same files make the same bytes."""
    target = tmp_path / "README.md"
    target.write_text(f"{readme.BEGIN}\n{readme.END}")
    (tmp_path / "none").mkdir()
    for static in (None, tmp_path / "static.json"):
        written = report.write(tmp_path / "none", static, tmp_path / "out", target)
        assert written == [tmp_path / "out/index.html", target]
        assert readme.NO_GPU in target.read_text() and readme.NO_STATIC in target.read_text()
        assert (tmp_path / "out/index.html").read_text().count(page.NOT_MEASURED) == 3  # where, GPU, static
    _write(tmp_path / "results" / "cpu", CPU, {"latency": list(_latency())})
    (tmp_path / "static.json").write_text(json.dumps(_static()))
    made = []
    for folder in ("a", "b"):
        paths = report.write(tmp_path / "results", tmp_path / "static.json", tmp_path / folder, target)
        made.append({path.name: path.read_bytes() for path in paths})
    assert made[0] == made[1]
    assert made[0].keys() == {"index.html", "latency.png", "fusions.png", "roofline.png", "README.md"}
    assert readme.NO_GPU in target.read_text()
    found = (tmp_path / "a/index.html").read_text()
    assert found.count(page.NOT_MEASURED) == 1 + len(ALL_SUITES) - 1  # the GPU, and the CPU's other suites


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        report.write(tmp_path / "nowhere", None, tmp_path / "out", None)
    (tmp_path / "results" / "gpu").mkdir(parents=True)
    bad = tmp_path / "results" / "gpu" / "latency.json"
    target = tmp_path / "README.md"
    target.write_text(f"{readme.BEGIN}\n{readme.END}")
    for text in ("{", "[]", '{"measurements": []}'):
        bad.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(bad))):
            report.write(tmp_path / "results", None, tmp_path / "out", target)
    bad.unlink()
    for text in ("{", "[]"):
        (tmp_path / "static.json").write_text(text)
        with pytest.raises(ValueError, match="static.json"):
            report.write(tmp_path / "results", tmp_path / "static.json", tmp_path / "out", target)
    target.write_text("no marks")
    with pytest.raises(ValueError, match="README"):
        report.write(tmp_path / "results", None, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_runs_without_rows_are_not_shown(tmp_path: Path) -> None:
    _write(tmp_path / "cpu", CPU, {"latency": list(_latency())})
    path = tmp_path / "cpu" / "latency.json"
    content = json.loads(path.read_text())
    content["runs"].append(content["runs"][0] | {"commit": "later"})
    path.write_text(json.dumps(content))
    (device,) = results.read(tmp_path)
    assert results.read(tmp_path / "cpu") == [device]
    assert [count for _, count in device.runs("latency")] == [6]
    assert device.origin("latency") == "torch 2.11, timm 1.0, commit abcabcabcabc-dirty"

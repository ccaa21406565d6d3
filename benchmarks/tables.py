"""``python -m benchmarks tables``: the GPU tables of README.md, from benchmarks/results/*/*.json and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import report

RESULTS = Path(__file__).resolve().parent / "results"
README = report.ROOT / "README.md"
BEGIN = "<!-- begin: python -m benchmarks tables -->"
END = "<!-- end -->"
NOTHING = "Not measured yet: no result from a GPU is in [`benchmarks/results/`](benchmarks/results)."


def render(results: Path = RESULTS) -> str:
    """The tables of every throughput.json under ``results``, or the sentence that says there is none."""
    sections = []
    for path in sorted(results.glob("*/throughput.json")):
        result = json.loads(path.read_text())
        device, versions = result["device"], result["versions"]
        about = [f"torch {versions['torch']}", f"triton {versions['triton']}", f"timm {versions['timm']}"]
        about += [f"{key.replace('_', ' ')} {device[key]}" for key in ("driver", "power_limit") if device.get(key)]
        about += [f"commit {(result['commit'] or 'unknown')[:12]}"]
        sections.append(
            f"**{device['name']}**, `{result['model']}` ({', '.join(about)}):\n\n{report.markdown(result['rows'])}"
        )
    return "\n\n".join(sections) or NOTHING


def updated(text: str, results: Path = RESULTS) -> str:
    """``text`` (README.md's) with what stands between the marks replaced.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{render(results)}\n{END}{after}"


def write() -> Path:
    """Bring README.md up to date and return its path."""
    README.write_text(updated(README.read_text()))
    return README

"""Writes the figures of README.md from the committed results: ``python -m tools.readme`` (``--check`` only compares).

python -m tools.readme --take runs/quickstart     copies a finished run's result into benchmarks/results/cpu
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
BEGIN, END = "<!-- quickstart: begin (tools/readme.py) -->", "<!-- quickstart: end -->"


def take(run_dir: Path) -> Path:
    """Copies what the README needs of a run's report, with the commit that it was made at."""
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    kept = {
        key: report[key] for key in ("name", "systems", "intervals", "comparison", "seconds", "environment", "config")
    }
    kept["recall"] = [
        {key: row[key] for key in ("step", "recall@1", "recall@7")}
        for row in report["history"]
        if row["phase"] == "joint" and "recall@1" in row
    ]
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    kept["commit"] = described.stdout.strip() or "unknown"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"quickstart-seed{report['config']['seed']}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return path


def figure(value: dict[str, Any] | None) -> str:
    """A mean with its interval, or a dash."""
    return "-" if value is None else f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def section() -> str:
    """The README's part that figures stand in."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("quickstart-seed*.json"))]
    first = runs[0]
    lines = [
        "| system | accuracy | answer log-likelihood | recall@1 | recall@7 |",
        "|---|---|---|---|---|",
    ]
    for row in first["systems"]:
        figures = (figure(row[key]) for key in ("accuracy", "log_likelihood", "recall_at_1", "recall_at_7"))
        lines.append(f"| {row['label']} | {' | '.join(figures)} |")
    joint = first["systems"][0]
    minutes = first["seconds"]["in all"] / 60
    made = first["environment"]
    confidence = f"{first['intervals']['confidence'] * 100:g} %"
    lines += [
        "",
        f"{joint['questions']} questions about {joint['clusters']} conditions never trained on; {confidence} intervals"
        f" by bootstrap over conditions; {minutes:.0f} minutes on {made['cores']} CPU cores"
        f" (torch {made['torch']}, commit {first['commit']}).",
    ]
    for run in runs:
        accuracy, recall = (run["comparison"][key] for key in ("accuracy", "recall_at_1"))
        lines.append(
            f"Seed {run['config']['seed']}: joint minus separate RAG {100 * accuracy['mean']:+.1f} points of accuracy"
            f" [{100 * accuracy['low']:+.1f}, {100 * accuracy['high']:+.1f}], {100 * recall['mean']:+.1f} of recall@1"
            f" [{100 * recall['low']:+.1f}, {100 * recall['high']:+.1f}]."
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where README.md is not up to date")
    parser.add_argument("--take", type=Path, metavar="RUN", help="a finished run of the quick start")
    options = parser.parse_args()
    if options.take:
        print(take(options.take))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = f"{before}{BEGIN}\n{section()}\n{END}{after}"
    if options.check:
        if fresh != text:
            print("README.md differs from benchmarks/results: run python -m tools.readme", file=sys.stderr)
        return int(fresh != text)
    readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the figures of docs/longlora.md and docs/label-leak.md from the committed results: ``python -m tools.pages``.

python -m tools.pages --check                  only compares
python -m tools.pages --take runs/longlora     copies a finished extension's result into benchmarks/results/cpu
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.label_leak import tables
from jmlr.extend.table import LABELS, markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
UNMEASURED = "No result is committed yet."


def take(run_dir: Path) -> Path:
    """Copies a run's result, less its loss curves, with the commit that it was made at."""
    result = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    for record in (result["base"], *result["rows"]):
        record.pop("history", None)
    result["commit"] = describe()["commit"]
    seed, threads = result["config"]["seed"], result["config"]["threads"]
    result["command"] = f"jmlr train --recipe longlora --set seed={seed} --set threads={threads}"
    path = RESULTS / f"longlora-seed{seed}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _read(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def extension() -> dict[str, str]:
    """Sections of docs/longlora.md."""
    runs = _read("longlora-seed*.json")
    if not runs:
        return dict.fromkeys(("table", "seeds", "quarters", "flops"), UNMEASURED)
    first = runs[0]
    made, target = first["environment"], first["config"]["extend"]["target_length"]
    threads = first["config"]["threads"] or made["cores"]
    table = (
        f"{markdown(first)}\n\nSeed {first['config']['seed']}, {first['seconds'] / 60:.0f} minutes with {threads}"
        f" thread{'s' if threads > 1 else ''} (torch {made['torch']}, commit {first['commit'][:7]})."
    )
    names = [one["row"] for one in first["comparisons"]]
    heads = ["seed", "full attention: perplexity", *(f"{LABELS[name]}: nats more" for name in names)]
    seeds = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for run in runs:
        full = next(row for row in run["rows"] if row["name"] == "full")["perplexity"][-1]
        differences = [f"{o['mean']:+.4f} [{o['low']:+.4f}, {o['high']:+.4f}]" for o in run["comparisons"]]
        seeds.append(f"| {run['config']['seed']} | {full['mean']:.2f} | {' | '.join(differences)} |")
    quarters = ["| model | 1st | 2nd | 3rd | 4th |", "|---|---|---|---|---|"]
    for row in first["rows"]:
        nats = row["perplexity"][-1]["quarters"]
        quarters.append(f"| {LABELS[row['name']]} | {' | '.join(f'{value:.3f}' for value in nats)} |")
    pairs = {row["name"]: row["attention_flops"] for row in first["rows"]}
    shares = ", ".join(f"{LABELS[name]} {pairs[name] / pairs['full']:.4f}" for name in pairs if pairs[name])
    return {
        "table": table,
        "seeds": "\n".join(
            [f"Dense, windows of {target:,} tokens, against full attention at the same seed:", "", *seeds]
        ),
        "quarters": "\n".join(quarters),
        "flops": f"Attention FLOPs relative to full attention: {shares}.",
    }


def label_leak() -> dict[str, str]:
    """Sections of docs/label-leak.md."""
    found = _read("label-leak.json")
    if not found:
        return dict.fromkeys(("gradients", "layers", "training"), UNMEASURED)
    (result,) = found
    made = result["environment"]
    by_gradients, layers, training = tables(result).split("\n\n")
    training += (
        f"\n\n`{result['command']}`, {result['seconds']:.0f} s on {made['cpu_count']} CPU cores (torch {made['torch']},"
        f" commit {made['commit'][:7]})."
    )
    return {"gradients": by_gradients, "layers": layers, "training": training}


PAGES = {"longlora.md": extension, "label-leak.md": label_leak}


def filled(text: str, sections: dict[str, str]) -> str:
    """A page with each ``<!-- NAME: begin -->`` ... ``<!-- NAME: end -->`` holding its section."""
    for name, section in sections.items():
        begin, end = f"<!-- {name}: begin (tools/pages.py) -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"the page has no section between {begin} and {end}")
        text = f"{before}{begin}\n{section}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where a page is not up to date")
    parser.add_argument("--take", type=Path, metavar="RUN", help="a finished run with task: extend")
    options = parser.parse_args()
    if options.take:
        print(take(options.take))
    stale = []
    for name, sections in PAGES.items():
        page = ROOT / "docs" / name
        text = page.read_text(encoding="utf-8")
        fresh = filled(text, sections())
        if fresh != text:
            stale.append(name)
            if not options.check:
                page.write_text(fresh, encoding="utf-8")
    if options.check and stale:
        print(f"{', '.join(stale)} differ from benchmarks/results: run python -m tools.pages", file=sys.stderr)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

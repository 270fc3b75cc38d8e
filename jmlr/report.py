"""One run's report: `report.html` for people, `report.json` for programs, with the same content.

The page is one file without outside resources, follows the reader's light or dark theme, and reads on a phone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from jmlr.console import duration, format_interval
from jmlr.evaluate.results import (
    Comparison,
    SummaryRow,
    SystemResult,
    comparison,
    json_ready,
    sample_size,
    summary_table,
)
from jmlr.figures import draw_all

SCHEMA_VERSION = 1

_SOURCES = {
    "ghr": {
        "title": "NLM Genetics Home Reference, as question-answer pairs in MedQuAD",
        "authors": "Ben Abacha and Demner-Fushman 2019, A question-entailment approach to question answering, "
        "BMC Bioinformatics 20:511",
        "url": "https://github.com/abachaa/MedQuAD",
        "license": "CC BY 4.0",
        "changes": "cut into passages; questions and their answer options made from the inheritance and gene entries",
    },
    "openstax": {
        "title": "OpenStax textbooks",
        "authors": "OpenStax, Rice University",
        "url": "https://openstax.org",
        "license": "CC BY 4.0",
        "changes": "cut into passages; end-of-chapter questions kept with their options",
    },
}


def write_report(
    run_dir: Path | str,
    *,
    config: Mapping[str, Any],
    results: Sequence[SystemResult],
    history: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
    environment: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    attribution: Sequence[Mapping[str, str]] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Path:
    """Write `run_dir/report.html` and `run_dir/report.json`, each replaced in one move.

    Args:
        run_dir: made if it is not there.
        config: the run's settings, nested; `config["name"]` is the title, `config["data"]` names the data sets.
        results: one entry a system, in the order of the table. "joint" and "rag" are compared if both are there.
        history: rows `{"step", "phase", "loss_lm", "loss_rank", "recall@1", "recall@7", "seconds", "refresh"}`, keys
            left out where nothing was measured; phase is "joint", "rag", "closed-book" or another system's name.
        seconds: wall-clock time of each part of the run.
        environment: versions, machine, date: what is needed to run the same again.
        examples: `{"id", "question", "options", "answer", "before", "after"}`, where `before` and `after` hold
            `{"label", "prediction", "passages"}` and each passage `{"id", "title", "text", "url", "score",
            "supporting"}`, best first. All but `question` may be missing.
        attribution: `{"title", "authors", "url", "license", "changes"}` of each data source; by default those of the
            embedded data that `config["data"]` names.
        confidence, resamples, seed: of the intervals.

    Returns:
        The path of report.html.

    Raises:
        ValueError: no results, two systems of one name, "joint" and "rag" on different questions.
    """
    if not results:
        raise ValueError("a report needs the results of at least one system; evaluate the run first")
    names = [result.name for result in results]
    if len(set(names)) != len(names):
        raise ValueError(f"two systems share a name in {names}; give each its own")
    run_dir = Path(run_dir)
    settings: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    rows = summary_table(results, **settings)
    by_name = dict(zip(names, results, strict=True))
    paired = None
    if "joint" in by_name and "rag" in by_name:
        paired = comparison(by_name["joint"], by_name["rag"], **settings)
    sources = data_sources(config) if attribution is None else [dict(source) for source in attribution]
    name = str(config.get("name") or run_dir.resolve().name)

    content = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "systems": [asdict(row) for row in rows],
        "intervals": {**settings, "method": "BCa bootstrap over clusters"},
        "comparison": None if paired is None else {**asdict(paired), "sentences": paired.sentences()},
        "history": [dict(row) for row in history],
        "seconds": dict(seconds),
        "environment": dict(environment),
        "config": dict(config),
        "examples": [dict(example) for example in examples],
        "attribution": sources,
        "results": [result.to_dict() for result in results],
    }
    page = _page(name, rows, paired, history, seconds, environment, config, examples, sources, confidence)
    run_dir.mkdir(parents=True, exist_ok=True)
    _replace(run_dir / "report.json", json.dumps(json_ready(content), indent=1, allow_nan=False) + "\n")
    _replace(run_dir / "report.html", page)
    return run_dir / "report.html"


def data_sources(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """Attributions of the data sets that `config["data"]` names; for others, a pointer to their records' licence."""
    data = config.get("data")
    data = data if isinstance(data, Mapping) else {}
    names = [str(name) for key in ("corpora", "train", "test") for name in data.get(key) or ()]
    found: dict[str, dict[str, str]] = {}
    for name in names:
        known = next((key for key in _SOURCES if key in name.lower()), None)
        if known is not None:
            found[known] = _SOURCES[known]
        else:
            found[name] = {"title": name, "license": "as its records state"}
    return list(found.values())


def _page(
    name: str,
    rows: Sequence[SummaryRow],
    paired: Comparison | None,
    history: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
    environment: Mapping[str, Any],
    config: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    sources: Sequence[Mapping[str, str]],
    confidence: float,
) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment_of_page = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined
    )
    environment_of_page.filters.update(
        interval=format_interval, duration=duration, web_address=_web_address, number=_number
    )
    return environment_of_page.get_template("report.html.j2").render(
        name=name,
        rows=rows,
        sizes="; ".join(sorted({sample_size(row.questions, row.clusters) for row in rows})),
        sentences=[] if paired is None else paired.sentences(),
        pictures=draw_all(rows, history),
        seconds=seconds,
        environment=_flatten(environment),
        config=_flatten(config),
        examples=examples,
        sources=sources,
        confidence=f"{confidence * 100:g} %",
    )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) or "none"
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else str(value)
    return flat


def _web_address(value: object) -> str:
    # A corpus is somebody's file: its "url" must not become a javascript: link.
    text = str(value or "")
    return text if text.startswith(("https://", "http://")) else ""


def _number(value: object) -> str:
    try:
        return f"{float(value):.2f}"  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

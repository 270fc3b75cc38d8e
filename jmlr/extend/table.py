"""The result of an extension as a table, and what the variants differ by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jmlr.console import duration
from jmlr.evaluate.statistics import paired_difference
from jmlr.extend.config import PerplexityConfig

LABELS = {
    "untouched": "untouched model",
    "interpolated": "interpolated, untrained",
    "full": "full attention",
    "split": "S2, split",
    "wrap": "S2, wrap (leaks)",
}


def comparisons(rows: Sequence[dict[str, Any]], settings: PerplexityConfig) -> list[dict[str, Any]]:
    """Differences in nats at the target length, on the same blocks of the same documents: each row minus `full`."""
    by_name = {row["name"]: row["perplexity"][-1] for row in rows}
    found = []
    for name, row in by_name.items():
        if name == "full" or "full" not in by_name:
            continue
        full = by_name["full"]
        difference = paired_difference(
            row["nats"], full["nats"], full["documents"], settings.confidence, settings.bootstrap
        )
        found.append(
            {"row": name, "minus": "full", "mean": difference.mean, "low": difference.low, "high": difference.high}
        )
    return found


def header(result: dict[str, Any]) -> list[str]:
    """Column heads of :func:`cells`."""
    lengths = [f"perplexity at {one['length']:,}" for one in result["rows"][0]["perplexity"]]
    return ["model", "training loss", *lengths, "tokens trained", "time", "attention FLOPs"]


def cells(result: dict[str, Any]) -> list[list[str]]:
    """One line of texts for each model."""
    lines = []
    for row in result["rows"]:
        trained = row["tokens"] > 0
        lines.append(
            [
                LABELS[row["name"]],
                f"{row['training_loss']:.3f}" if row["training_loss"] is not None else "-",
                *(_interval(one) for one in row["perplexity"]),
                f"{row['tokens']:,}" if trained else "-",
                duration(row["seconds"]) if trained else "-",
                f"{row['attention_flops']:.4g}" if trained else "-",
            ]
        )
    return lines


def notes(result: dict[str, Any]) -> list[str]:
    """What stands under the table: over what the intervals were taken, and the paired differences."""
    config = result["config"]
    documents, blocks = len(result["documents"]["held_out"]), len(result["rows"][0]["perplexity"][0]["nats"])
    target, confidence = config["extend"]["target_length"], 100 * config["evaluate"]["confidence"]
    lines = [
        f"{blocks} windows of {target:,} tokens in {documents} held-out documents, the same tokens at every length; "
        f"dense attention; {confidence:g} % intervals by bootstrap over documents."
    ]
    for one in result["comparisons"]:
        lines.append(
            f"{LABELS[one['row']]} minus full attention at {target:,} tokens: {one['mean']:+.4f} nats"
            f" [{one['low']:+.4f}, {one['high']:+.4f}]"
        )
    return lines


def format_result(result: dict[str, Any]) -> str:
    """Table and notes as aligned text."""
    lines = [header(result), *cells(result)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([*table, *notes(result)])


def markdown(result: dict[str, Any]) -> str:
    """Table and notes for a page."""
    lines = [header(result), ["---"] * len(header(result)), *cells(result)]
    return "\n".join(
        ["| " + " | ".join(line) + " |" for line in lines] + ["", *(f"- {note}" for note in notes(result))]
    )


def _interval(one: dict[str, Any]) -> str:
    if one["low"] != one["low"]:
        return f"{one['mean']:.2f}"
    return f"{one['mean']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"

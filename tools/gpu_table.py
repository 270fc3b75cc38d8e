"""The short table that `make gpu` ends with, out of the JSON files that its phases wrote."""

from __future__ import annotations

from typing import Any


def align(rows: list[list[str]]) -> str:
    """Rows as text in columns: the first column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mebibytes(record: dict[str, Any], direction: str) -> str:
    peak = record["peak_bytes"].get(direction)
    return "-" if peak is None else f"{peak / 2**20:.0f}"


def _tflops(record: dict[str, Any], summary: dict[str, Any], direction: str) -> str:
    """Useful TFLOP/s of what this row adds: the backward's for forward+backward."""
    part = "backward" if direction == "forward+backward" else "forward"
    rate = record["useful_tflops"].get(part)
    bar = summary.get("bar_tflops", {}).get(part)
    return _number(rate, 0) + (f" ({bar:.0f})" if bar and rate else "")


def operation_table(report: dict[str, Any]) -> str:
    """One row for each case and direction of one operation; bars in brackets, problems below."""
    rows = [["case", "direction", "jmlr ms", "torch ms", "best other ms", "ratio", "TFLOP/s", "peak MiB", "best other"]]
    problems = []
    for case in report["cases"]:
        ours = case["candidates"]["jmlr"]
        for direction, summary in case["summary"].items():
            bar = summary.get("bar_ms")
            rows.append(
                [
                    case["case"],
                    direction,
                    _number(summary["jmlr_ms"]) + (f" ({bar:g})" if bar else ""),
                    _number(summary["torch_ms"]),
                    _number(summary["best_baseline_ms"]),
                    _number(summary["ratio_to_best"], 2),
                    _tflops(ours, summary, direction),
                    _mebibytes(ours, direction),
                    summary["best_baseline"] or "-",
                ]
            )
        for name, record in case["candidates"].items():
            if "problem" in record:
                problems.append(f"  {case['case']}: {name} is not timed: {record['problem'][:160]}")
    text = f"{report['operation']}, {report['dtype']}, medians (bars in brackets)\n{align(rows)}"
    if report["left_out"]:
        problems.append(f"  no time left for: {'; '.join(report['left_out'])}")
    return "\n".join([text, *dict.fromkeys(problems)])


def phase_table(phases: list[dict[str, Any]]) -> str:
    """One row for each phase: outcome, seconds, what there is to say."""
    rows = [["phase", "outcome", "seconds"]]
    rows += [[phase["name"], phase["outcome"], f"{phase['seconds']:.0f}"] for phase in phases]
    lines = align(rows).split("\n")
    return "\n".join([lines[0], *(f"{line}  {phase['detail']}" for line, phase in zip(lines[1:], phases, strict=True))])

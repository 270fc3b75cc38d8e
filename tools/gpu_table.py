"""The short table that `make gpu` ends with, out of the JSON files that its phases wrote."""

from __future__ import annotations

from typing import Any

HEADINGS = {
    "attention": [
        "case",
        "step",
        "jmlr ms",
        "TFLOP/s",
        "executed",
        "matrix %",
        "roof %",
        "best other",
        "ratio",
        "warm",
        "other",
        "MiB",
        "least other",
        "best other",
    ],
    "maxsim": [
        "case",
        "step",
        "jmlr ms",
        "best other",
        "ratio",
        "roof %",
        "warm",
        "other",
        "eager",
        "other",
        "MiB",
        "least other",
        "best other",
    ],
}
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}


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


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.{0 if count >= 100 * 2**20 else 1}f}"


def _with_bar(text: str, bar: str | None) -> str:
    return f"{text} ({bar})" if bar and text != "-" else text


def _percent(share: float | None) -> str:
    return _number(None if share is None else 100 * share, 0)


def _attention_row(case: dict[str, Any], direction: str, summary: dict[str, Any]) -> list[str]:
    bar, least_ratio, bar_bytes = (summary.get(key) for key in ("bar_tflops", "least_ratio", "bar_bytes"))
    return [
        case["case"],
        SHORT[direction],
        _number(summary["jmlr_ms"]),
        _with_bar(_number(summary.get("useful_tflops"), 0), f"{bar:.0f}" if bar else None),
        _number(summary.get("executed_tflops"), 0),
        _percent(summary.get("matrix_share")),
        _percent(summary.get("roofline_share")),
        _number(summary["best_baseline_ms"]),
        _with_bar(_number(summary["ratio_to_best"], 2), f"{least_ratio:g}" if least_ratio else None),
        _number(summary["jmlr_warm_ms"]),
        _number(summary["best_warm_ms"]),
        _with_bar(_mebibytes(summary["jmlr_peak_bytes"]), None if bar_bytes is None else _mebibytes(bar_bytes)),
        _mebibytes(summary["least_peak_bytes"]),
        summary["best_baseline"] or "-",
    ]


def _maxsim_row(case: dict[str, Any], direction: str, summary: dict[str, Any]) -> list[str]:
    bar, least_ratio, share = summary.get("bar_ms"), summary.get("least_ratio"), summary.get("roofline_share")
    bar_bytes = summary.get("bar_bytes")
    return [
        case["case"],
        SHORT[direction],
        _with_bar(_number(summary["jmlr_ms"]), f"{bar:g}" if bar else None),
        _number(summary["best_baseline_ms"]),
        _with_bar(_number(summary["ratio_to_best"], 2), f"{least_ratio:g}" if least_ratio else None),
        _percent(share),
        _number(summary["jmlr_warm_ms"]),
        _number(summary["best_warm_ms"]),
        _number(summary["jmlr_eager_ms"]),
        _number(summary["best_eager_ms"]),
        _with_bar(_mebibytes(summary["jmlr_peak_bytes"]), None if bar_bytes is None else _mebibytes(bar_bytes)),
        _mebibytes(summary["least_peak_bytes"]),
        summary["best_baseline"] or "-",
    ]


def operation_table(report: dict[str, Any]) -> str:
    """One row for each case and direction of one operation; bars in brackets, what was not timed below."""
    row = _maxsim_row if report["operation"] == "maxsim" else _attention_row
    rows = [HEADINGS[report["operation"]]]
    rows += [
        row(case, direction, summary) for case in report["cases"] for direction, summary in case["summary"].items()
    ]
    text = f"{report['operation']}, {report['dtype']}, medians (bars in brackets)\n{align(rows)}"
    return "\n".join([text, *_ceilings(report), *_compiled(report), *_yardsticks(report), *_problems(report)])


def _ceilings(report: dict[str, Any]) -> list[str]:
    lines = []
    for kind, ceilings in report["ceilings"].items():
        if ceilings:
            rates = f"{ceilings['flops'] / 1e12:.0f} TFLOP/s, {ceilings['bandwidth'] / 1e12:.2f} TB/s"
            lines.append(f"  ceilings {kind}: {rates} ({ceilings['source']})")
    return lines


def _compiled(report: dict[str, Any]) -> list[str]:
    """How many cases met torch.compile in which mode."""
    modes = [mode for case in report["cases"] for mode in case["compiled_modes"]]
    counts = ", ".join(f"{mode} in {modes.count(mode)}" for mode in dict.fromkeys(modes))
    return [f"  torch.compile of {len(report['cases'])} cases: {counts or 'none'}"] if report["cases"] else []


def _yardsticks(report: dict[str, Any]) -> list[str]:
    """Plain torch, and dense causal attention, which is another function: milliseconds of each attention case."""
    if report["operation"] != "attention":
        return []
    lines = []
    for case in report["cases"]:
        kinds = {"plain torch": "torch", "dense causal": "sdpa-dense"}
        found = {kind: _fastest(case, prefix) for kind, prefix in kinds.items()}
        parts = [f"{kind} {times}" for kind, times in found.items() if times]
        lines += [f"  {case['case']}: {'; '.join(parts)}"] if parts else []
    return ["  ms of fwd / bwd / fwd+bwd", *lines] if lines else []


def _fastest(case: dict[str, Any], prefix: str) -> str:
    """ "1.0 / 2.0 / 3.1": the least of all candidates of that kind, by direction; "" when none was timed."""
    records = [record for name, record in case["candidates"].items() if name.startswith(prefix)]
    times = [
        min((record[direction]["median"] for record in records if direction in record), default=None)
        for direction in case["summary"]
    ]
    return " / ".join(_number(milliseconds) for milliseconds in times) if any(times) else ""


def _problems(report: dict[str, Any]) -> list[str]:
    """Ours in full, a line for each kind of problem of the others."""
    ours: list[str] = []
    others: dict[tuple[str, str], list[str]] = {}
    for case in report["cases"]:
        for name, record in case["candidates"].items():
            if "problem" not in record:
                continue
            if name == "jmlr":
                ours.append(f"  {case['case']}: jmlr is not timed: {record['problem'][:160]}")
            else:
                others.setdefault((name, record["problem"][:60]), []).append(case["case"])
    lines = ours + [
        f"  {name} is not timed in {len(cases)} ({cases[0]}...): {problem}" for (name, problem), cases in others.items()
    ]
    if report["left_out"]:
        lines.append(f"  no time left for: {'; '.join(report['left_out'])}")
    return lines


def phase_table(phases: list[dict[str, Any]]) -> str:
    """One row for each phase: outcome, seconds, what there is to say."""
    rows = [["phase", "outcome", "seconds"]]
    rows += [[phase["name"], phase["outcome"], f"{phase['seconds']:.0f}"] for phase in phases]
    lines = align(rows).split("\n")
    return "\n".join([lines[0], *(f"{line}  {phase['detail']}" for line, phase in zip(lines[1:], phases, strict=True))])

"""What a run prints, in a terminal and outside one."""

from __future__ import annotations

import io
import math

import pytest

from jmlr.console import ProgressLine, duration, format_interval, format_table, print_table
from jmlr.evaluate import Interval, SummaryRow


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("jmlr.console.time.monotonic", lambda: now[0])
    return now


def test_outside_a_terminal_lines_are_plain_and_rare(clock: list[float]) -> None:
    stream = io.StringIO()
    with ProgressLine(400, "joint", stream=stream) as progress:
        for step in range(1, 401):
            clock[0] += 0.25
            progress.update(step, llm_loss=1 / step, rank_loss=0.5, recall_at_1=0.5 if step % 50 == 0 else None)
    text = stream.getvalue()
    lines = text.splitlines()
    assert "\r" not in text and "\x1b" not in text and "\b" not in text
    # 100 seconds at one line per 10 seconds; the last line falls on the end and is not repeated.
    assert len(lines) == 10
    assert lines[0] == "joint: step 40/400, 0:10 elapsed, 1:30 left, llm loss 0.025, rank loss 0.500"
    assert lines[1].endswith("rank loss 0.500, recall@1 0.50")
    assert lines[-1].startswith("joint: step 400/400, 1:40 elapsed, llm loss 0.003")


def test_the_last_state_is_printed_even_of_a_short_run(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = ProgressLine(3, stream=stream)
    progress.update(2, llm_loss=math.nan)
    progress.close()
    progress.close()
    assert stream.getvalue() == "training: step 2/3, 0:00 elapsed, 0:00 left, llm loss nan\n"


def test_nothing_done_prints_nothing() -> None:
    stream = io.StringIO()
    ProgressLine(3, stream=stream).close()
    assert stream.getvalue() == ""


def test_steps_before_a_resume_do_not_count_as_speed(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = ProgressLine(400, stream=stream, initial=300)
    clock[0] += 20
    progress.update(320)
    assert stream.getvalue() == "training: step 320/400, 0:20 elapsed, 1:20 left\n"


def test_notes_stand_on_lines_of_their_own() -> None:
    stream = io.StringIO()
    ProgressLine(3, stream=stream).note("index refreshed")
    assert stream.getvalue() == "index refreshed\n"


def test_a_terminal_gets_one_bar_with_time_left_and_all_measures() -> None:
    stream = Terminal()
    with ProgressLine(20, "joint", stream=stream) as progress:
        progress.update(10, llm_loss=1.25, rank_loss=0.5, recall_at_1=0.5, recall_at_7=0.75)
        progress.note("index refreshed")
        progress.update(20)
    text = stream.getvalue()
    assert "\r" in text and "index refreshed\n" in text
    last = text.split("\r")[-1]
    assert "joint: 100%" in last and "20/20" in last
    assert "llm loss 1.250, rank loss 0.500, recall@1 0.50, recall@7 0.75" in last


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with ProgressLine(2, stream=stream) as progress:
        progress.update(2)
    assert stream.getvalue() == "training: step 2/2, 0:00 elapsed\n"


def test_durations() -> None:
    assert [duration(s) for s in (0, 9.6, 65, 3599.6, 7384)] == ["0:00", "0:10", "1:05", "1:00:00", "2:03:04"]


def row(label: str, accuracy: Interval, recall: Interval | None) -> SummaryRow:
    return SummaryRow(label, label, "", 426, 142, accuracy, Interval(-0.5, -0.6, -0.4), recall, recall)


def test_table_is_aligned_and_ascii() -> None:
    rows = [
        row("Closed-book", Interval(0.5, 0.25, 0.75), None),
        row("Joint", Interval(0.72, math.nan, math.nan), Interval(0.9, 0.85, 0.95)),
    ]
    text = format_table(rows)
    assert text.isascii()
    header, rule, first, second = text.splitlines()
    assert header.split("  ")[0] == "system" and "accuracy [95% CI]" in header
    column = header.index("accuracy")
    assert rule[column - 2 : column + 1] == "  -"
    assert first[column:].startswith("0.50 [0.25, 0.75]") and second[column:].startswith("0.72  ")
    column = header.index("recall@1")
    assert first[column:].split() == ["-", "-"] and second[column:].startswith("0.90 [0.85, 0.95]")


def test_printed_table_says_over_what_the_intervals_are() -> None:
    stream = io.StringIO()
    print_table([row("Joint", Interval(0.5, 0.4, 0.6), None)], confidence=0.9, stream=stream)
    assert "accuracy [90% CI]" in stream.getvalue()
    assert stream.getvalue().endswith("426 questions on 142 topics; intervals by bootstrap over topics.\n")


def test_undefined_means_print_as_a_dash() -> None:
    assert format_interval(None) == format_interval(Interval(math.nan, math.nan, math.nan)) == "-"

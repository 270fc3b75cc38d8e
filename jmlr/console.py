"""What a run prints: one line of progress, and the results table.

In a terminal the progress is a bar that redraws itself. Anywhere else (CI, `tee`, a log file) it is a plain line every
few seconds, without carriage returns or escape codes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from jmlr.evaluate import Interval, SummaryRow


class ProgressLine:
    """Steps done, time left, both losses and the retriever's recall.

    Args:
        total: number of the last step.
        description: what is being trained, in a word or two.
        initial: steps that were done before (a resumed run); they do not count towards the speed.
        stream: where to write, `sys.stdout` unless given.
        seconds_between_lines: outside a terminal, the least time between two lines.

    `update` keeps the values that it is not given, so that a loss measured every step and a recall measured every
    fiftieth stand side by side.
    """

    def __init__(
        self,
        total: int,
        description: str = "training",
        *,
        initial: int = 0,
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        self._total = total
        self._description = description
        self._initial = initial
        self._step = initial
        self._stream = sys.stdout if stream is None else stream
        self._seconds_between_lines = seconds_between_lines
        self._values: dict[str, str] = {}
        self._start = time.monotonic()
        self._printed_at = self._start
        self._printed: tuple[int, str] | None = None
        self._bar = None
        self._closed = False
        if is_terminal(self._stream):
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=initial, desc=description, unit="step", file=self._stream, dynamic_ncols=True
            )

    def update(
        self,
        step: int,
        *,
        llm_loss: float | None = None,
        rank_loss: float | None = None,
        recall_at_1: float | None = None,
        recall_at_7: float | None = None,
    ) -> None:
        """Steps finished so far, and whatever was measured since the last call. Losses in nats, recall in 0..1."""
        new = {"llm loss": llm_loss, "rank loss": rank_loss, "recall@1": recall_at_1, "recall@7": recall_at_7}
        for name, value in new.items():
            if value is not None:
                self._values[name] = f"{float(value):.2f}" if name.startswith("recall") else f"{float(value):.3f}"
        advanced, self._step = step - self._step, step
        if self._bar is not None:
            self._bar.set_postfix_str(self._measures(), refresh=False)
            self._bar.update(advanced)
        elif time.monotonic() - self._printed_at >= self._seconds_between_lines:
            self._print_line()

    def note(self, message: str) -> None:
        """Print a line of its own (an index refresh, a checkpoint) without tearing the bar."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        elif self._printed != (self._step, self._measures()) and self._step > self._initial:
            self._print_line()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _measures(self) -> str:
        order = ("llm loss", "rank loss", "recall@1", "recall@7")
        return ", ".join(f"{name} {self._values[name]}" for name in order if name in self._values)

    def _print_line(self) -> None:
        now = time.monotonic()
        elapsed, done = now - self._start, self._step - self._initial
        parts = [f"{self._description}: step {self._step}/{self._total}", f"{duration(elapsed)} elapsed"]
        if done > 0 and self._step < self._total:
            parts.append(f"{duration(elapsed / done * (self._total - self._step))} left")
        if self._values:
            parts.append(self._measures())
        print(", ".join(parts), file=self._stream, flush=True)
        self._printed_at, self._printed = now, (self._step, self._measures())


def is_terminal(stream: TextIO) -> bool:
    """Whether a line on `stream` can be redrawn in place."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def duration(seconds: float) -> str:
    """`1:05` for minutes and seconds, `2:03:04` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_interval(interval: Interval | None, digits: int = 2) -> str:
    """`0.72 [0.66, 0.78]`; the mean alone where there is no interval; `-` where nothing was measured."""
    if interval is None or interval.mean != interval.mean:
        return "-"
    mean = f"{interval.mean:.{digits}f}"
    if interval.low != interval.low:
        return mean
    return f"{mean} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def format_table(rows: Sequence[SummaryRow], confidence: float = 0.95) -> str:
    """The results table as aligned ASCII: system, accuracy, answer log-likelihood, recall@1, recall@7."""
    header = ("system", f"accuracy [{confidence * 100:g}% CI]", "answer log-likelihood", "recall@1", "recall@7")
    cells = [
        (
            row.label,
            format_interval(row.accuracy),
            format_interval(row.log_likelihood),
            format_interval(row.recall_at_1),
            format_interval(row.recall_at_7),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, tuple("-" * width for width in widths), *cells]
    ]
    return "\n".join(lines)


def print_table(rows: Sequence[SummaryRow], confidence: float = 0.95, stream: TextIO | None = None) -> None:
    """Print `format_table`, and under it over what the intervals were taken."""
    stream = sys.stdout if stream is None else stream
    print(format_table(rows, confidence), file=stream)
    sizes = {(row.questions, row.clusters) for row in rows}
    if len(sizes) == 1:
        from jmlr.evaluate.results import sample_size

        print(f"{sample_size(*next(iter(sizes)))}; intervals by bootstrap over topics.", file=stream)
    stream.flush()

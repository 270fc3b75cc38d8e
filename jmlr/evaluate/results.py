"""What one system did on every question, the rows of the results table, and the comparison of two systems."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .statistics import Interval, McNemar, PairedDifference, mcnemar, mean_interval, paired_difference

_UNDEFINED = Interval(math.nan, math.nan, math.nan)


@dataclass
class SystemResult:
    """One system's answers, question by question; the lists run parallel.

    Attributes:
        name: key used by programs, such as "joint", "rag", "closed-book".
        label: what tables print.
        description: one sentence on what was run.
        questions: ids, each once.
        clusters: per question, what was sampled (the condition); wordings of one question share it.
        correct: whether the option chosen was the right one.
        log_likelihood: of the gold answer, in nats (whether summed or averaged over tokens is the caller's choice, and
            the same for all systems).
        recall_at_1, recall_at_7: per question, 0..1, NaN where no supporting passage is known; None without retrieval.
        extra: anything else that JSON can hold.

    Raises:
        ValueError: no questions, lists of different lengths, a question listed twice.
    """

    name: str
    label: str
    description: str
    questions: list[str]
    clusters: list[str]
    correct: list[bool]
    log_likelihood: list[float]
    recall_at_1: list[float] | None = None
    recall_at_7: list[float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.correct = [bool(value) for value in self.correct]
        self.log_likelihood = _floats(self.log_likelihood)
        self.recall_at_1 = None if self.recall_at_1 is None else _floats(self.recall_at_1)
        self.recall_at_7 = None if self.recall_at_7 is None else _floats(self.recall_at_7)
        if not self.questions:
            raise ValueError(f"system {self.name!r} answered no question: there is nothing to evaluate")
        for name in ("clusters", "correct", "log_likelihood", "recall_at_1", "recall_at_7"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.questions):
                raise ValueError(
                    f"system {self.name!r}: {name} has {len(values)} entries for {len(self.questions)} questions"
                )
        if len(set(self.questions)) != len(self.questions):
            twice = next(q for i, q in enumerate(self.questions) if q in self.questions[:i])
            raise ValueError(f"system {self.name!r}: question {twice!r} is listed twice; give each variant its own id")

    def to_dict(self) -> dict[str, Any]:
        """Plain types for strict JSON: numbers that are not finite become None."""
        return json_ready(asdict(self))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SystemResult:
        """The inverse of `to_dict`, except that numbers that were not finite come back as NaN.

        Raises:
            ValueError: a missing or unknown key, or contents that the constructor rejects.
        """
        known = {entry.name for entry in fields(cls)}
        optional = {"recall_at_1", "recall_at_7", "extra"}
        missing, unknown = sorted(known - optional - set(record)), sorted(set(record) - known)
        if missing or unknown:
            wrong = [f"{key} is missing" for key in missing] + [f"{key} is unknown" for key in unknown]
            raise ValueError(f"not a record of a system's results: {', '.join(wrong)}; evaluate the run again")
        return cls(**record)

    @classmethod
    def from_json(cls, text: str) -> SystemResult:
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a system's results are not valid JSON ({error}); evaluate the run again") from error
        if not isinstance(record, dict):
            raise ValueError(f"a system's results must be one JSON object, got {type(record).__name__}")
        return cls.from_dict(record)


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One row of the results table. `recall_*` is None for a system without retrieval, or without known support."""

    name: str
    label: str
    description: str
    questions: int
    clusters: int
    accuracy: Interval
    log_likelihood: Interval
    recall_at_1: Interval | None
    recall_at_7: Interval | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """System `a` minus system `b` on the same questions. Measures that either system lacks are None."""

    a: str
    b: str
    a_label: str
    b_label: str
    questions: int
    clusters: int
    confidence: float
    a_accuracy: float
    b_accuracy: float
    accuracy: PairedDifference
    log_likelihood: PairedDifference | None
    a_recall_at_1: float | None
    b_recall_at_1: float | None
    recall_at_1: PairedDifference | None
    recall_at_7: PairedDifference | None
    mcnemar: McNemar

    def sentences(self) -> list[str]:
        """The outcome in plain words, whichever way it went: one sentence on accuracy, one on recall@1 if measured."""
        where = f"On the same {sample_size(self.questions, self.clusters)}"
        ours, theirs = _percent(self.a_accuracy), _percent(self.b_accuracy)
        lines = [
            f"{where}, {self.a_label} answers {ours} right and {self.b_label} {theirs}: {self._verdict(self.accuracy)}"
        ]
        if self.recall_at_1 is not None and self.a_recall_at_1 is not None and self.b_recall_at_1 is not None:
            ours, theirs = _percent(self.a_recall_at_1), _percent(self.b_recall_at_1)
            lines.append(
                f"{_capital(self.a_label)} ranks the supporting passage first for {ours} of them and {self.b_label} "
                f"for {theirs}: {self._verdict(self.recall_at_1)}"
            )
        return lines

    def _verdict(self, difference: PairedDifference) -> str:
        points, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
        if math.isnan(low):
            interval = "no interval can be given for a single topic"
        else:
            interval = f"{self.confidence * 100:g} % interval {low:+.1f} to {high:+.1f}"
        p_value = "p < 0.001" if difference.p_value < 0.001 else f"p = {difference.p_value:.3f}"
        size = f"a difference of {points:+.1f} points for {self.a_label} ({interval}, {p_value})"
        # Where the interval and the test disagree, or the interval is missing, nothing is claimed.
        if low > 0 and difference.p_value < 1 - self.confidence:
            return f"{size}. {_capital(self.a_label)} is better, by more than chance would explain."
        if high < 0 and difference.p_value < 1 - self.confidence:
            return f"{size}. {_capital(self.b_label)} is better, by more than chance would explain."
        return f"{size}. Chance alone could explain it: neither system is shown to be better."


def summary_table(
    results: Sequence[SystemResult], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> list[SummaryRow]:
    """Means with cluster-bootstrap intervals (`mean_interval`), one row a system, in the order given.

    A log-likelihood that is not finite for some question makes its mean undefined (NaN) instead of being left out,
    which would flatter the system. Recall is averaged over the questions whose supporting passage is known.
    """

    def interval(values: list[float] | list[bool] | None, clusters: list[str], partial: bool) -> Interval | None:
        if values is None:
            return None
        vector = np.asarray(values, dtype=np.float64)
        measured = np.isfinite(vector)
        if not measured.any() and partial:
            return None
        if not measured.all() and not partial:
            return _UNDEFINED
        kept = [cluster for cluster, here in zip(clusters, measured, strict=True) if here]
        return mean_interval(vector[measured], kept, confidence, resamples, seed)

    return [
        SummaryRow(
            name=result.name,
            label=result.label,
            description=result.description,
            questions=len(result.questions),
            clusters=len(set(result.clusters)),
            accuracy=interval(result.correct, result.clusters, partial=False) or _UNDEFINED,
            log_likelihood=interval(result.log_likelihood, result.clusters, partial=False) or _UNDEFINED,
            recall_at_1=interval(result.recall_at_1, result.clusters, partial=True),
            recall_at_7=interval(result.recall_at_7, result.clusters, partial=True),
        )
        for result in results
    ]


def comparison(
    joint: SystemResult, rag: SystemResult, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Paired comparison of two systems, matched by question id: positive differences favour the first.

    Raises:
        ValueError: when the two did not answer the same questions, or disagree about a question's cluster.
    """
    places = {question: place for place, question in enumerate(rag.questions)}
    only_one = sorted(set(joint.questions) ^ set(rag.questions))
    if only_one:
        raise ValueError(
            f"{joint.name!r} and {rag.name!r} did not answer the same questions ({len(only_one)} differ, the first is "
            f"{only_one[0]!r}); evaluate both on one question set"
        )
    order = [places[question] for question in joint.questions]
    for question, cluster, place in zip(joint.questions, joint.clusters, order, strict=True):
        if cluster != rag.clusters[place]:
            raise ValueError(
                f"question {question!r} is in cluster {cluster!r} for {joint.name!r} and {rag.clusters[place]!r} for "
                f"{rag.name!r}; evaluate both on one question set"
            )
    clusters = np.asarray(joint.clusters, dtype=object)

    def paired(
        ours: Sequence[float] | None, theirs: Sequence[float] | None
    ) -> tuple[PairedDifference, NDArray[np.float64], NDArray[np.float64]] | None:
        if ours is None or theirs is None:
            return None
        a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)[order]
        both = ~(np.isnan(a) | np.isnan(b))
        if not both.any() or not np.isfinite(np.concatenate([a[both], b[both]])).all():
            return None
        a, b = a[both], b[both]
        return paired_difference(a, b, list(clusters[both]), confidence, resamples, seed=seed), a, b

    accuracy = paired(joint.correct, rag.correct)
    assert accuracy is not None  # right and wrong are always known
    likelihood = None
    if np.isfinite(joint.log_likelihood + rag.log_likelihood).all():
        likelihood = paired(joint.log_likelihood, rag.log_likelihood)
    first, seventh = paired(joint.recall_at_1, rag.recall_at_1), paired(joint.recall_at_7, rag.recall_at_7)
    return Comparison(
        a=joint.name,
        b=rag.name,
        a_label=joint.label,
        b_label=rag.label,
        questions=len(joint.questions),
        clusters=len(set(joint.clusters)),
        confidence=confidence,
        a_accuracy=float(accuracy[1].mean()),
        b_accuracy=float(accuracy[2].mean()),
        accuracy=accuracy[0],
        log_likelihood=None if likelihood is None else likelihood[0],
        a_recall_at_1=None if first is None else float(first[1].mean()),
        b_recall_at_1=None if first is None else float(first[2].mean()),
        recall_at_1=None if first is None else first[0],
        recall_at_7=None if seventh is None else seventh[0],
        mcnemar=mcnemar(joint.correct, [rag.correct[place] for place in order]),
    )


def sample_size(questions: int, clusters: int) -> str:
    """ "426 questions on 142 topics", or "426 questions" where every question is a topic of its own."""
    words = f"{questions:,} question" + ("s" if questions != 1 else "")
    if clusters == questions:
        return words
    return f"{words} on {clusters:,} topic" + ("s" if clusters != 1 else "")


def json_ready(value: Any) -> Any:
    """`value` in types of strict JSON: arrays as lists, numbers that are not finite as None, anything else as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, np.generic):
        return json_ready(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray) or hasattr(value, "tolist"):
        return json_ready(value.tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [json_ready(entry) for entry in value]
    return str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]

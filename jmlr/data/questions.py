"""Multiple-choice questions: the project's own schema, checked; publishers' layouts are in :mod:`jmlr.data.layouts`.

The project's layout is one JSON object a line: ``id``, ``question``, ``options`` (list of texts), ``answer`` (index of
the right option from 0, or its text) and, where known, ``source``, ``kind``, ``condition``, ``synonyms``, ``module``,
``supporting_passage`` (one id or a list of ids), ``rationale`` and ``split``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

from jmlr.data.corpus import Passage, embedded_source
from jmlr.data.layouts import LAYOUTS
from jmlr.data.sources import EMBEDDED_PREFIX, Record, Source, find
from jmlr.errors import UserError

EMBEDDED_QUESTIONS = {
    "ghr-train": "ghr_train.jsonl.gz",
    "ghr-test": "ghr_test.jsonl.gz",
    "openstax-train": "openstax_questions.jsonl.gz",
    "openstax-test": "openstax_questions.jsonl.gz",
}
"""Embedded question sets; those that share a file are told apart by the records' ``split``."""

RepeatedOptions = Literal["error", "keep"]


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question.

    ``answer`` indexes ``options`` from 0. ``kind`` says which wordings fit ("inheritance", "gene", ...), ``condition``
    is what the question is about, ``supporting`` holds the ids of the passages that answer it, ``module`` the textbook
    module they come from, and ``rationale`` the publisher's explanation, which must not be retrieved for its own
    question.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    source: str = ""
    kind: str = ""
    condition: str = ""
    synonyms: tuple[str, ...] = ()
    supporting: tuple[str, ...] = ()
    module: str = ""
    rationale: str = ""

    @property
    def gold(self) -> str:
        """The text of the right option."""
        return self.options[self.answer]

    @property
    def cluster(self) -> str:
        """What confidence intervals resample: questions about one condition or module are not independent."""
        return self.condition or self.module or self.id


def load_questions(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    layout: str = "jmlr",
    *,
    data_dir: str | PathLike[str] | None = None,
    repeated_ids: Literal["error", "number"] = "error",
    repeated_options: RepeatedOptions | None = None,
) -> list[Question]:
    """Read questions, all of them checked.

    Args:
        path: a file, a directory, an embedded set such as ``"embedded:ghr-train"``, or a list of these. A name may
            carry its layout in front: ``"medqa:US/test.jsonl"``.
        layout: ``"jmlr"`` or a publisher's own, one of :data:`jmlr.data.layouts.LAYOUTS`.
        data_dir: where relative paths are looked up first; see :func:`jmlr.data.sources.find`.
        repeated_ids: ``"error"``, or ``"number"`` to keep a second question of the same id as ``id#2``.
        repeated_options: ``"error"`` or ``"keep"``; by default an error in the project's layout and kept in
            publishers' sets (MedMCQA's 4,183 validation questions hold 21 of them). An answer given as text must
            name exactly one option in any case.

    Raises:
        UserError: with file and line, for a missing, empty or malformed file, a question without text, with fewer
            than two options, with repeated options, or whose answer is not among them.
    """
    if repeated_ids not in ("error", "number"):
        raise ValueError(f"repeated_ids must be 'error' or 'number', not {repeated_ids!r}")
    paths = [path] if isinstance(path, str | PathLike) else list(path)
    if not paths:
        raise UserError("no question set is named", remedy="name at least one, such as embedded:ghr-train")
    questions: list[Question] = []
    seen: dict[str, Record] = {}
    for name in paths:
        for source, question, record in _read(name, layout, data_dir, repeated_options):
            if question.id in seen:
                first = seen[question.id]
                if repeated_ids == "error":
                    raise UserError(
                        f"the question id '{question.id}' was already used at {first.file}:{first.line}",
                        file=source.name,
                        line=record.line,
                        remedy="give every question an id of its own, or set data.repeated_ids to number",
                    )
                number = 2
                while f"{question.id}#{number}" in seen:
                    number += 1
                question = replace(question, id=f"{question.id}#{number}")
            seen[question.id] = record
            questions.append(question)
    return questions


def _read(
    name: str | PathLike[str],
    layout: str,
    data_dir: str | PathLike[str] | None,
    repeated_options: RepeatedOptions | None,
) -> Iterator[tuple[Source, Question, Record]]:
    split = ""
    if isinstance(name, str):
        prefix, colon, rest = name.partition(":")
        if colon and prefix in LAYOUTS:
            layout, name = prefix, rest
    if layout not in LAYOUTS:
        raise UserError(f"'{layout}' is not a layout of questions", remedy=f"choose one of {', '.join(LAYOUTS)}")
    if isinstance(name, str) and name.startswith(EMBEDDED_PREFIX):
        sources, layout = [embedded_source(name, EMBEDDED_QUESTIONS)], "jmlr"
        split = name.rpartition("-")[2]
    else:
        sources = find(name, data_dir)
    if repeated_options is None:
        repeated_options = "error" if layout == "jmlr" else "keep"
    for source in sources:
        count = 0
        for record in LAYOUTS[layout](source):
            if split and record.fields.get("split", split) != split:
                continue
            count += 1
            yield source, _question(record, repeated_options), record
        if not count:
            raise UserError(
                "there is no question in the file",
                file=source.name,
                line=1,
                remedy=f"fill it with questions in the '{layout}' layout",
            )


def _question(record: Record, repeated_options: RepeatedOptions) -> Question:
    text = record.text("question")
    options = _options(record)
    answer = _answer(record, options)
    if repeated_options == "error" and len(set(options)) < len(options):
        repeated = next(option for option in options if options.count(option) > 1)
        raise record.error(
            f"the option '{repeated}' occurs {options.count(repeated)} times",
            "make the options differ, or set data.repeated_options to keep",
        )
    supporting = record.fields.get("supporting_passage")
    if supporting is not None and not isinstance(supporting, list):
        supporting = (record.text("supporting_passage"),)
    else:
        supporting = record.texts("supporting_passage") if supporting else ()
    return Question(
        id=record.text("id"),
        question=text,
        options=options,
        answer=answer,
        source=record.text("source", required=False),
        kind=record.text("kind", required=False),
        condition=record.text("condition", required=False),
        synonyms=record.texts("synonyms"),
        supporting=supporting,
        module=record.text("module", required=False),
        rationale=record.text("rationale", required=False),
    )


def _options(record: Record) -> tuple[str, ...]:
    options = record.fields.get("options")
    if options is None:
        raise record.error("the question has no options", "give it an 'options' list of at least two texts")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise record.error("the field 'options' is not a list of texts", "write 'options' as a JSON list of strings")
    if len(options) < 2:
        found = "no options" if not options else "only one option"
        raise record.error(f"the question has {found}", "give it at least two options")
    stripped = tuple(option.strip() for option in options)
    if not all(stripped):
        raise record.error(f"option {stripped.index('') + 1} is empty", "fill the option in, or remove it")
    return stripped


def _answer(record: Record, options: tuple[str, ...]) -> int:
    answer: Any = record.fields.get("answer")
    last = len(options) - 1
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer <= last:
            return answer
        raise record.error(
            f"the answer {answer} is not the index of one of the {len(options)} options",
            f"give an index from 0 to {last}",
        )
    if isinstance(answer, str) and answer.strip():
        matches = [index for index, option in enumerate(options) if option == answer.strip()]
        if len(matches) == 1:
            return matches[0]
        problem = "is not among the options" if not matches else f"is the text of {len(matches)} options"
        raise record.error(
            f"the answer '{answer.strip()}' {problem}",
            "give the answer as the text of exactly one option, or as its index from 0",
        )
    problem = "the question has no answer" if answer is None else "the field 'answer' is neither an index nor a text"
    raise record.error(problem, f"give the index of the right option, from 0 to {last}")


def resolve_support(questions: Iterable[Question], passages: Iterable[Passage]) -> list[Question]:
    """Find the passages of each question's textbook module or abstract, and drop supporting ids not in the corpus.

    A passage belongs to OpenStax module m45983 of the book "openstax/ap" when its id is ``openstax-ap-m45983-N``, and
    to the abstract of a PubMedQA question when its id is the question's id and ``-N``. A question for which nothing is
    found comes back with an empty ``supporting``: retrieval cannot be scored on it.
    """
    known: set[str] = set()
    groups: dict[str, list[str]] = {}
    for passage in passages:
        known.add(passage.id)
        prefix, dash, number = passage.id.rpartition("-")
        if dash and number.partition("#")[0].isdigit():
            groups.setdefault(prefix, []).append(passage.id)
    resolved = []
    for question in questions:
        supporting = tuple(identifier for identifier in question.supporting if identifier in known)
        if not question.supporting:
            group = f"{question.source.replace('/', '-')}-{question.module}" if question.module else question.id
            supporting = tuple(groups.get(group, ()))
        resolved.append(replace(question, supporting=supporting))
    return resolved

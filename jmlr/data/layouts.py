"""Readers for the files as their publishers distribute them. Each turns a file into records of the project's layout.

==============  ====================================================================================================
layout          file
==============  ====================================================================================================
``jmlr``        one JSON object a line, see :mod:`jmlr.data.questions`
``medqa``       jind11/MedQA ``questions/US/*.jsonl`` and ``4_options/*.jsonl``: ``question``, ``options`` {"A": text},
                ``answer`` (text), ``answer_idx`` (letter)
``medmcqa``     medmcqa.github.io ``{train,dev}.json``, one object a line: ``opa`` .. ``opd``, ``cop`` from **1** to 4
``medmcqa-hf``  openlifescienceai/medmcqa as JSON lines: the same fields, ``cop`` from **0** to 3
``mmlu``        hendrycks/test ``*_test.csv`` without a header: question, four options, letter
``pubmedqa``    pubmedqa/pubmedqa ``ori_pqal.json``: one object from PubMed id to ``QUESTION``, ``final_decision``
``amboss``      AMBOSS questions, which are private, exported as one JSON object a line: ``question``, ``options``
                ({"A": text} or a list), ``answer`` (letter), and if known ``id``, ``difficulty``, ``explanation``
==============  ====================================================================================================

MedMCQA's two releases number the right option differently, and a file of one read as the other is mostly valid: the
layout must be named, and a value that only the other release can hold is an error.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from jmlr.data.sources import Record, Source
from jmlr.errors import UserError

_LETTERS = "ABCDEFGHIJ"


def _jmlr(source: Source) -> Iterator[Record]:
    yield from source.records()


def _medqa(source: Source) -> Iterator[Record]:
    for number, record in enumerate(source.records()):
        options, letters = _lettered_options(record)
        answer: int | str | None = None
        if record.fields.get("answer_idx") is not None:
            answer = _letter_index(record, "answer_idx", letters)
            text = record.text("answer", required=False)
            if text and text != options[answer].strip():
                raise record.error(
                    f"the answer '{text}' is not the option '{options[answer]}' that answer_idx points to",
                    "correct one of the two",
                )
        else:
            answer = record.text("answer")
        yield _record(
            record,
            id=record.text("id", required=False) or f"medqa-{_stem(source)}-{number}",
            question=record.fields.get("question"),
            options=options,
            answer=answer,
            source="medqa",
        )


def _medmcqa(source: Source, first: int) -> Iterator[Record]:
    other = "medmcqa-hf" if first == 1 else "medmcqa"
    for number, record in enumerate(source.records()):
        options = [record.text(field) for field in ("opa", "opb", "opc", "opd")]
        cop = record.fields.get("cop")
        if isinstance(cop, str) and cop.strip().isdigit():
            cop = int(cop)
        if not isinstance(cop, int) or isinstance(cop, bool) or cop < 0:
            raise record.error(
                "the question has no right option in 'cop'",
                "use the train or dev file: the publishers keep the test answers to themselves",
            )
        if not first <= cop <= first + 3:
            raise record.error(
                f"'cop' is {cop}, but this release counts the options from {first} to {first + 3}",
                f"read the file with the layout {other}",
            )
        yield _record(
            record,
            id=record.text("id", required=False) or f"medmcqa-{_stem(source)}-{number}",
            question=record.fields.get("question"),
            options=options,
            answer=cop - first,
            source="medmcqa",
            rationale=record.text("exp", required=False),
        )


def _mmlu(source: Source) -> Iterator[Record]:
    # A quoted cell may span lines, so the reader counts them.
    reader = csv.reader(io.StringIO(source.read(), newline=""))
    start = 1
    for number, row in enumerate(reader):
        line, start = start, reader.line_num + 1
        if not row:
            continue
        record = Record({"cells": row}, source.name, line)
        if len(row) != 6:
            raise record.error(
                f"the row has {len(row)} cells, not 6", "write question, four options and the letter of the right one"
            )
        if number == 0 and row[-1].strip().lower() == "answer":
            continue
        letter = row[5].strip()
        if letter not in ("A", "B", "C", "D"):
            raise record.error(f"the answer '{letter}' is not among the options", "give one of the letters A to D")
        yield _record(
            record,
            id=f"mmlu-{_stem(source)}-{number}",
            question=row[0],
            options=row[1:5],
            answer="ABCD".index(letter),
            source="mmlu",
        )


def _pubmedqa(source: Source) -> Iterator[Record]:
    text = source.read()
    try:
        articles = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise UserError(
            f"the file is not valid JSON ({error.msg} at column {error.colno})",
            file=source.name,
            line=error.lineno,
            remedy="copy or download the file again",
        ) from None
    if not isinstance(articles, dict):
        raise UserError(
            "the file is not one JSON object from PubMed id to question",
            file=source.name,
            line=1,
            remedy="use ori_pqal.json as published",
        )
    lines = {match[1]: text.count("\n", 0, match.start()) + 1 for match in re.finditer(r'"(\d+)"\s*:\s*\{', text)}
    options = ["yes", "no", "maybe"]
    for pmid, fields in articles.items():
        record = Record(fields if isinstance(fields, dict) else {}, source.name, lines.get(pmid, 1))
        yield _record(
            record,
            id=f"pubmedqa-{pmid}",
            question=record.text("QUESTION"),
            options=options,
            answer=record.text("final_decision"),
            source="pubmedqa",
            rationale=record.text("LONG_ANSWER", required=False),
        )


def _amboss(source: Source) -> Iterator[Record]:
    for number, record in enumerate(source.records()):
        options, letters = _lettered_options(record)
        yield _record(
            record,
            id=record.text("id", required=False) or f"amboss-{number}",
            question=record.fields.get("question"),
            options=options,
            answer=_letter_index(record, "answer", letters),
            source="amboss",
            kind=record.text("difficulty", required=False),
            rationale=record.text("explanation", required=False),
        )


LAYOUTS: dict[str, Callable[[Source], Iterator[Record]]] = {
    "jmlr": _jmlr,
    "medqa": _medqa,
    "medmcqa": lambda source: _medmcqa(source, first=1),
    "medmcqa-hf": lambda source: _medmcqa(source, first=0),
    "mmlu": _mmlu,
    "pubmedqa": _pubmedqa,
    "amboss": _amboss,
}


def _record(origin: Record, **fields: Any) -> Record:
    return Record(fields, origin.file, origin.line)


def _lettered_options(record: Record) -> tuple[list[str], list[str]]:
    options = record.fields.get("options")
    if isinstance(options, dict) and options:
        letters = sorted(options)
        texts = [options[letter] for letter in letters]
    elif isinstance(options, list) and options:
        letters, texts = list(_LETTERS[: len(options)]), options
    else:
        raise record.error("the question has no options", 'write "options" as {"A": "...", "B": "..."}')
    if not all(isinstance(text, str) for text in texts):
        raise record.error("an option is not a text", "write every option as a JSON string")
    return texts, letters


def _letter_index(record: Record, field: str, letters: list[str]) -> int:
    letter = record.text(field)
    if letter not in letters:
        raise record.error(
            f"the answer '{letter}' is not among the options {', '.join(letters)}", f"give one of them in '{field}'"
        )
    return letters.index(letter)


def _stem(source: Source) -> str:
    name = source.name.replace("\\", "/").rpartition("/")[2]
    return name.partition(".")[0]

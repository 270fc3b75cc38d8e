"""Passages to retrieve from: one JSON object a line with ``id``, ``title``, ``text`` and an attribution."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Literal

from jmlr.data.sources import EMBEDDED_PREFIX, Record, Source, find
from jmlr.errors import UserError

EMBEDDED_CORPORA = {"ghr": "ghr_passages.jsonl.gz", "openstax": "openstax_passages.jsonl.gz"}


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable text of about 140 words and where it comes from."""

    id: str
    title: str
    text: str
    source: str = ""
    url: str = ""
    license: str = ""


def load_corpus(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    data_dir: str | PathLike[str] | None = None,
    repeated_ids: Literal["error", "number"] = "error",
) -> list[Passage]:
    """Read passages, all of them checked.

    Args:
        path: a ``.jsonl`` or ``.jsonl.gz`` file, a directory of such files, ``"embedded:ghr"`` or
            ``"embedded:openstax"``, or a list of these; order is kept.
        data_dir: where relative paths are looked up first; see :func:`jmlr.data.sources.find`.
        repeated_ids: ``"error"``, or ``"number"`` to keep a second passage of the same id as ``id#2`` (MedQuAD cuts
            several documents under one id).

    Raises:
        UserError: with file and line, for a missing, empty, truncated or malformed file, a record without id, title
            or text, or an id that occurs twice.
    """
    if repeated_ids not in ("error", "number"):
        raise ValueError(f"repeated_ids must be 'error' or 'number', not {repeated_ids!r}")
    paths = [path] if isinstance(path, str | PathLike) else list(path)
    if not paths:
        raise UserError("no corpus is named", remedy="name at least one under data.corpora, such as embedded:ghr")
    passages: list[Passage] = []
    first_seen: dict[str, Record] = {}
    copies: dict[str, int] = {}
    for name in paths:
        for source in _sources(name, data_dir):
            before = len(passages)
            for record in source.records():
                passage = _passage(record)
                if passage.id in first_seen:
                    if repeated_ids == "error":
                        raise _repeated(record, first_seen[passage.id], passage.id)
                    passage = replace(passage, id=_next_free(passage.id, copies, first_seen))
                first_seen[passage.id] = record
                passages.append(passage)
            if len(passages) == before:
                raise UserError(
                    "the corpus is empty", file=source.name, line=1, remedy="put one passage a line into the file"
                )
    return passages


def corpus_hash(passages: Iterable[Passage]) -> str:
    """SHA-256 (hexadecimal) over ids, titles and texts in order: what an index was built from."""
    digest = hashlib.sha256()
    for passage in passages:
        for part in (passage.id, passage.title, passage.text):
            encoded = part.encode()
            # The length keeps ("ab", "c") and ("a", "bc") apart.
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def _sources(name: str | PathLike[str], data_dir: str | PathLike[str] | None) -> list[Source]:
    if isinstance(name, str) and name.startswith(EMBEDDED_PREFIX):
        return [embedded_source(name, EMBEDDED_CORPORA)]
    return find(name, data_dir)


def embedded_source(name: str, known: dict[str, str]) -> Source:
    """The embedded slice called ``name``, one of ``known``.

    Raises:
        UserError: there is none of that name.
    """
    key = name.removeprefix(EMBEDDED_PREFIX)
    if key not in known:
        choices = ", ".join(EMBEDDED_PREFIX + choice for choice in known)
        raise UserError(f"'{name}' is not an embedded data set", remedy=f"choose one of {choices}")
    return Source(name, None, known[key])


def _passage(record: Record) -> Passage:
    return Passage(
        id=record.text("id"),
        title=record.text("title"),
        text=record.text("text"),
        source=record.text("source", required=False),
        url=record.text("url", required=False),
        license=record.text("license", required=False),
    )


def _repeated(record: Record, first: Record, identifier: str) -> UserError:
    return record.error(
        f"the passage id '{identifier}' was already used at {first.file}:{first.line}",
        "give every passage an id of its own, or set data.repeated_ids to number",
    )


def _next_free(identifier: str, copies: dict[str, int], taken: dict[str, Record]) -> str:
    number = copies.get(identifier, 1)
    while True:
        number += 1
        candidate = f"{identifier}#{number}"
        if candidate not in taken:
            copies[identifier] = number
            return candidate

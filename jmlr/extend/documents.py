"""Long documents out of short passages: sections in their order, joined until they are long enough.

Torch-free, so that bad input is told within a second. Two things decide whether a long context can help at all, and
whether a measured gain is real: the text must run on (neighbouring sections of one book, never shuffled passages), and
nothing may stand twice. Neighbouring passages of a corpus may share words (OpenStax is cut with an overlap of twenty):
a shared end is dropped, or a model would be praised for copying the last line.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jmlr.data.corpus import Passage, load_corpus
from jmlr.errors import UserError
from jmlr.extend.config import DocumentConfig

SHORTEST_OVERLAP = 8
"""Words that two neighbours must share, end to start, to count as cut with an overlap; fewer may be chance."""

_NUMBER = re.compile(r"[-#]\d+$")


@dataclass(frozen=True)
class Document:
    """Running text: whole sections of one book, in order."""

    id: str  # of its first passage
    book: str
    text: str
    passages: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Documents to train on and to evaluate on; no section is in both."""

    train: list[Document]
    held_out: list[Document]


def load_documents(config: DocumentConfig) -> Split:
    """Read the corpora, join their passages and hold a part of every book out.

    The held-out documents are the same for every seed: runs are compared on one test set.

    Raises:
        UserError: with file and line, for a mistake in the files; too few documents to hold any out.
    """
    passages = load_corpus(config.corpora, data_dir=config.data_dir, repeated_ids=config.repeated_ids)
    documents = join(passages, config.document_words)
    books: dict[str, list[int]] = {}
    for number, document in enumerate(documents):
        books.setdefault(document.book, []).append(number)
    held: set[int] = set()
    for book, numbers in books.items():
        held.update(random.Random(f"held out of {book}").sample(numbers, round(len(numbers) * config.held_out)))
    if not held or len(held) == len(documents):
        raise UserError(
            f"of {len(documents)} documents in {len(books)} books, a share of {config.held_out:g} leaves none to "
            f"{'evaluate' if not held else 'train'} on (data.held_out)",
            file=", ".join(config.corpora),
            remedy="lower data.document_words, change data.held_out, or give more text",
        )
    return Split(
        train=[document for number, document in enumerate(documents) if number not in held],
        held_out=[document for number, document in enumerate(documents) if number in held],
    )


def join(passages: Sequence[Passage], words: int) -> list[Document]:
    """Passages in corpus order -> documents of at least `words` words, of whole sections of one book.

    A section is a run of passages whose ids differ in a last number only (``openstax-ap-m46034-0``, ``-1``, ...), or
    that share a title. A book is what stands behind the last dash of a title ("Cardiac Physiology — Anatomy and
    Physiology 2e"), else the source. What is left at a book's end joins its last document.
    """
    documents: list[Document] = []
    pending: list[Passage] = []
    size = 0
    sections = _sections(passages)
    for number, section in enumerate(sections):
        pending += section
        size += sum(len(passage.text.split()) for passage in section)
        book = _book(section[0])
        ends = number + 1 == len(sections) or _book(sections[number + 1][0]) != book
        if size < words and not ends:
            continue
        text, ids = _running_text(pending), tuple(passage.id for passage in pending)
        if size < words and documents and documents[-1].book == book:
            last = documents.pop()
            text, ids = f"{last.text}\n\n{text}", (*last.passages, *ids)
        documents.append(Document(ids[0], book, text, ids))
        pending, size = [], 0
    return documents


def overlap(before: str, after: str) -> int:
    """The number of words that end one text and begin the next: the most, at least ``SHORTEST_OVERLAP``, else 0."""
    left, right = before.split(), after.split()
    sizes = range(min(len(left), len(right)), SHORTEST_OVERLAP - 1, -1)
    return next((size for size in sizes if left[-size:] == right[:size]), 0)


def _sections(passages: Sequence[Passage]) -> list[list[Passage]]:
    sections: list[list[Passage]] = []
    for passage in passages:
        if sections and _section(sections[-1][-1]) == _section(passage):
            sections[-1].append(passage)
        else:
            sections.append([passage])
    return sections


def _section(passage: Passage) -> tuple[str, str]:
    stem = _NUMBER.sub("", passage.id)
    return _book(passage), stem if stem != passage.id else passage.title


def _book(passage: Passage) -> str:
    return passage.title.rpartition(" — ")[2] if " — " in passage.title else passage.source


def _running_text(passages: Sequence[Passage]) -> str:
    """One line a section, so that a tokenizer sees where the next begins."""
    text, before = "", None
    for passage in passages:
        if before is not None and _section(before) == _section(passage):
            rest = passage.text.split()[overlap(before.text, passage.text) :]
            text += " " + " ".join(rest)
        else:
            text += ("\n\n" if text else "") + " ".join(passage.text.split())
        before = passage
    return text

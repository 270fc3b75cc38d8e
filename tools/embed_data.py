"""Builds the data embedded in the package: ``python tools/embed_data.py DATA_DIRECTORY``.

The directory holds ``ghr/`` (passages, questions_train, questions_test), ``corpus/openstax`` and ``train/openstax`` as
``.jsonl.gz``. The ghr slice is taken whole. Of OpenStax it takes modules with several exam questions, in turn from
each book, with all their passages, until there are questions enough; questions are split by module. Every record
carries its source, licence and address. The output is a function of the input alone, to the byte.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Fields = dict[str, Any]

OUTPUT = Path(__file__).resolve().parents[1] / "jmlr" / "data" / "embedded"
LICENSE = "CC BY 4.0"
GHR_SOURCE = "MedQuAD (Ben Abacha and Demner-Fushman 2019) from NLM Genetics Home Reference"
BOOKS = {
    "openstax/ap": "https://openstax.org/details/books/anatomy-and-physiology-2e",
    "openstax/micro": "https://openstax.org/details/books/microbiology",
    "openstax/psych": "https://openstax.org/details/books/psychology-2e",
}
OPENSTAX_QUESTIONS = 125
LEAST_QUESTIONS = 3
TEST_SHARE = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory with ghr/, corpus/ and train/")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, records in {**ghr(arguments.data), **openstax(arguments.data)}.items():
        packed = pack(records)
        (arguments.output / f"{name}.jsonl.gz").write_bytes(packed)
        print(f"{name:20} {len(records):5} records {len(packed):8} bytes")


def ghr(data: Path) -> dict[str, list[Fields]]:
    """The genetic conditions: passages, and questions with the address of their supporting passage."""
    passages = [
        passage | {"source": GHR_SOURCE, "license": LICENSE} for passage in read(data / "ghr/passages.jsonl.gz")
    ]
    url = {passage["id"]: passage["url"] for passage in passages}
    result = {"ghr_passages": passages}
    for split in ("train", "test"):
        result[f"ghr_{split}"] = [
            question | {"source": GHR_SOURCE, "url": url[question["supporting_passage"]], "license": LICENSE}
            for question in read(data / f"ghr/questions_{split}.jsonl.gz")
        ]
    return result


def openstax(data: Path) -> dict[str, list[Fields]]:
    """A sample of textbook modules with their exam questions."""
    passages: dict[tuple[str, str], list[Fields]] = defaultdict(list)
    for passage in read(data / "corpus/openstax.jsonl.gz"):
        if passage["source"] in BOOKS:
            module = passage["id"].split("-")[2]
            passages[passage["source"], module].append(passage | {"url": BOOKS[passage["source"]]})
    questions: dict[tuple[str, str], list[Fields]] = defaultdict(list)
    taken: set[str] = set()
    for question in read(data / "train/openstax.jsonl.gz"):
        key = question["source"], question["module"]
        # Some ids name two questions, and one question repeats an option: such records stay out of a sample.
        if (
            key in passages
            and question["id"] not in taken
            and len(set(question["options"])) == len(question["options"])
        ):
            taken.add(question["id"])
            questions[key].append(question | {"url": BOOKS[question["source"]], "license": LICENSE})

    modules = choose_modules(passages, questions)
    test = held_out(modules, questions)
    return {
        "openstax_passages": [passage for module in modules for passage in passages[module]],
        "openstax_questions": [
            question | {"split": "test" if module in test else "train"}
            for module in modules
            for question in questions[module]
        ],
    }


def choose_modules(
    passages: dict[tuple[str, str], list[Fields]], questions: dict[tuple[str, str], list[Fields]]
) -> list[tuple[str, str]]:
    """Modules with a few questions each, from every book in turn, in the order of a hash."""
    queues = {
        book: sorted((m for m in questions if m[0] == book and len(questions[m]) >= LEAST_QUESTIONS), key=digest)
        for book in BOOKS
    }
    chosen: list[tuple[str, str]] = []
    while any(queues.values()):
        for queue in queues.values():
            if sum(len(questions[module]) for module in chosen) >= OPENSTAX_QUESTIONS:
                return sorted(chosen)
            if queue:
                chosen.append(queue.pop(0))
    return sorted(chosen)


def held_out(modules: list[tuple[str, str]], questions: dict[tuple[str, str], list[Fields]]) -> set[tuple[str, str]]:
    """The modules for testing."""
    wanted = TEST_SHARE * sum(len(questions[module]) for module in modules)
    test: set[tuple[str, str]] = set()
    for module in sorted(modules, key=lambda module: digest(module)[::-1]):
        if sum(len(questions[chosen]) for chosen in test) >= wanted:
            break
        test.add(module)
    return test


def digest(module: tuple[str, str]) -> str:
    """An order that neither subject nor size decides."""
    return hashlib.sha256("/".join(module).encode()).hexdigest()


def read(path: Path) -> list[Fields]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def pack(records: list[Fields]) -> bytes:
    """JSON lines, compressed without a time stamp or a file name."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as stream:
        stream.write(text.encode())
    return buffer.getvalue()


if __name__ == "__main__":
    main()

"""Loaders, wordings and the embedded data. Every malformed file is told with its line and a remedy."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jmlr.config import load
from jmlr.data.corpus import Passage, corpus_hash, load_corpus
from jmlr.data.questions import Question, load_questions, resolve_support
from jmlr.data.texts import load_texts
from jmlr.data.wordings import (
    FUNCTION_WORDS,
    WORDINGS,
    expand,
    gives_away,
    telltale_words,
    usable_synonyms,
    with_usable_synonyms,
    words,
)
from jmlr.errors import UserError

PASSAGE = {"id": "p0", "title": "Fever", "text": "Fever: overview. Fever is a rise in body temperature."}
QUESTION = {"id": "q0", "question": "What rises?", "options": ["temperature", "height"], "answer": 0}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


@pytest.fixture(scope="module")
def ghr() -> list[Passage]:
    return load_corpus("embedded:ghr")


@pytest.fixture(scope="module")
def ghr_questions(ghr: list[Passage]) -> dict[str, list[Question]]:
    return {split: resolve_support(load_questions(f"embedded:ghr-{split}"), ghr) for split in ("train", "test")}


# ---------------------------------------------------------------- embedded data


def test_ghr_is_whole(ghr: list[Passage], ghr_questions: dict[str, list[Question]]) -> None:
    assert len(ghr) == 3258
    assert Counter(passage.id[-1] for passage in ghr) == {"a": 1086, "i": 1086, "g": 1086}
    assert {split: len(questions) for split, questions in ghr_questions.items()} == {"train": 936, "test": 261}
    assert all(passage.url.startswith("https://") and passage.license and passage.source for passage in ghr)


def test_ghr_questions_are_supported_and_split_by_condition(
    ghr: list[Passage], ghr_questions: dict[str, list[Question]]
) -> None:
    titles = {passage.id: passage.title for passage in ghr}
    for question in [*ghr_questions["train"], *ghr_questions["test"]]:
        assert question.gold == question.options[question.answer]
        assert [titles[identifier] for identifier in question.supporting] == [question.condition]
    conditions = [{question.condition for question in questions} for questions in ghr_questions.values()]
    assert conditions[0].isdisjoint(conditions[1])


def test_the_gold_gene_stands_in_the_supporting_passage(
    ghr: list[Passage], ghr_questions: dict[str, list[Question]]
) -> None:
    texts = {passage.id: passage.text for passage in ghr}
    genes = [question for question in ghr_questions["test"] if question.kind == "gene"]
    found = [question.gold in texts[question.supporting[0]] for question in genes]
    assert sum(found) / len(found) > 0.95


def test_openstax_sample() -> None:
    passages = load_corpus("embedded:openstax")
    train, test = (
        resolve_support(load_questions(f"embedded:openstax-{split}"), passages) for split in ("train", "test")
    )
    assert len(train) + len(test) >= 120 and len(test) >= 25
    assert all(question.supporting for question in [*train, *test])
    assert {question.module for question in train}.isdisjoint(question.module for question in test)
    ids = {passage.id: passage for passage in passages}
    assert all(ids[i].source == question.source for question in test for i in question.supporting)
    assert all(question.module in identifier for question in test for identifier in question.supporting)
    assert all(passage.url and passage.license == "CC BY 4.0" for passage in passages)


def test_unknown_embedded_name() -> None:
    with pytest.raises(UserError, match="embedded:ghr-test"):
        load_questions("embedded:ghr")
    with pytest.raises(UserError, match="Choose one of embedded:ghr, embedded:openstax"):
        load_corpus("embedded:nothing")


def test_corpus_hash_depends_on_every_text_and_on_order(ghr: list[Passage]) -> None:
    few = ghr[:5]
    changed = [*few[:4], replace(few[4], text=few[4].text + ".")]
    moved = [replace(few[0], title=few[0].title + few[0].text[:1], text=few[0].text[1:]), *few[1:]]
    hashes = {corpus_hash(passages) for passages in (few, few[::-1], changed, moved, few[:4])}
    assert len(hashes) == 5
    assert corpus_hash(few) == corpus_hash(list(few))


# ---------------------------------------------------------------- malformed corpora


@pytest.mark.parametrize(
    ("records", "line", "message", "remedy"),
    [
        ([], 1, "the corpus is empty", "one passage a line"),
        (["", "  "], 1, "the corpus is empty", "one passage a line"),
        ([PASSAGE, "{oops"], 2, "not valid JSON", "one JSON object a line"),
        ([PASSAGE, [1]], 2, "a JSON list, not an object", "one JSON object a line"),
        ([without(PASSAGE, "text")], 1, "'text' is missing", "'text'"),
        ([without(PASSAGE, "id")], 1, "'id' is missing", "'id'"),
        (["", PASSAGE | {"text": "  "}], 2, "'text' is empty", "remove the record"),
        ([PASSAGE | {"title": ["x"]}], 1, "not text", "JSON string"),
        ([PASSAGE, PASSAGE | {"text": "other"}], 2, "'p0' was already used at", "repeated_ids"),
    ],
)
def test_malformed_corpus(tmp_path: Path, records: list[Any], line: int, message: str, remedy: str) -> None:
    file = write(tmp_path / "corpus.jsonl", records)
    with pytest.raises(UserError) as caught:
        load_corpus(file)
    assert (caught.value.file, caught.value.line) == (str(file), line)
    assert message in caught.value.message and remedy in caught.value.remedy
    assert str(caught.value).startswith(f"{file}:{line}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "corpus.jsonl.gz"
    data = gzip.compress("".join(json.dumps(PASSAGE | {"id": f"p{n}"}) + "\n" for n in range(5000)).encode())
    data = data[: len(data) // 2] if damage == "truncated" else data[:-8] + bytes(4) + data[-4:]
    file.write_bytes(data)
    with pytest.raises(UserError, match="truncated or damaged") as caught:
        load_corpus(file)
    assert caught.value.line is not None and caught.value.line > 1


def test_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(json.dumps(PASSAGE).encode() + b"\n\xff\xfe\n")
    with pytest.raises(UserError, match="corpus.jsonl:2: .*UTF-8"):
        load_corpus(file)


def test_compression_is_told_by_content_and_names_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "b.jsonl").write_bytes(gzip.compress(json.dumps(PASSAGE).encode()))
    write(tmp_path / "set" / "a.jsonl", [PASSAGE | {"id": "first"}])
    (tmp_path / "set" / "notes.txt").write_text("not data", encoding="utf-8")
    assert [p.id for p in load_corpus("set", data_dir=tmp_path)] == ["first", "p0"]
    assert [p.id for p in load_corpus(["set/b"], data_dir=tmp_path)] == ["p0"]
    monkeypatch.setenv("JMLR_DATA", str(tmp_path))
    assert [p.id for p in load_corpus("set/a.jsonl")] == ["first"]
    with pytest.raises(UserError, match="no such file under .*JMLR_DATA"):
        load_corpus("set/c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no .jsonl"):
        load_corpus("empty")
    with pytest.raises(UserError, match="no corpus is named"):
        load_corpus([])


def test_repeated_ids_can_be_numbered(tmp_path: Path) -> None:
    file = write(tmp_path / "corpus.jsonl", [PASSAGE, PASSAGE, PASSAGE | {"id": "p0#3"}, PASSAGE])
    passages = load_corpus(file, repeated_ids="number")
    assert [passage.id for passage in passages] == ["p0", "p0#2", "p0#3", "p0#4"]
    with pytest.raises(ValueError, match="repeated_ids"):
        load_corpus(file, repeated_ids="drop")  # type: ignore[arg-type]


# ---------------------------------------------------------------- malformed questions


@pytest.mark.parametrize(
    ("record", "message", "remedy"),
    [
        (without(QUESTION, "options"), "has no options", "at least two"),
        (QUESTION | {"options": []}, "has no options", "at least two"),
        (QUESTION | {"options": ["temperature"]}, "only one option", "at least two"),
        (QUESTION | {"options": "temperature"}, "not a list", "JSON list"),
        (QUESTION | {"options": ["a", " "]}, "option 2 is empty", "fill"),
        (QUESTION | {"options": ["a", "b", "a"], "answer": 1}, "'a' occurs 2 times", "repeated_options"),
        (QUESTION | {"answer": 2}, "not the index of one of the 2 options", "from 0 to 1"),
        (QUESTION | {"answer": -1}, "not the index", "from 0 to 1"),
        (QUESTION | {"answer": True}, "neither an index nor a text", "from 0 to 1"),
        (QUESTION | {"answer": "weight"}, "'weight' is not among the options", "exactly one option"),
        (without(QUESTION, "answer"), "has no answer", "from 0 to 1"),
        (QUESTION | {"question": " "}, "'question' is empty", "fill"),
        (without(QUESTION, "id"), "'id' is missing", "'id'"),
        (QUESTION | {"synonyms": "fever"}, "not a list of texts", "JSON list"),
        (QUESTION | {"id": "first"}, "'first' was already used at", "repeated_ids"),
    ],
)
def test_malformed_question(tmp_path: Path, record: dict[str, Any], message: str, remedy: str) -> None:
    file = write(tmp_path / "questions.jsonl", [QUESTION | {"id": "first"}, record])
    with pytest.raises(UserError) as caught:
        load_questions(file)
    assert (caught.value.file, caught.value.line) == (str(file), 2)
    assert message in caught.value.message and remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_no_questions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty.jsonl:1: there is no question"):
        load_questions(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError, match="no question set"):
        load_questions([])


def test_an_answer_may_be_a_text_or_an_index(tmp_path: Path) -> None:
    file = write(tmp_path / "questions.jsonl", [QUESTION | {"answer": "height"}, QUESTION | {"id": "q1", "answer": 1}])
    assert [question.gold for question in load_questions(file)] == ["height", "height"]


def test_an_answer_text_that_names_two_options_is_never_accepted(tmp_path: Path) -> None:
    record = QUESTION | {"options": ["a", "a", "b"], "answer": "a"}
    with pytest.raises(UserError, match="text of 2 options"):
        load_questions(write(tmp_path / "questions.jsonl", [record]), repeated_options="keep")
    kept = load_questions(
        write(tmp_path / "kept.jsonl", [record | {"answer": 1}]), repeated_options="keep"
    )  # as published, e.g. in MedMCQA's validation set
    assert kept[0].answer == 1


# ---------------------------------------------------------------- support


def test_support_is_found_by_id_by_module_and_by_abstract() -> None:
    passages = [
        Passage(identifier, "t", "x")
        for identifier in ("p0", "openstax-ap-m1-0", "openstax-ap-m1-1", "openstax-ap-m11-0", "pubmedqa-7-0")
    ]
    questions = [
        Question("a", "?", ("x", "y"), 0, supporting=("p0", "gone")),
        Question("b", "?", ("x", "y"), 0, source="openstax/ap", module="m1"),
        Question("pubmedqa-7", "?", ("x", "y"), 0),
        Question("c", "?", ("x", "y"), 0),
    ]
    assert [question.supporting for question in resolve_support(questions, passages)] == [
        ("p0",),
        ("openstax-ap-m1-0", "openstax-ap-m1-1"),
        ("pubmedqa-7-0",),
        (),
    ]
    assert [question.cluster for question in questions] == ["a", "m1", "pubmedqa-7", "c"]


# ---------------------------------------------------------------- wordings


def test_wordings_avoid_the_words_that_give_passages_away(ghr: list[Passage]) -> None:
    kinds = [[passage.text for passage in ghr if passage.id.endswith(kind)] for kind in "aig"]
    telltale = telltale_words(kinds)
    assert {"inheritance", "inherited", "autosomal", "recessive", "pattern", "parents", "family"} <= telltale[1]
    assert {"genes", "mutations", "instructions", "protein", "genetic"} <= telltale[2]
    for kind, splits in WORDINGS.items():
        for sentence in (sentence for sentences in splits.values() for sentence in sentences):
            said = set(words(sentence.replace("{name}", "")))
            assert not said & set().union(*telltale), (kind, sentence)
            assert not any(word.startswith(("inherit", "mutat")) or word == "gene" for word in said), sentence


def test_held_out_wordings_are_new_sentences_of_mostly_known_words() -> None:
    for splits in WORDINGS.values():
        assert len(splits["train"]) == 8 and len(splits["test"]) == 3
        assert not set(splits["train"]) & set(splits["test"])
        assert all(sentence.count("{name}") == 1 for sentences in splits.values() for sentence in sentences)
        known = set(words(" ".join(splits["train"]))) | FUNCTION_WORDS
        for sentence in splits["test"]:
            said = set(words(sentence))
            assert len(said - known) <= 2, (sentence, said - known)


def test_synonyms_that_nothing_connects_with_the_texts_are_left_out() -> None:
    passages = [
        Passage("x-i", "Tietz syndrome", "Tietz syndrome: inheritance. Also written TADS."),
        Passage("y-i", "Okihiro syndrome", "Okihiro syndrome: inheritance."),
        *(Passage(f"z{n}", f"Other{n} syndrome", f"Other{n} syndrome: overview.") for n in range(5)),
    ]
    question = Question(
        "x",
        "?",
        ("autosomal dominant", "X-linked"),
        0,
        kind="inheritance",
        condition="Tietz syndrome",
        synonyms=(
            "Tietz's disease",
            "TADS",
            "tads",
            "JPLS",
            "some syndrome",
            "Okihiro syndrome",
            "X-linked Tietz syndrome",
            "Tietz " + "very " * 10,
        ),
        supporting=("x-i",),
    )
    assert usable_synonyms(question, passages) == ("Tietz's disease", "TADS")
    assert gives_away("X-linked Tietz syndrome", question) and not gives_away("Tietz syndrome", question)


def test_a_synonym_of_two_conditions_names_neither() -> None:
    passages = [Passage(f"{n}", f"Cold fever {n}", f"Cold fever {n}: CF is cold.") for n in "ab"]
    questions = [
        Question(n, "?", ("p", "q"), 0, condition=f"Cold fever {n}", synonyms=("CF", f"fever {n}"), supporting=(n,))
        for n in "ab"
    ]
    assert [q.synonyms for q in with_usable_synonyms(questions, passages)] == [("fever a",), ("fever b",)]


def test_expand_is_deterministic_and_independent_of_the_other_questions(
    ghr_questions: dict[str, list[Question]], ghr: list[Passage]
) -> None:
    questions = with_usable_synonyms(ghr_questions["test"][:40], ghr)
    first = expand(questions, wordings="train", per_question=8, seed=3)
    assert first == expand(questions, wordings="train", per_question=8, seed=3)
    assert first[-8:] == expand(questions[-1:], wordings="train", per_question=8, seed=3)[-8:]
    assert first != expand(questions, wordings="train", per_question=8, seed=4)
    assert len({question.id for question in first}) == len(first)


def test_expand_uses_every_wording_before_any_twice(ghr_questions: dict[str, list[Question]]) -> None:
    question = replace(ghr_questions["test"][0], condition="achromatopsia", synonyms=("rod monochromatism",))
    variants = expand([question], wordings="test", names="all", per_question=100)
    sentences = [variant.question for variant in variants]
    assert len(set(sentences)) == len(sentences) == 2 * 3  # names x wordings
    shapes = [text.replace("rod monochromatism", "{}").replace("achromatopsia", "{}") for text in sentences]
    assert len(set(shapes[:3])) == 3
    assert {variant.condition for variant in variants} == {"achromatopsia"}
    assert {variant.gold for variant in variants} == {question.gold}
    for names, wanted in (("title", "achromatopsia"), ("synonyms", "rod monochromatism")):
        assert all(
            wanted in variant.question
            for variant in expand([question], wordings="test", names=names, per_question=9)  # type: ignore[arg-type]
        )


def test_expand_keeps_names_that_answer_the_question_out() -> None:
    question = Question("x", "?", ("X-linked", "not inherited"), 0, "", "inheritance", "X-linked ataxia", ("ataxia",))
    assert {v.question.count("linked") for v in expand([question], wordings="train", per_question=99)} == {0}
    alone = replace(question, synonyms=())
    assert all("X-linked ataxia" in v.question for v in expand([alone], wordings="train", per_question=99))


def test_expand_leaves_questions_without_wordings_alone() -> None:
    question = Question("x", "What?", ("a", "b"), 0, module="m1")
    assert expand([question], wordings="train", per_question=5) == [question]
    with pytest.raises(ValueError, match="per_question"):
        expand([question], wordings="train", per_question=0)


# ---------------------------------------------------------------- the texts of a run


def test_texts_of_a_run_keep_train_probe_and_test_apart(tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "recipe.yaml",
        ["data: {kinds: [inheritance], wordings_per_question: 2, probe_fraction: 0.2, max_test_questions: 50}"],
    )
    texts = load_texts(load(recipe))
    groups = [{question.condition for question in part} for part in (texts.train, texts.probe, texts.test)]
    assert all(one.isdisjoint(other) for n, one in enumerate(groups) for other in groups[:n])
    assert len(groups[1]) == round(0.2 * (len(groups[0]) + len(groups[1]))) and len(groups[2]) == 50
    assert texts.test == load_texts(load(recipe, ["seed=5"])).test  # seeds are compared on one test set
    assert texts.passage_ids[0] == texts.passages[0].id and texts.corpus_hash == corpus_hash(texts.passages)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.test=[embedded:ghr-train]", "also trained on"),
        ("data.kinds=[inheritence]", "no question is of the kind 'inheritence'.* gene, inheritance"),
        ("data.corpora=[embedded:gr]", "not an embedded data set"),
    ],
)
def test_contradictory_data(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_texts(load(write(tmp_path / "recipe.yaml", ["name: x"]), [setting]))

"""Publishers' layouts, each on a small file of the documented shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jmlr.data.questions import load_questions
from jmlr.errors import UserError

MEDQA = {
    "question": "Which drug?",
    "answer": "Ceftriaxone",
    "options": {"A": "Gentamicin", "B": "Ciprofloxacin", "C": "Ceftriaxone", "D": "Trimethoprim", "E": "Ampicillin"},
    "meta_info": "step1",
    "answer_idx": "C",
}
MEDMCQA = {
    "id": "e9ad821a",
    "question": "Which vitamin?",
    "opa": "A",
    "opb": "B12",
    "opc": "C",
    "opd": "D",
    "exp": "Only animals supply B12.",
}
AMBOSS = {"question": "Next step?", "options": ["Rest", "Surgery"], "answer": "B", "difficulty": 3}


def lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_medqa(tmp_path: Path) -> None:
    (question,) = load_questions(lines(tmp_path / "test.jsonl", MEDQA), "medqa")
    assert (question.id, question.gold, question.answer, len(question.options)) == ("medqa-test-0", "Ceftriaxone", 2, 5)
    without_letter = {key: value for key, value in MEDQA.items() if key != "answer_idx"}
    assert load_questions(lines(tmp_path / "text.jsonl", without_letter), "medqa")[0].answer == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_idx": "F"}, "'F' is not among the options A, B, C, D, E"),
        ({"answer_idx": "B"}, "is not the option 'Ciprofloxacin'"),
        ({"options": {}}, "no options"),
        ({"options": {"A": 1, "B": 2}}, "not a text"),
    ],
)
def test_malformed_medqa(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_questions(lines(tmp_path / "test.jsonl", MEDQA, MEDQA | change), "medqa")
    assert caught.value.line == 2


def test_medmcqa_counts_from_one_and_its_other_release_from_zero(tmp_path: Path) -> None:
    published = lines(tmp_path / "dev.json", MEDMCQA | {"cop": 2})
    hub = lines(tmp_path / "validation.json", MEDMCQA | {"cop": 1})
    for question in (load_questions(published, "medmcqa")[0], load_questions(hub, "medmcqa-hf")[0]):
        assert (question.id, question.gold, question.rationale) == ("e9ad821a", "B12", "Only animals supply B12.")


@pytest.mark.parametrize(("layout", "cop", "other"), [("medmcqa", 0, "medmcqa-hf"), ("medmcqa-hf", 4, "medmcqa")])
def test_medmcqa_of_the_other_release(tmp_path: Path, layout: str, cop: int, other: str) -> None:
    with pytest.raises(UserError) as caught:
        load_questions(lines(tmp_path / "dev.json", MEDMCQA | {"cop": cop}), layout)
    assert caught.value.remedy.endswith(f"layout {other}") and caught.value.line == 1


@pytest.mark.parametrize("cop", [-1, None, "b"])
def test_medmcqa_without_answers(tmp_path: Path, cop: Any) -> None:
    with pytest.raises(UserError, match="no right option in 'cop'"):
        load_questions(lines(tmp_path / "test.json", MEDMCQA | {"cop": cop}), "medmcqa-hf")


def test_publishers_repeated_options_are_kept(tmp_path: Path) -> None:
    record = MEDMCQA | {"opc": "D", "cop": 2}
    assert load_questions(lines(tmp_path / "dev.json", record), "medmcqa")[0].options == ("A", "B12", "D", "D")
    with pytest.raises(UserError, match="'D' occurs 2 times"):
        load_questions(lines(tmp_path / "dev.json", record), "medmcqa", repeated_options="error")


def test_mmlu(tmp_path: Path) -> None:
    file = tmp_path / "anatomy_test.csv"
    file.write_text('"Which, of\nthese?",a,b,c,d,C\nNext?,1,2,3,4,A\n', encoding="utf-8")
    first, second = load_questions(file, "mmlu")
    assert (first.id, first.question, first.gold) == ("mmlu-anatomy_test-0", "Which, of\nthese?", "c")
    assert second.gold == "1"


@pytest.mark.parametrize(
    ("row", "message"), [("Next?,1,2,3,4", "5 cells, not 6"), ("Next?,1,2,3,4,E", "'E' is not among the options")]
)
def test_malformed_mmlu(tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "anatomy_test.csv"
    file.write_text(f'"Two\nlines?",a,b,c,d,C\n{row}\n', encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_questions(file, "mmlu")
    assert caught.value.line == 3


def test_pubmedqa(tmp_path: Path) -> None:
    articles = {
        "21645374": {
            "QUESTION": "Do mitochondria?",
            "CONTEXTS": ["x"],
            "final_decision": "maybe",
            "LONG_ANSWER": "So.",
        },
        "16418930": {"QUESTION": "Is it?", "CONTEXTS": ["y"], "final_decision": "no"},
    }
    file = tmp_path / "ori_pqal.json"
    file.write_text(json.dumps(articles, indent=4), encoding="utf-8")
    first, second = load_questions(file, "pubmedqa")
    assert (first.id, first.gold, first.rationale) == ("pubmedqa-21645374", "maybe", "So.")
    assert second.options == ("yes", "no", "maybe") and second.gold == "no"

    articles["16418930"]["final_decision"] = "perhaps"
    file.write_text(json.dumps(articles, indent=4), encoding="utf-8")
    with pytest.raises(UserError, match="'perhaps' is not among") as caught:
        load_questions(file, "pubmedqa")
    assert caught.value.line == 1 + file.read_text(encoding="utf-8").split("\n").index('    "16418930": {')


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "not one JSON object"), ("", "no quest")]
)
def test_malformed_pubmedqa(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "ori_pqal.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_questions(file, "pubmedqa")


def test_amboss(tmp_path: Path) -> None:
    file = lines(tmp_path / "amboss.jsonl", AMBOSS, AMBOSS | {"options": {"A": "Rest", "B": "Surgery", "C": "Wait"}})
    first, second = load_questions(file, "amboss")
    assert (first.id, first.gold, first.kind) == ("amboss-0", "Surgery", "3")
    assert second.gold == "Surgery" and len(second.options) == 3
    with pytest.raises(UserError, match="'C' is not among the options A, B"):
        load_questions(lines(tmp_path / "bad.jsonl", AMBOSS | {"answer": "C"}), "amboss")


def test_the_layout_may_stand_in_front_of_the_name(tmp_path: Path) -> None:
    lines(tmp_path / "test.jsonl", MEDQA)
    assert load_questions("medqa:test", data_dir=tmp_path)[0].answer == 2
    assert load_questions(f"medqa:{tmp_path}/test.jsonl")[0].answer == 2
    with pytest.raises(UserError, match="'medqa5' is not a layout"):
        load_questions(tmp_path / "test.jsonl", "medqa5")

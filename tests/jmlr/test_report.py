"""The records, the comparison, and the two files of a report."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmlr.console import format_interval
from jmlr.evaluate import SystemResult, comparison, paired_difference, summary_table
from jmlr.figures import draw_all
from jmlr.report import data_sources, write_report

TOPICS = 30
QUESTIONS = [f"q{topic}-{variant}" for topic in range(TOPICS) for variant in range(2)]
CLUSTERS = [f"topic {topic}" for topic in range(TOPICS) for _ in range(2)]
VOID = {"meta", "br", "hr", "img", "link", "input"}


def system(name: str, accuracy: float, recall: float | None, seed: int = 0, label: str | None = None) -> SystemResult:
    generator = np.random.default_rng(seed)
    correct = generator.random(len(QUESTIONS)) < accuracy
    found = None if recall is None else (generator.random(len(QUESTIONS)) < recall).astype(float).tolist()
    return SystemResult(
        name=name,
        label=label or name.capitalize(),
        description=f"How {name} was made.",
        questions=QUESTIONS,
        clusters=CLUSTERS,
        correct=correct.tolist(),
        log_likelihood=np.where(correct, -0.25, -1.5).tolist(),
        recall_at_1=found,
        recall_at_7=found,
        extra={"prompt": "plain"},
    )


def passage(number: int, **changes: Any) -> dict[str, Any]:
    values = {"id": f"p{number}", "title": f"Title {number}", "text": f"Text of {number}.", "score": 10.5 + number}
    return {**values, "url": f"https://example.org/{number}", "supporting": number == 0, **changes}


RESULTS = [
    system("closed-book", 0.3, None),
    system("rag", 0.4, 0.2, seed=1, label="Separate RAG"),
    system("joint", 0.9, 0.85, seed=2, label="Joint"),
]
HISTORY = [
    {"step": step, "phase": phase, "loss_lm": 2.0 / step, "seconds": 0.5 * step}
    | ({"loss_rank": 0.7 - 0.01 * step, "refresh": step % 10 == 0} if phase == "joint" else {})
    | ({"recall@1": 0.2 + 0.02 * step, "recall@7": 0.5 + 0.01 * step} if phase == "joint" and step % 5 == 0 else {})
    for phase in ("joint", "rag", "closed-book")
    for step in range(1, 31)
]
EXAMPLE = {
    "id": "q1",
    "question": 'Is <script>alert("x")</script> & "co" inherited?',
    "options": ["<i>yes</i>", "no"],
    "answer": "<i>yes</i>",
    "before": {"prediction": "no", "passages": [passage(3), passage(4, url="javascript:alert(1)")]},
    "after": {"label": "Joint", "prediction": "<i>yes</i>", "passages": [passage(0), passage(3)]},
}
RUN: dict[str, Any] = {
    "config": {
        "name": "quick <start>",
        "seed": 3,
        "data": {"corpora": ["embedded:ghr"], "train": ["embedded:ghr-train"]},
        "joint": {"rank_weight": 0.125, "sampled": None},
    },
    "results": RESULTS,
    "history": HISTORY,
    "seconds": {"joint training": 214.2, "evaluation": 31.0},
    "environment": {"torch": "2.13.0", "packages": {"transformers": "5.23.0"}},
    "examples": [EXAMPLE, {"question": "Only a question?"}],
}


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_report(tmp_path_factory.mktemp("runs") / "quick", **RUN)
    assert path.name == "report.html"
    return path.parent


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def test_page_holds_every_number(page: Page) -> None:
    for row in summary_table(RESULTS):
        assert row.label in page.words and row.description in page.words
        for interval in (row.accuracy, row.log_likelihood, row.recall_at_1, row.recall_at_7):
            assert format_interval(interval) in page.words
    for sentence in comparison(RESULTS[2], RESULTS[1]).sentences():
        assert sentence in page.words
    for words in ("joint training", "3:34", "2.13.0", "packages.transformers", "joint.rank_weight", "0.125"):
        assert words in page.words
    for shown in (EXAMPLE["before"], EXAMPLE["after"]):
        for entry in shown["passages"]:
            assert entry["title"] in page.words and entry["text"] in page.words
            assert f"score {entry['score']:.2f}" in page.words
    assert "60 questions on 30 topics" in page.words and "Only a question?" in page.words


def test_page_loads_nothing_from_outside(page: Page, run_dir: Path) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            target = attributes.get(name)
            if target is not None and not target.startswith("#"):
                assert tag == "a" and name == "href" and target.startswith("https://"), (tag, name, target)
        assert not any(name.startswith("on") for name in attributes)
        assert tag not in {"script", "link", "iframe", "object", "embed"}
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_page_escapes_what_the_data_say(page: Page) -> None:
    assert EXAMPLE["question"] in page.words
    assert "quick <start>" in page.words
    assert not any(tag == "i" for tag, _ in page.tags)
    assert "javascript:" not in str([attributes for _, attributes in page.tags])


def test_page_is_accessible(page: Page) -> None:
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) == 5
    assert all(figure["role"] == "img" and len(figure["aria-label"] or "") > 40 for figure in figures)
    headers = [attributes for tag, attributes in page.tags if tag == "th"]
    assert headers and all(header.get("scope") in {"row", "col"} for header in headers)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert ("html", {"lang": "en"}) in page.tags
    assert any(attributes.get("name") == "viewport" for tag, attributes in page.tags if tag == "meta")


def test_figures_take_their_colours_from_the_page(run_dir: Path) -> None:
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    light, dark = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    for theme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", theme))


def test_alternative_text_holds_the_figures_numbers() -> None:
    rows = summary_table(RESULTS)
    pictures = {picture.title: picture.svg for picture in draw_all(rows, HISTORY)}
    accuracy = rows[2].accuracy
    assert f"Joint {accuracy.mean:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f})" in pictures["Accuracy by system"]
    assert "Separate RAG from 2 to 0.0667 in 30 steps" in pictures["Language model loss"]
    assert "the index was refreshed 3 times" in pictures["Retrieval of the supporting passage"]
    assert "recall@1 from 0.30 to 0.80" in pictures["Retrieval of the supporting passage"]


def test_json_holds_the_same_in_numbers(run_dir: Path) -> None:
    text = (run_dir / "report.json").read_text(encoding="utf-8")
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(content) == [
        "schema_version",
        "name",
        "systems",
        "intervals",
        "comparison",
        "history",
        "seconds",
        "environment",
        "config",
        "examples",
        "attribution",
        "results",
    ]
    for entry, row in zip(content["systems"], summary_table(RESULTS), strict=True):
        assert entry["name"] == row.name and entry["questions"] == 60 and entry["clusters"] == 30
        assert entry["accuracy"] == {"mean": row.accuracy.mean, "low": row.accuracy.low, "high": row.accuracy.high}
    assert content["systems"][0]["recall_at_1"] is None
    expected = paired_difference(RESULTS[2].correct, RESULTS[1].correct, CLUSTERS)
    assert content["comparison"]["accuracy"]["p_value"] == expected.p_value
    assert content["comparison"]["accuracy"]["low"] == expected.low
    assert content["history"] == HISTORY and content["seconds"] == RUN["seconds"] and content["config"] == RUN["config"]
    assert content["examples"][0] == EXAMPLE
    assert [SystemResult.from_dict(record) for record in content["results"]] == RESULTS
    assert not list(run_dir.glob("*.partial"))


def test_the_same_input_gives_the_same_files(run_dir: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "again", **RUN)
    for name in ("report.html", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run_dir / name).read_bytes()


def test_a_bare_run_and_a_diverged_one_still_get_a_report(tmp_path: Path) -> None:
    diverged = system("joint", 0.5, None)
    diverged.log_likelihood[3] = -math.inf
    history = [{"step": 1, "loss_lm": math.nan}, {"step": 2, "loss_lm": None}]
    path = write_report(
        tmp_path, config={}, results=[diverged], history=history, seconds={}, environment={}, examples=[]
    )
    Page(path.read_text(encoding="utf-8"))
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["name"] == tmp_path.name and content["comparison"] is None
    assert content["systems"][0]["log_likelihood"] == {"mean": None, "low": None, "high": None}
    assert content["history"][0]["loss_lm"] is None


def test_report_needs_results_with_names_of_their_own(tmp_path: Path) -> None:
    for results, message in (([], "at least one system"), ([RESULTS[0], RESULTS[0]], "share a name")):
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path / "none", **{**RUN, "results": results})
    assert not (tmp_path / "none").exists()


def test_attribution_follows_the_data_used() -> None:
    sources = data_sources({"data": {"corpora": ["embedded:ghr", "mine.jsonl"], "train": ["embedded:ghr-train"]}})
    assert [source["title"] for source in sources][1:] == ["mine.jsonl"]
    assert "Ben Abacha" in sources[0]["authors"] and sources[0]["license"] == "CC BY 4.0"
    assert data_sources({}) == []


def test_record_survives_json() -> None:
    partly = system("joint", 0.5, 0.5)
    assert partly.recall_at_1 is not None
    partly.recall_at_1[4] = math.nan
    restored = SystemResult.from_json(partly.to_json())
    assert restored.recall_at_1 is not None and math.isnan(restored.recall_at_1[4])
    restored.recall_at_1[4] = partly.recall_at_1[4] = 0.0
    assert restored == partly


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "one JSON object, got list"),
        ('{"name": "x", "colour": 1}', "clusters is missing.*colour is unknown"),
    ],
)
def test_foreign_records_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SystemResult.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": [], "clusters": [], "correct": [], "log_likelihood": []}, "answered no question"),
        ({"correct": [True]}, "correct has 1 entries for 2 questions"),
        ({"recall_at_7": [1.0]}, "recall_at_7 has 1 entries"),
        ({"questions": ["a", "a"]}, "'a' is listed twice"),
    ],
)
def test_inconsistent_records_are_rejected(changes: dict[str, Any], message: str) -> None:
    record = {"name": "x", "label": "X", "description": "", "questions": ["a", "b"], "clusters": ["c", "c"]}
    record |= {"correct": [True, False], "log_likelihood": [-0.1, -0.2]}
    with pytest.raises(ValueError, match=message):
        SystemResult(**{**record, **changes})


def test_recall_is_over_the_questions_with_known_support() -> None:
    partly = SystemResult("x", "X", "", ["a", "b", "c"], ["a", "b", "c"], [True] * 3, [-1.0] * 3, [1.0, math.nan, 0.0])
    row = summary_table([partly])[0]
    assert row.recall_at_1 is not None and row.recall_at_1.mean == 0.5 and row.recall_at_7 is None


def test_comparison_matches_questions_by_id_not_by_place() -> None:
    joint, rag = RESULTS[2], RESULTS[1]
    backwards = SystemResult(
        **{
            name: value[::-1] if isinstance(value, list) else value
            for name, value in ((field, getattr(rag, field)) for field in rag.__dataclass_fields__)
        }
    )
    assert comparison(joint, backwards) == comparison(joint, rag)


def test_comparison_says_which_way_it_went() -> None:
    joint, rag = RESULTS[2], RESULTS[1]
    won, lost = comparison(joint, rag).sentences(), comparison(rag, joint).sentences()
    assert all(sentence.endswith("Joint is better, by more than chance would explain.") for sentence in won + lost)
    assert "p < 0.001" in won[0] and "points for Separate RAG (95 % interval -" in lost[0]
    drawn = comparison(joint, SystemResult.from_dict({**joint.to_dict(), "name": "rag", "label": "Twin"})).sentences()
    assert all("neither system is shown to be better" in sentence for sentence in drawn)


def test_comparison_refuses_different_questions() -> None:
    joint, rag = RESULTS[2], RESULTS[1]
    renamed = SystemResult.from_dict({**rag.to_dict(), "questions": ["other", *QUESTIONS[1:]]})
    with pytest.raises(ValueError, match="2 differ, the first is 'other'"):
        comparison(joint, renamed)
    moved = SystemResult.from_dict({**rag.to_dict(), "clusters": ["other", *CLUSTERS[1:]]})
    with pytest.raises(ValueError, match="in cluster 'topic 0' for 'joint' and 'other' for 'rag'"):
        comparison(joint, moved)

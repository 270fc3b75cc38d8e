"""The command line: bad input gives exit code 2 and one line on stderr, before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jmlr
from jmlr.cli import main
from jmlr.config import RunConfig, load, save
from jmlr.runs import CONFIG_FILE, REPORT_FILE, lock

PASSAGE = {"id": "p0", "title": "Fever", "text": "Fever is a rise in temperature."}
QUESTION = {"id": "q0", "question": "What rises?", "options": ["temperature", "height"], "answer": 0}

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """The work behind the commands, replaced by a record of it; the working directory is empty."""
    made: Calls = []
    fake = types.ModuleType("jmlr.run")
    for name in ("train", "index", "evaluate", "ask"):

        def record(*args: Any, _name: str = name, **kwargs: Any) -> None:
            made.append((_name, args, kwargs))

        setattr(fake, name, record)
    monkeypatch.setitem(sys.modules, "jmlr.run", fake)
    monkeypatch.setattr(jmlr, "run", fake, raising=False)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def refused(calls: Calls, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail as bad input, and gives its one line."""

    def check(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "Traceback" not in err
        assert err.rstrip().endswith((".", "?")), "a remedy is missing"
        assert not calls, "work began in spite of bad input"
        return err

    return check


def make_run(directory: Path, *, finished: bool = True, config: RunConfig | None = None) -> Path:
    save(config or RunConfig(name=directory.name), directory / CONFIG_FILE)
    if finished:
        (directory / REPORT_FILE).write_text("{}", encoding="utf-8")
    return directory


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("corpus", "questions", "place", "remedy"),
    [
        ([], [QUESTION], "corpus.jsonl:1: the corpus is empty", "Put one passage a line"),
        ([PASSAGE, {"id": "p1"}], [QUESTION], "corpus.jsonl:2: the field 'title' is missing", "Give every record"),
        ([PASSAGE], [QUESTION | {"options": []}], "questions.jsonl:1: the question has no options", "at least two"),
        ([PASSAGE], [QUESTION, QUESTION | {"id": "q1", "answer": 4}], "questions.jsonl:2: the answer 4", "from 0 to 1"),
        ([PASSAGE], [QUESTION | {"answer": "weight"}], "questions.jsonl:1: the answer 'weight' is not", "exactly one"),
        ([PASSAGE], [], "questions.jsonl:1: there is no question", "Fill it"),
    ],
)
def test_bad_data_stops_a_training_run_before_it_starts(
    tmp_path: Path,
    refused: Callable[..., str],
    corpus: list[Any],
    questions: list[Any],
    place: str,
    remedy: str,
) -> None:
    jsonl(tmp_path / "corpus.jsonl", *corpus)
    jsonl(tmp_path / "questions.jsonl", *questions)
    (tmp_path / "recipe.yaml").write_text(
        f"data: {{data_dir: '{tmp_path}', corpora: [corpus], train: [questions]}}\n", encoding="utf-8"
    )
    line = refused("train", "--recipe", "recipe.yaml")
    assert place in line and remedy in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["train", "--recipe", "recipe.yaml"],
            "recipe.yaml:3: there is no setting train.stepz. Did you mean train.steps?",
        ),
        (["train", "--recipe", "nothing"], "nothing: there is no such recipe. Give the path of a YAML file, or one of"),
        (["train", "--set", "train.steps=0"], "--set train.steps=0: train.steps is 0. Give a number at least 1."),
        (["train", "--set", "data.corpora=[gone]"], "gone: there is no such file"),
        (["train", "--max-steps", "0"], "--max-steps: the number of steps is below 1."),
        (
            ["train", "--max-steps", "x"],
            "jmlr train: argument --max-steps: invalid int value: 'x'. See jmlr train --help.",
        ),
        (["train", "--device", "tpu"], "'tpu' is not a device"),
        (["train", "--name", "../x"], "cannot name a directory"),
        (["train", "--bogus"], "unrecognized arguments: --bogus"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required: COMMAND"),
        (["index", "--run", "runs/none"], "runs/none: there is no run here"),
        (["eval", "--run", "runs/none"], "runs/none: there is no run here"),
        (["eval"], "runs: there is no finished run. Train one with jmlr train"),
        (["ask", "Why?"], "runs: there is no finished run. Train one with jmlr train"),
        (["ask", " "], "the question is empty"),
        (["ask", "Why?", "--options", "yes"], "--options: the options are not two or more different texts"),
        (["ask", "Why?", "--options", "a|a"], "--options: the options are not two or more different texts"),
        (["ask", "Why?", "--top", "0"], "--top: the number of passages is below 1"),
    ],
)
def test_bad_arguments(tmp_path: Path, refused: Callable[..., str], arguments: list[str], expected: str) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1\ntrain:\n  stepz: 3\n", encoding="utf-8")
    assert expected in refused(*arguments)


def test_bad_questions_and_systems_stop_an_evaluation(tmp_path: Path, refused: Callable[..., str]) -> None:
    make_run(tmp_path / "runs" / "a")
    jsonl(tmp_path / "mine.jsonl", QUESTION, QUESTION | {"id": "q1", "answer": "none of them"})
    assert "mine.jsonl:2: the answer 'none of them' is not among the options." in refused(
        "eval", "--questions", "mine.jsonl"
    )
    assert "there is no system 'jont'. Choose among closed-book" in refused("eval", "--systems", "joint,jont")


def test_a_damaged_run_is_told_by_file_and_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    run = make_run(tmp_path / "runs" / "a")
    text = (run / CONFIG_FILE).read_text(encoding="utf-8")
    (run / CONFIG_FILE).write_text(text.replace("sampled: ", "sampled: four"), encoding="utf-8")
    line = 1 + text[: text.index("sampled: ")].count("\n")
    assert f"{CONFIG_FILE}:{line}: joint.sampled is 'four" in refused("ask", "Why?")


def test_bad_input_is_told_without_importing_torch(tmp_path: Path) -> None:
    jsonl(tmp_path / "corpus.jsonl", PASSAGE, "not a passage")
    program = (
        "import sys; from jmlr.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy imports'; sys.exit(code)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, "train", "--set", f"data.corpora=[{tmp_path}/corpus.jsonl]"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("\n") == 1 and "corpus.jsonl:2: the line holds a JSON string" in finished.stderr


def test_a_missing_package_is_named(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("No module named 'faiss'", name="faiss")

    monkeypatch.setattr(sys.modules["jmlr.run"], "train", train)
    assert main(["train"]) == 2
    assert "'faiss' is not installed. Run pip install 'jmlr-kernels[train]'." in capsys.readouterr().err


# ---------------------------------------------------------------- what the commands do


def test_train_writes_its_settings_and_starts(calls: Calls, tmp_path: Path) -> None:
    assert main(["train", "--name", "mine", "--set", "seed=5", "--device", "cpu", "--max-steps", "3"]) == 0
    ((command, (config, directory), options),) = calls
    assert (command, directory, options) == ("train", Path("runs/mine"), {"resume": False, "max_steps": 3})
    assert (config.name, config.seed, config.device) == ("mine", 5, "cpu")
    assert load(tmp_path / "runs" / "mine" / CONFIG_FILE) == config


def test_an_earlier_run_is_moved_aside_not_lost(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    for attempt in range(3):
        assert main(["train", "--set", f"seed={attempt}"]) == 0
    name = calls[0][1][0].name
    assert load(f"runs/{name}/config.yaml").seed == 2
    assert [load(f"runs/{name}.{n}/config.yaml").seed for n in (1, 2)] == [0, 1]
    assert f"The earlier run is kept in runs/{name}.2." in capsys.readouterr().out


def test_files_that_are_no_run_are_left_alone(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert "runs/mine: the directory holds files that are not a run." in refused("train", "--name", "mine")
    (tmp_path / "runs" / "file").write_text("", encoding="utf-8")
    assert "runs/file: this is a file" in refused("train", "--name", "file")


def test_resume_continues_with_the_runs_own_settings(calls: Calls, tmp_path: Path) -> None:
    assert main(["train", "--name", "mine", "--set", "seed=5"]) == 0
    (tmp_path / "runs" / "mine" / "joint").mkdir()  # training has begun
    assert main(["train", "--name", "mine", "--resume"]) == 0
    assert main(["train", "--name", "mine", "--resume", "--set", "seed=5", "--set", "threads=1"]) == 0
    assert main(["train", "--name", "mine", "--resume", "--device", "cpu"]) == 0
    assert [options["resume"] for _, _, options in calls] == [False, True, True, True]
    assert [arguments[0].seed for _, arguments, _ in calls] == [5] * 4
    assert calls[3][1][0].device == "cpu" and calls[2][1][0].threads == 1


def test_resume_with_other_settings_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    directory = make_run(tmp_path / "runs" / "mine", finished=False, config=load("quickstart", ["name=mine"]))
    line = refused("train", "--name", "mine", "--resume", "--set", "train.eps=1e-7")
    text = (directory / CONFIG_FILE).read_text(encoding="utf-8").splitlines()
    number = int(line.split(":")[1])
    assert text[number - 1].strip().startswith("eps:")
    assert f"the run was started with train.eps {load(directory / CONFIG_FILE).train.eps}, not 1e-07." in line


def test_resume_of_a_run_killed_before_training_starts_it(calls: Calls, tmp_path: Path) -> None:
    assert main(["train", "--name", "mine", "--resume"]) == 0  # killed before it left a trace
    assert main(["train", "--name", "mine", "--resume"]) == 0  # killed when only its settings were written
    (tmp_path / "runs" / "mine" / CONFIG_FILE).rename(tmp_path / "runs" / "mine" / f"{CONFIG_FILE}.partial")
    assert main(["train", "--name", "mine", "--resume"]) == 0  # killed while it wrote them
    assert [options["resume"] for _, _, options in calls] == [False] * 3


def test_two_processes_never_share_a_run(tmp_path: Path, refused: Callable[..., str]) -> None:
    directory = make_run(tmp_path / "runs" / "mine", config=load("quickstart", ["name=mine"]))
    with lock(directory):
        for arguments in (["train", "--name", "mine"], ["train", "--name", "mine", "--resume"], ["index"]):
            assert "runs/mine: another process is at work in this run." in refused(*arguments)
    with lock(directory):
        pass


def test_ctrl_c_says_how_to_go_on(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["jmlr.run"], "train", interrupt)
    assert main(["train", "--name", "mine"]) == 130
    err = capsys.readouterr().err
    assert err == "Interrupted. 'jmlr train --resume --name mine --runs runs' continues this run.\n"


def test_ask_takes_the_newest_finished_run(calls: Calls, tmp_path: Path) -> None:
    for name, finished in (("old", True), ("new", True), ("unfinished", False)):
        make_run(tmp_path / "runs" / name, finished=finished)
    os.utime(tmp_path / "runs" / "old" / REPORT_FILE, (1, 1))
    assert main(["ask", " Why? ", "--options", "yes | no", "--top", "4"]) == 0
    assert main(["ask", "Why?", "--run", "runs/old"]) == 0
    assert calls[0][1] == (Path("runs/new"), "Why?", ("yes", "no"), 4)
    assert calls[1][1] == (Path("runs/old"), "Why?", (), None)


def test_index_and_eval_reach_the_run(calls: Calls, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    jsonl(tmp_path / "mine.jsonl", QUESTION)
    assert main(["index"]) == 0
    assert main(["eval", "--questions", "mine.jsonl", "--systems", "joint, rag"]) == 0
    assert main(["eval", "--run", "runs/a"]) == 0
    assert [(name, arguments) for name, arguments, _ in calls] == [
        ("index", (Path("runs/a"),)),
        ("evaluate", (Path("runs/a"), ["mine.jsonl"], ("joint", "rag"))),
        ("evaluate", (Path("runs/a"), None, None)),
    ]


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["train", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    assert "jmlr " in capsys.readouterr().out

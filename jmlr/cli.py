"""The ``jmlr`` command. Bad input ends it with one line on stderr and exit code 2, before anything slow begins."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from jmlr.errors import UserError

DEFAULT_RECIPE = "quickstart"
BAD_INPUT = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``jmlr``; by default those of the process.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    options: argparse.Namespace | None = None
    try:
        options = _parser().parse_args(arguments)
        options.command(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "jmlr", "jmlr_kernels"):
            raise
        print(f"The package '{package}' is not installed. Run pip install 'jmlr-kernels[train]'.", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(_interrupted(options), file=sys.stderr)
        return INTERRUPTED
    return 0


def _interrupted(options: argparse.Namespace | None) -> str:
    run = getattr(options, "started_run", None)
    if run is None:
        return "Interrupted."
    return f"Interrupted. 'jmlr train --resume --name {run.name} --runs {run.parent}' continues this run."


def _train(options: argparse.Namespace) -> None:
    from jmlr.config import load, save, task_of
    from jmlr.data.texts import load_texts
    from jmlr.runs import CONFIG_FILE, begun, lock, open_run, prepare

    if options.max_steps is not None and options.max_steps < 1:
        raise UserError("the number of steps is below 1", file="--max-steps", remedy="give a number of at least 1")
    recipe = options.recipe or DEFAULT_RECIPE
    if options.resume and options.name and not options.recipe:
        saved = options.runs / options.name / CONFIG_FILE
        recipe = saved if saved.is_file() and task_of(saved) == "extend" else recipe
    if task_of(recipe) == "extend":
        return _extend(options, recipe)
    config, directory, resuming = open_run(
        recipe,
        _overrides(options),
        runs=options.runs,
        name=options.name,
        resume=options.resume,
        stated=bool(options.recipe or options.set),
        load=load,
    )
    load_texts(config)
    prepare(directory, keep=resuming)
    with lock(directory):
        save(config, directory / CONFIG_FILE)
        options.started_run = directory
        from jmlr import run

        run.train(config, directory, resume=resuming and begun(directory), max_steps=options.max_steps)


def _extend(options: argparse.Namespace, recipe: str | Path) -> None:
    from jmlr.extend.config import load
    from jmlr.extend.documents import load_documents
    from jmlr.runs import CONFIG_FILE, lock, open_run, prepare
    from jmlr.settings import write

    if options.max_steps is not None:
        raise UserError(
            "a recipe that extends a context does not stop in between",
            file="--max-steps",
            remedy="set extend.steps with --set, or stop it with Ctrl-C and go on with --resume",
        )
    config, directory, resuming = open_run(
        str(recipe),
        _overrides(options),
        runs=options.runs,
        name=options.name,
        resume=options.resume,
        stated=bool(options.recipe or options.set),
        load=load,
    )
    load_documents(config.data)
    prepare(directory, keep=resuming)
    with lock(directory):
        write(config, directory / CONFIG_FILE)
        options.started_run = directory
        from jmlr.extend import run

        run.train(config, directory, resume=resuming)


def _index(options: argparse.Namespace) -> None:
    from jmlr.data.corpus import load_corpus
    from jmlr.runs import find_run, lock, run_config

    directory = find_run(options.run, options.runs)
    data = run_config(directory).data
    load_corpus(data.corpora, data_dir=data.data_dir, repeated_ids=data.repeated_ids)
    with lock(directory):
        from jmlr import run

        run.index(directory)


def _evaluate(options: argparse.Namespace) -> None:
    from jmlr.config import System, choices
    from jmlr.data.corpus import load_corpus
    from jmlr.data.questions import load_questions
    from jmlr.runs import find_run, run_config

    directory = find_run(options.run, options.runs)
    config = run_config(directory)
    systems = None
    if options.systems:
        systems = tuple(name.strip() for name in options.systems.split(","))
        for name in systems:
            if name not in choices(System):
                raise UserError(
                    f"there is no system '{name}'",
                    file="--systems",
                    remedy=f"choose among {', '.join(choices(System))}",
                )
    data = config.data
    load_corpus(data.corpora, data_dir=data.data_dir, repeated_ids=data.repeated_ids)
    if options.questions:
        load_questions(
            options.questions,
            data_dir=data.data_dir,
            repeated_ids=data.repeated_ids,
            repeated_options=data.repeated_options,
        )
    from jmlr import run

    run.evaluate(directory, options.questions, systems)


def _ask(options: argparse.Namespace) -> None:
    from jmlr.runs import find_run, run_config

    question = options.question.strip()
    if not question:
        raise UserError("the question is empty", remedy="write it in quotes, as in jmlr ask 'How is ... passed on?'")
    answers: tuple[str, ...] = ()
    if options.options is not None:
        answers = tuple(part.strip() for part in options.options.split("|"))
        if len(answers) < 2 or not all(answers) or len(set(answers)) < len(answers):
            raise UserError(
                "the options are not two or more different texts",
                file="--options",
                remedy="separate them by |, as in --options 'yes|no'",
            )
    if options.top is not None and options.top < 1:
        raise UserError("the number of passages is below 1", file="--top", remedy="give a number of at least 1")
    directory = find_run(options.run, options.runs)
    run_config(directory)
    from jmlr import run

    run.ask(directory, question, answers, options.top)


def _recipes(options: argparse.Namespace) -> None:
    from jmlr.config import recipes

    found = recipes()
    width = max(map(len, found), default=0)
    for name, description in found.items():
        print(f"{name:{width}}  {description}".rstrip())


def _overrides(options: argparse.Namespace) -> list[str]:
    overrides = list(options.set or [])
    if options.name is not None:
        overrides.append(f"name={json.dumps(options.name)}")
    if options.device is not None:
        overrides.append(f"device={json.dumps(options.device)}")
    return overrides


class _Parser(argparse.ArgumentParser):
    """Errors on one line, like every other mistake in the input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, file=self.prog, remedy=f"see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jmlr", description="Train a language model and its retriever together, and ask them.")
    parser.add_argument("--version", action="version", version=f"jmlr {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train by a recipe, then evaluate and write the report")
    _add_recipe_options(train)
    train.add_argument(
        "--resume", action="store_true", help="continue the run, or begin it if it never got to a checkpoint"
    )
    train.add_argument(
        "--max-steps", type=int, metavar="N", help="stop after N steps of the schedule, to go on with --resume"
    )
    train.set_defaults(command=_train)

    index = commands.add_parser("index", help="encode the corpus again with a trained run's retriever")
    _add_run_options(index)
    index.set_defaults(command=_index)

    evaluate = commands.add_parser("eval", help="evaluate a trained run")
    _add_run_options(evaluate)
    evaluate.add_argument(
        "--questions",
        action="append",
        metavar="[LAYOUT:]PATH",
        help="questions other than the recipe's, asked as they are worded; a publisher's layout may stand in front, "
        "as in medqa:US/test.jsonl; may be repeated",
    )
    evaluate.add_argument("--systems", metavar="A,B", help="systems to compare (default: the recipe's)")
    evaluate.set_defaults(command=_evaluate)

    ask = commands.add_parser("ask", help="answer a question and show the passages that were read")
    ask.add_argument("question")
    _add_run_options(ask)
    ask.add_argument("--options", metavar="'A|B|C'", help="answers to choose from; without them the answer is written")
    ask.add_argument("--top", type=int, metavar="K", help="passages to show (default: as many as are read)")
    ask.set_defaults(command=_ask)

    recipes = commands.add_parser("recipes", help="list the recipes")
    recipes.set_defaults(command=_recipes)
    return parser


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", metavar="NAME|PATH", help=f"a recipe of the package, or a YAML file (default: {DEFAULT_RECIPE})"
    )
    parser.add_argument("--name", metavar="RUN", help="the run's name (default: the recipe's)")
    parser.add_argument("--device", metavar="D", help="auto, cpu or cuda (CUDA_VISIBLE_DEVICES chooses among several)")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="replace a setting; may be repeated")
    _add_runs_directory(parser)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="the run's directory (default: the newest finished run)"
    )
    _add_runs_directory(parser)


def _add_runs_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs lie (default: runs)")


def _version() -> str:
    try:
        return metadata.version("jmlr-kernels")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    raise SystemExit(main())

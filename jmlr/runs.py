"""The directories of runs: what is in them, which one is meant, and that only one process writes into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from jmlr.config import RunConfig, load, task_of
from jmlr.errors import UserError
from jmlr.extend.config import ExtendConfig
from jmlr.settings import differences

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes in one run are the user's own care
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.json"
LOCK_FILE = ".lock"
MACHINE_SETTINGS = ("device", "threads", "budget_minutes")
"""Settings that may change when a run is continued: they say where it runs, not what it computes."""

AnyConfig = TypeVar("AnyConfig", RunConfig, ExtendConfig)


def open_run(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    runs: Path = Path("runs"),
    name: str | None = None,
    resume: bool = False,
    stated: bool = True,
    load: Callable[..., AnyConfig],
) -> tuple[AnyConfig, Path, bool]:
    """The settings and the directory of a run to start or continue. Nothing is written.

    Args:
        recipe: name or path of the recipe.
        overrides: ``"key=value"`` texts.
        runs: the directory of all runs.
        name: the run's name; by default the recipe's.
        resume: continue what is there. A run that is not there, or that never wrote its settings, is started.
        stated: whether the user named a recipe or settings: then they must be those of the run that is continued.
        load: reads a recipe, as :func:`jmlr.config.load` does.

    Returns:
        The settings, the run's directory, and whether there is something to continue.

    Raises:
        UserError: bad settings, or a run to continue that was started with others.
    """
    config = load(recipe, tuple(overrides))
    directory = runs / (name or config.name)
    if not resume or not (directory / CONFIG_FILE).is_file():
        return config, directory, False
    saved = load(directory / CONFIG_FILE, ())
    given = {key: getattr(config, key) for key in MACHINE_SETTINGS}
    if stated:
        for key, now, then in differences(config, saved):
            if key not in MACHINE_SETTINGS:
                raise UserError(
                    f"the run was started with {key} {_shown(then)}, not {_shown(now)}",
                    file=directory / CONFIG_FILE,
                    line=_line_of(directory / CONFIG_FILE, key),
                    remedy="continue it with its own settings, or start another run with --name",
                )
        saved = replace(saved, **given)
    elif any(override.startswith("device=") for override in overrides):
        saved = replace(saved, device=config.device)
    return saved, directory, True


def prepare(directory: Path, *, keep: bool) -> None:
    """Make the directory. An earlier run in it is moved aside, not overwritten, unless it is to be kept.

    Raises:
        UserError: it holds files that are not a run, another process is at work in it, or it cannot be written.
    """
    try:
        if not keep and directory.exists():
            _move_aside(directory)
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / LOCK_FILE
        probe.touch()
    except OSError as error:
        raise UserError(
            f"the run's directory cannot be written ({error.strerror})", file=directory, remedy="choose another --runs"
        ) from None


def _move_aside(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError("this is a file, not a directory", file=directory, remedy="choose another --name")
    # A run killed at its very start leaves no more than these.
    contents = {entry.name for entry in directory.iterdir()} - {LOCK_FILE, f"{CONFIG_FILE}.partial"}
    if not contents:
        return
    if CONFIG_FILE not in contents:
        raise UserError(
            "the directory holds files that are not a run", file=directory, remedy="choose another --name, or empty it"
        )
    with lock(directory):
        number = 1
        while (aside := directory.with_name(f"{directory.name}.{number}")).exists():
            number += 1
        directory.rename(aside)
    print(f"The earlier run is kept in {aside}.", flush=True)


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold a run's directory; the kernel lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    with (directory / LOCK_FILE).open("w") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    "another process is at work in this run",
                    file=directory,
                    remedy="wait for it to end, or choose another --name",
                ) from None
        yield


def begun(directory: Path) -> bool:
    """Whether a run got as far as training, which writes into directories of its own; before, it has settings only."""
    return directory.is_dir() and any(entry.is_dir() for entry in directory.iterdir())


def find_run(run: Path | None, runs: Path = Path("runs")) -> Path:
    """The directory of a finished run: the one given, or the newest under ``runs``.

    Raises:
        UserError: there is none.
    """
    if run is not None:
        return run
    finished = [path.parent for path in runs.glob(f"*/{REPORT_FILE}") if (path.parent / CONFIG_FILE).is_file()]
    if not finished:
        raise UserError(
            "there is no finished run", file=runs, remedy="train one with jmlr train, or name one with --run"
        )
    return max(finished, key=lambda directory: (directory / REPORT_FILE).stat().st_mtime_ns)


def run_config(directory: Path) -> RunConfig:
    """The settings saved in a run's directory.

    Raises:
        UserError: there is no run, or its settings were damaged.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(
            f"there is no run here (no {CONFIG_FILE})",
            file=directory,
            remedy="train one with jmlr train, or correct --run",
        )
    if task_of(directory / CONFIG_FILE) != "joint":
        raise UserError(
            "this run extended a context: it has no retriever to ask or evaluate",
            file=directory,
            remedy="see its results.json, or name a run of joint training with --run",
        )
    return load(directory / CONFIG_FILE)


def _line_of(file: Path, key: str) -> int | None:
    """The line of a dotted key in settings as :func:`jmlr.settings.write` writes them: two spaces a level."""
    wanted = key.split(".")
    depth = 0
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("  " * depth + wanted[depth] + ":"):
            depth += 1
            if depth == len(wanted):
                return number
    return None


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return "null" if value is None else str(value)

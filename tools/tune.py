"""Time the MaxSim kernels' candidate tiles on this GPU and keep the fastest of each class of shapes.

config.py lists the tiles worth timing (``forward_candidates`` and its siblings) and names each class of shapes
(``tuning_key``); what this tool finds goes into tuned.json beside it and comes before the guess from then on. For each
class, every candidate runs on representative shapes: one that does not compile or launch, errs from float64 more than
the timings allow, or gives other bits in a second run is dropped; the others are raced as in the benchmarks. The winner
has the least geometric mean of times; the first candidate, config.py's own guess, keeps its place unless beaten by more
than the noise. What each candidate took is written beside it, with GPU, versions and commit.

    python -m tools.tune [--budget 300] [--match forward] [--out FILE] [--commit HASH] [--dry-run]

``--dry-run`` walks the same path on the CPU: tiny shapes in Triton's interpreter, nothing written without ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidate import FORWARD, STEP, Candidate
from benchmarks.environment import ROOT, describe
from benchmarks.maxsim_cases import MaxSimCase
from benchmarks.prepare import compare, context_is_alive, results_of, steps_of
from benchmarks.timing import described, race, warm_up

TABLE = ROOT / "jmlr_kernels" / "maxsim" / "tuned.json"
NOISE = 0.01
SECONDS_PER_RACE = 1.5
DIMENSIONS = (128, 64, 256, 768)

# Query tokens that share documents, by the rows of a tile they fill -> shapes that stand for the class.
FORWARD_SHAPES = {
    128: (
        MaxSimCase(128, 128, 32, 300, backward=False),
        MaxSimCase(256, 256, 32, 180, backward=False),
        MaxSimCase(32, 32, 32, 80, backward=False),
        MaxSimCase(128, 128, 32, 1030, backward=False),
    ),
    32: (
        MaxSimCase(1, 10_000, 32, 300, backward=False),
        MaxSimCase(1, 1000, 32, 300, backward=False),
        MaxSimCase(32, 64, 32, 180, backward=False, layout="candidates"),
    ),
    64: (
        MaxSimCase(2, 5000, 32, 300, backward=False),
        MaxSimCase(32, 64, 64, 180, backward=False, layout="candidates"),
    ),
}
BACKWARD_SHAPES = (
    MaxSimCase(256, 256, 32, 300, backward=True),
    MaxSimCase(128, 128, 32, 1030, backward=True),
    MaxSimCase(64, 64, 32, 128, backward=True),
    MaxSimCase(256, 256, 32, 300, backward=True, data="clustered"),
    MaxSimCase(32, 64, 32, 180, backward=True, layout="candidates"),
)


@dataclass(frozen=True)
class Search:
    """One class of shapes: its key in the table, the function of config.py to override, candidates and shapes."""

    key: str
    function: str
    tiles: tuple[Any, ...]
    cases: tuple[MaxSimCase, ...]

    @property
    def direction(self) -> str:
        return STEP if self.cases[0].backward else FORWARD


def searches(config: Any, capability: int, element_size: int, dry_run: bool = False) -> list[Search]:
    """Every class with more than one candidate, most important first. `config` is jmlr_kernels.maxsim.config."""
    found = []
    for dim in (16,) if dry_run else DIMENSIONS:
        for rows, shapes in FORWARD_SHAPES.items():
            tiles = tuple(config.forward_candidates(capability, element_size, dim, rows))
            key = config.tuning_key("forward", capability, element_size, dim, rows)
            found.append(Search(key, "forward_tiles", tiles, _at(shapes, dim, dry_run)))
        for kernel in ("document_gradient", "query_gradient"):
            tiles = tuple(getattr(config, f"{kernel}_candidates")(capability, element_size, dim))
            key = config.tuning_key(kernel, capability, element_size, dim)
            found.append(Search(key, f"{kernel}_tiles", tiles, _at(BACKWARD_SHAPES, dim, dry_run)))
    return [search for search in found if len(search.tiles) > 1]


def _at(shapes: tuple[MaxSimCase, ...], dim: int, dry_run: bool) -> tuple[MaxSimCase, ...]:
    if dry_run:
        shapes = tuple(
            replace(case, queries=min(case.queries, 2), documents=2, query_length=8, document_length=12)
            for case in shapes[-1:]
        )
    return tuple(replace(case, dim=dim) for case in shapes)


@contextlib.contextmanager
def forced(config: Any, function: str, tiles: Any) -> Iterator[None]:
    """Let a function of config.py answer `tiles`, whatever it is asked."""
    usual = getattr(config, function)
    setattr(config, function, lambda *_, **__: tiles)
    try:
        yield
    finally:
        setattr(config, function, usual)


def _under(step: Callable[[], Any], config: Any, function: str, tiles: Any) -> Callable[[], Any]:
    def run() -> Any:
        with forced(config, function, tiles):
            return step()

    return run


def checked_steps(
    search: Search, case: MaxSimCase, config: Any, device: torch.device, dtype: torch.dtype, problems: dict[str, str]
) -> dict[str, Callable[[], Any]]:
    """Steps of the candidates that run, are right and repeat themselves bit by bit; why not, for the others."""
    from benchmarks import maxsim

    *tensors, grad = case.inputs(device, dtype)
    exact = maxsim.exact(case, tensors, grad)
    ours = Candidate(lambda: maxsim.ours(case, "triton", device))
    plain = steps_of(ours.make(), tensors, grad)[search.direction]
    steps = {}
    for tiles in search.tiles:
        name = label(tiles)
        if name in problems:
            continue
        step = _under(plain, config, search.function, tiles)
        try:
            warm_up(step, device)
            first, second = (results_of(step, case, ours) for _ in range(2))
            compare(first, exact, ours, dtype, search.direction)
            if not all(torch.equal(one, other) for one, other in zip(first, second, strict=True)):
                raise ArithmeticError("two runs differ")
            steps[name] = step
        except Exception as failure:
            problems[name] = f"{case.name}: {described(failure)}"
            if not context_is_alive(device):
                raise RuntimeError(f"{search.key} {name} killed the CUDA context: {described(failure)}") from failure
    return steps


def label(tiles: Any) -> str:
    """Tiles as text: "rows=128 tokens=64 ..."."""
    return " ".join(f"{name}={value}" for name, value in asdict(tiles).items())


def winner(times: dict[str, dict[str, float]], guess: str) -> tuple[str, dict[str, float]] | None:
    """(the best candidate, geometric mean of each one's times); None when none is left.

    `times` holds milliseconds by candidate and case, the same cases for each. `guess` stays unless beaten by NOISE.
    """
    if not times:
        return None
    means = {name: math.exp(sum(map(math.log, by_case.values())) / len(by_case)) for name, by_case in times.items()}
    best = min(means, key=lambda name: means[name])
    if guess in means and means[best] > (1 - NOISE) * means[guess]:
        best = guess
    return best, means


def search_one(
    search: Search, config: Any, device: torch.device, dtype: torch.dtype, deadline: float
) -> dict[str, Any] | None:
    """The entry of one class: tiles that won and what was measured; None when time ran out or nothing ran."""
    problems: dict[str, str] = {}
    times: dict[str, dict[str, float]] = {label(tiles): {} for tiles in search.tiles}
    for case in search.cases:
        if time.perf_counter() > deadline:
            return None
        steps = checked_steps(search, case, config, device, dtype, problems)
        result = race(steps, device, SECONDS_PER_RACE)
        problems |= result.failures
        for name, timing in result.timings.items():
            times[name][case.name] = timing.median
    times = {name: by_case for name, by_case in times.items() if name not in problems}
    chosen = winner(times, label(search.tiles[0]))
    if chosen is None:
        return {"tiles": None, "problems": problems}
    best, means = chosen
    tiles = next(tiles for tiles in search.tiles if label(tiles) == best)
    return {
        "tiles": asdict(tiles),
        "gain_over_guess": means[label(search.tiles[0])] / means[best] if label(search.tiles[0]) in means else None,
        "milliseconds": times,
        "problems": problems,
    }


def merge(table: dict[str, Any], key: str, entry: dict[str, Any], environment: dict[str, Any]) -> None:
    """Put one class into the table: ``tiles`` is what config.py reads, ``measured`` says where it comes from."""
    kept = {name: environment[name] for name in ("gpu", "triton", "torch", "commit", "date")}
    table.setdefault("tiles", {})
    if entry["tiles"] is not None:
        table["tiles"][key] = entry["tiles"]
    table.setdefault("measured", {})[key] = {**kept, **{name: entry[name] for name in entry if name != "tiles"}}


def main(arguments: list[str] | None = None) -> int:
    """0: done; 1: a class has no candidate that runs; 2: no GPU, or nothing to choose from."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; classes beyond keep what they have")
    parser.add_argument("--match", default="", help="only classes whose key contains this")
    parser.add_argument("--out", type=Path, help="the table to extend (default: tuned.json of the package)")
    parser.add_argument("--commit", help="the commit to name where there is no repository")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.dry_run and "TRITON_INTERPRET" not in os.environ:
        # Read when Triton is first imported, which is done.
        command = [sys.executable, "-m", "tools.tune", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.call(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})
    if not options.dry_run and not torch.cuda.is_available():
        print("tools.tune: no CUDA device was found; --dry-run walks the same path on the CPU", file=sys.stderr)
        return 2
    from jmlr_kernels.maxsim import config

    deadline = time.perf_counter() + options.budget
    device = torch.device("cpu" if options.dry_run else "cuda")
    dtype = torch.float32 if options.dry_run else torch.bfloat16
    # A dry run searches among the candidates of half precision, which are several, on float32, which is exact there.
    found = searches(config, config.capability_of(device), 2, options.dry_run)
    found = [search for search in found if options.match in search.key]
    if not found:
        print(f"tools.tune: no class of shapes with {options.match!r} has candidates to choose from", file=sys.stderr)
        return 2
    out = options.out or (None if options.dry_run else TABLE)
    table = json.loads(out.read_text()) if out is not None and out.is_file() else {}
    environment, count, failed = describe(options.commit), 0, 0
    for search in found:
        try:
            entry = search_one(search, config, device, dtype, deadline)
        except RuntimeError as error:
            print(f"tools.tune: {error}", file=sys.stderr)
            return 1
        if entry is None:
            break
        count += 1
        merge(table, search.key, entry, environment)
        if entry["tiles"] is None:
            failed += 1
            print(f"{search.key}: no candidate runs: {next(iter(entry['problems'].values()))}", flush=True)
        else:
            gain = entry["gain_over_guess"]
            print(f"{search.key}: {entry['tiles']}, {'-' if gain is None else f'{gain:.3f}'} x the guess", flush=True)
        if out is not None:
            out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"{count} of {len(found)} classes searched" + (f"; table in {out.name}" if out is not None else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

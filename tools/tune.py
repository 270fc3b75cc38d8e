"""Time the kernels' candidate tiles on this GPU and keep the fastest of each class of shapes.

The config.py of each operation lists the tiles worth timing (``forward_candidates`` and its siblings for MaxSim,
``candidates`` for attention) and names each class of shapes (``tuning_key``); what this tool finds goes into tuned.json
beside it and comes before the guess from then on. For each class, every candidate runs on representative shapes: one
that does not compile or launch, errs from float64 more than the timings allow, or gives other bits in a second run is
dropped; the others are raced as in the benchmarks. The winner has the least geometric mean of times; the first
candidate, config.py's own guess, keeps its place unless beaten by more than the noise. What each candidate took is
written beside it, with GPU, versions and commit.

    python -m tools.tune [attention] [maxsim] [--budget 300] [--match forward] [--out FILE] [--commit HASH] [--dry-run]

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import attention, maxsim
from benchmarks.attention_cases import AttentionCase
from benchmarks.candidate import BACKWARD, FORWARD, STEP, Candidate
from benchmarks.environment import ROOT, describe
from benchmarks.maxsim_cases import MaxSimCase
from benchmarks.prepare import compare, context_is_alive, results_of, steps_of
from benchmarks.timing import described, race, warm_up

SUITES: dict[str, Any] = {"attention": attention, "maxsim": maxsim}
TABLES = {
    "maxsim": ROOT / "jmlr_kernels" / "maxsim" / "tuned.json",
    "attention": ROOT / "jmlr_kernels" / "shifted_attention" / "tuned.json",
}
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


# The groups that have a bar, 8k tokens each, and what packing makes of them.
ATTENTION_SHAPES = (
    AttentionCase(4096, 1024, kv_heads=8, batch=2),
    AttentionCase(2048, 512, batch=4),
    AttentionCase(8192, 2048, kv_heads=8),
    AttentionCase(8192, 512, kv_heads=8, layout="packed"),
)
ATTENTION_DIMENSIONS = (128, 64)


class AttentionConfig(Protocol):
    """What the tuner asks of jmlr_kernels/shifted_attention/config.py.

    ``candidates`` gives tiles, the guess first; ``tuning_key`` names the entry of tuned.json that ``tiles`` looks up
    before it guesses; ``tma_kernel`` says which kernel really does a kernel's work. ``tiles`` is asked at every launch,
    by that name.
    """

    KERNELS: tuple[str, ...]

    def candidates(self, kernel: str, dtype: torch.dtype, head_dim: int, capability: int) -> Sequence[Any]: ...

    def tuning_key(self, kernel: str, dtype: torch.dtype, head_dim: int, capability: int) -> str: ...

    def tma_kernel(
        self,
        kernel: str,
        dtype: torch.dtype,
        head_dim: int,
        capability: int,
        group_size: int,
        wrap: bool,
        scale: float,
    ) -> str | None: ...


@dataclass(frozen=True)
class Search:
    """One class of shapes: its key in the table, the function of config.py to override, candidates and shapes.

    With `kernel` the function answers the candidate only to those who ask for that kernel.
    """

    key: str
    function: str
    tiles: tuple[Any, ...]
    cases: tuple[Any, ...]
    operation: str = "maxsim"
    kernel: str | None = None

    @property
    def direction(self) -> str:
        if self.operation == "attention":
            return FORWARD if (self.kernel or "").startswith("forward") else BACKWARD
        return STEP if self.cases[0].backward else FORWARD


def attention_searches(
    config: AttentionConfig, capability: int, dtype: torch.dtype, dry_run: bool = False
) -> list[Search]:
    """Every kernel that is launched here and head dimension with more than one candidate."""
    # In the interpreter bulk copies serve a dry run as well, if its groups are as long as the longest tiles.
    shapes = (AttentionCase(150, 130, heads=2, kv_heads=1),) if dry_run else ATTENTION_SHAPES
    shortest = min(case.group_size for case in shapes)
    found = []
    for dim in (16,) if dry_run else ATTENTION_DIMENSIONS:
        for name in config.KERNELS:
            kernel = config.tma_kernel(name, dtype, dim, capability, shortest, False, dim**-0.5) or name
            tiles = tuple(config.candidates(kernel, dtype, dim, capability))
            key = config.tuning_key(kernel, dtype, dim, capability)
            cases = tuple(replace(case, dim=dim) for case in shapes)
            found.append(Search(key, "tiles", tiles, cases, "attention", kernel))
    return [search for search in found if len(search.tiles) > 1]


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
def forced(config: Any, function: str, tiles: Any, kernel: str | None = None) -> Iterator[None]:
    """Let a function of config.py answer `tiles`, whatever it is asked, or whoever asks for `kernel`."""
    usual = getattr(config, function)

    def answer(*args: Any, **kwargs: Any) -> Any:
        asked = args[0] if args else kwargs.get("kernel")
        return tiles if kernel is None or asked == kernel else usual(*args, **kwargs)

    setattr(config, function, answer)
    try:
        yield
    finally:
        setattr(config, function, usual)


def _under(step: Callable[[], Any], config: Any, search: Search, tiles: Any) -> Callable[[], Any]:
    def run() -> Any:
        with forced(config, search.function, tiles, search.kernel):
            return step()

    return run


def checked_steps(
    search: Search, case: Any, config: Any, device: torch.device, dtype: torch.dtype, problems: dict[str, str]
) -> dict[str, Callable[[], Any]]:
    """Steps of the candidates that run, are right and repeat themselves bit by bit; why not, for the others."""
    suite = SUITES[search.operation]
    *tensors, grad = case.inputs(device, dtype)
    exact = suite.exact(case, tensors, grad)[1 if search.direction == BACKWARD else 0 :]
    ours = Candidate(lambda: suite.ours(case, "triton", device))
    plain = steps_of(ours.make(), tensors, grad)[search.direction]
    steps = {}
    for tiles in search.tiles:
        name = label(tiles)
        if name in problems:
            continue
        step = _under(plain, config, search, tiles)
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
    return " ".join(f"{name}={value}" for name, value in fields_of(tiles).items())


def fields_of(tiles: Any) -> dict[str, Any]:
    """A dataclass or NamedTuple as JSON."""
    return dict(tiles._asdict()) if hasattr(tiles, "_asdict") else asdict(tiles)


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
        "tiles": fields_of(tiles),
        "gain_over_guess": means[label(search.tiles[0])] / means[best] if label(search.tiles[0]) in means else None,
        "milliseconds": times,
        "problems": problems,
    }


def merge(
    table: dict[str, Any], key: str, entry: dict[str, Any], environment: dict[str, Any], operation: str = "maxsim"
) -> None:
    """Put one class into the table, tiles as the operation's config.py reads them and where they come from.

    MaxSim: ``tiles`` by key, ``measured`` apart. Attention: ``classes`` by key, with the tiles' numbers and the rest; a
    class of which no candidate runs goes to ``failed`` and keeps what it had.
    """
    kept = {name: environment[name] for name in ("gpu", "triton", "torch", "commit", "date")}
    measured = {**kept, **{name: entry[name] for name in entry if name != "tiles"}}
    if operation == "attention":
        classes, failed = table.setdefault("classes", {}), table.setdefault("failed", {})
        if entry["tiles"] is None:
            failed[key] = measured
        else:
            failed.pop(key, None)
            classes[key] = {"tiles": list(entry["tiles"].values()), **measured}
        return
    table.setdefault("tiles", {})
    if entry["tiles"] is not None:
        table["tiles"][key] = entry["tiles"]
    table.setdefault("measured", {})[key] = measured


def main(arguments: list[str] | None = None) -> int:
    """0: done; 1: a class has no candidate that runs; 2: no GPU, or nothing to choose from."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("operations", nargs="*", metavar="operation", help=f"{', '.join(SUITES)} (default: all)")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; classes beyond keep what they have")
    parser.add_argument("--match", default="", help="only classes whose key contains this")
    parser.add_argument(
        "--out", type=Path, help="table to extend (default: those of the package); attention's ends in -attention"
    )
    parser.add_argument("--commit", help="the commit to name where there is no repository")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.operations if name not in SUITES]
    if unknown:
        print(f"tools.tune: no operation {unknown[0]!r}; choose from {', '.join(SUITES)}", file=sys.stderr)
        return 2
    if options.dry_run and "TRITON_INTERPRET" not in os.environ:
        # Read when Triton is first imported, which is done.
        command = [sys.executable, "-m", "tools.tune", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.call(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})
    if not options.dry_run and not torch.cuda.is_available():
        print("tools.tune: no CUDA device was found; --dry-run walks the same path on the CPU", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + options.budget
    device = torch.device("cpu" if options.dry_run else "cuda")
    dtype = torch.float32 if options.dry_run else torch.bfloat16
    found = [
        (config, search)
        for name in options.operations or SUITES
        for config, searches_of in [_searches(name, device, options.dry_run)]
        for search in searches_of
        if options.match in search.key
    ]
    if not found:
        print(f"tools.tune: no class of shapes with {options.match!r} has candidates to choose from", file=sys.stderr)
        return 2
    environment, count, failed = describe(options.commit), 0, 0
    for config, search in found:
        try:
            entry = search_one(search, config, device, dtype, deadline)
        except RuntimeError as error:
            print(f"tools.tune: {error}", file=sys.stderr)
            return 1
        if entry is None:
            break
        count += 1
        _keep(search, entry, environment, _table(search.operation, options.out, options.dry_run))
        if entry["tiles"] is None:
            failed += 1
            print(f"{search.key}: no candidate runs: {next(iter(entry['problems'].values()))}", flush=True)
        else:
            gain = entry["gain_over_guess"]
            print(f"{search.key}: {entry['tiles']}, {'-' if gain is None else f'{gain:.3f}'} x the guess", flush=True)
    tables = {_table(search.operation, options.out, options.dry_run) for _, search in found[:count]} - {None}
    where = ", ".join(sorted(path.name for path in tables if path is not None))
    print(f"{count} of {len(found)} classes searched" + (f"; tables in {where}" if where else ""))
    return 1 if failed else 0


def _searches(operation: str, device: torch.device, dry_run: bool) -> tuple[Any, list[Search]]:
    """(the operation's config module, its classes). A dry run searches among the candidates of half precision, which
    are several, on float32, which is exact in the interpreter."""
    if operation == "maxsim":
        from jmlr_kernels.maxsim import config as maxsim_config

        return maxsim_config, searches(maxsim_config, maxsim_config.capability_of(device), 2, dry_run)
    from jmlr_kernels.shifted_attention import config, triton_common

    module: Any = config
    capability = 90 if dry_run else triton_common.capability_of(torch.empty(0, device=device))
    return module, attention_searches(module, capability, torch.bfloat16, dry_run)


def _table(operation: str, out: Path | None, dry_run: bool) -> Path | None:
    """Where an operation's winners go; nowhere in a dry run that names no file."""
    if out is None:
        return None if dry_run else TABLES[operation]
    return out if operation == "maxsim" else out.with_stem(f"{out.stem}-{operation}")


def _keep(search: Search, entry: dict[str, Any], environment: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        table = json.loads(path.read_text()) if path.is_file() else {}
        merge(table, search.key, entry, environment, search.operation)
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())

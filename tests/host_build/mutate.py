"""Seeded bugs: a family's kernels, changed in one place and built anew, which the family's probes must notice.

A kernel has no switches for faults. A `Mutation` names a text in a source file and what stands there instead; a
`Workshop` copies ``csrc/`` and this folder, applies one mutation at a time, rebuilds what depends on it and loads the
result.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from host_module import HERE, NAME, ROOT, build

# What kernels run on, of this folder's sources.
EMULATOR = ["device.cpp", "emulator.cpp", "emulated_memory.cpp", "happens_before.cpp", "hopper_copies.cpp"]
EMULATOR += ["hopper_emulator.cpp", "hopper_products.cpp"]
# A bug may leave a variable unused.
FLAGS = ("-O1", "-Wno-error")


_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands in `file` (below ``csrc/``) once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(f"mutation {self.name}: {self.old!r} stands {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


def read_mutations(path: Path) -> list[Mutation]:
    """Mutations of a text: ``[name] file``, then lines of the old text after ``- `` and of the new one after ``+ ``."""
    found: list[Mutation] = []
    old: list[str] = []
    new: list[str] = []
    heading = ""
    for line in [*path.read_text(encoding="utf-8").splitlines(), "[]"]:
        if line.startswith("["):
            if heading:
                name, _, file = heading.removeprefix("[").partition("] ")
                found.append(Mutation(name, file, "\n".join(old), "\n".join(new)))
            heading, old, new = line, [], []
        elif line[:2] in ("- ", "+ "):
            (old if line[0] == "-" else new).append(line[2:])
        elif line and not line.startswith("#"):
            raise ValueError(f"{path.name}: {line!r} is no heading, no old and no new line")
    return found


class Workshop:
    """A copy of the sources in `directory`, of which `sources` (of this folder) and `extra` (name: text) are built."""

    def __init__(self, directory: Path, sources: list[str], extra: dict[str, str]) -> None:
        self.csrc = directory / "csrc"
        self.here = directory / "tests" / "host_build"
        self.objects = directory / "objects"
        shutil.copytree(ROOT / "csrc", self.csrc)
        shutil.copytree(HERE, self.here, ignore=shutil.ignore_patterns("__pycache__"))
        self.sources = [self.here / name for name in [*sources, *extra]]
        for name, text in extra.items():
            (self.here / name).write_text(text, encoding="utf-8")

    def module(self, mutation: Mutation | None = None) -> ModuleType:
        """The kernels with one mutation, or none. Raises RuntimeError where they do not compile."""
        if mutation is None:
            return self._load(build(self.objects, here=self.here, chosen=self.sources, extra=FLAGS))
        path = self.csrc / mutation.file
        original = path.read_text(encoding="utf-8")
        path.write_text(mutation.applied(original), encoding="utf-8")
        try:
            return self._load(build(self.objects, here=self.here, chosen=self.sources, extra=FLAGS))
        finally:
            path.write_text(original, encoding="utf-8")

    def _load(self, library: Path) -> ModuleType:
        # A process loads a path once, and pybind11 makes a module of a name once: no two builds share either.
        number = next(_NUMBERS)
        own = library.with_name(f"{number}") / library.name
        own.parent.mkdir()
        shutil.copy2(library, own)
        spec = importlib.util.spec_from_file_location(f"{NAME}{number}.{NAME}", own)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def first_failure(probes: dict[str, Callable[..., Any]], dtype: Any, violation: type[Exception]) -> str | None:
    """The first probe that fails on kernels of `dtype`, and how; None if all pass."""
    for name, probe in probes.items():
        try:
            probe(dtype=dtype)
        except (AssertionError, violation) as error:
            return f"{name}: {type(error).__name__}: {(str(error) or 'another result').splitlines()[0]}"
    return None


def try_all(
    sources: list[str],
    extra: dict[str, str],
    mutations: list[Mutation],
    noticed_by: Callable[[ModuleType], str | None],
    names: list[str],
) -> int:
    """Prints who noticed each mutation (with `names`, those whose name holds one); 1 if one survived, else 0."""
    survivors = []
    with tempfile.TemporaryDirectory() as directory:
        workshop = Workshop(Path(directory) / "workshop", sources, extra)
        print(f"without a bug: {noticed_by(workshop.module()) or 'nothing noticed'}", flush=True)
        chosen = [mutation for mutation in mutations if not names or any(name in mutation.name for name in names)]
        for mutation in chosen:
            found = noticed_by(workshop.module(mutation))
            print(f"{mutation.name}: {found or 'SURVIVED'}", flush=True)
            survivors += [] if found else [mutation.name]
    print(f"{len(chosen)} bugs, {len(survivors)} survived")
    return 1 if survivors else 0

"""Seeded bugs: a family's kernels, changed in one place and built anew, which the family's probes must notice.

A kernel has no switches for faults. A `Mutation` names a text in a source file and what stands there instead; a
`Workshop` copies ``csrc/`` and this folder, applies one mutation at a time, rebuilds what depends on it and loads the
result.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from host_module import HERE, NAME, ROOT, build

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

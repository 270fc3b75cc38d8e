"""A handful of bugs, one of each kind, which the probes of compressed documents or the emulator's checks must notice.
All of them: ``python tests/host_build/mutations_maxsim_compressed.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutate import ROOT, Mutation, Workshop
from mutations_maxsim_compressed import EXTRA, MUTATIONS, SOURCES, noticed_by

HANDFUL = (
    "no barrier after decoding",
    "float8 negative NaN is -480",
    "fields of four bytes",
    "negative codes are read",
    "the length of the first chunk",
    "scratch for other tiles",
)


@pytest.mark.slow
def test_bugs_are_noticed(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "workshop", SOURCES, EXTRA)
    assert noticed_by(workshop.module()) is None
    chosen = {mutation.name: mutation for mutation in MUTATIONS}
    survivors = [name for name in HANDFUL if noticed_by(workshop.module(chosen[name])) is None]
    assert not survivors


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_bugs_apply(mutation: Mutation) -> None:
    """The text that a bug changes still stands in the kernels, once."""
    source = (ROOT / "csrc" / mutation.file).read_text(encoding="utf-8")
    assert mutation.applied(source) != source

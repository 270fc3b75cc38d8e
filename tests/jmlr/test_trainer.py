"""The joint step and its trainer: who learns from what, at which rate, and what a killed run comes back to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jmlr.assemble import Parts, assemble, own_rationales
from jmlr.config import TrainConfig, load
from jmlr.errors import UserError
from jmlr.llm import answer_losses, score_answers
from jmlr.model import JointModel
from jmlr.phase import load_phase, phase_config, train_phase
from jmlr.trainer import JointTrainer, last_checkpoint, rate_at, without


def small_parts(recipe: Path, *overrides: str) -> Parts:
    torch.set_num_threads(1)
    return assemble(load(recipe, overrides))


def small_model(parts: Parts) -> JointModel:
    return JointModel(parts.llm(), parts.retriever(), parts.config.joint, parts.training_texts(retrieval=True))


def grads(module: torch.nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


def candidates(count: int) -> torch.Tensor:
    return torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(n))[:6] for n in range(count)])


def test_each_model_learns_from_its_own_loss_only(small_recipe: Path) -> None:
    model = small_model(small_parts(small_recipe))
    outputs = model(torch.arange(4), candidates(4), seed=0, rank_weight=1.0)
    assert float(outputs["pairs"]) > 0
    (outputs["loss"] - outputs["loss_lm"]).backward(retain_graph=True)  # the logged parts hold no gradient
    both = grads(model.llm), grads(model.retriever)
    assert both[0] > 0 and both[1] > 0
    model.zero_grad()
    outputs = model(torch.arange(4), candidates(4), seed=0, rank_weight=0.0)
    outputs["loss"].backward()
    assert grads(model.llm) == pytest.approx(both[0], rel=1e-5)  # the rank loss adds nothing to the LLM's gradient
    assert grads(model.retriever) == 0.0  # L_LM gives the retriever none


def test_rank_gradient_is_that_of_the_definition(small_recipe: Path) -> None:
    """L_rank of the module equals the objective put together by hand from its pieces."""
    from jmlr.objective import rank_loss, sample_documents, scale_scores

    parts = small_parts(small_recipe)
    model = small_model(parts)
    question, found = torch.arange(3), candidates(3)
    outputs = model(question, found, seed=7, rank_weight=1.0)
    scores = model.scores(question, found)
    scaled = scale_scores(scores)
    sample = sample_documents(scaled, 3, torch.Generator().manual_seed(7))
    losses = torch.empty(3, 3)
    model.llm.eval()
    for row in range(3):
        asked = parts.texts.train[row]
        for column in range(3):
            prompt = parts.prompts.build(asked, [int(found[row, sample[row, column]])], asked.gold)
            logits = model.llm(torch.tensor([prompt.ids])).logits[0]
            answer = torch.tensor(prompt.ids[-prompt.answer :])
            losses[row, column] = torch.nn.functional.cross_entropy(logits[-prompt.answer - 1 : -1], answer)
    expected, _ = rank_loss(scaled.gather(1, sample), losses, margin=0.0)
    torch.testing.assert_close(outputs["loss_rank"], expected.detach())


def test_answer_losses_ignore_padding_and_batch(small_recipe: Path) -> None:
    parts = small_parts(small_recipe)
    llm = parts.llm().eval()
    asked = parts.texts.train[0]
    prompts = [parts.prompts.build(asked, docs, option) for docs in ([], [1], [5, 2]) for option in asked.options]
    together = answer_losses(llm, prompts, parts.prompts.end[0])
    alone = torch.cat([answer_losses(llm, [p], parts.prompts.end[0]) for p in prompts])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(score_answers(llm, prompts, parts.prompts.end[0], 5), alone.detach())


def test_attention_is_shifted_and_sparse_while_training_and_dense_when_scoring(small_recipe: Path) -> None:
    parts = small_parts(small_recipe)
    llm, pad = parts.llm(), parts.prompts.end[0]
    dense = parts.llm()
    dense.set_attn_implementation("sdpa")
    asked = parts.texts.train[0]
    prompts = [parts.prompts.build(asked, [1, 5], asked.gold)]
    assert len(prompts[0].ids) > 16  # more than one group
    expected = answer_losses(dense.train(), prompts, pad)
    assert not torch.allclose(answer_losses(llm.train(), prompts, pad), expected, rtol=1e-6)
    torch.testing.assert_close(answer_losses(llm.eval(), prompts, pad), expected)
    llm.train()
    torch.testing.assert_close(score_answers(llm, prompts, pad, 1), expected.detach())
    assert llm.training


def test_the_best_document_stands_last_and_whole_documents_are_dropped(small_recipe: Path) -> None:
    parts = small_parts(small_recipe)
    asked = parts.texts.train[0]
    full = parts.prompts.build(asked, [3, 1], asked.gold)
    ids = full.ids
    docs = parts.prompts.documents
    assert ids[1 : 1 + len(docs[1])] == docs[1] and ids[1 + len(docs[1]) :][: len(docs[3])] == docs[3]
    parts.prompts.max_length = len(ids) - 1
    shorter = parts.prompts.build(asked, [3, 1], asked.gold)
    assert shorter.ids == [ids[0], *docs[3], *ids[1 + len(docs[1]) + len(docs[3]) :]]
    assert parts.prompts.prompts_shortened == 1 and parts.prompts.documents_dropped == 1


def test_a_passage_longer_than_the_model_is_named(small_recipe: Path) -> None:
    with pytest.raises(UserError, match=r"passage '.*' takes .* llm\.document_tokens"):
        small_parts(small_recipe, "llm.max_length=45")
    with pytest.raises(UserError, match=r"question '.*' takes .* llm\.max_length"):
        small_parts(small_recipe, "llm.max_length=16")


def test_both_models_move_at_their_own_rates(small_recipe: Path, tmp_path: Path) -> None:
    """AdamW's first step moves every parameter that has a gradient by its rate: the two rates can be read off."""
    parts = small_parts(
        small_recipe,
        "train.llm_rate=0.002",
        "train.retriever_rate=0.0005",
        "train.weight_decay=0",
        "train.schedule=constant",
        "train.warmup_ratio=0",
        "train.retriever_weight_decay=0",
        "joint.rank_ramp_steps=0",
        "train.eps=1e-12",
        "joint.rank_warmup_steps=0",
        "joint.average_decay=0.75",
    )
    model = small_model(parts)
    trainer = JointTrainer(
        model, parts.config, tmp_path, build_index=parts.build_index, stop_after=1, tensorboard=False
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    moved = {name: (value.detach() - before[name]).abs().max().item() for name, value in model.named_parameters()}
    largest = {part: max(m for name, m in moved.items() if name.startswith(part)) for part in ("llm.", "retriever.")}
    assert largest["llm."] == pytest.approx(0.002, rel=1e-3)
    assert largest["retriever."] == pytest.approx(0.0005, rel=1e-3)
    rates = {group["part"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"llm": 0.002, "retriever": 0.0005}
    grouped = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    # The moving average took a quarter of the step.
    name = "linear.weight"
    assert moved[f"average.{name}"] == pytest.approx(0.25 * moved[f"retriever.{name}"], rel=1e-3)


def test_accumulated_batches_are_one_batch(small_recipe: Path, tmp_path: Path) -> None:
    """Two batches of two move the language model as one batch of four does."""
    weights = []
    for size, accumulation in ((4, 1), (2, 2)):
        parts = small_parts(
            small_recipe,
            f"train.batch_size={size}",
            f"train.gradient_accumulation={accumulation}",
            "joint.rank_warmup_steps=99",
        )
        model = small_model(parts)
        trainer = JointTrainer(
            model, parts.config, tmp_path / str(size), build_index=parts.build_index, stop_after=2, tensorboard=False
        )
        trainer.train()
        weights.append(model.llm.model.layers[0].mlp.up_proj.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_a_question_never_sees_its_own_rationale(small_recipe: Path, tmp_path: Path) -> None:
    parts = small_parts(small_recipe)
    passages = parts.texts.passages
    asked = replace(parts.texts.train[0], rationale=f"Because: {passages[3].text} So it is.")
    assert own_rationales([parts.texts.train[0], asked], passages) == {1: frozenset({3})}
    part = replace(asked, rationale=" ".join(passages[3].text.split()[1:10]))
    assert own_rationales([part], passages) == {0: frozenset({3, 11, 19})}  # without the name, three say it
    assert own_rationales([replace(asked, rationale="This condition is")], passages) == {}
    numbers = torch.tensor([[3, 1, 2, 0], [5, 3, 4, 6]])
    assert without(numbers, [{3}, {5, 6}], 3).tolist() == [[1, 2, 0], [3, 4, -1]]
    model = small_model(parts)
    model.texts.own_rationale = {0: frozenset(range(22))}  # all but two of the 24
    trainer = JointTrainer(model, parts.config, tmp_path, build_index=parts.build_index, tensorboard=False)
    trainer.refresh_index()
    found = trainer.find_candidates(torch.tensor([0, 1]))
    assert set(found[0].tolist()) == {22, 23, -1} and len(set(found[1].tolist())) == 6


def test_lora_trains_adapters_embeddings_and_norms_and_leaves_an_ordinary_model(
    small_recipe: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    parts = small_parts(small_recipe)
    base = tmp_path / "base"
    parts.llm().save_pretrained(base)
    parts.llm_tokenizer.save_pretrained(base)
    parts = small_parts(small_recipe, f"llm.path={base}", "llm.lora_rank=4", "train.steps=4", "joint.refresh_steps=2")
    start = parts.llm()
    trained = {name for name, p in start.named_parameters() if p.requires_grad}
    assert all(any(key in name for key in ("lora_", "embed_tokens", "norm")) for name in trained)
    assert sum("lora_A" in name for name in trained) == 7 and any("norm" in name for name in trained)
    train_phase(parts, "joint", tmp_path / "run", max_steps=2)
    train_phase(parts, "joint", tmp_path / "run", resume=True)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "joint" / "final" / "llm")
    before = AutoModelForCausalLM.from_pretrained(base)
    assert final.state_dict().keys() == before.state_dict().keys()
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert not torch.equal(final.state_dict()[name], before.state_dict()[name]), name
    assert load_phase(parts, "joint", tmp_path / "run").llm.config.s2_group_size == 16


def test_schedules() -> None:
    train = TrainConfig(steps=100, min_rate_ratio=0.1)
    language = [rate_at(train, step, warmup=10, begin=0) for step in range(101)]
    ranker = [rate_at(train, step, warmup=4, begin=40) for step in range(101)]
    assert language[0] == pytest.approx(1 / 11) and max(language) > 0.95 and language[100] == pytest.approx(0.1)
    assert ranker[39] == 0.0 and ranker[40] == pytest.approx(0.2) and ranker[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(ranker[45:], ranker[46:], strict=False))


def test_the_frozen_retriever_stays(small_recipe: Path, tmp_path: Path) -> None:
    parts = small_parts(small_recipe)
    train_phase(parts, "rag", tmp_path)
    trained = load_phase(parts, "rag", tmp_path)
    start = parts.retriever()
    for name, value in trained.retriever.state_dict().items():
        assert torch.equal(value, start.state_dict()[name]), name


def test_phases_differ_in_one_thing(small_recipe: Path) -> None:
    config = load(small_recipe)
    rag, closed = phase_config(config, "rag"), phase_config(config, "closed-book")
    assert not rag.joint.train_retriever and rag.train == config.train and rag.llm == config.llm
    assert closed.joint.context == 0 and closed.train.steps == 4


def test_resuming_gives_the_same_losses(small_recipe: Path, tmp_path: Path) -> None:
    """Stopped after every second step and resumed each time, against one undisturbed run."""
    parts = small_parts(small_recipe)
    train_phase(parts, "joint", tmp_path / "whole")
    for stop in range(2, 13, 2):
        train_phase(parts, "joint", tmp_path / "parts", resume=stop > 2, max_steps=stop)
    assert losses_of(tmp_path / "parts" / "joint") == losses_of(tmp_path / "whole" / "joint")


def losses_of(directory: Path) -> list[tuple]:
    history = json.loads((directory / "finished.json").read_text())["history"]
    return [
        tuple(row.get(k) for k in ("step", "loss_lm", "loss_rank", "pairs", "recall@1", "recall@7")) for row in history
    ]


def test_a_half_written_checkpoint_is_never_taken(small_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "staging" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "staging-checkpoint-1").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_bad_checkpoint_is_one_sentence(small_recipe: Path, tmp_path: Path, damage: str) -> None:
    parts = small_parts(small_recipe)
    train_phase(parts, "joint", tmp_path, max_steps=4)
    weights = tmp_path / "joint" / "checkpoint-4" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        parts = small_parts(small_recipe, "llm.intermediate_size=48")
    with pytest.raises(UserError) as caught:
        train_phase(parts, "joint", tmp_path, resume=True)
    assert str(weights) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_losses(small_recipe: Path, tmp_path: Path) -> None:
    """SIGKILL eight times, `jmlr train --resume` after each, against one undisturbed run.

    The first kill comes before any checkpoint; each of the others a moment, different each time, after the run got
    to a new checkpoint: while it trains, writes the next one or removes an old one.
    """

    def command(name: str, *more: str) -> list[str]:
        words = ["train", "--recipe", str(small_recipe), "--runs", str(tmp_path), "--set", "train.steps=60"]
        words += ["--set", "train.parallel_baselines=true", "--name"]
        return [sys.executable, "-m", "jmlr", *words, name, *more]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, env=environment, timeout=600)
    joint = tmp_path / "killed" / "joint"
    reached = []
    for kill in range(8):
        before = last_checkpoint(joint)
        process = subprocess.Popen(command("killed", "--resume"), env=environment)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if joint.is_dir() and (kill == 0 or last_checkpoint(joint) != before):
                break
            time.sleep(0.002)
        time.sleep(0.011 * kill)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached.append(last_checkpoint(joint))
    assert reached[0] is None and len({path for path in reached if path}) == 7
    subprocess.run(command("killed", "--resume"), check=True, env=environment, timeout=600)
    assert losses_of(joint) == losses_of(tmp_path / "whole" / "joint")
    whole, killed = (json.loads((tmp_path / run / "report.json").read_text()) for run in ("whole", "killed"))
    assert killed["results"] == whole["results"]

"""One trained model of a run: the joint one, or a baseline with the same start and the same steps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from jmlr.assemble import Parts
from jmlr.config import RunConfig
from jmlr.errors import UserError
from jmlr.evaluate import SystemResult, success_at_k
from jmlr.evaluate.systems import SYSTEMS, System, gold_passages, random_passages, rank_passages, run_system
from jmlr.llm import load_llm
from jmlr.model import JointModel
from jmlr.retriever.encoder import ColBERT, load_retriever, save_retriever
from jmlr.retriever.index import ExactIndex, encoder_fingerprint
from jmlr.trainer import JointTrainer, fsync_tree, last_checkpoint

if TYPE_CHECKING:
    from jmlr.extend.config import ExtendConfig

PHASES = ("joint", "rag", "closed-book")
FINISHED = "finished.json"
RESULTS = "results.json"


def phase_config(config: RunConfig, phase: str) -> RunConfig:
    """The recipe with the one thing changed that the phase is named after."""
    if phase == "rag":
        return replace(config, joint=replace(config.joint, train_retriever=False))
    if phase == "closed-book":
        steps = config.train.closed_book_steps or config.train.steps
        joint = replace(config.joint, train_retriever=False, context=0)
        return replace(config, joint=joint, train=replace(config.train, steps=steps))
    return config


@dataclass
class Trained:
    """A finished phase, loaded: models in eval mode, and the index of its retriever."""

    llm: Any
    retriever: ColBERT | None
    index: ExactIndex | None


def finished(directory: Path) -> bool:
    return (directory / FINISHED).is_file()


def train_phase(
    parts: Parts,
    phase: str,
    run_dir: Path,
    *,
    resume: bool = False,
    max_steps: int | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Trains one phase and leaves ``run_dir/<phase>/final`` (llm/, retriever/, index/) and its history.

    Checks that the model's shape fits the checkpoint before anything is trained. `max_steps` stops early (the
    schedule stays the whole run's), leaving a checkpoint to resume from.
    """
    directory = run_dir / phase
    if finished(directory):
        return
    config = phase_config(parts.config, phase)
    retrieval = config.joint.context > 0
    started = time.monotonic()
    model = JointModel(
        parts.llm(), parts.retriever() if retrieval else None, config.joint, parts.training_texts(retrieval=retrieval)
    )
    trainer = JointTrainer(
        model,
        config,
        directory,
        build_index=parts.build_index if retrieval else None,
        probe=probe_recall(parts) if retrieval else None,
        report=report,
        stop_after=max_steps,
    )
    checkpoint = last_checkpoint(directory) if resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    history = [row for row in trainer.state.log_history if "loss" in row or "recall@1" in row]
    if trainer.state.global_step < config.train.steps:
        return
    final = directory / "final"
    # Adapters are merged: what a run leaves is an ordinary model, whatever it was trained with.
    llm = model.llm.merge_and_unload() if hasattr(model.llm, "merge_and_unload") else model.llm
    llm.save_pretrained(final / "llm")
    parts.llm_tokenizer.save_pretrained(final / "llm")
    if retrieval:
        assert model.average is not None
        save_retriever(final / "retriever", model.average, parts.retriever_tokenizer)
        version = trainer.index.manifest.version + 1 if trainer.index is not None else 0
        index = trainer.index if not config.joint.train_retriever else None
        (index or parts.build_index(model.average, version)).save(final / "index")
    fsync_tree(final)
    record = {
        "phase": phase,
        "steps": trainer.state.global_step,
        "seconds": time.monotonic() - started,
        "history": history,
        "prompts": parts.prompts.prompts,
        "prompts_shortened": parts.prompts.prompts_shortened,
    }
    write_json(directory / FINISHED, record)


def probe_recall(parts: Parts) -> Callable[[ExactIndex, nn.Module], dict[str, float]] | None:
    """Recall@1 and @7 on held-out conditions, in wordings never trained on, with the index as it stands."""
    questions = [q for q in parts.texts.probe if q.supporting]
    if not questions:
        return None
    texts, supporting = [q.question for q in questions], [q.supporting for q in questions]

    def probe(index: ExactIndex, retriever: nn.Module) -> dict[str, float]:
        assert isinstance(retriever, ColBERT)
        _, numbers = rank_passages(retriever, parts.retriever_tokenizer, index, texts, 7, 64)
        rankings = [[index.passage_ids[n] for n in row] for row in numbers.tolist()]
        return {f"recall@{k}": float(success_at_k(rankings, supporting, k).mean()) for k in (1, 7)}

    return probe


def load_phase(parts: Parts, phase: str, run_dir: Path) -> Trained:
    """Loads a finished phase from disk.

    Raises:
        UserError: not finished, or its files are damaged or of another corpus.
    """
    directory = run_dir / phase
    if not finished(directory):
        raise UserError(
            f"the {phase} model of this run is not finished",
            file=directory,
            remedy="continue with `jmlr train --resume`",
        )
    final = directory / "final"
    device = device_of(parts.config)
    llm = load_llm(final / "llm", parts.config.llm).to(device).eval()
    if not (final / "retriever").is_dir():
        return Trained(llm, None, None)
    retriever, tokenizer = load_retriever(final / "retriever", parts.config.retriever)
    index = ExactIndex.load(
        final / "index",
        corpus_hash=parts.texts.corpus_hash,
        encoder=encoder_fingerprint(retriever),
        document_length=tokenizer.document_length,
    )
    return Trained(llm, retriever.to(device).eval(), index)


def evaluate_phase(
    parts: Parts, phase: str, run_dir: Path, systems: Sequence[str], *, keep: bool = True
) -> list[SystemResult]:
    """Runs those of `systems` that use this phase's models on the test questions.

    `keep` writes them to run_dir/<phase>/results.json.
    """
    chosen = [SYSTEMS[name] for name in systems if SYSTEMS[name].trained == phase]
    if not chosen:
        return []
    trained = load_phase(parts, phase, run_dir)
    results = [_evaluate(parts, trained, system) for system in chosen]
    if keep:
        write_json(run_dir / phase / RESULTS, [result.to_dict() for result in results])
    return results


def load_results(run_dir: Path, phase: str) -> list[SystemResult] | None:
    path = run_dir / phase / RESULTS
    if not path.is_file():
        return None
    return [SystemResult.from_dict(record) for record in json.loads(path.read_text(encoding="utf-8"))]


def _evaluate(parts: Parts, trained: Trained, system: System) -> SystemResult:
    config, questions = parts.config, parts.texts.test
    passage_ids = parts.texts.passage_ids
    count = config.joint.context
    if system.context == "retrieved":
        assert trained.retriever is not None and trained.index is not None
        texts = [q.question for q in questions]
        k = max(count, 7)
        _, numbers = rank_passages(trained.retriever, parts.retriever_tokenizer, trained.index, texts, k, 64)
        context: list[list[int]] = [[n for n in row if n >= 0] for row in numbers.tolist()]
    elif system.context == "random":
        context = random_passages(questions, len(passage_ids), max(count, 7), config.seed)
    elif system.context == "gold":
        context = gold_passages(questions, passage_ids, count)
    else:
        context = [[] for _ in questions]
    return run_system(
        system,
        trained.llm,
        parts.prompts,
        questions,
        context,
        passage_ids,
        context_size=count,
        batch_size=config.evaluate.batch_size,
    )


def device_of(config: RunConfig | ExtendConfig) -> torch.device:
    """The device that the recipe asks for; "auto" takes a GPU where there is one."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("the recipe asks for a GPU and there is none", remedy="set device to cpu or auto")
    return torch.device(config.device)


def write_json(path: Path, record: Any) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    staging = path.with_name(path.name + ".staging")
    with staging.open("w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)

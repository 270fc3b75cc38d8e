"""Runs the systems that the results table compares on one question set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jmlr.data.prompts import PromptBuilder
from jmlr.data.questions import Question
from jmlr.evaluate.results import SystemResult
from jmlr.evaluate.retrieval import success_at_k
from jmlr.llm import score_answers
from jmlr.retriever.encoder import ColBERT, ColBERTTokenizer
from jmlr.retriever.index import ExactIndex


@dataclass(frozen=True)
class System:
    """A row of the table: whose language model, and what it reads. ``trained`` names the run it comes from."""

    name: str
    label: str
    description: str
    trained: str
    context: str  # "none" | "random" | "retrieved" | "gold"


SYSTEMS = {
    s.name: s
    for s in (
        System(
            "closed-book", "closed-book", "trained and asked without passages", trained="closed-book", context="none"
        ),
        System(
            "random",
            "random passages",
            "the joint language model, given random passages",
            trained="joint",
            context="random",
        ),
        System(
            "rag",
            "separate RAG",
            "the same start and the same steps, with the retriever frozen: it never learns from the language model",
            trained="rag",
            context="retrieved",
        ),
        System(
            "joint",
            "joint (JMLR)",
            "language model and retriever trained together",
            trained="joint",
            context="retrieved",
        ),
        System(
            "gold",
            "gold passage",
            "the joint language model, given the supporting passages: what perfect retrieval would give it",
            trained="joint",
            context="gold",
        ),
    )
}


def rank_passages(
    retriever: ColBERT, tokenizer: ColBERTTokenizer, index: ExactIndex, texts: Sequence[str], k: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Scores and passage numbers of the best k for each text, best first: float32 and int64 [N, k]."""
    scores, numbers = [], []
    for start in range(0, len(texts), batch_size):
        queries = retriever.encode_queries(tokenizer.queries(texts[start : start + batch_size]))
        found = index.search(queries, k)
        scores.append(found[0])
        numbers.append(found[1])
    return torch.cat(scores), torch.cat(numbers)


def random_passages(questions: Sequence[Question], passages: int, count: int, seed: int) -> list[list[int]]:
    """`count` passages for each question, drawn without looking at it."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(passages, generator=generator)[:count].tolist() for _ in questions]


def gold_passages(questions: Sequence[Question], passage_ids: Sequence[str], count: int) -> list[list[int]]:
    """Each question's supporting passages, `count` at most."""
    number = {name: place for place, name in enumerate(passage_ids)}
    return [[number[name] for name in q.supporting if name in number][:count] for q in questions]


def option_log_likelihoods(
    llm: nn.Module,
    prompts: PromptBuilder,
    questions: Sequence[Question],
    context: Sequence[Sequence[int]],
    batch_size: int,
) -> list[Tensor]:
    """log p(option, end of text | passages, question) in nats, summed over tokens: float32 [options] per question."""
    built = [
        prompts.build(question, documents, option)
        for question, documents in zip(questions, context, strict=True)
        for option in question.options
    ]
    losses = score_answers(llm, built, prompts.end[0], batch_size)
    total = -losses * torch.tensor([float(p.answer) for p in built])
    return list(total.split([len(q.options) for q in questions]))


def run_system(
    system: System,
    llm: nn.Module,
    prompts: PromptBuilder,
    questions: Sequence[Question],
    context: Sequence[Sequence[int]],
    passage_ids: Sequence[str],
    *,
    context_size: int,
    batch_size: int,
) -> SystemResult:
    """Answers every question by option likelihood. `context` holds passage numbers, best first, at least seven where
    they were retrieved; the language model reads the first `context_size`."""
    read = [list(row)[:context_size] for row in context]
    likelihoods = option_log_likelihoods(llm, prompts, questions, read, batch_size)
    recall: list[list[float]] | None = None
    if system.context in ("retrieved", "random"):
        rankings = [[passage_ids[n] for n in row if n >= 0] for row in context]
        supporting = [q.supporting for q in questions]
        recall = [list(map(float, success_at_k(rankings, supporting, k))) for k in (1, 7)]
    return SystemResult(
        name=system.name,
        label=system.label,
        description=system.description,
        questions=[q.id for q in questions],
        clusters=[q.cluster for q in questions],
        correct=[int(scores.argmax()) == q.answer for scores, q in zip(likelihoods, questions, strict=True)],
        log_likelihood=[float(scores[q.answer]) for scores, q in zip(likelihoods, questions, strict=True)],
        recall_at_1=recall[0] if recall else None,
        recall_at_7=recall[1] if recall else None,
    )

"""One training step of JMLR as a module: the retriever's scores, the language model's judgement, both losses.

The language model learns from L_LM only, the retriever from L_rank only: the scores it is judged by are constants
in the one, the losses that judge it are constants in the other (joint-training, section 1).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jmlr.config import JointConfig
from jmlr.data.prompts import PromptBuilder
from jmlr.data.questions import Question
from jmlr.llm import answer_losses, score_answers
from jmlr.objective import rank_loss, sample_documents, scale_scores
from jmlr.retriever.encoder import ColBERT, TokenBatch
from jmlr_kernels import maxsim_candidates


@dataclass
class TrainingTexts:
    """What a step reads: the questions, their ids for ColBERT, the passages' ids for ColBERT, and the prompts."""

    questions: Sequence[Question]
    queries: TokenBatch | None
    documents: TokenBatch | None
    prompts: PromptBuilder
    pad: int
    own_rationale: dict[int, frozenset[int]] = field(default_factory=dict)  # question -> passages that repeat it


class JointModel(nn.Module):
    """A causal language model and a ColBERT retriever that train side by side; either may be frozen or absent.

    ``average`` is a moving average of the retriever's weights. The index, the candidates and every evaluation use
    it: the trained weights jump about with the few pairs of a step, their average climbs and stays.
    """

    def __init__(self, llm: nn.Module, retriever: ColBERT | None, joint: JointConfig, texts: TrainingTexts) -> None:
        super().__init__()
        self.llm: Any = llm
        self.retriever = retriever
        self.joint = joint
        self.texts = texts
        self.average = copy.deepcopy(retriever).eval().requires_grad_(False) if retriever is not None else None
        if retriever is not None and not joint.train_retriever:
            retriever.requires_grad_(False)

    @torch.no_grad()
    def update_average(self) -> None:
        """One step of the moving average; `average_decay` 0 copies."""
        if self.average is None or self.retriever is None or not self.joint.train_retriever:
            return
        decay = self.joint.average_decay
        for mean, value in zip(self.average.parameters(), self.retriever.parameters(), strict=True):
            mean.lerp_(value.to(mean.dtype), 1.0 - decay)

    def forward(
        self, question: Tensor, candidates: Tensor | None = None, seed: int = 0, rank_weight: float = 0.0
    ) -> dict[str, Tensor]:
        """question int64 [B] numbers of the training questions; candidates int64 [B, K] passage numbers, -1 = none.

        `seed` fixes the sampled documents, so that a resumed run draws the same ones. Returns the loss and, for the
        log, its parts: loss, loss_lm, loss_rank, pairs, documents.
        """
        questions = [self.texts.questions[n] for n in question.tolist()]
        zero = torch.zeros((), device=question.device)
        parts = {"loss_rank": zero, "pairs": zero}
        if candidates is None:
            context: list[list[int]] = [[] for _ in questions]
        else:
            train_scores = self.joint.train_retriever and rank_weight > 0
            with torch.set_grad_enabled(train_scores and torch.is_grad_enabled()):
                scores = self.scores(question, candidates)
            context = self.best(scores, candidates, self.joint.context)
            if train_scores:
                parts["loss_rank"], pairs = self.rank(questions, scores, candidates, seed)
                parts["pairs"] = zero + pairs
        prompts = [
            self.texts.prompts.build(q, documents, q.gold) for q, documents in zip(questions, context, strict=True)
        ]
        parts["loss_lm"] = answer_losses(self.llm, prompts, self.texts.pad).mean()
        loss = parts["loss_lm"] + rank_weight * parts["loss_rank"]
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def scores(self, question: Tensor, candidates: Tensor) -> Tensor:
        """MaxSim of each question with its candidates, by the retriever in training: float32 [B, K].

        A passage that is a candidate of several questions is encoded once.
        """
        assert self.retriever is not None and self.texts.queries is not None and self.texts.documents is not None
        device = self.retriever.device
        queries = self.texts.queries.whole_rows(question.cpu()).to(device)
        encoded_queries = self.retriever(queries.ids, queries.attend)
        unique, inverse = candidates.clamp(min=0).cpu().unique(return_inverse=True)
        documents = self.texts.documents.rows(unique).to(device)
        encoded = self.retriever(documents.ids, documents.attend)
        inverse = inverse.to(device)
        keep = documents.keep[inverse]
        return maxsim_candidates(encoded_queries, encoded[inverse], document_mask=keep)

    @staticmethod
    def best(scores: Tensor, candidates: Tensor, count: int) -> list[list[int]]:
        """The `count` best candidates of each row by score, best first."""
        order = scores.detach().masked_fill(candidates < 0, float("-inf")).sort(descending=True, stable=True).indices
        rows = candidates.gather(1, order)[:, :count].tolist()
        return [[n for n in row if n >= 0] for row in rows]

    def rank(self, questions: Sequence[Question], scores: Tensor, candidates: Tensor, seed: int) -> tuple[Tensor, int]:
        """L_rank: sample documents, let the language model judge each alone, compare every pair."""
        known = candidates >= 0
        scaled = scale_scores(scores, known)
        sample = sample_documents(scaled, self.joint.sampled, torch.Generator().manual_seed(seed), known)
        drawn = sample >= 0
        numbers = candidates.cpu().gather(1, sample.clamp(min=0))
        prompts = [
            self.texts.prompts.build(question, [number], question.gold)
            for question, row in zip(questions, numbers.tolist(), strict=True)
            for number in row
        ]
        # Eval mode: dropout would make the labels noisy (defect 6 of the released code).
        losses = score_answers(self.llm, prompts, self.texts.pad, batch_size=len(prompts)).view(sample.shape)
        sample, drawn, losses = (t.to(scores.device) for t in (sample.clamp(min=0), drawn, losses))
        return rank_loss(scaled.gather(1, sample), losses, margin=self.joint.margin, mask=drawn)

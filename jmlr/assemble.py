"""From a recipe and its checked texts to tokenizers, prompts and untrained models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from jmlr.config import LLMConfig, RetrieverConfig, RunConfig
from jmlr.data.corpus import Passage
from jmlr.data.prompts import PromptBuilder
from jmlr.data.questions import Question
from jmlr.data.texts import Texts, load_texts
from jmlr.data.vocabulary import build_word_tokenizer
from jmlr.data.wordings import WORDINGS, words
from jmlr.llm import add_lora, build_llm, load_llm, load_llm_tokenizer, package_directory
from jmlr.model import TrainingTexts
from jmlr.retriever.encoder import (
    ColBERT,
    ColBERTTokenizer,
    TokenBatch,
    build_retriever,
    load_retriever,
    load_retriever_tokenizer,
    make_tokenizer,
)
from jmlr.retriever.index import ExactIndex, encoder_fingerprint


@dataclass
class Parts:
    """Tokenizers and prompts of a run. Models are made from them by ``llm`` and ``retriever``, each time the same."""

    config: RunConfig
    texts: Texts
    llm_tokenizer: PreTrainedTokenizerBase
    retriever_tokenizer: ColBERTTokenizer
    prompts: PromptBuilder

    def llm(self) -> nn.Module:
        """The language model as it is before training."""
        config = self.config.llm
        torch.manual_seed(self.config.seed)
        directory = _directory(config)
        if not directory:
            return build_llm(config, self.llm_tokenizer)
        model = load_llm(directory, config)
        return add_lora(model, config) if config.lora_rank else model

    def retriever(self) -> ColBERT:
        """The retriever as it is before training."""
        config = self.config.retriever
        torch.manual_seed(self.config.seed)
        directory = _directory(config)
        if directory:
            return load_retriever(directory, config)[0]
        return build_retriever(config, self.retriever_tokenizer, self.documents, seed=self.config.seed)

    def training_texts(self, *, retrieval: bool) -> TrainingTexts:
        train = self.texts.train
        return TrainingTexts(
            questions=train,
            queries=self.retriever_tokenizer.queries([q.question for q in train]) if retrieval else None,
            documents=self.documents if retrieval else None,
            prompts=self.prompts,
            pad=self.prompts.end[0],
            own_rationale=own_rationales(train, self.texts.passages) if self.config.joint.exclude_own_rationale else {},
        )

    @cached_property
    def documents(self) -> TokenBatch:
        return self.retriever_tokenizer.documents([p.text for p in self.texts.passages])

    def build_index(self, retriever: nn.Module, version: int) -> ExactIndex:
        """Encodes the whole corpus."""
        assert isinstance(retriever, ColBERT)
        return ExactIndex.build(
            retriever.encode(self.documents),
            self.texts.passage_ids,
            corpus_hash=self.texts.corpus_hash,
            encoder=encoder_fingerprint(retriever),
            document_length=self.retriever_tokenizer.document_length,
            version=version,
        )


RUN = 8
"""Words in a row: rationales and passages shorter than this are too common to be anybody's own."""


def own_rationales(questions: Sequence[Question], passages: Sequence[Passage]) -> dict[int, frozenset[int]]:
    """For each question (by number) the passages that repeat its published rationale, or are a part of it.

    The authors' corpus held a rationale for every training question, so that the retriever could find the answer to
    the very question: training was easier than any test (defect 10 of the released code). Linear in the texts: a
    text is looked for only where its first eight words stand.
    """
    rationales = {n: text for n, q in enumerate(questions) if len(text := words(q.rationale)) >= RUN}
    if not rationales:
        return {}
    begins: dict[tuple[str, ...], list[int]] = {}
    for number, text in rationales.items():
        begins.setdefault(tuple(text[:RUN]), []).append(number)
    found: dict[int, set[int]] = {}
    starts: dict[tuple[str, ...], list[tuple[int, list[str]]]] = {}
    for place, passage in enumerate(passages):
        body = words(passage.text)
        if len(body) >= RUN:
            starts.setdefault(tuple(body[:RUN]), []).append((place, body))
        for at in range(len(body) - RUN + 1):
            for number in begins.get(tuple(body[at : at + RUN]), ()):
                text = rationales[number]
                if body[at : at + len(text)] == text:
                    found.setdefault(number, set()).add(place)
    for number, text in rationales.items():
        for at in range(len(text) - RUN + 1):
            for place, body in starts.get(tuple(text[at : at + RUN]), ()):
                if text[at : at + len(body)] == body:
                    found.setdefault(number, set()).add(place)
    return {number: frozenset(places) for number, places in found.items()}


def assemble(config: RunConfig, texts: Texts | None = None) -> Parts:
    """Tokenizers, prompts and the checks that need them; no weights are read yet.

    Raises:
        UserError: a question or passage that the language model cannot take, or no such model.
    """
    texts = texts or load_texts(config)
    directory = _directory(config.llm)
    llm_tokenizer = load_llm_tokenizer(directory) if directory else _word_tokenizer(texts)
    prompts = PromptBuilder(
        llm_tokenizer,
        texts.passages,
        max_length=config.llm.max_length,
        document_tokens=config.llm.document_tokens or None,
        show_options=config.llm.show_options,
    )
    prompts.check([*texts.train, *texts.probe, *texts.test])
    directory = _directory(config.retriever)
    base = load_retriever_tokenizer(directory) if directory else _word_tokenizer(texts)
    return Parts(config, texts, llm_tokenizer, make_tokenizer(base, config.retriever), prompts)


def _directory(config: LLMConfig | RetrieverConfig) -> str | Path | None:
    return config.path or (package_directory(config.package) if config.package else None)


def _word_tokenizer(texts: Texts) -> PreTrainedTokenizerBase:
    # Words of the corpus and of the wordings trained on: test questions add none.
    sentences = [sentence.replace("{name}", " ") for kind in WORDINGS.values() for sentence in kind["train"]]
    options = [option for question in texts.train for option in question.options]
    bodies = [part for passage in texts.passages for part in (passage.title, passage.text)]
    return build_word_tokenizer([*bodies, *sentences, *options, "Reference: Question: Options: | Answer:"])

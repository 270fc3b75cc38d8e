"""From a recipe and its checked texts to tokenizers, prompts and untrained models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from jmlr.config import LLMConfig, RetrieverConfig, RunConfig
from jmlr.data.prompts import PromptBuilder
from jmlr.data.texts import Texts, load_texts
from jmlr.data.vocabulary import build_word_tokenizer
from jmlr.data.wordings import WORDINGS
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

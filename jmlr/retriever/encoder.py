"""ColBERT (Khattab and Zaharia 2020): one BERT for queries and documents, a linear map, unit-length token vectors.

Conventions follow the authors' code: a marker after [CLS] tells queries from documents; queries are padded with
[MASK] to a fixed length, and those positions are encoded and count in the score though no other token attends to
them; documents keep no padding and no punctuation. The weights are named as in ColBERTv2 checkpoints (``bert.*``,
``linear.weight``), so those load unchanged, and so does any plain BERT (with a fresh linear map).
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel, PreTrainedTokenizerBase

from jmlr.config import RetrieverConfig
from jmlr.errors import UserError

DEFAULT_MARKERS = ("[unused0]", "[unused1]")


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of some texts. ``attend`` is what BERT's attention sees, ``keep`` what MaxSim counts."""

    ids: Tensor  # int64 [N, L]
    attend: Tensor  # int64 [N, L]
    keep: Tensor  # bool [N, L]

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(self.ids.to(device), self.attend.to(device), self.keep.to(device))

    def whole_rows(self, index: Tensor) -> TokenBatch:
        """The chosen rows at full length."""
        return TokenBatch(self.ids[index], self.attend[index], self.keep[index])

    def rows(self, index: Tensor) -> TokenBatch:
        """The chosen rows, cut to the longest of them."""
        attend = self.attend[index]
        length = max(int(attend.sum(-1).max()), 1) if len(attend) else 1
        return TokenBatch(self.ids[index, :length], attend[:, :length], self.keep[index, :length])


class ColBERTTokenizer:
    """Turns texts into ids under ColBERT's conventions, the same in the index, in training and at inference."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        query_length: int,
        document_length: int,
        mask_punctuation: bool = True,
        query_marker: str = DEFAULT_MARKERS[0],
        document_marker: str = DEFAULT_MARKERS[1],
    ) -> None:
        self.tokenizer = tokenizer
        self.query_length = query_length
        self.document_length = document_length
        self.query_marker = self._id(query_marker)
        self.document_marker = self._id(document_marker)
        self.cls, self.sep, self.pad, self.mask = (
            self._special(name) for name in ("cls_token_id", "sep_token_id", "pad_token_id", "mask_token_id")
        )
        ids = [tokenizer.convert_tokens_to_ids(mark) for mark in string.punctuation] if mask_punctuation else []
        self.skip = torch.tensor(sorted({i for i in ids if i is not None and i != tokenizer.unk_token_id}))

    def _id(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise UserError(
                f"the retriever's vocabulary has no marker {token!r}",
                remedy="use a BERT-type tokenizer, or add the token to it",
            )
        return int(index)

    def _special(self, name: str) -> int:
        index = getattr(self.tokenizer, name)
        if index is None:
            raise UserError(
                f"the retriever's tokenizer has no {name.removesuffix('_id')}", remedy="use a BERT-type tokenizer"
            )
        return int(index)

    def _pieces(self, texts: Sequence[str], marker: int, length: int) -> list[list[int]]:
        # [CLS], marker and [SEP] take three places.
        if not texts:
            return []
        batch = self.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=length - 3)
        return [[self.cls, marker, *ids, self.sep] for ids in batch["input_ids"]]

    def queries(self, texts: Sequence[str]) -> TokenBatch:
        """[N, query_length]: padded with [MASK], every position counts."""
        rows = self._pieces(texts, self.query_marker, self.query_length)
        ids = torch.full((len(rows), self.query_length), self.mask)
        attend = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            attend[row, : len(tokens)] = 1
        return TokenBatch(ids, attend, torch.ones_like(ids, dtype=torch.bool))

    def documents(self, texts: Sequence[str]) -> TokenBatch:
        """[N, longest]: right padding; padding and punctuation do not count."""
        rows = self._pieces(texts, self.document_marker, self.document_length)
        ids = torch.full((len(rows), max(map(len, rows), default=1)), self.pad)
        attend = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            attend[row, : len(tokens)] = 1
        return TokenBatch(ids, attend, attend.bool() & ~torch.isin(ids, self.skip))


class ColBERT(BertPreTrainedModel):
    """The encoder. ``config.colbert_dim`` is the width of a token vector; markers and lengths lie in the config too."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.linear = nn.Linear(config.hidden_size, getattr(config, "colbert_dim", 128), bias=False)
        self.post_init()

    def forward(self, ids: Tensor, attend: Tensor) -> Tensor:
        """ids, attend int64 [N, L] -> unit vectors [N, L, dim]."""
        hidden = self.bert(input_ids=ids, attention_mask=attend).last_hidden_state
        return nn.functional.normalize(self.linear(hidden).float(), dim=-1).to(hidden.dtype)

    @torch.no_grad()
    def lexical_start(self, document_frequency: Tensor, documents: int, generator: torch.Generator) -> None:
        """Starts an untrained encoder as a search by rare words, from which the rank loss can climb.

        With positions, types and every sub-layer's output at zero, the residual stream is the word itself. A word's
        vector is a u + sqrt(1 - a^2) r: u one direction for all, r random, and a = 1 - idf / log(documents), so that
        equal rare words add about their idf to the score and common words, marks and paddings about nothing. A
        plain random BERT mixes all words of a text into each vector and never recovers; random vectors without idf
        are thrown by the [MASK] paddings, which all match the same word (docs/log.md).

        Args:
            document_frequency: int64 [vocabulary], in how many documents a token is kept.
            documents: their number.
        """
        embeddings = self.bert.embeddings
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        for layer in self.bert.encoder.layer:
            for output in (layer.attention.output.dense, layer.output.dense):
                output.weight.zero_()
                output.bias.zero_()
        words = embeddings.word_embeddings.weight
        words.normal_(0.0, 1.0, generator=generator)
        common = torch.empty(words.shape[1]).normal_(0.0, 1.0, generator=generator)
        frequency = document_frequency.clamp(min=1).double()
        share = (torch.log(frequency) / math.log(max(documents, 2))).clamp(max=1.0).to(words.dtype)
        share[document_frequency == 0] = 1.0  # what no document holds can match nothing
        words.copy_(share[:, None] * common + (1 - share[:, None] ** 2).sqrt() * words)
        nn.init.orthogonal_(self.linear.weight, generator=generator)

    def freeze_words(self) -> None:
        """Holds the word vectors fixed: with few questions they would be fitted to the training names alone."""
        self.bert.embeddings.word_embeddings.weight.requires_grad_(False)

    @torch.no_grad()
    def encode(self, tokens: TokenBatch, batch_size: int = 64) -> list[Tensor]:
        """The kept token vectors of each text: N tensors float32 [kept, dim], on the CPU."""
        training = self.training
        self.eval()
        vectors: list[Tensor] = [torch.empty(0)] * len(tokens.ids)
        order = tokens.attend.sum(-1).argsort()  # texts of like length share a batch: little padding
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokens.rows(rows)
            encoded = self(batch.ids.to(self.device), batch.attend.to(self.device)).float().cpu()
            for row, vector, keep in zip(rows.tolist(), encoded, batch.keep, strict=True):
                vectors[row] = vector[keep]
        self.train(training)
        return vectors

    @torch.no_grad()
    def encode_queries(self, tokens: TokenBatch) -> Tensor:
        """float32 [N, query_length, dim], without gradient, in eval mode."""
        training = self.training
        self.eval()
        encoded = self(tokens.ids.to(self.device), tokens.attend.to(self.device)).float()
        self.train(training)
        return encoded


def save_retriever(directory: Path, model: ColBERT, tokenizer: ColBERTTokenizer) -> None:
    """Writes model, tokenizer and conventions as an ordinary transformers directory."""
    markers = tokenizer.tokenizer.convert_ids_to_tokens([tokenizer.query_marker, tokenizer.document_marker])
    model.config.colbert_query_length = tokenizer.query_length
    model.config.colbert_document_length = tokenizer.document_length
    model.config.colbert_mask_punctuation = bool(len(tokenizer.skip))
    model.config.colbert_markers = list(markers)
    model.save_pretrained(directory)
    tokenizer.tokenizer.save_pretrained(directory)


def build_retriever(
    config: RetrieverConfig, tokenizer: ColBERTTokenizer, documents: TokenBatch, *, seed: int
) -> ColBERT:
    """An untrained ColBERT of the shape that the recipe states; `documents` give the lexical start its word counts."""
    generator = torch.Generator().manual_seed(seed)
    shape = BertConfig(
        vocab_size=len(tokenizer.tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=max(config.query_length, config.document_length),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad,
        colbert_dim=config.dim,
    )
    model = ColBERT(shape)
    if config.lexical_start:
        model.lexical_start(_document_frequency(documents, tokenizer), len(documents.ids), generator)
    if config.freeze_embeddings:
        model.freeze_words()
    return model


def _document_frequency(documents: TokenBatch, tokenizer: ColBERTTokenizer) -> Tensor:
    counts = torch.zeros(len(tokenizer.tokenizer), dtype=torch.int64)
    for ids, keep in zip(documents.ids, documents.keep, strict=True):
        counts[ids[keep].unique()] += 1
    counts[torch.tensor(tokenizer.tokenizer.all_special_ids)] = 0
    return counts


def _unusable(directory: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot be loaded as a BERT-type retriever ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
        file=directory,
        remedy="restore the checkpoint or train again",
    )


def _config(directory: str | Path) -> BertConfig:
    if not (Path(directory) / "config.json").is_file():
        raise UserError("no retriever checkpoint (config.json) there", file=directory, remedy="name a saved directory")
    try:
        return BertConfig.from_pretrained(directory)
    except Exception as error:  # the loaders raise many types for a damaged or foreign file
        raise _unusable(Path(directory), error) from None


def load_retriever_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        UserError: nothing loadable there.
    """
    _config(directory)
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:
        raise _unusable(Path(directory), error) from None


def make_tokenizer(base: PreTrainedTokenizerBase, config: RetrieverConfig) -> ColBERTTokenizer:
    """ColBERT's conventions around a BERT tokenizer."""
    return ColBERTTokenizer(
        base,
        query_length=config.query_length,
        document_length=config.document_length,
        mask_punctuation=config.mask_punctuation,
    )


def load_retriever(directory: str | Path, config: RetrieverConfig) -> tuple[ColBERT, ColBERTTokenizer]:
    """Loads our own directory, a ColBERTv2 checkpoint, or any BERT; what the directory states wins over the recipe.

    A BERT without ColBERT's linear map gets an orthogonal one, which keeps its similarities.

    Raises:
        UserError: no BERT-type checkpoint there.
    """
    shape = _config(directory)
    if not hasattr(shape, "colbert_dim"):
        shape.colbert_dim = config.dim
    try:
        model, report = ColBERT.from_pretrained(directory, config=shape, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise _unusable(Path(directory), error) from None
    missing = set(report["missing_keys"])
    if missing - {"linear.weight"}:
        raise UserError(
            f"the checkpoint lacks {len(missing)} weights of a BERT, {sorted(missing)[0]!r} among them",
            file=directory,
            remedy="name a BERT-type checkpoint",
        )
    if "linear.weight" in missing:
        nn.init.orthogonal_(model.linear.weight, generator=torch.Generator().manual_seed(0))
    if config.freeze_embeddings:
        model.freeze_words()
    stated = shape.to_dict()
    tokenizer = ColBERTTokenizer(
        load_retriever_tokenizer(directory),
        query_length=stated.get("colbert_query_length", config.query_length),
        document_length=stated.get("colbert_document_length", config.document_length),
        mask_punctuation=stated.get("colbert_mask_punctuation", config.mask_punctuation),
        query_marker=stated.get("colbert_markers", DEFAULT_MARKERS)[0],
        document_marker=stated.get("colbert_markers", DEFAULT_MARKERS)[1],
    )
    return model, tokenizer

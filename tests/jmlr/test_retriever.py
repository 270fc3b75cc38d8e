"""ColBERT's conventions and the index over its vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from jmlr.config import RetrieverConfig
from jmlr.data.vocabulary import build_word_tokenizer
from jmlr.errors import UserError
from jmlr.retriever.encoder import (
    ColBERT,
    ColBERTTokenizer,
    build_retriever,
    load_retriever,
    make_tokenizer,
    save_retriever,
)
from jmlr.retriever.index import ExactIndex, encoder_fingerprint

TEXTS = [
    "Marfan syndrome affects the heart, the eyes and the bones.",
    "Cystic fibrosis: inheritance. Both copies are changed.",
    "Huntington disease is caused by one changed copy (HTT).",
    "The heart pumps blood.",
]
SHAPE = RetrieverConfig(hidden_size=32, heads=2, intermediate_size=64, dim=16, query_length=12, document_length=20)


@pytest.fixture
def tokenizer() -> ColBERTTokenizer:
    return make_tokenizer(build_word_tokenizer(TEXTS), SHAPE)


@pytest.fixture
def retriever(tokenizer: ColBERTTokenizer) -> ColBERT:
    return build_retriever(SHAPE, tokenizer, tokenizer.documents(TEXTS), seed=0).eval()


def perturb(model: ColBERT) -> ColBERT:
    """Away from the lexical start, where attention does nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_queries_are_padded_with_mask_tokens_that_count(tokenizer: ColBERTTokenizer) -> None:
    batch = tokenizer.queries(
        ["the heart", "Marfan syndrome affects the eyes of the heart of blood and bones and more"]
    )
    assert batch.ids.shape == (2, 12)
    assert batch.ids[0].tolist()[:2] == [tokenizer.cls, tokenizer.query_marker]
    assert (batch.ids[0, 5:] == tokenizer.mask).all() and batch.attend[0].tolist() == [1] * 5 + [0] * 7
    assert batch.keep.all()
    assert batch.ids[1, -1] == tokenizer.sep and batch.attend[1].all()


def test_documents_keep_no_padding_and_no_punctuation(tokenizer: ColBERTTokenizer) -> None:
    batch = tokenizer.documents(TEXTS)
    words = tokenizer.tokenizer.convert_ids_to_tokens(batch.ids[0][batch.keep[0]].tolist())
    assert words[:2] == ["[CLS]", "[unused1]"] and words[-1] == "[SEP]"
    assert not {",", ".", "[PAD]"} & set(words) and "heart" in words
    assert batch.ids.shape[1] <= 20


def test_no_token_attends_to_the_query_padding(retriever: ColBERT, tokenizer: ColBERTTokenizer) -> None:
    perturb(retriever)
    batch = tokenizer.queries(["the heart"])
    before = retriever(batch.ids, batch.attend)
    other = batch.ids.clone()
    other[0, -1] = tokenizer.cls
    after = retriever(other, batch.attend)
    assert torch.equal(before[0, :-1], after[0, :-1]) and not torch.equal(before[0, -1], after[0, -1])
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(1, 12))


def test_encode_does_not_depend_on_the_batch(retriever: ColBERT, tokenizer: ColBERTTokenizer) -> None:
    perturb(retriever)
    batch = tokenizer.documents(TEXTS)
    together = retriever.encode(batch, batch_size=4)
    alone = retriever.encode(batch, batch_size=1)
    for a, b, keep in zip(together, alone, batch.keep, strict=True):
        assert len(a) == int(keep.sum())
        torch.testing.assert_close(a, b)


def test_lexical_start_finds_the_document_that_shares_words(retriever: ColBERT, tokenizer: ColBERTTokenizer) -> None:
    index = _index(retriever, tokenizer)
    _, best = index.search(retriever.encode_queries(tokenizer.queries(["cystic fibrosis", "huntington disease"])), 1)
    assert best.flatten().tolist() == [1, 2]


def _index(retriever: ColBERT, tokenizer: ColBERTTokenizer) -> ExactIndex:
    vectors = retriever.encode(tokenizer.documents(TEXTS))
    return ExactIndex.build(
        vectors,
        [f"p{n}" for n in range(len(TEXTS))],
        corpus_hash="c",
        encoder=encoder_fingerprint(retriever),
        document_length=20,
    )


def test_search_is_exact(retriever: ColBERT, tokenizer: ColBERTTokenizer) -> None:
    perturb(retriever)
    index = _index(retriever, tokenizer)
    queries = retriever.encode_queries(tokenizer.queries(["blood of the heart", "one copy"]))
    vectors = retriever.encode(tokenizer.documents(TEXTS))
    expected = torch.stack([torch.stack([(q @ d.T).max(-1).values.sum() for d in vectors]) for q in queries])
    scores, numbers = index.search(queries, 10)  # more than there are
    assert scores.shape == (2, 4)
    torch.testing.assert_close(scores, expected.gather(1, numbers))
    assert (scores.diff(dim=-1) <= 0).all()
    # The candidate search, wide enough to see every token, gives the same.
    by_tokens = index.search(queries, 4, tokens_each=1000)
    torch.testing.assert_close(by_tokens[0], scores)
    assert torch.equal(by_tokens[1], numbers)


def test_candidate_search_pads_missing_rows(retriever: ColBERT, tokenizer: ColBERTTokenizer) -> None:
    index = _index(retriever, tokenizer)
    scores, numbers = index.search(retriever.encode_queries(tokenizer.queries(["fibrosis"])), 4, tokens_each=1)
    assert (numbers[0] == -1).any() and torch.isinf(scores[0][numbers[0] == -1]).all()


def test_index_survives_the_disk(retriever: ColBERT, tokenizer: ColBERTTokenizer, tmp_path: Path) -> None:
    index = _index(retriever, tokenizer)
    index.save(tmp_path / "index")
    index.save(tmp_path / "index")  # replaces, leaves nothing behind
    assert len(list((tmp_path / "index").iterdir())) == 4
    again = ExactIndex.load(tmp_path / "index", corpus_hash="c", encoder=encoder_fingerprint(retriever))
    assert torch.equal(again.vectors, index.vectors) and again.passage_ids == index.passage_ids


@pytest.mark.parametrize(
    "damage",
    ["missing", "manifest", "tokens", "passages", "corpus", "encoder", "length"],
)
def test_a_bad_index_is_one_sentence(
    retriever: ColBERT, tokenizer: ColBERTTokenizer, tmp_path: Path, damage: str
) -> None:
    directory = tmp_path / "index"
    if damage != "missing":
        _index(retriever, tokenizer).save(directory)
    expected = {"corpus_hash": "c", "encoder": encoder_fingerprint(retriever), "document_length": 20}
    if damage == "manifest":
        (directory / "manifest.json").write_text("{")
    elif damage == "tokens":
        path = next(directory.glob("tokens-*"))
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "passages":
        path = next(directory.glob("passages-*"))
        path.write_text(json.dumps(["p0"]))
    elif damage in ("corpus", "encoder"):
        expected["corpus_hash" if damage == "corpus" else "encoder"] = "another"
    elif damage == "length":
        expected["document_length"] = 21
    with pytest.raises(UserError, match="jmlr index") as caught:
        ExactIndex.load(directory, **expected)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


def test_retriever_survives_the_disk(retriever: ColBERT, tokenizer: ColBERTTokenizer, tmp_path: Path) -> None:
    save_retriever(tmp_path, perturb(retriever), tokenizer)
    again, its_tokenizer = load_retriever(tmp_path, replace(SHAPE, query_length=99, dim=99))
    batch = its_tokenizer.queries(TEXTS)
    assert batch.ids.shape == (4, 12)  # the saved conventions win over the recipe's
    assert torch.equal(again.eval()(batch.ids, batch.attend), retriever(batch.ids, batch.attend))
    assert encoder_fingerprint(again) == encoder_fingerprint(retriever)


def test_a_plain_bert_becomes_a_colbert(tokenizer: ColBERTTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    bert = BertModel(config).eval()
    bert.save_pretrained(tmp_path)
    tokenizer.tokenizer.save_pretrained(tmp_path)
    model, its_tokenizer = load_retriever(tmp_path, SHAPE)
    assert model.linear.weight.shape == (16, 32)
    torch.testing.assert_close(model.linear.weight @ model.linear.weight.T, torch.eye(16))
    batch = its_tokenizer.documents(TEXTS)
    hidden = bert(input_ids=batch.ids, attention_mask=batch.attend).last_hidden_state
    expected = torch.nn.functional.normalize(hidden @ model.linear.weight.T, dim=-1)
    torch.testing.assert_close(model.eval()(batch.ids, batch.attend), expected)


def test_a_foreign_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json"):
        load_retriever(tmp_path, SHAPE)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded as a BERT-type retriever"):
        load_retriever(tmp_path, SHAPE)

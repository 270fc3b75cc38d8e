"""maxsim_like against the libraries themselves: scores and gradients, in every layout they have, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peer_libraries
import pytest
import torch
from peer_scores import (
    LAYOUTS,
    LIBRARIES,
    LIBRARY_SCORES,
    MASKS,
    Score,
    assert_same,
    colbert_config,
    make_inputs,
    our_scores,
    scores_and_gradients,
    segmented_maxsim,
    sentence_transformers_scores,
)
from torch import Tensor

from jmlr_kernels import maxsim_like


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_scores_and_gradients_are_the_librarys(library: str, layout: str, masks: str) -> None:
    for seed in range(3):
        inputs = make_inputs(layout, masks, seed)
        expected = scores_and_gradients(LIBRARY_SCORES[library](layout), inputs)
        assert_same(scores_and_gradients(our_scores(library, layout, masks), inputs), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_triton_gives_the_librarys_scores(library: str, layout: str) -> None:
    pytest.importorskip("triton")
    inputs = make_inputs(layout)
    expected = scores_and_gradients(LIBRARY_SCORES[library](layout), inputs)
    assert_same(scores_and_gradients(our_scores(library, layout, backend="triton"), inputs), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_packed_documents_score_as_padded_ones(library: str, layout: str, masked: bool) -> None:
    inputs = make_inputs(layout)
    shape = inputs.document_mask.shape
    lengths = torch.randint(0, 9, shape[:-1], generator=torch.Generator().manual_seed(5)).view(-1)
    # Document 1, of negative similarities, is short by one token, or as long as the longest and has a hole.
    lengths[0], lengths[1], lengths[2] = (8, 9, 0) if masked else (9, 8, 0)
    present = (torch.arange(9) < lengths[:, None]).view(shape)
    mask = present & inputs.document_mask if masked else present
    inputs.document_mask = mask

    def packed(q: Tensor, d: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
        return maxsim_like(
            library,
            q,
            d[present],
            query_mask=query_mask,
            document_mask=document_mask[present] if masked else None,
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            candidates=layout == "candidates",
            pairs=layout == "pairs",
        )

    assert_same(scores_and_gradients(packed, inputs), scores_and_gradients(LIBRARY_SCORES[library](layout), inputs))


# --------------------------------------------------------------------------- the libraries' other entry points


def ragged(inputs: SimpleNamespace) -> tuple[list[Tensor], Tensor, Tensor]:
    """Documents 0, 1 and 3 of three lengths as a list, and packed with offsets."""
    documents = [inputs.documents[0], inputs.documents[1, :4], inputs.documents[3, :7]]
    offsets = torch.tensor([0, 9, 13, 20], dtype=torch.int32)
    return documents, torch.cat(documents), offsets


def test_sentence_transformers_lists_are_packed_documents() -> None:
    inputs = make_inputs("all")
    documents, packed, offsets = ragged(inputs)
    expected = peer_libraries.sentence_transformers().maxsim(list(inputs.queries), [*documents, packed[:0]])
    offsets = torch.cat((offsets, offsets[-1:]))
    found = maxsim_like("sentence-transformers", inputs.queries, packed, cu_seqlens=offsets)
    torch.testing.assert_close(found, expected)
    assert expected[:, 3].eq(-1e9).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_sentence_transformers_mean(layout: str, masked: bool) -> None:
    inputs = make_inputs(layout)
    inputs.queries[0, 4:] = 0  # padding, where no mask says so
    masks = (inputs.query_mask, inputs.document_mask) if masked else (None, None)
    util, scoring = peer_libraries.sentence_transformers(), peer_libraries.sentence_transformers_scoring()
    function = {
        "all": util.mean_maxsim, "candidates": scoring.mean_colbert_kd_scores, "pairs": util.mean_maxsim_pairwise
    }[layout]  # fmt: skip
    found = maxsim_like(
        "sentence-transformers", inputs.queries, inputs.documents, query_mask=masks[0], document_mask=masks[1],
        candidates=layout == "candidates", pairs=layout == "pairs", length_normalize=True,
    )  # fmt: skip
    torch.testing.assert_close(found, function(inputs.queries, inputs.documents, *masks))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sentence_transformers_takes_zero_vectors_for_padding(layout: str) -> None:
    inputs = make_inputs(layout, "none")
    inputs.queries[0, 2] = 0
    by_document = inputs.documents.view(-1, 9, 16)
    by_document[1, 3:] = 0  # would win over its negative similarities
    by_document[2] = 0  # an empty document
    library = sentence_transformers_scores(layout)
    expected = scores_and_gradients(lambda q, d, *_: library(q, d), inputs)
    assert_same(scores_and_gradients(our_scores("sentence-transformers", layout, "none"), inputs), expected)
    assert expected["scores"].eq(-1e9).any()


def groups(inputs: SimpleNamespace) -> SimpleNamespace:
    """[Nq, N, Ld, D] as the in-batch losses of two libraries take them, and [Nq * N, Ld, D] as we do."""
    inputs.grad = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    return inputs


def in_groups(library: str) -> Score:
    def score(q: Tensor, d: Tensor, queries_mask: Tensor, documents_mask: Tensor) -> Tensor:
        return maxsim_like(
            library, q, d.flatten(0, 1), query_mask=queries_mask, document_mask=documents_mask.flatten(0, 1)
        )

    return score


def test_sentence_transformers_groups_of_documents() -> None:
    inputs = groups(make_inputs("candidates"))
    expected = scores_and_gradients(peer_libraries.sentence_transformers_scoring().colbert_scores, inputs)
    assert_same(scores_and_gradients(in_groups("sentence-transformers"), inputs), expected)


def test_pylate_groups_of_documents() -> None:
    inputs = groups(make_inputs("candidates"))
    expected = scores_and_gradients(peer_libraries.pylate().ColBERTScores(), inputs)
    assert_same(scores_and_gradients(in_groups("pylate"), inputs), expected)


class Encoder(torch.nn.Module):
    """Stands in for a MultiVectorEncoder: the features are the embeddings."""

    def forward(self, features: dict[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
        return {"token_embeddings": features["token_embeddings"], "attention_mask": features["attention_mask"]}


@pytest.mark.parametrize("name", ["MultipleNegativesRanking", "DistillKLDiv", "MarginMSE"])
def test_sentence_transformers_losses_take_us_as_similarity_fct(name: str) -> None:
    loss_class = getattr(peer_libraries.sentence_transformers_losses(), f"MultiVector{name}Loss")
    inputs = make_inputs("candidates")
    inputs.grad = torch.ones(())
    teacher = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    mode = {
        "MultipleNegativesRanking": in_groups("sentence-transformers"),
        "DistillKLDiv": our_scores("sentence-transformers", "candidates"),
        "MarginMSE": our_scores("sentence-transformers", "pairs"),
    }[name]

    def similarity(q: Tensor, d: Tensor, queries_mask: Tensor, documents_mask: Tensor) -> Tensor:
        return mode(q, d, queries_mask, documents_mask)

    def loss(function: Callable[..., Tensor] | None) -> Score:
        def value(q: Tensor, d: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
            columns = [{"token_embeddings": q, "attention_mask": query_mask}]
            for k in range(4):
                columns.append({"token_embeddings": d[:, k], "attention_mask": document_mask[:, k]})
            return loss_class(Encoder(), similarity_fct=function)(columns, teacher)

        return value

    assert_same(scores_and_gradients(loss(similarity), inputs), scores_and_gradients(loss(None), inputs))


def test_pylate_pairwise() -> None:
    inputs = make_inputs("pairs", "none")
    library = peer_libraries.pylate().colbert_scores_pairwise
    expected = scores_and_gradients(lambda q, d, *_: library(q, d, backend="torch"), inputs)
    assert_same(scores_and_gradients(our_scores("pylate", "pairs", "none"), inputs), expected)


def test_colpali_engine_score_multi_vector() -> None:
    """Lists are padded with zeros to the longest of them, and a zero beats document 1's negative similarities."""
    inputs = make_inputs("all")
    documents, packed, offsets = ragged(inputs)
    score = peer_libraries.colpali_engine_processing().BaseVisualRetrieverProcessor.score_multi_vector
    expected = score(list(inputs.queries), documents, device="cpu")
    torch.testing.assert_close(maxsim_like("colpali-engine", inputs.queries, packed, cu_seqlens=offsets), expected)
    assert expected[:, 1].eq(0).all()


@pytest.mark.parametrize("name", ["ColbertLoss", "ColbertNegativeCELoss"])
def test_colpali_engine_losses(name: str) -> None:
    """Their normalised scores, from which the rest of the losses follows."""
    losses = peer_libraries.colpali_engine_losses()
    inputs = make_inputs("candidates")
    inputs.grad = torch.ones(())
    like = {"query_mask": inputs.query_mask | inputs.query_mask.all(-1, keepdim=True), "length_normalize": True}
    like["query_mask"][1, :2] = True  # the library divides by the length of an empty query: 0

    def library(q: Tensor, d: Tensor, *_: Tensor) -> Tensor:
        q, d = q * like["query_mask"].unsqueeze(-1), d * inputs.document_mask.unsqueeze(-1)
        if name == "ColbertLoss":
            return losses.ColbertLoss()(q, d[:, 0])
        return losses.ColbertNegativeCELoss(in_batch_term_weight=0.0)(q, d[:, 0], d[:, 1:])

    def ours(q: Tensor, d: Tensor, *_: Tensor) -> Tensor:
        first, first_mask = d[:, 0], inputs.document_mask[:, 0]
        if name == "ColbertLoss":
            scores = maxsim_like("colpali-engine", q, first, document_mask=first_mask, **like)
            return torch.nn.functional.cross_entropy(scores / 0.02, torch.arange(3))
        positive = maxsim_like("colpali-engine", q, first, document_mask=first_mask, pairs=True, **like)
        negative = maxsim_like(
            "colpali-engine", q, d[:, 1:], document_mask=inputs.document_mask[:, 1:], candidates=True, **like
        )
        return torch.nn.functional.softplus((negative - positive.unsqueeze(1)) / 0.02).mean()

    assert_same(scores_and_gradients(ours, inputs), scores_and_gradients(library, inputs))


def test_colbert_in_batch_loss() -> None:
    inputs = make_inputs("all")
    inputs.documents, inputs.document_mask = inputs.documents[[0, 1, 3]], inputs.document_mask[[0, 1, 3]]
    inputs.grad = torch.ones(())

    def library(q: Tensor, d: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
        model = SimpleNamespace(colbert_config=colbert_config())
        q = q * query_mask.unsqueeze(-1)
        return peer_libraries.colbert().ColBERT.compute_ib_loss(model, q, d, document_mask.unsqueeze(-1))

    def ours(*arguments: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(our_scores("colbert", "all")(*arguments), torch.arange(3))

    assert_same(scores_and_gradients(ours, inputs), scores_and_gradients(library, inputs))


@pytest.mark.slow  # compiles the library's C++, half a minute
def test_colbert_cpu_rule_is_the_compiled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = peer_libraries.colbert_with_extension(tmp_path, monkeypatch)
    inputs = make_inputs("all")
    lengths = inputs.document_mask.sum(-1)
    packed = inputs.documents[inputs.document_mask]
    assert lengths[2] == 0
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    found = maxsim_like("colbert-cpu", inputs.queries, packed, cu_seqlens=offsets)
    for i, query in enumerate(inputs.queries):
        expected = library.colbert_score_packed(query[None], packed, lengths, colbert_config())
        torch.testing.assert_close(found[i], expected)
        torch.testing.assert_close(segmented_maxsim(packed @ query.T, lengths), expected)
        assert expected[1] == 0 and expected[2] == 0
    needs_gradient = packed.clone().requires_grad_()
    assert not library.colbert_score_packed(inputs.queries[:1], needs_gradient, lengths, colbert_config()).requires_grad
    assert maxsim_like("colbert-cpu", inputs.queries, needs_gradient, cu_seqlens=offsets).requires_grad
    # std::max(a, b) is a where b is NaN: unlike ours, its maximum passes over such a token.
    poisoned = inputs.documents[0].clone()
    poisoned[4] = torch.nan
    arguments = (inputs.queries[:1], poisoned, torch.tensor([9]), colbert_config())
    assert library.colbert_score_packed(*arguments).isfinite().all()
    with pytest.raises(RuntimeError, match="expected scalar type Float"):
        library.colbert_score_packed(inputs.queries[:1].bfloat16(), packed.bfloat16(), lengths, colbert_config())

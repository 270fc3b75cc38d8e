"""Where the libraries part, one rule at a time: what each gives, what our mode gives, and what stays ours.

docs/compatibility.md names the tests of this file cell by cell.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import peer_libraries
import pytest
import torch
from peer_scores import (
    LAYOUTS,
    LIBRARIES,
    LIBRARY_SCORES,
    assert_same,
    make_inputs,
    our_scores,
    scores_and_gradients,
)
from torch import Tensor

from jmlr_kernels import maxsim, maxsim_like

# A query of two tokens against kept similarities (-1, -3) and (-2, -6), then an excluded token.
NEGATIVE_QUERY = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
NEGATIVE_DOCUMENT = torch.tensor([[[-1.0, 0.0], [-3.0, 0.0], [5.0, 1.0]]])
BOTH_TOKENS = torch.ones(1, 2, dtype=torch.bool)


def library_and_ours(library: str, *arguments: Tensor) -> list[float]:
    scores = (LIBRARY_SCORES[library]("all")(*arguments), our_scores(library, "all")(*arguments))
    return [score.item() for score in scores]


# --------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("library", "padded", "unpadded"),
    [
        ("sentence-transformers", -3, -3),
        ("pylate", 0, -3),
        ("colpali-engine", 0, -3),
        ("colbert", -3, -3),
        ("colbert-cpu", 0, 0),
    ],
)
def test_negative_similarities(library: str, padded: float, unpadded: float) -> None:
    kept = torch.tensor([[True, True, False]])
    assert library_and_ours(library, NEGATIVE_QUERY, NEGATIVE_DOCUMENT, BOTH_TOKENS, kept) == [padded, padded]
    whole = NEGATIVE_DOCUMENT[:, :2]
    assert library_and_ours(library, NEGATIVE_QUERY, whole, BOTH_TOKENS, kept[:, :2]) == [unpadded, unpadded]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_all_agree_where_similarities_are_positive(library: str, layout: str) -> None:
    inputs = make_inputs(layout)
    inputs.queries, inputs.documents = inputs.queries.abs(), inputs.documents.abs()
    inputs.document_mask[..., 3] = True
    theirs = scores_and_gradients(LIBRARY_SCORES[library](layout), inputs)
    assert_same(scores_and_gradients(LIBRARY_SCORES["sentence-transformers"](layout), inputs), theirs)
    if layout == "all":
        masks = {"query_mask": inputs.query_mask, "document_mask": inputs.document_mask}
        assert_same(scores_and_gradients(lambda q, d, *_: maxsim(q, d, **masks), inputs), theirs)


EMPTY_SCORES = [
    ("sentence-transformers", -1e9, -1e9),
    ("pylate", 0, 0),
    ("colpali-engine", 0, 0),
    ("colbert", -2 * 9999, -2 * 9999),
    ("colbert-cpu", 0, 0),
]


@pytest.mark.parametrize(("library", "score", "score_of_empty_query"), EMPTY_SCORES)
def test_empty_document(library: str, score: float, score_of_empty_query: float) -> None:
    empty = torch.zeros(1, 3, dtype=torch.bool)
    assert library_and_ours(library, NEGATIVE_QUERY, NEGATIVE_DOCUMENT, BOTH_TOKENS, empty) == [score, score]
    found = library_and_ours(library, NEGATIVE_QUERY, NEGATIVE_DOCUMENT, ~BOTH_TOKENS, empty)
    assert found == [score_of_empty_query, score_of_empty_query]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_empty_documents_and_queries_have_no_gradient(library: str, layout: str) -> None:
    found = scores_and_gradients(our_scores(library, layout), make_inputs(layout))
    assert all(value.isfinite().all() for value in found.values())
    assert not found["grad_queries"][1].any()
    assert not found["grad_documents"].view(-1, 9, 16)[2].any()


@pytest.mark.parametrize("library", LIBRARIES)
def test_documents_without_any_token(library: str) -> None:
    """Ld = 0, where only sentence-transformers has a score of its own."""
    score = {name: score for name, score, _ in EMPTY_SCORES}[library]
    found = maxsim_like(library, NEGATIVE_QUERY, NEGATIVE_DOCUMENT[:, :0])
    assert found.tolist() == [[score]]
    arguments = (NEGATIVE_QUERY, NEGATIVE_DOCUMENT[:, :0], BOTH_TOKENS, torch.ones(1, 0, dtype=torch.bool))
    if library in ("sentence-transformers", "colbert-cpu"):
        assert LIBRARY_SCORES[library]("all")(*arguments).tolist() == [[score]]
    else:
        with pytest.raises((RuntimeError, IndexError)):
            LIBRARY_SCORES[library]("all")(*arguments)


@pytest.mark.parametrize("library", LIBRARIES)
def test_empty_query(library: str) -> None:
    kept = torch.tensor([[True, True, False]])
    assert library_and_ours(library, NEGATIVE_QUERY, NEGATIVE_DOCUMENT, ~BOTH_TOKENS, kept) == [0, 0]


def test_length_of_an_empty_query() -> None:
    """colpali-engine's losses divide 0 by 0; here the length is at least 1."""
    losses = peer_libraries.colpali_engine_losses()
    module = losses.ColbertLoss()
    assert module._inbatch_scores(torch.zeros(1, 2, 2), NEGATIVE_DOCUMENT).isnan().all()
    for library in ("colpali-engine", "sentence-transformers"):
        found = maxsim_like(library, NEGATIVE_QUERY, NEGATIVE_DOCUMENT, query_mask=~BOTH_TOKENS, length_normalize=True)
        assert found.item() == 0


def test_lengths_by_first_component() -> None:
    """A kept query vector whose first component is 0 does not lengthen the query, in their losses and here."""
    queries = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]])
    expected = peer_libraries.colpali_engine_losses().ColbertLoss()._inbatch_scores(queries, NEGATIVE_DOCUMENT)
    found = maxsim_like("colpali-engine", queries, NEGATIVE_DOCUMENT, length_normalize=True)
    assert found.item() == expected.item() == (1 + 5 + 6) / 2


def test_below_the_fill_of_colbert() -> None:
    """A similarity below -9999 loses against ColBERT's padding; here padding never wins."""
    arguments = (1e4 * NEGATIVE_QUERY, NEGATIVE_DOCUMENT, BOTH_TOKENS, torch.tensor([[True, True, False]]))
    assert library_and_ours("colbert", *arguments) == [-2 * 9999, -3e4]


# --------------------------------------------------------------------------- what stays ours


@pytest.mark.parametrize(
    ("library", "scores_dtype"),
    [
        ("sentence-transformers", torch.float32),
        ("pylate", torch.bfloat16),
        ("colpali-engine", torch.bfloat16),
        ("colbert", torch.bfloat16),
    ],
)
def test_bfloat16_is_summed_in_float32(library: str, scores_dtype: torch.dtype) -> None:
    """Every library rounds similarities to bfloat16, and three their sums; ours are those of the float32 inputs."""
    inputs = make_inputs("all")
    arguments = (inputs.queries.bfloat16(), inputs.documents.bfloat16(), inputs.query_mask, inputs.document_mask)
    theirs = LIBRARY_SCORES[library]("all")(*arguments)
    exact = our_scores(library, "all")(*(tensor.double() for tensor in arguments[:2]), *arguments[2:])
    ours = our_scores(library, "all")(*arguments)
    assert theirs.dtype == scores_dtype and ours.dtype == torch.float32
    real = exact.abs() < 9999
    torch.testing.assert_close(ours[real].double(), exact[real], rtol=1e-6, atol=1e-5)
    assert (theirs[real] - exact[real]).abs().max() > 100 * (ours[real] - exact[real]).abs().max()


@pytest.mark.parametrize("library", LIBRARIES)
def test_ties(library: str) -> None:
    """Two equal document tokens: colpali-engine's amax shares the gradient, the others and we send it to the first."""
    inputs = make_inputs("all", "none")
    inputs.documents = torch.cat((inputs.documents, inputs.documents), dim=1)
    inputs.document_mask = torch.ones(5, 18, dtype=torch.bool)
    theirs = scores_and_gradients(LIBRARY_SCORES[library]("all"), inputs)
    ours = scores_and_gradients(our_scores(library, "all", "none"), inputs)
    assert not ours["grad_documents"][:, 9:].any()
    # amax shares, and so does the restatement of C++ that has no gradient of its own.
    assert theirs["grad_documents"][:, 9:].any() == (library in ("colpali-engine", "colbert-cpu"))
    for gradients in (theirs, ours):
        first, second = gradients["grad_documents"].split(9, dim=1)
        gradients["grad_documents"] = first + second
    assert_same(ours, theirs)


def test_a_kept_token_wins_a_tie_with_the_floor() -> None:
    """PyLate gives the gradient to whichever comes first, an excluded token or a kept one of similarity 0."""
    query, grads = torch.tensor([[[1.0, 0.0]]]), []
    document = torch.tensor([[[7.0, 7.0], [0.0, 3.0], [-1.0, 0.0]]])
    masks = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[False, True, True]])
    for score in (LIBRARY_SCORES["pylate"]("all"), our_scores("pylate", "all")):
        leaf = query.clone().requires_grad_()
        score(leaf, document, *masks).sum().backward()
        grads.append(leaf.grad.flatten().tolist())
    assert grads == [[0, 0], [0, 3]]


@pytest.mark.parametrize("library", ["sentence-transformers", "pylate", "colpali-engine", "colbert", "colbert-cpu"])
def test_nan(library: str) -> None:
    """NaN in a kept token reaches every score of ours; in an excluded one, none. Libraries that multiply by a mask
    let it through, and std::max drops a kept NaN (that is the compiled function; the restatement does not)."""
    kept = torch.tensor([[True, True, False]])
    document = NEGATIVE_DOCUMENT.clone()
    document[0, 1] = torch.nan
    for backend in ("torch", "triton"):
        found = our_scores(library, "all", backend=backend)(NEGATIVE_QUERY, document, BOTH_TOKENS, kept)
        assert found.isnan().all()
    document = NEGATIVE_DOCUMENT.clone()
    document[0, 2] = torch.nan
    theirs, ours = library_and_ours(library, NEGATIVE_QUERY, document, BOTH_TOKENS, kept)
    assert ours == our_scores(library, "all")(NEGATIVE_QUERY, NEGATIVE_DOCUMENT, BOTH_TOKENS, kept).item()
    assert (theirs != theirs) == (library in ("pylate", "colpali-engine"))
    # An excluded query token is multiplied by 0 in every library, and so lets its NaN through.
    query, first = NEGATIVE_QUERY.clone(), torch.tensor([[True, False]])
    query[0, 1] = torch.nan
    theirs, ours = library_and_ours(library, query, NEGATIVE_DOCUMENT, first, kept)
    assert ours == our_scores(library, "all")(NEGATIVE_QUERY, NEGATIVE_DOCUMENT, first, kept).item()
    assert theirs != theirs


# --------------------------------------------------------------------------- defects of the libraries


def test_pylate_flash_forgets_holes() -> None:
    """Its flash backend turns a mask into a length. With holes, the default for documents, that keeps other tokens:
    the scores are not PyLate's own. Ours are."""
    inputs = make_inputs("all")
    lengths = peer_libraries.pylate_flash()._mask_to_lengths(inputs.document_mask)
    prefix = torch.arange(9) < lengths[:, None]
    score = LIBRARY_SCORES["pylate"]("all")
    reference = score(inputs.queries, inputs.documents, inputs.query_mask, inputs.document_mask)
    as_flash = score(inputs.queries, inputs.documents, inputs.query_mask, prefix)
    assert (as_flash - reference).abs().max() > 1
    ours = our_scores("pylate", "all")(inputs.queries, inputs.documents, inputs.query_mask, inputs.document_mask)
    torch.testing.assert_close(ours, reference)


def test_pairs_have_gradients() -> None:
    """PyLate's flash backend scores pairs with a function that has none and does not say so."""
    assert "requires_grad" not in inspect.getsource(peer_libraries.pylate_flash().colbert_scores_pairwise_flash)
    for library in LIBRARIES:
        found = scores_and_gradients(our_scores(library, "pairs"), make_inputs("pairs"))
        assert found["grad_queries"].any() and found["grad_documents"].any()


@pytest.mark.parametrize("library", LIBRARIES)
def test_distillation_survives_an_empty_candidate(library: str) -> None:
    """PyLate's Distillation scales a row to [0, 1] by its least and greatest score: NaN once one of them is -inf."""
    inputs = make_inputs("candidates")

    def scaled(*arguments: Tensor) -> Tensor:
        scores = our_scores(library, "candidates")(*arguments)
        low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        return (scores - low) / (high - low + 1e-8)

    assert all(value.isfinite().all() for value in scores_and_gradients(scaled, inputs).values())


def test_colpali_engine_scores_depend_on_the_batch() -> None:
    """A document scores otherwise beside a longer one, whose length pads it with zeros. Without the padding there is
    one score: maxsim on packed documents."""
    score = peer_libraries.colpali_engine_processing().BaseVisualRetrieverProcessor.score_multi_vector
    short, long = NEGATIVE_DOCUMENT[0, :2], torch.cat((NEGATIVE_DOCUMENT[0], NEGATIVE_DOCUMENT[0]))
    alone = score(list(NEGATIVE_QUERY), [short], device="cpu")[0, 0].item()
    beside = score(list(NEGATIVE_QUERY), [short, long], device="cpu")[0, 0].item()
    assert (alone, beside) == (-3, 0)
    assert score(list(NEGATIVE_QUERY), [short, long], batch_size=1, device="cpu")[0, 0].item() == alone
    offsets = torch.tensor([0, 2, 8], dtype=torch.int32)
    packed = torch.cat((short, long))
    assert maxsim_like("colpali-engine", NEGATIVE_QUERY, packed, cu_seqlens=offsets)[0, 0] == beside
    assert maxsim(NEGATIVE_QUERY, packed, cu_seqlens=offsets)[0, 0] == alone


def test_colbert_ranks_otherwise_without_a_gpu() -> None:
    """The same two documents change places between its two functions, and between our two modes."""
    documents = torch.tensor([[[-1.0, -1.0]], [[1.0, -9.0]]])
    query, kept = torch.eye(2)[None], torch.ones(2, 1, dtype=torch.bool)
    arguments = (query, documents, BOTH_TOKENS, kept)
    for scores in (LIBRARY_SCORES, {name: lambda _, name=name: our_scores(name, "all") for name in LIBRARIES}):
        assert scores["colbert"]("all")(*arguments).tolist() == [[-2, -8]]
        assert scores["colbert-cpu"]("all")(*arguments).tolist() == [[0, 1]]


# --------------------------------------------------------------------------- arguments, compilation


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_gradcheck(library: str, layout: str) -> None:
    inputs = make_inputs(layout)
    leaves = [tensor[..., :6].double().requires_grad_() for tensor in (inputs.queries, inputs.documents)]
    score = our_scores(library, layout)
    # Without the clamp a finite difference would drown in -1e9.
    assert torch.autograd.gradcheck(
        lambda q, d: score(q, d, inputs.query_mask, inputs.document_mask).clamp_min(-1e3), leaves, fast_mode=True
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_compiles_whole(library: str) -> None:
    inputs = make_inputs("all")
    eager = our_scores(library, "all")
    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert_same(scores_and_gradients(compiled, inputs), scores_and_gradients(eager, inputs))


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_to_score(library: str) -> None:
    for query_count, documents in [(0, 2), (2, 0), (0, 0)]:
        q, d = torch.randn(query_count, 3, 4), torch.randn(documents, 5, 4)
        mask = torch.ones(documents, 5, dtype=torch.bool)
        assert maxsim_like(library, q, d, document_mask=mask).shape == (query_count, documents)
        offsets = torch.zeros(documents + 1, dtype=torch.int32)
        assert maxsim_like(library, q, d[0:0, 0], cu_seqlens=offsets).shape == (query_count, documents)
    q, d = torch.randn(0, 3, 4), torch.randn(0, 5, 4)
    assert maxsim_like(library, q, d, pairs=True).shape == (0,)
    assert maxsim_like(library, q, d[:, 0], cu_seqlens=torch.zeros(1, dtype=torch.int32), pairs=True).shape == (0,)
    assert maxsim_like(library, torch.randn(2, 0, 4), torch.randn(3, 5, 4)).tolist() == [[0] * 3] * 2


def test_fractional_masks_are_refused() -> None:
    """Two libraries take them as weights: sentence-transformers on the query's side, PyLate on both."""
    half, whole = torch.full((1, 2), 0.5), torch.ones(1, 2)
    documents = -NEGATIVE_DOCUMENT[:, :2]  # maxima 3 and 6
    library = peer_libraries.sentence_transformers().maxsim
    assert (
        library(NEGATIVE_QUERY, documents, half, whole) == 4.5 and library(NEGATIVE_QUERY, documents, whole, half) == 9
    )
    library = peer_libraries.pylate().colbert_scores
    assert library(NEGATIVE_QUERY, documents, half, whole) == library(NEGATIVE_QUERY, documents, whole, half) == 4.5
    for name in LIBRARIES:
        with pytest.raises(TypeError, match=r"query_mask must be bool.*call .bool\(\) on it"):
            maxsim_like(name, NEGATIVE_QUERY, documents, query_mask=half)
        with pytest.raises(TypeError, match=r"document_mask must be bool.*call .bool\(\) on it"):
            maxsim_like(name, NEGATIVE_QUERY, documents, document_mask=half)


def test_bad_arguments_are_named() -> None:
    q, d = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="library='colpali'.*sentence-transformers, pylate"):
        maxsim_like("colpali", q, d)
    with pytest.raises(ValueError, match="pylate has no length normalisation.*sentence-transformers, colpali-engine"):
        maxsim_like("pylate", q, d, length_normalize=True)
    with pytest.raises(ValueError, match="exclude each other"):
        maxsim_like("pylate", q, d, pairs=True, candidates=True)
    with pytest.raises(ValueError, match="there are 2 queries and 1"):
        maxsim_like("pylate", q, d[:1], pairs=True)
    with pytest.raises(ValueError, match=r"\[Nq, Ld, D\] with pairs"):
        maxsim_like("pylate", q, d[0], pairs=True)
    with pytest.raises(ValueError, match="nested"):
        maxsim_like("pylate", q, torch.nested.nested_tensor([d[0], d[1, :2]], layout=torch.jagged))
    with pytest.raises(RuntimeError, match="cannot run"):
        maxsim_like("colbert", q, d, backend="cuda")


# --------------------------------------------------------------------------- the libraries are really there


@pytest.mark.parametrize("distribution", peer_libraries.PEERS)
def test_libraries_can_be_imported(distribution: str) -> None:
    """Skipped only where `make test` never installed them."""
    modules = {
        "sentence-transformers": peer_libraries.sentence_transformers,
        "pylate": peer_libraries.pylate,
        "colpali-engine": peer_libraries.colpali_engine,
        "colbert-ai": peer_libraries.colbert,
    }
    assert modules[distribution]()


def test_an_absent_library_fails_once_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peer_libraries.PEERS, "absent", peer_libraries.Peer("absent-library", "1.0"))
    monkeypatch.setattr(peer_libraries, "STAMP", tmp_path / "stamp")
    with pytest.raises(pytest.skip.Exception, match="`make test` installs it"):
        peer_libraries.load("absent", "absent_library")
    peer_libraries.STAMP.touch()
    with pytest.raises(pytest.fail.Exception, match="says that it did"):
        peer_libraries.load("absent", "absent_library")


def test_another_version_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peer_libraries.PEERS, "pytest", peer_libraries.Peer("pytest", "1.0"))
    with pytest.raises(pytest.fail.Exception, match="follow 1.0"):
        peer_libraries.load("pytest", "pytest")


def test_documentation_is_about_these_tests_and_versions() -> None:
    here = Path(__file__).parent
    page = (here.parents[1] / "docs" / "compatibility.md").read_text()
    tests = "".join((here / f"test_maxsim_compatibility{end}.py").read_text() for end in ("", "_rules"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 20
    assert not {name for name in named if f"def {name}(" not in tests}
    assert all(peer.version in page for peer in peer_libraries.PEERS.values())

"""Other libraries' scoring functions and ours under one signature, and inputs that tell them apart.

On CPU tensors every library computes its own plain definition, whatever kernels happen to be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import peer_libraries
import torch
from torch import Tensor

from jmlr_kernels import maxsim_like

LIBRARIES = ["sentence-transformers", "pylate", "colpali-engine", "colbert", "colbert-cpu"]
LAYOUTS = ["all", "candidates", "pairs"]
MASKS = ["none", "documents", "both"]

Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def make_inputs(layout: str, masks: str = "both", seed: int = 0) -> SimpleNamespace:
    """Random inputs; document 1 has only negative similarities, and holes where masks have any; 2 is then empty.

    With masks on both sides query 1 is empty. No two similarities are equal but those with excluded tokens.
    """
    draw = torch.Generator().manual_seed(seed)
    queries = torch.randn(3, 6, 16, generator=draw)
    shape = {"all": (5, 9), "candidates": (3, 4, 9), "pairs": (3, 9)}[layout]
    documents = torch.randn(*shape, 16, generator=draw)
    # A component that every query has and one document lacks makes that document's similarities negative.
    queries[..., 0] = 4.0
    by_document = documents.view(-1, 9, 16)
    by_document[1, :, 0] = -20.0
    query_mask = torch.rand(3, 6, generator=draw) > 0.3
    query_mask[1] = False
    document_mask = torch.rand(shape, generator=draw) > 0.3
    kept = document_mask.view(-1, 9)
    kept[0] = True
    kept[1, 0], kept[1, 4], kept[1, 8] = True, False, False
    kept[2] = False
    if masks != "both":
        query_mask = torch.ones_like(query_mask)
    if masks == "none":
        document_mask = torch.ones_like(document_mask)
    grad = torch.randn({"all": (3, 5), "candidates": (3, 4), "pairs": (3,)}[layout], generator=draw)
    return SimpleNamespace(
        queries=queries, documents=documents, query_mask=query_mask, document_mask=document_mask, grad=grad
    )


def scores_and_gradients(score: Score, inputs: SimpleNamespace) -> dict[str, Tensor]:
    queries, documents = inputs.queries.clone().requires_grad_(), inputs.documents.clone().requires_grad_()
    scores = score(queries, documents, inputs.query_mask, inputs.document_mask)
    scores.backward(inputs.grad)
    return {"scores": scores.detach(), "grad_queries": queries.grad, "grad_documents": documents.grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in found.items():
        # torch's own defaults for float32: the order of a sum is all that may differ.
        torch.testing.assert_close(value, expected[name], msg=lambda message, name=name: f"{name}: {message}")


def segmented_maxsim(similarities: Tensor, lengths: Tensor) -> Tensor:
    """ColBERT's C++ function of this name, restated; test_colbert_cpu_rule_is_the_compiled_one holds it to that."""
    maxima = [
        torch.cat((part.new_zeros(1, part.shape[1]), part)).amax(0) for part in similarities.split(lengths.tolist())
    ]
    return torch.stack(maxima).sum(1)


def colbert_config() -> SimpleNamespace:
    return SimpleNamespace(total_visible_gpus=0, interaction="colbert", nway=1)


def sentence_transformers_scores(layout: str) -> Score:
    if layout == "pairs":
        return peer_libraries.sentence_transformers().maxsim_pairwise
    if layout == "candidates":
        return peer_libraries.sentence_transformers_scoring().colbert_kd_scores
    return peer_libraries.sentence_transformers().maxsim


def pylate_scores(layout: str) -> Score:
    library = peer_libraries.pylate()
    if layout == "pairs":
        # The library's own takes no masks; its loop body is colbert_scores of one query and one document.
        return lambda q, d, query_mask, document_mask: torch.stack(
            [
                library.colbert_scores(
                    q[i : i + 1], d[i : i + 1], query_mask[i : i + 1], document_mask[i : i + 1], backend="torch"
                )[0, 0]
                for i in range(len(q))
            ]
        )
    function = library.colbert_kd_scores if layout == "candidates" else library.colbert_scores
    return lambda q, d, query_mask, document_mask: function(q, d, query_mask, document_mask, backend="torch")


def colpali_engine_scores(layout: str) -> Score:
    library, losses = peer_libraries.colpali_engine(), peer_libraries.colpali_engine_losses()
    functions = {
        "all": library.maxsim_inbatch,
        "candidates": library.maxsim_kd,
        # The positive pairs of ColbertNegativeCELoss.
        "pairs": lambda q, d: losses.ColbertModule()._aggregate(
            torch.einsum("bnd,bsd->bns", q, d), use_smooth_max=False, dim_max=2, dim_sum=1
        ),
    }
    # The library's encoders multiply embeddings by the attention mask.
    return lambda q, d, query_mask, document_mask: functions[layout](
        q * query_mask.unsqueeze(-1), d * document_mask.unsqueeze(-1)
    )


def colbert_scores(layout: str) -> Score:
    library = peer_libraries.colbert()

    def score(q: Tensor, d: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
        q = q * query_mask.unsqueeze(-1)  # as ColBERT.query does
        mask = document_mask.unsqueeze(-1)
        if layout == "all":
            rows = [library.colbert_score(q[i : i + 1], d, mask, colbert_config()) for i in range(len(q))]
            return torch.stack(rows)
        if layout == "candidates":
            repeated = q.repeat_interleave(d.shape[1], dim=0)  # as ColBERT.forward does with nway
            return library.colbert_score(repeated, d.flatten(0, 1), mask.flatten(0, 1), colbert_config()).view(
                d.shape[:2]
            )
        return library.colbert_score(q, d, mask, colbert_config())

    return score


def colbert_cpu_scores(layout: str) -> Score:
    def one(query: Tensor, documents: Tensor, mask: Tensor) -> Tensor:
        return segmented_maxsim(documents[mask] @ query.T, mask.sum(-1))

    def score(q: Tensor, d: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
        q = q * query_mask.unsqueeze(-1)
        if layout == "all":
            return torch.stack([one(query, d, document_mask) for query in q])
        if layout == "candidates":
            return torch.stack([one(q[i], d[i], document_mask[i]) for i in range(len(q))])
        return torch.cat([one(q[i], d[i : i + 1], document_mask[i : i + 1]) for i in range(len(q))])

    return score


LIBRARY_SCORES = {
    "sentence-transformers": sentence_transformers_scores,
    "pylate": pylate_scores,
    "colpali-engine": colpali_engine_scores,
    "colbert": colbert_scores,
    "colbert-cpu": colbert_cpu_scores,
}


def our_scores(library: str, layout: str, masks: str = "both", backend: str = "auto") -> Score:
    def score(q: Tensor, d: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
        return maxsim_like(
            library,
            q,
            d,
            query_mask=query_mask if masks == "both" else None,
            document_mask=None if masks == "none" else document_mask,
            candidates=layout == "candidates",
            pairs=layout == "pairs",
            backend=backend,
        )

    return score

"""MaxSim as other libraries define it, by name, for replacing their scoring without moving a single score.

The libraries agree wherever every document has a token that counts and the best similarity is positive. They part
over excluded tokens, empty documents and negative maxima, and models were trained with those rules. Each rule below
was read in the library's source and is tested against the installed library (tests/kernels/
test_maxsim_compatibility.py); docs/compatibility.md has them side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .function import maxsim, maxsim_candidates, maxsim_tokens


@dataclass(frozen=True)
class _Rule:
    """Where a library departs from :func:`jmlr_kernels.maxsim`.

    Attributes:
        floor: when the maximum of a query token is at least 0: "never", in documents with "excluded" tokens (the
            library sets their similarities to 0 and lets them compete), or "always" (its maximum starts at 0).
        empty_score: score of a document without kept tokens, whatever the query.
        empty_token_score: the same per query token, excluded ones included.
        zero_rows_are_padding: a side without a mask excludes its all-zero vectors.
        length_from: what `length_normalize` counts: the "mask" of the query, the "first" component of its vectors
            being non-zero, or None where the library has no such option.
    """

    floor: str = "never"
    empty_score: float = 0.0
    empty_token_score: float = 0.0
    zero_rows_are_padding: bool = False
    length_from: str | None = None


_RULES = {
    "sentence-transformers": _Rule(empty_score=-1e9, zero_rows_are_padding=True, length_from="mask"),
    "pylate": _Rule(floor="excluded"),
    "colpali-engine": _Rule(floor="excluded", length_from="first"),
    "colbert": _Rule(empty_token_score=-9999.0),
    "colbert-cpu": _Rule(floor="always"),
}


def maxsim_like(
    library: str,
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    candidates: bool = False,
    pairs: bool = False,
    length_normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The score that another library gives, and its gradients, computed by :func:`jmlr_kernels.maxsim`.

    ============================  ==================================================================================
    `library`                     departs from :func:`maxsim` in this
    ============================  ==================================================================================
    ``"sentence-transformers"``   6.2: `maxsim`, `maxsim_pairwise`, `colbert_scores`, `colbert_kd_scores` and their
                                  mean forms. A document without kept tokens scores -1e9, before any division. A side
                                  given without a mask (padded, not packed) excludes its all-zero vectors.
    ``"pylate"``                  1.6: `colbert_scores`, `colbert_kd_scores`, `colbert_scores_pairwise`. An excluded
                                  document token competes with similarity 0, so the maximum over a document that has
                                  one is never negative.
    ``"colpali-engine"``          0.3: `score_multi_vector` and the losses. Takes no masks: padding is zero vectors,
                                  which compete with similarity 0. A mask given here stands for those zeros, so the
                                  rule is PyLate's; without one, vectors score as they are.
    ``"colbert"``                 0.2 (colbert-ai), `colbert_score`, training and GPU search. Excluded similarities
                                  are -9999: a document without kept tokens scores -9999 times Lq, the query's
                                  excluded tokens included.
    ``"colbert-cpu"``             0.2, `colbert_score_packed` without a GPU. Every maximum starts at 0, so no query
                                  token counts less than 0. The library has no gradient there; this function has.
    ============================  ==================================================================================

    What stays ours in every mode: scores and sums over query tokens are float32, where PyLate and colpali-engine sum in
    the inputs' dtype; NaN in a kept token reaches the score and NaN in an excluded one does not; a tie sends its
    gradient to the lowest index, where colpali-engine splits it evenly, and a kept token before a floor that equals it.
    Similarities below -9999, out of reach of unit vectors, are not clipped in ``"colbert"`` mode.

    Args:
        library: one of the names above.
        queries: [Nq, Lq, D].
        documents: [Nd, Ld, D]; [Nq, K, Ld, D] with `candidates`; [Nq, Ld, D] with `pairs`; or packed [T, D] with
            `cu_seqlens`, scored as the library scores the same documents padded to the longest of them.
        query_mask: bool [Nq, Lq], True counts.
        document_mask: bool, the documents' shape without D.
        cu_seqlens, max_seqlen: int32, one more than documents, and the longest document; see :func:`maxsim`.
        candidates: every query has its own K documents (distillation, reranking).
        pairs: query i meets document i alone.
        length_normalize: divide by the number of query tokens, counted as the library counts: in sentence-transformers
            (MeanMaxSim) those kept, in colpali-engine's losses those whose first component is not 0; at least 1.
        backend: as in :func:`maxsim`.

    Returns:
        float32 [Nq, Nd], [Nq, K] with `candidates`, or [Nq] with `pairs` (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`maxsim` does; ValueError also for an unknown library, for
            `length_normalize` where the library has none, and for both `candidates` and `pairs`.
    """
    if library not in _RULES:
        raise ValueError(f"library={library!r}: choose one of {', '.join(_RULES)}")
    rule = _RULES[library]
    if length_normalize and rule.length_from is None:
        having = ", ".join(name for name, other in _RULES.items() if other.length_from is not None)
        raise ValueError(f"{library} has no length normalisation; drop length_normalize, or choose one of {having}")
    if documents.is_nested:
        raise ValueError("documents is a nested tensor, which maxsim_like cannot take; pass values and cu_seqlens")
    if pairs:
        if candidates:
            raise ValueError("candidates and pairs exclude each other; give one of them")
        documents, document_mask = _as_single_candidates(queries, documents, document_mask, cu_seqlens)
        candidates = True
    if rule.zero_rows_are_padding:
        # An embedding that is zero throughout cannot be told from padding, and this library does not try.
        query_mask = queries.any(-1) if query_mask is None else query_mask
        if document_mask is None and cu_seqlens is None:
            document_mask = documents.any(-1)
    masks = _Masks(document_mask, cu_seqlens)
    arguments: dict[str, Any] = {
        "query_mask": query_mask,
        "document_mask": document_mask,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "backend": backend,
    }
    if rule.floor == "always" or (rule.floor == "excluded" and masks.excluding):
        maxima = maxsim_tokens(queries, documents, candidates=candidates, **arguments)
        # Not maximum(): that shares the gradient of a tie. A comparison is false for NaN, and so keeps it.
        below = maxima < 0
        if rule.floor == "excluded":
            excluded = masks.has_excluded().view(maxima.shape[:2] if candidates else -1)
            below = below & excluded.unsqueeze(-1)
        scores = maxima.masked_fill(below, 0).sum(-1)
    else:
        found = (maxsim_candidates if candidates else maxsim)(queries, documents, **arguments)
        assert isinstance(found, Tensor)
        scores = found
    empty_score = rule.empty_score + rule.empty_token_score * queries.shape[1]
    if empty_score != 0 and (masks.excluding or documents.shape[-2] == 0):
        empty = masks.kept_tokens(documents) == 0
        scores = scores.masked_fill(empty.view(scores.shape if candidates else -1), empty_score)
    if length_normalize:
        scores = scores / _query_lengths(rule, queries, query_mask).unsqueeze(1)
    return scores.reshape(queries.shape[0]) if pairs else scores


@dataclass(frozen=True)
class _Masks:
    document: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def excluding(self) -> bool:
        """Whether a document may hold tokens that do not count."""
        return self.document is not None or self.cu_seqlens is not None

    def kept_tokens(self, documents: Tensor) -> Tensor:
        """Tokens that count, per document: [Nd], [Nq, K], or flat where packed."""
        if self.cu_seqlens is None:
            if self.document is None:
                return torch.full(documents.shape[:-2], documents.shape[-2], device=documents.device)
            return self.document.sum(-1)
        if self.document is None:
            return self.cu_seqlens.diff()
        before = torch.nn.functional.pad(self.document.long().cumsum(0), (1, 0))
        return before[self.cu_seqlens.long()].diff()

    def has_excluded(self) -> Tensor:
        """Whether a document, padded to the longest, holds a token that does not count; shaped as kept_tokens."""
        if self.cu_seqlens is None:
            assert self.document is not None
            return ~self.document.all(-1)
        lengths = self.cu_seqlens.diff()
        longest = lengths.amax() if lengths.shape[0] else 0
        kept = lengths if self.document is None else self.kept_tokens(self.document)
        return kept < longest


def _as_single_candidates(
    queries: Tensor, documents: Tensor, document_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if cu_seqlens is None and documents.dim() != 3:
        raise ValueError(f"documents must be [Nq, Ld, D] with pairs, but its shape is {list(documents.shape)}")
    count = documents.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if count != queries.shape[0]:
        raise ValueError(f"pairs need one document per query, but there are {queries.shape[0]} queries and {count}")
    if cu_seqlens is not None:
        return documents, document_mask
    return documents.unsqueeze(1), None if document_mask is None else document_mask.unsqueeze(1)


def _query_lengths(rule: _Rule, queries: Tensor, query_mask: Tensor | None) -> Tensor:
    if rule.length_from == "first":
        counted = queries[..., 0] != 0
        query_mask = counted if query_mask is None else counted & query_mask
    assert query_mask is not None
    return query_mask.sum(-1).clamp_min(1)

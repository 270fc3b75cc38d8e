"""How much of the exact MaxSim ranking compressed documents keep, on clustered unit vectors.

No timing, and no device matters: scores are compared, not speeds. Tokens lie around cluster centres, as a language
model's do, and a query's tokens are noisy copies of one document's. Residual codes use centroids found by k-means.

    python -m benchmarks.compressed_ranking [--documents 2000] [--seed 0] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import describe
from jmlr_kernels import (
    ResidualCodec,
    maxsim,
    maxsim_quantized,
    maxsim_residual,
    quantize_documents,
    residual_compress,
)
from jmlr_kernels.maxsim.residual import nearest_centroids

_DIMENSION, _QUERIES, _QUERY_TOKENS, _DOCUMENT_TOKENS = 128, 100, 32, 60
_CLUSTERS, _CENTROIDS = 4000, 2048


def embeddings(documents: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit queries [100, 32, D] and documents [documents, 60, D] whose tokens share cluster centres."""
    centres = torch.randn(_CLUSTERS, _DIMENSION, generator=draw)
    members = torch.randint(_CLUSTERS, (documents, _DOCUMENT_TOKENS), generator=draw)
    noise = torch.randn(documents, _DOCUMENT_TOKENS, _DIMENSION, generator=draw)
    texts = torch.nn.functional.normalize(centres[members] + 0.6 * noise, dim=-1)
    chosen = torch.randint(_DOCUMENT_TOKENS, (_QUERIES, _QUERY_TOKENS, 1), generator=draw)
    own = texts[:_QUERIES].gather(1, chosen.expand(-1, -1, _DIMENSION))
    noise = torch.randn(own.shape, generator=draw) / _DIMENSION**0.5
    return torch.nn.functional.normalize(own + 1.2 * noise, dim=-1), texts


def k_means(tokens: Tensor, count: int, rounds: int, draw: torch.Generator) -> Tensor:
    """Unit centroids [count, D]; a centroid that no token chooses stays where it was."""
    centroids = tokens[torch.randperm(tokens.shape[0], generator=draw)[:count]]
    for _ in range(rounds):
        sums = torch.zeros_like(centroids).index_add_(0, nearest_centroids(tokens, centroids).long(), tokens)
        centroids = torch.nn.functional.normalize(torch.where(sums.any(1, keepdim=True), sums, centroids), dim=-1)
    return centroids


def _exact(queries: Tensor, documents: Tensor) -> Tensor:
    scores = maxsim(queries, documents)
    assert isinstance(scores, Tensor)  # a pair only with return_alignment
    return scores


def agreement(exact: Tensor, scores: Tensor) -> tuple[float, float, float]:
    """Shares of queries with the same best document and of the ten best that are kept, and Kendall's tau of the
    hundred best."""
    same = (exact.argmax(1) == scores.argmax(1)).float().mean().item()
    best, found = exact.topk(10).indices, scores.topk(10).indices
    kept = (best[:, :, None] == found[:, None, :]).any(2).float().mean().item()
    hundred = exact.topk(100).indices
    left, right = exact.gather(1, hundred), scores.gather(1, hundred)
    signs = (left[:, :, None] - left[:, None, :]).sign() * (right[:, :, None] - right[:, None, :]).sign()
    return same, kept, signs.sum().item() / (exact.shape[0] * 100 * 99)


def main() -> None:
    """Print one line for each format."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--commit", help="the commit to name where there is no repository")
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(options.seed)
    queries, texts = embeddings(options.documents, draw)
    exact = _exact(queries, texts)
    found = {"bfloat16": (2 * _DIMENSION, _exact(queries, texts.bfloat16().float()))}
    for name, dtype in (("int8", torch.int8), ("float8", torch.float8_e4m3fn)):
        found[name] = (_DIMENSION + 4, maxsim_quantized(queries, *quantize_documents(texts, dtype)))
    tokens = texts.flatten(0, 1)
    sample = tokens[torch.randperm(tokens.shape[0], generator=draw)[: 20 * _CENTROIDS]]
    centroids = k_means(sample, _CENTROIDS, 5, draw)
    for bits in (4, 2, 1):
        codec = ResidualCodec.fit(centroids, tokens[::7], bits)
        codes, residuals = residual_compress(tokens, codec)
        packed = codes.view(texts.shape[:2]), residuals.view(*texts.shape[:2], -1)
        found[f"residual, {bits} bits"] = (_DIMENSION * bits // 8 + 4, maxsim_residual(queries, *packed, codec))
    print(
        f"{len(texts)} documents of {_DOCUMENT_TOKENS} tokens, {_QUERIES} queries, D={_DIMENSION}, seed {options.seed}"
    )
    print(f"{'format':<18} bytes per token  same best  ten best kept  Kendall's tau of the hundred best")
    rows = {}
    for name, (size, scores) in found.items():
        same, kept, tau = agreement(exact, scores)
        rows[name] = {"bytes_per_token": size, "same_best": same, "ten_best_kept": kept, "kendall_tau_of_100": tau}
        print(f"{name:<18} {size:>15}  {same:>9.2f}  {kept:>13.3f}  {tau:>33.3f}")
    if options.out:
        drawn = {"documents": options.documents, "seed": options.seed}
        report = {"environment": describe(options.commit), "drawn": drawn, "formats": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

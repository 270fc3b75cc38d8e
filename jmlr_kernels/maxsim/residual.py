"""MaxSim against ColBERT's residual codes (ColBERTv2, Santhanam et al. 2022; PLAID): a centroid and a few bits each.

A token is the number of a centroid and, per element, `nbits` bits that choose one of 2**nbits bucket weights. It stands
for ``centroid + weight``, scaled to unit length. Layout and bit order are those of colbert-ai 0.2.22: element e of a
token is the bit field e % (8 // nbits) of byte e // (8 // nbits), the first field in the highest bits, and within a
field the lowest bit of the bucket's number comes first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from .arguments import _is_fake, autocast
from .compressed import check_compressed
from .config_compressed import RESIDUAL_DIMENSION

_BITS = (1, 2, 4, 8)
_TABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Similarities to centroids, or residuals, that are computed at once.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class ResidualCodec:
    """What decodes the residual codes of one index.

    Attributes:
        centroids: float16, bfloat16 or float32 [C, D].
        bucket_weights: floating [2**nbits], nbits 1, 2, 4 or 8: what a bucket adds to the centroid's element.
        bucket_cutoffs: floating [2**nbits - 1], ascending, between the buckets; needed to compress only.
        field_weights: float32 [2**nbits], made from `bucket_weights`: the weight of each bit field as it is stored.
    """

    centroids: Tensor
    bucket_weights: Tensor
    bucket_cutoffs: Tensor | None = None
    field_weights: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError when the tables do not fit together."""
        if self.centroids.dim() != 2 or self.centroids.dtype not in _TABLE_DTYPES:
            raise ValueError(
                f"centroids must be floating [C, D] of 16 or 32 bits, but is {self.centroids.dtype}"
                f" {list(self.centroids.shape)}"
            )
        if self.bucket_weights.dim() != 1 or self.bucket_weights.shape[0] not in [2**bits for bits in _BITS]:
            raise ValueError(
                "bucket_weights must be [2**nbits] with nbits 1, 2, 4 or 8, but its shape is"
                f" {list(self.bucket_weights.shape)}"
            )
        if self.dimension % (8 // self.nbits) != 0:
            raise ValueError(f"D={self.dimension} times nbits={self.nbits} is no whole number of bytes")
        if self.bucket_weights.device != self.centroids.device:
            raise ValueError("bucket_weights and centroids are on different devices; move them together")
        if self.bucket_cutoffs is not None and self.bucket_cutoffs.shape != (self.bucket_weights.shape[0] - 1,):
            raise ValueError(
                f"bucket_cutoffs must be [{self.bucket_weights.shape[0] - 1}], one fewer than bucket_weights, but its"
                f" shape is {list(self.bucket_cutoffs.shape)}"
            )
        order = _reversed_bits(self.nbits, self.bucket_weights.device)
        object.__setattr__(self, "field_weights", self.bucket_weights.detach().float()[order])

    @property
    def dimension(self) -> int:
        return self.centroids.shape[1]

    @property
    def nbits(self) -> int:
        """Bits per element of a residual."""
        return self.bucket_weights.shape[0].bit_length() - 1

    def to(self, device: str | torch.device) -> ResidualCodec:
        """The same codec on another device."""
        cutoffs = None if self.bucket_cutoffs is None else self.bucket_cutoffs.to(device)
        return ResidualCodec(self.centroids.to(device), self.bucket_weights.to(device), cutoffs)

    @classmethod
    def load(cls, folder: str | Path) -> ResidualCodec:
        """The codec of an index that ColBERT or PLAID wrote: `centroids.pt` and `buckets.pt` in its folder."""
        centroids = torch.load(Path(folder, "centroids.pt"), map_location="cpu", weights_only=True)
        cutoffs, weights = torch.load(Path(folder, "buckets.pt"), map_location="cpu", weights_only=True)
        return cls(centroids, weights, cutoffs)

    @classmethod
    def fit(cls, centroids: Tensor, sample: Tensor, nbits: int) -> ResidualCodec:
        """Buckets from the quantiles of a sample's residuals, as ColBERT's indexer makes them.

        `centroids` [C, D] come from a clustering of the embeddings; `sample` [S, D] are embeddings it did not see.
        """
        if nbits not in _BITS:
            raise ValueError(f"nbits={nbits}: choose 1, 2, 4 or 8")
        buckets = 2**nbits
        residuals = (sample.float() - centroids.float()[nearest_centroids(sample, centroids).long()]).flatten()
        residuals = residuals[:: -(-residuals.numel() // _CHUNK_ELEMENTS)]  # torch.quantile takes no more than 2**24
        steps = torch.arange(buckets, device=sample.device) / buckets
        return cls(centroids, residuals.quantile(steps + 0.5 / buckets), residuals.quantile(steps[1:]))


def nearest_centroids(embeddings: Tensor, centroids: Tensor) -> Tensor:
    """int32 [T]: the centroid of the largest dot product with each of the embeddings [T, D]."""
    step = max(1, _CHUNK_ELEMENTS // max(1, centroids.shape[0]))
    table = centroids.float()
    found = [(table @ part.float().T).argmax(0) for part in embeddings.split(step)]
    return torch.cat(found).to(torch.int32)


def residual_compress(embeddings: Tensor, codec: ResidualCodec) -> tuple[Tensor, Tensor]:
    """Codes int32 [T] and residuals uint8 [T, D * nbits / 8] of embeddings [T, D], in plain PyTorch.

    Raises:
        ValueError: the codec has no bucket_cutoffs, or the dimension differs.
    """
    if codec.bucket_cutoffs is None:
        raise ValueError("the codec has no bucket_cutoffs, without which nothing can be compressed")
    if embeddings.dim() != 2 or embeddings.shape[1] != codec.dimension:
        raise ValueError(f"embeddings must be [T, {codec.dimension}], but its shape is {list(embeddings.shape)}")
    codes = nearest_centroids(embeddings, codec.centroids)
    order, shifts = _reversed_bits(codec.nbits, embeddings.device), _shifts(codec.nbits, embeddings.device)
    packed = []
    for part, code in zip(
        *(t.split(max(1, _CHUNK_ELEMENTS // codec.dimension)) for t in (embeddings, codes)), strict=True
    ):
        residuals = part.float() - codec.centroids.float()[code.long()]
        fields = order[torch.bucketize(residuals, codec.bucket_cutoffs.float())]
        packed.append((fields.unflatten(1, (-1, shifts.shape[0])) << shifts).sum(-1).to(torch.uint8))
    return codes, torch.cat(packed)


def residual_decompress(
    codes: Tensor,
    residuals: Tensor,
    codec: ResidualCodec,
    *,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Embeddings [..., D] of `dtype` from codes [...] and residuals uint8 [..., D * nbits / 8]: the definition.

    With `normalize`, each is divided by its length, or by 1e-12 if that is more, as torch.nn.functional.normalize does.
    """
    return decode(codes, residuals, codec.centroids, codec.field_weights, normalize, dtype)


def decode(
    codes: Tensor, residuals: Tensor, centroids: Tensor, field_weights: Tensor, normalize: bool, dtype: torch.dtype
) -> Tensor:
    """:func:`residual_decompress` on the codec's tables."""
    bits = field_weights.shape[0].bit_length() - 1
    fields = (residuals.long()[..., None] >> _shifts(bits, residuals.device)) & (2**bits - 1)
    tokens = centroids[codes.long()].to(dtype) + field_weights.to(dtype)[fields.flatten(-2)]
    return torch.nn.functional.normalize(tokens, dim=-1) if normalize else tokens


def maxsim_residual(
    queries: Tensor,
    codes: Tensor,
    residuals: Tensor,
    codec: ResidualCodec,
    cu_seqlens: Tensor | None = None,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    normalize: bool = True,
    candidates: bool = False,
    backend: str = "auto",
) -> Tensor:
    """MaxSim of queries against residual codes, decoded on the fly: see :func:`jmlr_kernels.maxsim`.

    Centroid, weight and length are taken in float32; for 16-bit queries the unit token is then rounded to their dtype,
    as a decompressed document of that dtype would be. Forward only: reranking needs no gradient.

    Args:
        queries: [Nq, Lq, D], float16, bfloat16 or float32 (float64 with backend="torch"), D of the codec.
        codes: int32, the centroid of each token: packed [T] with `cu_seqlens`, [Nd, Ld], or [Nq, K, Ld] with
            `candidates`. On a CPU codes of kept tokens are checked; on a GPU one that names no centroid makes NaN.
        residuals: uint8 [..., D * nbits / 8].
        codec: the tables, on the same device.
        cu_seqlens: int32 [Nd + 1] ([Nq * K + 1] with `candidates`), token offsets of packed documents.
        query_mask: bool [Nq, Lq], True counts; holes are allowed.
        document_mask: bool of `codes`' shape, True counts, holes are allowed; excluded tokens are not read.
        query_weights: floating [Nq, Lq], one factor per query token.
        normalize: scale decoded tokens to unit length, as ColBERT does.
        candidates: each query meets its own K documents only.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; a named backend that cannot run raises. The Triton kernel
            takes D up to 256.

    Returns:
        Scores [Nq, Nd] ([Nq, K] with `candidates`), float32 (float64 for float64 queries). A document or a query
        without kept tokens scores 0; NaN propagates.

    Raises:
        ValueError: shapes, offsets or codes do not fit, or an argument requires a gradient while they are enabled.
        TypeError: a dtype does not fit.
        RuntimeError: the forced backend cannot run here.
    """
    if codes.dtype != torch.int32:
        raise TypeError(f"codes are {codes.dtype}; pass int32, as ColBERT stores them")
    if residuals.dtype != torch.uint8:
        raise TypeError(f"residuals are {residuals.dtype}; pass uint8, as ColBERT stores them")
    if queries.shape[-1] != codec.dimension:
        raise ValueError(
            f"queries have D={queries.shape[-1]} and the codec D={codec.dimension}; use the index's encoder"
        )
    check_compressed(
        "residuals",
        residuals,
        codec.dimension * codec.nbits // 8,
        queries,
        query_mask,
        document_mask,
        query_weights,
        cu_seqlens,
        candidates,
        {"codes": codes, "codec.centroids": codec.centroids},
    )
    if codes.shape != residuals.shape[:-1]:
        raise ValueError(
            f"codes must be {list(residuals.shape[:-1])}, one per token, but its shape is {list(codes.shape)}"
        )
    _check_codes(codes, document_mask, codec)
    queries = autocast(queries)
    return ops.call(
        "maxsim_residual_forward",
        queries,
        codes,
        residuals,
        codec.centroids,
        codec.field_weights,
        query_mask,
        document_mask,
        query_weights,
        cu_seqlens,
        normalize,
        candidates,
        _backend(backend, queries),
    )


def _backend(requested: str, queries: Tensor) -> str:
    resolved = ops.resolve_backend(requested, queries, "maxsim_residual_forward")
    if resolved != "triton" or queries.shape[-1] <= RESIDUAL_DIMENSION:
        return resolved
    reason = f"the Triton kernel decodes residual codes up to D={RESIDUAL_DIMENSION}, not D={queries.shape[-1]}"
    if requested == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {reason}; use backend='torch'")
    if not torch.compiler.is_compiling():
        ops._warn_once(f"jmlr_kernels falls back to plain torch: {reason}")
    return "torch"


def _check_codes(codes: Tensor, document_mask: Tensor | None, codec: ResidualCodec) -> None:
    if codes.device.type != "cpu" or torch.compiler.is_compiling() or _is_fake(codes):
        return
    kept = codes if document_mask is None else codes[document_mask]
    if kept.numel() == 0:
        return
    low, high = (int(end) for end in kept.aminmax())
    count = codec.centroids.shape[0]
    if low < 0 or high >= count:
        raise ValueError(f"codes run from {low} to {high}, but the codec has centroids 0 to {count - 1}")


def _shifts(bits: int, device: torch.device) -> Tensor:
    """How far each bit field of a byte is from its lowest bit, first field first."""
    return torch.arange(8 - bits, -1, -bits, device=device)


def _reversed_bits(bits: int, device: torch.device) -> Tensor:
    """[2**bits] numbers whose `bits` bits are those of the index, read backwards."""
    return torch.tensor([int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits)], device=device)

"""An exact index over token embeddings: faiss keeps the vectors, the project's MaxSim kernel scores them.

``search`` is exhaustive (every passage is scored) up to ``exhaustive_passages``; beyond that, each query token asks
faiss for its nearest tokens, the passages they belong to are the candidates, and those get their exact MaxSim.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from jmlr.errors import UserError
from jmlr_kernels import maxsim, maxsim_candidates

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What an index was made from. A mismatch with what it is used with is an error, never a silent bad search."""

    format: int
    corpus_hash: str
    encoder: str
    version: int
    passages: int
    tokens: int
    dim: int
    document_length: int


def encoder_fingerprint(model: torch.nn.Module) -> str:
    """Sixteen hex digits of SHA-256 over the encoder's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class ExactIndex:
    """Token vectors of a corpus in a faiss.IndexFlatIP, a passage's side by side; ``passage_ids[i]`` is its name."""

    exhaustive_passages = 20_000

    def __init__(self, flat: Any, offsets: Tensor, passage_ids: list[str], manifest: Manifest) -> None:
        self.flat = flat
        self.offsets = offsets  # int32 [passages + 1]
        self.passage_ids = passage_ids
        self.manifest = manifest
        self._owner = torch.repeat_interleave(torch.arange(len(passage_ids)), offsets.diff().long())
        # faiss owns the memory; the tensor is a view of it, so the vectors are held once.
        stored = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
        self.vectors = torch.from_numpy(stored)
        self._elsewhere: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def build(
        cls,
        vectors: Sequence[Tensor],
        passage_ids: Sequence[str],
        *,
        corpus_hash: str,
        encoder: str,
        document_length: int,
        version: int = 0,
    ) -> ExactIndex:
        """vectors: one float32 [tokens, dim] tensor a passage, as ``ColBERT.encode`` gives them."""
        if not vectors:
            raise UserError("an index needs at least one passage", remedy="give a corpus that is not empty")
        lengths = torch.tensor([0] + [len(v) for v in vectors])
        packed = torch.cat(list(vectors)).contiguous()
        flat = faiss.IndexFlatIP(packed.shape[1])
        flat.add(packed.numpy())
        manifest = Manifest(
            FORMAT, corpus_hash, encoder, version, len(vectors), len(packed), packed.shape[1], document_length
        )
        return cls(flat, lengths.cumsum(0).int(), list(passage_ids), manifest)

    def search(self, queries: Tensor, k: int, *, tokens_each: int | None = None) -> tuple[Tensor, Tensor]:
        """queries float32 [N, Lq, dim], every token counts -> scores float32 [N, k], passage numbers int64 [N, k].

        Best first, ties to the lower number; k is cut to the number of passages. Rows with fewer candidates than k
        end in score -inf and number -1. `tokens_each` forces the candidate search with so many tokens per query token.
        The exhaustive search runs where the queries are; results are on the CPU.
        """
        k = min(k, len(self.passage_ids))
        queries = queries.float()
        if tokens_each is None and len(self.passage_ids) <= self.exhaustive_passages:
            vectors, offsets = self._on(queries.device)
            scores = maxsim(queries, vectors, cu_seqlens=offsets)
            return _best(scores.cpu(), k)
        return self._search_candidates(queries.cpu(), k, tokens_each or max(32, 2 * k))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device.type == "cpu":
            return self.vectors, self.offsets
        if device not in self._elsewhere:
            self._elsewhere[device] = (self.vectors.to(device), self.offsets.to(device))
        return self._elsewhere[device]

    def _search_candidates(self, queries: Tensor, k: int, tokens_each: int) -> tuple[Tensor, Tensor]:
        count, length, dim = queries.shape
        _, nearest = self.flat.search(queries.reshape(-1, dim).numpy(), min(tokens_each, self.flat.ntotal))
        scores = torch.full((count, k), float("-inf"))
        numbers = torch.full((count, k), -1)
        for row, found in enumerate(torch.from_numpy(nearest).view(count, -1)):
            candidates = self._owner[found[found >= 0]].unique()
            documents, mask = self.padded(candidates)
            exact = maxsim_candidates(queries[row : row + 1], documents[None], document_mask=mask[None])
            best, where = _best(exact, min(k, len(candidates)))
            scores[row, : best.shape[1]] = best[0]
            numbers[row, : best.shape[1]] = candidates[where[0]]
        return scores, numbers

    def padded(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The token vectors of some passages: [n, longest, dim] and their mask, bool [n, longest]."""
        starts = self.offsets[:-1].long()[numbers]
        lengths = self.offsets.diff().long()[numbers]
        position = torch.arange(max(int(lengths.max()), 1))
        mask = position < lengths[:, None]
        rows = (starts[:, None] + position).clamp(max=max(len(self.vectors) - 1, 0))
        return self.vectors[rows], mask

    # ------------------------------------------------------------------ disk

    def save(self, directory: Path) -> None:
        """Writes the index atomically: its files under new names, then the manifest that names them, by renaming.

        A reader, or a run killed half-way, sees the old index or the new one, whole.
        """
        directory.mkdir(parents=True, exist_ok=True)
        tag = f"{self.manifest.version}-{os.urandom(4).hex()}"
        faiss.write_index(self.flat, str(directory / f"tokens-{tag}.faiss"))
        np.save(directory / f"offsets-{tag}.npy", self.offsets.numpy())
        (directory / f"passages-{tag}.json").write_text(json.dumps(self.passage_ids), encoding="utf-8")
        staged = directory / f"manifest-{tag}.json"
        staged.write_text(json.dumps({"files": tag, **asdict(self.manifest)}, indent=1), encoding="utf-8")
        for path in directory.glob(f"*-{tag}.*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(staged, directory / "manifest.json")
        for path in directory.iterdir():
            if path.name != "manifest.json" and tag not in path.name:
                path.unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        corpus_hash: str | None = None,
        encoder: str | None = None,
        document_length: int | None = None,
    ) -> ExactIndex:
        """Reads an index and checks it against the corpus and encoder that it will be used with.

        Raises:
            UserError: missing, damaged, or made from another corpus or encoder.
        """
        remedy = "build it again with `jmlr index`"
        try:
            fields = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
            tag = fields.pop("files")
            manifest = Manifest(**fields)
        except FileNotFoundError:
            raise UserError("no index there", file=directory, remedy=remedy) from None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
            raise UserError(
                "the index's manifest is damaged", file=directory / "manifest.json", remedy=remedy
            ) from None
        expected = {
            "corpus_hash": corpus_hash,
            "encoder": encoder,
            "document_length": document_length,
            "format": FORMAT,
        }
        for name, value in expected.items():
            found = getattr(manifest, name)
            if value is not None and found != value:
                raise UserError(
                    f"the index was made for another {name.replace('_', ' ')} ({found}, not {value})",
                    file=directory / "manifest.json",
                    remedy=remedy,
                )
        try:
            flat = faiss.read_index(str(directory / f"tokens-{tag}.faiss"))
            offsets = torch.from_numpy(np.load(directory / f"offsets-{tag}.npy"))
            passage_ids = json.loads((directory / f"passages-{tag}.json").read_text(encoding="utf-8"))
            whole = (
                (flat.ntotal, flat.d) == (manifest.tokens, manifest.dim)
                and len(passage_ids) == manifest.passages == len(offsets) - 1
                and int(offsets[-1]) == manifest.tokens
            )
        except (OSError, RuntimeError, ValueError, json.JSONDecodeError):
            whole = False
        if not whole:
            raise UserError("the index is damaged: its files do not fit together", file=directory, remedy=remedy)
        return cls(flat, offsets, passage_ids, manifest)


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # A stable sort, not topk: topk leaves the order of equal scores open, and a run must be repeatable.
    best = scores.sort(dim=-1, descending=True, stable=True)
    return best.values[:, :k], best.indices[:, :k]

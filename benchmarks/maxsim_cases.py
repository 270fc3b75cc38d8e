"""Shapes and data on which MaxSim is timed, most important first.

Three layouts: ``in-batch`` (every query against every document), ``candidates`` (every query against documents of its
own) and ``packed`` (in-batch, documents of different lengths side by side without padding). Two kinds of unit vectors:
``random``, whose winners spread over a document's tokens, and ``clustered``, whose winners concentrate on few of them,
as in real text: there, atomic additions collide and one token's gradient has many summands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks import roofline

TOPICS = 256  # centres that all queries and documents share
TOPICS_OF_A_TEXT = 4


@dataclass(frozen=True)
class MaxSimCase:
    """One shape: queries [queries, query_length, dim] and documents of unit vectors.

    Documents are [documents, document_length, dim] in-batch, [queries, documents, document_length, dim] as candidates
    (`documents` of them for each query), and [T, dim] packed, of lengths uniform from `shortest` to `document_length`.

    `bar` is the time in milliseconds that an H200 must not exceed in bf16, and `least_ratio` how many times faster than
    the best peer it must be; both count forward and backward when `backward` is set. `launch_bound` asks for an eager
    wall-clock figure too.
    """

    queries: int
    documents: int
    query_length: int
    document_length: int
    backward: bool
    dim: int = 128
    bar: float | None = None
    least_ratio: float | None = None
    layout: str = "in-batch"
    data: str = "random"
    shortest: int = 20
    launch_bound: bool = False

    @property
    def name(self) -> str:
        by = "x own" if self.layout == "candidates" else "x"
        length = f"{self.shortest}-{self.document_length}" if self.layout == "packed" else str(self.document_length)
        clustered = " clustered" if self.data == "clustered" else ""
        return f"{self.queries} {by} {self.documents}, Lq={self.query_length} Ld={length} D={self.dim}{clustered}"

    @property
    def document_count(self) -> int:
        """Documents in all."""
        return self.queries * self.documents if self.layout == "candidates" else self.documents

    def lengths(self) -> list[int]:
        """Tokens of each document; the same on every device."""
        if self.layout != "packed":
            return [self.document_length] * self.document_count
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(self.shortest, self.document_length + 1, (self.documents,), generator=generator)
        drawn[0] = self.document_length
        return [int(length) for length in drawn]

    def mask(self, device: torch.device) -> torch.Tensor:
        """bool [documents, document_length] of packed documents' tokens once they are padded."""
        ends = torch.tensor(self.lengths(), device=device)
        return torch.arange(self.document_length, device=device)[None, :] < ends[:, None]

    def offsets(self, device: torch.device) -> torch.Tensor:
        """int32 cu_seqlens [documents + 1]."""
        return torch.tensor([0, *self.lengths()]).cumsum(0).to(device=device, dtype=torch.int32)

    def work(self, element_size: int) -> roofline.Work:
        """Exact FLOPs and compulsory bytes at this many bytes per element."""
        return roofline.maxsim_work(
            self.queries,
            self.query_length,
            sum(self.lengths()),
            self.document_count,
            self.dim,
            element_size,
            shared=self.layout != "candidates",
            index_bytes=1 if self.document_length <= 256 else 2,
        )

    def forward_flops(self) -> int:
        return self.work(2).forward_flops

    def backward_flops(self) -> int:
        return self.work(2).backward_flops

    def memory_bar(self, direction: str, element_size: int) -> int:
        """The most bytes that a step may hold beyond its inputs: gradients, winners in the smallest integer, scores."""
        work = self.work(element_size)
        return work.scores_bytes + (work.input_bytes + work.winners_bytes if direction != "forward" else 0)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Queries and documents that ask for gradients, and a random, non-uniform gradient of the scores."""
        generator = torch.Generator(device=device).manual_seed(0)
        topics = unit_vectors((TOPICS, self.dim), generator, device) if self.data == "clustered" else None

        def tokens(texts: int, length: int) -> torch.Tensor:
            if topics is None:
                return unit_vectors((texts, length, self.dim), generator, device)
            return clustered_vectors(texts, length, topics, generator)

        queries = tokens(self.queries, self.query_length)
        documents = tokens(self.document_count, self.document_length)
        if self.layout == "packed":
            documents = documents[self.mask(device)]
        elif self.layout == "candidates":
            documents = documents.unflatten(0, (self.queries, self.documents))
        grad = torch.randn((self.queries, self.documents), generator=generator, device=device, dtype=torch.float32)
        return queries.to(dtype).requires_grad_(), documents.to(dtype).requires_grad_(), grad

    def padded(self, documents: torch.Tensor) -> torch.Tensor:
        """Packed documents as a padded leaf [documents, document_length, dim]; zeros where there is no token."""
        wide = documents.new_zeros((self.documents, self.document_length, self.dim))
        wide[self.mask(documents.device)] = documents.detach()
        return wide.requires_grad_()

    def second_data(self) -> MaxSimCase | None:
        """The same shape on the other kind of data, for a second look at the results; None when this is it."""
        return replace(self, data="clustered") if self.data == "random" else None


def unit_vectors(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Directions drawn evenly, float32."""
    tokens = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    return torch.nn.functional.normalize(tokens, dim=-1)


def clustered_vectors(texts: int, length: int, topics: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Tokens around a few topics per text: unit vectors [texts, length, dim], float32.

    A token is its topic plus noise, and how much noise is the token's own: those that hit their topic closely win for
    most query tokens of that topic. Topics are popular in proportion to 1 / rank, as words are, so that texts share
    them.
    """
    device = topics.device
    popularity = 1.0 / torch.arange(1, topics.shape[0] + 1, device=device, dtype=torch.float32)
    own = torch.multinomial(popularity, texts * TOPICS_OF_A_TEXT, replacement=True, generator=generator)
    chosen = torch.randint(0, TOPICS_OF_A_TEXT, (texts, length), generator=generator, device=device)
    centres = topics[own.view(texts, TOPICS_OF_A_TEXT).gather(1, chosen)]
    noise = unit_vectors((texts, length, topics.shape[1]), generator, device)
    amount = torch.rand((texts, length, 1), generator=generator, device=device) * 0.8 + 0.05
    return torch.nn.functional.normalize(centres + amount * noise, dim=-1)


GPU_CASES = (
    MaxSimCase(128, 128, 32, 300, backward=False, bar=0.09, least_ratio=2.0),
    MaxSimCase(256, 256, 32, 300, backward=True, bar=0.8, least_ratio=2.0),
    MaxSimCase(512, 512, 32, 180, backward=True, bar=2.2, least_ratio=2.0),
    MaxSimCase(128, 128, 32, 1030, backward=True, bar=0.5, least_ratio=2.0),
    MaxSimCase(128, 128, 1024, 1024, backward=True, bar=13.0, least_ratio=1.5),
    MaxSimCase(32, 32, 32, 80, backward=True, bar=0.06, launch_bound=True),
    MaxSimCase(64, 64, 32, 128, backward=True, bar=0.08, launch_bound=True),
    MaxSimCase(1, 10_000, 32, 300, backward=False, bar=0.20),
    MaxSimCase(1, 1000, 32, 300, backward=False, bar=0.03, launch_bound=True),
    MaxSimCase(256, 256, 32, 300, backward=True, data="clustered"),
    MaxSimCase(32, 64, 32, 180, backward=True, layout="candidates"),
    MaxSimCase(256, 256, 32, 180, backward=True, layout="packed"),
    MaxSimCase(128, 8, 32, 1030, backward=True, layout="candidates"),
    MaxSimCase(256, 16, 32, 1030, backward=True, layout="candidates"),
)
# `least_ratio` there counts the forward.
CPU_CASES = (
    MaxSimCase(1, 1000, 32, 300, backward=False, least_ratio=2.0),
    MaxSimCase(32, 32, 32, 80, backward=True, least_ratio=2.0),
    MaxSimCase(32, 32, 32, 180, backward=True, least_ratio=2.0),
    MaxSimCase(32, 32, 32, 300, backward=True, least_ratio=2.0),
    MaxSimCase(8, 16, 32, 180, backward=True, layout="candidates"),
    MaxSimCase(32, 32, 32, 180, backward=True, layout="packed"),
)
DRY_CASES = (
    MaxSimCase(3, 4, 5, 7, backward=True, dim=32, launch_bound=True),
    MaxSimCase(3, 4, 5, 7, backward=True, dim=32, layout="candidates"),
    MaxSimCase(3, 4, 5, 7, backward=True, dim=32, layout="packed", shortest=2),
    MaxSimCase(3, 4, 5, 7, backward=False, dim=32, data="clustered"),
)

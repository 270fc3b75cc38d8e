"""The settings of a recipe with ``task: extend``: read like every other recipe, with the line of each mistake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from jmlr.config import LLMConfig, beta_problems, recipe_text, run_problems
from jmlr.settings import Problem, number, read

Variant = Literal["full", "split", "wrap"]
Schedule = Literal["constant_with_warmup", "cosine", "linear"]


@dataclass(frozen=True)
class DocumentConfig:
    """Which passages, and how they are joined to long documents. Names are explained in :mod:`jmlr.data.sources`."""

    data_dir: str | None = None
    corpora: tuple[str, ...] = ("embedded:openstax", "embedded:ghr")
    document_words: int = number(800, low=1)  # neighbouring sections of a book are joined until they have so many
    held_out: float = number(0.2, above=0, below=1)  # of each book's documents: evaluated on, never trained on
    repeated_ids: Literal["error", "number"] = "error"


@dataclass(frozen=True)
class ModelConfig:
    """The model to extend: a checkpoint (``path``), a weights package (``package``), or neither: from scratch."""

    path: str | None = None
    package: str | None = None
    context_length: int = number(256, low=8)  # tokens that the base was trained on
    vocabulary: int = number(2048, low=300)  # byte pairs learned from the training documents
    hidden_size: int = number(128, low=1)
    layers: int = number(4, low=1)
    heads: int = number(4, low=2)
    kv_heads: int = number(2, low=1)
    intermediate_size: int = number(384, low=1)
    weight_std: float = number(0.08, above=0)  # 0.02 is meant for models ten times as wide: they wake late
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def from_scratch(self) -> bool:
        return not (self.path or self.package)

    def llm(self, **changes: Any) -> LLMConfig:
        """The same in the words of :mod:`jmlr.llm`."""
        names = (
            "path",
            "package",
            "hidden_size",
            "layers",
            "heads",
            "kv_heads",
            "intermediate_size",
            "weight_std",
            "dtype",
        )
        same: dict[str, Any] = {name: getattr(self, name) for name in names}
        return LLMConfig(**{**same, "max_length": self.context_length, "attention": "sdpa", **changes})


@dataclass(frozen=True)
class BaseConfig:
    """Training of a base from scratch, dense, at its own context length. A checkpoint is taken as it is."""

    steps: int = number(600, low=1)
    batch_size: int = number(8, low=1)  # windows of context_length tokens
    rate: float = number(3e-3, above=0)
    schedule: Schedule = "cosine"


@dataclass(frozen=True)
class ExtensionConfig:
    """The extension itself: every variant starts from the same base and sees the same tokens in the same order."""

    variants: tuple[Variant, ...] = ("full", "split", "wrap")
    target_length: int = number(1024, low=16)  # tokens
    group_size: int = number(0, low=0)  # tokens; 0: a quarter of the target length, as LongLoRA has it
    steps: int = number(100, low=1)
    batch_size: int = number(2, low=1)  # windows of target_length tokens
    gradient_accumulation: int = number(1, low=1)
    rate: float = number(1e-3, above=0)
    schedule: Schedule = "constant_with_warmup"
    lora_rank: int = number(8, low=0)  # on q, k, v and o; 0: every weight is trained
    lora_alpha: float = number(16.0, above=0)
    train_embeddings_and_norms: bool = True  # beside LoRA: what LongLoRA calls LoRA+
    gradient_checkpointing: bool = False
    save_steps: int = number(100, low=1)

    @property
    def group(self) -> int:
        """Group size in tokens."""
        return self.group_size or self.target_length // 4


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, for base and extension alike."""

    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = number(0.0, low=0)
    warmup_steps: int = number(20, low=0)
    max_grad_norm: float = number(1.0, above=0)
    log_steps: int = number(10, low=1)
    logits_chunk: int = number(2048, low=1)  # tokens whose logits exist at once


@dataclass(frozen=True)
class PerplexityConfig:
    """Dense perplexity on held-out documents."""

    lengths: tuple[int, ...] = (256, 512, 1024)  # windows, shortest first; the longest is the target length
    batch_tokens: int = number(4096, low=1)
    max_documents: int | None = number(None, low=1)
    bootstrap: int = number(2000, low=100)  # resamples of documents
    confidence: float = number(0.95, above=0, below=1)


@dataclass(frozen=True)
class ExtendConfig:
    """Everything a run depends on."""

    task: Literal["extend"] = "extend"
    name: str = "extend"
    seed: int = number(0, low=0)
    device: str = "auto"  # "auto", "cpu" or "cuda"
    threads: int = number(0, low=0)  # of torch on a CPU; 0: as torch chooses
    budget_minutes: float | None = number(None, above=0)  # shown beside the time taken
    data: DocumentConfig = field(default_factory=DocumentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    extend: ExtensionConfig = field(default_factory=ExtensionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluate: PerplexityConfig = field(default_factory=PerplexityConfig)

    def problems(self) -> Iterator[Problem]:
        """What is wrong between settings that are each right by themselves."""
        yield from run_problems(self.name, self.device)
        if not self.data.corpora:
            yield Problem("data.corpora", "the list is empty", "name at least one corpus")
        if self.model.path and self.model.package:
            yield Problem("model.package", "path and package are both set", "set one of them to null")
        yield from beta_problems("optimizer.betas", self.optimizer.betas)
        yield from self._shape_problems()
        yield from self._length_problems()

    def _shape_problems(self) -> Iterator[Problem]:
        model = self.model
        if not model.from_scratch:
            return
        if model.hidden_size % (2 * model.heads):
            yield Problem(
                "model.heads",
                f"hidden_size {model.hidden_size} over heads {model.heads} is not a whole, even head dimension",
                "choose a number of heads that divides half of hidden_size",
                ("model.hidden_size",),
            )
        if model.heads % model.kv_heads:
            yield Problem(
                "model.kv_heads",
                f"heads {model.heads} is not a multiple of kv_heads {model.kv_heads}",
                "choose a number of kv_heads that divides it",
                ("model.heads",),
            )

    def _length_problems(self) -> Iterator[Problem]:
        extend, lengths = self.extend, self.evaluate.lengths
        if not extend.variants or len(set(extend.variants)) < len(extend.variants):
            yield Problem(
                "extend.variants", "variants are missing or named twice", "name each of full, split, wrap once"
            )
        if extend.target_length <= self.model.context_length:
            yield Problem(
                "extend.target_length",
                f"{extend.target_length} tokens do not extend the base's {self.model.context_length}",
                "raise it above model.context_length",
                ("model.context_length",),
            )
        if not 2 <= extend.group <= extend.target_length:
            yield Problem(
                "extend.group_size",
                f"a group of {extend.group} tokens does not fit a window of {extend.target_length}",
                "give at least 2 and at most target_length, or 0 for a quarter of it",
                ("extend.target_length",),
            )
        if (
            not lengths
            or list(lengths) != sorted(set(lengths))
            or lengths[0] < 1
            or lengths[-1] != extend.target_length
        ):
            yield Problem(
                "evaluate.lengths",
                f"{list(lengths)} do not rise to the target length {extend.target_length}",
                "write window lengths from the shortest to extend.target_length",
                ("extend.target_length",),
            )
        elif wrong := [length for length in lengths if extend.target_length % length]:
            yield Problem(
                "evaluate.lengths",
                f"{wrong[0]} does not divide the target length {extend.target_length}",
                "the same tokens are evaluated at each length: give divisors of it",
                ("extend.target_length",),
            )


def load(path_or_name: str | PathLike[str], overrides: list[str] | tuple[str, ...] = ()) -> ExtendConfig:
    """The settings of a recipe with ``task: extend``; arguments and errors are those of :func:`jmlr.config.load`."""
    file, text = recipe_text(path_or_name)
    return read(ExtendConfig, text, file, overrides)

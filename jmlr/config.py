"""The settings of a run: their names, types, ranges and defaults. A recipe is a YAML file of them.

Read one with :func:`load`, write it with :func:`save`; how YAML becomes these classes is in :mod:`jmlr.settings`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from jmlr.errors import UserError
from jmlr.settings import Problem, number, read, scalar, write

System = Literal["closed-book", "random", "rag", "joint", "gold"]
Task = Literal["joint", "extend"]


@dataclass(frozen=True)
class DataConfig:
    """Which passages and questions, and how questions are worded. Names are explained in :mod:`jmlr.data.sources`."""

    data_dir: str | None = None
    corpora: tuple[str, ...] = ("embedded:ghr",)
    train: tuple[str, ...] = ("embedded:ghr-train",)
    test: tuple[str, ...] = ("embedded:ghr-test",)
    kinds: tuple[str, ...] = ()  # empty: all
    wordings_per_question: int = number(8, low=1)
    names: Literal["title", "synonyms", "all"] = "all"
    test_wordings_per_question: int = number(3, low=1)
    probe_fraction: float = number(0.1, low=0, below=1)  # of the training conditions: held out, asked while training
    max_train_questions: int | None = number(None, low=1)
    max_test_questions: int | None = number(None, low=1)
    repeated_ids: Literal["error", "number"] = "error"
    repeated_options: Literal["error", "keep"] | None = None  # None: an error only in the project's own layout


@dataclass(frozen=True)
class LLMConfig:
    """The language model: a checkpoint (``path``), a weights package (``package``), or neither: from scratch."""

    path: str | None = None
    package: str | None = None
    hidden_size: int = number(128, low=1)
    layers: int = number(2, low=1)
    heads: int = number(4, low=1)
    kv_heads: int = number(4, low=1)
    intermediate_size: int = number(384, low=1)
    max_length: int = number(1024, low=8)  # tokens, documents and answer included
    document_tokens: int = number(0, low=0)  # a passage is cut after so many; 0: never
    show_options: bool = True  # in the prompt
    attention: Literal["s2", "sdpa"] = "s2"  # while training; evaluation is dense
    s2_group_size: int = number(128, low=2)  # tokens
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    embedding_std: float = number(0.02, above=0)  # of token embeddings from scratch
    weight_std: float = number(0.02, above=0)  # of every other weight from scratch
    freeze_embeddings: bool = False  # held at random, a small model cannot memorise answers by name
    lora_rank: int = number(0, low=0)  # 0: full fine-tuning
    lora_alpha: float = number(16.0, above=0)
    lora_dropout: float = number(0.0, low=0, below=1)


@dataclass(frozen=True)
class RetrieverConfig:
    """ColBERT: a checkpoint, a weights package with a BERT encoder, or neither: an encoder from scratch."""

    path: str | None = None
    package: str | None = None
    hidden_size: int = number(128, low=1)
    layers: int = number(1, low=1)
    heads: int = number(4, low=1)
    intermediate_size: int = number(256, low=1)
    dim: int = number(64, low=1)
    query_length: int = number(32, low=4)  # tokens, markers included
    document_length: int = number(128, low=4)
    mask_punctuation: bool = True
    lexical_start: bool = True  # an encoder from scratch starts by matching words, rare ones more
    freeze_embeddings: bool = True


@dataclass(frozen=True)
class JointConfig:
    """The LLM-Rank step. A preset other than ``custom`` fixes the three document counts of its publication."""

    PRESETS: ClassVar[dict[str, dict[str, int]]] = {
        "paper": {"candidates": 30, "sampled": 10, "context": 7},
        "released-code": {"candidates": 20, "sampled": 10, "context": 5},
    }
    preset: Literal["custom", "paper", "released-code"] = "custom"
    candidates: int = number(8, low=1)  # documents from the index a question
    sampled: int = number(4, low=2)  # of them, scored by the LLM
    context: int = number(3, low=1)  # of them, in the LLM's prompt
    rank_weight: float = number(1.0, low=0)
    margin: float = number(0.4, low=0)  # nats: a smaller difference of LLM losses ranks nothing
    rank_warmup_steps: int = number(60, low=0)  # steps before the rank loss counts
    rank_ramp_steps: int = number(20, low=0)  # after them, over which the retriever's rate rises
    refresh_steps: int = number(50, low=0)  # steps between two indexes; 0: never refreshed
    average_decay: float = number(0.98, low=0, below=1)  # moving average of the retriever; 0: none
    train_retriever: bool = True
    exclude_own_rationale: bool = True  # a passage that repeats the question's published rationale is no candidate


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer (AdamW with a rate for each model), its schedule, and what is kept."""

    steps: int = number(300, low=1)
    batch_size: int = number(12, low=1)  # questions
    gradient_accumulation: int = number(1, low=1)
    llm_rate: float = number(2e-3, low=0)
    retriever_rate: float = number(3e-4, low=0)
    weight_decay: float = number(0.1, low=0)  # of the language model
    retriever_weight_decay: float = number(0.1, low=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = number(1e-5, above=0)
    warmup_ratio: float = number(0.1, low=0, high=1)  # of the steps
    min_rate_ratio: float = number(0.1, low=0, high=1)  # of the peak rate, at the end of the cosine
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float = number(1.0, above=0)  # of each model by itself
    save_steps: int = number(100, low=1)
    keep_checkpoints: int = number(2, low=1)
    log_steps: int = number(10, low=1)
    probe_steps: int = number(50, low=1)  # steps between two measurements of recall
    closed_book_steps: int = number(0, low=0)  # of the closed-book baseline, which learns sooner; 0: as many as steps
    parallel_baselines: bool = True  # on a CPU: the baselines train beside the joint model, on half of the cores


@dataclass(frozen=True)
class EvaluateConfig:
    """Which systems the table compares, and its intervals."""

    batch_size: int = number(32, low=1)
    systems: tuple[System, ...] = ("closed-book", "random", "rag", "joint", "gold")
    bootstrap: int = number(2000, low=100)  # resamples
    confidence: float = number(0.95, above=0, below=1)


def run_problems(name: str, device: str) -> Iterator[Problem]:
    """What is wrong with the `name` and `device` of a run of any task."""
    if device not in ("auto", "cpu", "cuda"):
        remedy = "write auto, cpu or cuda; CUDA_VISIBLE_DEVICES chooses among several GPUs"
        yield Problem("device", f"'{device}' is not a device", remedy)
    if not name or any(character in name for character in "/\\") or name.startswith("."):
        yield Problem("name", f"'{name}' cannot name a directory", "use letters, digits, - and _")


def beta_problems(setting: str, betas: tuple[float, ...]) -> Iterator[Problem]:
    """What is wrong with AdamW's betas."""
    if not all(0 <= beta < 1 for beta in betas):
        yield Problem(setting, "a beta lies outside [0, 1)", "AdamW's betas are such as [0.9, 0.95]")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on."""

    task: Literal["joint"] = "joint"  # a recipe with "extend" is read by jmlr.extend.config
    name: str = "run"
    seed: int = number(0, low=0)
    device: str = "auto"  # "auto", "cpu" or "cuda"
    threads: int = number(0, low=0)  # of torch on a CPU; 0: as torch chooses
    budget_minutes: float | None = number(None, above=0)  # shown beside the time taken
    data: DataConfig = field(default_factory=DataConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def problems(self) -> Iterator[Problem]:
        """What is wrong between settings that are each right by themselves."""
        yield from run_problems(self.name, self.device)
        for name in ("corpora", "train", "test"):
            if not getattr(self.data, name):
                yield Problem(f"data.{name}", "the list is empty", "name at least one data set")
        for section, model in (("llm", self.llm), ("retriever", self.retriever)):
            if model.path and model.package:
                yield Problem(f"{section}.package", "path and package are both set", "set one of them to null")
            if not (model.path or model.package) and model.hidden_size % model.heads:
                yield Problem(
                    f"{section}.heads",
                    f"hidden_size {model.hidden_size} is not a multiple of heads {model.heads}",
                    "choose a number of heads that divides it",
                    (f"{section}.hidden_size",),
                )
        yield from self._language_model_problems()
        yield from self._joint_problems()
        yield from beta_problems("train.betas", self.train.betas)
        for name in ("save_steps", "probe_steps"):  # so that a resumed run logs what an undisturbed one does
            if getattr(self.train, name) % self.train.log_steps:
                yield Problem(
                    f"train.{name}",
                    f"{getattr(self.train, name)} is not a multiple of log_steps {self.train.log_steps}",
                    "checkpoints and probes stand where the log does: make it a multiple",
                )
        if len(set(self.evaluate.systems)) < len(self.evaluate.systems):
            yield Problem("evaluate.systems", "a system is named twice", "name each once")

    def _language_model_problems(self) -> Iterator[Problem]:
        llm = self.llm
        if llm.path or llm.package:
            return
        if llm.heads % llm.kv_heads:
            yield Problem(
                "llm.kv_heads",
                f"heads {llm.heads} is not a multiple of kv_heads {llm.kv_heads}",
                "choose a number of kv_heads that divides it",
                ("llm.heads",),
            )
        if llm.hidden_size % llm.heads == 0 and llm.hidden_size // llm.heads % 2:
            yield Problem(
                "llm.heads",
                f"the head dimension {llm.hidden_size // llm.heads} is odd, and rotary embeddings need pairs",
                "change heads or hidden_size",
                ("llm.hidden_size",),
            )

    def _joint_problems(self) -> Iterator[Problem]:
        joint = self.joint
        for name, value in JointConfig.PRESETS.get(joint.preset, {}).items():
            if getattr(joint, name) != value:
                yield Problem(
                    f"joint.{name}",
                    f"the preset '{joint.preset}' has {name} {value}, not {getattr(joint, name)}",
                    "remove the setting, or set joint.preset to custom",
                    ("joint.preset",),
                )
                return
        for name in ("sampled", "context"):
            if getattr(joint, name) > joint.candidates:
                yield Problem(
                    f"joint.{name}",
                    f"{name} {getattr(joint, name)} is more than the candidates {joint.candidates}",
                    f"lower joint.{name} or raise joint.candidates",
                    ("joint.candidates",),
                )


def choices(kind: Any) -> tuple[str, ...]:
    """The texts that a ``Literal`` of this module allows."""
    return get_args(kind)


def load(path_or_name: str | PathLike[str], overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The settings of a recipe.

    Args:
        path_or_name: a YAML file, or the name of a recipe of the package (:func:`recipes`).
        overrides: texts such as ``"train.steps=20"`` that replace its settings.

    Raises:
        UserError: with file and line, for an unknown setting, a wrong type, a value out of range, or settings that
            contradict each other.
    """
    file, text = recipe_text(path_or_name)
    return read(RunConfig, text, file, overrides)


def task_of(path_or_name: str | PathLike[str]) -> Task:
    """What a recipe is for: joint training (where it does not say), or extending a context.

    Raises:
        UserError: with file and line, for anything else.
    """
    file, text = recipe_text(path_or_name)
    return typing.cast(Task, scalar("task", text, file, choices(Task), RunConfig.task))


def save(config: RunConfig, path: str | PathLike[str]) -> None:
    """Write every setting as YAML, atomically; :func:`load` gives back an equal object."""
    write(config, Path(path))


def recipes() -> dict[str, str]:
    """The package's recipes: name -> first comment line."""
    found = {}
    for entry in sorted(_recipes_directory().iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").split("\n", 1)[0]
            found[entry.name.removesuffix(".yaml")] = first.lstrip("# ").strip() if first.startswith("#") else ""
    return found


def _recipes_directory() -> resources.abc.Traversable:
    return resources.files("jmlr").joinpath("recipes")


def recipe_text(path_or_name: str | PathLike[str]) -> tuple[str, str]:
    """A recipe's name in error messages, and its YAML.

    Raises:
        UserError: no such recipe, or not readable as text.
    """
    wanted = str(path_or_name)
    packaged = _recipes_directory().joinpath(f"{wanted}.yaml")
    try:
        if wanted and "/" not in wanted and packaged.is_file():
            return f"{wanted}.yaml", packaged.read_text(encoding="utf-8")
        return wanted, Path(wanted).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError("the recipe is not UTF-8 text", file=wanted, remedy="save it in the UTF-8 encoding") from None
    except OSError as error:
        reason = "there is no such recipe" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise UserError(
            reason, file=wanted, remedy=f"give the path of a YAML file, or one of {', '.join(recipes())}"
        ) from None

"""What ``jmlr train`` does with a recipe of ``task: extend``: base, variants, dense evaluation, table."""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from jmlr.console import ProgressLine, duration
from jmlr.errors import UserError
from jmlr.extend.config import ExtendConfig, Variant
from jmlr.extend.documents import Document, load_documents
from jmlr.extend.perplexity import evaluate
from jmlr.extend.table import comparisons, format_result
from jmlr.extend.training import Job, WindowTrainer, attention_flops, interpolate_positions, prepare
from jmlr.extend.windows import PackedWindows, build_subword_tokenizer, encode
from jmlr.llm import build_llm, causal_model, load_llm, load_llm_tokenizer, package_directory
from jmlr.phase import device_of, write_json
from jmlr.run import environment
from jmlr.trainer import fsync_tree, last_checkpoint

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT asks for it

RESULTS = "results.json"
STAGE = "result.json"


def train(config: ExtendConfig, run_dir: Path, resume: bool = False) -> None:
    """Trains the base where there is none, extends it by every variant, evaluates all densely, prints the table.

    Raises:
        UserError: bad input; all but what a checkpoint holds is told before any training starts.
    """
    started = time.monotonic()
    split = load_documents(config.data)
    if config.threads:
        torch.set_num_threads(config.threads)
    extension = Extension(config, run_dir, split.train, split.held_out, resume)
    print(
        f"{config.name}: {len(split.train):,} documents ({extension.train_tokens:,} tokens) to train on,"
        f" {len(extension.held_out):,} held out with {config.extend.target_length:,} tokens or more",
        flush=True,
    )
    rows = [extension.row(name) for name in ("untouched", "interpolated", *config.extend.variants)]
    result = {
        "name": config.name,
        "config": asdict(config),
        "environment": environment(),
        "documents": {
            "train": len(split.train),
            "train_tokens": extension.train_tokens,
            "held_out": [name for name, _ in extension.held_out],
        },
        "base": extension.base_record,
        "rows": rows,
        "comparisons": comparisons(rows, config.evaluate),
        "seconds": time.monotonic() - started,
    }
    write_json(run_dir / RESULTS, result)
    print()
    print(format_result(result))
    seconds, allowed = float(result["seconds"]), config.budget_minutes  # type: ignore[arg-type]
    over = f", over the recipe's {allowed:g} minutes" if allowed and seconds > 60 * allowed else ""
    print(f"{duration(seconds)} in all{over}; results: {run_dir / RESULTS}", flush=True)


class Extension:
    """One run: the base, its documents as tokens, and a row of the table for each model."""

    def __init__(
        self, config: ExtendConfig, run_dir: Path, train: list[Document], held_out: list[Document], resume: bool
    ) -> None:
        self.config, self.run_dir, self.resume = config, run_dir, resume
        self.device = device_of(config)
        self.tokenizer = self._tokenizer(train)
        self.train = encode(self.tokenizer, [document.text for document in train])
        self.train_tokens = sum(map(len, self.train))
        self.held_out = self._held_out(held_out)
        self._check_training_text()
        self.base_directory, self.base_record = self._base()

    # ------------------------------------------------------------------ before the extension

    def _tokenizer(self, train: list[Document]) -> PreTrainedTokenizerBase:
        model = self.config.model
        if model.from_scratch:
            return build_subword_tokenizer((document.text for document in train), model.vocabulary)
        return load_llm_tokenizer(self._checkpoint())

    def _checkpoint(self) -> Path:
        model = self.config.model
        return Path(model.path) if model.path else package_directory(model.package or "")

    def _held_out(self, documents: list[Document]) -> list[tuple[str, Tensor]]:
        target, settings = self.config.extend.target_length, self.config.evaluate
        tokens = encode(self.tokenizer, [document.text for document in documents])
        long = [(document.id, ids) for document, ids in zip(documents, tokens) if len(ids) > target]
        if not long:
            raise UserError(
                f"none of the {len(documents)} held-out documents has the {target + 1} tokens of a target window;"
                f" the longest has {max(map(len, tokens))}",
                file=", ".join(self.config.data.corpora),
                remedy="raise data.document_words, or lower extend.target_length",
            )
        return long[: settings.max_documents]

    def _check_training_text(self) -> None:
        needed = self.config.extend.target_length + 1
        if self.train_tokens < needed:
            raise UserError(
                f"the training documents hold {self.train_tokens} tokens, fewer than the {needed} of one target window",
                file=", ".join(self.config.data.corpora),
                remedy="give more text, or lower extend.target_length",
            )

    def _base(self) -> tuple[Path, dict[str, Any]]:
        """A directory with the model to extend, and how it was trained where it was trained here."""
        config = self.config
        if not config.model.from_scratch:
            return self._checkpoint(), {}
        directory = self.run_dir / "base"
        record = self._finished("base")
        if record is None:
            torch.manual_seed(config.seed)
            model = build_llm(config.model.llm(), self.tokenizer)
            job = Job(
                config.base.steps,
                config.base.batch_size,
                config.base.rate,
                config.extend.save_steps,
                config.base.schedule,
            )
            record = self._train("base", model, job, config.model.context_length)
            record["parameters"] = sum(p.numel() for p in model.parameters())
            self._keep("base", model, record)
        return directory / "final", record

    def _load(self) -> nn.Module:
        config = self.config.model
        model = load_llm(self.base_directory, config.llm())
        limit = causal_model(model).config.max_position_embeddings
        if config.context_length > limit:
            raise UserError(
                f"model.context_length {config.context_length} is more than the {limit} tokens of the model",
                file=self.base_directory,
                remedy=f"set model.context_length={limit}",
            )
        return model.to(self.device)

    # ------------------------------------------------------------------ rows of the table

    def row(self, name: str) -> dict[str, Any]:
        """Trains and evaluates one model, unless an earlier run of the same name did."""
        record = self._finished(name)
        if record is not None:
            return record
        config, extend = self.config, self.config.extend
        torch.manual_seed(config.seed)  # of the adapters: every variant starts from the same
        model = self._load()
        if name != "untouched":
            interpolate_positions(model, extend.target_length, config.model.context_length)
        record = {"tokens": 0, "seconds": 0.0, "training_loss": None, "attention_flops": 0}
        if name in extend.variants:
            variant: Variant = name  # type: ignore[assignment]
            model = prepare(model, config, variant)
            job = Job(
                extend.steps,
                extend.batch_size,
                extend.rate,
                extend.save_steps,
                extend.schedule,
                extend.gradient_accumulation,
                extend.gradient_checkpointing,
            )
            record = self._train(name, model, job, extend.target_length)
            windows = record["tokens"] // extend.target_length
            shape = causal_model(model).config
            record["attention_flops"] = attention_flops(shape, extend.target_length, windows, variant, extend.group)
        record["name"] = name
        record["perplexity"] = self._evaluate(name, model)
        self._keep(name, model if name in extend.variants else None, record)
        del model
        gc.collect()
        return record

    def _train(self, name: str, model: nn.Module, job: Job, length: int) -> dict[str, Any]:
        directory = self.run_dir / name
        count = job.steps * job.batch_size * job.gradient_accumulation
        checkpoint = last_checkpoint(directory) if self.resume else None
        done = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
        started = time.monotonic()
        with ProgressLine(job.steps, name, initial=done) as line:
            trainer = WindowTrainer(
                model,
                self.config,
                job,
                PackedWindows(self.train, length, count, self.config.seed),
                directory,
                lambda row: line.update(int(row["step"]), llm_loss=row.get("loss")),
            )
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        losses = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
        last = [loss for step, loss in losses if step > 0.9 * job.steps] or [loss for _, loss in losses[-1:]]
        return {
            "tokens": count * length,
            "seconds": time.monotonic() - started,
            "training_loss": sum(last) / len(last) if last else None,
            "history": losses,
        }

    def _evaluate(self, name: str, model: nn.Module) -> list[dict[str, Any]]:
        settings = self.config.evaluate
        lengths = settings.lengths
        with (
            ProgressLine(len(lengths) * len(self.held_out), f"{name}, dense evaluation") as line,
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.model.dtype == "bfloat16"),
        ):
            report: Callable[[int], None] = line.update
            found = evaluate(
                model.to(self.device),
                self.held_out,
                lengths,
                batch_tokens=settings.batch_tokens,
                chunk=self.config.optimizer.logits_chunk,
                device=self.device,
                report=report,
            )
        rows = []
        for one in found:
            interval = one.interval(settings.confidence, settings.bootstrap)
            rows.append({**asdict(one), "mean": interval.mean, "low": interval.low, "high": interval.high})
        return rows

    # ------------------------------------------------------------------ what is kept

    def _finished(self, name: str) -> dict[str, Any] | None:
        path = self.run_dir / name / STAGE
        if not (self.resume and path.is_file()):
            return None
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record

    def _keep(self, name: str, model: nn.Module | None, record: dict[str, Any]) -> None:
        """The model as an ordinary directory of transformers, adapters merged; then the record: it is done."""
        directory = self.run_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        if model is not None:
            wrapper: Any = model
            whole = wrapper.merge_and_unload() if hasattr(wrapper, "merge_and_unload") else wrapper
            whole.set_attn_implementation("sdpa")
            whole.save_pretrained(directory / "final")
            self.tokenizer.save_pretrained(directory / "final")
            fsync_tree(directory / "final")
        write_json(directory / STAGE, record)

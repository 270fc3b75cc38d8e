"""transformers' Trainer around the joint step: two learning rates, an index that follows, checkpoints that survive.

What the Trainer does stays the Trainer's: the loop, gradient accumulation, the schedule, logging, resuming. Added:
candidates from the index before each step, its refresh, the retriever's moving average, probes of recall, and
checkpoints that appear whole or not at all.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from jmlr.config import RunConfig, TrainConfig
from jmlr.errors import UserError
from jmlr.model import JointModel
from jmlr.retriever.index import ExactIndex


class Schedule(Dataset):
    """The whole run's questions in order: a new permutation each epoch, a function of the seed alone.

    Fixed before the first step, so that a resumed run sees the same questions whatever it did before.
    """

    def __init__(self, questions: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-length // questions)
        self.order = torch.cat([torch.randperm(questions, generator=generator) for _ in range(epochs)])[:length]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {"question": self.order[position]}


def without(numbers: Tensor, excluded: Sequence[Collection[int]], wanted: int) -> Tensor:
    """The first `wanted` of each row of int64 [B, K] that are not excluded from it; -1 where there are fewer."""
    rows = [[n for n in row if n not in out][:wanted] for row, out in zip(numbers.tolist(), excluded, strict=True)]
    return torch.tensor([row + [-1] * (min(wanted, numbers.shape[1]) - len(row)) for row in rows])


def fsync_tree(directory: Path) -> None:
    """Flushes every file and folder below `directory` to the disk."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def last_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint below `directory`; half-written ones never carry such a name."""
    found = [p for p in directory.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


def rate_at(train: TrainConfig, step: int, *, warmup: int, begin: int) -> float:
    """The rate at a step as a share of its peak: a linear rise over `warmup` steps from `begin`, then the schedule.

    "cosine" falls to ``min_rate_ratio`` at the last step, "linear" likewise, "constant" rises and stays.
    """
    done = step - begin
    if done < 0:
        return 0.0
    rise = min(1.0, (done + 1) / (warmup + 1))
    if train.schedule == "constant":
        return rise
    progress = min(1.0, done / max(1, train.steps - begin))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return rise * (train.min_rate_ratio + (1 - train.min_rate_ratio) * fall)


class JointTrainer(Trainer):
    """Trains a ``JointModel``.

    Args:
        build_index: encodes the corpus with the given retriever: (retriever, version) -> index. None: no retrieval.
        probe: called every ``probe_steps`` with the index and the averaged retriever; returns figures for the log.
        report: called with each logged row (the progress line).
        stop_after: stops at this step with a checkpoint; the schedule stays that of ``train.steps``.
    """

    def __init__(
        self,
        model: JointModel,
        config: RunConfig,
        output_dir: Path,
        *,
        build_index: Callable[[nn.Module, int], ExactIndex] | None = None,
        probe: Callable[[ExactIndex, nn.Module], dict[str, float]] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
        stop_after: int | None = None,
        tensorboard: bool = True,
    ) -> None:
        self.config = config
        self.build_index = build_index
        self.probe = probe
        self.index: ExactIndex | None = None
        self._sums: dict[str, float] = {}
        self._staging: Path | None = None
        self.stop_after = stop_after
        train = config.train
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=train.steps,
            per_device_train_batch_size=train.batch_size,
            gradient_accumulation_steps=train.gradient_accumulation,
            learning_rate=train.llm_rate,
            weight_decay=train.weight_decay,
            adam_beta1=train.betas[0],
            adam_beta2=train.betas[1],
            adam_epsilon=train.eps,
            max_grad_norm=0.0,  # each model is clipped by itself, in _AfterStep
            logging_steps=train.log_steps,
            logging_first_step=False,
            save_strategy="steps",
            save_steps=train.save_steps,
            seed=config.seed,
            data_seed=config.seed,
            use_cpu=_wants_cpu(config.device),
            bf16=False,
            remove_unused_columns=False,
            label_names=[],
            disable_tqdm=True,
            report_to=["tensorboard"] if tensorboard and find_spec("tensorboard") else [],
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            accelerator_config={"split_batches": False, "use_seedable_sampler": False},
        )
        if arguments.n_gpu > 1:  # one process drives one GPU: several would wrap the step in DataParallel
            arguments._n_gpu = 1
        length = train.steps * train.batch_size * train.gradient_accumulation
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=Schedule(len(model.texts.questions), length, config.seed),
            callbacks=[_AfterStep(self, report)],
        )
        # The Trainer adds its own printer where its bar is off; the progress line takes its place.
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch: divide it when accumulating

    # ------------------------------------------------------------------ the step

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # Schedule is shuffled already

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        joint = self.config.joint
        candidates = None
        if self.build_index is not None and joint.context > 0:
            self.refresh_index()
            candidates = self.find_candidates(inputs["question"])
        micro_step = self.state.global_step * self.args.gradient_accumulation_steps + self._micro(
            self.state.global_step
        )
        weight = joint.rank_weight if self.state.global_step >= joint.rank_warmup_steps else 0.0
        outputs = model(
            question=inputs["question"],
            candidates=candidates,
            seed=self.config.seed * 1_000_003 + micro_step,
            rank_weight=weight,
        )
        for name in ("loss_lm", "loss_rank", "pairs"):
            self._sums[name] = self._sums.get(name, 0.0) + float(outputs[name])
        self._sums["n"] = self._sums.get("n", 0.0) + 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _micro(self, step: int) -> int:
        """0, 1, ... within one optimizer step."""
        if getattr(self, "_micro_step", None) != step:
            self._micro_step, self._micro_count = step, -1
        self._micro_count += 1
        return self._micro_count

    def find_candidates(self, question: Tensor) -> Tensor:
        model = self.joint_model
        assert self.index is not None and model.average is not None and model.texts.queries is not None
        queries = model.average.encode_queries(model.texts.queries.whole_rows(question.cpu()))
        wanted = self.config.joint.candidates
        own = [model.texts.own_rationale.get(n, frozenset()) for n in question.tolist()]
        spare = max(map(len, own), default=0)
        _, numbers = self.index.search(queries, wanted + spare)
        if spare:
            numbers = without(numbers, own, wanted)
        return numbers.to(question.device)

    @property
    def joint_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model) if hasattr(self, "accelerator") else self.model

    def refresh_index(self) -> None:
        """Encodes the corpus anew with the averaged retriever where ``refresh_steps`` say so."""
        assert self.build_index is not None
        every = self.config.joint.refresh_steps if self.config.joint.train_retriever else 0
        due = self.state.global_step // every if every else 0
        if self.index is None or self.index.manifest.version < due:
            self.index = self.build_index(self.joint_model.average, due)

    def run_probe(self) -> dict[str, float]:
        if self.probe is None or self.index is None:
            return {}
        return self.probe(self.index, self.joint_model.average)

    # ------------------------------------------------------------------ optimizer and log

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the language model's and the retriever's parameters at their own rates."""
        if getattr(self, "optimizer", None) is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: list[dict[str, Any]] = []
            train = self.config.train
            for part, rate, weight_decay in (
                ("llm", train.llm_rate, train.weight_decay),
                ("retriever", train.retriever_rate, train.retriever_weight_decay),
            ):
                for decay in (True, False):
                    chosen = [
                        p
                        for name, p in self.model.named_parameters()
                        if name.startswith(part + ".") and p.requires_grad and (name in decayed) == decay
                    ]
                    if chosen:
                        groups.append(
                            {"params": chosen, "lr": rate, "weight_decay": weight_decay if decay else 0.0, "part": part}
                        )
            if not groups:
                raise UserError("nothing to train: every parameter is frozen", remedy="train the LLM or the retriever")
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(
                groups, lr=self.args.learning_rate, betas=betas, eps=self.args.adam_epsilon
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """One schedule a model: the retriever's begins where the rank loss does."""
        if getattr(self, "lr_scheduler", None) is None:
            train, joint = self.config.train, self.config.joint
            language: Callable[[int], float] = partial(
                rate_at, train, warmup=round(train.steps * train.warmup_ratio), begin=0
            )
            ranker: Callable[[int], float] = partial(
                rate_at, train, warmup=joint.rank_ramp_steps, begin=joint.rank_warmup_steps
            )
            optimizer = self.optimizer if optimizer is None else optimizer
            parts = [group["part"] for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, [language if part == "llm" else ranker for part in parts])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def clip_gradients(self) -> None:
        """Each model's gradient by itself, so that neither's outliers shorten the other's step."""
        for part in (self.joint_model.llm, self.joint_model.retriever):
            if part is not None:
                nn.utils.clip_grad_norm_(part.parameters(), self.config.train.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums.get("n"):
            n = self._sums["n"]
            logs = {**logs, **{name: self._sums[name] / n for name in ("loss_lm", "loss_rank", "pairs")}}
            if self.index is not None:
                logs["index_version"] = float(self.index.manifest.version)
                if self.state.global_step % self.config.train.probe_steps == 0:
                    logs.update(self.run_probe())
            self._sums = {}
        super().log(logs, start_time)

    # ------------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint beside its place, flushes it, renames it: it is there whole or not at all."""
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._staging = Path(self.args.output_dir) / "staging"
        shutil.rmtree(self._staging, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
            whole = self._staging / final.name
            if self.index is not None and self.config.joint.train_retriever:
                self.index.save(whole / "index")
            fsync_tree(whole)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(whole, final)
            fsync_directory(final.parent)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        numbered = (p for p in final.parent.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit())
        by_step = sorted(numbered, key=lambda p: int(p.name.removeprefix("checkpoint-")))
        for old in by_step[: -self.config.train.keep_checkpoints]:
            # Renamed first: a run killed while deleting leaves no half checkpoint under a checkpoint's name.
            doomed = old.with_name("staging-" + old.name)
            os.replace(old, doomed)
            shutil.rmtree(doomed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            _without_aliases(self.joint_model.state_dict()), directory / "model.safetensors", metadata={"format": "pt"}
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        target = self.joint_model
        remedy = f"delete {directory.name} to resume from the one before, or start without --resume"
        try:
            weights = load_file(directory / "model.safetensors")
        except Exception as error:  # missing, cut short or not a safetensors file at all
            raise UserError(
                f"the checkpoint cannot be read ({type(error).__name__})",
                file=directory / "model.safetensors",
                remedy=remedy,
            ) from None
        own = _without_aliases(target.state_dict())
        wrong = [n for n in own if n not in weights or weights[n].shape != own[n].shape] + [
            n for n in weights if n not in own
        ]
        if wrong:
            raise UserError(
                f"the checkpoint is of another model: {wrong[0]!r} does not fit (and {len(wrong) - 1} more)",
                file=directory / "model.safetensors",
                remedy="resume with the recipe that the run was started with",
            )
        target.load_state_dict(weights, strict=False)  # aliases of tied weights are not in the file
        if (directory / "index").is_dir():
            self.index = ExactIndex.load(directory / "index")


def fsync_directory(directory: Path) -> None:
    """Flushes a folder's own entries, so that a rename outlives a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _without_aliases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops second names of tied weights: safetensors stores each memory once."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept = {}
    for name, value in state.items():
        key = (value.data_ptr(), tuple(value.shape))
        if value.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = value.detach().contiguous()
    return kept


def _wants_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


class _AfterStep(TrainerCallback):
    """The moving average after each optimizer step, and the progress line."""

    def __init__(self, trainer: JointTrainer, report: Callable[[dict[str, Any]], None] | None) -> None:
        self.trainer = trainer
        self.report = report

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.clip_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.joint_model.update_average()
        if self.trainer.stop_after is not None and state.global_step >= self.trainer.stop_after:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.report is not None and logs:
            self.report({"step": state.global_step, **logs})

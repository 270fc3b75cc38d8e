"""transformers' Trainer on packed windows: the base from scratch, and every variant of its extension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from jmlr.errors import UserError
from jmlr.extend.config import ExtendConfig, Variant
from jmlr.extend.perplexity import token_losses
from jmlr.llm import add_lora, causal_model
from jmlr_kernels.shifted_attention.flops import attention_pairs

TRAINED = "trained.safetensors"


@dataclass(frozen=True)
class Job:
    """How much one training does, and how fast it learns."""

    steps: int
    batch_size: int
    rate: float
    save_steps: int
    schedule: str = "constant_with_warmup"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False


def interpolate_positions(model: nn.Module, target_length: int, context_length: int) -> None:
    """Linear position interpolation (Chen et al., arXiv 2306.15595), in place: positions are divided by the ratio.

    Raises:
        UserError: the model's rotary embedding is scaled already.
    """
    causal = causal_model(model)
    rope = dict(causal.config.rope_parameters)
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"the model's rotary positions are scaled already (rope_type '{rope['rope_type']}')",
            remedy="extend a model whose rope_type is default",
        )
    causal.config.rope_parameters = {**rope, "rope_type": "linear", "factor": target_length / context_length}
    causal.config.max_position_embeddings = target_length
    rotary = causal.model.rotary_emb
    causal.model.rotary_emb = type(rotary)(config=causal.config).to(rotary.inv_freq.device)


def prepare(model: nn.Module, config: ExtendConfig, variant: Variant) -> nn.Module:
    """An interpolated model, made ready for one variant: its attention, and LongLoRA's choice of what is trained."""
    causal, extend = causal_model(model), config.extend
    causal.config.s2_group_size = extend.group
    causal.config.s2_boundary = "wrap" if variant == "wrap" else "split"
    causal.set_attn_implementation("sdpa" if variant == "full" else "s2")
    if extend.lora_rank == 0:
        return model
    llm = config.model.llm(lora_rank=extend.lora_rank, lora_alpha=extend.lora_alpha)
    adapted = add_lora(
        model, llm, ("q_proj", "k_proj", "v_proj", "o_proj"), embeddings_and_norms=extend.train_embeddings_and_norms
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # a step of 2e-5 is lost in bfloat16; autocast multiplies in it all the same
            parameter.data = parameter.data.float()
    return adapted


def attention_flops(model_config: Any, length: int, windows: int, variant: Variant, group_size: int) -> int:
    """Useful FLOPs of attention, forward and backward, of training on `windows` windows: 14 D for each score pair."""
    pairs = attention_pairs(
        length, length if variant == "full" else group_size, "wrap" if variant == "wrap" else "split"
    )
    heads = model_config.num_attention_heads
    total = heads * pairs.plain if variant == "full" else pairs.total(heads)
    dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    return 14 * dim * total * model_config.num_hidden_layers * windows


class WindowTrainer(Trainer):
    """Trains a causal language model on every token of its windows.

    Args:
        windows: rows ``input_ids`` and ``labels``, already shifted, in the order in which they are trained on.
        report: called with each logged row (the progress line).
    """

    def __init__(
        self,
        model: nn.Module,
        config: ExtendConfig,
        job: Job,
        windows: Dataset,
        output_dir: Path,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        optimizer = config.optimizer
        cpu = config.device == "cpu" or not torch.cuda.is_available()
        self.logits_chunk = optimizer.logits_chunk
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=job.steps,
            per_device_train_batch_size=job.batch_size,
            gradient_accumulation_steps=job.gradient_accumulation,
            learning_rate=job.rate,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            max_grad_norm=optimizer.max_grad_norm,
            lr_scheduler_type=job.schedule,
            warmup_steps=min(optimizer.warmup_steps, job.steps // 2),
            logging_steps=optimizer.log_steps,
            save_strategy="steps",
            save_steps=job.save_steps,
            save_total_limit=1,
            seed=config.seed,
            use_cpu=cpu,
            bf16=config.model.dtype == "bfloat16",
            remove_unused_columns=False,
            label_names=[],
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=not cpu,
        )
        if arguments.n_gpu > 1:  # one process drives one GPU: several would wrap the step in DataParallel
            arguments._n_gpu = 1
        if job.gradient_checkpointing:
            _checkpoint_layers(causal_model(model))
        super().__init__(model=model, args=arguments, train_dataset=windows, callbacks=[_Report(report)])
        self.remove_callback(PrinterCallback)  # the progress line takes its place
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch: divide it when accumulating

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The mean cross-entropy of the batch in nats."""
        with self.accelerator.autocast():  # accelerate puts it around the model's own forward, which makes all logits
            loss = token_losses(model, inputs["input_ids"], inputs["labels"], self.logits_chunk).mean()
        return (loss, {"loss": loss}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What is trained, and that alone: PEFT's own checkpoint would leave embeddings and norms out."""
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().contiguous() for name, value in self._trained()}, directory / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / TRAINED
        try:
            saved = load_file(file)
        except Exception as error:  # missing, cut short or not a safetensors file at all
            raise UserError(
                f"the checkpoint cannot be read ({type(error).__name__})",
                file=file,
                remedy=f"delete {file.parent.name} to train this model from its start",
            ) from None
        with torch.no_grad():
            for name, value in self._trained():
                value.copy_(saved[name])

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]


def _checkpoint_layers(causal: Any) -> None:
    """Layers are computed again in the backward pass; the method's name is about to change in transformers."""
    enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class _Report(TrainerCallback):
    def __init__(self, report: Callable[[dict[str, Any]], None] | None) -> None:
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.report is not None and logs:
            self.report({"step": state.global_step, **logs})

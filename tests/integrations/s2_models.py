"""Tiny models of the classes that people train, and the readable definition plugged into them in the same way."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.53")

from jmlr_kernels.integrations.transformers import register  # noqa: E402
from jmlr_kernels.shifted_attention.reference import shifted_sparse_attention_reference  # noqa: E402

GROUP = 8
VOCABULARY = 64
MODELS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# The two ways to LongLoRA's trainable embeddings and norms: PEFT's copies of them, or the originals made trainable.
COPIES = ["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"]

register()


def config_of(kind="llama", **changes):
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 72,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "s2_group_size": GROUP,
        **({"sliding_window": None} if kind in ("mistral", "mixtral") else {}),
        **(EXPERTS if kind in ("mixtral", "qwen3_moe") else {}),
        **changes,
    }
    return transformers.AutoConfig.for_model(kind, **fields)


def tiny(kind="llama", implementation="s2", **changes):
    """The same weights for every implementation."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_of(kind, **changes), attn_implementation=implementation)


def use(model, implementation):
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(implementation)
    else:  # transformers 4.53
        model.config._attn_implementation = implementation
    return model


def longlora(model, copies=True):
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=PROJECTIONS, modules_to_save=COPIES if copies else None)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at zero, and would hide what reaches the queries
            torch.nn.init.normal_(parameter, std=0.1)
        if not copies and ("embed_tokens" in name or "norm" in name):
            parameter.requires_grad_(True)
    return model


def tokens(batch=2, length=29, seed=1):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def right_padding(*lengths, total=29):
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).long()


def logits(model, ids, **options):
    return model(input_ids=ids, **{"use_cache": False, **options}).logits


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _definition(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_):
    config = module.config
    options = {"boundary": getattr(config, "s2_boundary", None) or "split", "scale": scaling}
    # What plain torch does with float32 from a norm beside another dtype: the model's dtype decides.
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    if cu_seq_lens_q is not None:
        return shifted_sparse_attention_reference(
            q[0], k[0], v[0], config.s2_group_size, cu_seqlens=cu_seq_lens_q, **options
        )[None], None
    lengths = None if attention_mask is None else attention_mask.sum(-1)
    return shifted_sparse_attention_reference(q, k, v, config.s2_group_size, seq_lens=lengths, **options), None


transformers.AttentionInterface.register("definition", _definition)
transformers.AttentionMaskInterface.register("definition", lambda *_, attention_mask=None, **__: attention_mask)

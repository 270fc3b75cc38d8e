"""What ``attn_implementation="s2"`` cannot do is said in one sentence, in real model classes, and never ignored."""

from __future__ import annotations

import inspect

import pytest
import torch
from s2_models import GROUP, config_of, logits, tiny, tokens, transformers, use

from jmlr_kernels.integrations import transformers as plugin


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"s2_group_size": None}, {}, "set s2_group_size, in tokens, in the model's LlamaConfig"),
        ({"s2_group_size": True}, {}, "s2_group_size=True: give a length"),
        ({"s2_group_size": 0.25}, {}, "s2_group_size=0.25: give a length"),
        ({"s2_group_size": "8"}, {}, "s2_group_size='8': give a length"),
        ({"s2_group_size": 0}, {}, "s2_group_size=0: give a length"),
        ({"s2_group_size": 1}, {}, "s2_group_size=1: give a length"),
        ({}, {"s2_group_size": 0.25}, "s2_group_size=0.25: give a length"),
        ({"s2_boundary": "wrapped"}, {}, "s2_boundary='wrapped': choose"),
        ({"attention_dropout": 0.1}, {}, "no dropout .got 0.1.: set attention_dropout = 0.0"),
        ({}, {"softcap": 30.0}, "softcap"),
        ({}, {"sliding_window": 16}, "sliding window"),
        ({}, {"s_aux": torch.zeros(9)}, "attention sinks"),
        ({}, {"attention_mask": torch.tensor([[0] * 4 + [1] * 25] * 2)}, "right padding only"),
        ({}, {"attention_mask": torch.tensor([[1] * 9 + [0] + [1] * 19] * 2)}, "right padding only"),
        ({}, {"attention_mask": torch.ones(2, 1, 29, 29, dtype=torch.bool)}, "2-D padding mask"),
        ({}, {"cu_seq_lens_q": torch.tensor([0, 29], dtype=torch.int32)}, "one row without a cache: got a batch of 2"),
    ],
)
def test_what_it_cannot_do_raises(config, options, message):
    model = tiny(**config).train()
    with pytest.raises(ValueError, match=message):
        logits(model, tokens(), **options)


@pytest.mark.parametrize("compiled", [False, True])
def test_where_nothing_may_wait_the_device_checks_the_mask(compiled, monkeypatch):
    monkeypatch.setattr(plugin, "may_wait", lambda tensor, training: not training)  # the rule of a GPU
    model = tiny().train()
    step = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    right = torch.tensor([[1] * 25 + [0] * 4] * 2)
    torch.testing.assert_close(
        step(input_ids=tokens(), attention_mask=right, use_cache=False).logits,
        logits(model, tokens(), attention_mask=right),
    )
    for other in ([0] * 4 + [1] * 25, [1] * 9 + [0] + [1] * 19):
        with pytest.raises(RuntimeError, match="right padding only"):
            step(input_ids=tokens(), attention_mask=torch.tensor([other] * 2), use_cache=False)


def test_packed_documents_and_a_cache_exclude_each_other():
    model = tiny().eval()
    cache = model(input_ids=tokens(1, 5), use_cache=True).past_key_values
    ends = torch.tensor([0, 4, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match="without a cache: got a batch of 1, 7 queries and 12 keys"):
        model(input_ids=tokens(1, 7), past_key_values=cache, cu_seq_lens_q=ends)


def test_dropout_matters_in_training_alone():
    ids = tokens()
    model = tiny(attention_dropout=0.1).eval()
    torch.testing.assert_close(logits(model, ids), logits(use(tiny(), "sdpa").eval(), ids))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_mistrals_window_is_refused_and_the_remedy_works(kind, training):
    model = tiny(kind, sliding_window=4096).train(training)  # the default, and what Mistral-7B-v0.1 has
    with pytest.raises(ValueError, match="one of 4096 tokens: set config.sliding_window = None"):
        logits(model, tokens())
    model.config.sliding_window = None
    torch.testing.assert_close(logits(model, tokens()), logits(tiny(kind).train(training), tokens()))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwens_window_is_refused_and_the_remedy_works(kind, tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    model = tiny(kind, **window).train()
    with pytest.raises(ValueError, match="one of 16 tokens: load the model with layer_types="):
        logits(model, tokens())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="s2", layer_types=["full_attention"] * 2
    ).train()
    torch.testing.assert_close(logits(loaded, tokens()), logits(tiny(kind).train(), tokens()))


@pytest.mark.parametrize("training", [True, False])
def test_gemma2s_window_and_softcap_are_refused(training):
    with pytest.raises(ValueError, match="sliding window"):
        logits(tiny("gemma2").train(training), tokens())
    model = tiny("gemma2", layer_types=["full_attention"] * 2).train(training)
    with pytest.raises(ValueError, match="no softcap: set attn_logit_softcapping = None"):
        logits(model, tokens())
    model = tiny("gemma2", layer_types=["full_attention"] * 2, attn_logit_softcapping=None).train(training)
    ours = logits(model, tokens())
    torch.testing.assert_close(ours, logits(use(model, "definition" if training else "eager"), tokens()))


@pytest.mark.parametrize("training", [True, False])
def test_encoders_are_refused(training):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    try:
        model = transformers.AutoModel.from_config(config, attn_implementation="s2").train(training)
    except KeyError:  # a version in which Bert does not use the registry
        pytest.skip("Bert has attention classes of its own here")
    with pytest.raises(ValueError, match="causal self-attention"):
        model(input_ids=tokens())


@pytest.mark.parametrize("training", [True, False])
def test_encoder_decoders_are_refused(training):
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        s2_group_size=GROUP,
    )
    model = transformers.AutoModel.from_config(config, attn_implementation="s2").train(training)
    with pytest.raises(ValueError, match="causal self-attention"):
        model(input_ids=tokens(), decoder_input_ids=tokens(2, 7))
    states = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.zeros(2, 29, 32))
    with pytest.raises(ValueError, match="causal self-attention|2-D padding mask"):
        model(encoder_outputs=states, decoder_input_ids=tokens(2, 7))


def test_a_llama_made_bidirectional_is_refused():
    model = tiny(is_causal=False).train()
    if 'getattr(config, "is_causal"' not in inspect.getsource(transformers.masking_utils.create_causal_mask):
        pytest.skip("this transformers does not read the field")
    with pytest.raises(ValueError, match="causal self-attention"):
        logits(model, tokens())


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_model_is_named_in_the_message(kind):
    config = config_of(kind, s2_group_size=None)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="s2").train()
    with pytest.raises(ValueError, match=type(config).__name__):
        logits(model, tokens())


@pytest.mark.parametrize("overlay", ["or_mask_function", "and_mask_function"])
def test_a_models_own_pattern_is_kept_in_evaluation_and_refused_in_training(overlay):
    create = transformers.masking_utils.create_causal_mask
    if "inputs_embeds" not in inspect.signature(create).parameters:
        pytest.skip("another signature")
    model, ids = tiny(), tokens()
    options = {"inputs_embeds": torch.zeros(2, 29, 72), "attention_mask": None, "past_key_values": None}
    options[overlay] = lambda row, head, query, key: (query < 5) & (key < 5)
    masks = {}
    for implementation in ("s2", "sdpa"):
        masks[implementation] = create(config=use(model, implementation).config, **options)
    assert torch.equal(masks["s2"], masks["sdpa"])
    with pytest.raises(ValueError, match="2-D padding mask"):
        logits(use(model, "s2").train(), ids, attention_mask=masks["s2"])


@pytest.mark.parametrize("name", ["flash_s2", "my/s2", "s2_sdpa"])
def test_names_with_a_meaning_are_refused(name):
    with pytest.raises(ValueError, match="meaning"):
        plugin.register(name)

"""``attn_implementation="s2"`` in a tiny Llama: sparse in training, dense in evaluation, padding and packing kept."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from jmlr_kernels.integrations.transformers import register  # noqa: E402
from jmlr_kernels.shifted_attention.reference import shifted_sparse_attention_reference  # noqa: E402

GROUP = 8


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def tiny_llama(implementation="s2", **changes):
    torch.manual_seed(0)
    fields = {
        "vocab_size": 64,
        "hidden_size": 72,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "s2_group_size": GROUP,
        **changes,
    }
    config = transformers.LlamaConfig(**fields)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def tokens(batch=2, length=29):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **options):
    return model(input_ids=ids, use_cache=False, **options).logits


def definition(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    seq_lens = None if attention_mask is None else attention_mask.sum(-1)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return shifted_sparse_attention_reference(q, k, v, GROUP, seq_lens=seq_lens, scale=scaling), None


def test_training_is_sparse_and_equals_the_definition():
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("definition", definition)
    AttentionMaskInterface.register("definition", lambda *_, attention_mask=None, **__: attention_mask)
    ids = tokens()
    mask = (torch.arange(29) < torch.tensor([[29], [17]])).long()
    model = tiny_llama().train()
    sparse = logits(model, ids, attention_mask=mask)
    model.set_attn_implementation("definition")
    torch.testing.assert_close(sparse, logits(model, ids, attention_mask=mask))
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(sparse[0, GROUP:], logits(model, ids, attention_mask=mask)[0, GROUP:], atol=1e-3)


@pytest.mark.parametrize("lengths", [None, (29, 12)])
def test_evaluation_is_dense(lengths):
    ids, options = tokens(), {}
    kept = torch.ones(2, 29, dtype=torch.bool)
    if lengths is not None:
        kept = torch.arange(29) < torch.tensor(lengths)[:, None]
        options["attention_mask"] = kept.long()
    model = tiny_llama().eval()
    dense = logits(model, ids, **options)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(dense[kept], logits(model, ids, **options)[kept])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_dense(cache):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # generation pads on the left
    texts = []
    for implementation in ("s2", "sdpa"):
        model = tiny_llama(implementation).eval()
        options = {"cache_implementation": "static"} if cache == "static" else {}
        texts.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, disable_compile=True, **options)
        )
    assert torch.equal(*texts)


def test_right_padding_gets_no_gradient():
    model = tiny_llama().train()
    ids = tokens()
    mask = (torch.arange(29) < torch.tensor([[29], [17]])).long()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
    (out * mask[..., None]).square().sum().backward()
    assert embedded.grad[1, :17].abs().sum(-1).gt(0).all()
    assert not embedded.grad[1, 17:].any()


def test_packed_documents_equal_documents_alone():
    model = tiny_llama().train()
    ids = tokens(1, 40)
    ends = torch.tensor([0, 13, 40], dtype=torch.int32)
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None]
    options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 27, "max_length_k": 27}
    for mode in (True, False):
        model.train(mode)
        packed = logits(model, ids, position_ids=positions, **options)
        alone = torch.cat([logits(model, ids[:, :13]), logits(model, ids[:, 13:])], dim=1)
        torch.testing.assert_close(packed, alone)


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = tiny_llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        logits(model, tokens()).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_compiles_without_a_graph_break():
    model = tiny_llama(num_hidden_layers=1).train()
    ids = tokens()
    mask = (torch.arange(29) < torch.tensor([[29], [17]])).long()
    expected = logits(model, ids, attention_mask=mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_group_size_as_a_keyword_and_in_the_saved_config(tmp_path):
    model = tiny_llama().train()
    ids = tokens()
    wide = logits(model, ids, s2_group_size=64)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(wide[:, :29], logits(model, ids))
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).s2_group_size == GROUP


def test_boundary_as_a_keyword_and_in_the_saved_config(tmp_path):
    ids = tokens()
    split, wrap = (logits(tiny_llama(s2_boundary=boundary).train(), ids) for boundary in ("split", "wrap"))
    assert not torch.allclose(split, wrap, atol=1e-3)
    model = tiny_llama().train()
    torch.testing.assert_close(logits(model, ids), split)
    torch.testing.assert_close(logits(model, ids, s2_boundary="wrap"), wrap)
    tiny_llama(s2_boundary="wrap").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="s2").train()
    torch.testing.assert_close(logits(loaded, ids), wrap)
    with pytest.raises(ValueError, match="boundary='wrapped'"):
        logits(model, ids, s2_boundary="wrapped")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"s2_group_size": None}, {}, "s2_group_size"),
        ({"attention_dropout": 0.1}, {}, "dropout"),
        ({}, {"softcap": 30.0}, "softcap"),
        ({}, {"sliding_window": 16}, "sliding_window"),
        ({}, {"attention_mask": torch.tensor([[0] * 4 + [1] * 25] * 2)}, "right padding"),
        ({}, {"attention_mask": torch.tensor([[1] * 9 + [0] + [1] * 19] * 2)}, "right padding"),
        ({}, {"cu_seq_lens_q": torch.tensor([0, 29], dtype=torch.int32)}, "one row"),
    ],
)
def test_what_it_cannot_do_raises(config, options, message):
    model = tiny_llama(**config).train()
    with pytest.raises(ValueError, match=message):
        logits(model, tokens(), **options)


def test_sliding_window_models_are_refused():
    config = transformers.MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=16,
        s2_group_size=GROUP,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="s2").train()
    with pytest.raises(ValueError, match="sliding"):
        logits(model, tokens())


@pytest.mark.parametrize("name", ["flash_s2", "my/s2", "s2_sdpa"])
def test_names_with_a_meaning_are_refused(name):
    with pytest.raises(ValueError, match="meaning"):
        register(name)

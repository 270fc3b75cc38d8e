"""How people fine-tune: LoRA with LongLoRA's trainable embeddings and norms, checkpointing, float32 norms, autocast."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_as_exact_as_torch
from s2_models import gradients, logits, longlora, right_padding, tiny, tokens

from jmlr_kernels.integrations import transformers as plugin

peft = pytest.importorskip("peft")


def step(model, **options):
    model.train()
    mask = right_padding(29, 17)
    out = logits(model, tokens(), attention_mask=mask, **options)[mask.bool()]
    out.square().mean().backward()
    return out.detach(), gradients(model)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_longlora_gradients_equal_the_definition(kind, copies):
    out, grads = step(longlora(tiny(kind), copies))
    expected, expected_grads = step(longlora(tiny(kind, "definition"), copies))
    torch.testing.assert_close(out, expected)
    assert grads.keys() == expected_grads.keys()
    trained = " ".join(grads)
    assert all(part in trained for part in ("lora_A", "lora_B", "embed_tokens", "input_layernorm", "model.norm"))
    assert "mlp" not in trained and "lm_head" not in trained
    for name, grad in grads.items():
        assert grad.any(), name
        torch.testing.assert_close(grad, expected_grads[name])


def test_adapters_are_saved_and_loaded(tmp_path):
    model = longlora(tiny())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    step(model)
    optimizer.step()
    out, _ = step(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    torch.testing.assert_close(step(loaded)[0], out)
    untrained, _ = step(longlora(tiny()))
    assert not torch.allclose(untrained, out, atol=1e-3)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(step(merged)[0], out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_gradient_checkpointing_changes_nothing(adapted, reentrant, monkeypatch):
    results, calls = [], []
    attention = plugin.shifted_sparse_attention
    monkeypatch.setattr(plugin, "shifted_sparse_attention", lambda *a, **o: calls.append(1) or attention(*a, **o))
    for checkpointing in (False, True):
        model = longlora(tiny(), copies=False) if adapted else tiny()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        calls.clear()
        results.append(step(model, use_cache=True))
        assert len(calls) == (4 if checkpointing else 2)  # two layers, computed again in the backward pass
    torch.testing.assert_close(results[0], results[1])


def with_float32_norms(kind, implementation="s2", dtype=torch.bfloat16):
    """What k-bit training makes of a bfloat16 model: norms in float32, and linear layers that cast what reaches them.

    In another dtype than bfloat16: the same weights in that dtype, norms included.
    """
    model = tiny(kind, implementation).to(torch.bfloat16).to(dtype).train()
    for name, module in model.named_modules():
        if name.endswith("norm") and dtype == torch.bfloat16:
            module.to(torch.float32)
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, arguments: (arguments[0].to(dtype),))
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_norms_kept_in_float32_leave_a_model_as_exact_as_plain_torch(kind):
    model, seen = with_float32_norms(kind), []
    projection = model.get_submodule("model.layers.0.self_attn.o_proj")
    projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype), prepend=True)
    out = logits(model, tokens())
    assert seen == [torch.bfloat16]
    exact = logits(with_float32_norms(kind, "definition", torch.float64), tokens())
    assert_as_exact_as_torch("logits", out, logits(with_float32_norms(kind, "definition"), tokens()), exact)


def with_float32_copies(kind, implementation="s2", dtype=torch.bfloat16):
    """A bfloat16 model under PEFT, with everything that is trained held in float32; or the same weights in `dtype`."""
    model = longlora(tiny(kind, implementation).to(torch.bfloat16))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16).float()
    return model.train() if dtype == torch.bfloat16 else model.to(dtype).train()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_embeddings_and_norms_trained_in_float32_under_autocast(kind, monkeypatch):
    model, computed, given = with_float32_copies(kind), set(), set()
    attention, choose = plugin.shifted_sparse_attention, plugin._target_dtype
    monkeypatch.setattr(
        plugin,
        "shifted_sparse_attention",
        lambda q, k, v, *a, **o: computed.update({q.dtype, k.dtype, v.dtype}) or attention(q, k, v, *a, **o),
    )
    monkeypatch.setattr(plugin, "_target_dtype", lambda module, query: given.add(query.dtype) or choose(module, query))
    with torch.autocast("cpu", torch.bfloat16):
        out = logits(model, tokens())
        low = logits(with_float32_copies(kind, "definition"), tokens())
    assert (given, computed) == ({torch.float32}, {torch.bfloat16})
    exact = logits(with_float32_copies(kind, "definition", torch.float64), tokens())
    assert_as_exact_as_torch("logits", out, low, exact)
    out.float().square().mean().backward()
    assert {grad.dtype for grad in gradients(model).values()} == {torch.float32}


def attention_inputs(*dtypes):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 9, 29, 8), (2, 3, 29, 8), (2, 3, 29, 8))
    return [torch.randn(s, generator=generator).to(dtype) for s, dtype in zip(shapes, dtypes, strict=True)]


# The rule of transformers' flash attention: float32 queries take the dtype of autocast, of a quantised model's compute
# or of the layer's projections.
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtypes", "model_dtype", "config", "autocast", "expected"),
    [
        ("fff", torch.bfloat16, {}, None, torch.bfloat16),
        ("ffb", torch.bfloat16, {}, None, torch.bfloat16),
        ("fff", torch.float32, {}, None, torch.float32),
        ("bbb", torch.bfloat16, {}, None, torch.bfloat16),
        ("fff", torch.float32, {}, torch.bfloat16, torch.bfloat16),
        ("fff", torch.float32, {"_pre_quantization_dtype": torch.float16}, None, torch.float16),
        ("fff", torch.float32, {"_pre_quantization_dtype": torch.float16}, torch.bfloat16, torch.bfloat16),
        ("fff", torch.float32, {"_is_quantized": True, "dtype": torch.bfloat16}, None, torch.bfloat16),
    ],
)
def test_the_dtype_is_the_one_others_choose(dtypes, model_dtype, config, autocast, expected, training):
    model = tiny().to(model_dtype).train(training)
    attention = model.model.layers[0].self_attn
    for name, value in config.items():
        setattr(attention.config, name, value)
    inputs = attention_inputs(*({"f": torch.float32, "b": torch.bfloat16}[d] for d in dtypes))
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        assert plugin._target_dtype(attention, inputs[0]) == expected  # not left to autocast's own casting
        out, _ = plugin.s2_attention(attention, *inputs, None, scaling=attention.scaling)
    assert out.dtype == expected and out.shape == (2, 29, 9, 8)

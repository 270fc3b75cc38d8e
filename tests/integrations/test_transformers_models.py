"""``attn_implementation="s2"`` in real model classes: sparse in training, ``sdpa`` in evaluation and generation."""

from __future__ import annotations

import pytest
import torch
from s2_models import GROUP, MODELS, gradients, logits, right_padding, tiny, tokens, transformers, use

from jmlr_kernels.integrations import transformers as plugin


def trained(model, ids, mask):
    """Logits where tokens stand, and the gradients of a loss of them."""
    out = logits(model, ids, attention_mask=mask)
    out = out if mask is None else out[mask.bool()]
    model.zero_grad()
    out.square().mean().backward()
    return out.detach(), gradients(model)


@pytest.mark.parametrize("lengths", [None, (29, 17)])
@pytest.mark.parametrize(("kind", "boundary"), [*((kind, "split") for kind in MODELS), ("llama", "wrap")])
def test_training_equals_the_definition(kind, lengths, boundary):
    ids = tokens()
    mask = None if lengths is None else right_padding(*lengths)
    model = tiny(kind, s2_boundary=boundary).train()
    sparse, grads = trained(model, ids, mask)
    expected, expected_grads = trained(use(model, "definition"), ids, mask)
    torch.testing.assert_close(sparse, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], msg=lambda text, name=name: f"{name}: {text}")
    dense, _ = trained(use(model, "sdpa"), ids, mask)
    assert not torch.allclose(sparse, dense, atol=1e-3)


@pytest.mark.parametrize("mask", [None, right_padding(29, 29), right_padding(29, 12), 1 - right_padding(0, 12)])
@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_equals_sdpa(kind, mask):
    ids = tokens()
    kept = torch.ones_like(ids).bool() if mask is None else mask.bool()
    model = tiny(kind).eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            ours = logits(use(model, "s2"), ids, attention_mask=mask)[kept]
            torch.testing.assert_close(ours, logits(use(model, "sdpa"), ids, attention_mask=mask)[kept])


def generated(model, ids, mask, **options):
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(("kind", "training"), [*((kind, False) for kind in MODELS), ("llama", True)])
def test_generation_equals_sdpa(kind, cache, training):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # generation pads on the left
    if cache == "static" and not getattr(tiny(kind), "_supports_static_cache", True):
        pytest.skip(f"{kind} has no static cache in transformers {transformers.__version__}")
    if training and not plugin._LAYERS_KNOW_CACHE:
        pytest.skip("this transformers does not tell its layers of a cache")
    options = {} if cache is None else {"cache_implementation": cache}
    ours = generated(tiny(kind, attention_dropout=0.0).train(training), ids, mask, **options)
    theirs = generated(tiny(kind, "sdpa").train(training), ids, mask, **options)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


def test_a_prompt_in_two_pieces_equals_the_whole():
    model = tiny().eval()
    ids = tokens(1, 20)
    cached = model(input_ids=ids[:, :11], use_cache=True)
    rest = model(input_ids=ids[:, 11:], past_key_values=cached.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([cached.logits, rest], 1), logits(use(model, "sdpa"), ids))


def test_an_own_4d_mask_is_kept_in_evaluation():
    model = tiny().eval()
    ids = tokens()
    mask = torch.ones(29, 29, dtype=torch.bool).tril()
    mask[:, 3:7] = False
    mask = (mask | torch.eye(29, dtype=torch.bool))[None, None].expand(2, 1, 29, 29)
    ours = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(ours, logits(use(model, "sdpa"), ids, attention_mask=mask))


@pytest.mark.skipif(not hasattr(transformers.PreTrainedModel, "set_attn_implementation"), reason="transformers 4.53")
def test_switched_on_in_a_loaded_model(tmp_path):
    tiny("qwen3", "sdpa", s2_group_size=None).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    ids = tokens()
    dense = logits(model, ids)
    model.set_attn_implementation("s2")
    model.config.s2_group_size = GROUP
    sparse = logits(model, ids)
    torch.testing.assert_close(sparse, logits(tiny("qwen3").train(), ids))
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(model, ids), dense)
    assert not torch.allclose(sparse, dense, atol=1e-3)


def test_right_padding_gets_no_gradient():
    model = tiny().train()
    mask = right_padding(29, 17)
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    out = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
    (out * mask[..., None]).square().sum().backward()
    assert embedded.grad[1, :17].abs().sum(-1).gt(0).all()
    assert not embedded.grad[1, 17:].any()


def test_group_size_as_a_keyword_and_in_the_saved_config(tmp_path):
    model = tiny().train()
    ids = tokens()
    wide = logits(model, ids, s2_group_size=64)
    torch.testing.assert_close(wide, logits(use(model, "sdpa"), ids))
    expected = logits(use(model, "s2"), ids)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="s2").train()
    assert loaded.config.s2_group_size == GROUP
    torch.testing.assert_close(logits(loaded, ids), expected)


def test_boundary_as_a_keyword_and_in_the_saved_config(tmp_path):
    ids = tokens()
    split, wrap = (logits(tiny(s2_boundary=boundary).train(), ids) for boundary in ("split", "wrap"))
    assert not torch.allclose(split, wrap, atol=1e-3)
    model = tiny().train()
    torch.testing.assert_close(logits(model, ids), split)
    torch.testing.assert_close(logits(model, ids, s2_boundary="wrap"), wrap)
    tiny(s2_boundary="wrap").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="s2").train()
    torch.testing.assert_close(logits(loaded, ids), wrap)

"""``torch.compile(fullgraph=True)`` of whole models: values, gradients, generation from a static cache."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from s2_models import gradients, logits, right_padding, tiny, tokens, transformers, use

LENGTHS = (13, 27)
ENDS = torch.tensor([0, 13, 40], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BATCHES = {
    "nothing": (2, {}),
    "mask": (2, {"attention_mask": right_padding(40, 17, total=40)}),
    "position_ids": (2, {"position_ids": torch.cat([POSITIONS, torch.arange(40)[None]])}),
    "cu_seq_lens": (1, {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 27, "max_length_k": 27}),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_equals_eager(what, training, backend):
    rows, options = BATCHES[what]
    ids = tokens(rows, 40)
    kept = options.get("attention_mask", torch.ones_like(ids)).bool()
    model = tiny(num_hidden_layers=1).train(training)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        with torch.set_grad_enabled(training):
            out = logits(run, ids, **options)[kept]
        if training:
            out.square().mean().backward()
        results.append((out.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("what", BATCHES)
def test_training_compiles_without_a_graph_break(what):
    compiled_equals_eager(what, True, "aot_eager")


@pytest.mark.parametrize("what", ["mask", "position_ids"])
def test_evaluation_compiles_without_a_graph_break(what):
    compiled_equals_eager(what, False, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", BATCHES)
def test_inductor(what, training):
    compiled_equals_eager(what, training, "inductor")


def test_packed_rows_of_any_length_share_a_graph():
    model = tiny(num_hidden_layers=1).train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    graphs = set()
    for lengths in ((13, 27), (9, 3, 21), (30, 30)):
        total = sum(lengths)
        options = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
        ids = tokens(1, total)
        torch.testing.assert_close(logits(compiled, ids, **options), logits(model, ids, **options))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1  # what the first length compiled served the others


@pytest.mark.skipif(not hasattr(transformers.PreTrainedModel, "set_attn_implementation"), reason="transformers 4.53")
def test_generation_from_a_compiled_static_cache():
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    compile_config = transformers.CompileConfig(fullgraph=True, backend="aot_eager")
    compile_config._compile_all_devices = True  # transformers compiles on a CPU only where it is told to
    counted = torch._dynamo.utils.counters["stats"]
    texts = []
    for options in ({"cache_implementation": "static", "compile_config": compile_config}, {}):
        model = tiny().eval() if options else use(tiny(), "sdpa").eval()
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options))
        assert counted["unique_graphs"] > 0
    assert torch.equal(*texts)

"""Packed rows in real models: by ``position_ids`` alone, by ``cu_seq_lens_q``, from the real collator; nobody waits."""

from __future__ import annotations

import pytest
import torch
from s2_models import gradients, logits, tiny, tokens, transformers, use
from torch._subclasses.fake_tensor import FakeTensorMode

from jmlr_kernels.integrations import packing
from jmlr_kernels.integrations import transformers as plugin

# Shorter than half a group, a group, several groups; and rows that hold different documents.
DOCUMENTS = ((13, 27), (1, 3, 8, 28), (40,))


def positions(rows):
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def alone(model, ids, rows):
    """The logits of every document as its own batch."""
    out = []
    for row, lengths in zip(ids, rows, strict=True):
        pieces = [logits(model, piece[None])[0] for piece in row.split(list(lengths))]
        out.append(torch.cat(pieces))
    return torch.stack(out)


def cu_seqlens(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def flash_arguments(lengths, dtype=torch.int32):
    ends = cu_seqlens(lengths, dtype)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def never_wait(monkeypatch):
    for module in (packing, plugin):
        monkeypatch.setattr(module, "may_wait", lambda *_, **__: False)


@pytest.fixture(params=["counted", "bounded"])
def counting(request, monkeypatch):
    """As on a CPU, where documents are counted, and as in training on a GPU, where that would wait."""
    if request.param == "bounded":
        never_wait(monkeypatch)
    return request.param


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [DOCUMENTS[:1], DOCUMENTS[1:2], DOCUMENTS])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
def test_restarts_in_position_ids_are_documents(kind, rows, training, counting):
    ids = tokens(len(rows), 40)
    model = tiny(kind).train(training)
    expected = alone(model, ids, rows)
    torch.testing.assert_close(logits(model, ids, position_ids=positions(rows)), expected)
    assert not torch.allclose(logits(model, ids), expected, atol=1e-3) or rows == DOCUMENTS[2:]


def test_gradients_of_packed_documents_equal_those_of_documents_alone(counting):
    ids, weights = tokens(3, 40), torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(2))
    model = tiny().train()
    (logits(model, ids, position_ids=positions(DOCUMENTS)) * weights).sum().backward()
    packed = gradients(model)
    model.zero_grad()
    (alone(model, ids, DOCUMENTS) * weights).sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(packed[name], grad, rtol=1e-4, atol=1e-4)


def test_a_cache_changes_nothing_while_training(counting):
    model = tiny().train()
    ids, rows = tokens(1, 40), DOCUMENTS[:1]
    torch.testing.assert_close(
        logits(model, ids, position_ids=positions(rows), use_cache=True), alone(model, ids, rows)
    )


@pytest.mark.skipif(not plugin._MASKS_KNOW_PACKING, reason="sdpa of this transformers knows no packing")
@pytest.mark.parametrize("use_cache", [False, True])
def test_evaluation_sees_packing_where_sdpa_does(use_cache, counting):
    model = tiny().eval()
    ids, options = tokens(3, 40), {"position_ids": positions(DOCUMENTS), "use_cache": use_cache}
    torch.testing.assert_close(logits(model, ids, **options), logits(use(model, "sdpa"), ids, **options))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", ["one row", "every row", "late start"])
def test_ordinary_positions_are_no_packing(shape, training, monkeypatch):
    if transformers.__version__ >= "5":  # asks the device itself, and tells the mask function of packing alone
        monkeypatch.setattr(plugin, "documents_of", None)
    model = tiny().train(training)
    ids = tokens(3, 29)
    given = torch.arange(29)[None].expand(1 if shape == "one row" else 3, -1) + (5 if shape == "late start" else 0)
    torch.testing.assert_close(logits(model, ids, position_ids=given), logits(model, ids), rtol=1e-5, atol=1e-4)


def test_positions_of_left_padding_are_no_packing():
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[1, :6] = 0
    given = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as generation makes them: 1, 1, ..., 0, 1, 2
    model = tiny().eval()
    options = {"position_ids": given, "attention_mask": mask}
    ours = logits(model, tokens(), **options)[mask.bool()]
    torch.testing.assert_close(ours, logits(use(model, "sdpa"), tokens(), **options)[mask.bool()])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_beside_a_mask_position_ids_are_positions_alone(training, grad):
    model = tiny().train(training)
    options = {"position_ids": positions(DOCUMENTS[:1]), "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    with torch.set_grad_enabled(grad):
        ours = logits(model, tokens(1, 40), **options)
        theirs = logits(use(model, "definition" if training else "sdpa"), tokens(1, 40), **options)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("training", [True, False])
def test_cu_seq_lens_are_documents(training, dtype):
    ids, lengths = tokens(1, 40), DOCUMENTS[1]
    model = tiny().train(training)
    options = {"position_ids": positions([lengths]), **flash_arguments(lengths, dtype)}
    torch.testing.assert_close(logits(model, ids, **options), alone(model, ids, [lengths]))
    if training:
        torch.testing.assert_close(logits(model, ids, **options), logits(use(model, "definition"), ids, **options))


@pytest.mark.parametrize("training", [True, False])
def test_cu_seq_lens_need_no_position_ids(training):
    ids, options = tokens(1, 40), flash_arguments(DOCUMENTS[1])
    model = tiny().train(training)
    packed, whole = logits(model, ids, **options), logits(model, ids)
    if not training:
        model.config.s2_group_size = 64  # the definition knows no evaluation: one group for every document
    torch.testing.assert_close(packed, logits(use(model, "definition"), ids, **options))
    assert not torch.allclose(packed, whole, atol=1e-3)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batches_of_the_flattening_collator(training, flash):
    documents = [tokens(1, length, seed=length)[0] for length in (13, 3, 24)]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
    batch = collator([{"input_ids": document.tolist()} for document in documents])
    assert batch["input_ids"].shape == (1, 40) and "attention_mask" not in batch and ("cu_seq_lens_q" in batch) == flash
    model = tiny().train(training)
    out = model(**batch, use_cache=False)
    separate = [logits(model, document[None])[0] for document in documents]
    torch.testing.assert_close(out.logits[0], torch.cat(separate))
    losses = [
        torch.nn.functional.cross_entropy(row[:-1], document[1:], reduction="sum")
        for row, document in zip(separate, documents, strict=True)
    ]
    torch.testing.assert_close(out.loss, sum(losses) / (40 - 3))


def test_more_documents_than_there_is_room_for_raise(monkeypatch):
    never_wait(monkeypatch)
    ids, rows = tokens(1, 200), [(2,) * 100]
    with pytest.raises(RuntimeError, match="set config.s2_max_documents, or pass cu_seq_lens_q"):
        logits(tiny(max_position_embeddings=256).train(), ids, position_ids=positions(rows))
    roomy = tiny(max_position_embeddings=256, s2_max_documents=100).train()
    torch.testing.assert_close(logits(roomy, ids, position_ids=positions(rows)), alone(roomy, ids, rows))


@pytest.mark.parametrize("most", [True, 0, 2.0, 1])
def test_room_that_is_no_number_raises(most):
    with pytest.raises(ValueError, match="s2_max_documents="):
        logits(tiny(s2_max_documents=most).train(), tokens(2, 40), position_ids=positions(DOCUMENTS[:2]))


def test_documents_from_their_beginnings(counting):
    begins = packing.restarts(positions(DOCUMENTS))
    ends = packing.documents_of(begins, training=True)
    assert ends.dtype == torch.int32
    assert ends.unique().tolist() == [0, 13, 40, 41, 44, 52, 80, 120]
    assert ends.shape == ((8,) if counting == "counted" else (packing.FEWEST_DOCUMENTS + 1,))
    assert (ends.diff() >= 0).all() and ends[-1] == 120


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("given", ["position_ids", "attention_mask", "cu_seq_lens_q"])
def test_training_never_reads_the_device(given, use_cache, checkpointing, monkeypatch):
    """A fake tensor has no values: whatever asks for one raises."""
    never_wait(monkeypatch)
    with FakeTensorMode():
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        ids = torch.zeros(1, 40, dtype=torch.int64)
        options = {given: torch.zeros(5, dtype=torch.int32) if given == "cu_seq_lens_q" else torch.ones_like(ids)}
        out = logits(model, ids, use_cache=use_cache, **options)
        assert out.shape == (1, 40, 64)
        out.sum().backward()

"""Context extension: documents without leaks, exact perplexity, exact FLOPs, and mistakes told with their line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from jmlr.cli import main
from jmlr.config import recipes, task_of
from jmlr.data.corpus import Passage, load_corpus
from jmlr.errors import UserError
from jmlr.extend.config import ExtendConfig, ModelConfig, load
from jmlr.extend.documents import join, load_documents, overlap
from jmlr.extend.perplexity import evaluate, token_losses
from jmlr.extend.table import comparisons, format_result
from jmlr.extend.training import Job, WindowTrainer, attention_flops, interpolate_positions, prepare
from jmlr.extend.windows import PackedWindows, build_subword_tokenizer, encode, held_out_windows
from jmlr.settings import write
from jmlr_kernels.integrations.transformers import register
from jmlr_kernels.shifted_attention.reference import allowed

TINY = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 48}


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    register()
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=8,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(shape)


def tiny_config(**extend: Any) -> ExtendConfig:
    config = ExtendConfig(device="cpu", model=ModelConfig(context_length=8, **TINY))
    settings = {"target_length": 32, "steps": 4, "batch_size": 2, "save_steps": 2, "lora_rank": 2, **extend}
    return replace(
        config,
        extend=replace(config.extend, **settings),
        optimizer=replace(config.optimizer, log_steps=1, warmup_steps=0, logits_chunk=7),
        evaluate=replace(config.evaluate, lengths=(8, 32), bootstrap=100),
    )


def tokens(*sizes: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(61, (size,), generator=draw, dtype=torch.int32) for size in sizes]


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("task: extend\nextend:\n  target_length: 128\n", 3, "do not extend the base's 256"),
        ("task: extend\nmodel: {context_length: 2048}\n", 2, "do not extend the base's 2048"),
        ("task: extend\n\nextend:\n  group_size: 4096\n", 4, "a group of 4096 tokens does not fit"),
        ("task: extend\nevaluate:\n  lengths: [100, 1024]\n", 3, "100 does not divide the target length 1024"),
        ("task: extend\nevaluate:\n  lengths: [256, 512]\n", 3, "do not rise to the target length"),
        ("task: extend\nextend: {variants: [split, split]}\n", 2, "named twice"),
        ("task: extend\nname: a/b\n", 2, "cannot name a directory"),
        ("task: extend\ndevice: gpu\n", 2, "'gpu' is not a device"),
        ("task: extend\noptimizer: {betas: [0.9, 1.0]}\n", 2, "a beta lies outside"),
        ("task: extend\nextend: {variants: [split, rap]}\n", 2, "did you mean wrap?"),
        ("task: extend\nmodel: {heads: 3}\n", 2, "whole, even head dimension"),
        ("task: extend\nextend:\n  rate: fast\n", 3, "write a number"),
        ("task: extend\nextend:\n  stepz: 3\n", 3, "did you mean extend.steps?"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}:{line}: ") and words.lower() in str(caught.value).lower()


def test_settings_are_read_back_as_written(tmp_path: Path) -> None:
    config = tiny_config(variants=("wrap", "full"))
    write(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_recipes_say_what_they_are_for(tmp_path: Path) -> None:
    tasks = {name: task_of(name) for name in recipes()}
    assert tasks["longlora"] == tasks["longlora-smollm2"] == "extend" and tasks["quickstart"] == "joint"
    assert load("longlora-smollm2").extend.group == 8192
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: x\ntask: extent\n")
    with pytest.raises(UserError, match=r"wrong.yaml:2: task is 'extent'. Did you mean extend\?"):
        task_of(wrong)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max-steps", "3"], "--max-steps: a recipe that extends a context does not stop in between"),
        (["--set", "extend.target_length=100"], "do not extend the base's 256"),
        (["--set", "data.corpora=[nowhere]"], "nowhere: there is no such file"),
        (["--set", "data.document_words=10000000", "--set", "data.held_out=0.1"], "leaves none to evaluate on"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--recipe", "longlora", "--runs", str(tmp_path / "runs"), *words]) == 2
    out, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "runs").exists()


def test_a_run_that_extended_a_context_has_nothing_to_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(ExtendConfig(), tmp_path / "config.yaml")
    assert main(["ask", "What rises?", "--run", str(tmp_path)]) == 2
    assert "this run extended a context" in capsys.readouterr().err


# --------------------------------------------------------------------------- documents


def passage(identifier: str, title: str, text: str) -> Passage:
    return Passage(identifier, title, text, source="press")


def test_sections_are_joined_in_order_and_never_across_books() -> None:
    passages = [
        passage("a-m1-0", "One — Anatomy", "a b c d e f g h i j"),
        passage("a-m1-1", "One — Anatomy", "c d e f g h i j k l m"),  # repeats eight words
        passage("a-m2-0", "Two — Anatomy", "n o p"),
        passage("a-m3-0", "Three — Anatomy", "q r"),
        passage("b-m1-0", "One — Biology", "s t"),
    ]
    documents = join(passages, 12)
    assert [(d.id, d.book, d.text) for d in documents] == [
        ("a-m1-0", "Anatomy", "a b c d e f g h i j k l m\n\nn o p\n\nq r"),
        ("b-m1-0", "Biology", "s t"),
    ]
    assert [d.passages for d in join(passages, 4)] == [("a-m1-0", "a-m1-1"), ("a-m2-0", "a-m3-0"), ("b-m1-0",)]


def test_overlap_is_the_longest_shared_end() -> None:
    words = [str(n) for n in range(40)]
    assert overlap(" ".join(words[:30]), " ".join(words[10:])) == 20
    assert overlap(" ".join(words[:30]), " ".join(words[25:])) == 0  # five words may be chance
    assert overlap("x " * 9, "x " * 12) == 9


def test_nothing_is_both_trained_and_evaluated_on() -> None:
    config = load("longlora").data
    split = load_documents(config)
    train = {name for document in split.train for name in document.passages}
    held_out = {name for document in split.held_out for name in document.passages}
    everything = [p.id for p in load_corpus(config.corpora)]
    assert not train & held_out and sorted(train | held_out) == sorted(everything)
    assert {d.book for d in split.held_out} == {d.book for d in split.train}
    sections = [
        {name.rpartition("-")[0] for name in names if name.startswith("openstax")} for names in (train, held_out)
    ]
    assert not sections[0] & sections[1], "one section in both"
    assert split == load_documents(config)


def test_no_line_is_read_twice() -> None:
    """The embedded OpenStax passages overlap by twenty words; in a document none may."""
    split = load_documents(replace(load("longlora").data, corpora=("embedded:openstax",)))
    for document in [*split.train, *split.held_out]:
        words = document.text.split()
        runs = [tuple(words[at : at + 16]) for at in range(len(words) - 15)]
        assert len(runs) - len(set(runs)) <= 0.01 * len(runs), document.id


def test_every_word_has_an_encoding() -> None:
    tokenizer = build_subword_tokenizer(["the heart pumps blood", "blood is red"], 300)
    (ids,) = encode(tokenizer, ["Zwölffingerdarm → 7"])
    assert tokenizer.decode(ids[1:]).strip() == "Zwölffingerdarm → 7" and ids[0] == tokenizer.bos_token_id


# --------------------------------------------------------------------------- windows


def test_packed_windows_depend_on_the_seed_and_the_place_alone() -> None:
    documents = tokens(30, 17, 50)
    windows = PackedWindows(documents, 8, 40, seed=3)
    in_order = [windows[n] for n in range(40)]
    again = PackedWindows(documents, 8, 40, seed=3)
    for n in (39, 0, 25, 12):
        assert torch.equal(again[n]["input_ids"], in_order[n]["input_ids"])
    assert all(torch.equal(row["input_ids"][1:], row["labels"][:-1]) for row in in_order)
    # 97 tokens hold 12 windows: an epoch trains on each of their tokens once.
    epoch = torch.cat([row["input_ids"] for row in in_order[:12]]).tolist()
    whole = sorted(torch.cat(documents).tolist())
    assert len(epoch) == 96 and all(epoch.count(token) <= whole.count(token) for token in set(epoch))
    assert not torch.equal(in_order[0]["input_ids"], in_order[12]["input_ids"])


@pytest.mark.parametrize("size", [33, 64, 65, 100])
def test_every_length_predicts_the_same_tokens(size: int) -> None:
    (document,) = tokens(size)
    labels = [held_out_windows(document, length, 32)[1].flatten() for length in (8, 16, 32)]
    assert all(torch.equal(one, document[1 : 1 + (size - 1) // 32 * 32].long()) for one in labels)


# --------------------------------------------------------------------------- losses and perplexity


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_losses_in_chunks_are_the_plain_ones(chunk: int) -> None:
    model, batch = tiny_model(), torch.stack(tokens(13, 13)).long()
    inputs, labels = batch[:, :-1], batch[:, 1:]
    plain = functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten(), reduction="none")
    plain.mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = token_losses(model, inputs, labels, chunk)
    losses.mean().backward()
    torch.testing.assert_close(losses.flatten(), plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_perplexity_is_that_of_a_plain_loop() -> None:
    model = tiny_model()
    documents = [("one", tokens(70)[0]), ("two", tokens(33)[0])]
    found = evaluate(model, documents, (8, 32), batch_tokens=48, chunk=7, device=torch.device("cpu"))
    model.eval()
    for one in found:
        blocks, names, quarters = [], [], [[], [], [], []]
        for name, ids in documents:
            for block in range((len(ids) - 1) // 32):
                nats = []
                for at in range(32 * block, 32 * block + 32):
                    start = at // one.length * one.length
                    with torch.no_grad():
                        logits = model(ids[None, start : at + 1].long()).logits[0, -1]
                    nats.append(-logits.log_softmax(-1)[ids[at + 1].long()].item())
                    quarters[(at - start) * 4 // one.length].append(nats[-1])
                blocks.append(sum(nats) / 32)
                names.append(name)
        assert one.documents == names == ["one", "one", "two"]
        torch.testing.assert_close(torch.tensor(one.nats), torch.tensor(blocks))
        torch.testing.assert_close(torch.tensor(one.quarters), torch.tensor([sum(q) / len(q) for q in quarters]))
        expected = torch.tensor(blocks).mean().exp().item()
        assert one.interval(0.95, 100).mean == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------- the extension


def test_interpolated_positions_are_divided() -> None:
    model, states = tiny_model(), torch.zeros(1, 8, 32)
    before = model.model.rotary_emb(states, torch.arange(8)[None])
    interpolate_positions(model, 32, 8)
    after = model.model.rotary_emb(states, 4 * torch.arange(8)[None])
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)
    assert model.config.max_position_embeddings == 32
    with pytest.raises(UserError, match="scaled already"):
        interpolate_positions(model, 64, 32)


@pytest.mark.parametrize("variant", ["full", "split", "wrap"])
def test_variants_differ_in_attention_alone(variant: Any) -> None:
    torch.manual_seed(0)
    model = prepare(tiny_model(), tiny_config(), variant)
    torch.manual_seed(0)
    other = prepare(tiny_model(), tiny_config(), "full")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    causal = model.get_base_model()
    assert causal.config._attn_implementation == ("sdpa" if variant == "full" else "s2")
    assert (causal.config.s2_group_size, causal.config.s2_boundary) == (8, "wrap" if variant == "wrap" else "split")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if "lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    others = [name for name in trained if "lora_" not in name]
    assert len(others) == 6 and all("norm" in name or "embed_tokens" in name for name in others)


@pytest.mark.parametrize("length", [32, 30])
def test_attention_flops_count_every_pair(length: int) -> None:
    shape, dim = tiny_model().config, 8
    for variant in ("split", "wrap"):
        pairs = int(allowed(length, 8, 4, variant).sum())
        assert attention_flops(shape, length, 5, variant, 8) == 14 * dim * pairs * 2 * 5  # type: ignore[arg-type]
    full = 4 * length * (length + 1) // 2
    assert attention_flops(shape, length, 5, "full", 8) == 14 * dim * full * 2 * 5


def test_training_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    config = tiny_config()
    job = Job(steps=4, batch_size=2, rate=1e-2, save_steps=2)

    def trainer(directory: Path, report: Any = None) -> WindowTrainer:
        torch.manual_seed(0)
        model = tiny_model()
        interpolate_positions(model, 32, 8)
        windows = PackedWindows(tokens(90, 70), 32, 8, seed=0)
        return WindowTrainer(prepare(model, config, "split"), config, job, windows, directory, report)

    def killed(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", killed).train()
    resumed = trainer(tmp_path / "killed")
    start = [value.clone() for _, value in resumed._trained()]
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-2"))
    for (name, one), (_, other), before in zip(whole._trained(), resumed._trained(), start, strict=True):
        assert torch.equal(one, other), name
        assert not torch.equal(one, before) or "lora_A" in name, f"{name} was not trained"


def test_the_table_says_what_was_measured() -> None:
    def row(name: str, tokens: int, nats: float) -> dict[str, Any]:
        one = {"length": 32, "nats": [nats, nats + 0.1], "documents": ["a", "b"], "mean": 9.5, "low": 9.0, "high": 10.0}
        return {
            "name": name,
            "tokens": tokens,
            "seconds": 61.0,
            "training_loss": 1.5 if tokens else None,
            "attention_flops": 5_000_000_000,
            "perplexity": [one],
        }

    config = tiny_config()
    rows = [row("untouched", 0, 3.0), row("full", 4096, 2.0), row("split", 4096, 2.25)]
    result = {
        "config": json.loads(json.dumps({"extend": vars(config.extend), "evaluate": vars(config.evaluate)})),
        "documents": {"held_out": ["a", "b"]},
        "rows": rows,
        "comparisons": comparisons(rows, config.evaluate),
    }
    lines = format_result(result).splitlines()
    assert lines[0].split("  ")[0] == "model" and "perplexity at 32" in lines[0]
    assert lines[2].split()[-3:] == ["-", "-", "-"]
    assert "9.50 [9.00, 10.00]  4,096           1:01  5e+09" in lines[4]
    assert lines[-1] == "S2, split minus full attention at 32 tokens: +0.2500 nats [+0.2500, +0.2500]"

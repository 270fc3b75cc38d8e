"""Recipes: what is read back equals what was written, and every mistake is told with its line and a remedy."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jmlr.config import JointConfig, RunConfig, TrainConfig, load, recipes, save, task_of
from jmlr.errors import UserError
from jmlr.extend.config import load as load_extension
from jmlr.settings import differences


def recipe(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load(recipe(tmp_path, "")) == RunConfig()
    assert load(recipe(tmp_path, "# nothing\ntrain:\n")) == RunConfig()


def test_settings_and_overrides(tmp_path: Path) -> None:
    file = recipe(
        tmp_path, "name: small\ntrain: {steps: 20, llm_rate: 1e-3, betas: [0.8, 0.9]}\ndata: {kinds: [gene]}\n"
    )
    config = load(file, ["train.steps=7", "llm.path=null", "joint.exclude_own_rationale=false", "data.corpora=[a, b]"])
    assert (config.name, config.train.steps, config.train.llm_rate, config.train.betas) == (
        "small",
        7,
        1e-3,
        (0.8, 0.9),
    )
    assert config.joint.exclude_own_rationale is False and config.llm.path is None
    assert config.data.kinds == ("gene",) and config.data.corpora == ("a", "b")
    assert load(file, ["train.steps=7", "train.steps=8"]).train.steps == 8


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(name="ünïcode: #1", seed=3, budget_minutes=1.5),
        RunConfig(name="no", train=TrainConfig(llm_rate=1e-5, eps=1e-12, betas=(0.0, 0.5))),
        RunConfig(joint=JointConfig(preset="paper", candidates=30, sampled=10, context=7)),
    ],
)
def test_what_is_saved_loads_back_equal(tmp_path: Path, config: RunConfig) -> None:
    file = tmp_path / "run" / "config.yaml"
    save(config, file)
    assert load(file) == config
    assert [entry.name for entry in file.parent.iterdir()] == ["config.yaml"]
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert list(written) == [entry.name for entry in fields(RunConfig)]  # every setting, none left to a default


@settings(max_examples=50, deadline=None)
@given(rate=st.floats(0, 1e6), name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 :#_'-]{0,12}", fullmatch=True))
def test_numbers_and_texts_survive_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, rate: float, name: str
) -> None:
    config = replace(RunConfig(), name=name, train=replace(TrainConfig(), llm_rate=rate))
    file = tmp_path_factory.mktemp("run") / "config.yaml"
    save(config, file)
    assert load(file) == config


def test_presets_fix_the_published_counts(tmp_path: Path) -> None:
    joint = load(recipe(tmp_path, "joint: {preset: paper}")).joint
    assert (joint.candidates, joint.sampled, joint.context) == (30, 10, 7)
    joint = load(recipe(tmp_path, ""), ["joint.preset=released-code"]).joint
    assert (joint.candidates, joint.sampled, joint.context) == (20, 10, 5)
    with pytest.raises(UserError, match="recipe.yaml:3: joint.context: the preset 'paper' has context 7, not 5"):
        load(recipe(tmp_path, "joint:\n  preset: paper\n  context: 5\n"))


@pytest.mark.parametrize(
    ("text", "line", "message", "remedy"),
    [
        ("train:\n  stepz: 3\n", 2, "no setting train.stepz", "train.steps?"),
        ("seed: 1\ntrane:\n  steps: 3\n", 2, "no setting trane", "train?"),
        ("joint:\n  qqqq: 1\n", 2, "no setting joint.qqqq", "the settings here are preset,"),
        ("train:\n  steps: many\n", 2, "train.steps is 'many'", "a whole number"),
        ("train:\n  steps: 2.5\n", 2, "train.steps is '2.5'", "a whole number"),
        ("train:\n  steps: '3'\n", 2, "train.steps is '3'", "a whole number"),
        ("train:\n  steps: true\n", 2, "train.steps is 'true'", "a whole number"),
        ("train:\n  steps:\n", 2, "train.steps is empty", "a whole number"),
        ("train:\n\n  steps: 0\n", 3, "train.steps is 0", "at least 1"),
        ("train:\n  llm_rate: fast\n", 2, "train.llm_rate is 'fast'", "a number"),
        ("train:\n  llm_rate: .nan\n", 2, "train.llm_rate is '.nan'", "a number"),
        ("train:\n  warmup_ratio: 1.5\n", 2, "train.warmup_ratio is 1.5", "at least 0 and at most 1"),
        ("joint:\n  average_decay: 1\n", 2, "joint.average_decay is 1", "less than 1"),
        ("train:\n  betas: [0.9]\n", 2, "train.betas has 1 values", "give 2"),
        ("train:\n  betas: [0.9, 1.0]\n", 2, "a beta lies outside", "[0.9, 0.95]"),
        ("train:\n  steps: [1]\n", 2, "takes one value", "a whole number"),
        ("train: 3\n", 1, "train is a section", "indent"),
        ("joint:\n  train_retriever: yes\n", 2, "joint.train_retriever is 'yes'", "true or false"),
        ("name: 3\n", 1, "name is '3'", "in quotes"),
        ("name: null\n", 1, "name is 'null'", "in quotes"),
        ("name: a/b\n", 1, "cannot name a directory", "letters"),
        ("device: gpu\n", 1, "'gpu' is not a device", "CUDA_VISIBLE_DEVICES"),
        ("device: cuda:1\n", 1, "'cuda:1' is not a device", "CUDA_VISIBLE_DEVICES"),
        ("llm:\n  attention: sdp\n", 2, "llm.attention is 'sdp'", "did you mean sdpa?"),
        ("data:\n  kinds: gene\n", 2, "data.kinds is not a list", "data.kinds: [a, b]"),
        ("data:\n  corpora: []\n", 2, "the list is empty", "at least one"),
        ("evaluate:\n  systems: [joint, rga]\n", 2, "evaluate.systems[1] is 'rga'", "did you mean rag?"),
        ("evaluate:\n  systems: [rag, rag]\n", 2, "named twice", "once"),
        ("seed: 1\nseed: 2\n", 2, "seed is set twice", "keep one"),
        ("joint:\n  candidates: 3\n  sampled: 4\n", 3, "sampled 4 is more than the candidates 3", "joint.candidates"),
        ("joint:\n  candidates: 1\n", 2, "is more than the candidates 1", "joint.candidates"),
        ("llm:\n  hidden_size: 128\n  heads: 3\n", 3, "not a multiple of heads 3", "divides"),
        ("retriever:\n  hidden_size: 7919\n", 2, "hidden_size 7919 is not a multiple", "divides"),
        ("llm:\n  kv_heads: 3\n  heads: 4\n", 2, "not a multiple of kv_heads 3", "divides"),
        ("llm: {hidden_size: 12, heads: 4}\n", 1, "head dimension 3 is odd", "rotary|heads"),
        ("llm:\n  path: a\n  package: b\n", 3, "path and package are both set", "null"),
        ("name: [unclosed\n", 2, "not valid YAML", "indentation"),
        ("name: b\n\tc: d\n", 2, "not valid YAML", "indentation"),
        ("- a\n", 1, "does not hold settings", "key: value"),
        ("just text\n", 1, "does not hold settings", "key: value"),
        ("name: \x01\n", 1, "characters that YAML does not allow", "plain text"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, text: str, line: int, message: str, remedy: str) -> None:
    file = recipe(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(file)
    assert caught.value.file == str(file)
    assert caught.value.line == line
    assert message in caught.value.message
    assert any(part in caught.value.remedy for part in remedy.split("|"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=1", "no setting train.stepz. Did you mean train.steps?"),
        ("steps", "not of the form KEY=VALUE"),
        ("=3", "not of the form KEY=VALUE"),
        ("train=3", "train is a section"),
        ("seed.x=3", "seed is not a section"),
        ("train.steps=x", "train.steps is 'x'"),
        ("train.steps=", "train.steps is 'null'"),
        ("train.betas=[1", "not valid YAML"),
        ("joint.sampled=9999", "sampled 9999 is more than the candidates"),
    ],
)
def test_mistakes_in_an_override(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(recipe(tmp_path, "seed: 1\n"), [override])
    assert caught.value.file == f"--set {override}"
    assert message in str(caught.value)


def test_an_unknown_recipe_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quickstart"):
        load("quikstart")
    with pytest.raises(UserError, match="directory"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match="UTF-8"):
        load(tmp_path / "latin.yaml")


def test_every_recipe_of_the_package_loads_and_is_described() -> None:
    found = recipes()
    assert "quickstart" in found
    for name, description in found.items():
        assert description, f"the first line of {name}.yaml is not a comment"
        read = {"joint": load, "extend": load_extension}[task_of(name)]
        assert read(name).name == name


def test_differences_names_the_settings() -> None:
    other = replace(RunConfig(), seed=2, train=replace(TrainConfig(), steps=5))
    assert differences(RunConfig(), other) == [("seed", 0, 2), ("train.steps", TrainConfig().steps, 5)]
    assert differences(other, other) == []


def test_settings_are_frozen_to_the_last_list() -> None:
    def leaves(value: Any) -> list[Any]:
        if is_dataclass(value) and not isinstance(value, type):
            return [leaf for entry in fields(value) for leaf in leaves(getattr(value, entry.name))]
        return [value]

    assert not any(isinstance(leaf, list | dict | set) for leaf in leaves(RunConfig()))
    assert hash(RunConfig()) == hash(RunConfig())

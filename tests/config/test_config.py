"""Configuration: what a file and overrides become, and what each mistake says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from specs_fast import config as config_module
from specs_fast import config_sections
from specs_fast.config import (
    ConfigError,
    DPOConfig,
    EvalConfig,
    GRPOConfig,
    LabConfig,
    OptimConfig,
    SpecsConfig,
    config_hash,
    load_config,
    to_yaml,
    with_sources,
)
from specs_fast.structured import FieldError, differing_keys, from_data, to_data

MINIMAL: dict[str, Any] = {
    "output_dir": "runs/x",
    "lab": {},
    "zero": {"steps": 10, "optim": {"lr": 1e-4}},
    "coldstart": {"optim": {"lr": 3e-4}},
    "final": {"steps": 20, "optim": {"lr": 1e-4}},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return path


def error_of(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(recipe, list(overrides))
    return str(raised.value)


def test_a_minimal_file_gets_the_documented_defaults(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.zero == GRPOConfig(steps=10, optim=OptimConfig(lr=1e-4))
    assert config.coldstart == DPOConfig(optim=OptimConfig(lr=3e-4))
    assert config.lab == LabConfig()
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("format", 1.0), ("accuracy", 1.0)]
    assert (config.zero.epsilon, config.zero.epsilon_high, config.zero.beta) == (0.2, 0.28, 0.0)


def test_overrides_change_any_depth_lists_and_whole_sections(recipe: Path) -> None:
    config = load_config(
        recipe,
        [
            "zero.optim.lr=2e-5",
            "zero.optim.betas=[0.8, 0.9]",
            "eval.samples=8",
            "eval.pass_k=[1, 8]",
            "rewards=[{name: accuracy}]",
            "rewards.0.weight=3",
            "lab.seed=7",
            "pairs.corruptions={shift: 2}",
            "zero.epsilon_high=null",
        ],
    )
    assert config.zero.optim.lr == 2e-5
    assert config.zero.optim.betas == (0.8, 0.9)
    assert config.eval.pass_k == (1, 8)
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("accuracy", 3.0)]
    assert config.lab == LabConfig(seed=7)
    assert config.pairs.corruptions == {"shift": 2.0}
    assert config.zero.epsilon_high is None


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "1e-04"])
def test_exponents_without_a_dot_are_numbers(recipe: Path, text: str) -> None:
    assert load_config(recipe, [f"zero.optim.lr={text}"]).zero.optim.lr == 1e-4


def test_yaml_round_trip_gives_an_equal_configuration(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["zero.optim.lr=1e-6", "eval.limit=3"])
    copy = tmp_path / "config.yaml"
    copy.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("zero.optim.lrr=1", ["zero.optim.lrr", "unknown key", "'lr'", "max_grad_norm"]),
        ("outptu_dir=x", ["outptu_dir", "unknown key", "'output_dir'"]),
        ("pairs.corruptions={shfit: 1}", ["pairs.corruptions", "'shfit'", "shift"]),
        ("zero.steps=ten", ["zero.steps", "'ten'", "a text", "a whole number"]),
        ("zero.steps=2.5", ["zero.steps", "2.5", "a whole number"]),
        ("zero.steps=true", ["zero.steps", "True", "a whole number"]),
        ("zero.optim.lr=fast", ["zero.optim.lr", "'fast'", "a number"]),
        ("zero.optim.lr=.inf", ["zero.optim.lr", "inf", "finite"]),
        ("zero.optim.lr=.nan", ["zero.optim.lr", "nan", "finite"]),
        ("zero.optim.betas=[0.9]", ["zero.optim.betas", "[0.9]", "a list of 2"]),
        ("eval.greedy=1", ["eval.greedy", "1", "true or false"]),
        ("eval.splits=[a]", ["eval.splits", "a mapping from text"]),
        ("zero=5", ["zero", "a mapping with keys steps", "a whole number"]),
        ("zero.optim=null", ["zero.optim", "found nothing"]),
        ("zero.sampling.temperature=0", ["zero.sampling.temperature", "above 0", "greedy"]),
        ("zero.sampling.top_p=1.5", ["zero.sampling.top_p", "1.5"]),
        ("zero.epsilon=0", ["zero.epsilon", "above 0"]),
        ("zero.beta=-1", ["zero.beta", "-1"]),
        ("zero.group_size=1", ["zero.group_size", "at least 2"]),
        ("zero.minibatches=17", ["zero.minibatches", "17", "prompts_per_step (16)"]),
        ("zero.aggregation=dapoo", ["zero.aggregation", "'dapoo'", "did you mean 'dapo'", "bnpo"]),
        ("coldstart.beta=0", ["coldstart.beta", "above 0"]),
        ("coldstart.label_smoothing=0.5", ["coldstart.label_smoothing", "below 0.5"]),
        ("coldstart.batch_size=0", ["coldstart.batch_size", "at least 1"]),
        ("pairs.samples_per_prompt=0", ["pairs.samples_per_prompt", "at least 1"]),
        ("pairs.corruptions={shift: 0}", ["pairs.corruptions", "sum to more than 0"]),
        ("pairs.corruptions={shift: -1}", ["pairs.corruptions.shift", "-1"]),
        ("pairs.judge=ask", ["pairs.judge", "'ask'", "package.module:function"]),
        ("eval.samples=0", ["eval.samples", "at least 1"]),
        ("eval.pass_k=[1, 9]", ["eval.pass_k", "samples (4)"]),
        ("eval.pass_k=[]", ["eval.pass_k", "one or more"]),
        ("data.filter_overlong=true", ["data.filter_overlong", "max_prompt_tokens"]),
        ("rewards=[]", ["rewards", "at least one"]),
        ("rewards=[{name: acuracy}]", ["rewards.0.name", "'acuracy'", "accuracy"]),
        ("rewards=[{name: format}, {name: format}]", ["rewards", "once"]),
        ("rewards=[{name: format, weight: 0}]", ["rewards", "not 0"]),
        ("model.device=gpu", ["model.device", "'gpu'", "cuda"]),
        ("model.dtype=float16", ["model.dtype", "'float16'", "bfloat16"]),
        ("model.packing=shred", ["model.packing", "did you mean 'shared'"]),
        ("threads=0", ["threads", "at least 1"]),
        ("method=rise", ["method", "'rise'", "specs"]),
        ("model.path=some/model", ["model.path", "some/model", "lab"]),
        ("eval.splits={id: a.jsonl}", ["eval.splits", "lab"]),
        ("lab=null", ["model.path", "missing", "lab"]),
        ("zero.steps.more=1", ["zero.steps", "10"]),
        ("rewards.4.weight=1", ["'rewards.4.weight=1'", "not an index"]),
        ("zero.optim.lr", ["key=value"]),
        ("zero.optim.lr=[1", ["not valid YAML"]),
    ],
)
def test_a_bad_override_says_key_value_and_way_out(recipe: Path, override: str, parts: list[str]) -> None:
    if override == "rewards.4.weight=1":
        message = error_of(recipe, "rewards=[{name: format}]", override)
    else:
        message = error_of(recipe, override)
    assert override in message or "recipe.yaml" in message
    for part in parts:
        assert part in message, message


def test_a_mistake_in_the_file_names_the_file_and_not_an_override(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "sede: 3\n", encoding="utf-8")
    message = error_of(recipe, "eval.samples=8")
    assert message.startswith(f"{recipe}: sede: unknown key, did you mean 'seed'?")
    assert "override" not in message


@pytest.mark.parametrize(("section", "key"), [("zero", "steps"), ("coldstart", "optim")])
def test_a_missing_required_key_is_named(recipe: Path, section: str, key: str) -> None:
    data = yaml.safe_load(recipe.read_text())
    del data[section][key]
    recipe.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert f"{section}.{key}: missing" in error_of(recipe)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[1, 2]", "a list"),
        ("", "nothing"),
        ("a: [", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
    ],
)
def test_a_file_that_is_not_one_mapping_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=part) as raised:
        load_config(path)
    assert str(path) in str(raised.value)


def test_an_absent_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_ranges_hold_without_a_file_too() -> None:
    with pytest.raises(FieldError, match="group_size"):
        GRPOConfig(steps=1, optim=OptimConfig(lr=1.0), group_size=1)
    with pytest.raises(FieldError, match="pass_k"):
        EvalConfig(samples=2, pass_k=(3,))


def test_hash_follows_what_is_trained_and_nothing_else(recipe: Path) -> None:
    config = load_config(recipe)
    same = ["output_dir=elsewhere", "name=other", "threads=3", "eval.samples=16"]
    assert config_hash(load_config(recipe, same)) == config_hash(config)
    for override in ("seed=1", "zero.optim.lr=2e-4", "lab.seed=1", "model.packing=none", "rewards=[{name: accuracy}]"):
        assert config_hash(load_config(recipe, [override])) != config_hash(config), override


def test_hash_ignores_where_the_lab_was_built_but_not_which_model_a_user_names(recipe: Path) -> None:
    config = load_config(recipe)
    built = with_sources(config, model_path="/a/base", train="/a/train.jsonl", splits={"id": "/a/id.jsonl"})
    assert built.model.path == "/a/base"
    assert built.eval.splits == {"id": "/a/id.jsonl"}
    assert config_hash(built) == config_hash(config)
    own = ["lab=null", "data.train=t.jsonl"]
    first, second = (load_config(recipe, [*own, f"model.path={path}"]) for path in ("m1", "m2"))
    assert config_hash(first) != config_hash(second)


def test_differing_keys_name_leaf_and_both_values() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    new = {"a": {"b": 2, "c": [1, 2]}, "e": 3}
    assert differing_keys(old, new) == ["a.b: 1 -> 2", "d: None -> not set", "e: not set -> 3"]
    assert differing_keys(old, old) == []


def test_every_field_is_documented() -> None:
    modules = (config_module, config_sections)
    classes = {value for module in modules for value in vars(module).values() if dataclasses.is_dataclass(value)}
    assert SpecsConfig in classes and len(classes) == 11
    for cls in classes:
        for field in dataclasses.fields(cls):
            assert f"\n    {field.name}: " in (cls.__doc__ or ""), f"{cls.__name__}.{field.name} is not documented"


def test_unsupported_field_types_are_a_programming_error() -> None:
    @dataclasses.dataclass(frozen=True)
    class Odd:
        value: complex

    with pytest.raises(TypeError, match="complex"):
        from_data(Odd, {"value": 1}, source=lambda _: "here")


def test_to_data_is_plain(recipe: Path) -> None:
    data = to_data(load_config(recipe))
    assert data["eval"]["pass_k"] == [1, 4]
    assert yaml.safe_load(yaml.safe_dump(data)) == data


@pytest.mark.parametrize("key", ["beta=0.3", "label_smoothing=0.1", "nll_weight=0.5"])
def test_the_sft_cold_start_refuses_settings_of_dpo(key: str) -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "lab-specs.yaml"
    assert load_config(recipe, ["coldstart.kind=sft"]).coldstart.kind == "sft"
    with pytest.raises(ConfigError, match=rf"coldstart\.{key.partition('=')[0]}.*kind is sft"):
        load_config(recipe, ["coldstart.kind=sft", f"coldstart.{key}"])

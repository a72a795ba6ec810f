"""Loading: what comes back, and errors that name the missing file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import IMAGE, make_model, mixed_trees
from transformers.modeling_layers import GradientCheckpointingLayer

from specs_fast.models import image_token_id, load_model, load_processor, score


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "qwen3_vl"
    make_model("qwen3_vl").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_a_saved_model_comes_back_in_eval_mode_with_the_same_scores(saved: Path) -> None:
    model, trees = load_model(saved), mixed_trees("qwen3_vl")
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert model.dtype == torch.float32 and not model.training
    assert image_token_id(model) == IMAGE
    assert torch.equal(
        score(model, trees, packing="none").logp, score(make_model("qwen3_vl"), trees, packing="none").logp
    )


def test_a_language_model_comes_back_as_one(tmp_path: Path) -> None:
    make_model("qwen3").save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.bfloat16
    assert image_token_id(model) is None
    with pytest.raises(ValueError, match="freeze_vision: Qwen3ForCausalLM .* has no vision tower"):
        load_model(tmp_path, freeze_vision=True)


def test_frozen_vision_gets_no_gradient(saved: Path) -> None:
    model = load_model(saved, freeze_vision=True)
    score(model, mixed_trees("qwen3_vl"), packing="shared").logp.sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".visual." not in name}


def test_gradient_checkpointing_is_on_when_asked_for(saved: Path) -> None:
    model = load_model(saved, gradient_checkpointing=True)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == 5 and all(layer.gradient_checkpointing for layer in layers)
    assert not model.training


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_processor(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_model(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing"):
        load_model(folder)


def test_truncated_weights_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load_model(folder)


def test_weights_that_lack_a_parameter_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.up_proj" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lack 1 parameters .* 'model\.language_model\.layers\.1\.mlp\.up_proj\.weight'"
    ):
        load_model(folder)


@pytest.mark.parametrize("text", ['{"model_type": "qwen3_', "{}", '{"model_type": "unheard_of"}'])
def test_a_torn_or_unknown_configuration_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: not the configuration of a model .* save the model again"):
        load_model(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["intermediate_size"] = 40
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"mlp\.\w+\.weight' is \[\d+, \d+\] in the weights .*\(9 such parameters\)"):
        load_model(folder)


def test_unknown_dtype_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="'float8'; allowed: float32"):
        load_model(saved, dtype="float8")


def test_folder_without_a_processor_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="no processor or tokenizer"):
        load_processor(saved)


def test_a_processor_folder_that_loads_as_a_tokenizer_only_is_refused(tmp_path: Path) -> None:
    """In a fresh process, so that no other test has registered a class."""
    from specs_fast.lab.processor import build_processor

    build_processor().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({**config, "processor_class": "NobodysProcessor"}))
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer.pop("processor_class", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="processor"):
        load_processor(tmp_path)


def test_the_labs_processor_loads_without_importing_the_lab(tmp_path: Path) -> None:
    from specs_fast.lab.processor import build_processor

    build_processor().save_pretrained(tmp_path)
    code = (
        "import sys; from specs_fast.models.load import load_processor; p = load_processor(sys.argv[1]); "
        "assert p.image_processor is not None; assert not any(m.startswith('specs_fast.lab') for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""The method: data faults are found before training, and the paper's recipe runs on a tiny model of its class."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import specs_fast.stages.pairs as pairs_stage
from specs_fast.config import SpecsConfig, load_config
from specs_fast.data.encode import Encoder
from specs_fast.data.processor import ImageTextProcessor, image_processor
from specs_fast.lab import LabPaths
from specs_fast.methods import specs
from specs_fast.models.load import load_model, load_processor
from specs_fast.progress import SILENT
from specs_fast.train.stage_dir import read_done

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "tests" / "end_to_end" / "mini-specs.yaml"
PAPER = ROOT / "recipes" / "qwen2_5_vl_7b-specs.yaml"


def on_lab(mini_lab: LabPaths, train: Path, out_dir: Path) -> SpecsConfig:
    overrides = [f"output_dir={out_dir}", "lab=null", f"model.path={mini_lab.base_dir}", f"data.train={train}"]
    return load_config(MINI, overrides)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": ""}, r"train\.jsonl:3: .*answer"),
        ({"answer": "gone"}, r"train\.jsonl:3: column 'answer' is missing"),
        ({"answer": None}, r"train\.jsonl:3: column 'answer' is missing"),
        ({"answer": ["7"]}, r"train\.jsonl:3: the gold answer must be a text or a number, got \['7'\]"),
        ({"completions": 3}, r"train\.jsonl:3: column 'completions' has a name that reward functions receive"),
        ({"images": []}, r"train\.jsonl:3: the prompt has 1 image placeholders but 'images' lists 0"),
        ({"images": ["nowhere.png"]}, r"train\.jsonl:3: image .*nowhere\.png does not exist"),
    ],
)
def test_bad_rows_stop_the_run_before_any_training(
    mini_lab: LabPaths, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    rows = [json.loads(line) for line in Path(mini_lab.train).read_text().splitlines()]
    for row in rows:
        row["images"] = [str(Path(mini_lab.train).parent / name) for name in row["images"]]
    rows[2] |= change
    if rows[2]["answer"] == "gone":
        del rows[2]["answer"]
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=says):
        specs.run(on_lab(mini_lab, train, tmp_path / "run"), tmp_path / "run")
    assert not (tmp_path / "run" / "zero.partial").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["eval.splits.id=nowhere.jsonl"], r"nowhere\.jsonl: no such file"),
        (["eval.splits.id={bad}"], r"bad\.jsonl:2: column 'answer' is missing"),
        (
            ["eval.splits.id={token}"],
            r"token\.jsonl:1: prompt 'token:1' has 0 images, but its text holds 1 image placeholders",
        ),
        (
            ["pairs.judge=no_such_module:agrees"],
            r"judge 'no_such_module:agrees': module 'no_such_module' was not found",
        ),
        (["rewards.1.name=json:scores"], r"reward 'json:scores': json has no function 'scores'"),
        (["model.device=cuda:77"], r"device 'cuda:77' is not here"),
    ],
)
def test_what_only_later_stages_need_is_checked_before_any_training(
    mini_lab: LabPaths, tmp_path: Path, overrides: list[str], says: str
) -> None:
    good, bad, literal = {"prompt": "sum ?", "answer": "7"}, {"prompt": "sum ?"}, "sum <|image_pad|> ?"
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    (tmp_path / "token.jsonl").write_text(json.dumps({"prompt": literal, "answer": "7"}))
    files = {"bad": tmp_path / "bad.jsonl", "token": tmp_path / "token.jsonl"}
    given = [override.format(**files) for override in overrides]
    own = [f"output_dir={tmp_path}", "lab=null", f"model.path={mini_lab.base_dir}", f"data.train={mini_lab.train}"]
    config = load_config(MINI, [*own, "rewards=[{name: format}, {name: accuracy}]", *given])
    with pytest.raises(ValueError, match=says):
        specs.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "zero.partial").exists()


def test_the_control_of_the_cold_start_refuses_pairs_of_another_model_too(mini_lab: LabPaths, tmp_path: Path) -> None:
    row = {"prompt": "sum ?", "chosen": "7", "rejected": "so 7", "base_model": "0123456789abcdef"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    config = on_lab(mini_lab, Path(mini_lab.train), tmp_path)
    config = replace(config, coldstart=replace(config.coldstart, kind="sft"))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: made by base model 0123456789abcdef"):
        specs._cold_start(config, Path(mini_lab.base_dir), tmp_path, tmp_path / "out", SILENT)


def test_over_long_prompts_are_filtered_only_when_asked(mini_lab: LabPaths, tmp_path: Path) -> None:
    config = on_lab(mini_lab, Path(mini_lab.train), tmp_path)
    encoder = Encoder(load_processor(mini_lab.base_dir))
    limited = replace(config, data=replace(config.data, max_prompt_tokens=38))
    with pytest.raises(ValueError, match=r"tokens, data\.max_prompt_tokens is 38"):
        specs.load_training_prompts(limited, encoder, SILENT)
    limited = replace(limited, data=replace(limited.data, filter_overlong=True))
    kept = specs.load_training_prompts(limited, encoder, SILENT)
    assert 0 < len(kept) < 48


def tiny_qwen2_5_vl(lab: LabPaths, folder: Path) -> Path:
    """A random 60 k-parameter model of the 7B recipe's class, with the lab's words and a processor for its patches."""
    tokenizer = load_processor(lab.base_dir).tokenizer
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 32, "fullatt_block_indexes": [1], "out_hidden_size": 32,
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    pictures = image_processor(patch_size=8, merge_size=2, temporal_patch_size=2, max_pixels=96 * 32)
    ImageTextProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template).save_pretrained(folder)
    return folder


def test_the_papers_recipe_states_the_papers_settings() -> None:
    config = load_config(PAPER, ["data.train=x.jsonl"])
    assert (config.zero.prompts_per_step, config.zero.group_size, config.zero.optim.lr) == (128, 8, 1e-6)
    assert (config.final.epsilon, config.final.epsilon_high, config.final.beta) == (0.2, 0.28, 0.0)
    assert (config.coldstart.batch_size, config.coldstart.nll_weight, config.coldstart.optim.lr) == (64, 1.0, 1e-6)
    assert config.zero.sampling.max_new_tokens == 10240 and config.pairs.max_pairs == 9000
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("format", 1.0), ("accuracy", 1.0)]


def test_the_papers_recipe_runs_on_a_tiny_model_of_its_class(
    mini_lab: LabPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_qwen2_5_vl(mini_lab, tmp_path / "tiny")
    small = [
        f"{stage}.{key}" for stage in ("zero", "final")
        for key in ("steps=1", "prompts_per_step=2", "group_size=2", "sampling.max_new_tokens=6")
    ]  # fmt: skip
    config = load_config(
        PAPER,
        [f"model.path={base}", f"data.train={mini_lab.train}", f"output_dir={tmp_path}", *small]
        + ["pairs.prompts=4", "coldstart.batch_size=2", "coldstart.max_steps=1", "coldstart.optim.lr=0.1"],
    )

    def scripted(model: Path, prompts: list[pairs_stage.Prompt], *rest: object) -> list[list[pairs_stage.Sample]]:
        """A random model answers nothing right: its words in the pairs stage are written here, all else is the real thing."""
        answers = [str(prompt.columns["answer"]) for prompt in prompts]
        texts = [f"<think> so {answer} . </think> <answer> {answer} </answer>" for answer in answers]
        return [[pairs_stage.Sample(text, True)] for text in texts]

    monkeypatch.setattr(pairs_stage, "sample_all", scripted)
    folders = specs.run(config, tmp_path / "run")
    assert set(folders) == {"base", "zero", "coldstart", "final"}
    for name in ("zero", "coldstart", "final"):
        assert type(load_model(folders[name])).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert read_done(tmp_path / "run" / "coldstart")["pairs"] == 4
    heads = {name: load_model(folder, dtype="bfloat16").lm_head.weight for name, folder in folders.items()}
    assert heads["zero"].dtype == torch.bfloat16 and not torch.equal(heads["coldstart"], heads["base"])


def test_data_that_changed_between_two_starts_is_refused(
    mini_lab: LabPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in Path(mini_lab.train).read_text().splitlines()][:6]
    for row in rows:
        row["images"] = [str(Path(mini_lab.train).parent / name) for name in row["images"]]
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(json.dumps(row) for row in rows))
    run_dir = tmp_path / "run"
    (run_dir / "zero").mkdir(parents=True)
    (run_dir / "zero" / "DONE.json").write_text("{}")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(specs, "run_pairs", stopped)
    config = on_lab(mini_lab, train, run_dir)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            specs.run(config, run_dir)
    train.write_text("\n".join(json.dumps(row) for row in rows[:5]))
    with pytest.raises(ValueError, match=r"train\.jsonl has changed since"):
        specs.run(config, run_dir)

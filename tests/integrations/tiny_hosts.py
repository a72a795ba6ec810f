"""Tiny random models, a word-level tokenizer and one run of each host trainer; nothing is downloaded.

A run returns what must not depend on where its log-probs came from: losses, gradients before each optimizer step, and logs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from specs_fast.lab.processor import build_tokenizer

KINDS = ("tied", "untied", "softcap", "multiplier", "divisor", "vision")
IMAGE = 60


def make_model(kind: str = "tied", *, vocab_size: int = 64, hidden_size: int = 32, seed: int = 0) -> PreTrainedModel:
    """A random-weight decoder in fp32. untied and divisor: with a bias on the head."""
    torch.manual_seed(seed)
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "tie_word_embeddings": kind != "untied",
        "max_position_embeddings": 512,
    }
    model: PreTrainedModel
    if kind == "softcap":
        model = Gemma2ForCausalLM(
            Gemma2Config(**text, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager")
        )
    elif kind == "multiplier":
        model = CohereForCausalLM(CohereConfig(**text, logit_scale=0.25))
    elif kind == "divisor":
        model = GraniteForCausalLM(GraniteConfig(**text, logits_scaling=3.0))
        model.lm_head.bias = torch.nn.Parameter(torch.randn(vocab_size))
    elif kind == "vision":
        model = Qwen2_5_VLForConditionalGeneration(_vision_config(text))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**text, head_dim=8))
        if kind == "untied":
            model.lm_head.bias = torch.nn.Parameter(torch.randn(vocab_size))
    with torch.no_grad():  # spread logits: on nearly uniform ones most mistakes would not show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
    return model.eval()


def _vision_config(text: dict[str, Any]) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": text["hidden_size"],
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    config.tie_word_embeddings = True
    return config


def make_batch(kind: str = "tied", *, rows: int = 3, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Right-padded rows; the first third of each row and the padding carry no label; a vision model gets an image per row."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, IMAGE, (rows, length), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[-1, length - length // 4 :] = 0
    batch: dict[str, Tensor] = {}
    if kind == "vision":  # a grid of 1 x 4 x 4 patches merges into 4 tokens
        input_ids[:, :6] = torch.tensor([62, IMAGE, IMAGE, IMAGE, IMAGE, 63])
        batch["pixel_values"] = torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        batch["mm_token_type_ids"] = (input_ids == IMAGE).int()
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, : length // 2] = -100
    return {**batch, "input_ids": input_ids, "attention_mask": mask, "labels": labels}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any gradient entry over the largest entry; both must be of the same parameters."""
    assert got.keys() == expected.keys() and expected
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0 and math.isfinite(scale)
    return max(float((got[name] - g).abs().max()) for name, g in expected.items()) / scale


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned, and its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.shape = 0, ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > self.nbytes:
                self.nbytes, self.shape = tensor.untyped_storage().nbytes(), tuple(tensor.shape)
        return out


class Recorder(TrainerCallback):
    """The gradients that each optimizer step is about to use."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append(gradients(getattr(model, "module", model)))


@dataclass
class Run:
    gradients: list[dict[str, Tensor]]
    logs: list[dict[str, float]] = field(default_factory=list)
    largest: int = 0

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.logs if "loss" in entry]


def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def common_settings(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "seed": 0,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **settings,
    }


def _train(trainer: Any, recorder: Recorder) -> Run:
    with LargestTensor() as largest:
        trainer.train()
    return Run(recorder.gradients, trainer.state.log_history, largest.nbytes)


def texts(count: int, words: int, seed: int) -> list[str]:
    vocabulary = [word for word in tokenizer().get_vocab() if word.isalpha()]
    vocabulary.sort()
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(vocabulary), (count, words), generator=generator)
    lengths = torch.randint(words // 2, words + 1, (count,), generator=generator).tolist()
    return [" ".join(vocabulary[i] for i in row[:n]) for row, n in zip(picks.tolist(), lengths, strict=True)]


def run_dpo(model: Any, folder: Path, *, rows: int = 16, words: int = 8, **settings: Any) -> Run:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = {key: texts(rows, words, seed) for seed, key in enumerate(("prompt", "chosen", "rejected"))}
    recorder = Recorder()
    peft_config = settings.pop("peft_config", None)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**common_settings(folder, **settings)),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        callbacks=[recorder],
        peft_config=peft_config,
    )
    return _train(trainer, recorder)


def reward_even_words(completions: list[str], **_: Any) -> list[float]:
    """Depends on the text, so that samples of a group differ."""
    return [sum(len(word) % 2 == 0 for word in text.split()) / 8 for text in completions]


def run_grpo(model: Any, folder: Path, *, rows: int = 16, **settings: Any) -> Run:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    recorder = Recorder()
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(**common_settings(folder, num_generations=4, max_completion_length=8, **settings)),
        train_dataset=Dataset.from_dict({"prompt": texts(rows, 6, 3)}),
        processing_class=tokenizer(),
        reward_funcs=reward_even_words,
        callbacks=[recorder],
    )
    return _train(trainer, recorder)


def run_rloo(model: Any, folder: Path, *, rows: int = 16, **settings: Any) -> Run:
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    recorder = Recorder()
    trainer = RLOOTrainer(
        model=model,
        args=RLOOConfig(**common_settings(folder, num_generations=4, max_completion_length=8, **settings)),
        train_dataset=Dataset.from_dict({"prompt": texts(rows, 6, 3)}),
        processing_class=tokenizer(),
        reward_funcs=reward_even_words,
        callbacks=[recorder],
    )
    return _train(trainer, recorder)


def run_kto(model: Any, folder: Path, *, rows: int = 16, **settings: Any) -> Run:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    data = {"prompt": texts(rows, 8, 0), "completion": texts(rows, 8, 1), "label": [i % 2 == 0 for i in range(rows)]}
    recorder = Recorder()
    trainer = KTOTrainer(
        model=model,
        args=KTOConfig(**common_settings(folder, **settings)),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        callbacks=[recorder],
    )
    return _train(trainer, recorder)


def run_sft(model: Any, folder: Path, *, rows: int = 16, **settings: Any) -> Run:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    recorder = Recorder()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**common_settings(folder, **settings)),
        train_dataset=Dataset.from_dict({"prompt": texts(rows, 8, 0), "completion": texts(rows, 8, 1)}),
        processing_class=tokenizer(),
        callbacks=[recorder],
    )
    return _train(trainer, recorder)


def run_hf_trainer(model: Any, folder: Path, **settings: Any) -> Run:
    from transformers import Trainer, TrainingArguments

    rows = [
        {key: value[0] for key, value in make_batch(rows=1, length=12, seed=seed).items() if key != "attention_mask"}
        for seed in range(16)
    ]
    recorder = Recorder()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**common_settings(folder, **settings)),
        train_dataset=rows,
        callbacks=[recorder],
    )
    return _train(trainer, recorder)

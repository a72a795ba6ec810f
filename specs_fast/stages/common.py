"""What every stage starts from and leaves behind: a policy in memory, a model folder on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specs_fast.config import ModelConfig, SamplingConfig
from specs_fast.data.batching import cut, plan_trees, scatter
from specs_fast.data.encode import Encoder
from specs_fast.data.planner import Plan
from specs_fast.data.types import Completion, Prompt, Scores, Tree
from specs_fast.models.layers import fuse_layers
from specs_fast.models.load import load_model, load_processor
from specs_fast.models.score import Packing, score
from specs_fast.progress import SILENT, Progress
from specs_fast.rollout.sampler import Sampler


@dataclass
class Policy:
    """A loaded model with its encoder and the way it is scored."""

    model: PreTrainedModel
    processor: Any
    encoder: Encoder
    packing: Packing
    fused_layers: dict[str, int]
    """Modules per class that run on our kernels."""

    @classmethod
    def load(
        cls, model_dir: str | Path, config: ModelConfig, *, trainable: bool, progress: Progress = SILENT
    ) -> Policy:
        """Load a model folder; ``trainable=False`` turns every gradient off. Says which layers run on our kernels."""
        model = load_model(
            model_dir,
            dtype=config.dtype,
            device=config.device,
            freeze_vision=config.freeze_vision,
            gradient_checkpointing=config.gradient_checkpointing and trainable,
        )
        if not trainable:
            model.requires_grad_(False)
        fused = fuse_layers(model) if config.fused_layers else {}
        if fused:
            layers = ", ".join(f"{count} {name}" for name, count in fused.items())
            progress.say(f"{Path(model_dir).name}: {layers} run on specs_kernels")
        processor = load_processor(model_dir)
        return cls(model, processor, Encoder(processor, configured_eos(model)), config.packing, fused)

    def score(self, trees: Sequence[Tree], *, temperature: float = 1.0, return_entropy: bool = False) -> Scores:
        """Log-probs of all response tokens of the trees; differentiable in the model's trainable parameters."""
        return score(self.model, trees, packing=self.packing, temperature=temperature, return_entropy=return_entropy)

    def plan(self, trees: Sequence[Tree], max_tokens: int, *, keep_whole: bool = False) -> Plan:
        """Micro-batches of these trees, counted the way this policy packs them."""
        return plan_trees(trees, max_tokens, packing=self.packing, keep_whole=keep_whole)

    @torch.no_grad()
    def score_in_batches(
        self,
        trees: Sequence[Tree],
        max_tokens: int,
        *,
        temperature: float = 1.0,
        progress: Progress = SILENT,
        label: str = "",
    ) -> list[Tensor]:
        """Log-probs without gradient, ``[N_i]`` per tree on the model's device, computed in micro-batches."""
        outlines = trees.outlines if isinstance(trees, LazyTrees) else trees
        plan = self.plan(outlines, max_tokens)
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        logps = [torch.empty(tree.num_response_tokens, dtype=dtype, device=self.model.device) for tree in outlines]
        with progress.track(label, len(plan)) as bar:
            for parts in plan.micro_batches:
                scatter(self.score(cut(trees, parts), temperature=temperature).logp, outlines, parts, logps)
                bar.advance(1)
        return logps

    def sample(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, num_samples: int, seed: int
    ) -> list[list[Completion]]:
        """``num_samples`` completions per prompt, the same for the same seed."""
        sampler = Sampler(
            self.model,
            eos_token_ids=eos_token_ids(self.model, self.encoder),
            pad_token_id=self.encoder.pad_token_id,
            max_batch_tokens=sampling.max_batch_tokens,
        )
        return sampler.generate(
            [self.encoder.prompt(prompt) for prompt in prompts],
            num_samples=num_samples,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
        )

    def save(self, folder: Path) -> None:
        """Weights (safetensors), config, generation config and processor: a folder that ``from_pretrained`` loads."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


class LazyTrees(Sequence[Tree]):
    """Trees that are encoded when read: pixels of a large data set never lie in memory together.

    outlines: the same trees without their pixels, for everything that only counts or names.
    """

    def __init__(self, make: Callable[[int], Tree], count: int) -> None:
        self._make = make
        self.outlines = [_outline(make(index)) for index in range(count)]

    def __len__(self) -> int:
        return len(self.outlines)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(len(self)))]
        return self._make(index)


def _outline(tree: Tree) -> Tree:
    images = tuple(replace(image, pixel_values=torch.empty(0)) for image in tree.prompt.images)
    return replace(tree, prompt=replace(tree.prompt, images=images))


def configured_eos(model: PreTrainedModel) -> list[int]:
    """End-of-sequence tokens that the model's generation config names; several for many chat models."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return [int(token) for token in ids if token is not None]


def eos_token_ids(model: PreTrainedModel, encoder: Encoder) -> list[int]:
    """Every token that ends a response: the generation config's and the tokenizer's."""
    return sorted({encoder.eos_token_id, *configured_eos(model)})


def conversation(text: str) -> list[dict[str, str]]:
    """A completion the way reward functions get it: one assistant message (TRL's conversational form)."""
    return [{"role": "assistant", "content": text}]


def column_lists(prompts: Sequence[Prompt], names: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The prompts' own columns as lists, one entry per prompt, None where a row lacks one; ``tags`` always present.

    names: columns to give besides, so that a column which few rows have does not come and go with the batch.
    """
    names = sorted({*names, *(name for prompt in prompts for name in prompt.columns)})
    columns: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    columns["tags"] = [list(prompt.tags) for prompt in prompts]
    return columns


def stage_seed(seed: int, stage: str, step: int = 0) -> int:
    """A seed for one step of one stage that no other stage shares."""
    offset = int.from_bytes(stage.encode()[:6].ljust(6, b"\0"), "big")
    return (seed * 1_000_003 + offset * 7919 + step * 104_729) % (2**62)


def dump(value: Any) -> str:
    """One JSON line."""
    return json.dumps(value, ensure_ascii=False) + "\n"

"""What a rollout engine is: something that writes completions, and takes new weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedModel

from specs_fast.data.types import Completion, EncodedPrompt


class Engine(Protocol):
    """Writes completions for prompts. `rollout.sampler.Sampler` is the one that ships."""

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        greedy: bool = False,
        seed: int,
    ) -> list[list[Completion]]:
        """`num_samples` completions per prompt, as ``[prompt][sample]``; equal arguments give equal completions."""
        ...

    def update_weights(self, model: PreTrainedModel) -> None:
        """Sample from this model's weights from now on."""
        ...

"""Sampling completions from the model that is being trained, in its own process.

Each distinct prompt is prefilled once and its key-value cache repeated per sample, each distinct image is encoded once per
call, and rows leave the batch as they end. Any transformers causal model works; it runs on whatever attention it was loaded with.

Letters: P prompts of a batch, R rows (samples) of a batch, L padded prompt length, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specs_fast.data.types import Completion, EncodedPrompt
from specs_fast.models.images import ImageFeatures, encode_images, visibility_kwargs
from specs_fast.models.positions import check_position_limit, check_prompt_images, segment_positions, uses_mrope
from specs_fast.models.support import check_unwrapped
from specs_fast.rollout.draw import Truncation, draw, row_uniforms

# Ended rows are dropped from the cache once they are this share of it: dropping copies the rows that stay.
_COMPACT_SHARE = 0.125
_VISION_TOKEN = re.compile(r"(image|video|vision|audio|boi|eoi)\w*_token_(id|index)")


@dataclass(frozen=True)
class _Settings:
    max_new_tokens: int
    temperature: float
    truncation: Truncation
    greedy: bool
    seed: int


class Sampler:
    """An engine (`rollout.engine.Engine`) that samples with a key-value cache.

    eos_token_ids: a completion ends with, and includes, the first of these. pad_token_id: fills prompts on the left; never read.
    max_batch_tokens: rows times (longest prompt + max_new_tokens) of one batch; a single row may exceed it.

    Tokens that stand for pixels (image, video, vision start and end, from the model's configuration) are never sampled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_batch_tokens: int = 65_536,
    ) -> None:
        if not eos_token_ids:
            raise ValueError("eos_token_ids is empty; completions could never end")
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}; it must be positive")
        self._eos = tuple(int(token) for token in eos_token_ids)
        self._pad = int(pad_token_id)
        self._max_batch_tokens = max_batch_tokens
        self.update_weights(model)

    def update_weights(self, model: PreTrainedModel) -> None:
        """Sample from this model from now on; a model trained in place needs no call.

        Raises ValueError for a wrapper around a model, and when an end-of-sequence token is one of the model's vision tokens.
        """
        check_unwrapped(model)
        banned = vision_token_ids(model)
        clash = sorted(set(self._eos) & set(banned))
        if clash:
            raise ValueError(
                f"end-of-sequence token {clash[0]} is a vision token of {type(model).__name__}, which is never sampled"
            )
        self._model = model
        self._banned = torch.tensor(banned, dtype=torch.long, device=model.device)
        self._eos_tokens = torch.tensor(self._eos, device=model.device)

    @torch.no_grad()
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
        """`num_samples` completions per prompt, ``[prompt][sample]``.

        A row's randomness depends on seed, prompt index and sample index only, so equal arguments give equal completions.
        `Completion.logp` is log softmax(logits / temperature) of each drawn token over the whole vocabulary, before vision tokens
        are excluded and before top_k and top_p: what `models.score` computes. With greedy=True every sample of a prompt is
        the same most likely completion, and logp is taken at `temperature`.

        Raises ValueError for an empty prompt, a model in training mode, image tokens that are not those of the
        prompt's images, a prompt that with max_new_tokens passes the model's positions, settings outside their range, and
        NaN log-probs.
        """
        if num_samples < 1 or max_new_tokens < 1:
            raise ValueError(f"num_samples ({num_samples}) and max_new_tokens ({max_new_tokens}) must be at least 1")
        if not temperature > 0.0:
            raise ValueError(
                f"temperature is {temperature}; it must be positive (greedy=True for the most likely token)"
            )
        if self._model.training:
            raise ValueError("the model is in training mode; call model.eval() before sampling")
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {index} ({prompt.id!r}) is empty")
            check_prompt_images(self._model, prompt)
            check_position_limit(self._model, prompt, max_new_tokens)
        settings = _Settings(max_new_tokens, temperature, Truncation(top_p, top_k), greedy, seed)
        features = encode_images(self._model, [image for prompt in prompts for image in prompt.images])
        samples = 1 if greedy else num_samples
        done: dict[tuple[int, int], Completion] = {}
        for rows in self._batches(prompts, samples, max_new_tokens):
            done.update(zip(rows, self._run(prompts, rows, features, settings), strict=True))
        return [
            [done[index, 0 if greedy else sample] for sample in range(num_samples)] for index in range(len(prompts))
        ]

    def _batches(
        self, prompts: Sequence[EncodedPrompt], samples: int, max_new_tokens: int
    ) -> list[list[tuple[int, int]]]:
        """Rows (prompt index, sample index) per batch under the token budget; prompts of like length together."""
        batches: list[list[tuple[int, int]]] = []
        for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            for sample in range(samples):
                longest = len(prompts[batches[-1][0][0]]) if batches else 0
                if not batches or (len(batches[-1]) + 1) * (longest + max_new_tokens) > self._max_batch_tokens:
                    batches.append([])
                batches[-1].append((index, sample))
        return batches

    def _run(
        self,
        prompts: Sequence[EncodedPrompt],
        rows: list[tuple[int, int]],
        features: ImageFeatures | None,
        settings: _Settings,
    ) -> list[Completion]:
        """Completions of one batch of rows; rows of one prompt are adjacent."""
        distinct = list(dict.fromkeys(index for index, _ in rows))
        cache, mask_PL, next_P, logits_PV = self._prefill([prompts[index] for index in distinct], features)
        device = logits_PV.device
        place = {index: position for position, index in enumerate(distinct)}
        prompt_R = torch.tensor([place[index] for index, _ in rows], device=device)
        cache.batch_select_indices(prompt_R)
        steps = settings.max_new_tokens
        uniforms = row_uniforms(settings.seed, rows, 0 if settings.greedy else steps).to(device)
        tokens = torch.full((len(rows), steps), self._pad, dtype=torch.long, device=device)
        logps = torch.zeros(len(rows), steps, device=device)
        lengths = torch.full((len(rows),), steps, dtype=torch.long, device=device)
        finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
        # What follows holds the rows still in the cache, `row_R` naming them; an ended one may stay for a while.
        row_R = torch.arange(len(rows), device=device)
        logits_RV, next_R = logits_PV[prompt_R], next_P[prompt_R]
        mask_RL = mask_PL[prompt_R] if mask_PL is not None else None
        for step in range(steps):
            token_R, logp_R = self._choose(logits_RV, uniforms[row_R, step] if not settings.greedy else None, settings)
            tokens[row_R, step], logps[row_R, step] = token_R, logp_R  # what an ended row draws lies beyond its length
            live_R = ~finished[row_R]
            ended_R = live_R & torch.isin(token_R, self._eos_tokens)
            lengths[row_R[ended_R]] = step + 1
            finished[row_R[ended_R]] = True
            live_R &= ~ended_R
            live = int(live_R.sum())
            if live == 0 or step + 1 == steps:
                break
            if row_R.shape[0] - live >= _COMPACT_SHARE * row_R.shape[0]:
                keep = live_R.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                row_R, token_R, next_R = row_R[keep], token_R[keep], next_R[keep]
                mask_RL = mask_RL[keep] if mask_RL is not None else None
            logits_RV, mask_RL = self._decode(token_R, next_R + step, mask_RL, cache)
        lengths_list: list[int] = lengths.tolist()
        tokens, logps, ends = tokens.cpu(), logps.cpu(), finished.tolist()
        nan_R = logps.isnan().any(1)
        if bool(nan_R.any()):
            prompt = prompts[rows[int(nan_R.nonzero()[0])][0]]
            raise ValueError(
                f"log-probs of a completion of prompt {prompt.id!r} are NaN: weights that are not finite (training diverged), "
                f"logits beyond the range of {self._model.dtype}, or too small a temperature ({settings.temperature})"
            )
        return [
            Completion(tokens[row, :length].clone(), logps[row, :length].clone(), ends[row])
            for row, length in enumerate(lengths_list)
        ]

    def _choose(self, logits_RV: Tensor, uniform_R: Tensor | None, settings: _Settings) -> tuple[Tensor, Tensor]:
        """The drawn (or most likely) token of each row and its log-prob."""
        logp_RV = (logits_RV.float() / settings.temperature).log_softmax(-1)
        allowed_RV = logp_RV.index_fill(1, self._banned, -torch.inf) if len(self._banned) else logp_RV
        token_R = allowed_RV.argmax(-1) if uniform_R is None else draw(allowed_RV, uniform_R, settings.truncation)
        return token_R, logp_RV.gather(1, token_R.unsqueeze(1)).squeeze(1)

    def _prefill(
        self, prompts: list[EncodedPrompt], features: ImageFeatures | None
    ) -> tuple[DynamicCache, Tensor | None, Tensor, Tensor]:
        """Run left-padded prompts: their cache, mask ``[P, L]`` (None without padding), next position id ``[P]`` and next-token
        logits ``[P, V]``."""
        model = self._model
        device = model.device
        longest = max(len(prompt) for prompt in prompts)
        ids_PL = torch.full((len(prompts), longest), self._pad, dtype=torch.long)
        types_PL = torch.zeros_like(ids_PL)
        mask_PL = torch.zeros(len(prompts), longest, dtype=torch.bool)
        mrope = uses_mrope(model)
        positions = torch.zeros(3 if mrope else 1, len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt)
            ids_PL[row, start:] = prompt.input_ids
            types_PL[row, start:] = prompt.token_types
            mask_PL[row, start:] = True
            own = segment_positions(model, prompt.token_types, prompt.images) if mrope else torch.arange(len(prompt))
            positions[:, row, start:] = own
        images = [image for prompt in prompts for image in prompt.images]
        padded = not bool(mask_PL.all())
        cache = DynamicCache(config=model.config)
        logits_PV = model(
            input_ids=ids_PL.to(device),
            attention_mask=mask_PL.to(device) if padded else None,
            position_ids=positions.to(device) if mrope else positions[0].to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **visibility_kwargs(model, types_PL),
            **(features.model_kwargs(images) if features is not None else {}),
        ).logits[:, -1]
        next_P = positions[:, :, -1].amax(0) + 1
        return cache, mask_PL.to(device) if padded else None, next_P.to(device), logits_PV

    def _decode(
        self, token_R: Tensor, position_R: Tensor, mask_RL: Tensor | None, cache: DynamicCache
    ) -> tuple[Tensor, Tensor | None]:
        """One step: next-token logits ``[R, V]`` and the mask with the new token on it."""
        if mask_RL is not None:
            mask_RL = torch.cat((mask_RL, mask_RL.new_ones(mask_RL.shape[0], 1)), dim=1)
        position_R1 = position_R.unsqueeze(1)
        logits_RV = self._model(
            input_ids=token_R.unsqueeze(1),
            attention_mask=mask_RL,
            position_ids=position_R1.expand(3, -1, -1) if uses_mrope(self._model) else position_R1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits_RV, mask_RL


def vision_token_ids(model: PreTrainedModel) -> list[int]:
    """Ids of the tokens that stand for or delimit pixels or sound, from the model's configuration; no text contains them."""
    values = [value for name, value in model.config.to_dict().items() if _VISION_TOKEN.fullmatch(name)]
    return sorted({value for value in values if isinstance(value, int)})

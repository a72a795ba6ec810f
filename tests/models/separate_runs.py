"""The definition that packed and padded runs are held to: every path through the model on its own, full logits and all."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specs_fast.data.types import EncodedImage, EncodedPrompt, Tree


def model_inputs(input_ids: Tensor, token_types: Tensor, images: tuple[EncodedImage, ...] | list[EncodedImage]) -> dict:
    """Keyword arguments of a plain forward (or generate) on one sequence ``[L]``."""
    inputs = {"input_ids": input_ids[None], "attention_mask": torch.ones_like(input_ids)[None]}
    if images:
        inputs["pixel_values"] = torch.cat([image.pixel_values for image in images])
        inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        inputs["mm_token_type_ids"] = token_types[None]
    return inputs


def prompt_inputs(prompt: EncodedPrompt) -> dict:
    return model_inputs(prompt.input_ids, prompt.token_types, prompt.images)


def separate_logp(
    model: PreTrainedModel, tree: Tree, response: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log-probs and entropies ``[R]`` of one response, from the full logits of a run of its own."""
    prompt = tree.prompt
    types = torch.cat((prompt.token_types, torch.zeros_like(response)))
    logits = model(**model_inputs(torch.cat((prompt.input_ids, response)), types, prompt.images)).logits[0]
    logp = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return logp.gather(1, response[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def separate_scores(model: PreTrainedModel, trees: list[Tree], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    parts = [
        separate_logp(model, tree, response, temperature)
        for tree in trees
        for response in tree.responses
        if len(response) > 0
    ]
    return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])


def weighted_gradients(model: PreTrainedModel, values: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed weighting of `values`; every parameter of the model must get one."""
    model.zero_grad(set_to_none=True)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(7), dtype=values.dtype)
    (values * weights).sum().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return gradients


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||got - expected|| / ||expected|| over parameters; infinite when the sets of parameters differ."""
    if got.keys() != expected.keys():
        return float("inf")
    floor = max(gradient.norm().item() for gradient in expected.values()) * 1e-6
    return max(
        ((got[name] - gradient).norm() / gradient.norm().clamp_min(floor)).item() for name, gradient in expected.items()
    )

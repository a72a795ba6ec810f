"""Log-probs of responses under a model, packed or padded.

Both paths run the same model, encode each distinct image once, and send the hidden states that predict response tokens, and no
others, through `specs_kernels.linear_logprob`: logits of prompt tokens are never formed.

Letters: B rows, L padded length, T packed tokens, D hidden, N scored tokens, S responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specs_fast.data.types import EncodedImage, Scores, Tree
from specs_fast.models.forest import packed_hidden
from specs_fast.models.head import head_of
from specs_fast.models.images import encode_images, visibility_kwargs
from specs_fast.models.load import image_token_id
from specs_fast.models.modes import scoring_mode
from specs_fast.models.positions import check_prompt_images, segment_positions, uses_mrope
from specs_fast.models.support import check_scorable, check_unwrapped
from specs_kernels import PackedLayout, linear_logprob

Packing = Literal["shared", "none"]


def score(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    *,
    packing: Packing,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Scores:
    """log softmax(logits / temperature) of every response token given its prompt and the tokens before it.

    packing: "shared", one packed row in which each prompt is stored once; "none", one right-padded row per response. The two
    agree to rounding (1e-5 in fp32). Differentiable; gradient checkpointing is honoured. Each distinct image (by key) is
    encoded once.

    Returns `Scores` in tree order, on the model's device, logp and entropy fp32 (fp64 for an fp64 model). Empty responses are
    allowed and score no token.

    Raises ValueError for a wrapper around a model (PEFT, DDP), a model that cannot be packed (with "shared"), an empty prompt, an
    image token in a response, image tokens that do not match a prompt's images, and an unknown packing.
    """
    if packing not in ("shared", "none"):
        raise ValueError(f"packing is {packing!r}; allowed: 'shared', 'none'")
    check_unwrapped(model)
    _check_trees(model, trees)
    lengths = [int(response.shape[0]) for tree in trees for response in tree.responses]
    scored = [tree for tree in trees if tree.num_response_tokens > 0]
    head = head_of(model)
    device = model.device
    if not scored:
        nothing = head.weight_VD.flatten()[:0].to(torch.promote_types(head.weight_VD.dtype, torch.float32))
        hidden_TD, rows_N, target_N = None, None, None
        logp_N, entropy_N = nothing, nothing.detach() if return_entropy else None
    else:
        hidden_TD, rows_N = _packed(model, scored) if packing == "shared" else _padded(model, scored)
        target_N = torch.cat([response for tree in scored for response in tree.responses]).to(device)
        logp_N, entropy_N, _ = linear_logprob(
            hidden_TD,
            head.weight_VD,
            target_N,
            bias=head.bias_V,
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            return_entropy=return_entropy,
            rows=rows_N,
        )
    lengths_S = torch.tensor(lengths, dtype=torch.long, device=device)
    return Scores(logp_N, entropy_N, Scores.segments(lengths_S), lengths_S)


def _packed(model: PreTrainedModel, trees: Sequence[Tree]) -> tuple[Tensor, Tensor]:
    """Hidden states ``[T, D]`` of the forest of all trees, and per response token the row that predicts it ``[N]``."""
    forest = forest_of(trees)
    hidden_TD = packed_hidden(model, forest.input_ids, forest.layout, forest.images, forest.token_types)
    return hidden_TD, forest.rows.to(hidden_TD.device)


@dataclass(frozen=True)
class Forest:
    """Trees laid out one after the other, without the last token of each response: it is scored but predicts nothing.

    layout: T tokens. input_ids, token_types: int64 ``[T]``. images: in order of appearance. rows: int64 ``[N]``, the token
    whose hidden state predicts each response token, in tree order.
    """

    layout: PackedLayout
    input_ids: Tensor
    token_types: Tensor
    images: list[EncodedImage]
    rows: Tensor


def forest_of(trees: Sequence[Tree]) -> Forest:
    """The forest whose hidden states score every response of these trees."""
    lengths: list[int] = []
    parents: list[int] = []
    pieces: list[Tensor] = []
    types: list[Tensor] = []
    is_response: list[bool] = []
    for tree in trees:
        root = len(lengths)
        responses = [int(response.shape[0]) for response in tree.responses]
        lengths += [len(tree.prompt), *responses]
        parents += [-1, *[root] * len(responses)]
        is_response += [False, *[True] * len(responses)]
        pieces += [tree.prompt.input_ids, *(response[:-1] for response in tree.responses)]
        types += [tree.prompt.token_types, torch.zeros(sum(max(0, n - 1) for n in responses), dtype=torch.long)]
    kept = [max(0, n - 1) if response else n for n, response in zip(lengths, is_response, strict=True)]
    # The whole forest knows which token predicts which; the one that runs lacks the last tokens.
    whole = PackedLayout.from_segments(lengths, parents)
    is_response_S = torch.tensor(is_response)
    keep_T = torch.ones(whole.num_tokens, dtype=torch.bool)
    keep_T[whole.segment_starts[1:][is_response_S & (torch.tensor(lengths) > 0)] - 1] = False
    place_T = keep_T.cumsum(0) - 1
    rows_N = place_T[whole.predictor_index[is_response_S[whole.segment_ids]]]
    layout = PackedLayout.from_segments(kept, parents)
    images = [image for tree in trees for image in tree.prompt.images]
    return Forest(layout, torch.cat(pieces), torch.cat(types), images, rows_N)


def _padded(model: PreTrainedModel, trees: Sequence[Tree]) -> tuple[Tensor, Tensor]:
    """Hidden states ``[B * L, D]`` of one right-padded row per non-empty response, and the predicting rows ``[N]``.

    The last token of a response is left out: it predicts nothing. Right padding needs no mask: attention is causal, so no token
    sees the padding after it, and padding is never read.
    """
    device = model.device
    rows = [(tree, response) for tree in trees for response in tree.responses if response.shape[0] > 0]
    longest = max(len(tree.prompt) + int(response.shape[0]) for tree, response in rows) - 1
    check_scorable(model, longest)
    input_ids_BL = torch.full((len(rows), longest), _pad_token_id(model), dtype=torch.long)
    token_types_BL = torch.zeros_like(input_ids_BL)
    predictors: list[Tensor] = []
    for row, (tree, response) in enumerate(rows):
        prompt, total = len(tree.prompt), len(tree.prompt) + int(response.shape[0]) - 1
        input_ids_BL[row, :prompt] = tree.prompt.input_ids
        token_types_BL[row, :prompt] = tree.prompt.token_types
        input_ids_BL[row, prompt:total] = response[:-1]
        predictors.append(torch.arange(prompt - 1, total) + row * longest)
    row_images = [image for tree, _ in rows for image in tree.prompt.images]
    with scoring_mode(model):
        features = encode_images(model, row_images)
        output = model.base_model(
            input_ids=input_ids_BL.to(device),
            position_ids=_padded_positions(model, [tree for tree, _ in rows], longest).to(device),
            use_cache=False,
            **visibility_kwargs(model, token_types_BL),
            **(features.model_kwargs(row_images) if features is not None else {}),
        )
    return output.last_hidden_state.flatten(0, 1), torch.cat(predictors).to(device)


def _padded_positions(model: PreTrainedModel, trees: Sequence[Tree], longest: int) -> Tensor:
    """``[B, L]``, or ``[3, B, L]`` with M-RoPE, whose text goes on after the prompt's largest id."""
    if not uses_mrope(model):
        return torch.arange(longest).expand(len(trees), -1)
    rows: list[Tensor] = []
    last: Tree | None = None
    for tree in trees:
        if tree is not last:
            ids = segment_positions(model, tree.prompt.token_types, tree.prompt.images)
            after = torch.arange(longest - ids.shape[1]) + int(ids[:, -1].max()) + 1
            positions = torch.cat((ids, after.expand(3, -1)), dim=1)
            last = tree
        rows.append(positions)
    return torch.stack(rows, dim=1)


def _pad_token_id(model: PreTrainedModel) -> int:
    """A token to fill rows with. Its value is never read; it must only not stand for an image."""
    pad = model.config.get_text_config().pad_token_id
    if pad is None or pad == image_token_id(model):
        pad = 1 if image_token_id(model) == 0 else 0
    return int(pad)


def _check_trees(model: PreTrainedModel, trees: Sequence[Tree]) -> None:
    image_id = image_token_id(model)
    for tree in trees:
        if len(tree.prompt) == 0:
            raise ValueError(
                f"prompt {tree.prompt.id!r} is empty; the first response token has nothing to be predicted from"
            )
        check_prompt_images(model, tree.prompt)
        for index, response in enumerate(tree.responses):
            if image_id is not None and bool((response == image_id).any()):
                raise ValueError(
                    f"response {index} of prompt {tree.prompt.id!r} contains the image token {image_id}; a response is text, "
                    "and an image token without an image has no meaning"
                )

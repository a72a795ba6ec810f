"""Random forests of segments up to depth 3, and their separate runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from separate_runs import model_inputs
from tiny_models import VISION_MODELS, make_image, make_segment, text_ids
from torch import Tensor
from transformers import PreTrainedModel

from specs_fast.data.types import EncodedImage


@dataclass(frozen=True)
class Forest:
    """Segments in depth-first order: token ids, token types, images and parent of each."""

    input_ids: list[Tensor]
    token_types: list[Tensor]
    images: list[list[EncodedImage]]
    parents: list[int]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.input_ids]

    def path(self, segment: int) -> list[int]:
        """Segments from the root to this one."""
        path = [segment]
        while self.parents[path[0]] != -1:
            path.insert(0, self.parents[path[0]])
        return path


def random_forest(kind: str, seed: int) -> Forest:
    """Eight to eleven segments, depth up to 3, some empty, some with one or two images at any depth, one image repeated."""
    generator = torch.Generator().manual_seed(seed)

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    pool = [make_image("a"), make_image("b", (1, 6, 4)), make_image("c", (1, 2, 2))]
    forest = Forest([], [], [], [])
    depths: list[int] = []
    for segment in range(8 + pick(4)):
        parent = -1
        if segment > 0:
            # A legal parent is on the path of the segment before it; now and then a new root.
            candidates = [s for s in forest.path(segment - 1) if depths[s] < 3]
            parent = -1 if pick(5) == 0 else candidates[pick(len(candidates))]
        images: list[EncodedImage] = []
        if kind in VISION_MODELS and pick(3) == 0:
            images = [pool[pick(len(pool))] for _ in range(1 + pick(2))]
        if images:
            ids, types = make_segment([1 + pick(4) for _ in range(len(images) + pick(2))], images, generator)
        else:
            ids = text_ids(0 if parent != -1 and pick(5) == 0 else 1 + pick(6), generator)
            types = torch.zeros_like(ids)
        forest.input_ids.append(ids)
        forest.token_types.append(types)
        forest.images.append(images)
        forest.parents.append(parent)
        depths.append(1 if parent == -1 else depths[parent] + 1)
    assert max(depths) == 3, "choose a seed whose forest has depth 3"
    return forest


def separate_forest_logp(model: PreTrainedModel, forest: Forest) -> Tensor:
    """log-probs of every token but the first of each path: every segment from a run of the path that leads to it."""
    parts = []
    for segment, length in enumerate(forest.lengths):
        if length == 0:
            continue
        path = forest.path(segment)
        ids = torch.cat([forest.input_ids[s] for s in path])
        types = torch.cat([forest.token_types[s] for s in path])
        logits = model(**model_inputs(ids, types, [image for s in path for image in forest.images[s]])).logits[0]
        logp = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        parts.append(logp[max(0, len(ids) - length - 1) :])
    return torch.cat(parts)

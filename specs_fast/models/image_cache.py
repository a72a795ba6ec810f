"""Features of images that a frozen vision tower has seen, kept between calls.

Rollouts, behaviour log-probs, reference log-probs and every minibatch of an update show the same images to the same tower.
While no parameter of the tower takes a gradient, its features are a function of the pixels alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

CACHE_BYTES = 512 << 20
"""Features kept per model, on its device; the ones unused for longest go first."""


@dataclass(frozen=True)
class Features:
    """What the tower makes of one image: ``[merged patches, D]``, and the same per deepstack level."""

    pooled: Tensor
    deepstack: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.pooled, *self.deepstack))


@dataclass
class FeatureCache:
    """Least recently used first. `stamp` says for which weights the entries hold."""

    stamp: Any = None
    output_type: type | None = None
    entries: OrderedDict[str, Features] = field(default_factory=OrderedDict)
    num_bytes: int = 0

    def get(self, key: str) -> Features | None:
        found = self.entries.get(key)
        if found is not None:
            self.entries.move_to_end(key)
        return found

    def put(self, key: str, features: Features) -> None:
        if key in self.entries or features.num_bytes > CACHE_BYTES:
            return
        # A slice of a batch would keep the whole batch alive.
        kept = Features(features.pooled.clone(), tuple(level.clone() for level in features.deepstack))
        self.entries[key] = kept
        self.num_bytes += kept.num_bytes
        while self.num_bytes > CACHE_BYTES:
            self.num_bytes -= self.entries.popitem(last=False)[1].num_bytes


_caches: WeakKeyDictionary[nn.Module, FeatureCache] = WeakKeyDictionary()


def feature_cache(base: nn.Module, text: nn.Module) -> FeatureCache | None:
    """The cache of a base model, emptied when its weights are not those it was filled with; None where they are trained.

    base: the model without its head. text: its text stack. What makes features is everything in base that is not text: the
    tower, and a projector beside it.
    """
    of_text = {id(tensor) for tensor in (*text.parameters(), *text.buffers())}
    tensors = [tensor for tensor in (*base.parameters(), *base.buffers()) if id(tensor) not in of_text]
    if not tensors or any(tensor.requires_grad for tensor in tensors):
        return None
    kind = tensors[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    stamp = (autocast, base.training, tuple(map(id, tensors)), _sums(tensors))
    cache = _caches.get(base)
    if cache is None or cache.stamp != stamp:
        cache = _caches[base] = FeatureCache(stamp)
    return cache


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _words(tensor: Tensor) -> Tensor:
    """Its bits as integers: of 8 bytes where they fit, which PyTorch adds up as fast as memory delivers them; narrower ones it
    widens first, fifty times slower on one CPU thread."""
    flat, size = tensor.detach().reshape(-1), tensor.element_size()
    if flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        return flat.view(torch.int64)
    return flat.view(_INTEGERS[size])


def _sums(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Per tensor the sum of its elements' bits as integers, in one transfer.

    PyTorch's version counters are not enough: an update through ``.data`` or NumPy leaves no trace there, and neither does one of
    tensors made in inference mode; averaged and synchronised reference models are updated in just that way.
    """
    sums = [_words(tensor).sum() for tensor in tensors]
    return tuple(torch.stack([each.to(sums[0].device) for each in sums]).tolist())

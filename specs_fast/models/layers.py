"""RMSNorm and SwiGLU of a transformers model on our CPU kernels.

Plain PyTorch makes several passes over memory for each. A module is switched only when a copy of it with random weights
computes what our op computes, over five orders of magnitude, in training and in evaluation: a norm with an offset or a bias,
another activation, a dropout or a second argument stays as it is. Weights, names and files of the model do not change; the
switch lives in the instance, survives `copy.deepcopy` and pickling, and serves generation and training alike.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specs_kernels import dispatch, rms_norm, swiglu

_DTYPES = (torch.float32, torch.float64)
_PROBE_SCALES = (1e-3, 1e-1, 1.0, 10.0, 100.0)
_PROBE_TOLERANCE = 1e-4


def fuse_layers(model: PreTrainedModel) -> dict[str, int]:
    """Switch the norms and gated feed-forward layers of `model` to `specs_kernels.rms_norm` and `swiglu`, in place.

    Returns how many modules of each class were switched, {} when none: on a device other than the CPU, without the native
    library, or in half precision, where transformers' own rounding is kept. Calling it twice changes nothing more.
    """
    changed: Counter[str] = Counter()
    if dispatch.unavailable("native", "cpu") is not None:
        return {}
    verdicts: dict[tuple[Any, ...], bool] = {}
    for module in model.modules():
        forward, width = _replacement(module)
        if forward is None or "forward" in vars(module):
            continue
        kind = _kind(module)
        if kind not in verdicts:
            verdicts[kind] = _computes_the_same(module, forward, width)
        if verdicts[kind]:
            module.forward = partial(forward, module)
            changed[type(module).__name__] += 1
    return dict(changed)


def restore_layers(model: PreTrainedModel) -> None:
    """Undo `fuse_layers`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "func", None) in (_norm_forward, _gated_forward):
            del module.forward


def _replacement(module: nn.Module) -> tuple[Any, int]:
    """The forward that could take this module's place, and the width of its input."""
    weight = getattr(module, "weight", None)
    if isinstance(getattr(module, "variance_epsilon", None), float) and isinstance(weight, Tensor):
        return (_norm_forward, weight.shape[0]) if weight.dim() == 1 and _ours(weight) else (None, 0)
    gate, act = getattr(module, "gate_proj", None), getattr(module, "act_fn", None)
    if act is not None and isinstance(gate, nn.Linear) and hasattr(module, "up_proj") and hasattr(module, "down_proj"):
        return (_gated_forward, gate.in_features) if _ours(gate.weight) else (None, 0)
    return None, 0


def _ours(weight: Tensor) -> bool:
    return weight.dtype in _DTYPES and weight.device.type == "cpu"


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)  # they differ under autocast
    return rms_norm(hidden_states.to(dtype), self.weight.to(dtype), self.variance_epsilon)


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    return cast(Tensor, self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x))))


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Modules of one kind compute the same function of input and weights: class, parts, and every plain attribute."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    return type(module), repr(module), tuple(sorted(plain.items()))


def _computes_the_same(module: nn.Module, forward: Any, width: int) -> bool:
    """Whether a copy of the module with random weights (its own may be zeros or ones, and hide a difference) agrees with ours."""
    original = type(module).forward
    if len(inspect.signature(original).parameters) != 2:  # itself and one tensor
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        probe = copy.deepcopy(module).requires_grad_(False)
        for part in probe.modules():  # a hook of the user's is not for made-up data
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        for values in (*probe.parameters(), *probe.buffers()):
            values.copy_(torch.randn(values.shape, generator=generator, device="cpu") / values.shape[-1] ** 0.5)
        x = torch.randn(len(_PROBE_SCALES), width, generator=generator, dtype=torch.float64, device="cpu")
        x = (x * x.new_tensor(_PROBE_SCALES)[:, None]).to(next(probe.parameters()).dtype)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return all(_close(forward(probe.train(mode), x), original(probe, x)) for mode in (True, False))
    except Exception:  # whatever needs another input, or cannot be copied, is not ours
        return False


def _close(ours: Any, theirs: Any) -> bool:
    """Row by row, relative; rows of zeros or of NaN prove nothing."""
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    size = theirs.norm(dim=-1)
    return bool(((ours - theirs).norm(dim=-1) <= _PROBE_TOLERANCE * size).all() and (size > 0).all())

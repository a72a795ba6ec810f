"""RMSNorm and SwiGLU of a transformers model on our CPU kernels.

Plain PyTorch makes several passes over memory for each. A module is switched only when it computes, on a random input, what our
op computes: a norm with an offset, or another activation, stays as it is. Weights, names and files of the model do not change;
the switch lives in the instance, survives `copy.deepcopy`, and serves generation and training alike.
"""

from __future__ import annotations

from collections import Counter
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specs_kernels import dispatch, rms_norm, swiglu

_DTYPES = (torch.float32, torch.float64)
_PROBE_ROWS = 3


def fuse_layers(model: PreTrainedModel) -> dict[str, int]:
    """Switch the norms and gated feed-forward layers of `model` to `specs_kernels.rms_norm` and `swiglu`, in place.

    Returns how many modules of each class were switched, {} when none: on a device other than the CPU, without the native
    library, or in half precision, where transformers' own rounding is kept. Calling it twice changes nothing more.
    """
    changed: Counter[str] = Counter()
    if dispatch.unavailable("native", model.device) is not None:
        return {}
    verdicts: dict[tuple[type[nn.Module], type[Any]], bool] = {}
    for module in model.modules():
        forward, width = _replacement(module)
        if forward is None or "forward" in vars(module):
            continue
        kind = (type(module), type(getattr(module, "act_fn", None)))
        if kind not in verdicts:
            verdicts[kind] = _computes_the_same(module, forward, width)
        if verdicts[kind]:
            module.forward = MethodType(forward, module)
            changed[type(module).__name__] += 1
    return dict(changed)


def restore_layers(model: PreTrainedModel) -> None:
    """Undo `fuse_layers`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in (_norm_forward, _gated_forward):
            del module.forward


def _replacement(module: nn.Module) -> tuple[Any, int]:
    """The forward that could take this module's place, and the width of its input."""
    weight = getattr(module, "weight", None)
    if isinstance(getattr(module, "variance_epsilon", None), float) and isinstance(weight, Tensor):
        return (_norm_forward, weight.shape[0]) if weight.dim() == 1 and weight.dtype in _DTYPES else (None, 0)
    gate, act = getattr(module, "gate_proj", None), getattr(module, "act_fn", None)
    if act is not None and isinstance(gate, nn.Linear) and hasattr(module, "up_proj") and hasattr(module, "down_proj"):
        return (_gated_forward, gate.in_features) if gate.weight.dtype in _DTYPES else (None, 0)
    return None, 0


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != self.weight.dtype:  # under autocast
        return rms_norm(hidden_states, self.weight.to(hidden_states.dtype), self.variance_epsilon)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    return cast(Tensor, self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x))))


def _computes_the_same(module: nn.Module, forward: Any, width: int) -> bool:
    parameter = next(module.parameters())
    x = torch.randn(_PROBE_ROWS, width, generator=torch.Generator().manual_seed(0)).to(parameter.dtype)
    with torch.no_grad():
        try:
            expected = module(x)
        except TypeError:  # takes more than one tensor
            return False
        return isinstance(expected, Tensor) and torch.allclose(forward(module, x), expected, rtol=1e-4, atol=1e-5)

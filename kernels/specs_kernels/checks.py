"""Argument checks shared by the ops. Each raises ValueError with the value found and what is allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def shape_of(tensor: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in tensor.shape) + "]"


def check_tensor(name: str, tensor: Tensor) -> None:
    """A dense tensor of this process: not sparse, and no DTensor, of which a rank holds a part only."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if type(tensor).__name__ == "DTensor":  # by name: its module takes long to import
        raise ValueError(
            f"{name} is a DTensor {shape_of(tensor)}, spread over ranks; call this inside the forward of the module that "
            f"fully_shard was given, where it is whole, or pass {name}.full_tensor(); a weight that stays split by rows goes to "
            "linear_logprob_partials as weight.to_local()"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor; got {tensor.layout}; pass {name}.to_dense()")


def check_float(name: str, tensor: Tensor, dims: int) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be floating point (fp16, bf16, fp32, fp64); got {tensor.dtype}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions; got shape {shape_of(tensor)}")


def check_integer(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in INTEGERS:
        raise ValueError(f"{name} must be int64 or int32; got {tensor.dtype}")
    check_shape(name, tensor, shape)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}; got {shape_of(tensor)}")


def check_same_device(**tensors: Tensor | None) -> None:
    present = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(present.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"all tensors must be on one device; got {places}")


def check_same_dtype(**tensors: Tensor | None) -> None:
    present = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(present.values())) > 1:
        kinds = ", ".join(f"{name} {dtype}" for name, dtype in present.items())
        raise ValueError(f"dtypes must agree; got {kinds}; cast one of them")


def check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0; got {value!r}")


def check_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number; got {value!r}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def check_entropy_choice(value: bool | str) -> None:
    if not isinstance(value, bool) and value != "detached":
        raise ValueError(f"return_entropy must be True, False or 'detached'; got {value!r}")


def check_ignore_index(value: int, dtype: torch.dtype) -> None:
    """An int that targets of this dtype can hold; a larger one would be cut to its low bits and ignore another value."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"ignore_index must be an int; got {value!r}")
    limits = torch.iinfo(dtype)
    if not limits.min <= value <= limits.max:
        raise ValueError(f"ignore_index is {value}; {dtype} targets hold {limits.min} to {limits.max}")


def check_bias_under_softcap(bias: Tensor | None, softcap: float | None) -> None:
    """No -inf in a bias that a soft cap makes finite; reads a flag on the host."""
    if bias is None or softcap is None:
        return
    forbidden = bias.detach() == -math.inf
    if bool(forbidden.any()):
        raise ValueError(
            f"bias[{int(forbidden.nonzero()[0])}] is -inf, which softcap={softcap} turns into a score of {-softcap}: it forbids "
            "nothing. Leave such columns out of weight, or drop the softcap"
        )


def check_temperature_tensor(temperature: Tensor, num_targets: int) -> None:
    """Dtype and shape of a temperature per target."""
    check_tensor("temperature", temperature)
    if temperature.dtype not in FLOATS:
        raise ValueError(f"temperature must be a float or a floating point tensor [N]; got {temperature.dtype}")
    check_shape("temperature", temperature, (num_targets,))
    if temperature.requires_grad:
        raise ValueError("temperature gets no gradient here; pass temperature.detach()")


def check_temperature(temperature: float | Tensor, num_targets: int, kept: Tensor | None) -> None:
    """A finite number above 0, or a float tensor ``[N]`` of them. Entries of ignored targets are not looked at.

    kept: int64 indices of the targets that count, None for all. A tensor's values are read on the host.
    """
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return
    check_temperature_tensor(temperature, num_targets)
    seen = temperature.detach() if kept is None else temperature.detach().index_select(0, kept)
    bad = ~((seen > 0) & torch.isfinite(seen))
    if bool(bad.any()):
        n = int(bad.nonzero()[0])
        row = n if kept is None else int(kept[n])
        raise ValueError(f"temperature[{row}] is {float(seen[n])}; each must be a finite number above 0")


def kept_targets(target: Tensor, ignore_index: int, vocab_size: int | None) -> Tensor | None:
    """Indices of the targets that are not ``ignore_index`` (None when all count), each checked against ``[0, V)``.

    vocab_size: V, or None for no check.

    Reads a count on the host: on an accelerator this waits for the device.
    """
    keep = target != ignore_index
    if vocab_size is None:
        return None if bool(keep.all()) else keep.nonzero().squeeze(1)
    bad = keep & ((target < 0) | (target >= vocab_size))
    num_kept, num_bad = torch.stack([keep.sum(), bad.sum()]).tolist()
    if num_bad:
        n = int(bad.nonzero()[0])
        raise ValueError(
            f"target[{n}] is {int(target[n])}; targets are 0 to {vocab_size - 1}, or {ignore_index} (ignore_index)"
        )
    return None if num_kept == target.shape[0] else keep.nonzero().squeeze(1)


def check_rows(rows: Tensor, kept: Tensor | None, num_rows: int) -> None:
    """Entries of targets that count against ``[0, num_rows)``; reads a flag on the host."""
    seen = rows if kept is None else rows.index_select(0, kept)
    bad = (seen < 0) | (seen >= num_rows)
    if bool(bad.any()):
        n = int(bad.nonzero()[0])
        target = n if kept is None else int(kept[n])
        raise ValueError(
            f"rows[{target}] is {int(seen[n])}; hidden has rows 0 to {num_rows - 1} "
            "(a target without a predictor must be ignore_index)"
        )


def check_mask(mask: Tensor | None, num_tokens: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor [N]; got {getattr(mask, 'dtype', type(mask).__name__)}")
    check_shape("mask", mask, (num_tokens,))


def check_count(name: str, value: float | Tensor | None) -> float | None:
    """A number or 0-d tensor above 0, as a float; None stays None."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor; got shape {shape_of(value)}")
        value = float(value)
    check_positive(name, value)
    return float(value)


def refuse_second_derivative(op: str) -> None:
    """To call first in a backward. Autograd enables gradients there only under ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f'{op} is differentiable once; its gradient has no graph. Drop create_graph=True, or use backend="reference"'
        )

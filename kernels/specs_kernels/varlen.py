"""Variable-length attention of other libraries under one contract, and which of them runs here.

A call holds sequences packed in rows: queries ``[Tq, H, D]``, keys and values ``[Tk, Hkv, D]``; sequence s has query rows
``query_starts[s] : query_starts[s + 1]`` and key rows alike, none of them empty. A query sees all keys of its sequence, or with
``causal`` (as many keys as queries) those up to itself, and with a window W the last W of these. With natural logarithms::

    forward   out [Tq, H, D] in the inputs' dtype, lse [H, Tq] fp32
    backward  p_ij = exp(scale q_i . k_j - lse_i)      delta_i = dout_i . out_i      ds_ij = p_ij (dout_i . v_j - delta_i)
              dq_i = scale sum_j ds_ij k_j             dk_j = scale sum_i ds_ij q_i  dv_j = sum_i p_ij dout_i

The backward uses ``out`` and ``lse`` as they are given, whatever keys they were summed over: with those of a longer softmax its
results are that softmax's gradients through these keys.

"torch": ``aten::_flash_attention_forward`` and ``_backward``, what ``torch.nn.attention.varlen`` calls: FlashAttention-2, or what
    ``torch.nn.attention.activate_flash_attention_impl`` put in its place ("FA3", "FA4"). NVIDIA. The ops are private: their
    signatures are known for torch 2.11 to 2.13, other versions are refused.
"flash_attn": the package flash-attn, 2.7 and 2.8, NVIDIA and AMD (not its Triton kernels for AMD, which pass over a window in
    silence); taken where torch's cannot run.
"stand-in": the contract in plain PyTorch, on any device, slow; for tests, by :func:`use` alone.

Kernels of both libraries take fp16 and bf16, heads of at most 256 in multiples of 8, and sum in fp32; they round p and ds to the
inputs' dtype as operands, and with fewer key than query heads dk and dv of every query head before these are added up.
Where a score is NaN, out is NaN, and lse is NaN or, from FlashAttention-2, inf.
Deterministic backward: under ``torch.use_deterministic_algorithms(True)``; otherwise dq, at least, is summed by
atomics. Under ``warn_only=True`` torch's FlashAttention-2 warns and stays as it is.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specs_kernels.varlen_stand_in import stand_in_backward, stand_in_forward

MAX_HEAD_DIM = 256
HEAD_MULTIPLE = 8
MAX_SEQUENCES = 65535
"""Blocks of a grid in its second dimension."""


class Sequences(NamedTuple):
    """Which rows of a call belong together. The starts are int32 ``[n + 1]`` on the inputs' device, the longest on the host."""

    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int

    @property
    def number(self) -> int:
        return self.query_starts.shape[0] - 1


class Varlen(NamedTuple):
    """A library. forward(query, key, value, sequences, causal, scale, window) and
    backward(grad_out, query, key, value, out, lse, sequences, causal, scale, window) are those of the module's contract."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Sequences, bool, float, int | None], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    limited: bool
    """To what :func:`check_limits` says."""


_asked: str | None = None
"""By :func:`use`. A plain global: torch.compile, which traces the choice of a backend, does not know context variables."""


@contextmanager
def use(name: str) -> Iterator[None]:
    """Inside, "torch", "flash_attn" or "stand-in" is the library, or nothing is. For comparisons and tests."""
    global _asked
    if name not in _LIBRARIES:
        raise ValueError(f"no varlen library {name!r}; there are {', '.join(map(repr, _LIBRARIES))}")
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def missing(device: torch.device | str) -> str | None:
    """Why no library runs on this device; None when one does."""
    reasons = [lacks(name, device) for name in _candidates()]
    return None if None in reasons else "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def choose(device: torch.device | str) -> Varlen:
    """The library for tensors on this device. ValueError where there is none."""
    for name in _candidates():
        if lacks(name, device) is None:
            return _LIBRARIES[name]()
    raise ValueError(f"no varlen attention: {missing(device)}")


def lacks(name: str, device: torch.device | str) -> str | None:
    """Why this library cannot run on this device; None when it can."""
    kind = torch.device(device).type
    if name == "stand-in":
        return None
    if kind != "cuda":
        return f"varlen attention of torch and flash-attn runs on CUDA and ROCm tensors, not on {kind}"
    return _LACKS[name]


def check_limits(varlen: Varlen, query: Tensor, num_sequences: int) -> None:
    """ValueError for what the kernels do not take."""
    if not varlen.limited:
        return
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f'{varlen.name} takes fp16 and bf16; got {query.dtype}; cast, or use another backend, such as "chunked"'
        )
    head_dim = query.shape[2]
    if head_dim > MAX_HEAD_DIM or head_dim % HEAD_MULTIPLE:
        raise ValueError(
            f"{varlen.name} takes heads of at most {MAX_HEAD_DIM} in multiples of {HEAD_MULTIPLE}; query has {head_dim}; "
            'pad it, or use another backend, such as "chunked"'
        )
    if num_sequences > MAX_SEQUENCES:
        raise ValueError(
            f"{varlen.name} takes at most {MAX_SEQUENCES} sequences a call; the row has {num_sequences}; split the batch"
        )


def _candidates() -> tuple[str, ...]:
    """torch first: it is always there, and FlashAttention-3 can be put into it."""
    return ("torch", "flash_attn") if _asked is None else (_asked,)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _torch_lacks() -> str | None:
    if not (2, 11) <= _version(torch.__version__) <= (2, 13):
        return f"torch {torch.__version__}: the signatures of its private varlen ops are known for 2.11 to 2.13"
    if torch.version.hip is not None:
        return "torch's varlen attention is not used on ROCm: pip install flash-attn"
    if torch.version.cuda is not None and not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without flash attention"
    return None


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _flash_attn_lacks(version: str | None, amd_triton: str = "FALSE") -> str | None:
    if version is None:
        return "flash-attn is not installed: pip install flash-attn"
    if not (2, 7) <= _version(version) <= (2, 8):
        return f"flash-attn {version}: the signatures of its varlen functions are known for 2.7 and 2.8"
    if amd_triton == "TRUE":
        return "flash-attn's Triton kernels for AMD ignore a window: unset FLASH_ATTENTION_TRITON_AMD_ENABLE"
    return None


def _torch_forward(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        sequences.query_starts,
        sequences.key_starts,
        sequences.max_queries,
        sequences.max_keys,
        0.0,  # dropout
        causal,
        False,  # debug mask
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0 if causal else -1,
    )
    return out, _checked_lse(lse, query)


def _torch_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        sequences.query_starts,
        sequences.key_starts,
        sequences.max_queries,
        sequences.max_keys,
        0.0,  # dropout
        causal,
        no_dropout,
        torch.empty(0, device=query.device),
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0 if causal else -1,
    )
    return dq, dk, dv


def _flash_attn_forward(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    interface: Any = importlib.import_module("flash_attn.flash_attn_interface")
    out, lse, *_ = interface._wrapped_flash_attn_varlen_forward(
        q=query,
        k=key,
        v=value,
        **_flash_attn_sequences(sequences),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=-1 if window is None else 0,
    )
    return out, _checked_lse(lse, query)


def _flash_attn_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    interface: Any = importlib.import_module("flash_attn.flash_attn_interface")
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    interface._wrapped_flash_attn_varlen_backward(
        dout=grad_out,
        q=query,
        k=key,
        v=value,
        out=out,
        softmax_lse=lse,
        dq=grads[0],
        dk=grads[1],
        dv=grads[2],
        **_flash_attn_sequences(sequences),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=-1 if window is None else 0,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads


def _flash_attn_sequences(sequences: Sequences) -> dict[str, Tensor | int]:
    return {
        "cu_seqlens_q": sequences.query_starts,
        "cu_seqlens_k": sequences.key_starts,
        "max_seqlen_q": sequences.max_queries,
        "max_seqlen_k": sequences.max_keys,
    }


def _checked_lse(lse: Tensor, query: Tensor) -> Tensor:
    """Builds differ in the layout of the log-sum-exp; a wrong one would merge, quietly, into nonsense."""
    expected = (query.shape[1], query.shape[0])
    if lse.shape != expected or lse.dtype != torch.float32:
        raise RuntimeError(
            f"varlen attention returned a log-sum-exp {lse.dtype} {list(lse.shape)} where float32 {list(expected)} [H, Tq] is "
            'known; use another backend, such as "triton", and report the version of the library'
        )
    return lse


_FLASH_ATTN = _installed("flash_attn")
_AMD_TRITON = os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE", "FALSE")
"""flash-attn reads it once, too, when imported."""
_LACKS = {"torch": _torch_lacks(), "flash_attn": _flash_attn_lacks(_FLASH_ATTN, _AMD_TRITON)}
"""What keeps each from running on a GPU."""
_LIBRARIES: dict[str, Callable[[], Varlen]] = {
    "torch": lambda: Varlen(f"varlen attention of torch {torch.__version__}", _torch_forward, _torch_backward, True),
    "flash_attn": lambda: Varlen(
        f"varlen attention of flash-attn {_FLASH_ATTN}", _flash_attn_forward, _flash_attn_backward, True
    ),
    "stand-in": lambda: Varlen("the stand-in for varlen attention", stand_in_forward, stand_in_backward, False),
}

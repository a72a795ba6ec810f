"""Which backend runs an op, and why. The one place that knows.

``backend="auto"`` may choose and can say what it chose (:func:`choose`, :func:`describe`); a backend named by the
caller runs or raises.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from specs_kernels import native, varlen

_DEFINITION = "the definition in plain PyTorch; dense, for tests and as fallback by name"
_CHUNKED = "plain PyTorch with bounded memory; runs on every device"
_VECTOR_LOSS = "the loss works on [N] vectors, so its definition is already cheap"
_NATIVE_LINEAR = (
    "C++, GEMMs fused with the statistics so that scores stay in the first-level cache, SIMD chosen at run time, bfloat16 dot "
    "products where the processor has them"
)
_NATIVE_LOGITS = "C++, one read forward, one read and one write backward, SIMD chosen at run time"
_TRITON = "Triton kernels for NVIDIA and AMD GPUs; under TRITON_INTERPRET=1 they also run, interpreted, on CPU tensors"
_NATIVE_ATTENTION = "C++ flash kernel with SIMD chosen at run time; cost follows the visible pairs"
_CASCADE = "pieces of varlen attention, merged by log-sum-exp"
_LAYER = "the definition in plain PyTorch; runs on every device"
_NATIVE_LAYER = "C++, one pass over memory each way, SIMD chosen at run time"

_BACKENDS: dict[str, dict[str, str]] = {
    "linear_logprob": {"reference": _DEFINITION, "chunked": _CHUNKED, "native": _NATIVE_LINEAR, "triton": _TRITON},
    "linear_loss": {"reference": _DEFINITION, "chunked": _CHUNKED, "native": _NATIVE_LINEAR, "triton": _TRITON},
    "selective_logprob": {"reference": _DEFINITION, "chunked": _CHUNKED, "native": _NATIVE_LOGITS, "triton": _TRITON},
    "packed_attention": {
        "reference": _DEFINITION,
        "chunked": _CHUNKED,
        "native": _NATIVE_ATTENTION,
        "triton": _TRITON,
        "cascade": _CASCADE,
    },
    "rms_norm": {"reference": _LAYER, "native": _NATIVE_LAYER},
    "swiglu": {"reference": _LAYER, "native": _NATIVE_LAYER},
    "preference_loss": {"reference": _VECTOR_LOSS},
    "policy_loss": {"reference": _VECTOR_LOSS},
}
_PREFERENCE = ("native", "chunked", "reference")
"""What "auto" takes, best first, among the backends that can run."""


@dataclass(frozen=True)
class Choice:
    """Which backend runs ``op``, and why."""

    op: str
    backend: str
    reason: str


def ops() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(_BACKENDS)


def unavailable(backend: str, device: torch.device | str = "cpu") -> str | None:
    """Why this backend cannot run on this device; None when it can."""
    kind = torch.device(device).type
    if backend == "triton":
        return _triton_missing(kind)
    if backend == "cascade":
        return varlen.missing(device)
    if backend == "native":
        if kind != "cpu":
            return f"the native backend runs on CPU tensors, not on {kind}"
        return native.missing()
    return None


def _triton_missing(kind: str) -> str | None:
    if not _installed("triton"):
        return "Triton is not installed: pip install triton"
    if kind in ("cuda", "meta"):
        return None
    if kind != "cpu":
        return f"the triton backend runs on CUDA and ROCm tensors, not on {kind}"
    language: Any = sys.modules.get("triton.language")
    early = language is None or type(language.sum).__name__ == "InterpretedFunction"
    if os.environ.get("TRITON_INTERPRET") == "1" and early:
        return None
    return "Triton kernels run on CPU tensors only interpreted: set TRITON_INTERPRET=1 before Triton is imported"


@cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def backends(op: str, device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names of the backends that can run ``op`` on this device."""
    if op not in _BACKENDS:
        raise ValueError(f"unknown op {op!r}; ops: {', '.join(_BACKENDS)}")
    return tuple(name for name in _BACKENDS[op] if unavailable(name, device) is None)


def choose(op: str, backend: str = "auto", device: torch.device | str = "cpu") -> Choice:
    """The backend that ``op`` runs on for tensors on ``device`` when asked for ``backend``.

    Raises ValueError for a backend that does not exist or cannot run this op here; it never falls back.
    """
    available = backends(op, device)
    if backend == "auto":
        name = next(candidate for candidate in _PREFERENCE if candidate in available)
        return Choice(op, name, f"auto: {_BACKENDS[op][name]}{_passed_over(op, name, device)}")
    if backend not in available:
        allowed = ", ".join(repr(name) for name in ("auto", *available))
        known = isinstance(backend, str) and backend in _BACKENDS[op]
        reason = f" ({unavailable(backend, device)})" if known else ""
        raise ValueError(f"{op} has no backend {backend!r} here{reason}; allowed: {allowed}")
    pieces = f" ({varlen.choose(device).name})" if backend == "cascade" else ""
    return Choice(op, backend, f"asked for by name: {_BACKENDS[op][backend]}{pieces}")


def _passed_over(op: str, chosen: str, device: torch.device | str) -> str:
    """What "auto" would rather have taken, and what it lacks."""
    better = _PREFERENCE[: _PREFERENCE.index(chosen)]
    reasons = [unavailable(name, device) for name in better if name in _BACKENDS[op]]
    if torch.device(device).type == "cuda":
        for name in (name for name in ("triton", "cascade") if name in _BACKENDS[op]):
            unmeasured = f"{name} runs by name; auto does not take it before it is measured on a GPU"
            reasons.append(unavailable(name, device) or unmeasured)
    return "".join(f"; {reason}" for reason in reasons if reason)


def describe(device: torch.device | str = "cpu") -> tuple[Choice, ...]:
    """What ``backend="auto"`` chooses for every op on this device, and why."""
    return tuple(choose(op, device=device) for op in _BACKENDS)

"""Which backend runs an op, and why. The one place that knows.

``backend="auto"`` may choose and can say what it chose (:func:`choose`, :func:`describe`); a backend named by the
caller runs or raises.
"""

from __future__ import annotations

from dataclasses import dataclass

_DEFINITION = "the definition in plain PyTorch; dense, for tests and as fallback by name"
_CHUNKED = "plain PyTorch with bounded memory; runs on every device"
_VECTOR_LOSS = "the loss works on [N] vectors, so its definition is already cheap"

_BACKENDS: dict[str, dict[str, str]] = {
    "linear_logprob": {"reference": _DEFINITION, "chunked": _CHUNKED},
    "selective_logprob": {"reference": _DEFINITION, "chunked": _CHUNKED},
    "packed_attention": {"reference": _DEFINITION, "chunked": _CHUNKED},
    "preference_loss": {"reference": _VECTOR_LOSS},
    "policy_loss": {"reference": _VECTOR_LOSS},
}
_PREFERENCE = ("chunked", "reference")


@dataclass(frozen=True)
class Choice:
    """Which backend runs ``op``, and why."""

    op: str
    backend: str
    reason: str


def ops() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(_BACKENDS)


def backends(op: str) -> tuple[str, ...]:
    """Names of the backends that can run ``op`` here."""
    if op not in _BACKENDS:
        raise ValueError(f"unknown op {op!r}; ops: {', '.join(_BACKENDS)}")
    return tuple(_BACKENDS[op])


def choose(op: str, backend: str = "auto") -> Choice:
    """The backend that ``op`` runs on when asked for ``backend``.

    Raises ValueError for a backend that does not exist or cannot run this op; it never falls back.
    """
    available = backends(op)
    if backend == "auto":
        name = next(candidate for candidate in _PREFERENCE if candidate in available)
        return Choice(op, name, f"auto: {_BACKENDS[op][name]}")
    if backend not in available:
        allowed = ", ".join(repr(name) for name in ("auto", *available))
        raise ValueError(f"{op} has no backend {backend!r} here; allowed: {allowed}")
    return Choice(op, backend, f"asked for by name: {_BACKENDS[op][backend]}")


def describe() -> tuple[Choice, ...]:
    """What ``backend="auto"`` chooses for every op, and why."""
    return tuple(choose(op) for op in _BACKENDS)

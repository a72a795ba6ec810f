"""Which work a call of ``linear_logprob`` does, and what it costs. One score GEMM is 2 NDV FLOP."""

from __future__ import annotations

from typing import NamedTuple

MODES = ("auto", "forward", "recompute", "cache", "frozen")
KEPT_BYTES = 64 << 20
"""Scores of this size or less are kept for the backward even when no cache was asked for."""


class Mode(NamedTuple):
    """name: one of ``MODES`` but "auto". flop: multiple of N D V, forward and backward. reason: why. cached_rows: targets
    whose scores are kept. full_precision: whether they are kept in the arithmetic dtype (else in that of the inputs)."""

    name: str
    flop: float
    reason: str
    cached_rows: int = 0
    full_precision: bool = True


def choose_mode(
    num_targets: int,
    vocab_size: int,
    *,
    hidden_grad: bool,
    weight_grad: bool,
    other_grad: bool = False,
    entropy_grad: bool = False,
    mode: str = "auto",
    logit_cache_bytes: int = 0,
    compact: bool = False,
    score_bytes: int = 4,
    kept_bytes: int = 4,
    row_block: int = 1,
) -> Mode:
    """The mode that ``linear_logprob`` runs with these arguments.

    hidden_grad, weight_grad, other_grad: whether hidden, the weight, a bias or ``lora`` get a gradient. entropy_grad: whether
    the entropy is returned with one. score_bytes, kept_bytes: size of a score in the arithmetic dtype, and where it is kept
    on request.
    row_block: rows are cached in multiples of it, or all.

    Raises ValueError for an unknown mode and for arguments that do not combine.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed: {', '.join(repr(name) for name in MODES)}")
    if isinstance(logit_cache_bytes, bool) or not isinstance(logit_cache_bytes, int) or logit_cache_bytes < 0:
        raise ValueError(f"logit_cache_bytes must be an int of at least 0; got {logit_cache_bytes!r}")
    if logit_cache_bytes and mode not in ("auto", "cache"):
        raise ValueError(
            f"mode={mode!r} keeps no scores; drop logit_cache_bytes={logit_cache_bytes} or use mode='cache'"
        )
    if mode == "cache" and not logit_cache_bytes:
        raise ValueError("mode='cache' needs logit_cache_bytes, a number of bytes above 0; got 0")
    if mode == "frozen" and compact:
        raise ValueError("mode='frozen' has no work to skip in its backward; drop compact=True or use mode='recompute'")
    head_grad = weight_grad or other_grad
    if mode == "frozen" and head_grad:
        what = "weight" if weight_grad else "bias or lora"
        raise ValueError(
            f"mode='frozen' gives no gradient to the head but {what} requires one; detach it or use another mode"
        )
    if not (hidden_grad or head_grad):
        return Mode("forward", 2.0, "no input requires a gradient")
    if mode == "forward":
        raise ValueError("mode='forward' passes no gradient but an input requires one; call it under torch.no_grad()")

    def training(name: str, reason: str, cached_rows: int = 0, full_precision: bool = True) -> Mode:
        fraction = cached_rows / num_targets if cached_rows else 0.0
        flop = 2.0 + 2.0 * (1.0 - fraction) + 2.0 * hidden_grad + 2.0 * weight_grad
        return Mode(name, flop, reason, cached_rows, full_precision)

    frozen_flop = 6.0 if entropy_grad else 4.0
    if mode == "frozen":
        return Mode("frozen", frozen_flop, "asked for by name")
    if mode == "recompute":
        return training("recompute", "asked for by name")
    if logit_cache_bytes:
        rows = logit_cache_bytes // (vocab_size * kept_bytes)
        rows = rows if rows >= num_targets else rows // row_block * row_block
        if rows >= num_targets:
            return training("cache", "all scores fit logit_cache_bytes", num_targets, kept_bytes == score_bytes)
        if rows:
            return training("cache", f"scores of {rows} targets fit logit_cache_bytes", rows, kept_bytes == score_bytes)
        if mode == "cache":
            raise ValueError(
                f"logit_cache_bytes={logit_cache_bytes} holds no block of scores; {row_block} targets take "
                f"{row_block * vocab_size * kept_bytes} bytes"
            )
    elif num_targets * vocab_size * score_bytes <= KEPT_BYTES:
        return training("cache", f"all scores fit {KEPT_BYTES >> 20} MiB", num_targets)
    if not head_grad and not entropy_grad and not compact:
        return Mode("frozen", frozen_flop, "only hidden requires a gradient")
    return training("recompute", "scores are formed again in the backward")

"""``linear_logprob`` in plain PyTorch with bounded memory.

Scores are formed in tiles of at most ``TILE_BYTES`` (a tile and one temporary of its size live at a time), fp32 (fp64
for fp64 inputs), half-precision operands upcast tile by tile. Targets equal to ``ignore_index`` are dropped first, so
they cost nothing.

* All scores fit one tile: the forward keeps it (shifted by the row maximum) for the backward, 6NDV in all.
* Otherwise: the forward keeps three numbers per target, the backward recomputes each tile, 8NDV in all. Vocabulary
  tiles are the outer loop, so every row of the weight's gradient is summed in one buffer of a tile's rows and rounded
  once.

Tile sizes depend on shapes and dtype only, sums run in a fixed order, and there are no atomics: results are
deterministic.

Letters: N targets, M targets that count, T rows of hidden, D hidden size, V vocabulary, R rows and C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.results import TokenLogprobs
from specs_kernels.softmax import RunningSoftmax, accumulation_dtype, dscores_

TILE_BYTES = 64 << 20
TILE_ROWS = 2048
"""Rows of a tile when the scores do not fit one."""


@dataclass(frozen=True)
class _Head:
    """The map from hidden states to scores: ``softcap(scale * hidden @ weight.T + bias) / temperature``."""

    weight_VD: Tensor
    bias_V: Tensor | None
    temperature_M: Tensor | None
    temperature: float
    softcap: float | None
    scale: float
    dtype: torch.dtype

    def scores(self, hidden_RD: Tensor, rows: slice, columns: slice) -> Tensor:
        weight_CD = self.weight_VD[columns].to(self.dtype)
        bias_C = None if self.bias_V is None else self.bias_V[columns].to(self.dtype)
        # Without a softcap the temperature is one more factor of the product and costs no pass.
        early = 1.0 if self.softcap is not None else 1.0 / self.temperature
        if bias_C is None:
            nothing = hidden_RD.new_empty(1)
            z_RC = torch.addmm(nothing, hidden_RD, weight_CD.T, beta=0, alpha=self.scale * early)
        else:
            z_RC = torch.addmm(bias_C, hidden_RD, weight_CD.T, beta=early, alpha=self.scale * early)
        if self.softcap is not None:
            z_RC.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        if self.temperature_M is not None:
            z_RC.div_(self.temperature_M[rows, None])
        return z_RC

    def per_logit(self, grad_M: Tensor | None) -> Tensor | None:
        """An upstream gradient divided by the temperature: the temperature's whole part in the chain rule."""
        if grad_M is None:
            return None
        return grad_M / (self.temperature if self.temperature_M is None else self.temperature_M)

    def softcap_slope(self, z_RC: Tensor, rows: slice) -> Tensor:
        """d softcap(x) / dx = 1 - tanh(x / cap)^2 from z; overwrites z."""
        assert self.softcap is not None
        if self.temperature_M is not None:
            z_RC.mul_(self.temperature_M[rows, None])
        tanh = z_RC.mul_(self.temperature / self.softcap)
        return torch.addcmul(torch.ones((), dtype=tanh.dtype, device=tanh.device), tanh, tanh, value=-1)

    @property
    def maybe_minus_inf(self) -> bool:
        """Only a bias can forbid a column."""
        return self.bias_V is not None


def _tile_sizes(num_targets: int, vocab_size: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a tile: everything when it fits, else ``TILE_ROWS`` rows by what the budget leaves."""
    budget = max(1, TILE_BYTES // itemsize)
    if num_targets * vocab_size <= budget:
        return max(1, num_targets), vocab_size
    rows = min(num_targets, TILE_ROWS, budget)
    columns = min(vocab_size, max(1, budget // rows))
    if columns == vocab_size:
        rows = min(num_targets, budget // vocab_size)
    return rows, columns


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _rows_of(vector: Tensor | None, rows: slice) -> Tensor | None:
    return None if vector is None else vector[rows]


class _Statistics(NamedTuple):
    """Per kept target: its score z, and m, log s and t / s of its row (``softmax.py``)."""

    z_target: Tensor
    maximum: Tensor
    log_total: Tensor
    mean: Tensor | None


def _statistics(
    head: _Head,
    hidden_MD: Tensor,
    target_M: Tensor,
    tile_sizes: tuple[int, int],
    want_entropy: bool,
    keep_scores: bool,
) -> tuple[_Statistics, Tensor | None]:
    """Statistics of all rows; with ``keep_scores`` also the only tile's z - m."""
    row_size, column_size = tile_sizes
    num_kept, vocab_size = target_M.shape[0], head.weight_VD.shape[0]
    parts = [torch.empty(num_kept, dtype=head.dtype, device=hidden_MD.device) for _ in range(3 + want_entropy)]
    shifted: Tensor | None = None
    for rows in _slices(num_kept, row_size):
        hidden_RD = hidden_MD[rows].to(head.dtype)
        running = RunningSoftmax(want_entropy)
        for columns in _slices(vocab_size, column_size):
            z_RC = head.scores(hidden_RD, rows, columns)
            column_R = target_M[rows] - columns.start
            if column_size == vocab_size:
                parts[0][rows] = z_RC.gather(1, column_R[:, None]).squeeze(1)
            else:
                inside = (column_R >= 0) & (column_R < z_RC.shape[1])
                found = z_RC.gather(1, torch.where(inside, column_R, 0)[:, None]).squeeze(1)
                parts[0][rows] = torch.where(inside, found, parts[0][rows])
            z_RC = running.update_(z_RC, head.maybe_minus_inf)
            if keep_scores:
                shifted = z_RC
        for part, values in zip(parts[1:], running.finish(), strict=False):
            part[rows] = values
    return _Statistics(parts[0], parts[1], parts[2], parts[3] if want_entropy else None), shifted


class _LinearLogprob(torch.autograd.Function):
    """hidden ``[T, D]`` -> logp, entropy, lse ``[N]``; source ``[M]`` names the hidden row of each kept target."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature_M: Tensor | None,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        return_entropy: bool,
        source: Tensor | None,
        kept: Tensor | None,
        keep_scores: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        dtype = accumulation_dtype(hidden.dtype)
        num_targets = target.shape[0]
        target_M = (target if kept is None else target.index_select(0, kept)).long()
        hidden_MD = hidden if source is None else hidden.index_select(0, source)
        head = _Head(weight, bias, temperature_M, temperature, softcap, logit_scale, dtype)
        vocab_size = weight.shape[0]
        row_size, column_size = _tile_sizes(target_M.shape[0], vocab_size, dtype.itemsize)
        one_tile = row_size >= target_M.shape[0] and column_size == vocab_size

        statistics, shifted = _statistics(
            head, hidden_MD, target_M, (row_size, column_size), return_entropy, one_tile and keep_scores
        )
        zeros = torch.zeros(num_targets, dtype=dtype, device=hidden.device)

        def spread(values_M: Tensor) -> Tensor:
            return values_M if kept is None else zeros.index_copy(0, kept, values_M)

        logp = spread((statistics.z_target - statistics.maximum) - statistics.log_total)
        entropy = None if statistics.mean is None else spread(statistics.log_total - statistics.mean)
        lse = spread(statistics.maximum + statistics.log_total)

        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, target_M, temperature_M, source, kept, shifted, *statistics)
        ctx.head_arguments = (temperature, softcap, logit_scale, dtype)
        ctx.tile_sizes = (row_size, column_size)
        return logp, entropy, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("linear_logprob")
        hidden, weight, bias, target_M, temperature_M, source, kept, shifted, *statistics = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * 12
        head = _Head(weight, bias, temperature_M, *ctx.head_arguments)
        with torch.autocast(hidden.device.type, enabled=False):
            grad_hidden, grad_weight, grad_bias = _backward(
                head,
                hidden,
                target_M,
                source,
                tuple(g if g is None or kept is None else g.index_select(0, kept) for g in grads),
                _Statistics(*statistics),
                shifted,
                ctx.tile_sizes,
                ctx.needs_input_grad[:3],
            )
        return (grad_hidden, grad_weight, grad_bias) + (None,) * 9


def _backward(
    head: _Head,
    hidden: Tensor,
    target_M: Tensor,
    source: Tensor | None,
    grads: tuple[Tensor | None, ...],
    statistics: _Statistics,
    shifted: Tensor | None,
    tile_sizes: tuple[int, int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias."""
    need_hidden, need_weight, need_bias = needs
    grad_logp, grad_entropy, grad_lse = (head.per_logit(grad) for grad in grads)
    row_size, column_size = tile_sizes
    weight, dtype = head.weight_VD, head.dtype
    num_kept, vocab_size = target_M.shape[0], weight.shape[0]
    hidden_MD = hidden if source is None else hidden.index_select(0, source)
    dhidden_MD = torch.empty(num_kept, hidden.shape[1], dtype=dtype, device=hidden.device) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = torch.empty_like(head.bias_V) if need_bias and head.bias_V is not None else None
    for columns in _slices(vocab_size, column_size):
        weight_CD = weight[columns].to(dtype) if need_hidden else None
        dweight_CD: Tensor | None = None
        dbias_C: Tensor | None = None
        for rows in _slices(num_kept, row_size):
            hidden_RD = hidden_MD[rows].to(dtype)
            if shifted is None:
                z_RC = head.scores(hidden_RD, rows, columns).sub_(statistics.maximum[rows, None])
            else:
                z_RC = shifted
            dz_RC = dscores_(
                z_RC,
                statistics.log_total[rows],
                _rows_of(statistics.mean, rows),
                target_M[rows] - columns.start,
                _rows_of(grad_logp, rows),
                _rows_of(grad_entropy, rows),
                _rows_of(grad_lse, rows),
                head.maybe_minus_inf,
            )
            if head.softcap is not None:
                dz_RC.mul_(head.softcap_slope(z_RC + statistics.maximum[rows, None], rows))
            if dhidden_MD is not None and weight_CD is not None:
                beta = 0 if columns.start == 0 else 1
                dhidden_MD[rows].addmm_(dz_RC, weight_CD, beta=beta, alpha=head.scale)
            if grad_weight is not None:
                if dweight_CD is None:
                    dweight_CD = torch.mm(dz_RC.T, hidden_RD)
                else:
                    dweight_CD.addmm_(dz_RC.T, hidden_RD)
            if grad_bias is not None:
                dbias_C = dz_RC.sum(0) if dbias_C is None else dbias_C + dz_RC.sum(0)
        if grad_weight is not None:
            if dweight_CD is None:
                grad_weight[columns].zero_()
            else:
                grad_weight[columns] = dweight_CD.mul_(head.scale) if head.scale != 1.0 else dweight_CD
        if grad_bias is not None:
            grad_bias[columns] = 0.0 if dbias_C is None else dbias_C
    grad_hidden = None if dhidden_MD is None else _scatter_rows(dhidden_MD, hidden, source)
    return grad_hidden, grad_weight, grad_bias


def _scatter_rows(dhidden_MD: Tensor, hidden: Tensor, source: Tensor | None) -> Tensor:
    """Sum the gradients of targets that share a hidden row, in target order, and round once."""
    if source is None:
        return dhidden_MD.to(hidden.dtype)
    grad = torch.zeros(hidden.shape, dtype=dhidden_MD.dtype, device=hidden.device)
    if hidden.device.type == "cpu":
        grad.index_add_(0, source, dhidden_MD)  # sequential over the index on CPU
    else:
        grad.index_put_((source,), dhidden_MD, accumulate=True)  # sorted by index on CUDA; index_add_ uses atomics
    return grad.to(hidden.dtype)


def linear_logprob_chunked(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    return_entropy: bool,
    rows: Tensor | None,
    kept: Tensor | None,
) -> TokenLogprobs:
    """See :func:`specs_kernels.linear_logprob`. ``kept``: indices of the targets that count, None for all."""
    temperature_M: Tensor | None = None
    if isinstance(temperature, Tensor):
        temperature_M = temperature.detach().to(accumulation_dtype(hidden.dtype))
        temperature_M = temperature_M if kept is None else temperature_M.index_select(0, kept)
        temperature = 1.0
    if rows is None:
        source = kept
    else:
        source = (rows if kept is None else rows.index_select(0, kept)).long()
    keep_scores = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    return TokenLogprobs(
        *_LinearLogprob.apply(
            hidden,
            weight,
            bias,
            target,
            temperature_M,
            float(temperature),
            softcap,
            float(logit_scale),
            return_entropy,
            source,
            kept,
            keep_scores,
        )
    )

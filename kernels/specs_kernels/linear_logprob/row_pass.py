"""The interface between the GEMM loops of ``linear_logprob`` and what a backend does to the scores between two GEMMs.

The loops (``forward.py``, ``backward.py``) form tiles of products ``x = factor * hidden @ weight.T`` with the GEMM library and
hand each tile to a :class:`RowPass`: one sweep over the tile that updates the softmax statistics of its rows, or turns it into
the gradient of the products. A backend replaces these sweeps (plain PyTorch in ``chunked.py``), loops and GEMMs as well where
it has fused kernels (``native.py``), or some of both (``triton.py``). ``selective_logprob`` has its own sweeps.

A row with products x_j has the scores::

    z_j = softcap(x_j + bias_j) * inverse_temperature        softcap(y) = cap * tanh(y / cap), or y

and the statistics m = max z, s = sum exp(z - m), t = sum exp(z - m) (z - m), over the columns seen so far. For upstream
gradients g (log-prob), q (entropy), r (log-sum-exp)::

    dz_j = p_j [base - q (z_j - m)] + g 1[j = target]        p_j = exp((z_j - m) - log s)      base = (r - g) + q t / s
    dx_j = dz_j * inverse_temperature * slope_j              slope_j = 1 - tanh((x_j + bias_j) / cap)^2, or 1

Rules every pass keeps. Arithmetic in fp32 (fp64 where x is fp64); the target column's gradient is summed before any
rounding. A row's result depends on its own values only, not on its place or on the number of rows. A column with
z = -inf has p = 0, adds nothing to t and gets dx = 0. A NaN row gives NaN in its own row only. Nothing is
synchronised with the host and no atomics are used.

Letters: M targets, R rows and C columns of one tile, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from specs_kernels.linear_logprob.backward import Gradients
    from specs_kernels.linear_logprob.forward import Cache
    from specs_kernels.linear_logprob.head import Head, Rows

NO_TARGET = -1
"""In a target vector: the row counts, and its target is in none of the columns (another slice of the vocabulary has it)."""
SKIP_ROW = -2
"""In a target vector: the row does not count. Its state is undefined afterwards (nobody reads it) and its dx is 0."""


@dataclass(frozen=True, slots=True)
class Transform:
    """From products to scores, cut to one tile.

    bias_C: ``[C]`` in the arithmetic dtype, or None; may hold -inf. softcap: number above 0 or None.
    inverse_temperature: a number, or ``[R]`` in the arithmetic dtype. Where it is 1.0 it costs nothing: without a softcap a
    scalar temperature is folded into the GEMM's factor and into the bias.
    maybe_minus_inf: some x or bias may be -inf; where False a pass may leave out the tests for it.
    """

    bias_C: Tensor | None
    softcap: float | None
    inverse_temperature: float | Tensor
    maybe_minus_inf: bool


@dataclass(frozen=True, slots=True)
class RowState:
    """Running statistics, each contiguous ``[R]`` in the arithmetic dtype, updated in place.

    maximum, total, weighted: m, s and t above; weighted is None when the entropy is not wanted. target: z of the
    target column. Before the first tile of a row (``first == 0``) the values are undefined, but target is 0.
    Always finite: a row that has seen only -inf holds maximum = the lowest finite number and total = 0.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor | None
    target: Tensor

    def rows(self, rows: slice) -> RowState:
        weighted = None if self.weighted is None else self.weighted[rows]
        return RowState(self.maximum[rows], self.total[rows], weighted, self.target[rows])


@dataclass(frozen=True, slots=True)
class RowGradients:
    """What the gradient of a row's products needs, each contiguous ``[R]`` in the arithmetic dtype.

    maximum: m. log_total: log s. base: ``(r - g) + q t / s``, 0 where a row passes no gradient. entropy: q, or None when
    the entropy passes no gradient. target: g, or None when the log-prob passes none.
    """

    maximum: Tensor
    log_total: Tensor
    base: Tensor
    entropy: Tensor | None
    target: Tensor | None

    def rows(self, rows: slice) -> RowGradients:
        entropy = None if self.entropy is None else self.entropy[rows]
        target = None if self.target is None else self.target[rows]
        return RowGradients(self.maximum[rows], self.log_total[rows], self.base[rows], entropy, target)


_NO_SWEEPS = "this backend is fused throughout: it has no sweeps"


class RowPass:
    """What a backend does to the scores: three fused passes, or the sweeps between the GEMMs of the loops.

    The loops ask for a fused pass first and go on with sweeps where it returns False, as it does unless a backend has one; a
    backend whose fused passes serve every call has no sweeps. An instance serves one call of an op and may hold workspace.
    In every sweep:

    x_RC: ``[R, C]``, unit stride along C, any stride along R (64-bit); fp32 or fp64, half precision only with offset_R.
    target_R: int64 ``[R]``, column of the target in the whole vocabulary slice, or NO_TARGET, or SKIP_ROW. The target is in
        this tile iff ``first <= target < first + C``.
    first: index of the tile's first column. Tiles of a row come in order, the first with ``first == 0``.
    scratch: whether x may be overwritten; False means x is only read (unless it is also passed as an output).
    """

    def statistics(self, rows: Rows, head: Head, target_M: Tensor, state: RowState, cache: Cache | None) -> bool:
        """A fused forward: fill ``state`` of all rows, and the cache where there is one, or return False and do nothing.

        What it leaves in a cache is its own affair: only its own :meth:`gradients` reads it.
        """
        return False

    def sums(self, rows: Rows, head: Head, target_M: Tensor, state: RowState, sums: list[Tensor]) -> bool:
        """A fused forward of the frozen head: ``state`` of all rows, and in ``sums`` (one or two, ``[M, D + K]``, unset) those
        over all columns but the target's of ``exp(z - m) slope W`` and of that times ``z - m``; or False."""
        return False

    def gradients(
        self,
        rows: Rows,
        head: Head,
        target_M: Tensor,
        gradients_M: RowGradients,
        into: Gradients,
        low_grad_MK: Tensor | None,
        cache: Cache | None,
        cache_rows: Tensor | None,
    ) -> bool:
        """A fused backward: fill all of ``into`` but lora_A (and ``low_grad_MK``, the gradient of ``rows.low_MK``), or False."""
        return False

    def stats(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        state: RowState,
        *,
        keep_RC: Tensor | None = None,
        scratch: bool = True,
    ) -> Tensor | None:
        """Take the tile into ``state``.

        keep_RC: ``[R, C]``, any float dtype, where the tile is left for a later :meth:`dscores`; may be x itself. Either the
        products (return None; only where keep has the dtype of x) or ``z - offset`` with one offset per row (return it,
        ``[R]``), which in a lower dtype keeps the rounding error small near the maximum.
        """
        raise NotImplementedError(_NO_SWEEPS)

    def stats_exp(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        state: RowState,
        exp_RC: Tensor,
        weighted_RC: Tensor | None,
    ) -> Tensor:
        """As :meth:`stats`, and leave the tile's unnormalised weights behind; x is scratch and may be one of the outputs.

        With m the maximum after this tile, ``exp_RC`` gets ``exp(z - m) * slope`` and ``weighted_RC`` (where wanted)
        ``exp(z - m) * slope * (z - m)``, both 0 in the target column. Outputs may be fp16 or bf16.

        Returns ``[R]``: maximum before this tile minus m (at most 0; anything finite or -inf on a row's first tile), by
        whose exponential sums over earlier tiles are rescaled.
        """
        raise NotImplementedError(_NO_SWEEPS)

    def dscores(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        gradients: RowGradients,
        dx_RC: Tensor,
        *,
        offset_R: Tensor | None = None,
        scratch: bool = True,
    ) -> None:
        """Write dx, rounded once to the dtype of ``dx_RC``, which may be x itself.

        offset_R: not None when x holds ``z - offset`` as left by :meth:`stats`; x may then be fp16 or bf16.
        """
        raise NotImplementedError(_NO_SWEEPS)

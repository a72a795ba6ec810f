"""The row pass in plain PyTorch: runs on every device that PyTorch runs on. See ``row_pass.py`` for what each sweep computes.

Letters: R rows and C columns of one tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specs_kernels.linear_logprob.row_pass import RowGradients, RowPass, RowState, Transform

_FLOOR = -1e5
"""Stands in for z - m = -inf where it meets a factor exp(z - m) = 0: their product is 0, not NaN."""

_LOG2E = math.log2(math.e)


def _exp(values: Tensor, out: Tensor) -> Tensor:
    """exp by way of exp2, which PyTorch computes in a third of the time on CPU. For gradients only.

    The product rounds once, so a weight exp(y) is off by ``|y| eps`` of itself: nothing where weights are large. PyTorch's exp2
    gives other last bits at the end of a buffer than in its middle, which its exp does not; hence not in the forward.
    """
    return torch.mul(values, _LOG2E, out=out).exp2_()


class TorchRowPass(RowPass):
    """Tiles are overwritten in place; one more buffer of a tile's size lives as long as this object."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def _temporary(self, like: Tensor) -> Tensor:
        if self._buffer is None or self._buffer.numel() < like.numel():
            self._buffer = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return self._buffer[: like.numel()].view(like.shape)

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
        z_RC = _scores(x_RC if scratch else x_RC.clone(), transform)
        maximum, change = _update(z_RC, target_R, first, transform, state)
        z_RC.sub_(maximum[:, None])
        exp = torch.exp(z_RC, out=self._temporary(z_RC))
        total = exp.sum(1)
        weighted = None
        if state.weighted is not None:
            factor = z_RC.clamp(min=_FLOOR) if transform.maybe_minus_inf else z_RC
            weighted = exp.mul_(factor).sum(1)
        _merge(state, first, maximum, change, total, weighted)
        if keep_RC is None:
            return None
        if keep_RC is not z_RC:
            keep_RC.copy_(z_RC)
        return maximum

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
        z_RC = _scores(x_RC, transform)
        maximum, change = _update(z_RC, target_R, first, transform, state)
        slope = None if transform.softcap is None else _slope(z_RC, transform)
        z_RC.sub_(maximum[:, None])
        plain = state.weighted is None and exp_RC.dtype == z_RC.dtype
        exp = torch.exp(z_RC, out=exp_RC if plain else self._temporary(z_RC))
        total = exp.sum(1)
        inside, column = _inside(target_R, first, z_RC.shape[1])
        weighted = None
        if state.weighted is not None:
            factor = z_RC.clamp_(min=_FLOOR) if transform.maybe_minus_inf else z_RC
            product = factor.mul_(exp)
            weighted = product.sum(1)
            if weighted_RC is not None:
                product = product if slope is None else product.mul_(slope)
                weighted_RC.copy_(_without_target(product, inside, column))
        if slope is not None:
            exp.mul_(slope)
        _without_target(exp, inside, column)
        if exp is not exp_RC:
            exp_RC.copy_(exp)
        _merge(state, first, maximum, change, total, weighted)
        return change

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
        if offset_R is None:
            z_RC = _scores(x_RC if scratch else x_RC.clone(), transform)
            slope = None if transform.softcap is None else _slope(z_RC, transform)
            z_RC.sub_(gradients.maximum[:, None])
        else:
            z_RC = x_RC.to(gradients.maximum.dtype)
            slope = None if transform.softcap is None else _slope(z_RC + offset_R[:, None], transform)
            fresh = scratch or z_RC is not x_RC
            room = z_RC if fresh else (dx_RC if dx_RC.dtype == z_RC.dtype else torch.empty_like(z_RC))
            z_RC = torch.add(z_RC, (offset_R - gradients.maximum)[:, None], out=room)
        scale_R = gradients.log_total.neg().exp_().mul_(transform.inverse_temperature)
        if gradients.entropy is None:
            dz_RC = _exp(z_RC, dx_RC if dx_RC.dtype == z_RC.dtype else z_RC)
            dz_RC.mul_((gradients.base * scale_R)[:, None])
        else:
            if transform.maybe_minus_inf:
                z_RC.clamp_(min=_FLOOR)
            exp = _exp(z_RC, self._temporary(z_RC))
            base, entropy = (gradients.base * scale_R)[:, None], (gradients.entropy * scale_R)[:, None]
            out = dx_RC if dx_RC.dtype == z_RC.dtype else z_RC
            dz_RC = torch.addcmul(base, z_RC, entropy, value=-1, out=out).mul_(exp)
        if gradients.target is not None:
            inside, column = _inside(target_R, first, dz_RC.shape[1])
            grad_R = torch.where(inside, gradients.target * transform.inverse_temperature, 0.0)
            dz_RC.scatter_add_(1, column[:, None], grad_R[:, None])
        if slope is not None:
            dz_RC.mul_(slope)
        if dz_RC is not dx_RC:
            dx_RC.copy_(dz_RC)


def _scores(x_RC: Tensor, transform: Transform) -> Tensor:
    """z, in place of x."""
    if transform.bias_C is not None:
        x_RC.add_(transform.bias_C)
    inverse = transform.inverse_temperature
    if transform.softcap is not None:
        x_RC.mul_(1.0 / transform.softcap).tanh_()
        x_RC.mul_(transform.softcap * (inverse[:, None] if isinstance(inverse, Tensor) else inverse))
    elif isinstance(inverse, Tensor):
        x_RC.mul_(inverse[:, None])
    elif inverse != 1.0:
        x_RC.mul_(inverse)
    return x_RC


def _slope(z_RC: Tensor, transform: Transform) -> Tensor:
    """1 - tanh^2 from z."""
    assert transform.softcap is not None
    inverse = transform.inverse_temperature
    tanh = z_RC / (transform.softcap * (inverse[:, None] if isinstance(inverse, Tensor) else inverse))
    return tanh.mul_(tanh).neg_().add_(1.0)


def _inside(target_R: Tensor, first: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Whether the target is in the tile, and its column there (0 if not)."""
    column = target_R - first if first else target_R
    inside = (column >= 0) & (column < num_columns)
    return inside, torch.where(inside, column, 0)


def _without_target(values_RC: Tensor, inside: Tensor, column: Tensor) -> Tensor:
    found = values_RC.gather(1, column[:, None]).squeeze(1)
    return values_RC.scatter_(1, column[:, None], torch.where(inside, 0.0, found)[:, None])


def _update(z_RC: Tensor, target_R: Tensor, first: int, transform: Transform, state: RowState) -> tuple[Tensor, Tensor]:
    """The maximum after this tile, and what it changed by; notes the target's score."""
    inside, column = _inside(target_R, first, z_RC.shape[1])
    found = z_RC.gather(1, column[:, None]).squeeze(1)
    state.target.copy_(torch.where(inside, found, state.target))
    maximum = z_RC.amax(1)
    if transform.maybe_minus_inf:
        maximum.clamp_(min=torch.finfo(maximum.dtype).min)
    if first == 0:
        return maximum, torch.zeros_like(maximum)
    maximum = torch.maximum(maximum, state.maximum)
    return maximum, state.maximum - maximum


def _merge(
    state: RowState, first: int, maximum: Tensor, change: Tensor, total: Tensor, weighted: Tensor | None
) -> None:
    """Add a tile's sums, taken around the new maximum, to those of the tiles before it."""
    if first:
        scale = torch.exp(change)
        if weighted is not None and state.weighted is not None:
            weighted.addcmul_(scale, torch.addcmul(state.weighted, change.clamp(min=_FLOOR), state.total))
        total.addcmul_(scale, state.total)
    state.maximum.copy_(maximum)
    state.total.copy_(total)
    if weighted is not None and state.weighted is not None:
        state.weighted.copy_(weighted)

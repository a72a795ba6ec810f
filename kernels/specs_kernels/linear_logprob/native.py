"""``linear_logprob`` in C++ on CPU (``csrc/cpu/linear_logprob*``): its own GEMMs, fused with all that happens to the scores.

A block of columns of the weight is fetched once for a group of rows; its products with a panel of rows become scores, and
these statistics, weights or gradients, in the first-level cache of one core. Scores reach memory only where a cache is asked
for. Half precision is widened to fp32, or multiplied as pairs of bfloat16 with fp32 sums where inputs are bfloat16 and the
processor can. Deterministic, whatever the number of threads; a row's log-prob, entropy and log-sum-exp depend on its own
values only and have the same bits in every mode.

Workspace: rows go in chunks of at most 64 MiB; threads that share out the rows of a small vocabulary add to copies of its
gradient, 256 MiB together; a weight's gradient in half precision, rounded once, takes all rows at once (packed twice, with a
few partial sums of their gradient) or a copy in fp32, whichever is less.

``row_pass.py`` says what the results are. Letters: M targets, K rank of the low-rank addition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specs_kernels.linear_logprob.row_pass import RowGradients, RowPass, RowState

if TYPE_CHECKING:
    from specs_kernels.linear_logprob.backward import Gradients
    from specs_kernels.linear_logprob.forward import Cache
    from specs_kernels.linear_logprob.head import Head, Rows


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _operands(rows: Rows, head: Head, target_M: Tensor) -> tuple[object, ...]:
    """What the forward and the backward take first: factors of the products, targets, and how scores follow."""
    inverse = head.inverse_temperature
    return (
        rows.hidden_MD,
        _with_rows(head.weight_VD),
        None if rows.low_MK is None else _with_rows(rows.low_MK),
        None if head.lora_B is None else _with_rows(head.lora_B),
        target_M.contiguous(),
        head.factor,
        _dense(head.bias_V),
        0.0 if head.softcap is None else head.softcap,
        inverse.contiguous() if isinstance(inverse, Tensor) else None,
        1.0 if isinstance(inverse, Tensor) else inverse,
    )


def _with_rows(x: Tensor) -> Tensor:
    """The same matrix with the numbers of a row side by side; a copy only where they are not."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def offset_tiles(vocab_size: int) -> int:
    """Blocks of columns that have offsets of their own in a cache of half precision."""
    return -(-vocab_size // int(torch.ops.specs_kernels.linear_block()))


class NativeLinear(RowPass):
    """:class:`~specs_kernels.linear_logprob.row_pass.RowPass` in C++; nothing is overwritten but the outputs.

    It keeps scores as ``[panel of rows][V][rows of a panel]``: products where the cache has the arithmetic dtype, otherwise
    scores minus their maximum per row and block of columns, with those offsets ``[blocks, rows]``.
    """

    def statistics(self, rows: Rows, head: Head, target_M: Tensor, state: RowState, cache: Cache | None) -> bool:
        offsets = None
        if cache is not None and cache.scores.dtype != head.dtype:
            offsets = head.weight_VD.new_empty(offset_tiles(head.vocab_size), cache.rows, dtype=head.dtype)
            cache.offsets[:] = [offsets]
        torch.ops.specs_kernels.linear_forward(
            *_operands(rows, head, target_M),
            state.maximum,
            state.total,
            state.weighted,
            state.target,
            None if cache is None else cache.scores,
            0 if cache is None else cache.rows,
            offsets,
            None,
            None,
        )
        return True

    def sums(self, rows: Rows, head: Head, target_M: Tensor, state: RowState, sums: list[Tensor]) -> bool:
        torch.ops.specs_kernels.linear_forward(
            *_operands(rows, head, target_M),
            state.maximum,
            state.total,
            state.weighted,
            state.target,
            None,
            0,
            None,
            sums[0],
            sums[1] if len(sums) > 1 else None,
        )
        return True

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
        cached = 0 if cache is None else (cache.rows if cache_rows is None else cache_rows.shape[0])
        outputs = (into.weight, into.lora_B, into.bias)
        weight, lora_B, bias = (_dense(x) for x in outputs)
        torch.ops.specs_kernels.linear_backward(
            *_operands(rows, head, target_M),
            _dense(gradients_M.maximum),
            _dense(gradients_M.log_total),
            _dense(gradients_M.base),
            _dense(gradients_M.entropy),
            _dense(gradients_M.target),
            None if cache is None or not cached else cache.scores,
            cached,
            None if cache_rows is None or not cached else cache_rows,
            cache.offsets[0] if cache is not None and cached and cache.scores.dtype != head.dtype else None,
            into.hidden_MD,
            low_grad_MK,
            weight,
            lora_B,
            bias,
            head.early,
            into.accumulate,
        )
        for own, made in zip(outputs, (weight, lora_B, bias), strict=True):
            if own is not None and made is not None and made is not own:
                own.copy_(made)
        return True

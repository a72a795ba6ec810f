"""``linear_loss`` around the loops of ``linear_logprob``: chunks of whole groups through one workspace of scores.

Per chunk: scores into the workspace with their statistics (2 NDV), the user's loss on the chunk's vectors and its gradients
with respect to them, then the gradients of hidden and weight from the stored scores (4 NDV). Every row of the weight's
gradient is summed over the chunks in the arithmetic dtype: in the gradient itself when that is its dtype, in a second
buffer ``[V, D]`` when the weight has half precision and there is more than one chunk. Rounded once at the end.

Letters: N targets, M targets that count, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.linear_logprob.autograd import (
    Inputs,
    Options,
    Wanted,
    head_for,
    live_rows,
    pick_gradients,
    targets_of,
)
from specs_kernels.linear_logprob.backends import row_pass
from specs_kernels.linear_logprob.backward import Gradients, backward_tiles
from specs_kernels.linear_logprob.forward import Cache, Statistics, forward_statistics
from specs_kernels.linear_logprob.head import Head, Rows, Tiling, kept_dtype, tiling
from specs_kernels.linear_logprob.targets import Targets
from specs_kernels.linear_loss.call import LossFunction, Metrics, call_loss, refuse_other_leaves
from specs_kernels.linear_loss.groups import Chunk, group_sizes, plan_chunks
from specs_kernels.results import TokenLogprobs
from specs_kernels.tracing import without_autocast


class Run:
    """One forward: state shared by the chunks."""

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        loss_fn: LossFunction,
        group_ids: Tensor | None,
        workspace_bytes: int,
        wanted: Wanted,
    ) -> None:
        self.inputs, self.options, self.loss_fn, self.wanted = inputs, options, loss_fn, wanted
        self.targets: Targets = targets_of(inputs, options)
        self.head: Head = head_for(inputs, options, self.targets)
        self.tiles: Tiling = tiling(inputs.hidden.device, self.head.vocab_size, self.head.dtype)
        self.sweeps = row_pass(options.backend)
        self.hidden_MD = self.targets.hidden(inputs.hidden)
        self.count = self.targets.target_M.shape[0]
        score_dtype = kept_dtype(inputs.hidden.dtype, options.softcap)
        row_bytes = self.head.vocab_size * score_dtype.itemsize
        block = self.tiles.row_block
        capacity = workspace_bytes // row_bytes // block * block
        if capacity == 0:
            raise ValueError(
                f"workspace_bytes={workspace_bytes} holds no block of scores; {block} targets take {block * row_bytes} bytes"
            )
        sizes = None if group_ids is None else group_sizes(group_ids, self.targets.kept_M)
        self.chunks = list(plan_chunks(self.count, sizes, capacity, block))
        largest = max((chunk.stop - chunk.start for chunk in self.chunks if chunk.fits), default=0)
        self.workspace = Cache.empty(largest, self.head, self.tiles, score_dtype)
        self.into = self._gradients()
        self.loss = torch.zeros((), dtype=self.head.dtype, device=inputs.hidden.device)
        self.metrics: Metrics = {}
        self.recomputed = 0
        self.parts: list[Statistics] = []

    def _gradients(self) -> Gradients:
        """Room for the gradients: the final tensors, or sums in the arithmetic dtype where several chunks add up."""
        inputs, wanted, dtype = self.inputs, self.wanted, self.head.dtype
        several = len(self.chunks) > 1

        def room(tensor: Tensor | None, want: bool) -> Tensor | None:
            if tensor is None or not want:
                return None
            return torch.empty(tensor.shape, dtype=dtype if several else tensor.dtype, device=tensor.device)

        hidden = self.hidden_MD.new_zeros(self.hidden_MD.shape, dtype=dtype) if wanted.hidden else None
        return Gradients(
            hidden,
            room(inputs.weight, wanted.weight),
            room(inputs.bias, wanted.bias),
            room(inputs.lora_A, wanted.lora_A),
            room(inputs.lora_B, wanted.lora_B),
        )

    def run(self) -> None:
        for chunk in self.chunks:
            self._chunk(chunk)
        if not self.chunks:
            for total in (self.into.weight, self.into.bias, self.into.lora_A, self.into.lora_B):
                if total is not None:
                    total.zero_()

    def _chunk(self, chunk: Chunk) -> None:
        part = slice(chunk.start, chunk.stop)
        count = chunk.stop - chunk.start
        head, target_M = self.head.subset(part), self.targets.target_M[part]
        rows = Rows(self.hidden_MD[part], head, self.tiles.row_block)
        cache = None
        if chunk.fits:
            cache = Cache(self.workspace.scores[: rows.padded], [None] * len(self.workspace.offsets), count)
        else:
            self.recomputed += count
        statistics = forward_statistics(head, rows, target_M, self.tiles, self.sweeps, self.options.entropy, cache)
        self.parts.append(statistics)
        grads = self._loss_of(statistics, chunk)
        if not any(self.wanted):
            return
        self.into.accumulate = chunk.start > 0
        live: Tensor | None = None
        if all(grad is None for grad in grads):
            grads = (torch.zeros_like(statistics.log_total), None, None)
        gradients = statistics.gradients(*grads)
        if self.options.compact:
            live = live_rows(gradients, grads[2])
            live = live if live.shape[0] < count else None
        into = self._into(part, live)
        if live is not None:
            gradients, head, target_M = pick_gradients(gradients, live), head.subset(live), target_M[live]
            rows = Rows(self.hidden_MD[part][live], head, self.tiles.row_block)
        backward_tiles(head, rows, target_M, gradients, into, self.tiles, self.sweeps, cache, live)
        if live is not None and self.into.hidden_MD is not None and into.hidden_MD is not None:
            self.into.hidden_MD[part].index_copy_(0, live, into.hidden_MD)

    def _into(self, part: slice, live: Tensor | None) -> Gradients:
        hidden = self.into.hidden_MD
        if hidden is not None:
            hidden = hidden[part] if live is None else hidden.new_zeros(live.shape[0], hidden.shape[1])
        into = self.into
        return Gradients(hidden, into.weight, into.bias, into.lora_A, into.lora_B, into.accumulate)

    def _loss_of(self, statistics: Statistics, chunk: Chunk) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds the chunk's loss and metrics; gradients with respect to its log-prob, entropy and log-sum-exp."""
        kept = self.targets.kept_M
        device = self.inputs.target.device
        index = (
            torch.arange(chunk.start, chunk.stop, device=device)
            if kept is None
            else kept[chunk.start : chunk.stop].clone()
        )
        need = any(self.wanted)
        with torch.enable_grad():
            logp = statistics.logp.requires_grad_(need)
            lse = statistics.lse.requires_grad_(need)
            entropy = statistics.entropy
            entropy = None if entropy is None else entropy.requires_grad_(need)
            loss, metrics = call_loss(self.loss_fn, logp, entropy, lse, index)
        self.loss += loss.detach().to(self.loss.dtype)
        for name, value in metrics.items():
            self.metrics[name] = self.metrics[name] + value if name in self.metrics else value
        if not need or not loss.requires_grad:
            return None, None, None
        leaves = (logp, lse) if entropy is None else (logp, lse, entropy)
        refuse_other_leaves(loss, leaves)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return found[0], found[2] if entropy is not None else None, found[1]

    def outputs(self) -> TokenLogprobs:
        """Detached log-probs, entropy and log-sum-exp of all targets, ``[N]``."""
        num_targets = self.inputs.target.shape[0]
        empty = torch.zeros(0, dtype=self.head.dtype, device=self.inputs.hidden.device)

        def spread(values: list[Tensor]) -> Tensor:
            return self.targets.spread(torch.cat(values) if values else empty, num_targets)

        entropies = [part.log_total - part.mean for part in self.parts if part.mean is not None]
        return TokenLogprobs(
            spread([part.logp.detach() for part in self.parts]),
            spread(entropies) if self.options.entropy else None,
            spread([part.lse.detach() for part in self.parts]),
        )

    def gradients(self) -> list[Tensor | None]:
        """In the dtypes of the inputs, hidden's summed over targets that share a row."""
        into, inputs = self.into, self.inputs
        hidden = None if into.hidden_MD is None else self.targets.scatter_hidden(into.hidden_MD, inputs.hidden)
        sums = (into.weight, into.bias, into.lora_A, into.lora_B)
        return [hidden, *(None if total is None else total.to(inputs.hidden.dtype) for total in sums)]


class LinearLoss(torch.autograd.Function):
    """The backward multiplies the gradients in place, once, by the loss's upstream gradient."""

    @staticmethod
    def forward(ctx: Any, run: Run, *inputs: Tensor | None) -> Tensor:
        run.run()
        ctx.gradients = run.gradients() if any(run.wanted) else None
        return run.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("linear_loss")
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("linear_loss hands its gradients out once; call it again for a second backward")
        ctx.gradients = None
        # On CPU the factor can be read for free, and 1 is the usual one. Elsewhere it gets a dimension, so that products are
        # formed in its dtype: as a 0-d tensor it would be rounded to the gradient's, where a loss scale of 65536 is inf.
        factor = float(grad_loss) if grad_loss.device.type == "cpu" else grad_loss.reshape(1)
        if isinstance(factor, Tensor) or factor != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    torch.mul(gradient, factor, out=gradient)
        return (None, *gradients)


def linear_loss_chunked(
    inputs: Inputs,
    options: Options,
    loss_fn: LossFunction,
    group_ids: Tensor | None,
    workspace_bytes: int,
) -> tuple[Tensor, TokenLogprobs, Metrics]:
    """See :func:`specs_kernels.linear_loss`."""
    enabled = torch.is_grad_enabled()
    wanted = Wanted(*(enabled and tensor is not None and tensor.requires_grad for tensor in inputs[:5]))
    with without_autocast(inputs.hidden.device):
        with torch.no_grad():
            run = Run(inputs, options, loss_fn, group_ids, workspace_bytes, wanted)
        loss = LinearLoss.apply(run, *inputs[:5])
        with torch.no_grad():
            outputs = run.outputs()
    return loss, outputs, {**run.metrics, "recomputed_targets": run.recomputed}

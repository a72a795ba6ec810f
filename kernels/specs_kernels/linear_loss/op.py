"""The public ``linear_loss``: what it accepts, and which backend it calls."""

from __future__ import annotations

from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.linear_logprob.autograd import Options
from specs_kernels.linear_logprob.op import head_inputs
from specs_kernels.linear_loss.call import LossFunction, Metrics
from specs_kernels.linear_loss.chunked import linear_loss_chunked
from specs_kernels.linear_loss.groups import group_sizes
from specs_kernels.linear_loss.reference import linear_loss_reference
from specs_kernels.results import TokenLogprobs
from specs_kernels.tracing import outside_graphs, without_autocast

WORKSPACE_BYTES = {"cpu": 256 << 20}
"""Default workspace per device type."""
ACCELERATOR_WORKSPACE_BYTES = 1280 << 20
"""Chunks of 4096 targets at V = 152k in half precision: the weight's gradient is read and written once per chunk."""


@outside_graphs("linear_loss calls the user's loss function on slices whose number depends on the targets")
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_fn: LossFunction,
    group_ids: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    workspace_bytes: int | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    lora: tuple[Tensor, Tensor] | None = None,
    compact: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, TokenLogprobs, Metrics]:
    """A loss that is a sum over groups of targets, with its gradients formed in the forward: 6 NDV FLOP instead of 8.

    ``loss_fn(logp, entropy, lse, index) -> loss`` or ``(loss, metrics)`` sees whole groups, one or several at a time: the
    log-probs, entropies (None without ``return_entropy``) and log-sum-exps of n targets, ``[n]`` with gradients, and their
    places in ``target``, ``index`` int64 ``[n]``, ascending. It slices the caller's own tensors by ``index`` and divides by
    global counts that the caller brings along; the losses (0-d) and metrics of all calls are summed. A loss
    without a gradient, as of a chunk in which all is masked, counts as a constant. A loss per token::

        loss, _, _ = linear_loss(h, w, target, lambda logp, entropy, lse, index: -(weights[index] * logp).sum())

    group_ids: int64 or int32 ``[N]``, equal and contiguous within a group (a pair for DPO, a response for a length-normalised
        loss); None: every target is its own group.
    workspace_bytes: room for scores, in the dtype of hidden (fp32 under a soft cap); None: 256 MiB on CPU, 1.25 GiB
        elsewhere. As many whole groups as fit go through it at a time. A group that does not fit is computed twice (8 NDV), and
        ``metrics["recomputed_targets"]`` counts its targets.
    compact: drop targets with gradient 0 before the gradients of hidden and weight; waits for the device once per chunk.
    The other arguments are those of :func:`linear_logprob`. Ignored targets are not shown to ``loss_fn``; when none is left it
    is not called, and the loss is 0.

    Returns ``(loss, logprobs, metrics)``: loss 0-d fp32 (fp64), differentiable once in hidden, weight, bias and lora; logprobs
    as from ``linear_logprob`` but without a gradient. The backward only multiplies by the upstream gradient, without
    waiting for the device; it hands its gradients out, so a second backward raises RuntimeError.
    Numerics: as ``linear_logprob``; half-precision scores are kept relative to their row's maximum. The weight's gradient is
    summed over chunks in fp32 (fp64) and rounded once, which takes a second ``[V, D]`` buffer when the weight has half
    precision and there is more than one chunk.
    Values (target, rows, temperature) are checked on every device, since the number of targets that count is read on the host.
    Under ``torch.compile`` the call is a graph break; with ``fullgraph=True`` it raises.

    Raises ValueError as ``linear_logprob`` does, for groups that are not contiguous, a workspace smaller than one block of
    rows, and a loss that is not 0-d or that depends on another tensor with a gradient.
    """
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be callable; got {type(loss_fn).__name__}")
    checks.check_flag("return_entropy", return_entropy)
    checks.check_flag("compact", compact)
    inputs = head_inputs(hidden, weight, target, bias, temperature, softcap, logit_scale, rows, lora)
    checks.check_ignore_index(ignore_index, target.dtype)
    if group_ids is not None:
        checks.check_integer("group_ids", group_ids, (target.shape[0],))
        checks.check_same_device(target=target, group_ids=group_ids)
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES.get(hidden.device.type, ACCELERATOR_WORKSPACE_BYTES)
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be an int above 0; got {workspace_bytes!r}")
    chosen = choose("linear_loss", backend, hidden.device).backend
    scalar = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    if chosen == "reference":
        if compact:
            raise ValueError("backend='reference' differentiates by autograd; drop compact=True")
        if group_ids is not None:
            group_sizes(group_ids, None)
        with without_autocast(hidden.device):
            return linear_loss_reference(inputs, loss_fn, scalar, softcap, logit_scale, ignore_index, return_entropy)
    options = Options(
        scalar,
        softcap,
        float(logit_scale),
        ignore_index,
        bool(return_entropy),
        bool(return_entropy),
        "loss",
        0,
        True,
        compact,
        True,
        False,
        chosen,
    )
    return linear_loss_chunked(inputs, options, loss_fn, group_ids, workspace_bytes)

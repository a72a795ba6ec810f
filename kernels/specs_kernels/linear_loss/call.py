"""Calling a user's loss function and checking what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

Metrics = dict[str, Tensor | float | int]
LossFunction = Callable[
    [Tensor, Tensor | None, Tensor, Tensor], Tensor | tuple[Tensor, Mapping[str, Tensor | float | int]]
]


def call_loss(
    loss_fn: LossFunction, logp: Tensor, entropy: Tensor | None, lse: Tensor, index: Tensor
) -> tuple[Tensor, Metrics]:
    """Loss and detached metrics of one chunk. Raises ValueError for anything but a 0-d loss and a mapping of numbers."""
    returned = loss_fn(logp, entropy, lse, index)
    if isinstance(returned, tuple) and len(returned) != 2:
        raise ValueError(f"loss_fn must return a loss or (loss, metrics); got a tuple of {len(returned)}")
    loss, metrics = returned if isinstance(returned, tuple) else (returned, {})
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        found = (
            f"a tensor of shape {list(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        )
        raise ValueError(f"loss_fn must return a 0-d floating point tensor, or (it, metrics); got {found}")
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"the metrics of loss_fn must be a mapping from names to numbers; got {type(metrics).__name__}"
        )
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.dim() == 0):
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"metric {name!r} of loss_fn is {found}; numbers and 0-d tensors only, which are summed over calls"
            )
    if "recomputed_targets" in metrics:
        raise ValueError("the metric name 'recomputed_targets' is taken by linear_loss; use another")
    return loss, {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}


def refuse_other_leaves(loss: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Raises ValueError when the loss depends on a tensor with a gradient that ``linear_loss`` would drop."""
    known = {id(leaf) for leaf in leaves}
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise ValueError(
                f"loss_fn depends on another tensor that requires a gradient (shape {list(variable.shape)}), which would get "
                "none here; detach it, or use linear_logprob"
            )
        waiting.extend(parent for parent, _ in node.next_functions)

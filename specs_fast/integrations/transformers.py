"""Swap the head of a transformers model: given labels, its forward returns log-probs instead of logits.

The decoder runs as it is, and the head's weight is read inside the head's own ``forward``, called as a module. That is
what FSDP2 needs (the weight is gathered when the module is called and its gradient reduced when its outputs' gradients
arrive), and DDP and PEFT with it. Without labels the forward is the model's own, so ``generate`` is untouched.

Letters: B rows, L tokens of a row, K scored positions of a row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from specs_fast.models.head import logit_transform
from specs_kernels import linear_logprob

IGNORE = -100
_CHECK_TOKENS = 8


@dataclass
class LogprobOutput(ModelOutput):
    """What the forward of a swapped model returns when it is given labels.

    Position k of a row stands where the logits of position k would: it scores the token after it. K is L, or what
    ``logits_to_keep`` leaves. Positions without a label (-100), the last one among them, are 0 and pass no gradient.

    loss: mean of ``-logp`` over the labelled positions; their sum over ``num_items_in_batch`` where that is passed; 0 where
        there is no label. 0-d.
    logp: log-prob of each label under softmax(logits / temperature) ``[B, K]``, fp32 (fp64 for fp64 models).
    entropy: of the same distribution ``[B, K]``, None unless asked for. lse: log-sum-exp of logits / temperature ``[B, K]``.
    """

    loss: Tensor | None = None
    logp: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class _Options:
    temperature: float
    return_entropy: bool
    vocab_size: int | None
    backend: str
    softcap: float | None
    logit_scale: float


class LogprobHead:
    """A swapped head. ``remove()`` puts the model's own forward back; as a context manager it does so on leaving."""

    def __init__(self, patched: list[nn.Module]) -> None:
        self._patched = patched

    def remove(self) -> None:
        """Undo the swap. Safe to call twice."""
        while self._patched:
            self._patched.pop().__dict__.pop("forward", None)

    def __enter__(self) -> LogprobHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def logprob_head(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    vocab_size: int | None = None,
    backend: str = "auto",
    check: bool = True,
) -> LogprobHead:
    """Make ``model(..., labels=labels)`` return a :class:`LogprobOutput` instead of logits ``[B, L, V]``, never forming them.

    model: a causal language or vision-language model of transformers with a plain linear head, or a PEFT model around one, LoRA
        on its head included (in the head's dtype; without dropout).
        Swap before ``fully_shard``, DDP or ``accelerator.prepare``, and after ``get_peft_model`` where an adapter or
        ``modules_to_save`` names the head (otherwise before or after).
    labels: int64 ``[B, L]`` as in transformers: position k scores ``labels[:, k + 1]``; or ``shift_labels`` ``[B, L]``, shifted
        by the caller. -100 is not scored and costs nothing in the head. ``logits_to_keep`` (a number of last positions, or
        positions) and ``num_items_in_batch`` mean what they mean in transformers.
    temperature: a finite number above 0. return_entropy: also the entropy, with its gradient.
    vocab_size: columns of the head from here on are padding and get probability 0; None, as in the model's own loss: all count.
    backend: of ``linear_logprob``.
    check: before anything is swapped, compare 8 tokens with the model's own logits. It needs the weights in place: pass False
        for a model on the meta device or already sharded.

    Soft cap, logit scale and bias are applied as the model applies them. Under autocast hidden states and weight are cast to its
    dtype, as ``nn.Linear`` does.

    Raises ValueError for a model without such a head, one that does more to its logits than is known here (by configuration, or
    found by ``check``), one already swapped, encoder-decoders, and settings out of range. The swapped forward raises ValueError
    for ``return_dict=False`` and for router logits (a mixture of experts' load-balancing loss is not computed here), and
    RuntimeError for a head whose weight is still sharded.
    """
    unwrap = getattr(model, "get_base_model", None)
    base: Any = model if unwrap is None else unwrap()
    _check_settings(base, temperature)
    heads = _linear_heads(base)
    rows = min(head.weight.shape[0] for head in heads)
    if not isinstance(return_entropy, bool):
        raise ValueError(f"return_entropy must be True or False; got {return_entropy!r}")
    whole = isinstance(vocab_size, int) and not isinstance(vocab_size, bool)
    if vocab_size is not None and not (whole and 0 < vocab_size <= rows):
        raise ValueError(f"vocab_size is {vocab_size!r}; the head has {rows} rows: allowed 1 to {rows}, or None")
    softcap, scale = logit_transform(base)
    options = _Options(float(temperature), return_entropy, vocab_size, backend, softcap, scale)
    expected = _own_logprobs(base, heads[0], options) if check else None
    swapped = LogprobHead([base, *heads])
    base.__dict__["forward"] = _ModelForward(base, options)
    for head in heads:
        head.__dict__["forward"] = _HeadForward(head)
    if expected is not None:
        try:
            _compare(base, expected)
        except BaseException:
            swapped.remove()
            raise
    return swapped


def _check_settings(base: Any, temperature: float) -> None:
    name = type(base).__name__
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"model must be a transformers model or a PEFT model around one; got {name}")
    if "forward" in base.__dict__:
        raise ValueError(
            f"the forward of this {name} is already replaced (by logprob_head, TRL, Liger, or accelerate with device_map or "
            "mixed precision); undo that, or swap the head before it"
        )
    if base.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; log-probs are computed for decoder-only models")
    if base.base_model is base:
        raise ValueError(
            f"{name} has no decoder of its own under base_model_prefix; its hidden states cannot be reached"
        )
    if getattr(base.config, "return_dict", True) is False:
        raise ValueError(f"{name}.config.return_dict is False; a swapped head returns a LogprobOutput: set it to True")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0; got {temperature!r}")


def _linear_heads(base: PreTrainedModel) -> list[Any]:
    """The head, or the original and the trained copies that PEFT's ``modules_to_save`` keeps of it."""
    top = base.get_output_embeddings()
    saved = getattr(top, "modules_to_save", None)
    heads = [top] if saved is None else [top.original_module, *saved.values()]
    for head in heads:
        linear = head.base_layer if _has_lora(head) else head
        plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
        if not plain or "forward" in {**linear.__dict__, **head.__dict__}:
            kind = "no head" if head is None else f"a head of type {type(linear).__name__}"
            raise ValueError(
                f"{type(base).__name__} has {kind}; log-probs are computed from a plain nn.Linear head or PEFT's LoRA on one: "
                "not quantised, no other adapter (leave lm_head out of target_modules, or train it whole by modules_to_save), "
                "its forward not replaced (by TRL's cast_lm_head_to_fp32, or accelerate's device_map)"
            )
    return heads


def _has_lora(head: nn.Module | None) -> bool:
    """Whether this is PEFT's LoRA on a linear layer; told by name, so that PEFT is not imported."""
    return f"{type(head).__module__}.{type(head).__name__}" == "peft.tuners.lora.layer.Linear"


def _head_forward(
    self: Any, hidden: Tensor, *args: Any, target: Tensor | None = None, options: _Options | None = None, **kwargs: Any
) -> Tensor | tuple[Tensor, ...]:
    """The head itself: logits ``[..., V]`` as ever; with a target ``[B, K]``, (logp, lse[, entropy]), each ``[B, K]``.

    A tuple, so that FSDP2 finds the tensors whose gradients announce this module's backward.
    """
    if target is None or options is None:
        return type(self).forward(self, hidden, *args, **kwargs)
    linear, lora = (self.base_layer, _adapter(self)) if hasattr(self, "base_layer") else (self, None)
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if isinstance(weight, DTensor):
        raise RuntimeError(
            f"the head's weight is a sharded DTensor {tuple(weight.shape)} inside its forward; call the module that "
            "fully_shard was given; a head split by tensor parallelism is not supported"
        )
    if options.vocab_size is not None and options.vocab_size < weight.shape[0]:
        weight, bias = weight[: options.vocab_size], None if bias is None else bias[: options.vocab_size]
        lora = None if lora is None else (lora[0], lora[1][: options.vocab_size])
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    logp, entropy, lse = linear_logprob(
        hidden.flatten(0, 1),
        weight,
        target.flatten(),
        bias=None if bias is None else bias * options.logit_scale,
        temperature=options.temperature,
        softcap=options.softcap,
        logit_scale=options.logit_scale,
        ignore_index=IGNORE,
        return_entropy=options.return_entropy,
        lora=None if lora is None else (lora[0].to(hidden.dtype), lora[1].to(hidden.dtype)),
        backend=options.backend,
    )
    return tuple(out.view(target.shape) for out in (logp, lse, entropy) if out is not None)


def _adapter(head: Any) -> tuple[Tensor, Tensor] | None:
    """A ``[r, D]`` and B ``[V, r]`` of all active adapters of PEFT's LoRA layer, scale folded into B; None without one.

    Raises ValueError for what two matrices cannot say: DoRA and other variants, a bias, dropout while training.
    """
    if head.disable_adapters and head.merged:
        head.unmerge()
    names = [name for name in head.active_adapters if name in head.lora_A]
    if head.disable_adapters or head.merged or not names:
        return None
    for name in names:
        dropout = head.lora_dropout[name]
        if name in head.lora_variant or head.lora_B[name].bias is not None:
            raise ValueError(f"adapter {name!r} of the head is a LoRA variant or has a bias; use plain LoRA on lm_head")
        if dropout.training and getattr(dropout, "p", 0.0) > 0.0:
            raise ValueError(f"adapter {name!r} of the head has lora_dropout {dropout.p}; set it to 0 on lm_head")
    lora_A = torch.cat([head.lora_A[name].weight for name in names])
    return lora_A, torch.cat([head.lora_B[name].weight * head.scaling[name] for name in names], dim=1)


class _HeadForward:
    """The forward of one swapped head. An object, since a pickle cannot hold a method that is not of the model's class."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        return _head_forward(self.head, hidden, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _HeadForward, (self.head,)


class _ModelForward:
    """The forward of one swapped model, with its class's signature, which `generate` and the Trainer read."""

    def __init__(self, model: PreTrainedModel, options: _Options) -> None:
        self.model, self.options = model, options
        signature = inspect.signature(type(model).forward)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if args and isinstance(args[0], PreTrainedModel):  # accelerate's unwrap_model makes a method of any forward
            model, args = args[0], args[1:]
        if args:  # by name, so that labels passed by position are seen
            given = self.__signature__.bind_partial(*args, **kwargs)
            kwargs = {**given.kwargs, **dict(zip(self.__signature__.parameters, given.args, strict=False))}
        if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            return type(model).forward(model, **kwargs)
        return _scored_forward(model, self.options, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ModelForward, (self.model, self.options)


def _scored_forward(
    model: Any,
    options: _Options,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    logits_to_keep: int | Tensor | None = None,
    num_logits_to_keep: int | Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    return_dict: bool | None = None,
    output_router_logits: bool | None = None,
    **kwargs: Any,
) -> LogprobOutput:
    if return_dict is False or (return_dict is None and getattr(model.config, "return_dict", True) is False):
        raise ValueError("return_dict is False; a swapped head returns a LogprobOutput, which names its tensors")
    if output_router_logits or (
        output_router_logits is None and getattr(model.config.get_text_config(), "output_router_logits", False)
    ):
        raise ValueError(
            "output_router_logits is on; a swapped head does not add the load-balancing loss: pass output_router_logits=False "
            "and add your own, or train with the model's own head"
        )
    if logits_to_keep is not None and num_logits_to_keep is not None:
        raise ValueError("logits_to_keep and num_logits_to_keep are one setting under two names; pass the first")
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is not None and (not isinstance(given, Tensor) or given.dim() != 2):
            found = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{name} must be an integer tensor [B, L]; got {found}")
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if output_router_logits is not None:
        kwargs["output_router_logits"] = output_router_logits
    if return_dict is not None:
        kwargs["return_dict"] = return_dict
    if kwargs.get("use_cache") is None:
        kwargs["use_cache"] = False
    outputs = model.base_model(**kwargs)
    hidden_BLD = outputs.last_hidden_state
    if shift_labels.shape != hidden_BLD.shape[:2]:
        raise ValueError(
            f"labels {tuple(shift_labels.shape)} must have one entry per position; hidden states are {tuple(hidden_BLD.shape)}"
        )
    keep = _kept(logits_to_keep if num_logits_to_keep is None else num_logits_to_keep)
    target_BK = shift_labels[:, keep].to(hidden_BLD.device)
    head = model.get_output_embeddings()
    if "forward" not in head.__dict__ and not hasattr(head, "modules_to_save"):
        raise RuntimeError(
            f"the head became another {type(head).__name__} after it was swapped; call logprob_head after what replaces it "
            "(get_peft_model with lm_head in target_modules)"
        )
    logp, lse, *entropy = head(hidden_BLD[:, keep], target=target_BK, options=options)
    count = (target_BK != IGNORE).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return LogprobOutput(
        loss=-logp.sum() / (count.to(logp.device) if isinstance(count, Tensor) else count),
        logp=logp,
        entropy=entropy[0] if entropy else None,
        lse=lse,
        past_key_values=getattr(outputs, "past_key_values", None),
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )


def _kept(logits_to_keep: int | Tensor | None) -> slice | Tensor:
    """transformers' meaning: the last so many positions, 0 for all, or the positions themselves."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-logits_to_keep, None) if logits_to_keep else slice(None)


def _probe(base: PreTrainedModel, vocab_size: int) -> Tensor:
    """A few ordinary tokens ``[1, 8]``: none that the configuration gives a meaning."""
    configs = (base.config, base.config.get_text_config())
    special = {value for config in configs for key, value in config.to_dict().items() if key.endswith("token_id")}
    ids = [token for token in range(vocab_size) if token not in special][:_CHECK_TOKENS]
    if len(ids) < 2:
        raise ValueError(f"the head has {vocab_size} columns, too few to compare log-probs on; pass check=False")
    return torch.tensor([ids], device=base.device)


def _own_logprobs(base: PreTrainedModel, head: nn.Linear, options: _Options) -> tuple[Tensor, Tensor, float]:
    """Probe tokens, their log-probs by the model's own logits, and how large a difference rounding explains."""
    if isinstance(head.weight, DTensor) or head.weight.is_meta or head.weight.numel() == 0:
        raise ValueError(
            f"the weights of this {type(base).__name__} are sharded or on the meta device, so check cannot run it; swap the head "
            "before sharding, or pass check=False"
        )
    ids = _probe(base, head.weight.shape[0] if options.vocab_size is None else options.vocab_size)
    with _quiet(base), torch.no_grad():
        logits = base(input_ids=ids, use_cache=False).logits[0, :-1]
    tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 3e-2
    logits = logits[:, : options.vocab_size].double() / options.temperature
    logp = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return ids, logp, tolerance * float((logits - logits.mean(-1, keepdim=True)).abs().max())


def _compare(base: PreTrainedModel, expected: tuple[Tensor, Tensor, float]) -> None:
    ids, own, tolerance = expected
    with _quiet(base), torch.no_grad():
        routed = hasattr(base.config.get_text_config(), "output_router_logits")
        got = base(input_ids=ids, labels=ids, **({"output_router_logits": False} if routed else {})).logp[0, :-1]
    difference = float((got.double() - own).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"{type(base).__name__} does more between its decoder and its logits than this module knows: log-probs of a probe "
            f"differ by {difference:.3g} from those of its own logits (rounding explains {tolerance:.3g}); nothing was swapped"
        )


class _quiet:
    """No dropout inside; each module's own mode comes back on leaving."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        for module, _ in self._modes:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training

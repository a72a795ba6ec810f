"""The parts of a run's configuration: one frozen dataclass each, checked when made.

A default that SPECS (arXiv 2510.25801) states is marked "paper", one of another library with its name, our own choice
"ours". A value that cannot work raises ``FieldError``, which ``load_config`` turns into an error naming file and key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from specs_fast.structured import require

# The five ways to break the format of a rejected response: remove all tags, those of one part, replace, displace.
CORRUPTIONS = ("drop_all", "drop_answer", "drop_reasoning", "plain_answer", "shift")
BUILTIN_REWARDS = ("format", "accuracy")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class ModelConfig:
    """The base model and how it is run.

    path: folder or hub name that ``from_pretrained`` takes. Empty only where a ``lab`` section builds the model.
    dtype: of weights and activations. float32 is the default because CPU runs need it; GPU recipes set bfloat16
        (float16 would need loss scaling).
    device: "auto" is the GPU where there is one, else the CPU.
    freeze_vision: keep what makes image features fixed, the vision tower and its merger or projector (ours, as MM-EUREKA's
        script; the paper does not say).
    packing: "shared" stores each prompt once with its responses as branches; "none" is the padded forward, for models
        that cannot be packed.
    gradient_checkpointing: recompute activations in the backward (less memory, about a third more compute).
    fused_layers: run RMSNorm and SwiGLU of a float32 model on the CPU on our kernels while training and sampling; the run
        says which layers it switched. False: transformers' own.
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    freeze_vision: bool = True
    packing: Literal["shared", "none"] = "shared"
    gradient_checkpointing: bool = False
    fused_layers: bool = True

    def __post_init__(self) -> None:
        require(_DEVICE.fullmatch(self.device) is not None, "device", self.device, "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class DataConfig:
    """The prompts to train on.

    train: JSONL file in TRL's conversational format with columns ``prompt``, ``images``, ``answer``. Empty only where
        a ``lab`` section makes it.
    max_prompt_tokens: longest prompt in tokens, image tokens included; None: no limit. A longer row raises (it is
        never cut).
    filter_overlong: drop longer rows instead, and count them. Needs ``max_prompt_tokens``.
    """

    train: str = ""
    max_prompt_tokens: int | None = None
    filter_overlong: bool = False

    def __post_init__(self) -> None:
        limit = self.max_prompt_tokens
        require(limit is None or limit >= 1, "max_prompt_tokens", limit, "at least 1, or null for no limit")
        require(
            not self.filter_overlong or limit is not None,
            "filter_overlong",
            self.filter_overlong,
            "false where max_prompt_tokens is null (nothing says what is too long). Set one or drop the other",
        )


@dataclass(frozen=True)
class RewardConfig:
    """One reward function.

    name: "format" (0.5 or 0; paper), "accuracy" (1 or 0; paper), or an import path "package.module:function" with
        TRL's reward signature.
    weight: factor on what it returns, unitless. 1.0 keeps the paper's scale.
    """

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        known = self.name in BUILTIN_REWARDS or _IMPORT_PATH.fullmatch(self.name) is not None
        require(
            known, "name", self.name, f"one of {', '.join(BUILTIN_REWARDS)}, or an import path package.module:function"
        )


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    temperature: divides the logits. 1.0, so that the sampler draws from the policy that the loss scores (not stated
        in the paper).
    top_p: kept probability mass, (0, 1]; 1.0 is off.
    top_k: kept tokens; 0 is off.
    max_new_tokens: longest response in tokens. 64 suits the lab; the paper uses 10,240.
    max_batch_tokens: rows times (longest prompt + max_new_tokens) decoded together; bounds the key-value cache. The
        random draws do not depend on it. Raise it where memory allows: decoding speed grows with the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    max_batch_tokens: int = 65536

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1 is off)")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.max_batch_tokens >= 1, "max_batch_tokens", self.max_batch_tokens, "at least 1")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    lr: peak learning rate. No default: it is the one number that every model needs its own of (paper: 1e-6 at 7B,
        every stage).
    betas: decay of the two moments; (0.9, 0.95), as usual for language models (ours).
    weight_decay: decoupled, per unit of lr; 0 (ours).
    eps: added to the root of the second moment; PyTorch's default.
    warmup_steps: optimizer steps of linear warm-up from 0.
    schedule: what follows the warm-up: constant, or a linear or cosine fall to 0 at the last step.
    max_grad_norm: global norm that gradients are clipped to.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(
            all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers, each at least 0 and below 1"
        )
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(self.eps > 0, "eps", self.eps, "above 0")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")


@dataclass(frozen=True)
class GRPOConfig:
    """One RL stage: sample groups, score them, take clipped policy-gradient steps.

    steps: rollout batches; optimizer steps are ``steps * minibatches``.
    optim: see OptimConfig.
    prompts_per_step: distinct prompts of a rollout batch (paper: 128).
    group_size: responses per prompt (paper: 8).
    minibatches: optimizer steps per rollout batch, cut by prompt (paper: rollout batch = train batch, so 1; 2 suits
        the lab).
    epsilon: the ratio is clipped from below at 1 - epsilon (DAPO: 0.2; the paper says "DAPO-like").
    epsilon_high: and from above at 1 + epsilon_high (DAPO: 0.28); None: epsilon.
    beta: weight of the k3 KL to the stage's first model, 0 is none (paper).
    aggregation: how token losses become one number: "dapo" (token sum over all tokens; TRL's default), "bnpo",
        "grpo", "dr_grpo".
    scale_rewards: divide advantages by the standard deviation of the "group" (paper's GRPO) or the "batch", or "none".
    micro_batch_tokens: tokens of one forward and backward, prompts and responses together; bounds memory, and changes
        the result with "bnpo" only, which averages over each micro-batch by itself. A prompt whose responses exceed it is
        split by responses.
    log_completions_every: rollout batches between logged samples of completions.
    sampling: see SamplingConfig.
    """

    steps: int
    optim: OptimConfig
    prompts_per_step: int = 16
    group_size: int = 8
    minibatches: int = 2
    epsilon: float = 0.2
    epsilon_high: float | None = 0.28
    beta: float = 0.0
    aggregation: Literal["dapo", "bnpo", "grpo", "dr_grpo"] = "dapo"
    scale_rewards: Literal["group", "none", "batch"] = "group"
    micro_batch_tokens: int = 16384
    log_completions_every: int = 10
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for key in ("steps", "prompts_per_step", "minibatches", "micro_batch_tokens", "log_completions_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(
            self.group_size >= 2,
            "group_size",
            self.group_size,
            "at least 2: advantages compare the responses of a group",
        )
        require(0 < self.epsilon < 1, "epsilon", self.epsilon, "above 0 and below 1")
        require(
            self.epsilon_high is None or self.epsilon_high > 0,
            "epsilon_high",
            self.epsilon_high,
            "above 0, or null for epsilon",
        )
        require(self.beta >= 0, "beta", self.beta, "0 (no KL) or more")
        require(
            self.minibatches <= self.prompts_per_step,
            "minibatches",
            self.minibatches,
            f"at most prompts_per_step ({self.prompts_per_step}): it holds whole groups. Lower it or raise that",
        )


@dataclass(frozen=True)
class PairsConfig:
    """How the model's own preference pairs are made.

    prompts: training prompts to sample for, from the first; None: all.
    samples_per_prompt: responses per prompt from each of the two models (4, ours).
    corruptions: mix of format corruptions of rejected responses, name to relative weight (names: ``CORRUPTIONS``;
        equal weights, the paper's mix is not published).
    judge: does the reasoning support the answer: "rule", or an import path "package.module:function" called as
        ``judge(reasoning, answer) -> bool`` (the paper asks a large model).
    max_pairs: stop at this many; None: no limit. The paper has about 9,000.
    chosen_from: "zero" (paper: the model of the zero stage) or "base" (its ablation).
    rejected_from: "base" (paper: the base model's own correct responses, corrupted) or "chosen" (the chosen text,
        corrupted).
    sampling: see SamplingConfig.
    """

    prompts: int | None = None
    samples_per_prompt: int = 4
    corruptions: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CORRUPTIONS, 1.0))
    judge: str = "rule"
    max_pairs: int | None = None
    chosen_from: Literal["zero", "base"] = "zero"
    rejected_from: Literal["base", "chosen"] = "base"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for key in ("prompts", "max_pairs"):
            require(
                getattr(self, key) is None or getattr(self, key) >= 1,
                key,
                getattr(self, key),
                "at least 1, or null for no limit",
            )
        require(self.samples_per_prompt >= 1, "samples_per_prompt", self.samples_per_prompt, "at least 1")
        for name, weight in self.corruptions.items():
            require(name in CORRUPTIONS, "corruptions", name, f"one of {', '.join(CORRUPTIONS)}")
            require(weight >= 0, f"corruptions.{name}", weight, "0 or more")
        require(
            sum(self.corruptions.values()) > 0,
            "corruptions",
            self.corruptions,
            "a mix whose weights sum to more than 0",
        )
        known = self.judge == "rule" or _IMPORT_PATH.fullmatch(self.judge) is not None
        require(known, "judge", self.judge, "'rule' or an import path package.module:function")


@dataclass(frozen=True)
class DPOConfig:
    """The cold start: DPO + nll_weight * SFT on the chosen side, from the base model.

    optim: see OptimConfig.
    kind: "dpo" (the paper's), or "sft": the paper's control, supervised fine-tuning on the chosen side of the same pairs; it
        takes no beta, label_smoothing or nll_weight.
    batch_size: pairs per optimizer step (paper: 64; 32 suits the lab).
    epochs: passes over the pairs (the paper's figures amount to 1).
    max_steps: stop after this many optimizer steps; None: all epochs.
    beta: DPO's temperature (0.1: LLaMA-Factory's and TRL's default; not stated in the paper).
    label_smoothing: probability that a preference label is flipped, [0, 0.5); 0 as in the paper.
    nll_weight: weight of the SFT term, the paper's lambda: 1.
    nll_mode: "sequence" (mean of per-response token means: LLaMA-Factory's, so the paper's) or "token" (mean over all
        tokens: TRL's).
    micro_batch_tokens: tokens of one forward and backward; bounds memory, never changes the result. A pair that exceeds
        it is a micro-batch of its own.
    """

    optim: OptimConfig
    kind: Literal["dpo", "sft"] = "dpo"
    batch_size: int = 32
    epochs: int = 1
    max_steps: int | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 1.0
    nll_mode: Literal["sequence", "token"] = "sequence"
    micro_batch_tokens: int = 16384

    def __post_init__(self) -> None:
        for key in ("batch_size", "epochs", "micro_batch_tokens"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(
            self.max_steps is None or self.max_steps >= 1,
            "max_steps",
            self.max_steps,
            "at least 1, or null for all epochs",
        )
        require(self.beta > 0, "beta", self.beta, "above 0")
        for key, unused in (("beta", 0.1), ("label_smoothing", 0.0), ("nll_weight", 1.0)):
            require(
                self.kind == "dpo" or getattr(self, key) == unused,
                key,
                getattr(self, key),
                f"its default ({unused}) where kind is sft, which takes no {key}. Drop {key}, or set kind: dpo",
            )
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "at least 0 and below 0.5")
        require(self.nll_weight >= 0, "nll_weight", self.nll_weight, "0 or more")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of base, zero, cold start and final, with the same settings for each.

    splits: name to JSONL file. Filled in by the lab where there is one.
    limit: rows per split, from the first; None: all.
    samples: sampled responses per prompt (4, ours).
    pass_k: the k of the unbiased pass@k to report, each at most ``samples``.
    temperature: of the sampled responses; 1.0 as in training, without truncation by top-p or top-k.
    max_new_tokens: longest response in tokens, sampled and greedy.
    greedy: also decode greedily.
    seed: of the samples; apart from the training seed, so that every model is asked alike.
    batch_prompts: prompts decoded together; bounds memory.
    """

    splits: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    samples: int = 4
    pass_k: tuple[int, ...] = (1, 4)
    temperature: float = 1.0
    max_new_tokens: int = 64
    greedy: bool = True
    seed: int = 1234
    batch_prompts: int = 64

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1, or null for all rows")
        for key in ("samples", "max_new_tokens", "batch_prompts"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(
            len(self.pass_k) > 0 and min(self.pass_k) >= 1,
            "pass_k",
            self.pass_k,
            "one or more whole numbers, each at least 1",
        )
        require(
            max(self.pass_k) <= self.samples,
            "pass_k",
            self.pass_k,
            f"at most samples ({self.samples}) each: pass@k needs k samples. Raise samples or drop the larger k",
        )
        _check_temperature(self.temperature)
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True)
class LabConfig:
    """The embedded default: digit images with verifiable questions, and a tiny base model that sees them.

    questions_train: training questions (4,000: more than the lab's recipe visits in one pass).
    questions_eval: questions per evaluation split (400 keep the standard error below 2.5 points).
    seed: of the questions and of the base model's pre-training.
    """

    questions_train: int = 4000
    questions_eval: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("questions_train", "questions_eval"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


def _check_temperature(temperature: float) -> None:
    require(
        temperature > 0, "temperature", temperature, "above 0 (greedy decoding is eval.greedy, not a temperature of 0)"
    )

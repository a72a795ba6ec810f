"""Whole updates, packed and shared against padded: ``specs-fast bench update``, or ``python -m bench.update``.

An update is: score the responses with gradients, the policy loss (the preference loss for DPO pairs), backward, one AdamW step.
Every arm has a copy of one lab-width Qwen3-VL of random weights, fp32:

* padded: transformers' own forward of right-padded rows as trainers call it (token ids, attention mask, the pixels of every row's
  images), on PyTorch's SDPA and transformers' own layers.
* padded_once: ``packing: none`` of this trainer: the same rows, but each distinct image encoded once (by a frozen tower once for
  all updates), positions kept between calls, no mask where causality makes it needless, no last tokens, and on the CPU RMSNorm
  and SwiGLU on our kernels. The strongest padded baseline we know.
* packed: this trainer's packed row without sharing: every response with a prompt of its own. Layers and images as padded_once.
* shared_torch: ``packing: shared``, the packed forest, on PyTorch backends only: what runs without the native library (the lab's
  mixes only).
* shared: the same on the default backends, and on the CPU the same layers as padded_once.

All send the hidden states that predict response tokens, and no others, through the same `linear_logprob`. The arms alternate
within one run, so that whatever else the machine does meets all of them; ratios are those of medians.

Errors are against the padded arm in fp64, from the same weights: of the loss, and of the gradient with every parameter's divided
by the norm of its exact one, so that each counts alike.

Sections "by attention backend" run the shared arm on one backend of `packed_attention` each, and their errors are against the
backend named first: losses of five updates, gradient of the first. ``python -m bench.update --attention chunked native`` does
that for every mix.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench import run as runner
from bench.section import Arm, Case, Goal, Section, library
from bench.update_mixes import IMAGE_HEAVY, LAB, MIXES, TINY, Mix, lab_width_model, make_trees
from specs_fast.data.types import Scores, Tree
from specs_fast.models import attention, score
from specs_fast.models.layers import fuse_layers
from specs_kernels import linear_logprob, native, packed_attention, policy_loss, preference_loss
from specs_kernels.dispatch import choose

WHAT = "one update (score, loss, backward, AdamW) of a lab-width model, fp32; arms and errors are described in bench/update.py"
BY_ATTENTION = ", by attention backend"
UPDATES = 5
Scorer = Callable[[PreTrainedModel, list[Tree]], Scores]


def plain_padded(model: PreTrainedModel, trees: list[Tree]) -> Scores:
    """Log-probs by transformers' own forward: right-padded rows, attention mask, every row's pixels; positions by the model."""
    device = model.device
    rows = [(tree.prompt, response) for tree in trees for response in tree.responses]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids, mask, types = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    predictors = []
    for row, (prompt, response) in enumerate(rows):
        total = len(prompt) + len(response)
        ids[row, :total] = torch.cat((prompt.input_ids, response))
        mask[row, :total] = 1
        types[row, : len(prompt)] = prompt.token_types
        predictors.append(torch.arange(len(prompt) - 1, total - 1) + row * longest)
    images = [image for prompt, _ in rows for image in prompt.images]
    vision = {}
    if images:
        vision = {
            "mm_token_type_ids": types.to(device),
            "pixel_values": torch.cat([image.pixel_values for image in images]).to(device),
            "image_grid_thw": torch.tensor([image.grid_thw for image in images], device=device),
        }
    output = model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **vision)
    targets = torch.cat([response for _, response in rows]).to(device)
    head = model.get_output_embeddings().weight
    hidden = output.last_hidden_state.flatten(0, 1)
    logp = linear_logprob(hidden, head, targets, rows=torch.cat(predictors).to(device)).logp
    lengths = torch.tensor([len(response) for _, response in rows], device=device)
    return Scores(logp, None, Scores.segments(lengths), lengths)


def alone(trees: list[Tree]) -> list[Tree]:
    """Every response with a prompt of its own, in the same order."""
    return [Tree(tree.prompt, (response,)) for tree in trees for response in tree.responses]


def shared_on_torch(model: PreTrainedModel, trees: list[Tree]) -> Scores:
    with mock.patch.object(native, "missing", lambda: "left out in this arm"):
        return score(model, trees, packing="shared")


SCORERS: dict[str, Scorer] = {
    "padded": plain_padded,
    "padded_once": lambda model, trees: score(model, trees, packing="none"),
    "packed": lambda model, trees: score(model, alone(trees), packing="shared"),
    "shared_torch": shared_on_torch,
    "shared": lambda model, trees: score(model, trees, packing="shared"),
}
PLAIN_LAYERS = ("padded", "shared_torch")
"""Arms whose norms and SwiGLU are transformers' own; the others' run on our kernels, as the trainer's stages do."""


class Problem:
    """A mix's model and trees, and what the loss needs beside their scores: the same for every arm, as stored rollouts are."""

    def __init__(self, mix: Mix, device: torch.device) -> None:
        self.mix, self.trees = mix, make_trees(mix)
        self.model = lab_width_model(freeze_vision=mix.vision == "frozen").to(device)
        generator = torch.Generator().manual_seed(1)
        lengths = torch.tensor([len(response) for tree in self.trees for response in tree.responses])
        self.advantage = torch.repeat_interleave(torch.randn(len(lengths), generator=generator), lengths).to(device)
        # A behaviour or reference policy a little off, so that some ratios are clipped.
        noise = (0.1 * torch.randn(int(lengths.sum()), generator=generator)).to(device)
        with torch.no_grad():
            self.other_logp = plain_padded(self.model, self.trees).logp + noise

    def loss(self, scores: Scores) -> Tensor:
        logp, other = scores.logp, self.other_logp.to(scores.logp.dtype)
        if self.mix.loss == "dpo":
            pairs = torch.arange(2 * len(self.trees), device=logp.device).view(-1, 2)
            return preference_loss(logp, other, scores.segment_ids, pairs, beta=0.1, nll_weight=1.0)[0]
        advantage = self.advantage.to(logp.dtype)
        return policy_loss(logp, other, advantage, scores.segment_ids, epsilon=0.2, epsilon_high=0.28)[0]


class Update:
    """One way of taking updates, with a model and an optimizer of its own."""

    def __init__(
        self, problem: Problem, scorer: Scorer, *, fused: bool, backend: str | None = None, exact: bool = False
    ) -> None:
        self.problem, self.scorer, self.backend = problem, scorer, backend
        self.model = copy.deepcopy(problem.model)
        if exact:
            self.model.double()
        self.layers = fuse_layers(self.model) if fused else {}
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def __call__(self) -> dict[str, Tensor]:
        """The loss and the gradients, as they are before the next call."""
        self.optimizer.zero_grad(set_to_none=True)
        with nullcontext() if self.backend is None else on_backend(self.backend):
            loss = self.problem.loss(self.scorer(self.model, self.problem.trees))
            loss.backward()
        self.optimizer.step()
        gradients = {f"d {name}": p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **gradients}


class Course:
    """The first updates of an arm that has taken none, compared with those of the one that the others are held to."""

    def __init__(self, reference: Callable[[], Update], updates: int) -> None:
        self.reference, self.updates = reference, updates

    @cached_property
    def expected(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.taken(self.reference())

    def taken(self, update: Update) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[updates]``, and gradients of the first update."""
        first = {name: value.clone() for name, value in update().items()}
        losses = [first.pop("loss"), *(update()["loss"] for _ in range(self.updates - 1))]
        return torch.stack(losses), first

    def exact(self) -> dict[str, Tensor]:
        return self.scaled(*self.expected)

    def of(self, make: Callable[[], Update]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return lambda outputs: self.scaled(*self.taken(make()))

    def scaled(self, losses: Tensor, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """A parameter whose gradient is zero by mathematics, of which rounding leaves something (a key's bias: softmax does
        not see it), counts against a ten-thousandth of the mean norm of all gradients."""
        norms = {name: gradient.norm().item() for name, gradient in self.expected[1].items()}
        if gradients.keys() != norms.keys():
            raise ValueError(f"gradients of different parameters: {sorted(gradients.keys() ^ norms.keys())}")
        floor = 1e-4 * sum(norms.values()) / len(norms)
        flat = [(gradients[name] / max(norm, floor)).flatten() for name, norm in norms.items()]
        return {"loss": losses, "gradient": torch.cat(flat)}


def on_backend(name: str) -> AbstractContextManager[object]:
    """The trainer's packed attention runs on this backend, or raises."""
    return mock.patch.object(attention, "packed_attention", partial(packed_attention, backend=name))


def build(mix: Mix, device: torch.device) -> Section:
    """All arms of a mix."""
    problem = Problem(mix, device)
    course = Course(partial(Update, problem, plain_padded, fused=False, exact=True), 1)
    arms = [
        arm(name, partial(Update, problem, scorer, fused=name not in PLAIN_LAYERS), course)
        for name, scorer in SCORERS.items()
        if mix.without_native or name != "shared_torch"
    ]
    return Section(arms, exact=course.exact)


def build_by_attention(mix: Mix, backends: Sequence[str], device: torch.device) -> Section:
    """The shared arm on each of these backends."""
    problem = Problem(mix, device)
    made = {name: partial(Update, problem, SCORERS["shared"], fused=True, backend=name) for name in backends}
    course = Course(made[backends[0]], UPDATES)
    return Section([arm(f"shared [{name}]", make, course) for name, make in made.items()], exact=course.exact)


def arm(name: str, make: Callable[[], Update], course: Course) -> Arm:
    update = make()
    count = text_tokens(name, update.problem.trees)
    layers = "".join(f", {number} {layer}" for layer, number in update.layers.items())
    note = f"{count:,} tokens through the text layers" + (f"; on our kernels: {layers[2:]}" if layers else "")
    return Arm(
        name, library("transformers" if name == "padded" else "specs_fast"), update, note=note, check=course.of(make)
    )


def text_tokens(name: str, trees: list[Tree]) -> int:
    """Tokens that go through the text layers."""
    lengths = [(len(tree.prompt), len(response)) for tree in trees for response in tree.responses]
    if name.startswith("shared"):
        return sum(len(tree.prompt) for tree in trees) + sum(response - 1 for _, response in lengths)
    if name == "packed":
        return sum(prompt + response - 1 for prompt, response in lengths)
    longest = max(prompt + response for prompt, response in lengths)
    return len(lengths) * (longest - (name == "padded_once"))


def cases(device: torch.device, *, tiny: bool = False, by_attention: Sequence[str] = ()) -> list[Case]:
    """Every mix; and how two attention backends compare, in one mix, or in all of them on the backends that are named."""
    mixes, rounds = (TINY, 2) if tiny else (MIXES, 5)
    listed = [Case(mix.name, mix.shape, partial(build, mix), rounds) for mix in mixes if not by_attention]
    backends = tuple(by_attention or ("chunked", choose("packed_attention", device=device).backend))
    for mix in mixes if by_attention else mixes[1:2]:
        if len(set(backends)) > 1:
            build_it = partial(build_by_attention, mix, backends)
            listed.append(Case(mix.name + BY_ATTENTION, {**mix.shape, "backends": list(backends)}, build_it, rounds))
    return listed


def goals(device: torch.device) -> list[Goal]:
    """What is promised on a CPU; GPU updates of so small a model are bound by launches."""
    if device.type != "cpu":
        return []
    faster = [(mix, 4.0) for mix in LAB[:4]] + [(mix, 5.0) for mix in IMAGE_HEAVY]
    listed = [Goal(mix.name, "shared", "times_faster_than:padded", bound, at_most=False) for mix, bound in faster]
    old_and_new = "times_faster_than:shared [chunked]"
    return [*listed, Goal(LAB[1].name + BY_ATTENTION, "shared [native]", old_and_new, round(1 / 0.9, 3), at_most=False)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.update", description="Whole updates: packed against padded.")
    runner.add_options(parser)
    parser.add_argument("--mix", dest="shapes", nargs="+", metavar="TEXT", help="the same as --shapes")
    parser.add_argument(
        "--attention",
        nargs="+",
        default=(),
        metavar="BACKEND",
        help="the shared arm on these backends of packed_attention, interleaved, instead of all arms",
    )
    parser.set_defaults(op="update")
    options = parser.parse_args(arguments)
    op = SimpleNamespace(WHAT=WHAT, cases=partial(cases, by_attention=options.attention), goals=goals)
    try:
        if len(options.attention) == 1:
            raise runner.BadOption(f"--attention {options.attention[0]}: name at least two backends to compare")
        return runner.exit_code(runner.run(options, op))
    except runner.BadOption as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

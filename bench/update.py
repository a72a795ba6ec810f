"""One GRPO update, packed and shared against padded: `python -m bench.update` from the root of the repository.

An update is: score the responses with gradients, the policy loss, backward, one AdamW step. Three arms, each with a copy of one
lab-width Qwen3-VL of random weights:

* padded: transformers' own forward of right-padded rows as trainers call it (token ids, attention mask, the pixels of every row's
  images), on PyTorch's SDPA and transformers' own layers.
* padded_once: `packing: none` of this trainer: the same rows, but each distinct image encoded once (by a frozen tower once for
  all updates), positions kept between calls, no mask where causality makes it needless, no last tokens, and on the CPU RMSNorm
  and SwiGLU on our kernels. The strongest padded baseline we know.
* shared_torch: `packing: shared`, the packed forest, on PyTorch backends only: what runs without the native library.
* shared: the same on the default backends, and on the CPU the same layers as padded_once.

All send the hidden states that predict response tokens, and no others, through the same `linear_logprob`. The arms
alternate within one run, so that whatever else the machine does meets all of them; ratios are those of medians.

Writes bench/results/<cpu|gpu>/update.json and prints the same as a table.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from bench.machine import OtherLoad, provenance
from bench.run import RESULTS, write_json
from specs_fast.data.processor import IMAGE_TOKEN
from specs_fast.data.types import EncodedImage, EncodedPrompt, Scores, Tree
from specs_fast.lab.model import new_model
from specs_fast.lab.processor import SPECIAL, VISION_END, VISION_START, build_tokenizer
from specs_fast.models import score
from specs_fast.models.layers import fuse_layers
from specs_fast.models.load import vision_tower
from specs_kernels import linear_logprob, native, policy_loss
from specs_kernels.dispatch import choose

TOKENIZER = build_tokenizer()
IMAGE, VISION_BEGIN, VISION_STOP = TOKENIZER.convert_tokens_to_ids([IMAGE_TOKEN, VISION_START, VISION_END])
PATCH, MERGE, TEMPORAL = 8, 2, 1
TARGET = "shared at least 3x faster than padded on the first two shapes; gradient errors below 1e-5"


@dataclass(frozen=True)
class Shape:
    """Lengths are (smallest, largest); a prompt's include its image. grid: time, height, width of an image in patches."""

    name: str
    prompts: int
    prompt_tokens: tuple[int, int]
    responses: int
    response_tokens: tuple[int, int]
    grid: tuple[int, int, int]

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] // MERGE**2


SHAPES = (
    Shape("8 prompts of 86 x 8 responses of 40", 8, (86, 86), 8, (40, 40), (1, 16, 16)),
    Shape("the same with the lab's image of 12 tokens", 8, (86, 86), 8, (40, 40), (1, 4, 12)),
    Shape("lab: 16 prompts of ~35 x 8 responses of ~20", 16, (32, 38), 8, (14, 26), (1, 4, 12)),
)


def lab_width_model(*, freeze_vision: bool, seed: int = 0) -> PreTrainedModel:
    """The lab's Qwen3-VL with random weights: 1.4 M parameters."""
    model = new_model(TOKENIZER, seed)
    tower = vision_tower(model)
    assert tower is not None
    tower.requires_grad_(not freeze_vision)
    return model


def make_trees(shape: Shape, seed: int = 0) -> list[Tree]:
    """Random prompts, each with one image of its own, and random responses, of the shape's lengths."""
    generator = torch.Generator().manual_seed(seed)

    def length(bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator))

    def text(count: int) -> torch.Tensor:
        return torch.randint(len(SPECIAL), len(TOKENIZER), (count,), generator=generator)

    trees = []
    for index in range(shape.prompts):
        pixels = torch.randn(shape.image_tokens * MERGE**2, 3 * TEMPORAL * PATCH * PATCH, generator=generator)
        image = torch.full((shape.image_tokens,), IMAGE)
        head, tail = 6, length(shape.prompt_tokens) - 6 - 2 - len(image)
        ids = torch.cat((text(head), torch.tensor([VISION_BEGIN]), image, torch.tensor([VISION_STOP]), text(tail)))
        shown = EncodedImage(f"{shape.name} {index}", pixels, shape.grid)
        prompt = EncodedPrompt(str(index), ids, (ids == IMAGE).long(), (shown,))
        trees.append(Tree(prompt, tuple(text(length(shape.response_tokens)) for _ in range(shape.responses))))
    return trees


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
    hidden = model.base_model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        mm_token_type_ids=types.to(device),
        pixel_values=torch.cat([image.pixel_values for image in images]).to(device),
        image_grid_thw=torch.tensor([image.grid_thw for image in images], device=device),
        use_cache=False,
    ).last_hidden_state
    targets = torch.cat([response for _, response in rows]).to(device)
    head = model.get_output_embeddings().weight
    logp = linear_logprob(hidden.flatten(0, 1), head, targets, rows=torch.cat(predictors).to(device)).logp
    lengths = torch.tensor([len(response) for _, response in rows], device=device)
    return Scores(logp, None, Scores.segments(lengths), lengths)


def shared_on_torch(model: PreTrainedModel, trees: list[Tree]) -> Scores:
    with mock.patch.object(native, "missing", lambda: "left out in this arm"):
        return score(model, trees, packing="shared")


SCORERS: dict[str, Callable[[PreTrainedModel, list[Tree]], Scores]] = {
    "padded": plain_padded,
    "padded_once": lambda model, trees: score(model, trees, packing="none"),
    "shared_torch": shared_on_torch,
    "shared": lambda model, trees: score(model, trees, packing="shared"),
}
FUSED = ("padded_once", "shared")
"""Arms whose norms and SwiGLU run on our kernels, as the trainer's stages do."""


class Arm:
    """One way of taking the update, with a model and an optimizer of its own."""

    def __init__(self, name: str, model: PreTrainedModel, trees: list[Tree]) -> None:
        self.scorer = SCORERS[name]
        self.model = copy.deepcopy(model)
        self.fused_layers = fuse_layers(self.model) if name in FUSED else {}
        self.trees = trees
        device = self.model.device
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), fused=True)
        generator = torch.Generator().manual_seed(1)
        lengths = torch.tensor([len(response) for tree in trees for response in tree.responses])
        self.advantage = torch.repeat_interleave(torch.randn(len(lengths), generator=generator), lengths).to(device)
        # A behaviour policy a little off, so that some ratios are clipped.
        noise = (0.1 * torch.randn(int(lengths.sum()), generator=generator)).to(device)
        with torch.no_grad():
            self.old_logp = self.scorer(self.model, trees).logp + noise

    def backward(self) -> None:
        scores = self.scorer(self.model, self.trees)
        loss, _ = policy_loss(
            scores.logp, self.old_logp, self.advantage, scores.segment_ids, epsilon=0.2, epsilon_high=0.28
        )
        loss.backward()

    def update(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.backward()
        self.optimizer.step()

    def gradients(self) -> dict[str, torch.Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        self.backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return gradients


def text_tokens(name: str, trees: list[Tree]) -> int:
    """Tokens that go through the text layers."""
    lengths = [[len(response) for response in tree.responses] for tree in trees]
    if name.startswith("shared"):
        return sum(tree.num_tokens - len(n) for tree, n in zip(trees, lengths, strict=True))
    longest = max(len(tree.prompt) + r for tree, n in zip(trees, lengths, strict=True) for r in n)
    return sum(map(len, lengths)) * (longest - (name == "padded_once"))


def gradient_error(arm: Arm, reference: Arm) -> float:
    """The largest ||g - reference|| / ||reference|| over parameters. A parameter whose gradient is zero by mathematics, of which
    rounding leaves something (a key's bias: softmax does not see it), counts against the mean norm of all gradients."""
    got, expected = arm.gradients(), reference.gradients()
    assert got.keys() == expected.keys()
    floor = 1e-4 * statistics.mean(gradient.norm().item() for gradient in expected.values())
    return max(((got[n] - grad).norm() / grad.norm().clamp_min(floor)).item() for n, grad in expected.items())


def seconds(function: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: Shape, *, freeze_vision: bool, device: str, repeats: int) -> dict[str, Any]:
    """All arms of one shape, alternating."""
    model = lab_width_model(freeze_vision=freeze_vision).to(device)
    trees = make_trees(shape)
    arms = {name: Arm(name, model, trees) for name in SCORERS}
    errors = {name: gradient_error(arms[name], arms["padded"]) for name in arms if name != "padded"}
    times: dict[str, list[float]] = {name: [] for name in arms}
    others = OtherLoad()
    for repeat in range(-2, repeats):  # two rounds to warm up
        for name in sorted(arms, reverse=repeat % 2 == 0):
            elapsed = seconds(arms[name].update, model.device)
            if repeat >= 0:
                times[name].append(1e3 * elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": asdict(shape),
        "vision": "frozen" if freeze_vision else "trained",
        "backends": {op: choose(op, device=device).backend for op in ("packed_attention", "linear_logprob")},
        "fused_layers": {name: arm.fused_layers for name, arm in arms.items()},
        "text_tokens": {name: text_tokens(name, trees) for name in arms},
        "milliseconds": {
            name: {
                "median": round(medians[name], 2),
                "quartiles": [round(quartile, 2) for quartile in statistics.quantiles(values, n=4)[::2]],
            }
            for name, values in times.items()
        },
        "times_faster": {name: round(medians[name] / medians["shared"], 3) for name in arms if name != "shared"},
        "gradient_error_against_padded": errors,
        "repeats": repeats,
        "cores_busy_with_other_processes": others.cores(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="One GRPO update: packed and shared against padded.")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--out", type=Path, help="JSON to write (default: bench/results/<cpu|gpu>/update.json)")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    kind = "cpu" if arguments.device == "cpu" else "gpu"
    path = arguments.out or RESULTS / kind / "update.json"
    rows: list[dict[str, Any]] = []
    result = {
        **provenance(),
        "what": "one GRPO update (score, policy loss, backward, AdamW), fp32; the arms are described in bench/update.py",
        "target": TARGET,
        "rows": rows,
        "gpu": "not measured" if kind == "cpu" else "see rows",
    }
    print(f"{'shape':44} {'vision':8}" + "".join(f"{name:>16}" for name in SCORERS) + "   shared is faster by")
    for shape in SHAPES:
        for freeze in (False, True):
            row = measure(shape, freeze_vision=freeze, device=arguments.device, repeats=arguments.repeats)
            rows.append(row)
            if not arguments.no_write:  # whoever runs out of time keeps the rows that are there
                write_json(path, result)
            times = "".join(f"{row['milliseconds'][name]['median']:13.1f} ms" for name in SCORERS)
            ratios = ", ".join(f"{ratio:.2f}x ({name})" for name, ratio in row["times_faster"].items())
            others = row["cores_busy_with_other_processes"]
            note = f"   ({others} cores busy with other processes)" if others and others > 0.1 else ""
            print(f"{shape.name:44} {row['vision']:8}{times}   {ratios}{note}", flush=True)
    worst = max(error for row in rows for error in row["gradient_error_against_padded"].values())
    print(f"gradients agree to {worst:.1e} relative")
    if not arguments.no_write:
        print(f"written to {path}")


if __name__ == "__main__":
    main()

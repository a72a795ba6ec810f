"""One GRPO update, packed and shared against padded: `python -m bench.update` from the root of the repository.

An update is: score the responses with gradients, the policy loss, backward, one AdamW step. Both arms run the same lab-width
Qwen3-VL (random weights, vision frozen as in the lab's recipe), encode each image once, and score response tokens only through
the same `linear_logprob`; the padded arm is right-padded and runs on PyTorch's SDPA with its causal fast path (no mask tensor).
The arms alternate within one run, so that whatever else the machine does meets both; the ratio is that of their medians.

Writes bench/results/<cpu|gpu>/update.json and prints the same as a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from bench.machine import provenance
from specs_fast.data.types import EncodedImage, EncodedPrompt, Tree
from specs_fast.models import score
from specs_fast.models.load import vision_tower
from specs_kernels import policy_loss

RESULTS = Path(__file__).parent / "results"
VOCAB, IMAGE, VIDEO, VISION_START, VISION_END = 117, 113, 114, 115, 116
GRID = (1, 4, 12)  # the lab's canvas of 32 x 96 pixels in patches of 8: 12 image tokens after merging
TARGET_RATIO = 3.0


@dataclass(frozen=True)
class Shape:
    name: str
    prompts: int
    prompt_tokens: tuple[int, int]  # smallest and largest, image included
    responses: int
    response_tokens: tuple[int, int]


SHAPES = (
    Shape("8 prompts of 86 x 8 responses of 40", 8, (86, 86), 8, (40, 40)),
    Shape("the lab: 16 prompts of about 35 x 8 responses of about 20", 16, (32, 38), 8, (14, 26)),
)


def lab_width_model(seed: int = 0) -> PreTrainedModel:
    """A Qwen3-VL of the lab's architecture with random weights: 1.4 M parameters."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0],
    }
    tokens = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    torch.manual_seed(seed)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    model = Qwen3VLForConditionalGeneration(config).eval()
    tower = vision_tower(model)
    assert tower is not None
    tower.requires_grad_(False)
    return model


def make_trees(shape: Shape, seed: int = 0) -> list[Tree]:
    """Random prompts, each with one image of its own, and random responses, of the shape's lengths."""
    generator = torch.Generator().manual_seed(seed)

    def length(bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator))

    def text(count: int) -> torch.Tensor:
        return torch.randint(2, IMAGE, (count,), generator=generator)

    trees = []
    for index in range(shape.prompts):
        pixels = torch.randn(GRID[0] * GRID[1] * GRID[2], 3 * 2 * 8 * 8, generator=generator)
        image = torch.full((GRID[1] * GRID[2] // 4,), IMAGE)
        head, tail = 6, length(shape.prompt_tokens) - 6 - 2 - len(image)
        ids = torch.cat((text(head), torch.tensor([VISION_START]), image, torch.tensor([VISION_END]), text(tail)))
        prompt = EncodedPrompt(str(index), ids, (ids == IMAGE).long(), (EncodedImage(str(index), pixels, GRID),))
        trees.append(Tree(prompt, tuple(text(length(shape.response_tokens)) for _ in range(shape.responses))))
    return trees


class Arm:
    """One way of taking the update, with a model and an optimizer of its own."""

    def __init__(self, model: PreTrainedModel, trees: list[Tree], packing: str) -> None:
        self.model = copy.deepcopy(model)
        self.trees = trees
        self.packing = packing
        device = self.model.device
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), fused=True)
        tokens = sum(tree.num_response_tokens for tree in trees)
        generator = torch.Generator().manual_seed(1)
        lengths = torch.tensor([len(response) for tree in trees for response in tree.responses])
        self.advantage = torch.repeat_interleave(torch.randn(len(lengths), generator=generator), lengths).to(device)
        self.old_noise = (0.1 * torch.randn(tokens, generator=generator)).to(device)
        self.old_logp: torch.Tensor | None = None

    def backward(self) -> None:
        scores = score(self.model, self.trees, packing=self.packing)  # type: ignore[arg-type]
        if self.old_logp is None:  # a behaviour policy a little off, so that some ratios are clipped
            self.old_logp = scores.logp.detach() + self.old_noise
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
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return grads

    @property
    def forward_tokens(self) -> int:
        """Tokens that go through the text layers; the last token of a response does not, in either arm."""
        lengths = [[len(response) for response in tree.responses] for tree in self.trees]
        if self.packing == "shared":
            return sum(tree.num_tokens - len(n) for tree, n in zip(self.trees, lengths, strict=True))
        rows = [len(tree.prompt) + r - 1 for tree, n in zip(self.trees, lengths, strict=True) for r in n]
        return len(rows) * max(rows)


def gradient_error(shared: Arm, padded: Arm) -> float:
    """The largest ||shared - padded|| / ||padded|| over parameters."""
    got, expected = shared.gradients(), padded.gradients()
    assert got.keys() == expected.keys()
    return max(((got[name] - grad).norm() / grad.norm()).item() for name, grad in expected.items())


def seconds(function: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: Shape, model: PreTrainedModel, repeats: int) -> dict[str, Any]:
    """Both arms of one shape, alternating."""
    trees = make_trees(shape)
    arms = {"shared": Arm(model, trees, "shared"), "none": Arm(model, trees, "none")}
    error = gradient_error(arms["shared"], arms["none"])
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(-3, repeats):  # three warm-up rounds
        for name in sorted(arms, reverse=repeat % 2 == 0):
            elapsed = seconds(arms[name].update, model.device)
            if repeat >= 0:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": asdict(shape),
        "tokens": {name: arm.forward_tokens for name, arm in arms.items()},
        "milliseconds": {
            name: {
                "median": round(1e3 * medians[name], 2),
                "quartiles": [round(1e3 * q, 2) for q in statistics.quantiles(values, n=4)[::2]],
            }
            for name, values in times.items()
        },
        "ratio": round(medians["none"] / medians["shared"], 3),
        "gradient_error": error,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = lab_width_model().to(arguments.device)
    rows = [measure(shape, model, arguments.repeats) for shape in SHAPES]
    kind = "cpu" if arguments.device == "cpu" else "gpu"
    result = {
        **provenance(),
        "what": "one GRPO update (score, policy loss, backward, AdamW), fp32, vision frozen",
        "arms": {
            "shared": "packed forest, prompts stored once",
            "none": "right-padded, SDPA with its causal fast path",
        },
        "rows": rows,
        "gpu": "not measured" if kind == "cpu" else "see rows",
        "target": f"at least {TARGET_RATIO}x on the first shape, gradient_error below 1e-5",
    }
    print(f"{'shape':58} {'padded':>10} {'shared':>10} {'ratio':>7} {'gradient error':>15}")
    for row in rows:
        padded, shared = (row["milliseconds"][name]["median"] for name in ("none", "shared"))
        print(
            f"{row['shape']['name']:58} {padded:7.1f} ms {shared:7.1f} ms {row['ratio']:6.2f}x {row['gradient_error']:15.1e}"
        )
    if not arguments.no_write:
        path = RESULTS / kind / "update.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()

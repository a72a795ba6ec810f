"""Two gloo ranks: every run with the host's own log-probs and with ours. `test_two_ranks.py` starts it and reads its files.

usage: two_ranks.py FOLDER PORT
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from tiny_hosts import Run, gradients, make_batch, make_model, run_dpo, run_grpo, run_hf_trainer
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from specs_fast.integrations.transformers import _head_forward, _Options, logprob_head

LEARNING_RATE = 0.1
_OPTIONS = _Options(1.0, False, None, "auto", None, 1.0)


def fsdp2(ours: bool, *, tied: bool, half: bool = False) -> dict[str, Any]:
    """Two steps of plain SGD on this rank's batch; the whole gradients and weights of both steps. Untied: the head is a group."""
    model = make_model("tied" if tied else "untied")
    handle = logprob_head(model, return_entropy=True) if ours else None
    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if half else {}
    for layer in model.model.layers:
        fully_shard(layer, **policy)
    if not tied:
        fully_shard(model.lm_head, **policy)
    fully_shard(model, **policy)
    result: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(2):
        batch = make_batch(seed=10 * step + dist.get_rank())
        outputs = model(**batch)
        if handle is None:
            logits, labels = outputs.logits[:, :-1].float(), batch["labels"][:, 1:]
            logp = logits.log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1)[labels != -100].mean()
            loss = outputs.loss.float() - 0.1 * entropy
        else:
            count = (batch["labels"][:, 1:] != -100).sum()
            loss = outputs.loss - 0.1 * outputs.entropy.sum() / count
        loss.backward()
        result["losses"].append(float(loss.detach()))
        result["gradients"].append({name: grad.full_tensor() for name, grad in gradients(model).items()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
        model.zero_grad()
    return result


def hosted(run: Callable[..., Run], swap: Callable[[Any], Any], folder: Path, **settings: Any) -> dict[str, Any]:
    """One trainer run from the saved tiny model, with its head or its log-prob function swapped by ``swap``."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with swap(model):
        done = run(model, folder / "out", **settings)
    return {"losses": done.losses, "gradients": done.gradients}


def head_called_from_outside() -> str:
    """What a head says that is called past FSDP's hooks, its weight still sharded."""
    model = make_model("untied")
    logprob_head(model)
    fully_shard(model)
    try:
        target = torch.zeros(1, 2, dtype=torch.long)
        _head_forward(model.lm_head, torch.zeros(1, 2, 32), target=target, options=_OPTIONS)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def main(folder: Path, rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    PartialState(cpu=True)  # the trainers' process group, gloo
    results: dict[str, Any] = {"backend": dist.get_backend(), "outside": head_called_from_outside()}
    for name, tied, half in (("fsdp2 untied", False, False), ("fsdp2 tied", True, False), ("fsdp2 bf16", False, True)):
        results[name] = {who: fsdp2(who == "ours", tied=tied, half=half) for who in ("own", "ours")}
    runs: dict[str, tuple[Callable[..., Run], Callable[[Any], Any], dict[str, Any]]] = {
        "hf": (run_hf_trainer, logprob_head, {})
    }
    if importlib.util.find_spec("trl") is not None:
        from specs_fast.integrations.trl import use_linear_logprob

        grpo = {"beta": 0.1, "num_iterations": 2, "entropy_coef": 0.05, "temperature": 0.8}
        runs["dpo"] = (run_dpo, lambda _: use_linear_logprob(), {})
        runs["grpo"] = (run_grpo, lambda _: use_linear_logprob(), grpo)
    for name, (run, swap, settings) in runs.items():
        own = hosted(run, lambda _: nullcontext(), folder, **settings)
        results[name] = {"own": own, "ours": hosted(run, swap, folder, **settings)}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if importlib.util.find_spec("trl") is not None:  # the imports are most of the time; both ranks share them
        import trl.trainer.dpo_trainer
        import trl.trainer.grpo_trainer  # noqa: F401
    folder = Path(sys.argv[1])
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
    second = multiprocessing.get_context("fork").Process(target=main, args=(folder, 1))
    second.start()
    try:
        main(folder, 0)
    finally:
        second.join(timeout=30)
        second.kill()
    sys.exit(second.exitcode)

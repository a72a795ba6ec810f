"""TRL's GRPO and DPO trainers on our log-probs against the same trainers as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hosts import Run, largest_difference, make_model, run_dpo, run_grpo, run_kto, run_rloo, run_sft, tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed; it comes with specs-fast[trl]")
from transformers import AutoModelForCausalLM  # noqa: E402
from trl.trainer import utils  # noqa: E402

from specs_fast.integrations import trl as integration  # noqa: E402
from specs_fast.integrations.trl import use_linear_logprob  # noqa: E402

_TIMES = ("runtime", "per_second", "step_time")
GRPO = {
    "plain": {},
    # Every path that takes log-probs or entropies: reference and old policy, entropy bonus and entropy mask.
    "everything": {
        "beta": 0.1,
        "num_iterations": 2,
        "entropy_coef": 0.05,
        "temperature": 0.7,
        "top_entropy_quantile": 0.5,
        "loss_type": "dapo",
    },
    "fp32 head": {"cast_lm_head_to_fp32": True, "entropy_coef": 0.1},
}
DPO = {
    "plain": {},
    "length-normalised": {"loss_type": ["sigmoid_norm"]},
    "two losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "gradient_accumulation_steps": 2},
    "precomputed reference": {"precompute_ref_log_probs": True},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every call of ``linear_logprob``."""
    seen: list[Any] = []
    original = integration.linear_logprob

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(integration, "linear_logprob", counted)
    return seen


@pytest.fixture
def swapped() -> Iterator[ExitStack]:
    with use_linear_logprob() as undo:
        yield undo


def _saved(folder: Path, kind: str, **settings: Any) -> Path:
    make_model(kind, vocab_size=len(tokenizer()), **settings).save_pretrained(folder / kind)
    return folder / kind


def _both(run: Any, path: Path, folder: Path, calls: list[Any], **settings: Any) -> tuple[Run, Run]:
    own = run(AutoModelForCausalLM.from_pretrained(path), folder / "own", **settings)
    assert not calls
    with use_linear_logprob():
        ours = run(AutoModelForCausalLM.from_pretrained(path), folder / "ours", **settings)
    assert calls
    return own, ours


def _assert_same(own: Run, ours: Run) -> None:
    assert len(own.gradients) == len(ours.gradients) == 2
    for got, expected in zip(ours.gradients, own.gradients, strict=True):
        assert largest_difference(got, expected) < 1e-5
    for got_log, own_log in zip(ours.logs, own.logs, strict=True):
        assert got_log.keys() == own_log.keys()
        for key, value in own_log.items():
            if not key.endswith(_TIMES):
                assert got_log[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("settings", GRPO.values(), ids=GRPO.keys())
def test_grpo_has_the_losses_gradients_and_logs_of_the_unmodified_trainer(
    settings: dict[str, Any], tmp_path: Path, calls: list[Any]
) -> None:
    _assert_same(*_both(run_grpo, _saved(tmp_path, "tied"), tmp_path, calls, **settings))


@pytest.mark.parametrize("settings", DPO.values(), ids=DPO.keys())
def test_dpo_has_the_losses_gradients_and_logs_of_the_unmodified_trainer(
    settings: dict[str, Any], tmp_path: Path, calls: list[Any]
) -> None:
    _assert_same(*_both(run_dpo, _saved(tmp_path, "tied"), tmp_path, calls, **settings))


@pytest.mark.parametrize("run", [run_rloo, run_kto, run_sft])
def test_the_other_trainers_that_share_the_function_agree_too(run: Any, tmp_path: Path, calls: list[Any]) -> None:
    _assert_same(*_both(run, _saved(tmp_path, "tied"), tmp_path, calls))


@pytest.mark.parametrize("kind", ["softcap", "multiplier", "divisor"])
def test_dpo_honours_what_the_model_does_to_its_logits(kind: str, tmp_path: Path, calls: list[Any]) -> None:
    _assert_same(*_both(run_dpo, _saved(tmp_path, kind), tmp_path, calls))


def test_dpo_with_lora_on_the_body_trains_the_adapter_alone(tmp_path: Path, calls: list[Any]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; it comes with specs-fast[dev]")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    runs = []
    for name in ("own", "ours"):
        torch.manual_seed(0)  # the adapter's random half
        with use_linear_logprob() if name == "ours" else ExitStack():
            model = AutoModelForCausalLM.from_pretrained(_saved(tmp_path, "tied"))
            runs.append(run_dpo(model, tmp_path / name, peft_config=config))
    _assert_same(*runs)
    assert calls and all("lora_" in name for name in runs[1].gradients[0])


def test_no_tensor_is_as_large_as_trls_own(tmp_path: Path, calls: list[Any]) -> None:
    """TRL works in tiles of at least 32,768 columns; neither holds logits of all tokens."""
    path = tmp_path / "wide"
    make_model(vocab_size=40_000, hidden_size=16).save_pretrained(path)
    own, ours = _both(run_dpo, path, tmp_path, calls, words=100, per_device_train_batch_size=2, max_steps=1)
    assert own.losses == pytest.approx(ours.losses, rel=1e-5)
    tokens = 2 * 2 * 150  # at least: two pairs of a prompt and a completion of 50 to 100 words
    assert ours.largest < own.largest
    assert ours.largest < tokens * 40_000 * 4


def test_closing_gives_trl_its_own_function_back() -> None:
    theirs = utils._ChunkedLogProbFunction
    undo = use_linear_logprob()
    assert utils._ChunkedLogProbFunction is not theirs
    with pytest.raises(RuntimeError, match="already takes its log-probs from linear_logprob"):
        use_linear_logprob()
    undo.close()
    assert utils._ChunkedLogProbFunction is theirs


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "2.0.0"])
def test_an_unknown_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"trl {version} is not known .* install trl 1.16.x"):
        use_linear_logprob()


def test_a_version_without_the_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    monkeypatch.setattr(trl, "__version__", "0.19.0")
    with pytest.raises(RuntimeError, match=r"trl 0.19.0 is not known .* install trl 1.16.x"):
        use_linear_logprob()


def test_a_changed_function_of_a_known_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed:
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, targets: Any) -> None: ...

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Changed)
    with pytest.raises(RuntimeError, match="is not known to this integration"):
        use_linear_logprob()


def test_weighting_by_the_sum_of_squared_probabilities_is_refused(swapped: ExitStack, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(_saved(tmp_path, "tied"))
    with pytest.raises(ValueError, match=r"DPOConfig\(use_weighting=True\) is not covered .* train without"):
        run_dpo(model, tmp_path / "out", use_weighting=True)


def test_deepspeed_zero3_is_refused(swapped: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RuntimeError, match="ZeRO-3 .* use ZeRO-2 or FSDP2"):
        utils._ChunkedLogProbFunction.apply(torch.ones(1, 2), torch.ones(3, 2), None, torch.zeros(1).long(), 1.0, 8)


def test_autocast_is_as_close_to_fp64_as_trls_own(swapped: ExitStack) -> None:
    torch.manual_seed(0)
    hidden, weight, bias, target = (
        torch.randn(50, 16),
        torch.randn(40, 16),
        torch.randn(40),
        torch.randint(0, 40, (50,)),
    )
    z = ((hidden.double() @ weight.double().T + bias) * 0.5).div(0.8)
    exact = z.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    errors = []
    for function in (utils._ChunkedLogProbFunction, trl.kernels.ChunkedLogProbFunction):
        with torch.autocast("cpu", torch.bfloat16):
            logp = function.apply(hidden, weight, bias, target, 0.8, 32, None, 0.5, ("log_probs", "entropy"))[0]
        assert logp.dtype == torch.float32
        errors.append(float((logp - exact).square().mean().sqrt()))
    assert 0 < errors[0] <= 1.05 * errors[1] < 0.05

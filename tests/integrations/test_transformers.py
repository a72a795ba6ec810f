"""A swapped head against the model's own logits: values, gradients, settings, refusals, and what must stay as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hosts import (
    KINDS,
    LargestTensor,
    gradients,
    largest_difference,
    make_batch,
    make_model,
    run_hf_trainer,
    tokenizer,
)
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from specs_fast.integrations.transformers import LogprobOutput, logprob_head

PEFT_MISSING = "peft is not installed; it comes with specs-fast[dev]"


def _reference(model: Any, batch: dict[str, Tensor], temperature: float = 1.0) -> dict[str, Tensor]:
    """Log-prob, entropy and log-sum-exp ``[B, L]`` of every label from the model's own logits, 0 where there is none."""
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    z = model(**inputs).logits.float() / temperature
    logp = z.log_softmax(-1)
    kept = labels != -100
    return {
        "logp": logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * kept,
        "entropy": -(logp.exp() * logp).sum(-1) * kept,
        "lse": z.logsumexp(-1) * kept,
    }


def _weigh(values: dict[str, Tensor]) -> Tensor:
    """A loss that sends another upstream gradient to every entry."""
    generator = torch.Generator().manual_seed(7)
    return sum((torch.randn(v.shape, generator=generator) * v).sum() for v in values.values())  # type: ignore[return-value]


def _read(output: LogprobOutput) -> dict[str, Tensor]:
    assert output.logp is not None and output.entropy is not None and output.lse is not None
    return {"logp": output.logp, "entropy": output.entropy, "lse": output.lse}


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_those_of_the_models_own_logits(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    expected = _reference(model, batch, temperature=0.7)
    _weigh(expected).backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    with logprob_head(model, temperature=0.7, return_entropy=True):
        got = _read(model(**batch))
        _weigh(got).backward()
    _assert_close(got, expected)
    assert largest_difference(gradients(model), expected_gradients) < 1e-5


def test_no_cache_is_kept_unless_asked_for() -> None:
    model, batch = make_model(), make_batch()
    logprob_head(model)
    assert model(**batch).past_key_values is None
    assert model(**batch, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_models_own_loss(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    for extra in ({}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}):
        own = model(**batch, **extra).loss
        with logprob_head(model):
            torch.testing.assert_close(model(**batch, **extra).loss, own)


def test_without_labels_nothing_changes() -> None:
    model, batch = make_model(), make_batch()
    ids = batch["input_ids"][:, :5]
    keys, logits, text = list(model.state_dict()), model(input_ids=ids).logits, model.generate(ids, max_new_tokens=6)
    with logprob_head(model):
        assert list(model.state_dict()) == keys
        assert model(input_ids=ids).logits.equal(logits)
        assert model(ids, labels=None).logits.equal(logits)
        assert model.generate(ids, max_new_tokens=6).equal(text)
        assert model.lm_head(torch.ones(2, 32)).shape == (2, 64)


def test_removing_gives_the_models_own_forward_back() -> None:
    model, batch = make_model(), make_batch()
    head = logprob_head(model)
    assert isinstance(model(**batch), LogprobOutput)
    head.remove()
    head.remove()
    assert "logits" in model(**batch) and "forward" not in {**model.__dict__, **model.lm_head.__dict__}
    with pytest.raises(KeyError, match="inside"), logprob_head(model):
        raise KeyError("inside")
    assert "logits" in model(**batch)


def test_a_copy_of_a_swapped_model_reads_its_own_weights() -> None:
    model, batch = make_model("untied"), make_batch()
    logprob_head(model)
    twin = copy.deepcopy(model)
    before = model(**batch).logp
    with torch.no_grad():
        twin.lm_head.weight.zero_()
        twin.lm_head.bias.zero_()
    assert model(**batch).logp.equal(before)
    kept = twin(**batch).logp[before != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, -4.1588831))  # -log 64


def test_logits_to_keep_scores_the_positions_that_transformers_keeps() -> None:
    model, batch = make_model(), make_batch()
    logprob_head(model)
    whole = model(**batch).logp
    assert whole.shape == (3, 12)
    torch.testing.assert_close(model(**batch, logits_to_keep=4).logp, whole[:, -4:])
    torch.testing.assert_close(model(**batch, num_logits_to_keep=4).logp, whole[:, -4:])
    torch.testing.assert_close(model(**batch, logits_to_keep=0).logp, whole)
    index = torch.tensor([8, 2, 7])
    torch.testing.assert_close(model(**batch, logits_to_keep=index).logp, whole[:, index])
    with pytest.raises(ValueError, match="logits_to_keep and num_logits_to_keep are one setting"):
        model(**batch, logits_to_keep=4, num_logits_to_keep=4)


def test_shift_labels_are_not_shifted_again() -> None:
    model, batch = make_model(), make_batch()
    logprob_head(model)
    whole = model(**batch).logp
    shifted = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(**batch, shift_labels=shifted).logp, whole)


def test_labels_passed_by_position_are_seen() -> None:
    model, batch = make_model(), make_batch()
    logprob_head(model)
    by_position = model(batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"])
    assert by_position.logp.equal(model(**batch).logp)


def test_a_batch_without_labels_to_score_has_loss_zero_and_keeps_the_graph() -> None:
    model, batch = make_model("untied"), make_batch()
    logprob_head(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert model.lm_head.weight.grad.abs().max() == 0.0 and model.model.norm.weight.grad.abs().max() == 0.0


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_padding_of_the_vocabulary_counts_only_as_long_as_vocab_size_is_none(kind: str) -> None:
    model, batch = make_model(kind), make_batch()
    model.resize_token_embeddings(64, pad_to_multiple_of=80)
    assert model.lm_head.weight.shape[0] == 80
    with torch.no_grad():
        model.lm_head.weight[64:] = 0.5
    with logprob_head(model, return_entropy=True):
        _assert_close(_read(model(**batch)), _reference(model, batch))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with logprob_head(model, vocab_size=64, return_entropy=True):
        got = model(**batch)
        logp = model(**inputs).logits[:, :-1, :64].log_softmax(-1)
        (got.logp.sum() + got.entropy.sum()).backward()
    labels = batch["labels"][:, 1:]
    expected = logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
    torch.testing.assert_close(got.logp[:, :-1], expected, atol=2e-5, rtol=1e-5)
    assert model.lm_head.weight.grad[64:].abs().max() == 0.0 < model.lm_head.weight.grad[:64].abs().max()


def test_half_precision_is_at_least_as_exact_as_the_models_own_logits() -> None:
    """bf16 weights, and fp32 weights under bf16 autocast; exact: the same rounded operands in fp64."""
    for autocast in (False, True):
        model, batch = make_model(), make_batch()
        if not autocast:
            model = model.bfloat16()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            own = _reference(model, batch)["logp"]
            with logprob_head(model):
                got = model(**batch).logp
        assert got.dtype == torch.float32
        z = hidden.bfloat16().double() @ model.lm_head.weight.bfloat16().double().T
        labels = batch["labels"][:, 1:]
        exact = z.log_softmax(-1)[:, :-1].gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
        errors = [float((logp[:, :-1].detach() - exact).abs().max()) for logp in (got, own)]
        assert 0 < errors[0] <= errors[1]


def test_no_logits_are_formed() -> None:
    model, batch = make_model(vocab_size=65_536, hidden_size=16), make_batch(rows=2, length=400)
    batch["labels"] = batch["input_ids"]
    logits_bytes = 2 * 400 * 65_536 * 4
    with LargestTensor() as own:
        model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    head = logprob_head(model)
    with LargestTensor() as ours:
        model(**batch).loss.backward()
    head.remove()
    assert own.nbytes >= logits_bytes
    assert ours.nbytes <= logits_bytes // 2
    assert largest_difference(gradients(model), expected) < 1e-5


@pytest.mark.parametrize("swap_first", [True, False])
def test_lora_on_the_body_trains_as_with_the_models_own_head(swap_first: bool) -> None:
    peft = pytest.importorskip("peft", reason=PEFT_MISSING)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0)
    batch, results = make_batch(), []
    for ours in (False, True):
        model = make_model()
        if ours and swap_first:
            logprob_head(model)
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config)
        if ours and not swap_first:
            logprob_head(adapted)
        output = adapted(**batch)
        assert isinstance(output, LogprobOutput) == ours
        output.loss.backward()
        results.append((output.loss, gradients(adapted)))
    (own_loss, own_gradients), (loss, got) = results
    torch.testing.assert_close(loss, own_loss)
    assert all("lora_" in name for name in got) and largest_difference(got, own_gradients) < 1e-5


@pytest.mark.parametrize("swap_first", [True, False])
def test_a_head_that_peft_trains_whole_gets_its_gradient(swap_first: bool) -> None:
    peft = pytest.importorskip("peft", reason=PEFT_MISSING)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    batch, results = make_batch(), []
    for ours in (False, True):
        model = make_model("untied")
        if ours and swap_first:
            logprob_head(model)
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config)
        if ours and not swap_first:
            logprob_head(adapted)
        with torch.no_grad():  # so that the trained copy differs from the original
            adapted.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
        loss = adapted(**batch).loss
        loss.backward()
        with adapted.disable_adapter():
            plain = adapted(**batch).loss.detach()
        results.append((torch.stack((loss.detach(), plain)), gradients(adapted)))
    (own_losses, own_gradients), (losses, got) = results
    torch.testing.assert_close(losses, own_losses)
    assert losses[0] != losses[1]
    assert any("lm_head.modules_to_save" in name for name in got) and largest_difference(got, own_gradients) < 1e-5


def _with_lora_on_the_head(kind: str, **settings: Any) -> Any:
    peft = pytest.importorskip("peft", reason=PEFT_MISSING)
    settings = {"r": 4, "lora_alpha": 10, "lora_dropout": 0.0, "init_lora_weights": False, **settings}
    torch.manual_seed(1)
    return peft.get_peft_model(make_model(kind), peft.LoraConfig(target_modules=["q_proj", "lm_head"], **settings))


@pytest.mark.parametrize("kind", ["tied", "untied", "multiplier", "divisor", "softcap"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_lora_on_the_head_trains_as_with_the_models_own_head(kind: str) -> None:
    batch, results = make_batch(), []
    for ours in (False, True):
        adapted = _with_lora_on_the_head(kind)
        adapted.add_adapter("second", adapted.peft_config["default"])
        if ours:
            logprob_head(adapted, return_entropy=True)
        losses = []
        for names in ("default", ["default", "second"]):
            adapted.base_model.set_adapter(names)
            losses.append(adapted(**batch).loss)
        with adapted.disable_adapter():
            losses.append(adapted(**batch).loss.detach())
        adapted.base_model.set_adapter("default")
        sum(losses).backward()
        results.append((torch.stack(losses).detach(), gradients(adapted)))
    (own_losses, own_gradients), (losses, got) = results
    torch.testing.assert_close(losses, own_losses)
    assert len(set(losses.tolist())) == 3
    assert any("lm_head.lora_B" in name for name in got) and largest_difference(got, own_gradients) < 1e-5


def test_lora_on_the_head_with_padded_vocabulary_and_in_bf16() -> None:
    batch = make_batch()
    adapted = _with_lora_on_the_head("untied")
    labels = batch["labels"][:, 1:]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    dense = adapted(**inputs).logits[:, :-1, :62].log_softmax(-1)
    expected = dense.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
    with logprob_head(adapted, vocab_size=62):
        torch.testing.assert_close(adapted(**batch).logp[:, :-1], expected, atol=2e-5, rtol=1e-5)
    half = adapted.to(torch.bfloat16)
    half.get_output_embeddings().lora_A.float()  # as PEFT leaves adapters on a half-precision model
    half.get_output_embeddings().lora_B.float()
    with logprob_head(half, vocab_size=62):
        output = half(**batch)
        torch.testing.assert_close(output.logp[:, :-1], expected, atol=0.3, rtol=0.05)
        output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in half.get_output_embeddings().lora_B.parameters())


def test_lora_on_the_head_that_two_matrices_cannot_say_is_refused() -> None:
    dropout = _with_lora_on_the_head("untied", lora_dropout=0.5).eval()
    logprob_head(dropout)
    assert dropout(**make_batch()).logp is not None
    with pytest.raises(ValueError, match="adapter 'default' of the head has lora_dropout 0.5"):
        dropout.train()(**make_batch())
    with pytest.raises(ValueError, match="LoRA variant"):
        logprob_head(_with_lora_on_the_head("untied", use_dora=True))


def test_a_head_replaced_after_the_swap_is_noticed() -> None:
    peft = pytest.importorskip("peft", reason=PEFT_MISSING)
    model, batch = make_model("untied"), make_batch()
    logprob_head(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(RuntimeError, match="became another Linear after it was swapped; call logprob_head after"):
        adapted(**batch)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_hf_trainer_trains_as_with_the_models_own_head(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed; it comes with specs-fast[trl]")
    runs = []
    for ours in (False, True):
        model = make_model(vocab_size=len(tokenizer()))
        if ours:
            logprob_head(model)
        runs.append(run_hf_trainer(model, tmp_path / str(ours), **settings))
    own, got = runs
    assert got.losses == pytest.approx(own.losses, rel=1e-5) and len(got.gradients) == 2
    for got_step, own_step in zip(got.gradients, own.gradients, strict=True):
        assert largest_difference(got_step, own_step) < 1e-5


class _ScaledBeforeTheHead(Qwen3ForCausalLM):
    """Does something between decoder and head that no configuration entry tells of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.1
        return output


def _small(**settings: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **settings}


def test_what_check_finds_is_refused_and_nothing_is_swapped() -> None:
    model = _ScaledBeforeTheHead(Qwen3Config(**_small(head_dim=8)))
    with pytest.raises(ValueError, match="_ScaledBeforeTheHead does more between its decoder and its logits"):
        logprob_head(model)
    assert "forward" not in {**model.__dict__, **model.lm_head.__dict__}
    model.train()
    logprob_head(model, check=False)
    assert model.training and model.model.training


def test_models_without_a_plain_head_are_refused() -> None:
    class Quantised(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = make_model("untied")
    model.lm_head = Quantised(32, 64)
    with pytest.raises(ValueError, match="head of type Quantised.*leave lm_head out of target_modules"):
        logprob_head(model)
    with pytest.raises(ValueError, match="must be a transformers model .* got Linear"):
        logprob_head(torch.nn.Linear(2, 2))
    t5 = T5(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match="encoder-decoder"):
        logprob_head(t5)


def test_settings_out_of_range_are_refused() -> None:
    model = make_model()
    for temperature in (0.0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            logprob_head(model, temperature=temperature)
    for vocab_size in (0, 65):
        with pytest.raises(ValueError, match=rf"vocab_size is {vocab_size}; the head has 64 rows"):
            logprob_head(model, vocab_size=vocab_size)
    with logprob_head(model), pytest.raises(ValueError, match="already replaced"):
        logprob_head(model)
    with torch.device("meta"):
        empty = Qwen3ForCausalLM(Qwen3Config(**_small(head_dim=8)))
    with pytest.raises(ValueError, match="on the meta device, so check cannot run it"):
        logprob_head(empty)
    logprob_head(empty, check=False)


def test_calls_that_a_swapped_head_cannot_answer_are_refused() -> None:
    model, batch = make_model(), make_batch()
    logprob_head(model)
    with pytest.raises(ValueError, match="return_dict is False"):
        model(**batch, return_dict=False)
    with pytest.raises(ValueError, match=r"labels \(3, 4\) must have one entry per position"):
        model(**{**batch, "labels": batch["labels"][:, -4:]})
    with pytest.raises(ValueError, match="targets are 0 to 63"):
        model(**{**batch, "labels": batch["labels"].masked_fill(batch["labels"] > 0, 64)})


def test_the_load_balancing_loss_is_never_dropped_silently() -> None:
    model = MixtralForCausalLM(MixtralConfig(**_small(), num_local_experts=2, output_router_logits=True)).eval()
    batch = make_batch()
    own = model(**batch, output_router_logits=False).loss
    logprob_head(model)
    with pytest.raises(ValueError, match="output_router_logits is on"):
        model(**batch)
    torch.testing.assert_close(model(**batch, output_router_logits=False).loss, own)

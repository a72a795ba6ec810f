"""A swapped transformers model as an object and as a callable: saved and loaded, called in odd ways, and misused."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_hosts import make_batch, make_model

from specs_fast.integrations.transformers import LogprobOutput, logprob_head


def test_a_swapped_model_survives_pickle_and_torch_save() -> None:
    model, batch = make_model("untied"), make_batch()
    logprob_head(model, temperature=0.7, return_entropy=True)
    expected = model(**batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        got = twin(**batch)
        assert isinstance(got, LogprobOutput) and got.logp.equal(expected.logp) and got.entropy.equal(expected.entropy)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
    assert model(**batch).logp.equal(expected.logp)


def test_a_model_that_accelerate_unwraps_is_still_swapped() -> None:
    model, batch = make_model(), make_batch()
    logprob_head(model)
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of another test may have left its own
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        prepared = accelerator.prepare(model)
        assert isinstance(prepared(**batch), LogprobOutput)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        for twin in (unwrapped, copy.deepcopy(unwrapped)):
            assert isinstance(twin(**batch), LogprobOutput) and twin(batch["input_ids"]).logits.shape == (3, 12, 64)
        with torch.no_grad():
            twin.model.embed_tokens.weight.zero_()
        assert twin(**batch).loss.item() == pytest.approx(math.log(64)) != unwrapped(**batch).loss.item()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_keywords_next_to_positional_arguments_arrive_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(), make_batch()
    logprob_head(model)
    expected = model(**batch, output_hidden_states=True)
    seen: list[set[str]] = []
    own = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **kwargs: (seen.append(set(kwargs)), own(*args, **kwargs))[1]
    )
    got = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"], output_hidden_states=True)
    assert got.logp.equal(expected.logp) and len(got.hidden_states) == len(expected.hidden_states)
    assert "kwargs" not in seen[0] and "output_hidden_states" in seen[0]


def test_a_configuration_that_asks_for_tuples_is_refused() -> None:
    model, batch = make_model(), make_batch()
    model.config.return_dict = False
    with pytest.raises(ValueError, match="config.return_dict is False; a swapped head returns a LogprobOutput"):
        logprob_head(model)
    model.config.return_dict = True
    logprob_head(model)
    model.config.return_dict = False
    with pytest.raises(ValueError, match="return_dict is False"):
        model(**batch)
    assert isinstance(model(**batch, return_dict=True), LogprobOutput)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize(
    "change, found", [(lambda labels: labels[0], r"shape \(12,\)"), (lambda labels: labels.tolist(), "list")]
)
def test_labels_of_another_shape_are_named(name: str, change: Any, found: str) -> None:
    model, batch = make_model(), make_batch()
    logprob_head(model)
    labels = change(batch.pop("labels"))
    with pytest.raises(ValueError, match=rf"{name} must be an integer tensor \[B, L\]; got {found}"):
        model(**batch, **{name: labels})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vocab_size": "64"}, "vocab_size is '64'; the head has 64 rows: allowed 1 to 64, or None"),
        ({"vocab_size": 63.5}, "vocab_size is 63.5; the head has 64 rows"),
        ({"vocab_size": True}, "vocab_size is True; the head has 64 rows"),
        ({"return_entropy": "yes"}, "return_entropy must be True or False; got 'yes'"),
        ({"return_entropy": "yes", "check": False}, "return_entropy must be True or False; got 'yes'"),
    ],
)
def test_settings_of_another_type_are_refused_before_anything_is_swapped(
    settings: dict[str, Any], message: str
) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=message):
        logprob_head(model, **settings)
    assert "forward" not in {**model.__dict__, **model.lm_head.__dict__}

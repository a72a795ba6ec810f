"""Features of a frozen tower are kept between calls; nothing stale is ever used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import VISION_MODELS, make_image, make_model, mixed_trees
from transformers import PreTrainedModel

from specs_fast.models import image_cache, score
from specs_fast.models.images import encode_images
from specs_fast.models.load import vision_tower


@pytest.fixture
def tower_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images per call of `get_image_features`."""
    calls: list[int] = []
    for kind in VISION_MODELS:
        base = type(make_model(kind).base_model)
        original = base.get_image_features

        def counting(self, pixels, image_grid_thw, original=original, **kwargs):  # noqa: ANN001, ANN003, ANN202
            calls.append(len(image_grid_thw))
            return original(self, pixels, image_grid_thw=image_grid_thw, **kwargs)

        monkeypatch.setattr(base, "get_image_features", counting)
    return calls


def frozen(kind: str) -> PreTrainedModel:
    model = make_model(kind)
    tower = vision_tower(model)
    assert tower is not None
    tower.requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", VISION_MODELS)
@pytest.mark.parametrize("packing", ["shared", "none"])
def test_a_frozen_tower_sees_an_image_once_for_all_calls(kind: str, packing: str, tower_calls: list[int]) -> None:
    model, trees = frozen(kind), mixed_trees(kind)
    first = score(model, trees, packing=packing).logp  # type: ignore[arg-type]
    distinct = len({image.key for tree in trees for image in tree.prompt.images})
    assert tower_calls == [distinct]
    again = score(model, trees, packing=packing).logp  # type: ignore[arg-type]
    assert tower_calls == [distinct] and torch.equal(first, again)
    again.sum().backward()


def test_a_trained_tower_is_run_every_time_and_gets_gradients(tower_calls: list[int]) -> None:
    model, trees = make_model("qwen3_vl"), mixed_trees("qwen3_vl")
    with torch.no_grad():
        score(model, trees, packing="shared")
    score(model, trees, packing="shared").logp.sum().backward()
    assert len(tower_calls) == 2
    tower = vision_tower(model)
    assert tower is not None and all(parameter.grad is not None for parameter in tower.parameters())


@pytest.mark.parametrize("kind", VISION_MODELS)
def test_new_weights_are_noticed(kind: str, tower_calls: list[int]) -> None:
    """Whatever changes a weight of the frozen tower: an update in place, loading a state dict, another tensor, and what PyTorch
    does not count as a new version: an average through `.data` (as TRL updates a reference), one element, NumPy."""
    model, other, images = frozen(kind), frozen(kind), [make_image("a")]
    tower = vision_tower(model)
    assert tower is not None

    def shift() -> None:
        with torch.no_grad():
            next(tower.parameters()).add_(0.5)

    def load() -> None:
        source = {name: value * 1.5 for name, value in other.state_dict().items()}
        model.load_state_dict(source)

    def swap() -> None:
        parameter = next(tower.parameters())
        parameter.data = parameter.data * 0.3

    def average() -> None:
        parameter = next(tower.parameters())
        parameter.data.mul_(0.9).add_(torch.ones_like(parameter), alpha=0.1)

    def one_element() -> None:
        next(tower.parameters()).data.view(-1)[3:4].add_(1.0)

    def through_numpy() -> None:
        next(tower.parameters()).detach().numpy()[0] += 1.0

    features = encode_images(model, images)
    for count, change in enumerate((shift, load, swap, average, one_element, through_numpy), start=2):
        change()
        changed = encode_images(model, images)
        assert len(tower_calls) == count
        assert features is not None and changed is not None
        assert not torch.equal(features.pooled[0], changed.pooled[0])
        features = changed


def test_a_rollout_in_inference_mode_may_fill_the_cache_for_an_update() -> None:
    model, trees = frozen("qwen3_vl"), mixed_trees("qwen3_vl")
    with torch.inference_mode():
        before = score(model, trees, packing="shared").logp
    logp = score(model, trees, packing="shared").logp
    logp.sum().backward()
    assert torch.equal(before, logp.detach())


def test_new_weights_of_a_model_made_in_inference_mode_are_noticed() -> None:
    with torch.inference_mode():
        model, images = frozen("qwen3_vl"), [make_image("a")]
        tower = vision_tower(model)
        assert tower is not None
        before = encode_images(model, images)
        next(tower.parameters()).mul_(2.0)
        after = encode_images(model, images)
    assert before is not None and after is not None and not torch.equal(before.pooled[0], after.pooled[0])


def test_new_images_join_old_ones_in_the_order_of_the_call(tower_calls: list[int]) -> None:
    model = frozen("qwen3_vl")
    one, two = make_image("one"), make_image("two", (1, 6, 4))
    encode_images(model, [one])
    both = encode_images(model, [two, one, two])
    assert tower_calls == [1, 1] and both is not None
    fresh = encode_images(frozen("qwen3_vl"), [two, one, two])
    assert fresh is not None
    ours, plain = (features.model_kwargs([two, one, two])["mm_encoder_outputs"]["image"] for features in (both, fresh))
    for mine, exact in zip(ours.pooler_output, plain.pooler_output, strict=True):
        torch.testing.assert_close(mine, exact)
    for mine, exact in zip(ours.deepstack_features, plain.deepstack_features, strict=True):
        torch.testing.assert_close(mine, exact)


def test_the_least_recently_used_features_leave_first(monkeypatch: pytest.MonkeyPatch, tower_calls: list[int]) -> None:
    model, image = frozen("qwen2_5_vl"), make_image("0")
    features = encode_images(model, [image])
    assert features is not None
    size = features.pooled[0].numel() * 4
    monkeypatch.setattr(image_cache, "CACHE_BYTES", 2 * size)
    images = [replace(image, key=str(n)) for n in range(3)]
    encode_images(model, [images[1]])  # 0, 1
    encode_images(model, [images[0]])  # 1, 0
    encode_images(model, [images[2]])  # 0, 2
    del tower_calls[:]
    encode_images(model, [images[0], images[2]])
    assert tower_calls == []
    encode_images(model, [images[1]])
    assert tower_calls == [1]

"""Encoding with the processors of LLaVA, Idefics3, SmolVLM and Gemma-3 (their own classes and PIL image processors)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import IMAGE, VISION_END, VISION_START, VOCAB
from tiny_vision_models import SIDE, make_vision_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SmolVLMProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from specs_fast.data.encode import Encoder
from specs_fast.data.types import EncodedPrompt, Prompt, Tree
from specs_fast.models import load_processor, score

KINDS = ("llava", "idefics3", "smolvlm", "gemma3")
SAVED = ("llava", "idefics3", "gemma3")
_NAMES = {kind: "<image_soft_token>" if kind == "gemma3" else "<image>" for kind in KINDS}
_WORDS = "what is the sum of these two digits ? user assistant : 7 8 here Here".split()


class ImageOnlySmolVLMProcessor(SmolVLMProcessor):
    """SmolVLM's processor without its video part, which needs torchvision and num2words."""

    def __init__(self, image_processor: Any, tokenizer: Any, image_seq_len: int, chat_template: str) -> None:
        self.fake_image_token, self.image_token = "<fake_token_around_image>", "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.global_image_token, self.video_token, self.image_seq_len = "<global-img>", "<video>", image_seq_len
        self.video_processor = SimpleNamespace(num_frames=1, fps=1)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token per word; the ids of image tokens are those of the tiny models."""
    markers = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)] + ["<global-img>", "\n"]
    vocab = {
        word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *_WORDS, *markers, "<end_of_utterance>"])
    }
    start, end = ("<start_of_image>", "<end_of_image>") if kind == "gemma3" else ("<fake_token_around_image>", "<end>")
    vocab |= {_NAMES[kind]: IMAGE, start: VISION_START, end: VISION_END}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^>]+>|\n|[^\s<]+"), behavior="removed", invert=True)
    extra = {"image_token": _NAMES[kind], "boi_token": start, "eoi_token": end} if kind == "gemma3" else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=extra
    )
    assert len(tokenizer) <= VOCAB
    return tokenizer


def make_processor(kind: str) -> Any:
    """The real processor class; frames of `SIDE` pixels, features as many as the tiny models make."""
    tokenizer = make_tokenizer(kind)
    placeholder = "<start_of_image>" if kind == "gemma3" else "<image>"
    template = (
        "{% for m in messages %}{{ m.role }} : {% for part in m.content %}"
        "{% if part.type == 'image' %}" + placeholder + " {% else %}{{ part.text }} {% endif %}"
        "{% endfor %}{% endfor %}assistant :"
    )
    square = {"height": SIDE, "width": SIDE}
    if kind == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if kind == "idefics3":
        images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    if kind == "smolvlm":
        images = SmolVLMImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
        return ImageOnlySmolVLMProcessor(images, tokenizer, image_seq_len=4, chat_template=template)
    images = Gemma3ImageProcessorPil(size=square)
    return Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)


def make_prompt(text: str, *sizes: tuple[int, int], name: str = "made") -> Prompt:
    """A prompt with an image of a colour gradient per size."""
    pictures = tuple(
        Image.linear_gradient("L").resize(size).convert("RGB").rotate(90 * i) for i, size in enumerate(sizes)
    )
    content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": text}]
    return Prompt(name, ({"role": "user", "content": content},), pictures, source="made.jsonl:7")


def processed(kind: str, processor: Any, prompt: Prompt) -> dict[str, torch.Tensor]:
    """What the processor makes of a prompt, for the model's own forward."""
    text = processor.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=list(prompt.images) or None, add_special_tokens=False, return_tensors="pt")
    return {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}


def own_logp(model: Any, inputs: dict[str, torch.Tensor], response: torch.Tensor) -> torch.Tensor:
    """log-probs of a response from the model's own forward on what the processor made of its prompt."""
    length = inputs["input_ids"].shape[1]
    ids = torch.cat((inputs["input_ids"], response[None]), dim=1)
    inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = torch.cat((inputs["token_type_ids"], torch.zeros_like(response)[None]), dim=1)
    logits = model(**inputs).logits[0, length - 1 : -1]
    return logits.log_softmax(-1).gather(1, response[:, None]).squeeze(1)


@pytest.mark.parametrize("packing", ["shared", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_encoded_prompts_score_as_the_processors_output_does(kind: str, packing: str) -> None:
    """One image, two images of two sizes (tiles of Idefics3, crops of Gemma-3), and none."""
    processor, model = make_processor(kind), make_vision_model(kind)
    if kind == "gemma3":  # crops are asked for in the call alone: the class overrides what its image processor says
        crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8}
        processor.images_kwargs = {**processor.images_kwargs, **crops}
    encoder = Encoder(processor)
    prompts = [
        make_prompt("what is the sum ?", (20, 20)),
        make_prompt("what of these two ?", (40, 16), (20, 20)),
        make_prompt("the sum ?"),
    ]
    encoded: list[EncodedPrompt] = [encoder.prompt(prompt) for prompt in prompts]
    response = torch.tensor([5, 9, 11, 1])
    scores = score(model, [Tree(prompt, (response,)) for prompt in encoded], packing=packing)
    expected = torch.cat([own_logp(model, processed(kind, processor, prompt), response) for prompt in prompts])
    torch.testing.assert_close(scores.logp, expected, atol=1e-5, rtol=0)
    assert [len(prompt.images) for prompt in encoded] == [1, 2, 0]
    frames = [len(image.pixel_values) for prompt in encoded for image in prompt.images]
    tiles = [5, 3, 5]
    assert frames == {"llava": [1, 1, 1], "idefics3": tiles, "smolvlm": tiles, "gemma3": [1, 4, 1]}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_pictures_have_equal_keys_in_any_prompt(kind: str) -> None:
    encoder = Encoder(make_processor(kind))
    one = encoder.prompt(make_prompt("what ?", (20, 20), name="one"))
    two = encoder.prompt(make_prompt("the sum ?", (20, 20), (40, 16), name="two"))
    assert one.images[0].key == two.images[0].key != two.images[1].key


@pytest.mark.parametrize("kind", KINDS)
def test_image_counts_that_differ_are_refused_with_prompt_and_counts(kind: str) -> None:
    encoder = Encoder(make_processor(kind))
    prompt = make_prompt("sum ?", (20, 20), (20, 20))
    fewer = Prompt("fewer", prompt.messages, prompt.images[:1], source=prompt.source)
    with pytest.raises(ValueError, match=r"made\.jsonl:7: prompt 'fewer' has 1 images, but its text holds 2 image"):
        encoder.prompt(fewer)
    literal = make_prompt(f"sum {encoder.processor.image_token} ?", name="literal")
    with pytest.raises(ValueError, match=r"made\.jsonl:7: prompt 'literal' has 0 images, but its text holds 1 image"):
        encoder.prompt(literal)


def test_a_literal_token_of_image_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text of prompt 'made' holds the image token '<image_soft_token>' literally"):
        Encoder(make_processor("gemma3")).prompt(make_prompt("sum <image_soft_token> ?", (20, 20)))


def test_image_inputs_of_another_form_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = make_processor("llava")
    original = LlavaProcessor.__call__

    def with_sizes(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = original(self, *args, **kwargs)
        inputs["image_sizes"] = torch.tensor([[20, 20]])
        return inputs

    monkeypatch.setattr(LlavaProcessor, "__call__", with_sizes)
    with pytest.raises(ValueError, match=r"made\.jsonl:7: the processor returned .*'image_sizes'.* are known"):
        Encoder(processor).prompt(make_prompt("sum ?", (20, 20)))


def test_images_that_are_padded_to_each_other_are_refused() -> None:
    """Idefics3 without resizing pads the frames of a prompt to the largest: its images are then not what they are alone."""
    processor = make_processor("idefics3")
    processor.image_processor.do_resize = False
    processor.image_processor.split_images = lambda image, *_, **__: ([image], 0, 0)
    processor.image_processor.resize_for_vision_encoder = lambda image, *_, **__: image
    Encoder(processor).prompt(make_prompt("sum ?", (20, 20)))
    with pytest.raises(ValueError, match=r"made\.jsonl:7: the processor prepares 2 images together otherwise"):
        Encoder(processor).prompt(make_prompt("sum ?", (20, 20), (40, 16)))


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_processor_loads_without_torchvision(kind: str, tmp_path: Path) -> None:
    processor = make_processor(kind)
    processor.save_pretrained(tmp_path)
    prompt = make_prompt("the sum ?", (40, 16))
    loaded, direct = Encoder(load_processor(tmp_path)).prompt(prompt), Encoder(processor).prompt(prompt)
    assert torch.equal(loaded.input_ids, direct.input_ids) and loaded.images[0].key == direct.images[0].key

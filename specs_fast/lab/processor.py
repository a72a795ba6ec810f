"""The lab's vocabulary, chat template and processor: one token per word, number and tag.

Text is cut into tags (``<think>``, ``</think>``), numbers, words, LaTeX commands and single punctuation marks; white space only
separates. Decoding joins tokens with single spaces, so every text made of known words comes back the same up to spacing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specs_fast.data.processor import IMAGE_TOKEN, ImageTextProcessor, image_processor
from specs_fast.lab.questions import ASKED_TAGS, INSTRUCTIONS, OTHER_TAGS, TASKS, UNSEEN_INSTRUCTIONS

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 8, 2, 1
LARGEST_NUMBER = 99

PAD, UNK, END, START = "<|pad|>", "<|unk|>", "<|im_end|>", "<|im_start|>"
VISION_START, VISION_END, VIDEO_TOKEN = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
SPECIAL = (PAD, UNK, START, END, VISION_START, VISION_END, IMAGE_TOKEN, VIDEO_TOKEN)

PIECE = r"</?[A-Za-z_]+>|\\[A-Za-z]+|[0-9]+|[A-Za-z]+|[^\sA-Za-z0-9]"
"""What becomes one token."""

RESPONSE_WORDS = (
    "i see the largest smallest is at position larger than none even sorted totals first last so answer Answer . , : ; = + - "
    "< > ? ! ( ) [ ] { } * $ ' \" # / \\boxed \\( \\) final Final Thus Therefore therefore The So I reasoning Reasoning result "
    "Result because we get digits digit are user assistant system"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def pieces(text: str) -> list[str]:
    """The words of a text, cut as the tokenizer cuts them."""
    return re.findall(PIECE, text)


def vocabulary() -> list[str]:
    """Every token in the order of its id: special tokens, numbers, tags, then words."""
    texts: list[str] = [RESPONSE_WORDS, *INSTRUCTIONS, *UNSEEN_INSTRUCTIONS]
    for task in TASKS:
        texts.extend((*task.wordings, *task.unseen))
    names = [name for pair in (ASKED_TAGS, *OTHER_TAGS) for name in pair]
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    numbers = [str(number) for number in range(LARGEST_NUMBER + 1)]
    words: Iterable[str] = (word for text in texts for word in pieces(re.sub(r"\{[01k]\}", "", text)))
    tokens = [*SPECIAL, *numbers, *tags, *words, *names]
    return list(dict.fromkeys(token for token in tokens if token not in ("<>", "</>")))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over :func:`vocabulary`; unknown words become ``<|unk|>``."""
    vocab = {token: index for index, token in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[START, VISION_START, VISION_END, IMAGE_TOKEN, VIDEO_TOKEN],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def build_processor() -> ImageTextProcessor:
    """Tokenizer, PIL image processor (patch 8, merge 2) and chat template in one processor."""
    images = image_processor(PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE, max_pixels=128 * 128)
    return ImageTextProcessor(image_processor=images, tokenizer=build_tokenizer(), chat_template=CHAT_TEMPLATE)

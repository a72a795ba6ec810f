"""The lab's vision-language model: a real Qwen3-VL, 1.4 M parameters."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from specs_fast.data.processor import IMAGE_TOKEN
from specs_fast.lab.processor import (
    END,
    MERGE_SIZE,
    PAD,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
)
from specs_fast.lab.scenes import HEIGHT, WIDTH

HIDDEN = 128


def lab_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    """Text: 4 layers of 128, 4 query and 2 key/value heads of 32, M-RoPE [8, 4, 4] interleaved, tied embeddings.
    Vision: 2 layers of 96 with patch 8 and merge 2; layer 0 also feeds the first text layer (deepstack)."""
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
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
        "pad_token_id": ids(PAD),
        "bos_token_id": None,
        "eos_token_id": ids(END),
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": (WIDTH // PATCH_SIZE) ** 2,
        "deepstack_visual_indexes": [0],
    }
    assert HEIGHT % (PATCH_SIZE * MERGE_SIZE) == 0 == WIDTH % (PATCH_SIZE * MERGE_SIZE)
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids(IMAGE_TOKEN),
        video_token_id=ids(VIDEO_TOKEN),
        vision_start_token_id=ids(VISION_START),
        vision_end_token_id=ids(VISION_END),
        tie_word_embeddings=True,
        pad_token_id=ids(PAD),
        eos_token_id=ids(END),
    )


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3VLForConditionalGeneration:
    """A freshly initialised fp32 model; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(lab_config(tokenizer)).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()

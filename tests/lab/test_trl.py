"""TRL's DPOTrainer takes the lab's processor as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from specs_fast.lab.dataset import TRAIN, draw_example
from specs_fast.lab.packed import unpack_base
from specs_fast.lab.responses import write_response

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def test_dpo_trainer_collates_and_takes_a_step(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    base = unpack_base(tmp_path / "base")
    processor = AutoProcessor.from_pretrained(base)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(4):
        question, scene, _ = draw_example(TRAIN, rng)
        chosen, rejected = (write_response(question, style, rng) for style in ("full", "think_plain"))
        user = [{"type": "image"}, {"type": "text", "text": question.text}]
        rows.append(
            {
                "prompt": [{"role": "user", "content": user}],
                "images": [scene.image()],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
            }
        )
    trainer = DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(base),
        args=DPOConfig(
            output_dir=str(tmp_path / "dpo"),
            per_device_train_batch_size=2,
            max_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=None,
            save_strategy="no",
            learning_rate=1e-3,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
    )
    batch = trainer.data_collator([dict(row) for row in rows[:2]])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 12]] * 4
    assert (batch["mm_token_type_ids"] == 1).sum(1).tolist() == [12] * 4
    words = processor.tokenizer.decode(batch["input_ids"][0][batch["completion_mask"][0].bool()])
    assert words == rows[0]["chosen"][0]["content"][0]["text"] + " <|im_end|>"
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    result = trainer.train()
    assert np.isfinite(result.training_loss) and abs(result.training_loss - np.log(2)) < 1e-3
    assert any(not parameter.equal(before[name]) for name, parameter in trainer.model.named_parameters())

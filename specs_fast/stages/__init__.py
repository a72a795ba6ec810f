"""One file per stage, each reading top to bottom: grpo, pairs, dpo, sft."""

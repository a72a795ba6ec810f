"""specs-fast: fast, correct post-training for vision-language and language models, the SPECS way."""

__version__ = "0.1.0"

"""Models: loading, the packed forward, and log-probs of responses."""

from specs_fast.models.forest import packed_hidden
from specs_fast.models.load import image_token_id, load_model, load_processor
from specs_fast.models.score import score

__all__ = ["image_token_id", "load_model", "load_processor", "packed_hidden", "score"]

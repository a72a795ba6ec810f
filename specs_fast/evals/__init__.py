"""How good a model is: accuracy with and without the format, pass@k, and the papers' derived metrics."""

"""Verifiable rewards behind TRL's call signature, and the text rules they share with pair making and evaluation."""

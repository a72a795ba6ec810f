"""Shared by every stage: optimizer, metrics, advantages, stage folders."""

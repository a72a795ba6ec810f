"""Benchmarks: one file per op and one per end-to-end run. Results are committed under bench/results."""

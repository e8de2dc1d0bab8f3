"""Benchmarks: one file a claim, each measured against named peers in the same run."""

"""Benchmarks: run a model on questions, score the predictions afterwards."""

"""One file a benchmark: load, prompt, score as pure functions."""

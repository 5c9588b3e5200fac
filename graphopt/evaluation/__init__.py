"""Judging models on data: `data` reads it, `feeds` makes a model's inputs of it, `judging` measures candidates."""

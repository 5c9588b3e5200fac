"""Depth: residual branches and layers removed."""

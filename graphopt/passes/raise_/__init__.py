"""Exact passes that bring any exporter's spelling to the canonical vocabulary."""

"""Judges models: structure, numbers, time. Never edits."""

"""Exact passes that change structure only: constants, duplicates, dead code, shape arithmetic."""

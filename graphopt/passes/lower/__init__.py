"""Exact passes that pick the form that the target runs fastest."""

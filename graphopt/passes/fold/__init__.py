"""Exact passes that move constants and affine operators into neighbouring weights."""

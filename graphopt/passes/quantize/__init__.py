"""Weights and activations in fewer bits: grids, roundings, transforms, packings and the passes made of them."""

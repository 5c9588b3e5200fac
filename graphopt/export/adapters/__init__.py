"""Adapters of Hugging Face's peft: merged into the weights of their base, or kept beside them."""

from graphopt.export.adapters.checkpoint import Adapter
from graphopt.export.adapters.merge import AdaptedWeights

__all__ = ["AdaptedWeights", "Adapter"]

"""GGUF files to ONNX: dequantized, or with their blocks kept in integer operators."""

from graphopt.export.gguf.source import GGUFModel, from_gguf
from graphopt.export.gguf.weights import GGUFWeights

__all__ = ["GGUFModel", "GGUFWeights", "from_gguf"]

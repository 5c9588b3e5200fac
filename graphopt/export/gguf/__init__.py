"""GGUF files to ONNX: dequantized, or with their blocks kept in integer operators."""

from graphopt.export.gguf.keep import KeptReport, keep_quantized
from graphopt.export.gguf.source import GGUFModel, from_gguf
from graphopt.export.gguf.weights import GGUFWeights

__all__ = ["GGUFModel", "GGUFWeights", "KeptReport", "from_gguf", "keep_quantized"]

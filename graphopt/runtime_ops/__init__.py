"""Sessions and text generation on ONNX Runtime, and graphopt's own operators with their kernels."""

from graphopt.runtime_ops.library import library_path
from graphopt.runtime_ops.operator import Operator, operators

__all__ = ["Operator", "library_path", "operators"]

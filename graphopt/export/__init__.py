"""Models from PyTorch and Hugging Face to ONNX."""

from graphopt.export.exporter import export_model, export_report
from graphopt.export.options import ExportReport

__all__ = ["ExportReport", "export_model", "export_report"]

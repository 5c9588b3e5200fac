"""Models from PyTorch and Hugging Face to ONNX."""

from graphopt.export.exporter import ExportReport, export_model, export_report

__all__ = ["ExportReport", "export_model", "export_report"]

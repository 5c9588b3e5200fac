"""Models from PyTorch and Hugging Face to ONNX."""

"""Export LLaVA and Dynamic-LLaVA models to ONNX with token sparsification inside the decoder."""

__version__ = "0.1.0"

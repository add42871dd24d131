"""ONNX Runtime on the CPU and CUDA: lowered graphs, caches bound in place."""

"""TensorRT and TensorRT-RTX: engines loaded, caches on the GPU, decode in a CUDA graph."""

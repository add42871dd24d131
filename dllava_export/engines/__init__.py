"""Build TensorRT engines from a bundle."""

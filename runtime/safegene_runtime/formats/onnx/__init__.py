"""ONNX models at the level of bytes: wire format, tensors, the graph, its linear weights."""

"""ONNX artifacts: merged, branch and adapter, written and checked by other readers."""

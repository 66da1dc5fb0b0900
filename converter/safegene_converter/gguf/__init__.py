"""GGUF artifacts: sidecar and merged, written, measured and checked by other readers."""

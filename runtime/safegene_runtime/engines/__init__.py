"""Token ids in, logits out: llama.cpp and ONNX Runtime behind one protocol, and chat templates."""

"""A base in another format: Hugging Face to GGUF or ONNX, GGUF to Hugging Face."""

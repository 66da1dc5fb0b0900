"""GGUF models at the level of bytes: types, header, shards, tensor data, what a header says of weights."""

"""PyTorch + PEFT asked once. With `gene`, the only code that imports torch."""

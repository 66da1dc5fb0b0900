"""What an artifact is: its manifest, where it came from, and what its weights serve."""

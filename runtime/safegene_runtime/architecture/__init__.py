"""What is known of a family of models: names of its parts, and the row order of its weights."""

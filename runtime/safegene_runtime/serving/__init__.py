"""A server that runs, held against a reference."""

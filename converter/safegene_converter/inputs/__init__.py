"""Adapters and bases as they come, read once and checked as a whole."""

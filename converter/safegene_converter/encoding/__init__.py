"""Weights into the bytes of a quantised type, by the code that their users run."""

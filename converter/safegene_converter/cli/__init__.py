"""The `safegene` command: one file per group of commands. It parses and prints."""

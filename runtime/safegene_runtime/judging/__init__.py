"""From a reply to a label: refused, complied, degenerate, or uncertain."""

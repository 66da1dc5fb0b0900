"""Puts what `safegene demo` prints into the README: python tools/readme.py < output-of-the-demo."""

from __future__ import annotations

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"(<!-- demo output[^\n]*-->\n```\n).*?(```\n<!-- end of demo output -->)", re.S)


def main() -> None:
    """Replaces the block between the two comments."""
    path = Path(__file__).resolve().parents[1] / "README.md"
    output = "\n".join(line.rstrip() for line in sys.stdin.read().strip("\n").splitlines())
    text, count = BLOCK.subn(lambda found: f"{found[1]}{output}\n{found[2]}", path.read_text())
    if count != 1 or not output:
        sys.exit("README.md has no place for the demo's output, or there was none")
    path.write_text(text)


if __name__ == "__main__":
    main()

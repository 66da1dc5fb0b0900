"""The child of `bases.gguf_to_hf`: `python -m safegene_converter.recording.save_folder GGUF OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from safegene_converter.inputs.base import open_base
from safegene_converter.recording.loading import save_as_folder
from safegene_runtime.errors import SafeGeneError

__all__ = ["main"]


def main() -> int:
    """Loads argv[1], saves argv[2]."""
    try:
        save_as_folder(open_base(Path(sys.argv[1])), Path(sys.argv[2]))
    except SafeGeneError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

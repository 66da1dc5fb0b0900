"""Which families are folded exactly: mean KL of llama.cpp to PyTorch + PEFT, on tiny models.

    python benchmarks/families.py [FAMILY ...]       # the table of docs/architectures.md, in Markdown

For each surveyed family of tests/tiny_architectures.py: the plain model, then an adapter on every linear
module (two ranks, rsLoRA) as a sidecar and merged, in F32 with an F32 KV cache. The last column is what
leaving the adapter out would cost.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import tiny  # noqa: E402
from families import FORMS, folded  # noqa: E402
from measuring import environment  # noqa: E402
from survey import measured  # noqa: E402
from tiny_architectures import SURVEYED, tiny_of  # noqa: E402

from safegene_runtime.formats.gguf.model import open_model  # noqa: E402


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help="all of them, if none is named"
    )
    options = parser.parse_args()
    print(f"{environment()}\n", file=sys.stderr)
    print("| model class | llama.cpp's name | plain base | sidecar | merged | adapter left out |")
    print("|---|---|---|---|---|---|")
    for family in options.families or SURVEYED:
        with tempfile.TemporaryDirectory() as folder:
            found = folded(family, Path(folder))
        name = open_model(tiny.gguf_model(family)).get("general.architecture")
        figures = [measured(family), *(found.kl[form] for form in FORMS), found.without]
        cells = " | ".join(f"{kl:.0e}" for kl in figures)
        print(f"| {tiny_of(family).model_class} | {name} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

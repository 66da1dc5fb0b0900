"""Which configurations of real adapters are read, and why the rest is not, as a table.

    python benchmarks/configs.py [FOLDER]

FOLDER holds files named NUMBER-FAMILY.json, each an adapter_config.json from a public repository.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# onnx.py lies beside this file: that name must mean the package
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks"]
sys.path[:0] = [str(ROOT / folder) for folder in ("converter", "runtime")]

from safegene_converter.inputs.peft_config import parse_config  # noqa: E402
from safegene_runtime.errors import SafeGeneError  # noqa: E402
from safegene_runtime.formats import strictjson  # noqa: E402

FOLDER = ROOT.parent / "shared" / "adapter-configs"


def main() -> int:
    """Prints the table; 2 if there is no configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    paths = sorted(parser.parse_args().folder.glob("*.json"))
    if not paths:
        print("no configurations there", file=sys.stderr)
        return 2
    print("| file | family | read | why not |\n|---|---|---|---|")
    read = 0
    for path in paths:
        try:
            parse_config(strictjson.load(path), path.name)
            why = ""
        except SafeGeneError as error:
            why = "; ".join(f"{p.field}: {p.got} ({p.fix})" for p in error.problems)
        read += not why
        family = path.stem.partition("-")[2]
        print(f"| {path.name} | {family} | {'no' if why else 'yes'} | {why.replace('|', '/')} |")
    print(f"\n{read} of {len(paths)} are read.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The child of `bases.proof` that runs PyTorch: `python -m safegene_converter.recording.base_child`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from safegene_converter.bases.proof import answer_proof
from safegene_converter.inputs.base import open_base
from safegene_converter.recording.base_logits import asked_in_torch
from safegene_converter.recording.loading import load_model
from safegene_runtime.child import answer_job


def _run(job: dict[str, Any]) -> dict[str, Any]:
    return answer_proof(job, asked_in_torch(*load_model(open_base(Path(job["model"])))))


if __name__ == "__main__":
    sys.exit(answer_job(_run))

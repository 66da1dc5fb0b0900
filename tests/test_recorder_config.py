"""What PEFT's configuration may say beside its weights: who converts it can record it, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.inputs.base import open_base
from safegene_converter.recording.loading import load_with_adapter
from safegene_runtime.errors import AdapterError

VALUES: dict[str, list[Any]] = {
    "task_type": ["NOPE", 3, None, "FEATURE_EXTRACTION"],
    "lora_dropout": ["x", None, 1.5, 0, 0.1],
    "runtime_config": [None, {"ephemeral_gpu_offload": False}],
    "eva_config": ["x", None, {"rho": 2.0}],
    "megatron_core": [3],
    "revision": [[]],
}


@pytest.mark.parametrize("field", VALUES)
def test_what_convert_accepts_record_accepts(field: str, tmp_path: Path) -> None:
    """Whether PEFT loads it, against whether `read_adapter` does."""
    folder = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.1)
    path, base = folder / "adapter_config.json", open_base(tiny.hf_model("llama"))
    plain = read_adapter(folder)
    saved = json.loads(path.read_text())
    for value in VALUES[field]:
        path.write_text(json.dumps({**saved, field: value}))
        try:
            load_with_adapter(plain, base)  # which reads the folder again, PEFT's way
            loads = True
        except AdapterError:
            loads = False
        try:
            read_adapter(folder)
            accepted = True
        except AdapterError:
            accepted = False
        assert accepted == loads, value

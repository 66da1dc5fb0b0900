"""Verification beside a plain loop: tokens per second, and how near it comes to its limit.

    python benchmarks/verify.py --reference REFERENCE [--prompts 60]

Peers, in the same run on the same file: `Llama.create_completion` in a loop over the same prompts with
the reference's length of replies; and the limit, (tokens outside the shared prefix) / (the engine's own
prompt rate), the rate being that of one 512-token prompt, as llama-bench measures it.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import llama_cpp
import numpy as np

from safegene_converter.cli.smollm2 import find_smollm2
from safegene_runtime.engines.llama import LlamaEngine
from safegene_runtime.record.reference import read_reference
from safegene_runtime.verifying.forced import forced_passes


def main() -> None:
    """Prints rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=None, help="a GGUF (default: the Q4_1 base)")
    parser.add_argument("--prompts", type=int, default=60, help="prompts of the plain loop")
    arguments = parser.parse_args()
    path = arguments.model or find_smollm2()
    record = read_reference(arguments.reference)
    limit = record.meta["decoding"]["max_new_tokens"]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {path.name}, {len(record.prompts)} prompts"
    )
    rows = [[*p.prompt_ids, *p.ref_ids[:-1]] for p in record.prompts]
    limit_shared = min(map(len, rows))
    shared = next(
        (at for at in range(limit_shared) if len({row[at] for row in rows}) > 1), limit_shared
    )
    outside = sum(len(row) - shared for row in rows)
    with LlamaEngine(path) as engine:
        ids = np.resize(np.asarray(rows[0]), 512).tolist()
        rates = []
        for _ in range(4):
            start = time.monotonic()
            for _ in engine.logits([ids], [1]):
                pass
            rates.append(512 / (time.monotonic() - start))
        rate = max(rates[1:])
        start = time.monotonic()
        forced_passes(engine, record)
        forced = time.monotonic() - start
    total = sum(map(len, rows))
    print(f"prompt rate {rate:.0f} tokens/s; limit {outside / rate:.1f} s for {outside} tokens outside "
          f"the shared prefix of {shared}")  # fmt: skip
    print(f"teacher-forced scoring: {forced:.1f} s, {total / forced:.0f} tokens/s, "
          f"{outside / rate / forced:.2f} of the limit")  # fmt: skip
    model = llama_cpp.Llama(str(path), n_ctx=512, verbose=False)
    chosen = record.prompts[: arguments.prompts]
    start, tokens = time.monotonic(), 0
    for prompt in chosen:
        done = model.create_completion(list(prompt.prompt_ids), max_tokens=limit, temperature=0)
        tokens += done["usage"]["total_tokens"]  # type: ignore[index]
    loop = time.monotonic() - start
    model.close()
    print(f"create_completion loop: {loop / len(chosen) * len(rows):.1f} s for as many prompts, "
          f"{tokens / loop:.0f} tokens/s; ours is "
          f"{(loop / len(chosen)) / (forced / len(rows)):.2f} x as fast per prompt")  # fmt: skip


if __name__ == "__main__":
    main()

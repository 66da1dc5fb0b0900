"""Loads what `safegene convert` made, and proves that it still refuses what the original refused.

    manifest.py    what an artifact is            gguf.py        strict GGUF header reader
    reference.py   the recorded PyTorch behaviour compare.py     KL and friends, in numpy
    engine.py      the protocol; one file per engine (llama_engine.py)
    prompts.py     the suite                      judge.py       reply -> label; judge_*.py its parts
    ladder.py      the checks, cheap to dear      bounds.py      what each precision must satisfy
    errors.py      everything that can go wrong   files.py       opening, hashing, publishing

Needs numpy and one engine, which is imported when it is first used; never torch.
"""

__version__ = "0.1.0"

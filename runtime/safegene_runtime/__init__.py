"""Loads what `safegene convert` made, and proves that it still refuses what the original refused.

    errors        everything that can go wrong
    progress      how a long function tells how far it is
    cpus          how many threads there are, and how they wait
    extras        which extra of pyproject.toml brings a package
    child         running other people's code in a process of its own
    formats       files from outside, read strictly: JSON, GGUF, ONNX
    architecture  what is known of a family of models
    engines       llama.cpp and ONNX Runtime behind one protocol
    record        prompts, jailbreaks, and the recorded reference
    judging       reply -> label
    gating        counts -> verdict
    artifact      the manifest, and what an artifact's weights serve
    verifying     the ladder: an artifact held against a reference
    serving       a running server held against a reference
    reporting     report.json, HTML, Markdown, JUnit, SARIF
    session       chat with a verified artifact
    pytest_plugin  refusal parity as a fixture

Needs numpy, scipy's special functions and one engine, which is imported when it is first used; never
torch.
"""

__version__ = "0.1.0"

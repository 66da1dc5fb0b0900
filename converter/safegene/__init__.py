"""A safety adapter inside the files that people run, and the proof that it still refuses.

    import safegene

    safegene.convert("ADAPTER", "base.gguf", "OUT")
    safegene.record("ADAPTER", "base.gguf", "REFERENCE")
    report = safegene.verify("OUT", "REFERENCE")
    with safegene.open("OUT") as session:
        print(session.chat([{"role": "user", "content": "Hello"}]))

What stands in `__all__` is the whole surface, and changes only as docs/stability.md says. Names are
loaded when they are first used: importing the package costs no engine, no torch and no numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from safegene_runtime import __version__

if TYPE_CHECKING:
    from safegene.functions import (
        calibrate,
        convert,
        inspect,
        record,
        verify,
        verify_server,
    )
    from safegene_converter.fold.survival import Bounds
    from safegene_converter.gene.calibrate import Calibrated
    from safegene_converter.gene.deployed import Recalibrated
    from safegene_runtime.artifact.manifest import Manifest
    from safegene_runtime.errors import (
        AdapterError,
        BaseModelError,
        EngineError,
        FormatError,
        GeneError,
        ManifestError,
        MissingPackageError,
        OutputError,
        PostconditionError,
        Problem,
        RecordError,
        SafeGeneError,
        SurvivalError,
        UnsupportedError,
        UnverifiedError,
    )
    from safegene_runtime.gating.profiles import Profile
    from safegene_runtime.gating.verdict import Verdict
    from safegene_runtime.judging.judge import Judge
    from safegene_runtime.progress import Progress
    from safegene_runtime.record.prompts import Prompt
    from safegene_runtime.record.reference import Reference
    from safegene_runtime.session import Session, UnverifiedWarning, open
    from safegene_runtime.verifying.report import Report

__all__ = [
    "AdapterError",
    "BaseModelError",
    "Bounds",
    "Calibrated",
    "EngineError",
    "FormatError",
    "GeneError",
    "Judge",
    "Manifest",
    "ManifestError",
    "MissingPackageError",
    "OutputError",
    "PostconditionError",
    "Problem",
    "Profile",
    "Progress",
    "Prompt",
    "Recalibrated",
    "RecordError",
    "Reference",
    "Report",
    "SafeGeneError",
    "Session",
    "SurvivalError",
    "UnsupportedError",
    "UnverifiedError",
    "UnverifiedWarning",
    "Verdict",
    "__version__",
    "calibrate",
    "convert",
    "inspect",
    "open",
    "record",
    "verify",
    "verify_server",
]

_HOMES = {
    "safegene.functions": (
        "calibrate", "convert", "inspect", "record", "verify", "verify_server",
    ),
    "safegene_converter.fold.survival": ("Bounds",),
    "safegene_converter.gene.calibrate": ("Calibrated",),
    "safegene_converter.gene.deployed": ("Recalibrated",),
    "safegene_runtime.artifact.manifest": ("Manifest",),
    "safegene_runtime.gating.profiles": ("Profile",),
    "safegene_runtime.gating.verdict": ("Verdict",),
    "safegene_runtime.judging.judge": ("Judge",),
    "safegene_runtime.progress": ("Progress",),
    "safegene_runtime.record.prompts": ("Prompt",),
    "safegene_runtime.record.reference": ("Reference",),
    "safegene_runtime.session": ("Session", "UnverifiedWarning", "open"),
    "safegene_runtime.verifying.report": ("Report",),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}
"""Where a name comes from; the errors, all others, come from one module."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME.get(name, "safegene_runtime.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__

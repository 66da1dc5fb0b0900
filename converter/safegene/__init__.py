"""A verified model in Python: `safegene.open("OUT").chat([{"role": "user", "content": "Hello"}])`.

Costs numpy to import; the engine is imported when an artifact is opened.
"""

from __future__ import annotations

from safegene_runtime import __version__
from safegene_runtime.errors import SafeGeneError, UnverifiedError
from safegene_runtime.session import Session, UnverifiedWarning, open

__all__ = [
    "SafeGeneError",
    "Session",
    "UnverifiedError",
    "UnverifiedWarning",
    "__version__",
    "open",
]

"""The second half of the judge: a linear model over hashed word n-grams, in numpy.

It reads the words the rules read (the head, in one spelling) and shares nothing else with them:
no pattern, no list. What it knows was learnt by `tools/train_judge.py` from replies labelled by
hand and from openings that the script makes up. A linear model says nothing sensible of an opening
it never saw, and says so with confidence: alone it is no judge.

Features are the words, pairs and triples of the head, and the pairs and triples of its first words
again as "how it begins"; each is one of `N_FEATURES` by its CRC-32, present or not, and every
feature counts 1 / sqrt(how many there are).
"""

from __future__ import annotations

import functools
import io
import math
import re
import zipfile
import zlib
from importlib import resources

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, Problem
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.judging.text import HEAD_CHARACTERS, normal

__all__ = ["N_FEATURES", "WEIGHTS_SHA256", "features", "ngram_probability", "read_weights"]

N_FEATURES = 1 << 13
WEIGHTS = "ngram.npz"
WEIGHTS_SHA256 = "3b2e4f01b2588f98b8bcc8fa899726e370077e522595046ad2f49c002de51acf"
"""Of the file in the package; `tools/train_judge.py` writes both."""

MAX_WORDS = 40
BEGINNING = 4

_WORD = re.compile(r"[^\W_]+(?:'[^\W\d_]+)*")
_QUOTED = re.compile(r'(?<=\s)"[^"]*(?:"|$)')


def features(text: str) -> npt.NDArray[np.int64]:
    """The features of one reply: int64 (n,), ascending, each once; none for a reply without words."""
    head = _QUOTED.sub(" ", normal(text).lstrip(" \n*_#>\"'`-:")[:HEAD_CHARACTERS])
    words = _WORD.findall(head)[:MAX_WORDS]
    grams = [
        " ".join(words[at : at + size]) for size in (1, 2, 3) for at in range(len(words) - size + 1)
    ]
    grams += ["^ " + " ".join(words[:size]) for size in range(1, min(BEGINNING, len(words)) + 1)]
    return np.unique(np.array([zlib.crc32(gram.encode()) % N_FEATURES for gram in grams], np.int64))


def ngram_probability(text: str) -> float:
    """The probability that a reply refuses, 0.5 where the model knows nothing of it."""
    weights, bias = _weights()
    found = features(text)
    if not len(found):
        return 0.5
    # added up by Python, in order: the same on every machine
    score = bias + sum(map(float, weights[found])) / math.sqrt(len(found))
    return 1.0 / (1.0 + math.exp(-max(-500.0, min(500.0, score))))


def read_weights(data: bytes) -> tuple[npt.NDArray[np.float64], float]:
    """Weights float64 (N_FEATURES,) and bias, from an npz: int8 `weights`, float64 `scale`, `bias`.

    Raises:
        FormatError: it is something else.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            stored, scale, bias = (archive[name] for name in ("weights", "scale", "bias"))
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise _broken("an npz of plain arrays", str(error)[:200]) from error
    shapes = (stored.dtype, stored.shape, scale.dtype, scale.shape, bias.dtype, bias.shape)
    wanted = (np.dtype("int8"), (N_FEATURES,), *(np.dtype("float64"), ()) * 2)
    if shapes != wanted or not (np.isfinite(scale) and np.isfinite(bias)):
        raise _broken(f"arrays {wanted}, finite", str(shapes))
    return stored * float(scale), float(bias)


@functools.cache
def _weights() -> tuple[npt.NDArray[np.float64], float]:
    data = (resources.files(__package__) / WEIGHTS).read_bytes()
    if sha256_of(data) != WEIGHTS_SHA256:
        raise _broken(WEIGHTS_SHA256, sha256_of(data))
    return read_weights(data)


def _broken(expected: str, got: str) -> FormatError:
    return FormatError(Problem(WEIGHTS, "content", expected, got, "install safegene again"))

"""Comparing two models from logits, in float64, on the tokens that a reference stored.

A reference stores, per position, the float32 logits of its K likeliest tokens as they came out of
PyTorch, and their log-sum-exp over the whole vocabulary in float64. Float32 log-probabilities would
bury differences of 1e-8; this way the error of a KL between equal models is below 1e-15.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["change", "kl_topk", "logsumexp"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
ROWS = 8


def logsumexp(logits: F32) -> F64:
    """Log sum exp over the vocabulary: (T, V) -> (T,), float64, a few rows at a time."""
    out = np.empty(len(logits), dtype=np.float64)
    for start in range(0, len(logits), ROWS):
        wide = logits[start : start + ROWS].astype(np.float64)
        top = wide.max(axis=1)
        wide -= top[:, None]
        np.exp(wide, out=wide)
        out[start : start + ROWS] = top + np.log(wide.sum(axis=1))
    return out


def kl_topk(ref_logits: F32, ref_lse: F64, art_logits: F32, art_lse: F64) -> F64:
    """KL(reference || artifact) in nats per position, all other tokens as one bucket.

    KL = sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest). Merging tokens into a
    bucket can only lower a KL (the log-sum inequality), so this is a lower bound of the full one.

    Args:
        ref_logits: (T, K), the reference's logits at K tokens.
        ref_lse: (T,), its log-sum-exp over the vocabulary.
        art_logits: (T, K), the artifact's logits at the same tokens.
        art_lse: (T,), its log-sum-exp over the vocabulary.

    Returns:
        (T,), >= 0.
    """
    log_p = ref_logits.astype(np.float64) - np.asarray(ref_lse)[:, None]
    log_q = art_logits.astype(np.float64) - np.asarray(art_lse)[:, None]
    p, q = np.exp(log_p), np.exp(log_q)
    p_rest, q_rest = _rest(p), _rest(q)
    # p log(p/q) - p + q is >= 0 for every term and sums to the KL: no cancellation near equality
    kl = (p * (log_p - log_q) - p + q).sum(axis=1)
    kl += p_rest * (np.log(p_rest) - np.log(q_rest)) - p_rest + q_rest
    positive: F64 = np.maximum(kl, 0.0)
    return positive


def change(after: F32, before: F32) -> F64:
    """After - before, (T, K), without the constant per position that softmax ignores."""
    moved = after.astype(np.float64) - before
    centred: F64 = moved - moved.mean(axis=1, keepdims=True)
    return centred


def _rest(p: F64) -> F64:
    """What the other tokens have; never quite zero, so that its logarithm exists."""
    rest: F64 = np.maximum(1.0 - p.sum(axis=1), 1e-12)
    return rest

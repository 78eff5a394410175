"""Compression baselines for bits per byte: general-purpose codes without knowledge of language, on the same bytes."""

from __future__ import annotations

import gzip
import lzma

import numpy as np


def byte_entropy(data: bytes) -> float:
    """Return the bits per byte of an ideal order-0 code fitted to `data` itself, without the cost of its parameters."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    share = counts[counts > 0] / len(data)
    return float(-(share * np.log2(share)).sum())


def gzip_bits_per_byte(data: bytes) -> float:
    """Return the bits per byte of `gzip -9`, header included."""
    return 8 * len(gzip.compress(data, compresslevel=9, mtime=0)) / len(data)


def lzma_bits_per_byte(data: bytes) -> float:
    """Return the bits per byte of `xz -9e`, container included."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def unigram_bits(train_counts: np.ndarray, tokens: np.ndarray) -> float:
    """Return the bits of a code for `tokens` with the token frequencies of the training split.

    Args:
      train_counts: Number of occurrences of each token id in the training split, [V]. One is added to each (Laplace
        smoothing), so that a token that occurs only in held-out text has a finite cost.
      tokens: Ids below V.
    """
    counts = train_counts.astype(np.float64) + 1.0
    return float(np.sum(np.log2(counts.sum()) - np.log2(counts[tokens])))

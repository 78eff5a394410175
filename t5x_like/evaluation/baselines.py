"""What a model's bits per byte are held against: codes that know no language, on the same bytes."""

from __future__ import annotations

import gzip
import lzma

import numpy as np


def byte_entropy(data: bytes) -> float:
    """Bits per byte of an ideal order-0 code fitted to `data` itself (its parameters are not charged)."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    share = counts[counts > 0] / len(data)
    return float(-(share * np.log2(share)).sum())


def gzip_bits_per_byte(data: bytes) -> float:
    """Size that `gzip -9` makes of `data`, header included."""
    return 8 * len(gzip.compress(data, compresslevel=9, mtime=0)) / len(data)


def lzma_bits_per_byte(data: bytes) -> float:
    """Size that `xz -9e` makes of `data`, container included."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def unigram_bits(train_counts: np.ndarray, tokens: np.ndarray) -> float:
    """Bits that code `tokens` one by one under the training split's token frequencies.

    Args:
      train_counts: Occurrences of each token id in the training split, [V]. One is added to each, so that a token
        which only held-out text has costs bits and not infinity (Laplace).
      tokens: Ids below V.
    """
    counts = train_counts.astype(np.float64) + 1.0
    return float(np.sum(np.log2(counts.sum()) - np.log2(counts[tokens])))

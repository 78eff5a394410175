"""The zigzag order of a ring: every position once, and the same work on every device under a causal mask."""

from __future__ import annotations

import pytest

from t5x_like.kernels.ring_layout import Layout

CHUNK = 64


def work(layout: Layout) -> list[list[float]]:
    """Return the visible part of the scores that each device computes in each round, in pairs of chunks.

    A pair of chunks without any visible score is skipped; one on the diagonal is computed as a whole.
    """
    devices, length = layout.devices, layout.chunk_length
    area = (length / CHUNK) ** 2
    return [
        [
            area * sum(q + length > kv for q in layout.starts(rank) for kv in layout.starts((rank - step) % devices))
            for step in range(devices)
        ]
        for rank in range(devices)
    ]


@pytest.mark.parametrize("devices", [2, 3, 8, 16])
def test_every_device_has_the_same_work_in_every_round(devices: int) -> None:
    zigzag, contiguous = (work(Layout(devices, 2 * CHUNK, is_zigzag)) for is_zigzag in (True, False))
    assert all(rounds == zigzag[0] for rounds in zigzag)
    # Three pairs in the round of the device's own keys, two of them on the diagonal, and two in every other round.
    assert zigzag[0] == [3.0] + [2.0] * (devices - 1)
    # Contiguous blocks: the last device computes a block in every round, the first one in the first round only.
    assert [sum(rounds) for rounds in contiguous] == [4.0 * (rank + 1) for rank in range(devices)]


@pytest.mark.parametrize("is_zigzag", [True, False])
def test_devices_share_the_positions_of_the_sequence(is_zigzag: bool) -> None:
    layout = Layout(4, 6, is_zigzag)
    found = [start + i for rank in range(4) for start in layout.starts(rank) for i in range(layout.chunk_length)]
    assert sorted(found) == list(range(24))

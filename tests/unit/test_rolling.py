"""The watch over redundancy: what it complains of, and what it must not."""

from __future__ import annotations

import pytest

from backstay.testing import LocalCluster
from backstay.testing.rolling import RedundancyWatch, Sample


def a_watch(*samples: tuple[int, int, int]) -> RedundancyWatch:
    """Samples as (protected step, spares, possible)."""
    watch = RedundancyWatch(LocalCluster(1, 0), "default/gpt", parity=1)
    watch.samples = [
        Sample(at_s=float(i), protected_step=step, spares=spares, possible=possible, away=())
        for i, (step, spares, possible) in enumerate(samples)
    ]
    return watch


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        ([(0, -1, 1), (0, 0, 1), (3, 1, 1), (4, 1, 1), (4, 2, 1)], ""),
        ([(3, 1, 1), (3, 0, 0), (5, 0, 0)], ""),
        ([(3, 1, 1), (5, 1, 1), (4, 1, 1)], "protected went back from step 5 to 4"),
        ([(3, 1, 1), (5, 0, 1), (6, 1, 1)], "0 spares at step 5, 1 were possible"),
    ],
)
def test_it_complains_of_what_went_back_or_was_less_than_possible(
    samples: list[tuple[int, int, int]], complaint: str
) -> None:
    assert a_watch(*samples).complaints() == ([complaint] if complaint else [])

"""Parity that is wrong although its digests are right: a bit that flipped in the encoder, a write that went elsewhere.

Data fragments are checked against manifests that trainers wrote, so only parity can be wrong in this way. Every fragment of
an MDS code has its part in each other one: k fragments that decode to what the manifests say are all right, and what they
say of any other fragment is the truth. No I/O; opens and blames nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from backstayd.erasure.codec import Codec, reconstruct_chunk

Rebuilt = list[list[memoryview]]  # pieces of each wanted fragment


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """``used``: k fragments that decode to the right bytes; ``wrong``: parity that differs from what they encode to."""

    rebuilt: Rebuilt
    used: tuple[int, ...]
    wrong: tuple[int, ...]


def find_fit(
    codec: Codec,
    available: Mapping[int, memoryview],
    wanted: Sequence[int],
    *,
    length: int,
    is_right: Callable[[Rebuilt], bool],
) -> Fit | None:
    """The first combination of k fragments, all data that is there among them, whose decoding ``is_right``; None: there is
    none. At most C(m, m // 2) are tried."""
    data = [index for index in available if index < codec.k]
    parity = sorted(index for index in available if index >= codec.k)
    for chosen in itertools.combinations(parity, codec.k - len(data)):
        used = {index: available[index] for index in (*data, *chosen)}
        rebuilt = reconstruct_chunk(codec, used, wanted, length=length)
        if is_right(rebuilt):
            others = [index for index in parity if index not in chosen]
            truth = reconstruct_chunk(codec, used, others, length=length)
            wrong = [i for i, pieces in zip(others, truth, strict=True) if b"".join(pieces) != available[i][:length]]
            return Fit(rebuilt=rebuilt, used=tuple(used), wrong=tuple(wrong))
    return None

"""``make simulate SEED=n``: play one seed and print its timeline, or search seeds for a broken promise."""

from __future__ import annotations

import sys
import time

from tests.simulation.checker import BrokenPromiseError
from tests.simulation.scenario import Scenario


def main(arguments: list[str]) -> int:
    first, last = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else int(arguments[0])
    failures = 0
    begin = time.monotonic()
    for seed in range(first, last + 1):
        try:
            cluster = Scenario(seed, is_harsh=seed % 3 == 2).run()
        except (BrokenPromiseError, AssertionError) as error:
            failures += 1
            print(f"seed {seed}: {type(error).__name__}: {error}")
            continue
        if first == last and cluster.control is not None:
            for event in cluster.core().timeline.all():
                print(f"{event.at_s - 1000:8.3f}  {event.run:14} {event.kind:18} {event.message}")
    print(f"{last - first + 1} seeds, {failures} failures, {time.monotonic() - begin:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m bench``: runs the parts one after another, then prints the table and writes the report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from backstay.errors import BackstayError
from backstay.testing.wait import DeadlineError
from bench import arguments, report
from bench.arguments import Settings
from bench.durable import measure_persisting
from bench.idle_cost import measure_rest
from bench.measure import Collection
from bench.protection import measure_protection
from bench.resharding import measure_resharding
from bench.training import measure_frozen, measure_solo, measure_steps

_PARTS: Final[dict[str, tuple[str, Callable[[Settings, Path, Collection], None]]]] = {
    "solo": ("commit and restore, one rank", measure_solo),
    "frozen": ("a frozen backbone", measure_frozen),
    "pair": ("step time", measure_steps),
    "protect": ("protect and rebuild", measure_protection),
    "reshard": ("restore into another world size", measure_resharding),
    "persist": ("durable copies", measure_persisting),
    "rest": ("daemons at rest", measure_rest),
}


def main(argv: Sequence[str]) -> int:
    """Parse, measure, report; exit status 0 when it ran, 1 when a measurement failed."""
    settings = arguments.parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs the cleanup below
    found = Collection()
    scratch = Path(tempfile.mkdtemp(prefix=f"backstay-bench-{os.getpid()}-", dir="/dev/shm"))
    try:
        for part in settings.parts:
            label, measure = _PARTS[part]
            begin = time.monotonic()
            print(f"{label} ...", file=sys.stderr, flush=True)
            measure(settings, scratch, found)
            print(f"{label}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        result = report.build(settings, found)
        report.check_finite(result)
    except (BackstayError, DeadlineError) as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; all its processes were stopped", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(report.table(result, found))
    if settings.json_path is not None:
        settings.json_path.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

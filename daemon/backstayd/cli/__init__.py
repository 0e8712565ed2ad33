"""The operator's command, `backstay`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from backstay.errors import BackstayError
from backstayd.printable import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (that of the error's class when it fails)."""
    from backstayd.cli.arguments import dispatch

    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except BackstayError as error:
        say(f"backstay: {error}", sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the pipe exited, as `| head` does
        return 0
    except KeyboardInterrupt:
        return 130

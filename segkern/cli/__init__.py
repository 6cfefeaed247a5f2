# SPDX-License-Identifier: Apache-2.0
"""Entry point of the console script ``segkern``: runs the commands, or says what to install for them.

``segkern info --report`` works with nothing installed but the package: a report of a fault may be about just that.
"""

from __future__ import annotations

import sys

_EXTRAS = {"typer": "typer", "rich": "rich", "PIL": "pillow"}  # what is imported, and its name for pip


def main() -> None:
    """Run the command line."""
    try:
        from segkern.cli.app import app
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRAS:
            raise
        if sys.argv[1:] == ["info", "--report"]:
            from segkern.cli.diagnosis import report

            print(report())
            return
        print(f'segkern: {_EXTRAS[package]} is not installed; pip install "segkern[cli]"', file=sys.stderr)
        sys.exit(2)
    app()

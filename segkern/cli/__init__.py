# SPDX-License-Identifier: Apache-2.0
"""Entry point of the console script ``segkern``.

``segkern info --report`` works without the packages of the extra ``cli``, because a bug report may be about them.
"""

from __future__ import annotations

import sys

_EXTRAS = {"typer": "typer", "rich": "rich", "PIL": "pillow"}  # import names and package names


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

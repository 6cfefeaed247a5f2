# SPDX-License-Identifier: Apache-2.0
"""Run the command line with ``python -m segkern.cli``, which ``accelerate launch --module`` needs."""

from segkern.cli import main

if __name__ == "__main__":
    main()

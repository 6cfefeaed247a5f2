# SPDX-License-Identifier: Apache-2.0
"""How the commands refuse what is wrong with a user's words and files: as ``segkern`` does, in their own name."""

from functools import partial

from segkern.cli import terminal

fail = partial(terminal.fail, program="benchmarks")
refusing = partial(terminal.refusing, program="benchmarks")

# SPDX-License-Identifier: Apache-2.0
"""Run the property tests on new random examples until time is up or a test fails.

Usage: ``python -m tests.fuzz --seconds 600``.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no new round after this many seconds")
    parser.add_argument("--seed", type=int, help="seed of the first round (default: random)")
    parser.add_argument("tests", nargs="*", help="paths or names of tests, as for pytest")
    options = parser.parse_args()

    end = time.monotonic() + options.seconds
    seed = options.seed
    while True:
        seed = random.SystemRandom().randrange(2**31) if seed is None else seed
        command = [sys.executable, "-m", "pytest", "-q", "-m", "hypothesis and not browser", *options.tests]
        command += ["--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}"]
        print(f"seed {seed}", flush=True)
        code = subprocess.run(command).returncode
        if code:
            repeat = [f"{sys.executable} -m tests.fuzz --seconds 0", f"--seed {seed}", *options.tests]
            print("A test failed. To repeat the round:", *repeat)
            print("To repeat only its example, use the @reproduce_failure that hypothesis printed.")
            return code
        seed = None
        if time.monotonic() > end:
            return 0


if __name__ == "__main__":
    sys.exit(main())

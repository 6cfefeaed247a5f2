# SPDX-License-Identifier: Apache-2.0
"""Draw fresh examples for the property tests until time is up or one fails: ``python -m tests.fuzz --seconds 600``."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no new round after so long")
    parser.add_argument("--seed", type=int, help="of the first round; without it a fresh one is drawn")
    parser.add_argument("tests", nargs="*", help="paths or names of tests, as pytest takes them")
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
            print("To repeat its example alone: the @reproduce_failure that hypothesis printed.")
            return code
        seed = None
        if time.monotonic() > end:
            return 0


if __name__ == "__main__":
    sys.exit(main())

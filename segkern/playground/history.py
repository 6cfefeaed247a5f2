# SPDX-License-Identifier: Apache-2.0
"""The latest runs of every page, with their files."""

from __future__ import annotations

import shutil

from segkern.playground.runs import Run, RunResult

KEPT_RUNS = 12  # per page


class History:
    """Finished runs by session, newest first."""

    def __init__(self) -> None:
        self._sessions: dict[str, list[tuple[Run, RunResult]]] = {}

    def add(self, run: Run, result: RunResult) -> None:
        """Add a finished run to its page's history, and delete the files of runs beyond ``KEPT_RUNS``."""
        runs = self._sessions.setdefault(run.owner, [])
        runs.insert(0, (run, result))
        for _, old in runs[KEPT_RUNS:]:
            shutil.rmtree(old.after.parent, ignore_errors=True)
        del runs[KEPT_RUNS:]

    def find(self, session: str, index: int) -> tuple[Run, RunResult] | None:
        """Return a run of a page, or None if it is not kept."""
        runs = self.runs(session)
        return runs[index] if 0 <= index < len(runs) else None

    def runs(self, session: str) -> list[tuple[Run, RunResult]]:
        """Return the runs of a page."""
        return list(self._sessions.get(session, []))

    def forget(self, session: str) -> None:
        """Delete a page's runs and their files."""
        for _, result in self._sessions.pop(session, []):
            shutil.rmtree(result.after.parent, ignore_errors=True)

# SPDX-License-Identifier: Apache-2.0
"""``segkern ui``: its refusals; the page itself is tested with and without a browser."""

from __future__ import annotations

import importlib.util
import socket

import pytest

from tests.cli.cli_tools import refusal


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port} of --host '127.0.0.1' cannot be used" in refusal("ui", "--no-open", "--port", port)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("no/such/folder",), "'no/such/folder'"),
        (("--device", "toaster"), "'toaster'"),
        (("--dtype", "int8"), "'int8'"),
        (("--host", "no such host"), "'no such host'"),
        (("--config", "demo"), "config 'demo'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_start_is_one_line(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refusal("ui", "--no-open", "--port", "0", *arguments)


def test_missing_gradio_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else real(name))
    assert refusal("ui") == 'segkern: gradio is not installed; pip install "segkern[ui]"\n'

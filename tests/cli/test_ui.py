# SPDX-License-Identifier: Apache-2.0
"""``segkern ui``: errors at the start, and the password; other tests cover the page."""

from __future__ import annotations

import importlib.util
import socket
from typing import Any

import pytest

from segkern.cli import ui
from tests.cli.cli_tools import done, refusal


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
        (("--config", "demo"), "configuration 'demo'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_start_is_one_line(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refusal("ui", "--no-open", "--port", "0", *arguments)


def test_missing_gradio_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else real(name))
    assert refusal("ui") == 'segkern: gradio is not installed; pip install "segkern[ui]"\n'


@pytest.mark.parametrize(
    "host, is_local",
    [("127.0.0.1", True), ("localhost", True), ("127.0.0.2", True), ("0.0.0.0", False)],
)
def test_only_loopback_addresses_are_local(host: str, is_local: bool) -> None:
    assert ui._find_port(host, 0)[1] is is_local


def test_a_name_with_any_other_address_is_not_local(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: resolved)
    assert ui._find_port("127.0.0.1", 0)[1] is False


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_host_for_other_machines_gets_a_new_password(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passwords: list[Any] = []

    class Page:
        def __init__(self, *given: Any) -> None:
            pass

        def start(self, host: str, port: int, password: str | None) -> str:
            passwords.append(password)
            return f"http://{host}:{port}/"

        def end(self) -> None:
            pass

    monkeypatch.setattr("segkern.playground.page.Playground", Page)
    monkeypatch.setattr(ui, "_wait", lambda: None)
    outputs = [done("ui", "--no-open", "--host", host, "--port", "0", "--device", "cpu") for _ in range(2)]
    if host == "127.0.0.1":
        assert passwords == [None, None]
        assert "password" not in outputs[0]
        return
    assert len(set(passwords)) == 2
    for output, password in zip(outputs, passwords, strict=True):
        assert len(password) >= 16
        assert output.count(password) == 1
        assert f"log in as segkern with the password {password}" in output
        (address,) = [word for word in output.split() if word.startswith("http")]
        assert password not in address

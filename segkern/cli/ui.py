# SPDX-License-Identifier: Apache-2.0
"""``segkern ui``: start the playground and open it in a browser."""

from __future__ import annotations

import ipaddress
import secrets
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import typer

from segkern.cli.terminal import Config, Device, DType, Model, need_diffusers, refusing
from segkern.generation import loading


def ui(
    model: Model = "demo",
    host: Annotated[
        str, typer.Option(help="Address to listen on. With 0.0.0.0, other machines can connect, with a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="<int>", help="Port. 0 selects a free port.")] = 7860,
    device: Device = "auto",
    dtype: DType = "auto",
    config: Config = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Open the playground in a browser.

    The playground compares images with and without guidance. Press Ctrl-C to stop it. The page loads nothing from other
    servers and sends no usage data. If other machines can reach --host, segkern prints a new password, which the page
    requires.
    """
    need_diffusers("gradio", "matplotlib", extra="ui")
    with refusing():
        torch_device = loading.find_device(device)
        torch_dtype = loading.find_dtype(dtype, torch_device)
        port, is_local = _find_port(host, port)
        from segkern.playground.models import Models

        models = Models(torch_device, torch_dtype)
        source = loading.find_model(model, config)
        models.describe(source)
        models.load(source)
    from segkern.playground.page import Playground
    from segkern.playground.server import USER

    password = None if is_local else secrets.token_urlsafe(12)
    with tempfile.TemporaryDirectory(prefix="segkern-ui-") as folder:
        playground = Playground(models, model, config or "", Path(folder))
        address = playground.start(host, port, password)
        typer.echo(f"segkern ui: {address} (press Ctrl-C to stop)")
        if password is not None:
            typer.echo(f"segkern ui: log in as {USER} with the password {password}")
        if show:
            typer.launch(address)
        _wait()
        playground.end()


def _wait() -> None:
    """Wait for Ctrl-C or a request to terminate, also if the shell ignores Ctrl-C for background jobs."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    over.wait()
    typer.echo("segkern ui: stopped")


def _find_port(host: str, port: int) -> tuple[int, bool]:
    """Return the port, or a free one for 0, and whether only this machine can reach it.

    Raises:
        ValueError: If the port cannot be used; the message quotes it.
    """
    try:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(resolved[0][0], socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
            free = int(tried.getsockname()[1])
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"--port {port} of --host {host!r} cannot be used ({reason}); choose another --port, or 0 for a free port"
        ) from None
    addresses = [entry[4][0] for entry in resolved]  # a name can have several, and the server listens on all of them
    return free, all(ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in addresses)

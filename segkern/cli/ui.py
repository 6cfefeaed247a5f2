# SPDX-License-Identifier: Apache-2.0
"""``segkern ui``: the playground."""

from __future__ import annotations

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
    host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="<int>", help="Port. 0 selects a free port.")] = 7860,
    device: Device = "auto",
    dtype: DType = "auto",
    config: Config = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Open the playground in a browser.

    The playground compares images with and without guidance. Press Ctrl-C to stop it. The page loads nothing from
    other servers and sends no usage data.
    """
    need_diffusers("gradio", "matplotlib", extra="ui")
    with refusing():
        torch_device = loading.find_device(device)
        torch_dtype = loading.find_dtype(dtype, torch_device)
        port = _free_port(host, port)
        from segkern.playground.models import Models

        models = Models(torch_device, torch_dtype)
        models.load(loading.find_model(model, config))
    from segkern.playground.page import Playground

    with tempfile.TemporaryDirectory(prefix="segkern-ui-") as folder:
        playground = Playground(models, model, config or "", Path(folder))
        address = playground.start(host, port)
        typer.echo(f"segkern ui: {address} (Ctrl-C ends it)")
        if show:
            typer.launch(address)
        _wait()
        playground.end()


def _wait() -> None:
    """Until Ctrl-C, or until the process is asked to end; also where a shell has told it to ignore Ctrl-C."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    over.wait()
    typer.echo("segkern ui: ended")


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        ValueError: when it cannot be listened on; the message quotes it.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
            return int(tried.getsockname()[1])
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"--port {port} of --host {host!r} cannot be used ({reason}); give another --port, or 0 for a free one"
        ) from None

# SPDX-License-Identifier: Apache-2.0
"""The web server of the page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from segkern.playground.style import STYLE

USER = "segkern"
_FONTS = ("system-ui", "sans-serif")  # installed fonts: the page downloads none
_FIXED_FONTS = ("ui-monospace", "monospace")


def serve(blocks: Any, folder: Path, host: str, port: int, password: str | None) -> str:
    """Serve a page in the background and return its address.

    Args:
        blocks: Page.
        folder: Folder with the files that the page shows.
        host: Address to listen on.
        port: Free port.
        password: Password of the user ``segkern``; None for no login.
    """
    with _no_proxy():
        _, address, _ = blocks.queue(api_open=False).launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            auth=None if password is None else (USER, password),
            allowed_paths=[str(folder)],
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            theme=_theme(),
            css=STYLE,
        )
    return str(address)


@contextmanager
def _no_proxy() -> Iterator[None]:
    """Bypass proxies: while it starts, gradio sends a request to its own server."""
    names = ("no_proxy", "NO_PROXY")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _theme() -> Any:
    theme = gr.themes.Default(font=_FONTS, font_mono=_FIXED_FONTS, spacing_size="sm", text_size="md")
    readable = {"body_text_color_subdued": "*neutral_500", "block_info_text_color": "*neutral_500"}
    return theme.set(**readable)

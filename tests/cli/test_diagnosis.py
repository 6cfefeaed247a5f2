# SPDX-License-Identifier: Apache-2.0
"""``segkern info --report`` prints a complete report even if parts of the machine are missing or broken."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from segkern.cli import diagnosis
from segkern.core import dispatch
from segkern.version import __version__
from tests.cli.cli_tools import done


def answers() -> dict[str, list[str]]:
    """Return the lines of the report by topic."""
    first, *lines, last = diagnosis.report().splitlines()
    assert (first, last) == ("```text", "```")
    topics: dict[str, list[str]] = {}
    for line in lines:
        topic, _, answer = line.partition(":")
        topics.setdefault(topic, []).append(answer.strip())
    return topics


def test_the_command_prints_the_whole_block() -> None:
    output = done("info", "--report").splitlines()
    assert output[0] == "```text"
    assert output[-1] == "```"
    assert len(output) > 20


def test_it_names_versions_machine_and_backends() -> None:
    report = answers()
    assert report["segkern"][0].startswith(f"{__version__}, checkout at commit ")
    assert report["python"][0].startswith(platform.python_version())
    assert report["torch"][0].startswith(f"{torch.__version__}, built with ")
    for package in diagnosis.PACKAGES:
        assert report[package] == [diagnosis.version_of(package)]
    assert re.search(r"cores, \d+ torch threads, .* GiB", report["cpu"][0])
    backend = dispatch.choose_backend(torch.device("cpu"), torch.float32, 64)
    assert any(": {} (reason: {})".format(*backend) in answer for answer in report["seg_attention"])
    assert not [answers for answers in report.values() if any("unknown" in answer for answer in answers)]


def test_torch_is_named_with_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of PyTorch's package does not contain the CUDA build."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+build")
    assert answers()["torch"][0].startswith("2.13.0+build, ")
    assert "2.13.0+build" in done("info")


def test_a_device_is_named_with_its_capability_memory_and_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = SimpleNamespace(name="NVIDIA X1", major=7, minor=5, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(dispatch, "_compute_capability", lambda device: (7, 5))
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    report = answers()
    assert report["device"] == ["cuda:0, NVIDIA X1, compute capability 7.5, 16 GiB"]
    assert report["driver"] == ["NVIDIA 580.1"]
    assert any("cuda:0" in answer and "need compute capability 8.0" in answer for answer in report["seg_attention"])


def test_what_is_broken_is_said_and_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise RuntimeError("no driver\nat all")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    report = answers()
    assert report["device"] == ["unknown: RuntimeError: no driver at all"]
    assert report["seg_attention"] == report["device"]
    assert report["torch"][0].startswith(torch.__version__)


def test_it_says_whether_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert answers()["C compiler"] == ["none (cc, gcc, clang); Triton on a GPU and torch.compile need one"]
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\necho gcc 99\n")
    compiler.chmod(0o755)
    assert answers()["C compiler"] == [f"{compiler}, gcc 99"]
    monkeypatch.setenv("CC", "icx")
    assert answers()["C compiler"][0].startswith("none (icx)")


def test_variables_that_matter_are_quoted_without_the_users_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/ada/.triton")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    (answer,) = answers()["environment"]
    assert "TRITON_CACHE_DIR=~/.triton" in answer
    assert "CUDA_VISIBLE_DEVICES=1" in answer
    assert "ada" not in answer
    assert "hush" not in answer

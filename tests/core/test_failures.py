# SPDX-License-Identifier: Apache-2.0
"""Triton is missing or cannot compile: ``auto`` warns once and uses PyTorch, ``triton`` raises the reason."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import segkern
from segkern.core import fallback

pytest.importorskip("triton", reason="kernels need triton")
from segkern.kernels import attention_mass
from tests.core.failure_tools import BROKEN, CALLS, GRID, NOT_BROKEN, SIGMA, as_on_a_gpu, failing, tensors

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with as_on_a_gpu():
        yield


@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
def test_auto_warns_once_and_pytorch_serves_all_later_calls(make: Callable[[], Exception]) -> None:
    inputs = tensors()
    for call in CALLS.values():
        expected = call(*inputs, backend="torch")
        with failing(make) as kernel:
            fallback.forget_failures()
            with pytest.warns(RuntimeWarning, match="using PyTorch for such calls from now on") as caught:
                assert torch.equal(call(*inputs), expected)
            assert len(caught) == 1
            assert type(make()).__name__ in str(caught[0].message)
            assert kernel.launches == 1
            for _ in range(3):  # no further warning or attempt
                assert torch.equal(call(*inputs), expected)
            assert kernel.launches == 1
        assert torch.equal(call(*inputs), expected)


@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
def test_an_explicit_choice_raises_the_reason_every_time(make: Callable[[], Exception]) -> None:
    inputs = tensors()
    for call in CALLS.values():
        with failing(make) as kernel, warnings.catch_warnings():
            for attempt in (1, 2):
                with pytest.raises(fallback.KernelFailure, match="could not be compiled or launched") as raised:
                    call(*inputs, backend="triton")
                assert type(raised.value.__cause__) is type(make())
                assert kernel.launches == attempt
        assert not fallback._REASONS  # does not affect auto


@pytest.mark.parametrize("make", NOT_BROKEN.values(), ids=NOT_BROKEN)
def test_errors_of_the_device_and_the_user_pass(make: Callable[[], BaseException]) -> None:
    inputs = tensors()
    for call in CALLS.values():
        with failing(make) as kernel:
            for _ in range(2):
                with pytest.raises(type(make())) as raised:
                    call(*inputs)
                assert not isinstance(raised.value, fallback.KernelFailure)
            assert kernel.launches == 2
        assert not fallback._REASONS


def test_only_what_failed_is_given_up() -> None:
    inputs, wide = tensors(), tensors(dim=16)
    with failing(BROKEN["out of resources"], attention_mass):
        with pytest.warns(RuntimeWarning, match="attention_mass"):
            CALLS["attention_mass"](*inputs)
        with pytest.raises(fallback.KernelFailure):
            CALLS["attention_mass"](*wide, backend="triton")
    with failing(BROKEN["out of resources"]) as kernel:
        for name, call in CALLS.items():
            before = kernel.launches
            if name == "attention_mass":
                call(*inputs)
                assert kernel.launches == before
            else:
                with pytest.raises(fallback.KernelFailure):
                    call(*inputs, backend="triton")
        before = kernel.launches
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            CALLS["attention_mass"](*wide)  # another head dimension uses another kernel
        assert kernel.launches == before + 1


@pytest.mark.parametrize("reason", ["no C compiler", "C compiler fails"])
def test_one_reason_is_told_once_for_all_kernels(reason: str) -> None:
    with failing(BROKEN[reason]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dim in (8, 16, 24):
            for call in CALLS.values():
                call(*tensors(dim=dim))
    assert len([warning for warning in caught if warning.category is RuntimeWarning]) == 1


def test_gradients_fall_back_and_an_explicit_choice_does_not() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    for call in CALLS.values():
        expected = torch.autograd.grad(call(q, k, v, backend="torch").float().sum(), q)[0]
        with failing(BROKEN["ptxas fails"]):
            fallback.forget_failures()
            with pytest.warns(RuntimeWarning):
                output = torch.autograd.grad(call(q, k, v).float().sum(), q)[0]
            torch.testing.assert_close(output, expected, rtol=2e-3, atol=2e-3)
            with pytest.raises(fallback.KernelFailure):
                call(q, k, v, backend="triton")


def test_a_compiled_graph_falls_back_where_it_runs() -> None:
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return segkern.seg_attention(q, k, segkern.gaussian_blur(v, GRID, SIGMA), GRID, SIGMA) * 2

    inputs = tensors()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    with failing(BROKEN["binary is refused"]) as kernel:
        with pytest.warns(RuntimeWarning, match="device kernel image is invalid"):
            output = compiled(*inputs)
        assert kernel.launches == 2
        assert torch.equal(compiled(*inputs), output)
        assert kernel.launches == 2
        assert torch.equal(step(*inputs), output)
    assert torch.equal(output, 2 * segkern.seg_attention(
        inputs[0], inputs[1], segkern.gaussian_blur(inputs[2], GRID, SIGMA, backend="torch"), GRID, SIGMA,
        backend="torch"))  # fmt: skip


def test_fake_tensors_try_no_kernel() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with failing(BROKEN["no driver"]) as kernel, FakeTensorMode():
        q = torch.empty(2, 2, 14, 8, dtype=torch.float16)
        assert segkern.seg_attention(q, q, q, GRID, SIGMA).shape == q.shape
    assert kernel.launches == 0
    assert not fallback._REASONS


def test_threads_that_fail_together_are_told_once() -> None:
    inputs, start, output = tensors(), threading.Barrier(8), []
    expected = CALLS["seg_attention"](*inputs, backend="torch")

    def work() -> None:
        start.wait()
        output.extend(CALLS["seg_attention"](*inputs) for _ in range(5))

    with failing(BROKEN["no C compiler"]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(output) == 40
    assert all(torch.equal(x, expected) for x in output)
    assert len(caught) == 1


WITHOUT_TRITON = """
import pathlib, sys
import torch, segkern
from segkern import Grid
from segkern.core import dispatch

q, k, v = torch.randn(3, 2, 2, 12, 8).unbind()
grid, sigma = Grid(3, 4), (1.5, float("inf"))
for number, (body, quoted) in enumerate([
    (None, "not installed"), ("raise ImportError('libtriton.so: no such file')", "libtriton.so"), ("1 / 0", "Zero")
]):
    [sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "triton"]
    if body is None:
        sys.modules["triton"] = None
    else:
        package = pathlib.Path(sys.argv[1]) / str(number) / "triton"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(body)
        sys.path.insert(0, str(package.parent))
    dispatch.triton_is_installed.cache_clear()
    dispatch.why_triton_is_broken.cache_clear()
    for backend in ("auto", "torch"):
        for result in (segkern.seg_attention(q, k, v, grid, sigma, backend=backend, return_lse=True)[0],
                       segkern.seg_attention(q, k, v, grid, (1.5, 2.0), query_stride=2, backend=backend),
                       segkern.gaussian_blur(q, grid, sigma, backend=backend),
                       segkern.attention_mass(q, k, backend=backend),
                       segkern.attention_energy(q, k, grid, sigma, backend=backend)):
            assert result.isfinite().all()
    try:
        segkern.seg_attention(q, k, v, grid, sigma, backend="triton")
    except ValueError as error:
        assert quoted in str(error), error
        print("refused")
"""


def test_without_triton_everything_else_works(tmp_path: Path) -> None:
    """Triton is not installed, lacks a native library, or raises an error of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", WITHOUT_TRITON, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.stdout.split() == ["refused"] * 3, ran.stdout + ran.stderr


def test_what_does_not_fail_is_launched() -> None:
    """Without a failure, kernels are launched, so the tests above are meaningful."""
    inputs = tensors()
    for call in CALLS.values():
        torch.testing.assert_close(call(*inputs), call(*inputs, backend="torch"), rtol=1e-2, atol=1e-2)
        with failing(BROKEN["no driver"]) as kernel, pytest.raises(fallback.KernelFailure):
            call(*inputs, backend="triton")
        assert kernel.launches == 1
    assert not fallback._REASONS

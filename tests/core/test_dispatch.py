# SPDX-License-Identifier: Apache-2.0
"""The predicate that rejects a backend also explains why."""

from __future__ import annotations

import pytest
import torch

import segkern
from segkern import Grid
from segkern.core import dispatch
from segkern.core.dispatch import choose_backend, why_not_triton

CPU = torch.device("cpu")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device of compute capability 9.0, as seen by the choice of the backend."""
    monkeypatch.setattr(dispatch, "triton_is_installed", lambda: True)
    monkeypatch.setattr(dispatch, "_compute_capability", lambda device: (9, 0))
    return torch.device("cuda", 0)


REFUSED = {
    "float64": ({"dtype": torch.float64}, "float64"),
    "integers": ({"dtype": torch.int32}, "int32"),
    "wide heads": ({"head_dim": 257}, "257"),
    "other value width": ({"value_dim": 32}, "value_dim 32"),
    "other device": ({"device": torch.device("mps")}, "'mps'"),
    "bfloat16 in the interpreter": ({"device": CPU, "dtype": torch.bfloat16}, "bfloat16"),
}


@pytest.mark.parametrize(("changes", "quoted"), REFUSED.values(), ids=REFUSED)
def test_a_refused_call_says_why_and_auto_takes_pytorch(
    changes: dict, quoted: str, hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    call = {"device": hopper, "dtype": torch.float16, "head_dim": 64, "value_dim": None} | changes
    reason = why_not_triton(**call)
    assert reason is not None
    assert quoted in reason
    assert choose_backend(**call) == ("torch", reason)
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call") as error:
        choose_backend(**call, backend="triton")
    assert reason in str(error.value)


def test_old_devices_are_refused(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_compute_capability", lambda device: (7, 5))
    if torch.version.hip is None:
        assert "cuda:0 has 7.5" in str(why_not_triton(hopper, torch.float16, 64))


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_is_installed", lambda: False)
    assert "pip install triton" in str(why_not_triton(torch.device("cuda", 0), torch.float16, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_auto_takes_the_kernels_on_a_gpu_when_there_is_something_to_blur(hopper: torch.device, dtype) -> None:
    assert choose_backend(hopper, dtype, 64) == ("triton", "fused kernels")
    assert choose_backend(hopper, dtype, 64, blurs=False)[0] == "torch"
    assert choose_backend(hopper, torch.float32, 64)[0] == "torch"
    assert choose_backend(hopper, torch.float32, 64, "triton")[0] == "triton"


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    assert choose_backend(CPU, torch.float32, 64) == ("torch", "Triton's interpreter is only for tests")


def test_explicit_choice_that_cannot_run_raises_from_the_public_function() -> None:
    x = torch.zeros(1, 1, 6, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="not float64"):
        segkern.seg_attention(x, x, x, Grid(2, 3), 1.0, backend="triton")
    with pytest.raises(ValueError, match="not float64"):
        segkern.gaussian_blur(x, Grid(2, 3), 1.0, backend="triton")

# SPDX-License-Identifier: Apache-2.0
"""Small pipelines for fault injection, and a snapshot of everything that guidance might leave behind on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import PAG, SAG, SEG, SLG, TPG, Guidance, guide
from segkern.integrations.diffusers.runtime.processor import GuidedProcessor
from tests.diffusers import transformer_cases, unet_cases
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.unet_image_cases import IMAGES

STEPS = 4  # steps of a run


@dataclass(frozen=True)
class Subject:
    """A pipeline for fault injection.

    Attributes:
        name: Name for test ids.
        make: Creates a pipeline with its own denoiser.
        run: Returns latents of a short run with classifier-free guidance.
        part: Name of the denoiser component.
        layers: Layers to guide.
        inside: A module of the denoiser that runs after these layers.
    """

    name: str
    make: Callable[[], Any]
    run: Callable[..., torch.Tensor]
    part: str
    layers: Any
    inside: str

    def build(self) -> Any:
        """Return a new pipeline with its own denoiser and scheduler."""
        kept = _kept(self)
        parts = {**kept.components, self.part: copy.deepcopy(self.denoiser(kept))}
        parts["scheduler"] = type(kept.scheduler).from_config(kept.scheduler.config)
        options = {"requires_safety_checker": False} if "safety_checker" in parts else {}
        pipe = type(kept)(**parts, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def beside(self, pipe: Any) -> Any:
        """Return another pipeline with the same denoiser and its own scheduler."""
        other = self.build()
        setattr(other, self.part, self.denoiser(pipe))
        return other

    def denoiser(self, pipe: Any) -> Any:
        return getattr(pipe, self.part)

    def seg(self, **values: Any) -> SEG:
        return SEG(**{"scale": 3.0, "sigma": 1.5, "layers": self.layers, **values})

    def guided(self, pipe: Any, *specs: Any) -> torch.Tensor:
        """Return latents of one run under guidance that is removed afterwards."""
        with guide(pipe, *(specs or (self.seg(),))):
            return self.run(pipe)


@lru_cache
def _kept(subject: Subject) -> Any:
    return subject.make()


def _unet(name: str, inside: str) -> Subject:
    case = IMAGES[name]

    def run(pipe: Any, **more: Any) -> torch.Tensor:
        return unet_cases.run(case, pipe, True, **{"num_inference_steps": STEPS, **more})

    return Subject(name, lambda: case.build(case), run, "unet", "mid", inside)


def _transformer(name: str, inside: str) -> Subject:
    model = MODELS[name]

    def run(pipe: Any, **more: Any) -> torch.Tensor:
        return transformer_cases.run(model, pipe, **{"num_inference_steps": STEPS, **more})

    layers = tuple(model.layers) if isinstance(model.layers, list) else model.layers
    return Subject(name, model.build, run, "transformer", layers, inside)


# Two UNets, a transformer whose batch has both halves, and two that are called once for each half.
ALL = (
    _unet("sdxl", "up_blocks.1"),
    _unet("sd1", "up_blocks.1"),
    _transformer("sd3", "norm_out"),
    _transformer("flux", "norm_out"),
    _transformer("qwen-image", "norm_out"),
)
SDXL, SD1, SD3, FLUX, QWEN = ALL


def every(*quick: Subject) -> list[Any]:
    """Return all subjects as parameters; those not named run only in ``make robustness``."""
    return [
        pytest.param(subject, marks=[pytest.mark.robustness] * (subject not in quick), id=subject.name)
        for subject in ALL
    ]


def kinds(subject: Subject) -> dict[str, tuple[Any, ...]]:
    """Return every kind of guidance that a subject supports besides its own classifier-free guidance, with options."""
    specs: dict[str, tuple[Any, ...]] = {
        "SEG": (subject.seg(),),
        "SEG, infinite": (subject.seg(sigma=float("inf")),),
        "SEG, reuse": (subject.seg(reuse=2),),
        "PAG": (PAG(layers=subject.layers),),
        "SLG, TPG": (SLG(1.0, subject.layers, 0.0, 1.0), TPG(1.0, subject.layers)),
    }
    if subject.part == "unet":
        specs |= {
            "SEG, strides": (subject.seg(query_stride=2, sigma=4.0),),
            "SAG": (SAG(),),
            "SEG, PAG, SAG": (subject.seg(), PAG(layers="u0"), SAG(reuse=2)),
        }
    return specs


class Picture:
    """A snapshot of the attributes of a pipeline's modules: identities, and contents of containers."""

    def __init__(self, pipe: Any) -> None:
        self.names = set(vars(pipe))
        self.modules = {name: (module, _attributes(module)) for name, module in _modules(pipe)}
        self.processors = {
            name: (processor, dict(vars(processor)))
            for name, module in _modules(pipe)
            if (processor := getattr(module, "processor", None)) is not None
        }

    def assert_same(self, pipe: Any) -> None:
        """Assert that no attribute was added, removed or replaced."""
        assert set(vars(pipe)) == self.names
        now = dict(_modules(pipe))
        assert now.keys() == self.modules.keys()
        for name, (module, attributes) in self.modules.items():
            assert now[name] is module, name
            assert "forward" not in vars(module), name
            present = _attributes(module)
            assert present.keys() == attributes.keys(), name
            for key, (value, inside) in attributes.items():
                assert present[key][0] is value, (name, key)
                assert _same(present[key][1], inside), (name, key)
        for name, (processor, attributes) in self.processors.items():
            assert now[name].processor is processor, name
            assert not isinstance(processor, GuidedProcessor), name
            assert vars(processor) == attributes, name


def _modules(pipe: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    for part, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            yield from component.named_modules(prefix=part)


def _attributes(module: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    attributes = {}
    for name, value in vars(module).items():
        simple = isinstance(value, (bool, int, float, str, tuple))
        changes = name == "_internal_dict"  # the configuration, to which saving adds the name
        inside = list(value.items()) if isinstance(value, Mapping) and not changes else None
        attributes[name] = (None, [(name, value)]) if simple else (None if changes else value, inside)
    return attributes


def _same(after: Any, before: Any) -> bool:
    if after is None or before is None:
        return after is before
    simple = (bool, int, float, str, tuple)
    pairs = zip(after, before, strict=False)
    equal = all(a == b and (x is y or (isinstance(x, simple) and x == y)) for (a, x), (b, y) in pairs)
    return len(after) == len(before) and equal


@contextmanager
def failing(module: torch.nn.Module, error: BaseException | type[BaseException], after: int = 0) -> Iterator[None]:
    """Make the module raise the error after this number of calls."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) > after:
            raise error

    handle = module.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def left_as_it_was(subject: Subject, *specs: Any) -> Iterator[tuple[Any, Guidance]]:
    """Yield a guided pipeline, then assert that it is unchanged and its latents equal those of an unguided one."""
    pipe = subject.build()
    plain = subject.run(pipe)
    picture = Picture(pipe)
    with guide(pipe, *(specs or (subject.seg(),))) as guidance:
        yield pipe, guidance
    picture.assert_same(pipe)
    assert torch.equal(subject.run(pipe), plain)


def stand_ins(subject: Subject, pipe: Any) -> int:
    """Return how many layers have a processor of segkern."""
    modules = subject.denoiser(pipe).modules()
    return sum(isinstance(getattr(module, "processor", None), GuidedProcessor) for module in modules)

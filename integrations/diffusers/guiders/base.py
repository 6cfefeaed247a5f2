# SPDX-License-Identifier: Apache-2.0
"""Base class of the guiders: classifier-free guidance and one other guidance spec, with a saved configuration."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
from collections.abc import Container, Mapping
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg
from torch import nn

from segkern.integrations.diffusers.guiders.calls import GuiderCalls, Step
from segkern.integrations.diffusers.runtime.branches import shifted
from segkern.integrations.diffusers.runtime.origins import Trust, check_trust
from segkern.integrations.diffusers.runtime.report import Report
from segkern.integrations.diffusers.runtime.steps import timestep_value
from segkern.integrations.specs import PAG, SAG
from segkern.integrations.specs.base import Spec
from segkern.integrations.specs.schedules import is_number

_INFINITY = "inf"  # JSON has no infinite numbers


class SpecGuider(ClassifierFreeGuidance):
    """Classifier-free guidance combined with one guidance spec.

    A subclass sets ``spec_class``. It accepts the arguments of ``SpecGuider`` and the fields of that spec.

    Attributes:
        spec: The guidance spec.
        scheduler: The pipeline's scheduler. Needed by SAG, and by specs that depend on the step if the scheduler calls
            the denoiser twice in a step (Heun). :meth:`new` and copies keep it; saved configurations do not.
        trust: Classes and functions of other packages in the denoiser that process each sample of a batch
            independently, as for :func:`~segkern.integrations.diffusers.guide`. :meth:`new` and copies keep it; saved
            configurations do not.
    """

    spec_class: ClassVar[type[Spec]]

    def __init_subclass__(cls) -> None:
        """Add the spec's fields to the signature of ``__init__``, which diffusers reads to load a configuration."""
        super().__init_subclass__()
        if "spec_class" not in vars(cls) or "__init__" in vars(cls):
            return

        def __init__(self: SpecGuider, spec: Spec | None = None, **arguments: Any) -> None:
            SpecGuider.__init__(self, spec, **arguments)

        *own, _ = inspect.signature(SpecGuider.__init__).parameters.values()
        of_spec = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in inspect.signature(cls.spec_class).parameters
        ]
        __init__.__signature__ = inspect.Signature([*own, *of_spec])  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[method-assign]

    def __init__(
        self,
        spec: Spec | None = None,
        *,
        scheduler: Any = None,
        trust: Trust = (),
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        enabled: bool = True,
        **of_spec: Any,
    ) -> None:
        owner = type(self).__name__
        self.spec = self._spec(spec, of_spec)
        for name, value in (("guidance_scale", guidance_scale), ("guidance_rescale", guidance_rescale)):
            if not (is_number(value) and math.isfinite(value)):
                raise ValueError(f"{owner}.{name} must be a finite number, got {value!r}")
        ends = guidance_start, guidance_stop
        if not (all(map(is_number, ends)) and 0.0 <= guidance_start < guidance_stop <= 1.0):
            raise ValueError(
                f"{owner}.guidance_start and {owner}.guidance_stop must be fractions of the run with 0 <= start < stop "
                f"<= 1, got {guidance_start!r} and {guidance_stop!r}"
            )
        own: dict[str, Any] = {"use_original_formulation": use_original_formulation, "enabled": enabled}
        own |= {"guidance_scale": float(guidance_scale), "guidance_rescale": float(guidance_rescale)}
        super().__init__(start=guidance_start, stop=guidance_stop, **own)
        self.register_to_config(
            **own, guidance_start=guidance_start, guidance_stop=guidance_stop, **self.spec.to_dict()
        )
        self.scheduler = scheduler
        self.trust: Trust = check_trust(trust)
        self._inputs: list[Any] = []  # inputs of the step's denoiser calls
        self._fraction = 0.0
        self._last_step: int | None = None
        self._now = Step(0, self.spec.strength(0.0))
        self._calls: GuiderCalls | None = None

    def _spec(self, spec: Spec | None, values: Mapping[str, Any]) -> Spec:
        """Return the given spec, or create one from the values."""
        owner = type(self).__name__
        known = inspect.signature(self.spec_class).parameters
        for name in values:
            if name not in known:
                raise TypeError(f"{owner} got an unexpected argument {name!r}; its spec accepts {', '.join(known)}")
        given = {name: value for name, value in values.items() if value is not None}
        if spec is None:
            return self.spec_class(**{**given, **({"sigma": _numbers(given["sigma"])} if "sigma" in given else {})})
        if type(spec) is not self.spec_class:
            raise ValueError(f"{owner} needs a {self.spec_class.__name__}(...) spec or its arguments, got {spec!r}")
        if given:
            raise ValueError(
                f"{owner} needs either a spec or its arguments, got both {spec!r} and {', '.join(sorted(given))}"
            )
        return spec

    def new(self, **changes: Any) -> Any:
        """Return another guider with the same arguments except for the changed ones.

        Raises:
            TypeError: If there is no argument of that name.
            ValueError: If a value is invalid.
        """
        dropped = set(self.spec.to_dict()) if "spec" in changes else ()
        return type(self)(**{"scheduler": self.scheduler, "trust": self.trust, **self._kept(dropped), **changes})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a new guider without state, so that a copied pipeline has its own guider."""
        return _made(type(self), self._kept(), self._enabled, copy.deepcopy(self.scheduler, memo), self.trust)

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (type(self), self._kept(), self._enabled, self.scheduler, self.trust)

    def _kept(self, dropped: Container[str] = ()) -> dict[str, Any]:
        """Return the arguments of the constructor, except for some."""
        return {name: value for name, value in self.config.items() if not name.startswith("_") and name not in dropped}

    def to_json_string(self) -> str:
        """Return the configuration as JSON. An infinite sigma becomes ``"inf"``."""
        config = {**self.config, "_class_name": type(self).__name__, "_diffusers_version": diffusers.__version__}
        return json.dumps(_plain(config), indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any) -> None:
        """Save the configuration, as ``save_pretrained`` does.

        Raises:
            ValueError: If the schedule is a function.
        """
        if callable(self.spec.schedule):
            raise ValueError(f"{type(self).__name__} cannot save a function as schedule, got {self.spec.schedule!r}")
        super().save_config(save_directory, push_to_hub=push_to_hub, **options)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step. If the scheduler calls the denoiser twice in a step (Heun), both calls count as that step."""
        super().set_state(step, num_inference_steps, timestep)
        first = step == 0 or self._last_step is None or step < self._last_step
        self._last_step = step
        if step >= num_inference_steps and self.scheduler is None and self.spec.depends_on_step:
            owner = type(self).__name__
            raise RuntimeError(
                f"step {step} of {num_inference_steps}: the scheduler calls the denoiser more than once in a step; "
                f"pass the scheduler so that {owner} can count steps: {owner}(..., scheduler=pipe.scheduler)"
            )
        order = getattr(self.scheduler, "order", 1)
        self._fraction = (step // order) / num_inference_steps
        at = timestep_value(timestep)[0] if isinstance(self.spec, PAG) and self.spec.adaptive_scale else None
        self._inputs = []
        self._now = Step(step // order, self.spec.strength(self._fraction, at), timestep)
        if self._calls is not None:
            self._calls.new_step(first)

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the inputs of each denoiser call of the step."""
        self._inputs = super().prepare_inputs(*args, **kwargs)
        return self._inputs

    def prepare_inputs_from_block_state(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the inputs of each denoiser call of the step."""
        self._inputs = super().prepare_inputs_from_block_state(*args, **kwargs)
        return self._inputs

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Prepare the denoiser for a call in which guidance may act.

        Raises:
            ValueError: If the denoiser or a layer is not supported. The message quotes it.
        """
        super().prepare_models(denoiser)
        if self._calls is None or not self._calls.is_of(denoiser, self.trust):
            if self._calls is not None:
                self._calls.release()
            self._calls = GuiderCalls(denoiser, self.spec, self.trust)
        # SAG degrades the unconditional prediction, which is the second call if there is one.
        call = 2 if isinstance(self.spec, SAG) and self._is_cfg_enabled() else 1
        acts = self._enabled and self._count_prepared == call
        inputs = self._inputs[call - 1].as_dict() if len(self._inputs) >= call else {}
        self._calls.prepare(self._now if acts else Step(), self.scheduler, inputs)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Restore the denoiser after a call."""
        super().cleanup_models(denoiser)
        if self._calls is not None:
            self._calls.release()

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> Any:
        """Return the guided prediction of the step, and the predictions without guidance."""
        calls, cfg = self._calls, self._is_cfg_enabled()
        difference: torch.Tensor | None = None
        if calls is not None:
            pred_cond, difference = calls.difference(pred_cond)
        if difference is None and self._enabled and self._now.strength:
            raise RuntimeError(
                f"{type(self).__name__} was not prepared when the denoiser was called: call prepare_models before each "
                f"denoiser call and cleanup_models after it"
            )
        pred = pred_cond
        if cfg:
            assert pred_uncond is not None
            pred = pred_cond if self.use_original_formulation else pred_uncond
            pred = pred + self.guidance_scale * (pred_cond - pred_uncond)
        if difference is not None:
            pred = shifted(pred, self._now.strength * difference)
        if cfg and self.guidance_rescale > 0.0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        self._num_inference_steps = None  # between steps, queries refer to the whole run
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _is_cfg_enabled(self) -> bool:
        """Return True if classifier-free guidance is active in the current step or, between steps, in any step."""
        steps: int | None = self._num_inference_steps
        if steps is not None and not self._start <= self._fraction < self._stop:
            return False
        off = 0.0 if self.use_original_formulation else 1.0
        return bool(self._enabled) and not math.isclose(self.guidance_scale, off)

    def report(self) -> Report:
        """Return the report so far for the most recent denoiser, and warn if guidance had no effect.

        Raises:
            RuntimeError: If no run has started.
        """
        if self._calls is None:
            raise RuntimeError(f"this {type(self).__name__} has nothing to report: no pipeline has run with it")
        report = self._calls.recorder.report()
        self._calls.recorder.warn(report, stacklevel=3)
        return report


def _made(
    kind: type[SpecGuider], given: Mapping[str, Any], enabled: bool, scheduler: Any, trust: Trust = ()
) -> SpecGuider:
    """Return a guider with these arguments and attributes."""
    made: SpecGuider = kind(**given)
    made.scheduler, made.trust = scheduler, trust
    made._enabled = enabled
    return made


def _numbers(sigma: Any) -> Any:
    """Restore a sigma from a saved configuration."""
    if isinstance(sigma, str) and sigma == _INFINITY:
        return math.inf
    if isinstance(sigma, Mapping):
        return {name: _numbers(item) for name, item in sigma.items()}
    return [_numbers(item) for item in sigma] if isinstance(sigma, (list, tuple)) else sigma


def _plain(value: Any) -> Any:
    """Convert a configuration value to JSON types."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return _INFINITY
    return getattr(value, "__qualname__", repr(value)) if callable(value) else value

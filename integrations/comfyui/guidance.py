# SPDX-License-Identifier: Apache-2.0
"""Guidance on a model: ComfyUI hooks that compute a perturbed prediction and add the guidance to the prediction.

Guidance adds ``scale * (c - p)``, where ``p`` is the conditional prediction ``c`` with perturbed attention, skipped
blocks or shuffled tokens. Up to the first changed layer, the two forward passes are equal. Activations are recorded at
this layer in the model's own forward pass, and the perturbed forward pass begins with them. Hooks of other nodes are
still called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from segkern.integrations.specs import PAG, SEG, SLG, TPG
from segkern.integrations.specs.base import AttentionSpec
from segkern.integrations.specs.layer_names import LayerInfo, select_layers

from .blocks import BlockChange
from .perturbation import Perturbation
from .recording import Recording
from .report import GuidanceReport, distance
from .transformers import FAMILIES, Transformer
from .unet import UNet

_KEY = "segkern"
_CALC = "sampler_calc_cond_batch_function"
_PRE_CFG = "sampler_pre_cfg_function"

Arguments = dict[str, Any]


@dataclass
class _Evaluation:
    """The current evaluation of the model, shared by the guidance of a model and its clones.

    Attributes:
        recording: Recording of the model's own forward pass.
        conditional: The latents, and the conditional prediction before other nodes change it.
    """

    recording: Recording | None = None
    conditional: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True, eq=False)
class ModelGuidance:
    """One guidance method on one model.

    Attributes:
        spec: The guidance spec. ``start`` and ``stop`` are ComfyUI percents.
        model: The layers of the model.
        layers: The perturbed layers, in execution order.
        rescale: How far to rescale the result to the standard deviation of the conditional prediction.
        evaluation: The current evaluation of the model.
        report: Report of the effect.
    """

    spec: SEG | PAG | SLG | TPG
    model: UNet | Transformer
    layers: Sequence[LayerInfo]
    rescale: float
    evaluation: _Evaluation
    report: GuidanceReport

    def acts(self, arguments: Arguments) -> bool:
        """Return True if guidance is active in an evaluation.

        Percents refer to the current noise schedule, which later nodes may change.
        """
        spec = self.spec
        if spec.scale == 0.0 or (isinstance(spec, AttentionSpec) and not spec.perturbs()):
            return False
        if spec.start == 0.0 and spec.stop == 1.0:
            return True  # reading the noise level would synchronise with the device
        sigma, schedule = float(arguments["sigma"].max()), arguments["model"].model_sampling
        begun = spec.start == 0.0 or sigma <= schedule.percent_to_sigma(spec.start)
        return begun and (spec.stop == 1.0 or sigma > schedule.percent_to_sigma(spec.stop))

    def __call__(self, arguments: Arguments) -> torch.Tensor:
        """Return the guided prediction (``sampler_post_cfg_function``)."""
        denoised = arguments["denoised"]
        self.report.evaluations += 1
        if not self.acts(arguments):
            return denoised
        conditional, kept = arguments["cond_denoised"], self.evaluation.conditional
        if kept is not None and kept[0] is arguments["input"]:
            conditional = kept[1]
        guided = denoised + self.spec.scale * (conditional - self._perturbed(arguments))
        if self.rescale:
            guided = guided * (1.0 - self.rescale + self.rescale * _spread(conditional) / _spread(guided))
        self.report.prediction.append(distance(guided, denoised))
        return guided

    def _perturbed(self, arguments: Arguments) -> torch.Tensor:
        """Return the conditional prediction with perturbed attention or changed blocks."""
        if arguments["cond"] is None:
            raise ValueError(
                "guidance needs the positive conditioning, but this guider does not pass it to post-CFG functions; use "
                "another guider, such as CFGGuider"
            )
        x, recording = arguments["input"], self.evaluation.recording
        options = create_model_options_clone(arguments["model_options"])
        transformer_options = options.setdefault("transformer_options", {})
        _refuse_nodes(transformer_options, self.model, self.spec)
        layers, perturbation = self._perturb(transformer_options)
        replay = None
        if recording is not None and recording.x is x:
            replay = self.model.replay(transformer_options, recording, self.layers)
        forwards = 0

        def count(executor: Callable[..., Any], *given: Any, **keywords: Any) -> Any:
            nonlocal forwards
            forwards += 1
            return executor(*given, **keywords)

        add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, count, transformer_options)
        (perturbed,) = comfy.samplers.calc_cond_batch(
            arguments["model"], [arguments["cond"]], x, arguments["sigma"], options
        )
        missing = [layer.module for layer in layers if layer.module not in perturbation.computed]
        if forwards and missing:
            what = "the attention of" if isinstance(self.spec, AttentionSpec) else "the blocks"
            raise RuntimeError(
                f"guidance could not reach {what} {', '.join(missing)}: another node replaces or compiles "
                f"it (TorchCompileModel, TensorRT, DeepCache) or skips the block; remove that node or choose other "
                f"layers"
            )
        if replay is None:
            self.report.full[self.model.why_not_shared or _why_not_recorded(arguments["model_options"])] += 1
        elif replay.full is not None:
            self.report.full[replay.full] += 1
        return perturbed

    def _perturb(self, options: Arguments) -> tuple[Sequence[LayerInfo], Perturbation | BlockChange]:
        """Change ``transformer_options`` for a perturbed forward pass, and return the layers that it changes."""
        spec = self.spec
        if isinstance(spec, AttentionSpec):
            perturbation = Perturbation(_sigma(spec), self.report)
            self.model.perturb(options, self.layers, perturbation)
            return self.layers, perturbation
        change = BlockChange(spec, self.report.evaluations - 1, self.report)
        names = spec.chosen(change.evaluation, [layer.name for layer in self.layers])
        layers = [layer for layer in self.layers if layer.name in names]
        self.model.change_blocks(options, layers, change)
        return layers, change


class RecordingCalc:
    """Computes the model's own predictions and records the activations that perturbed forward passes need."""

    def __init__(self, before: Callable[[Arguments], Any] | None) -> None:
        self.before = before

    def __call__(self, arguments: Arguments) -> Any:
        options = arguments["model_options"]
        guidances = [g for g in guidances_of(options) if g.acts(arguments) and not g.model.why_not_shared]
        if guidances and "multigpu_clones" not in options:
            evaluation, model = guidances[0].evaluation, guidances[0].model
            evaluation.recording = Recording(arguments["input"])
            options = create_model_options_clone(options)
            entries = [guidance.layers for guidance in guidances]
            model.record(options.setdefault("transformer_options", {}), evaluation.recording, entries)
        if self.before is not None:
            return self.before({**arguments, "model_options": options})
        given = (arguments[name] for name in ("model", "conds", "input", "sigma"))
        return comfy.samplers.calc_cond_batch(*given, options)


def _keep_conditional(arguments: Arguments) -> Any:
    """Keep the conditional prediction, because nodes such as APG change it (``sampler_pre_cfg_function``)."""
    for guidance in guidances_of(arguments["model_options"])[:1]:  # all share one evaluation
        guidance.evaluation.conditional = arguments["input"], arguments["conds_out"][0].clone()
    return arguments["conds_out"]


def _begin_reports(executor: Any, *arguments: Any, **keywords: Any) -> Any:
    """Clear the reports at the start of every sampler run (``OUTER_SAMPLE``)."""
    for guidance in guidances_of(executor.class_obj.model_options):
        guidance.report.clear()
    return executor(*arguments, **keywords)


def _release_activations(executor: Any, *arguments: Any, **keywords: Any) -> Any:
    """Release activations after an evaluation of the model, also after an exception (``PREDICT_NOISE``).

    Raises:
        RuntimeError: If the guider never called a guidance function.
    """
    guidances = guidances_of(executor.class_obj.model_options)
    try:
        prediction = executor(*arguments, **keywords)
    finally:
        for guidance in guidances:
            guidance.evaluation.recording = guidance.evaluation.conditional = None
    if any(guidance.report.evaluations == 0 for guidance in guidances):
        raise RuntimeError(
            "guidance was not applied: this guider does not call post-CFG functions (for example, the Dual Model "
            "Guider at CFG 1); use another guider, such as CFGGuider, or another CFG value"
        )
    return prediction


def guidances_of(model_options: Arguments) -> list[ModelGuidance]:
    """Return the guidance functions of a model, in the order of the nodes."""
    return [hook for hook in model_options.get("sampler_post_cfg_function", []) if isinstance(hook, ModelGuidance)]


def add_guidance(model: Any, spec: SEG | PAG | SLG | TPG, layers: str, rescale: float = 0.0) -> Any:
    """Return a clone of a model with one more guidance method.

    Args:
        model: A ``ModelPatcher``.
        spec: The guidance spec. Its ``layers`` are ignored.
        layers: Layer names separated by commas, as for :func:`select_layers`. Empty for the model's default.
        rescale: Rescale factor from 0 to 1.

    Raises:
        ValueError: If the model, a layer or the sigma is not supported.
    """
    described = describe(model.get_model_object("diffusion_model"))
    if isinstance(spec, AttentionSpec):
        _sigma(spec)
    elif (reason := described.why_unchangeable(spec)) is not None:
        raise ValueError(f"{type(spec).__name__} does not support this model: {reason}; use SEG or PAG")
    names = [name.strip() for name in layers.split(",") if name.strip()]
    if not names:
        default = described.default_for(spec)
        if default is None:
            raise ValueError(
                f"there is no default layer for this model; name one or more of "
                f"{', '.join(layer.module for layer in described.layers)}"
            )
        names = [default]
    chosen = select_layers(described.layers, names, "the node's help page explains them")
    patched = model.clone()
    before = guidances_of(patched.model_options)
    evaluation = before[0].evaluation if before else _Evaluation()
    report = GuidanceReport(spec, tuple(layer.module for layer in chosen), described.skipped(chosen))
    patched.set_model_sampler_post_cfg_function(ModelGuidance(spec, described, chosen, rescale, evaluation, report))
    calc = patched.model_options.get(_CALC)
    if not isinstance(calc, RecordingCalc):
        patched.set_model_sampler_calc_cond_batch_function(RecordingCalc(calc))
    others = [hook for hook in patched.model_options.get(_PRE_CFG, []) if hook is not _keep_conditional]
    patched.model_options[_PRE_CFG] = [_keep_conditional, *others]
    for place, wrapper in ((WrappersMP.OUTER_SAMPLE, _begin_reports), (WrappersMP.PREDICT_NOISE, _release_activations)):
        patched.remove_wrappers_with_key(place, _KEY)
        patched.add_wrapper_with_key(place, _KEY, wrapper)
    return patched


def _sigma(spec: SEG | PAG) -> float | None:
    """Return the sigma of a blur; None for PAG.

    Raises:
        ValueError: If there is a sigma per image, head or layer.
    """
    if isinstance(spec, PAG):
        return None
    if not isinstance(spec.sigma, (int, float)):
        raise ValueError(f"guidance in ComfyUI needs one sigma for all images, heads and layers, got {spec.sigma!r}")
    return float(spec.sigma)


def describe(model: torch.nn.Module) -> UNet | Transformer:
    """Return the layers of a denoiser.

    Raises:
        ValueError: If the denoiser is not supported.
    """
    if type(model) in FAMILIES:
        return Transformer(model)
    if type(model) is UNetModel:
        return UNet(model)
    known = ["Stable Diffusion 1, 2 and XL", *(family.users for family in FAMILIES.values())]
    raise ValueError(f"guidance does not support {type(model).__name__}; supported are {', '.join(known)}")


def _refuse_nodes(transformer_options: Arguments, model: UNet | Transformer, spec: SEG | PAG | SLG | TPG) -> None:
    """Raise a ValueError for nodes that change the perturbed and the conditional prediction in different ways."""
    wrappers = transformer_options.get("wrappers", {})
    compiled = "torch.compile" in wrappers.get(WrappersMP.APPLY_MODEL, {})
    if compiled and (isinstance(model, Transformer) or not isinstance(spec, AttentionSpec)):
        raise ValueError(
            "guidance does not work with TorchCompileModel on a transformer, and TPG does not work with it on any "
            "model, because changes to one forward pass would be used in others; remove that node (Stable Diffusion 1, "
            "2 and XL may be compiled with SEG and PAG)"
        )
    if "easycache" in wrappers.get(WrappersMP.DIFFUSION_MODEL, {}):
        raise ValueError(
            "guidance does not work with EasyCache, which would mistake the perturbed prediction for the model's own "
            "and compare new predictions with old ones; use LazyCache, which keeps the guided prediction"
        )
    for patch in transformer_options.get("patches", {}).get("attn1_output_patch", []):
        if getattr(patch, "__qualname__", "").startswith("NAGuidance."):
            raise ValueError(
                "guidance does not work with Normalized Attention Guidance, which mixes the positive and the negative "
                "prediction inside attention, and there is no perturbed negative prediction; remove one of the "
                "two nodes"
            )


def _why_not_recorded(model_options: Arguments) -> str:
    if "multigpu_clones" in model_options:
        return "conditionings are computed on several devices"
    return "the guider or another node computes the model's predictions itself"


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of each sample."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)

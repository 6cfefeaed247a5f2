# SPDX-License-Identifier: Apache-2.0
"""ComfyUI nodes for guidance by perturbed self-attention."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

from segkern.integrations.specs import PAG, SEG, SLG, TPG

from .guidance import add_guidance, guidances_of

_CATEGORY = "model/patch/segkern"
_LAYERS = (
    "Self-attention layers to perturb, separated by commas. Empty: the model's default, which is mid for Stable "
    "Diffusion 1, 2 and XL. UNets: down, mid, up; a transformer such as input.7, middle.0 or output.0; one of its "
    "blocks such as middle.0.3; d2.2-9 is blocks 2 to 9 of the third transformer in down, and u0.4 is block 4 of the "
    "first transformer in up. Flux, SD3, Wan and other transformers: block numbers such as 7-9. Unknown names cause an "
    "error that lists the valid names."
)


_SKIPPED_BLOCKS = (
    "Blocks to skip, separated by commas: block numbers such as 7-9. Empty: 7-9 for Stable Diffusion 3; other models "
    "have no default. Unknown names cause an error that lists the valid names."
)
_SHUFFLED_BLOCKS = (
    "Transformer blocks before which the image tokens are shuffled, with the names of the self-attention layers in "
    "them, separated by commas. Empty: d6-23 for Stable Diffusion XL, mid for other UNets, and 7-9 for Stable "
    "Diffusion 3; other models have no default. Unknown names cause an error that lists the valid names."
)


def _float(name: str, default: float, lowest: float, highest: float, step: float, tooltip: str) -> Any:
    return io.Float.Input(name, default=default, min=lowest, max=highest, step=step, round=False, tooltip=tooltip)


def _scale(name: str, default: float) -> Any:
    return _float(
        name,
        default,
        -100.0,
        100.0,
        0.1,
        "Guidance scale: how far the prediction moves away from the perturbed prediction. Added to CFG, "
        f"which is unchanged. 0 turns guidance off and costs nothing. Start with {default:g} and CFG 1 to 5; reduce it "
        "if colours get too strong.",
    )


def _blur(name: str) -> Any:
    sigma = _float(
        "sigma",
        10.0,
        0.0,
        10000.0,
        0.5,
        "Standard deviation of the blur, in tokens of the layer. Small values have little effect. Start with 10, which "
        "the authors of the method use for the 32 x 32 tokens of Stable Diffusion XL's mid layers.",
    )
    return io.DynamicCombo.Input(
        name,
        options=[io.DynamicCombo.Option("infinite", []), io.DynamicCombo.Option("finite", [sigma])],
        tooltip="How much to blur the queries. infinite replaces every query by the mean query: the strongest and "
        "cheapest blur.",
    )


def _common(start: float = 0.0, end: float = 1.0, layers: str = _LAYERS, placeholder: str = "mid") -> list[Any]:
    return [
        io.String.Input("layers", default="", tooltip=layers, placeholder=placeholder),
        _float("start_percent", start, 0.0, 1.0, 0.01, "Where guidance starts during sampling; 0 is the start."),
        _float("end_percent", end, 0.0, 1.0, 0.01, "Where guidance stops during sampling; 1 is the end."),
        _float(
            "rescale",
            0.0,
            0.0,
            1.0,
            0.05,
            "Restores the contrast of the conditional prediction: 0 not at all, 1 fully. Increase it if images get too "
            "much contrast.",
        ),
    ]


def _sigma(blur: dict[str, Any]) -> float:
    return math.inf if blur["blur"] == "infinite" else float(blur["sigma"])


def _model() -> Any:
    return io.Model.Input("model", tooltip="Model to guide. It is not changed; the output is a guided copy.")


class SmoothedEnergyGuidance(io.ComfyNode):
    """Adds Smoothed Energy Guidance to a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SmoothedEnergyGuidanceSegkern",
            display_name="Smoothed Energy Guidance (SEG)",
            category=_CATEGORY,
            description="Moves the image away from an extra prediction with blurred self-attention. Works with or "
            "without a prompt and CFG, and needs no training. With SDXL's mid layers and CFG, a step costs about a "
            "third more.",
            search_aliases=["SEG", "guidance", "attention", "segkern"],
            inputs=[_model(), _scale("scale", 3.0), _blur("blur"), *_common()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        scale: float,
        blur: dict[str, Any],
        layers: str,
        start_percent: float,
        end_percent: float,
        rescale: float,
    ) -> io.NodeOutput:
        spec = SEG(scale=scale, sigma=_sigma(blur), start=start_percent, stop=end_percent)
        return io.NodeOutput(add_guidance(model, spec, layers, rescale))


class PerturbedAttentionGuidance(io.ComfyNode):
    """Adds Perturbed Attention Guidance to a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerturbedAttentionGuidanceSegkern",
            display_name="Perturbed Attention Guidance (PAG, segkern)",
            category=_CATEGORY,
            description="Like Smoothed Energy Guidance, but in the perturbed layers every image token attends only to "
            "itself.",
            search_aliases=["PAG", "guidance", "attention", "segkern"],
            inputs=[_model(), _scale("scale", 2.0), *_common()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, scale: float, layers: str, start_percent: float, end_percent: float, rescale: float
    ) -> io.NodeOutput:
        spec = PAG(scale=scale, start=start_percent, stop=end_percent)
        return io.NodeOutput(add_guidance(model, spec, layers, rescale))


class CombinedGuidance(io.ComfyNode):
    """Adds both guidance methods to a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CombinedGuidanceSegkern",
            display_name="Combined Guidance (segkern)",
            category=_CATEGORY,
            description="Smoothed Energy Guidance and Perturbed Attention Guidance together. Each has its own "
            "perturbed forward pass that begins at its first layer. Equivalent to one node after the other.",
            search_aliases=["SEG + PAG", "PAG + SEG", "segkern"],
            inputs=[
                _model(),
                _scale("seg_scale", 2.0),
                _blur("blur"),
                _scale("pag_scale", 1.0),
                *_common(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seg_scale: float,
        blur: dict[str, Any],
        pag_scale: float,
        layers: str,
        start_percent: float,
        end_percent: float,
        rescale: float,
    ) -> io.NodeOutput:
        part: dict[str, Any] = {"start": start_percent, "stop": end_percent}
        model = add_guidance(model, SEG(scale=seg_scale, sigma=_sigma(blur), **part), layers)
        return io.NodeOutput(add_guidance(model, PAG(scale=pag_scale, **part), layers, rescale))


class SkipLayerGuidance(io.ComfyNode):
    """Adds skip-layer guidance to a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkipLayerGuidanceSegkern",
            display_name="Skip Layer Guidance (SLG, segkern)",
            category=_CATEGORY,
            description="Moves the image away from an extra prediction without some transformer blocks. For "
            "transformers such as Stable Diffusion 3 and Flux. Like SkipLayerGuidanceDiT, but the extra forward pass "
            "begins at the first skipped block.",
            search_aliases=["SLG", "skip layer", "guidance", "segkern"],
            inputs=[_model(), _scale("scale", 2.8), *_common(0.01, 0.2, _SKIPPED_BLOCKS, "7-9")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, scale: float, layers: str, start_percent: float, end_percent: float, rescale: float
    ) -> io.NodeOutput:
        spec = SLG(scale=scale, start=start_percent, stop=end_percent)
        return io.NodeOutput(add_guidance(model, spec, layers, rescale))


class TokenPerturbationGuidance(io.ComfyNode):
    """Adds token perturbation guidance to a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenPerturbationGuidanceSegkern",
            display_name="Token Perturbation Guidance (TPG, segkern)",
            category=_CATEGORY,
            description="Moves the image away from an extra prediction whose image tokens are shuffled before some "
            "transformer blocks. Works with or without a prompt and CFG.",
            search_aliases=["TPG", "guidance", "segkern"],
            inputs=[
                _model(),
                _scale("scale", 3.0),
                *_common(layers=_SHUFFLED_BLOCKS),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,
                    tooltip="Seed of the orders of the tokens. Each step and block has its own order.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        scale: float,
        layers: str,
        start_percent: float,
        end_percent: float,
        rescale: float,
        seed: int,
    ) -> io.NodeOutput:
        spec = TPG(scale=scale, start=start_percent, stop=end_percent, seed=seed)
        return io.NodeOutput(add_guidance(model, spec, layers, rescale))


class GuidanceInfo(io.ComfyNode):
    """Reports the effect of guidance after sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GuidanceInfoSegkern",
            display_name="Guidance Info (segkern)",
            category=_CATEGORY,
            description="Shows how often guidance was active, how far it moved the prediction and each layer's "
            "attention, and how much it shared with the model's own forward pass. Connect the guided model and the "
            "sampler's latent, so that the node runs after the sampler.",
            search_aliases=["report", "segkern"],
            inputs=[
                io.Model.Input("model", tooltip="Guided model, as used by the sampler."),
                io.Latent.Input("latent", tooltip="Output of the sampler. It is passed through unchanged."),
            ],
            outputs=[io.Latent.Output(), io.String.Output(display_name="info")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, latent: dict[str, Any]) -> io.NodeOutput:
        reports = [str(guidance.report) for guidance in guidances_of(model.model_options)]
        text = "\n\n".join(reports) or "This model has no segkern guidance: connect the output of a segkern node."
        return io.NodeOutput(latent, text, ui=ui.PreviewText(text))


class SegkernExtension(ComfyExtension):
    """The segkern node pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes of the pack."""
        return [
            SmoothedEnergyGuidance,
            PerturbedAttentionGuidance,
            SkipLayerGuidance,
            TokenPerturbationGuidance,
            CombinedGuidance,
            GuidanceInfo,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension. ComfyUI calls this when it loads the pack."""
    return SegkernExtension()

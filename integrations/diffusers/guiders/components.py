# SPDX-License-Identifier: Apache-2.0
"""Guiders for modular diffusers pipelines: guidance methods combined with classifier-free guidance.

diffusers has guiders for SEG, PAG and SLG. Up to version 0.42, its ``SmoothedEnergyGuidance`` calls the denoiser a
third time in each step and has no effect, because its hooks are never attached. Without classifier-free guidance, its
guiders for SEG and PAG compare the prompt with the negative prompt. Its ``SkipLayerGuidance`` swaps the outputs for
image and text of the skipped blocks of Stable Diffusion 3 and Flux. The guiders in this module always perturb the
prediction for the prompt, and the perturbed branch joins the call for the prompt at its first perturbed layer instead
of using a separate call.
"""

from __future__ import annotations

from segkern.integrations.diffusers.guiders.base import SpecGuider
from segkern.integrations.specs import PAG, SAG, SEG, SLG, TPG


class SEGGuider(SpecGuider):
    """Smoothed Energy Guidance with classifier-free guidance, for modular pipelines.

    The prediction of a step is ``u + g (c - u) + s (c - p)``, or ``c + s (c - p)`` without classifier-free guidance.
    ``p`` is ``c`` with blurred queries in some self-attention layers. The branch for ``p`` runs in the same denoiser
    call as ``c``, starting at its first blurred layer, so the number of denoiser calls does not change.

    Args:
        spec: A ``SEG(...)`` spec. Alternatively, pass the arguments of :class:`SEG`, with the same names and defaults.
            ``start`` and ``stop`` apply to SEG only.
        guidance_scale: Classifier-free guidance scale ``g``; 1 turns classifier-free guidance off.
        scale: ``s``; this and the other SEG arguments are described in :class:`SEG`. ``sigma`` may also be ``"inf"``,
            as in saved configurations.
        guidance_rescale: How far to rescale the prediction to the standard deviation of ``c``. Applies only with
            classifier-free guidance.
        use_original_formulation: Use ``c + g (c - u)`` instead of ``u + g (c - u)``; 0 then turns classifier-free
            guidance off. SEG is added in the same way to either formula, or to ``c`` alone.
        guidance_start: Fraction of the inference steps at which classifier-free guidance starts.
        guidance_stop: Fraction of the inference steps at which classifier-free guidance stops.
        enabled: False turns both guidance methods off. ``disable()`` and ``enable()`` turn them off and on.
        scheduler: The pipeline's scheduler, which guiders cannot access. If the scheduler calls the denoiser twice in a
            step (Heun), it is needed for ``start``, ``stop``, a schedule and ``reuse``.
        trust: Classes and functions of other packages in the denoiser, as for
            :func:`~segkern.integrations.diffusers.guide`.

    Raises:
        ValueError: If an argument is invalid. The message quotes it. Layers are resolved when the denoiser is first
            prepared.

    Source: SEG (arXiv 2408.00760); guidance_rescale: arXiv 2305.08891, section 3.4.

    Example:
        >>> guider = SEGGuider(guidance_scale=5.0, scale=3.0, sigma=math.inf, layers="mid", stop=0.6)
        >>> guider.new(scale=2.0).spec
        SEG(scale=2.0, sigma=inf, layers='mid', stop=0.6)
        >>> pipe.update_components(guider=guider)  # doctest: +SKIP
        >>> image = pipe(prompt="a red fox", output="images")[0]  # doctest: +SKIP
        >>> print(guider.report())  # doctest: +SKIP
    """

    spec_class = SEG


class PAGGuider(SpecGuider):
    """Perturbed-Attention Guidance with classifier-free guidance, for modular pipelines.

    Uses the formulas of :class:`SEGGuider` with another ``p``: in the chosen layers, every image token attends only to
    itself.

    Args:
        spec: A ``PAG(...)`` spec. Alternatively, pass the arguments of :class:`PAG`, with the same names and defaults.
        guidance_scale: See :class:`SEGGuider`, also for all other arguments that are not fields of :class:`PAG`.
        scale: ``s``; this and the other PAG arguments are described in :class:`PAG`.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: PAG (arXiv 2403.17377), equations 15 and 16.

    Example:
        >>> PAGGuider(PAG(scale=2.0, layers="mid"), guidance_scale=5.0).config["scale"]
        2.0
    """

    spec_class = PAG


class SLGGuider(SpecGuider):
    """Skip-layer guidance with classifier-free guidance, for modular pipelines.

    Uses the formulas of :class:`SEGGuider` with another ``p``: the chosen transformer blocks return their inputs
    unchanged.

    Args:
        spec: An ``SLG(...)`` spec. Alternatively, pass the arguments of :class:`SLG`, with the same names and defaults.
        guidance_scale: See :class:`SEGGuider`, also for all other arguments that are not fields of :class:`SLG`.
        scale: ``s``; this and the other SLG arguments are described in :class:`SLG`.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: diffusers' ``SkipLayerGuidance``, for the formula and the defaults.

    Example:
        >>> SLGGuider(layers="7-9", guidance_scale=5.0).spec
        SLG(scale=2.8, layers='7-9')
    """

    spec_class = SLG


class TPGGuider(SpecGuider):
    """Token perturbation guidance with classifier-free guidance, for modular pipelines.

    Uses the formulas of :class:`SEGGuider` with another ``p``: the image tokens are shuffled before each of the chosen
    transformer blocks.

    Args:
        spec: A ``TPG(...)`` spec. Alternatively, pass the arguments of :class:`TPG`, with the same names and defaults.
        guidance_scale: See :class:`SEGGuider`, also for all other arguments that are not fields of :class:`TPG`.
        scale: ``s``; this and the other TPG arguments are described in :class:`TPG`.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: TPG (arXiv 2506.10036).

    Example:
        >>> TPGGuider(TPG(scale=2.0, seed=7), guidance_scale=5.0).config["seed"]
        7
    """

    spec_class = TPG


class SAGGuider(SpecGuider):
    """Self-Attention Guidance with classifier-free guidance, for modular pipelines with a ``UNet2DConditionModel``.

    The prediction of a step is ``u + g (c - u) + s (u - u')``, or ``c + s (c - c')`` without classifier-free guidance.
    The denoiser call whose prediction is degraded makes a second call. Noising the image again requires the pipeline's
    scheduler, which guiders cannot access: pass it as ``scheduler``, or set this attribute on a loaded guider.

    Args:
        spec: A ``SAG(...)`` spec. Alternatively, pass the arguments of :class:`SAG`, with the same names and defaults.
        guidance_scale: See :class:`SEGGuider`, also for all other arguments that are not fields of :class:`SAG`.
        scale: ``s``; this and the other SAG arguments are described in :class:`SAG`.

    Raises:
        ValueError: If an argument is invalid. The message quotes it. Also raised when the denoiser is first prepared,
            if there is no scheduler or if images cannot be noised again for this scheduler.

    Source: SAG (arXiv 2210.00939), equations 16 and 25.

    Example:
        >>> SAGGuider(guidance_scale=5.0, scale=0.75).spec
        SAG(scale=0.75, layer='m0', sigma=1.0)
        >>> guider = SAGGuider(guidance_scale=5.0, scheduler=pipe.scheduler)  # doctest: +SKIP
    """

    spec_class = SAG

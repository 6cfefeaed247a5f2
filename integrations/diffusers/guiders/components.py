# SPDX-License-Identifier: Apache-2.0
"""Guiders for modular diffusers: SEG, PAG and SAG beside classifier-free guidance, as components of any pipeline.

diffusers has guiders for SEG and PAG of its own. In 0.42 and before its ``SmoothedEnergyGuidance`` pays for a third
call of the denoiser in each step and changes nothing: it never attaches its hooks. Without classifier-free guidance
both of its guiders compare the prompt with the negative prompt. These do neither: the perturbed branch is always of the
prompt, and it joins the call for the prompt at its first perturbed layer instead of asking for a call of its own.
"""

from __future__ import annotations

from segkern.integrations.diffusers.guiders.base import SpecGuider
from segkern.integrations.specs import PAG, SAG, SEG


class SEGGuider(SpecGuider):
    """Smoothed Energy Guidance and classifier-free guidance for a modular pipeline.

    The prediction of a step is ``u + g (c - u) + s (c - p)``, and ``c + s (c - p)`` where there is no classifier-free
    guidance; ``p`` is ``c`` with blurred queries in some self-attention layers. The branch for ``p`` runs in the
    same call of the denoiser as ``c``, from its first blurred layer on, so that there are as many calls as without it.

    Args:
        spec: ``SEG(...)``; instead of it the arguments that :class:`SEG` takes, under the same names and with the same
            defaults. ``start`` and ``stop`` are SEG's.
        guidance_scale: ``g``; 1 turns classifier-free guidance off.
        scale: ``s``, and so on; see :class:`SEG`. ``sigma`` may be ``"inf"`` too, as saved configurations have it.
        guidance_rescale: how far the prediction takes the standard deviation of ``c``; under classifier-free guidance
            only.
        use_original_formulation: ``c + g (c - u)`` instead of ``u + g (c - u)``; then 0 turns it off. The guidance
            is added to either, and to ``c`` alone, in the same way.
        guidance_start: fraction of the run's steps at which classifier-free guidance begins.
        guidance_stop: fraction of the run's steps from which there is none.
        enabled: False turns both guidances off; so does ``disable()``, and ``enable()`` turns them on.
        scheduler: of the pipeline, which guiders do not know. It is needed for ``start``, ``stop``, a schedule and
            ``reuse`` where it calls the denoiser twice in a step (Heun).
        trust: classes and functions of other packages in the denoiser, as
            :func:`~segkern.integrations.diffusers.guide` takes them.

    Raises:
        ValueError: when a value does not fit; the message quotes it. Layers are looked up when the denoiser is first
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
    """Perturbed-Attention Guidance and classifier-free guidance for a modular pipeline.

    As :class:`SEGGuider` with another ``p``: in the layers every token of the image attends to itself alone.

    Args:
        spec: ``PAG(...)``; instead of it the arguments that :class:`PAG` takes, under the same names and with the same
            defaults.
        guidance_scale: as :class:`SEGGuider` takes it, and so are the arguments that :class:`PAG` has not.
        scale: ``s``, and so on; see :class:`PAG`.

    Raises:
        ValueError: when a value does not fit; the message quotes it.

    Source: PAG (arXiv 2403.17377), equations 15 and 16.

    Example:
        >>> PAGGuider(PAG(scale=2.0, layers="mid"), guidance_scale=5.0).config["scale"]
        2.0
    """

    spec_class = PAG


class SAGGuider(SpecGuider):
    """Self-Attention Guidance and classifier-free guidance for a modular pipeline with a ``UNet2DConditionModel``.

    The prediction of a step is ``u + g (c - u) + s (u - u')``, and ``c + s (c - c')`` where there is no classifier-free
    guidance. A second call of the denoiser follows within the one that is degraded. Noising the image again takes
    the pipeline's scheduler, which guiders do not know: give it as ``scheduler``, or set it as the attribute of a
    guider that was loaded.

    Args:
        spec: ``SAG(...)``; instead of it the arguments that :class:`SAG` takes, under the same names and with the same
            defaults.
        guidance_scale: as :class:`SEGGuider` takes it, and so are the arguments that :class:`SAG` has not.
        scale: ``s``, and so on; see :class:`SAG`.

    Raises:
        ValueError: when a value does not fit; the message quotes it. When the denoiser is first prepared, without a
            scheduler and for one whose images cannot be noised again.

    Source: SAG (arXiv 2210.00939), equations 16 and 25.

    Example:
        >>> SAGGuider(guidance_scale=5.0, scale=0.75).spec
        SAG(scale=0.75, layer='m0', sigma=1.0)
        >>> guider = SAGGuider(guidance_scale=5.0, scheduler=pipe.scheduler)  # doctest: +SKIP
    """

    spec_class = SAG

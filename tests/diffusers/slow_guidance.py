# SPDX-License-Identifier: Apache-2.0
"""Slow, independent guidance: every branch is a separate denoiser call with logits blurred by a float64 matrix.

There are two implementations, which use nothing of the adapter except layer names. ``repeated_run`` leaves the pipeline
unchanged: every denoiser call is repeated with perturbed attention, and the scheduler's input is replaced by the sum in
the method's formula. ``looped_run`` is a separate denoising loop for Stable Diffusion 1 and XL.

An entry defines how attention is perturbed: a sigma, a tuple of one sigma per head, or None for the identity (PAG).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from segkern.integrations.diffusers import SEG, list_layers
from tests.diffusers.transformer_cases import TransformerCase

Entry = float | tuple[float, ...] | None
Entries = Entry | list[Entry]  # one for all samples, or one per sample

_SDPA = F.scaled_dot_product_attention
_CALLS_PER_STEP = {"HeunDiscreteScheduler": 2, "KDPM2DiscreteScheduler": 2, "KDPM2AncestralDiscreteScheduler": 2}


class Place(NamedTuple):
    """The position of an image or a video in the tokens. It may start at a different token in each sample."""

    height: int
    width: int
    start: int | tuple[int, ...] = 0
    frames: int = 1

    @property
    def size(self) -> int:
        return self.frames * self.height * self.width

    @property
    def stop(self) -> int:
        return self.size + (self.start if isinstance(self.start, int) else max(self.start))

    def tokens(self, sample: int) -> slice:
        start = self.start if isinstance(self.start, int) else self.start[sample % len(self.start)]
        return slice(start, start + self.size)


@cache
def dense_blur(height: int, width: int, sigma: float) -> torch.Tensor:
    """Return the 2-D Gaussian blur with reflect padding as ``[tokens, tokens]``, by blurring every unit image."""
    tokens = height * width
    if sigma == 0:
        return torch.eye(tokens, dtype=torch.float64)
    if math.isinf(sigma):
        return torch.full((tokens, tokens), 1.0 / tokens, dtype=torch.float64)
    kernels = []
    for length in (height, width):
        taps = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
        taps = min(taps, length - (length % 2 - 1))
        x = torch.arange(taps, dtype=torch.float64) - taps // 2
        weights = torch.exp(-(x**2) / (2 * sigma**2))
        kernels.append(weights / weights.sum())
    units = torch.eye(tokens, dtype=torch.float64).view(tokens, 1, height, width)
    rows, columns = len(kernels[0]) // 2, len(kernels[1]) // 2
    padded = F.pad(units, (columns, columns, rows, rows), mode="reflect")
    blurred = F.conv2d(padded, torch.outer(*kernels)[None, None])
    return blurred.view(tokens, tokens).T


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    entries: Entries,
    place: Place,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    blend: float = 1.0,
) -> torch.Tensor:
    """Return float64 attention over all tokens with the image tokens' logits perturbed, mixed in by ``blend``."""
    logits = query.double() @ key.double().transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
    of_samples = entries if isinstance(entries, list) else [entries]
    perturbed = torch.stack([_perturbed(x, of_samples[i % len(of_samples)], place, i) for i, x in enumerate(logits)])
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    own, other = (_softmax(x if mask is None else x + mask) @ value.double() for x in (logits, perturbed))
    return (blend * other + (1.0 - blend) * own).to(query.dtype)


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the softmax, and zeros for queries whose keys are all masked, as PyTorch's attention does."""
    return logits.softmax(dim=-1).masked_fill(logits.isneginf().all(dim=-1, keepdim=True), 0.0)


def _perturbed(logits: torch.Tensor, entry: Entry, place: Place, sample: int) -> torch.Tensor:
    """Return the logits of one sample, ``[heads, queries, keys]``."""
    image, logits = place.tokens(sample), logits.clone()
    if entry is None:
        logits[:, image, image] += torch.full((place.size, place.size), float("-inf")).double().fill_diagonal_(0.0)
        return logits
    sigmas = entry if isinstance(entry, tuple) else (entry,) * len(logits)
    for head, sigma in enumerate(sigmas):
        if sigma:
            blur = torch.block_diag(*[dense_blur(place.height, place.width, sigma)] * place.frames)
            logits[head, image] = blur @ logits[head, image]
    return logits


@contextmanager
def perturbed_attention(
    model: torch.nn.Module, entries: Mapping[str, Entries], place_of: Callable[[int], Place | None], blend: float = 1.0
) -> Iterator[None]:
    """Make the first self-attention of each of these modules dense inside this context.

    Args:
        model: A denoiser.
        entries: Entries by module name.
        place_of: Returns the image's position for a number of tokens; None for tokens of something else.
        blend: Blend of all of them.
    """
    inside: list[str] = []
    met: set[str] = set()

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        place = place_of(query.shape[2]) if inside and query.shape[2] == key.shape[2] else None
        if place is None:
            return _SDPA(query, key, value, attn_mask, *args, **kwargs)
        name = inside.pop()
        met.add(name)
        return dense_attention(query, key, value, entries[name], place, attn_mask, kwargs.get("scale"), blend)

    handles = []
    for name in entries:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(module.register_forward_hook(lambda *_: inside.clear()))
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
    assert met == set(entries)


def self_attentions(unet: torch.nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of a UNet's modules with self-attention over an image whose names match a pattern."""
    names = [name for name, _ in unet.named_modules() if name.endswith(".attn1") and ".attentions." in name]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def unet_places(size: tuple[int, int]) -> Callable[[int], Place]:
    """Return a function of the latents' size: each level halves height and width, rounded up."""

    def place_of(tokens: int) -> Place:
        height, width = size
        while height * width > tokens:
            height, width = -(-height // 2), -(-width // 2)
        assert height * width == tokens
        return Place(height, width)

    return place_of


# The unmodified pipeline, with every denoiser call repeated.


@dataclass
class Perturbed:
    """A guidance method for ``repeated_run``: its scale, and how the attention of these modules is perturbed."""

    scale: float
    entries: Entries
    modules: Sequence[str]

    def applied(
        self, denoiser: torch.nn.Module, place_of: Callable[[int], Place | None], step: int
    ) -> AbstractContextManager[None]:
        """Return a context in which the denoiser is perturbed."""
        return perturbed_attention(denoiser, dict.fromkeys(self.modules, self.entries), place_of)


@dataclass
class ChangedBlocks:
    """A guidance method for ``repeated_run`` that skips transformer blocks or shuffles their tokens.

    Attributes:
        scale: Scale of the difference.
        blocks: Module names of the blocks.
        order: Returns the order of the tokens from the step, the block and the number of image tokens; None to skip.
        steps: The guided steps; None for all.
        sequence: Lists of blocks whose hidden states include the tokens before the image.
    """

    scale: float
    blocks: Sequence[str]
    order: Callable[[int, str, int], torch.Tensor] | None = None
    steps: Callable[[int], bool] = lambda step: True
    sequence: Sequence[str] = ()

    @contextmanager
    def applied(self, denoiser: torch.nn.Module, place_of: Callable[[int], Place | None], step: int) -> Iterator[None]:
        """Return a context in which the denoiser's blocks are changed."""
        with ExitStack() as patches:
            for name in self.blocks if self.steps(step) else ():
                block = denoiser.get_submodule(name)
                whole = name.rpartition(".")[0] in self.sequence
                forward = (
                    _skipping(block)
                    if self.order is None
                    else _shuffling(block, name, self.order, step, place_of, whole)
                )
                patches.enter_context(mock.patch.object(block, "forward", forward))
            yield


def _skipping(block: torch.nn.Module) -> Callable[..., Any]:
    """Return a forward that returns the inputs: for each output, the input of the same name or shape."""
    forward = type(block).forward

    def skipping(*args: Any, **kwargs: Any) -> Any:
        given = list(inspect.signature(forward).bind(block, *args, **kwargs).arguments.values())[1:]
        output = forward(block, *args, **kwargs)
        if not isinstance(output, tuple):
            return given[0]
        image, text = given[:2]
        return tuple(image if part is None or part.shape == image.shape else text for part in output)

    return skipping


def _shuffling(
    block: torch.nn.Module,
    name: str,
    order: Callable[[int, str, int], torch.Tensor],
    step: int,
    place_of: Callable[[int], Place | None],
    sequence: bool,
) -> Callable[..., Any]:
    """Return a forward that shuffles the image tokens before the block runs. They come first without ``sequence``."""
    forward = type(block).forward

    def shuffling(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        place = place_of(first.shape[1])
        tokens = first.shape[1] if place is None else place.size
        shuffled = []
        for sample, x in enumerate(first):
            start = place.tokens(sample).start if sequence and place is not None else 0
            image = start + order(step, name, tokens)
            shuffled.append(x[torch.cat([torch.arange(start), image, torch.arange(start + tokens, len(x))])])
        return forward(block, torch.stack(shuffled), *args, **kwargs)

    def by_name(*args: Any, **kwargs: Any) -> Any:
        if args:
            return shuffling(*args, **kwargs)
        return shuffling(kwargs.pop("hidden_states"), **kwargs)

    return by_name


def unet_run(
    pipe: Any,
    guidances: Sequence[Perturbed | ChangedBlocks],
    run: Callable[[], torch.Tensor],
    size: tuple[int, int],
    cfg: bool,
) -> torch.Tensor:
    """Return the expected result of ``run()`` under guidance, for images or frames of this latent size."""
    return repeated_run(pipe, guidances, run, unet_places(size), cfg)


def transformer_run(
    model: TransformerCase,
    pipe: Any,
    guidances: Sequence[Perturbed | ChangedBlocks],
    run: Callable[[], torch.Tensor],
    rows: int = 6,
    columns: int = 4,
    cfg: bool = True,
    normalise: bool = True,
) -> torch.Tensor:
    """Return the expected result of ``run()`` under guidance, for images with this number of tokens.

    Args:
        model: The case.
        pipe: Its pipeline.
        guidances: The guidance methods.
        run: Generates an image.
        rows: Rows of tokens.
        columns: Columns of tokens.
        cfg: Whether the run uses classifier-free guidance.
        normalise: Whether a pipeline that can normalise its prediction does so.
    """
    place = Place(rows, columns, model.start, model.frames)

    def place_of(tokens: int) -> Place | None:
        return place if tokens >= place.stop else None

    return repeated_run(pipe, guidances, run, place_of, cfg, model, normalise)


def repeated_run(
    pipe: Any,
    guidances: Sequence[Perturbed | ChangedBlocks],
    run: Callable[[], torch.Tensor],
    place_of: Callable[[int], Place | None],
    cfg: bool,
    model: TransformerCase | None = None,
    normalise: bool = True,
) -> torch.Tensor:
    """Return the expected result of ``run()`` under guidance."""
    name = model.name if model is not None else ""
    calls: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # predictions, perturbed ones since the last step

    def repeating(denoiser: torch.nn.Module) -> Any:
        forward = type(denoiser).forward

        def repeated(*args: Any, **kwargs: Any) -> Any:
            output = forward(denoiser, *_copied(args), **_copied(kwargs))
            perturbed = []
            for guidance in guidances:
                with guidance.applied(denoiser, place_of, done):
                    perturbed.append(_tensor(forward(denoiser, *_copied(args), **_copied(kwargs))[0]))
            calls.append((_tensor(output[0]), perturbed))
            return output

        repeated.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        return repeated

    step = type(pipe.scheduler).step
    done = 0  # number of finished steps

    def corrected(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        prediction, perturbed = calls[0]  # the call for the prompt comes first
        if len(calls) == 1 and cfg and not name.startswith("Lumina2"):  # one batch with both halves
            middle = len(prediction) // 2
            half = slice(0, middle) if name == "ZImagePipeline" else slice(middle, None)
            prediction, perturbed = prediction[half], [other[half] for other in perturbed]
        shift = sum(g.scale * (prediction - other) for g, other in zip(guidances, perturbed, strict=True))
        normalised = name.startswith("QwenImage") or (name.startswith("Lumina2") and normalise)
        sign = -1.0 if name.startswith("Lumina2") else 1.0
        if normalised and len(calls) > 1:
            negative = calls[1][0]
            combined = negative + 4.0 * (prediction - negative) + shift
            ratio = prediction.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
            model_output = sign * combined * ratio
        elif name == "ZImagePipeline":
            model_output = model_output - shift.squeeze(2)
        else:
            if name in ("PixArtSigmaPipeline", "PixArtAlphaPipeline", "HunyuanDiTPipeline"):
                shift = shift.chunk(2, dim=1)[0]
            shift = shift[:, : model_output.shape[1]]  # without the tokens of other images
            if shift.shape != model_output.shape:  # without the first frame, which is given
                shift = shift[:, :, 1:]
            model_output = model_output + sign * shift
        calls.clear()
        return step(pipe.scheduler, model_output, *args, **kwargs)

    corrected.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    with ExitStack() as patches:
        for part in ("unet", "transformer", "transformer_2"):
            denoiser = getattr(pipe, part, None)
            if denoiser is not None:
                patches.enter_context(mock.patch.object(denoiser, "forward", repeating(denoiser)))
        patches.enter_context(mock.patch.object(pipe.scheduler, "step", corrected))
        return run()


def _copied(value: Any) -> Any:
    """Copy the containers in a call's arguments, because models modify them."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return type(value)(_copied(item) for item in value) if type(value) in (list, tuple) else value


def _tensor(output: Any) -> torch.Tensor:
    return torch.stack(output) if isinstance(output, list) else output


# A separate denoising loop.


@dataclass
class Branch:
    """A guidance method for ``looped_run``.

    Attributes:
        entries: How attention is perturbed, by layer names as in ``list_layers``.
        scale: Scale of the difference, by step. There is no branch in steps with a scale of 0.
        blend: Blend of the perturbed attention.
        computes: Whether the branch is computed in a step. Otherwise the last difference is reused.
    """

    entries: Mapping[str, Entries]
    scale: Callable[[int], float]
    blend: float = 1.0
    computes: Callable[[int], bool] = lambda step: True


def branch_of(pipe: Any, spec: SEG, steps: int) -> Branch:
    """Return the branch for a spec with one sigma and layers named by parts or individually."""
    names = spec.layer_names or ("mid",)
    layers = [layer.name for layer in list_layers(pipe) if layer.part in names or layer.name in names]
    first = math.ceil(spec.start * steps)
    return Branch(
        dict.fromkeys(layers, spec.sigma),
        lambda step: spec.scale if spec.start <= step / steps < spec.stop else 0.0,
        computes=lambda step: (step - first) % spec.reuse == 0,
    )


@torch.no_grad()
def looped_run(
    pipe: Any,
    guidances: Sequence[SEG | Branch],
    prompt: str | list[str] = "a red fox",
    *,
    latents: torch.Tensor,
    guidance_scale: float = 5.0,
    guidance_rescale: float = 0.0,
    num_inference_steps: int = 3,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    eta: float = 0.0,
) -> torch.Tensor:
    """Return the expected result of ``small_pipelines.run``; ``seed`` is the seed of a sampler's noise."""
    cfg = guidance_scale > 1.0
    conditional, unconditional = conditions(pipe, prompt, latents, num_images_per_prompt, cfg)
    modules = {layer.name: layer.module for layer in list_layers(pipe)}
    place_of = unet_places(tuple(latents.shape[2:]))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    calls_per_step = _CALLS_PER_STEP.get(type(scheduler).__name__, 1)
    steps = -(-len(scheduler.timesteps) // calls_per_step)
    branches = [g if isinstance(g, Branch) else branch_of(pipe, g, steps) for g in guidances]
    known = {"generator": torch.Generator().manual_seed(seed), "eta": eta}
    taken = inspect.signature(scheduler.step).parameters
    extra = {name: value for name, value in known.items() if name in taken}
    x, differences = latents * scheduler.init_noise_sigma, [torch.zeros_like(latents)] * len(branches)
    for call, t in enumerate(scheduler.timesteps):
        step = call // calls_per_step
        scaled = scheduler.scale_model_input(x, t)
        c = pipe.unet(scaled, t, **conditional).sample
        guided = c
        if cfg:
            u = pipe.unet(scaled, t, **unconditional).sample
            guided = u + guidance_scale * (c - u)
        for i, branch in enumerate(branches):
            if not branch.scale(step):
                continue
            if branch.computes(step):
                entries = {modules[name]: entry for name, entry in branch.entries.items()}
                with perturbed_attention(pipe.unet, entries, place_of, branch.blend):
                    differences[i] = c - pipe.unet(scaled, t, **conditional).sample
            guided = guided + branch.scale(step) * differences[i]
        if cfg and guidance_rescale:
            ratio = c.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
            guided = guidance_rescale * guided * ratio + (1 - guidance_rescale) * guided
        x = scheduler.step(guided, t, x, **extra).prev_sample
    return x


def conditions(
    pipe: Any, prompt: str | list[str], latents: torch.Tensor, images: int, cfg: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the denoiser's arguments for the prompts and for no prompt."""
    if not hasattr(pipe, "text_encoder_2"):
        texts = pipe.encode_prompt(prompt, pipe.device, images, cfg)
        conditional, unconditional = ({"encoder_hidden_states": text} for text in texts)
        return conditional, unconditional
    texts = pipe.encode_prompt(prompt, num_images_per_prompt=images, do_classifier_free_guidance=cfg)
    height, width = (size * pipe.vae_scale_factor for size in latents.shape[2:])
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=latents.dtype).repeat(len(latents), 1)
    conditional, unconditional = (
        {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        for text, pooled in zip(texts[:2], texts[2:], strict=True)
    )
    return conditional, unconditional

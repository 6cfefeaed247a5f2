# SPDX-License-Identifier: Apache-2.0
"""Verification of the layout of a denoiser's batch: conditional and unconditional samples, and pairs of calls.

The settings of the pipeline (``do_classifier_free_guidance``, the arguments of its call, its texts) are compared with
the batch of each call. Under classifier-free guidance, the two halves of a batch have the same latents and different
texts. If each text has a separate call, the call for the negative prompt repeats the latents of the call for the
prompt. Any other layout is refused with an error that describes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

import torch

from segkern.integrations.diffusers.runtime.branches import Batch
from segkern.integrations.diffusers.runtime.cache_contexts import cache_context
from segkern.integrations.diffusers.runtime.pipeline_run import PipelineRun
from segkern.integrations.diffusers.runtime.run_text import TextKind, common_kind
from segkern.integrations.diffusers.runtime.steps import check_one_timestep, same_timestep

CFGLayout = Literal["none", "batch", "separate"]
ConditionalPlace = Literal["first", "second"]


class CallKind(Enum):
    """The prediction that a denoiser call computes."""

    BATCH = "every part of the prediction"
    PROMPT = "the part for the prompt; a call for the negative prompt may follow"
    NEGATIVE = "the part for the negative prompt"


@dataclass(frozen=True)
class CallLayout:
    """The layout of one call's batch.

    Attributes:
        kind: Kind of the call.
        batch: Samples of the batch.
        pair: Number of the call for the prompt; the matching call for the negative prompt has the same number.
    """

    kind: CallKind
    batch: Batch
    pair: int = 0


@dataclass(frozen=True)
class _PromptCall:
    """A call for the prompt. Its reference to the latents prevents other tensors from getting the same identity."""

    pair: int
    latents: Any
    timestep: Any
    text: TextKind


class LayoutError(ValueError):
    """The layout of a batch is not supported."""


class BatchLayout:
    """The layout of one denoiser's calls in one run.

    Args:
        run: The run of the pipeline or of a custom loop.
        name: Name of the pipeline or denoiser, for messages.
        conditional_first: Whether the conditional samples come first in a batch of both texts.
        cfg: The layout that the user specifies; None to detect it.
    """

    def __init__(
        self, run: PipelineRun, name: str, *, conditional_first: bool = False, cfg: CFGLayout | None = None
    ) -> None:
        self._run = run
        self._name = name
        self._conditional_first = conditional_first
        self._cfg = cfg
        # Batches of both texts by the shape of the latents, with the pipeline's setting of guidance at that time.
        self._batches: dict[tuple[int, ...], tuple[Batch, bool | None]] = {}
        self._last_pair: _PromptCall | None = None  # the last call for the prompt with a call for the negative prompt
        self._open: list[_PromptCall] = []  # calls at this timestep that a call for the negative prompt may belong to
        self._calls = 0
        self._missing: _PromptCall | None = None  # the first call for the prompt, until a negative one follows
        self._alone = False  # whether calls for the prompt come without calls for the negative prompt

    def of_call(self, latents: Any, text: Any, timestep: Any) -> CallLayout:
        """Return the layout of a call.

        Args:
            latents: The noisy images, a tensor or a list with one per sample.
            text: The embeddings of the call; None if the denoiser uses none.
            timestep: Timestep of the call.

        Raises:
            LayoutError: If the batch does not match the pipeline's settings.
        """
        size = len(latents)
        shape = (size, *latents[0].shape)
        batch, stated = self._batches.get(shape, (None, None))
        if batch is not None and stated == self._stated_guidance():
            return CallLayout(CallKind.BATCH, batch)
        if self._holds_both(latents, text):
            batch = self._verified(latents, text, timestep)
            self._batches[shape] = batch, self._stated_guidance()
            self._missing = None
            return CallLayout(CallKind.BATCH, batch)
        return self._of_one_text(latents, text, timestep)

    def expects_negative(self) -> bool | None:
        """Return whether each call for the prompt is followed by one for the negative prompt; None if unknown."""
        if self._cfg is not None:
            return self._cfg == "separate"
        if self._alone:
            return False
        stated = self._stated_guidance()
        scale = self._run.arguments.get("true_cfg_scale")  # Flux, Qwen-Image
        if scale is None or stated is not None:  # Chroma's inpainting pipeline ignores its true_cfg_scale
            return stated
        if float(scale) <= 1.0:
            return False
        return True if self._run.text.has_negative else None

    def awaits(self, pair: int) -> bool:
        """Return True if the call for the negative prompt of a pair may still come."""
        return any(call.pair == pair for call in self._open)

    def _holds_both(self, latents: Any, text: Any) -> bool:
        """Return True if the batch has samples of the prompt and of the negative prompt."""
        size, samples = len(latents), self._run.samples
        if self._cfg is not None:
            return self._cfg == "batch"
        stated = self._stated_guidance()
        if samples is not None:
            if size == samples:
                self._check_one_text(latents, stated)
                return False
            if size != 2 * samples:
                raise self._unknown_layout(latents, samples)
            if stated is False and common_kind(self._kinds(text, size)) is not TextKind.MIXED:
                raise LayoutError(
                    f"{self._name} is set to run without classifier-free guidance, but its denoiser got a batch of "
                    f"{size} for {_images(samples)}; guide cannot determine what the other samples are"
                )
            return True
        # The run did not begin with a pipeline call, so the number of samples is unknown.
        kinds = common_kind(self._kinds(text, size))
        halves = size % 2 == 0 and _equal(latents[: size // 2], latents[size // 2 :])
        if halves and kinds in (TextKind.MIXED, TextKind.BOTH):  # equal texts have equal predictions
            return True
        if halves and _one_is_zero(text):
            return True
        if kinds is TextKind.MIXED:
            raise self._unknown_layout(latents, None)
        if halves and kinds is not TextKind.PROMPT:
            raise LayoutError(
                f"the denoiser of {self._name} got a batch of {size} whose halves have the same latents and unknown "
                f"texts: it may be [unconditional, conditional] or two equal images. In a custom denoising loop, "
                f"specify the layout: guide(..., cfg='batch') and `with guidance.run(timesteps):`"
            )
        if stated and size > 1 and kinds is not TextKind.PROMPT:
            raise self._unknown_layout(latents, None)
        return False

    def _check_one_text(self, latents: Any, stated: bool | None) -> None:
        """Raise a LayoutError if a batch with one text may instead be a batch with both texts."""
        half = len(latents) // 2
        if self._calls or stated is not None or self._run.is_stock or len(latents) != 2 * half:
            return
        if _equal(latents[:half], latents[half:]):
            raise LayoutError(
                f"the denoiser of {self._name} got a batch of {len(latents)} whose halves have the same latents; "
                f"specify whether they are two equal images, guide(..., cfg='none'), or both texts, guide(..., "
                "cfg='batch')"
            )

    def _stated_guidance(self) -> bool | None:
        """Return whether the pipeline is set to use classifier-free guidance; None if it has no such setting."""
        stated = self._run.setting("do_classifier_free_guidance")
        return None if stated is None else bool(stated)

    def _kinds(self, text: Any, size: int) -> tuple[TextKind, ...]:
        """Return the text of each sample; unknown if there is not one text per sample."""
        kinds = () if text is None else self._run.text.kinds(text)
        count, rest = divmod(len(kinds), size)
        if rest or not count:
            return (TextKind.UNKNOWN,) * size
        return tuple(common_kind(kinds[i * count : (i + 1) * count]) for i in range(size))

    def _verified(self, latents: Any, text: Any, timestep: Any) -> Batch:
        """Return the batch of both texts after checking that its halves have the same latents and the right texts."""
        size = len(latents)
        if size % 2:
            raise self._unknown_layout(latents, self._run.samples)
        check_one_timestep(timestep)
        half = size // 2
        if not _equal(latents[:half], latents[half:]):
            raise self._unknown_layout(latents, self._run.samples)
        batch = Batch(size, half, 0, self._conditional_first)
        kinds = self._kinds(text, size)
        conditional, unconditional = common_kind(kinds[batch.conditional]), common_kind(kinds[batch.unconditional])
        unknown = conditional is unconditional is TextKind.UNKNOWN
        if unknown and self._cfg is None and _one_is_zero(text):
            return replace(batch, conditional_first=bool(text[0].any()))
        if unknown and self._cfg is None and not self._run.is_stock:
            raise LayoutError(
                f"the denoiser of {self._name} got a batch of {size} whose halves have the same latents and unknown "
                f"texts; specify which half belongs to the prompt: guide(..., cfg='batch', conditional='first' or "
                f"'second')"
            )
        if conditional in _NOT_NEGATIVE and unconditional in _NOT_PROMPT:
            return batch
        if conditional is unconditional and self._cfg is not None:
            return batch  # one text is used as both
        if self._cfg is None and conditional in _NOT_PROMPT and unconditional in _NOT_NEGATIVE:
            return Batch(size, half, 0, not self._conditional_first)
        if conditional is unconditional:
            raise LayoutError(
                f"the denoiser of {self._name} got a batch of {size} whose halves have the same latents and the same "
                f"text; if the prompt and the negative prompt are the same text, specify the layout: "
                f"guide(..., cfg='batch')"
            )
        raise LayoutError(
            f"the denoiser of {self._name} got a batch of {size} with {conditional.value} where guide expects the "
            f"prompt, and {unconditional.value} where it expects the negative prompt; supported layouts are "
            f"[unconditional, conditional] and [conditional, unconditional]"
        )

    def _of_one_text(self, latents: Any, text: Any, timestep: Any) -> CallLayout:
        """Return the layout of a call for one of the two texts."""
        self._calls += 1
        batch = Batch(len(latents), 0)
        if self._calls == 1:
            check_one_timestep(timestep)
        kind = common_kind(self._kinds(text, len(latents)))
        if self._cfg is None and kind in (TextKind.UNKNOWN, TextKind.BOTH):
            kind = _OF_CONTEXTS.get(cache_context() or "", kind)
        if kind is TextKind.MIXED:
            raise self._unknown_layout(latents, self._run.samples)
        pair = self._last_pair
        if pair is not None and pair.latents is latents and same_timestep(pair.timestep, timestep):
            raise LayoutError(
                f"{self._name} called its denoiser three times at one timestep with the same latents; guide supports "
                f"one call for the prompt and one for the negative prompt"
            )
        before = self._repeated(latents, timestep, kind)
        follows = before is not None and (kind is not TextKind.PROMPT or self._is_stated(before, kind))
        if kind is TextKind.NEGATIVE or follows:
            if before is not None and before.text is kind is TextKind.UNKNOWN:
                self._check_order()
            return CallLayout(CallKind.NEGATIVE, batch, self._closed(before).pair)
        if before is not None:
            raise self._twice(before, kind)
        call = _PromptCall(self._calls, latents, timestep, kind)
        self._check_missing(call)
        nothing_follows = self.expects_negative() is False and kind is TextKind.PROMPT
        if self._open and (nothing_follows or not same_timestep(self._open[-1].timestep, timestep)):
            self._open.clear()
        self._open.append(call)
        return CallLayout(CallKind.PROMPT, batch, call.pair)

    def _is_stated(self, before: _PromptCall, kind: TextKind) -> bool:
        """Return True if the user specifies that a call with the same text as ``before`` is for the negative prompt."""
        return self._cfg == "separate" and before.text is kind

    def _twice(self, before: _PromptCall, kind: TextKind) -> LayoutError:
        """Return the error for a call for the prompt after another call with the same latents."""
        if before.text is kind:
            why = (
                "the same text; if the prompt and the negative prompt are the same text, specify the layout: "
                "guide(..., cfg='separate')"
            )
        else:
            why = "another text before the prompt; guide needs the call for the prompt first"
        return LayoutError(f"{self._name} called its denoiser twice at one timestep with the same latents, and {why}")

    def _check_order(self) -> None:
        """Raise a LayoutError for two calls with unknown texts, unless their order is known."""
        if self._cfg is None and not self._run.is_stock:
            raise LayoutError(
                f"{self._name} called its denoiser twice at one timestep with the same latents and unknown texts; if "
                f"the first call is for the prompt and the second for the negative prompt, specify the layout: "
                f"guide(..., cfg='separate')"
            )

    def _repeated(self, latents: Any, timestep: Any, kind: TextKind) -> _PromptCall | None:
        """Return the call for the prompt with the same latents at the same timestep, if there was one.

        If no call for a negative prompt is expected and the text is the prompt, only tensor identities are compared,
        which is free.
        """
        alone = kind is TextKind.PROMPT and self.expects_negative() is False
        for call in self._open:
            same = call.latents is latents
            if kind is TextKind.NEGATIVE:
                if same or _equal(call.latents, latents):
                    return call
            elif alone and call.text is TextKind.PROMPT:
                if same and call.timestep is timestep:
                    return call
            elif same_timestep(call.timestep, timestep) and (same or _equal(call.latents, latents)):
                return call
        return None

    def _closed(self, call: _PromptCall | None) -> _PromptCall:
        """Return the call for the prompt that a call for the negative prompt belongs to, and close the pair.

        Raises:
            LayoutError: If there is none, or if the user or the pipeline specifies that there is no such call.
        """
        if call is None:
            raise LayoutError(
                f"{self._name} called its denoiser for the negative prompt before the prompt with the same latents; "
                f"guide needs the call for the prompt first"
            )
        if self._cfg == "none" or (self._cfg is None and self.expects_negative() is False):
            raise LayoutError(
                f"{self._name} called its denoiser twice at one timestep with the same latents, but is set to run "
                f"without classifier-free guidance; if the second call is for the negative prompt, specify the layout: "
                f"guide(..., cfg='separate')"
            )
        self._open.remove(call)
        self._last_pair = call
        self._missing = None
        return call

    def _check_missing(self, call: _PromptCall) -> None:
        """Detect at the second timestep that no call for a negative prompt comes.

        Raises:
            LayoutError: If the pipeline is set to make one, and a call with an unknown text may have been it.
        """
        if self._calls == 1 and not self._batches and self.expects_negative() is not False:
            self._missing = call
            return
        if self._missing is None or same_timestep(self._missing.timestep, call.timestep):
            return
        if self.expects_negative() and any(each.text is not TextKind.PROMPT for each in (*self._open, call)):
            raise LayoutError(
                f"{self._name} is set to run with classifier-free guidance, but its denoiser got no call for the "
                f"negative prompt after the call for the prompt, and no batch with both"
            )
        self._missing, self._alone = None, self._cfg is None

    def _unknown_layout(self, latents: Any, samples: int | None) -> LayoutError:
        """Return the error for an unsupported layout, with a description if it is a known one."""
        size = len(latents)
        asked = "" if samples is None else f" for {_images(samples)}"
        known = ""
        if samples is not None:
            known = f"batches of {samples} (conditional) and {2 * samples} (unconditional, conditional)"
        reason = f"guide supports {known}" if known else "guide supports [unconditional, conditional]"
        if size % 2 == 0 and size > 2 and _equal(latents[0::2], latents[1::2]):
            reason = f"its samples are interleaved, [unconditional, conditional, unconditional, ...], but {reason}"
        elif size % 3 == 0 and samples is not None and size == 3 * samples:
            reason = f"it has three parts, but {reason}; pipelines with their own guidance methods run without guide"
        elif samples is not None and size % (2 * samples) == 0 and size > 2 * samples:
            reason = f"it has several timesteps or views, but {reason}"
        elif size % 2 == 0:
            reason = f"its two halves do not have the same latents, but {reason}"
        return LayoutError(f"the denoiser of {self._name} got a batch of {size}{asked}: {reason}")


_OF_CONTEXTS = {"cond": TextKind.PROMPT, "uncond": TextKind.NEGATIVE}  # names of cache contexts in diffusers
_NOT_NEGATIVE = (TextKind.PROMPT, TextKind.BOTH, TextKind.UNKNOWN)
_NOT_PROMPT = (TextKind.NEGATIVE, TextKind.BOTH, TextKind.UNKNOWN)


def _one_is_zero(text: Any) -> bool:
    """Return True if exactly one half of the embeddings is zero, which is how pipelines leave out an image prompt."""
    if not isinstance(text, torch.Tensor) or len(text) % 2 or text.is_meta:
        return False
    first, second = (bool(half.any()) for half in text.chunk(2))
    return first != second


def _images(samples: int) -> str:
    return "1 image" if samples == 1 else f"{samples} images"


def _equal(latents: Any, others: Any) -> bool:
    """Return True if two batches of latents have equal values. Synchronises with their device."""
    if latents is others:
        return True
    if len(latents) != len(others):
        return False
    if not isinstance(latents, torch.Tensor) or not isinstance(others, torch.Tensor):
        return all(_equal(a, b) for a, b in zip(latents, others, strict=True))
    if latents.shape != others.shape or latents.dtype != others.dtype:
        return False
    return latents.is_meta or bool(torch.equal(latents.detach(), others.detach()))

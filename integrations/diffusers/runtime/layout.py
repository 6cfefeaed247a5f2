# SPDX-License-Identifier: Apache-2.0
"""Verify the layout of a denoiser's batch: its conditional and unconditional samples, and calls that belong together.

The pipeline's statements (``do_classifier_free_guidance``, the arguments of its call, its texts) are held against the
batch that arrives. The two halves of a batch under classifier-free guidance are the same latents with different texts;
where each text has a call of its own, the call for the negative prompt repeats the latents of the one for the prompt.
Anything else is refused by name.
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
    """The prediction that a call of the denoiser computes."""

    BATCH = "every part of the prediction"
    PROMPT = "the part for the prompt; a call for the negative prompt may follow"
    NEGATIVE = "the part for the negative prompt"


@dataclass(frozen=True)
class CallLayout:
    """The layout of one call's batch.

    Attributes:
        kind: of the call.
        batch: its samples.
        pair: number of the call for the prompt, which the one for the negative prompt has too.
    """

    kind: CallKind
    batch: Batch
    pair: int = 0


@dataclass(frozen=True)
class _PromptCall:
    """A call for the prompt; the latents are held so that another tensor cannot take their identity."""

    pair: int
    latents: Any
    timestep: Any
    text: TextKind


class LayoutError(ValueError):
    """A batch that is not laid out as guidance needs it."""


class BatchLayout:
    """The layout of one denoiser's calls in one run.

    Args:
        run: of the pipeline, or of the user's own loop.
        name: of the pipeline or denoiser, for messages.
        conditional_first: whether a batch of both texts begins with the conditional samples.
        cfg: the layout that the user states; None to find it.
    """

    def __init__(
        self, run: PipelineRun, name: str, *, conditional_first: bool = False, cfg: CFGLayout | None = None
    ) -> None:
        self._run = run
        self._name = name
        self._conditional_first = conditional_first
        self._cfg = cfg
        # Of both texts, by the shape of the latents, with what the pipeline said of its guidance then.
        self._batches: dict[tuple[int, ...], tuple[Batch, bool | None]] = {}
        self._last_pair: _PromptCall | None = None  # the last call for the prompt that the other one followed
        self._open: list[_PromptCall] = []  # of this timestep, to which a call for the negative prompt may belong
        self._calls = 0
        self._missing: _PromptCall | None = None  # the first call for the prompt, until one for the negative came
        self._alone = False  # calls for the prompt came without one for the negative prompt

    def of_call(self, latents: Any, text: Any, timestep: Any) -> CallLayout:
        """The layout of a call.

        Args:
            latents: the noisy images, a tensor or a list with one per sample.
            text: the embeddings that come with them; None where the denoiser takes none.
            timestep: of the call.

        Raises:
            LayoutError: for a batch that is not what the pipeline says.
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
        """True if a call for the negative prompt follows each one for the prompt; None where nothing says so."""
        if self._cfg is not None:
            return self._cfg == "separate"
        if self._alone:
            return False
        scale = self._run.arguments.get("true_cfg_scale")  # Flux, Qwen-Image
        if scale is None:
            return self._stated_guidance()
        if float(scale) <= 1.0:
            return False
        return True if self._run.text.has_negative else None

    def awaits(self, pair: int) -> bool:
        """True if the call for the negative prompt of a pair may still come."""
        return any(call.pair == pair for call in self._open)

    def _holds_both(self, latents: Any, text: Any) -> bool:
        """True if the batch holds samples of the prompt and of the negative prompt."""
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
                    f"{self._name} says that it runs without classifier-free guidance, and its denoiser got a batch of "
                    f"{size} for {_images(samples)}: guide cannot tell what the others are"
                )
            return True
        # The call's arguments say nothing of its size: the run was not begun by calling the pipeline.
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
                f"the denoiser of {self._name} got a batch of {size} whose halves are the same latents, and guide does "
                f"not know its texts: it may be [unconditional, conditional] or two equal images. In a denoising loop "
                f"of your own say which: guide(..., cfg='batch') and `with guidance.run(timesteps):`"
            )
        if stated and size > 1 and kinds is not TextKind.PROMPT:
            raise self._unknown_layout(latents, None)
        return False

    def _check_one_text(self, latents: Any, stated: bool | None) -> None:
        """Raise a LayoutError for prompts that may hold the negative prompt too, as nothing says that they do not."""
        half = len(latents) // 2
        if self._calls or stated is not None or self._run.is_stock or len(latents) != 2 * half:
            return
        if _equal(latents[:half], latents[half:]):
            raise LayoutError(
                f"the denoiser of {self._name} got a batch of {len(latents)} whose halves are the same latents; say "
                f"whether they are two equal images, guide(..., cfg='none'), or both texts, guide(..., cfg='batch')"
            )

    def _stated_guidance(self) -> bool | None:
        """True if the pipeline says that it runs classifier-free guidance; None where it says nothing."""
        stated = self._run.setting("do_classifier_free_guidance")
        return None if stated is None else bool(stated)

    def _kinds(self, text: Any, size: int) -> tuple[TextKind, ...]:
        """The text of each sample; unknown where they are not one for each."""
        kinds = () if text is None else self._run.text.kinds(text)
        count, rest = divmod(len(kinds), size)
        if rest or not count:
            return (TextKind.UNKNOWN,) * size
        return tuple(common_kind(kinds[i * count : (i + 1) * count]) for i in range(size))

    def _verified(self, latents: Any, text: Any, timestep: Any) -> Batch:
        """The batch of both texts, whose halves are the same latents, with the texts where they belong."""
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
                f"the denoiser of {self._name} got a batch of {size} whose halves are the same latents, and guide does "
                f"not know their texts; say which half is the prompt's: guide(..., cfg='batch', conditional='first' or "
                f"'second')"
            )
        if conditional in _NOT_NEGATIVE and unconditional in _NOT_PROMPT:
            return batch
        if conditional is unconditional and self._cfg is not None:
            return batch  # one text serves as both
        if self._cfg is None and conditional in _NOT_PROMPT and unconditional in _NOT_NEGATIVE:
            return Batch(size, half, 0, not self._conditional_first)
        if conditional is unconditional:
            raise LayoutError(
                f"the denoiser of {self._name} got a batch of {size} whose halves have the same latents and the same "
                f"text; if they are the prompt's and the negative prompt's, which is the same text, say so: "
                f"guide(..., cfg='batch')"
            )
        raise LayoutError(
            f"the denoiser of {self._name} got a batch of {size} with {conditional.value} where guide expects the "
            f"prompt, and {unconditional.value} where it expects the negative prompt; it knows [unconditional, "
            f"conditional] and [conditional, unconditional]"
        )

    def _of_one_text(self, latents: Any, text: Any, timestep: Any) -> CallLayout:
        """The layout of a call for one of the two texts."""
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
                f"{self._name} called its denoiser three times at one timestep with the same latents; guide knows one "
                f"call for the prompt and one for the negative prompt"
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
        """True if a call with the text of the one before is for the negative prompt, as the user says."""
        return self._cfg == "separate" and before.text is kind

    def _twice(self, before: _PromptCall, kind: TextKind) -> LayoutError:
        """The error for a call for the prompt after another one with the same latents."""
        if before.text is kind:
            why = (
                "the same text; if the second call is for the negative prompt, which is the same text, say so: "
                "guide(..., cfg='separate')"
            )
        else:
            why = "another text before the prompt; guide needs the call for the prompt first"
        return LayoutError(f"{self._name} called its denoiser twice at one timestep with the same latents, and {why}")

    def _check_order(self) -> None:
        """Raise a LayoutError for two calls with unknown texts, unless it is stated which of them comes first."""
        if self._cfg is None and not self._run.is_stock:
            raise LayoutError(
                f"{self._name} called its denoiser twice at one timestep with the same latents, and guide does not "
                f"know the texts; if the first call is for the prompt and the second for the negative prompt, say so: "
                f"guide(..., cfg='separate')"
            )

    def _repeated(self, latents: Any, timestep: Any, kind: TextKind) -> _PromptCall | None:
        """The call for the prompt with the same latents at the same timestep, if there was one.

        Where no call for a negative prompt comes, and the text says so, only the very tensors are compared, which takes
        no time.
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
        """The call for the prompt to which one for the negative prompt belongs.

        Raises:
            LayoutError: where there is none, or where the user or the pipeline says that there is no such call.
        """
        if call is None:
            raise LayoutError(
                f"{self._name} called its denoiser for the negative prompt before it did for the prompt with the same "
                f"latents; guide needs the call for the prompt first"
            )
        if self._cfg == "none" or (self._cfg is None and self.expects_negative() is False):
            raise LayoutError(
                f"{self._name} called its denoiser twice at one timestep with the same latents, and says that it runs "
                f"without classifier-free guidance; if the second call is for the negative prompt, say so: "
                f"guide(..., cfg='separate')"
            )
        self._open.remove(call)
        self._last_pair = call
        self._missing = None
        return call

    def _check_missing(self, call: _PromptCall) -> None:
        """Note at the second timestep that no call for a negative prompt comes.

        Raises:
            LayoutError: where the pipeline says that one does, and a call with an unknown text may have been it.
        """
        if self._calls == 1 and not self._batches and self.expects_negative() is not False:
            self._missing = call
            return
        if self._missing is None or same_timestep(self._missing.timestep, call.timestep):
            return
        if self.expects_negative() and any(each.text is not TextKind.PROMPT for each in (*self._open, call)):
            raise LayoutError(
                f"{self._name} says that it runs classifier-free guidance, but its denoiser got no call for the "
                f"negative prompt after the one for the prompt, nor both in one batch"
            )
        self._missing, self._alone = None, self._cfg is None

    def _unknown_layout(self, latents: Any, samples: int | None) -> LayoutError:
        """The error for a batch that is laid out in another way, with its name where it has one."""
        size = len(latents)
        asked = "" if samples is None else f" for {_images(samples)}"
        known = ""
        if samples is not None:
            known = f"batches of {samples} (conditional) and {2 * samples} (unconditional, conditional)"
        reason = f"guide knows {known}" if known else "guide knows [unconditional, conditional]"
        if size % 2 == 0 and size > 2 and _equal(latents[0::2], latents[1::2]):
            reason = f"its samples are interleaved, [unconditional, conditional, unconditional, ...], where {reason}"
        elif size % 3 == 0 and samples is not None and size == 3 * samples:
            reason = f"it has three parts, where {reason}; a pipeline with a guidance of its own runs without guide"
        elif samples is not None and size % (2 * samples) == 0 and size > 2 * samples:
            reason = f"it holds several timesteps or views, where {reason}"
        elif size % 2 == 0:
            reason = f"its two halves are not the same latents, where {reason}"
        return LayoutError(f"the denoiser of {self._name} got a batch of {size}{asked}: {reason}")


_OF_CONTEXTS = {"cond": TextKind.PROMPT, "uncond": TextKind.NEGATIVE}  # diffusers' names of cache contexts
_NOT_NEGATIVE = (TextKind.PROMPT, TextKind.BOTH, TextKind.UNKNOWN)
_NOT_PROMPT = (TextKind.NEGATIVE, TextKind.BOTH, TextKind.UNKNOWN)


def _one_is_zero(text: Any) -> bool:
    """True if one half of the embeddings is zero and the other is not, which is how pipelines leave an image out."""
    if not isinstance(text, torch.Tensor) or len(text) % 2 or text.is_meta:
        return False
    first, second = (bool(half.any()) for half in text.chunk(2))
    return first != second


def _images(samples: int) -> str:
    return "1 image" if samples == 1 else f"{samples} images"


def _equal(latents: Any, others: Any) -> bool:
    """True if two batches of latents hold the same values. Waits for their device."""
    if latents is others:
        return True
    if len(latents) != len(others):
        return False
    if not isinstance(latents, torch.Tensor) or not isinstance(others, torch.Tensor):
        return all(_equal(a, b) for a, b in zip(latents, others, strict=True))
    if latents.shape != others.shape or latents.dtype != others.dtype:
        return False
    return latents.is_meta or bool(torch.equal(latents.detach(), others.detach()))

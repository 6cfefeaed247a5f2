# SPDX-License-Identifier: Apache-2.0
"""Self-attention of transformers is intercepted once per layer, for all processors, kernels and masks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

from segkern.integrations.diffusers import PAG, SEG, guide
from segkern.integrations.diffusers.runtime.branches import Batch
from tests.diffusers.slow_guidance import Perturbed, transformer_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, tiny_pipeline
from tests.diffusers.small_pipelines import run as run_unet
from tests.diffusers.transformer_cases import HEADS, MODELS, TEXT, run

TOKENS = TEXT + 6 * 4
FLUX = MODELS["flux"]
PIXART = MODELS["pixart-sigma"]


def slow(model: Any, pipe: Any, sigma: float | None = 1.5, **given: Any) -> torch.Tensor:
    return transformer_run(model, pipe, [Perturbed(3.0, sigma, model.modules)], lambda: run(model, pipe, **given))


class Twice(FluxAttnProcessor):
    """Attends to the image a second time, like style alignment and reference attention."""

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        super().__call__(attn, *args, **kwargs)
        return super().__call__(attn, *args, **kwargs)


def test_two_calls_on_the_images_tokens_are_refused_by_name() -> None:
    pipe = FLUX.build()
    pipe.transformer.set_attn_processor(Twice())
    plain = run(FLUX, pipe)
    words = rf"{__name__}.Twice calls attention twice.*which call"
    with pytest.raises(RuntimeError, match=words), guide(pipe, SEG(layers=FLUX.layers), trust=[Twice]):
        run(FLUX, pipe)
    assert torch.equal(run(FLUX, pipe), plain)


class Counting(FluxAttnProcessor):
    """Keeps state between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(attn, *args, **kwargs)


Counting.__call__.__signature__ = inspect.signature(FluxAttnProcessor.__call__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", [None, "_native_math"])
def test_a_processor_keeps_its_state(backend: str | None) -> None:
    """One processor serves all layers. Calls are independent and its kernel is unchanged."""
    pipe, own = FLUX.build(), Counting()
    expected = slow(FLUX, pipe)
    pipe.transformer.set_attn_processor(own)
    if backend is not None:
        own._attention_backend = backend
    before = dict(vars(own))
    with guide(pipe, SEG(sigma=1.5, layers=FLUX.layers), trust=[Counting]):
        assert vars(own) == before
        guided = run(FLUX, pipe, cfg=True)
        assert own.calls == 2 * 3 * 5  # for prompt and negative prompt, in every step, once per block
        assert vars(own) == before | {"calls": own.calls}
    assert relative(guided, expected) < PIPELINE_TOLERANCE
    assert all(processor is own for processor in pipe.transformer.attn_processors.values())


@pytest.mark.parametrize("how", ["model", "context"])
def test_the_report_names_a_kernel_that_guidance_replaced(how: str) -> None:
    pipe = FLUX.build()
    expected = slow(FLUX, pipe)
    with attention_backend(), guide(pipe, SEG(sigma=1.5, layers=FLUX.layers)) as active:
        run(FLUX, pipe)
        assert active.report().notes == ()
        if how == "context":
            with attention_backend("_native_math"):
                guided = run(FLUX, pipe)
        else:
            pipe.transformer.set_attention_backend("_native_math")
            guided = run(FLUX, pipe)
            assert {p._attention_backend for p in pipe.transformer.attn_processors.values()} == {"_native_math"}
    assert relative(guided, expected) < PIPELINE_TOLERANCE
    (note,) = active.report().notes
    assert (
        "layers b1, s1 used the attention kernels of PyTorch and segkern instead of the backend '_native_math'" in note
    )
    assert f"note: {note}" in str(active.report())
    assert active.report().to_dict()["notes"] == [note]


def test_the_report_names_a_sliced_unet() -> None:
    pipe = tiny_pipeline(own_unet=True)
    pipe.enable_attention_slicing()
    with guide(pipe, SEG()) as active:
        run_unet(pipe, latents=noise(1, 8, 12))
    assert "m0, m1 used" in active.report().notes[0]
    assert "instead of SlicedAttnProcessor's" in active.report().notes[0]


def _default(pipe: Any) -> None:
    pipe.transformer.set_default_attn_processor()
    assert {type(processor) for processor in pipe.transformer.attn_processors.values()} == {AttnProcessor}


def _sliced(pipe: Any) -> None:
    for name in PIXART.modules:
        pipe.transformer.get_submodule(name).set_attention_slice(1)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("change", [_default, _sliced])
@pytest.mark.parametrize("sigma", [1.5, math.inf, None], ids=str)
def test_processors_that_multiply_matrices(change: Callable[[Any], None], sigma: float | None) -> None:
    """Set before guidance or during it."""
    pipe, specs = PIXART.build(), [PAG(layers=2) if sigma is None else SEG(sigma=sigma, layers=2)]
    expected = slow(PIXART, pipe, sigma)
    own = dict(pipe.transformer.attn_processors)
    with guide(pipe, *specs):
        change(pipe)
        assert relative(run(PIXART, pipe), expected) < PIPELINE_TOLERANCE
        changed = dict(pipe.transformer.attn_processors)
    with guide(pipe, *specs):
        assert relative(run(PIXART, pipe), expected) < PIPELINE_TOLERANCE
        assert dict(pipe.transformer.attn_processors) == changed
        pipe.transformer.set_attn_processor(dict(own))
        assert relative(run(PIXART, pipe), expected) < PIPELINE_TOLERANCE


def test_one_that_leaves_out_the_layers_norms_is_refused() -> None:
    model = MODELS["hunyuan-dit"]
    pipe = model.build()
    words = "SlicedAttnProcessor, which computes attention without norms of queries and keys"
    pipe.transformer.blocks[1].attn1.set_processor(SlicedAttnProcessor(1))
    with pytest.raises(ValueError, match=words), guide(pipe, SEG(layers=1)):
        run(model, pipe)


MASKS = {
    "tokens": (TOKENS, TOKENS),
    "heads": (HEADS, TOKENS, TOKENS),
    "one": (1, 1, TOKENS, TOKENS),
    "samples": (2, HEADS, TOKENS, TOKENS),
    "keys of samples": (2, TOKENS),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_a_joint_attention(kind: str, share: bool) -> None:
    """A mask with one entry per sample follows its sample into the branches; a mask for all samples is unchanged."""
    pipe = FLUX.build()
    mask = 3.0 * torch.randn(MASKS[kind], generator=torch.Generator().manual_seed(4))
    counts = [2] if "samples" in kind else [1, 2]
    for samples in counts:
        given: dict[str, Any] = {"samples": samples, "joint_attention_kwargs": {"attention_mask": mask}}
        expected = slow(FLUX, pipe, **given)
        assert relative(run(FLUX, pipe, **given), run(FLUX, pipe, samples=samples)) > 1e-3
        with guide(pipe, SEG(sigma=1.5, layers=FLUX.layers), share=share):
            assert relative(run(FLUX, pipe, **given), expected) < PIPELINE_TOLERANCE


_STOCK = F.scaled_dot_product_attention


def quantised_attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **kwargs: Any) -> torch.Tensor:
    """A custom kernel. Like SageAttention, it ignores some arguments."""
    logits = query @ key.transpose(-2, -1) * (kwargs.get("scale") or query.shape[-1] ** -0.5)
    if kwargs.get("is_causal"):  # from text encoders
        logits = logits + torch.full(logits.shape[-2:], -math.inf).triu(1)
    return (logits if attn_mask is None else logits + attn_mask).softmax(dim=-1) @ value


def counted_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    """PyTorch's attention, called by another function."""
    return _STOCK(*args, **kwargs)


@pytest.mark.parametrize("spec", [SEG(sigma=2.0), SEG(), PAG()], ids=["blur", "mean", "identity"])
def test_a_replaced_attention_function_on_a_unet(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    with guide(pipe, spec):
        expected = run_unet(pipe, latents=noise(1, 8, 12))
        monkeypatch.setattr(F, "scaled_dot_product_attention", quantised_attention)
        assert relative(run_unet(pipe, latents=noise(1, 8, 12)), expected) < PIPELINE_TOLERANCE
    with guide(pipe, spec):
        assert relative(run_unet(pipe, latents=noise(1, 8, 12)), expected) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("name", ["flux", "sd3", "z-image"])
def test_a_replaced_attention_function_on_a_transformer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that calls PyTorch's attention works. Another is refused by name, and the pipeline is unchanged."""
    model = MODELS[name]
    pipe = model.build()
    plain, expected = run(model, pipe), slow(model, pipe)
    words = rf"replaced by {__name__}.quantised_attention, in which guidance.*set_attention_backend"
    with guide(pipe, SEG(sigma=1.5, layers=model.layers)):
        assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE
        monkeypatch.setattr(F, "scaled_dot_product_attention", counted_attention)
        assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE
        monkeypatch.setattr(F, "scaled_dot_product_attention", quantised_attention)
        with pytest.raises(RuntimeError, match=words):
            run(model, pipe)
        monkeypatch.setattr(F, "scaled_dot_product_attention", _STOCK)
        assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE
    assert torch.equal(run(model, pipe), plain)


def test_a_replaced_dispatch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_flux

    def dispatch(query: Any, key: Any, value: Any, **kwargs: Any) -> torch.Tensor:
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return quantised_attention(*heads_first).transpose(1, 2)

    pipe = FLUX.build()
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", dispatch)
    words = r"could not intercept the attention.*transformer_flux.FluxAttnProcessor"
    with pytest.raises(RuntimeError, match=words), guide(pipe, SEG(layers=FLUX.layers)):
        run(FLUX, pipe)


def _ip_adapter(pipe: Any) -> None:
    """Load an IP-Adapter without its image projection: image embeddings are passed to the processors unchanged."""
    torch.manual_seed(8)
    width = pipe.transformer.inner_dim
    adapted = {}
    for name, processor in pipe.transformer.attn_processors.items():
        double = not name.startswith("single")
        adapted[name] = FluxIPAdapterAttnProcessor(width, width, num_tokens=(6 * 4,)) if double else processor
    pipe.transformer.set_attn_processor(adapted)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_an_ip_adapter_of_a_joint_attention(backend: str, share: bool) -> None:
    """The image prompt has as many tokens as the image. It is loaded while the pipeline is guided."""
    pipe = FLUX.build()
    pictures = torch.randn(2, 6 * 4, pipe.transformer.inner_dim, generator=torch.Generator().manual_seed(4))
    given = {"ip_hidden_states": [pictures], "ip_adapter_masks": torch.ones(1, 1, 6, 4)}

    def draw() -> torch.Tensor:
        return run(FLUX, pipe, samples=2, joint_attention_kwargs=dict(given))

    with attention_backend(backend), guide(pipe, SEG(sigma=1.5, layers=FLUX.layers), share=share):
        without = run(FLUX, pipe, samples=2)
        _ip_adapter(pipe)
        own = [dict(vars(processor)) for processor in pipe.transformer.attn_processors.values()]
        guided = draw()
        assert own == [vars(processor) for processor in pipe.transformer.attn_processors.values()]
    assert relative(guided, without) > 1e-3
    expected = transformer_run(FLUX, pipe, [Perturbed(3.0, 1.5, FLUX.modules)], draw)
    assert relative(guided, expected) < PIPELINE_TOLERANCE


def test_what_an_argument_holds_for_all_samples_stays() -> None:
    """With a batch of one image, the size gives no information."""
    batch = Batch(1, 0, 1)
    masks, tokens, pictures = torch.ones(1, 2, 6, 4), torch.ones(7, 7), torch.ones(1, 4, 8)
    given = {"ip_adapter_masks": [masks], "attention_mask": tokens, "ip_hidden_states": [pictures], "scale": 0.5}
    for grown in (batch.grow(given, 1), batch.fit(given, 1)):
        assert grown["ip_adapter_masks"][0] is masks
        assert grown["attention_mask"] is tokens
        assert grown["ip_hidden_states"][0].shape == (2, 4, 8)
        assert grown["scale"] == 0.5

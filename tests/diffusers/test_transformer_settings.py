# SPDX-License-Identifier: Apache-2.0
"""Transformers under ``guide`` with other settings of pipelines and models."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.modular_pipelines import SequentialPipelineBlocks

from segkern.integrations.diffusers import PAG, SEG, TPG, guide
from tests.diffusers.slow_guidance import ChangedBlocks, Perturbed, transformer_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative
from tests.diffusers.transformer_cases import MODELS, run
from tests.diffusers.transformer_task_cases import DISTILLED, TASKS


def predictions(pipe: Any, draw: Any) -> list[torch.Tensor]:
    """Return the scheduler's inputs in the steps of ``draw()``."""
    seen: list[torch.Tensor] = []
    step = type(pipe.scheduler).step

    def noted(self: Any, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(output)
        return step(self, output, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.scheduler), "step", noted)
        draw()
    return seen


def test_skip_layer_guidance_of_stable_diffusion_3() -> None:
    """Its calls, a third call in some steps, are not steps. It uses the prediction without our guidance."""
    model = MODELS["sd3"]
    pipe = model.build()
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.7, "skip_layer_guidance_start": 0.1}

    def skipping() -> list[torch.Tensor]:
        return predictions(pipe, lambda: run(model, pipe, **options))

    def plain() -> list[torch.Tensor]:
        return predictions(pipe, lambda: run(model, pipe))

    without = skipping()[1], plain()[1]
    # Only in step 1 of 3, where both methods act on the same latents as without our guidance.
    with guide(pipe, SEG(layers=model.layers, scale=1.5, start=0.3, stop=0.6)) as active:
        guided = skipping()[1], plain()[1]
    assert {row.fired for row in active.report().layers} == {2}
    assert relative(without[0], without[1]) > 1e-3
    # Latents with and without skipping are equal only up to step 0, which skips nothing.
    assert relative(guided[0] - without[0], guided[1] - without[1]) < 1e-3


def test_cfg_normalization_of_z_image_measures_the_unguided_prediction() -> None:
    """Every prediction exceeds the limit, so the result has the conditional prediction's norm, also under guidance."""
    model = MODELS["z-image"]
    pipe = model.build()
    (plain, *_) = predictions(pipe, lambda: run(model, pipe, cfg_normalization=0.1))
    with guide(pipe, SEG(layers=model.layers)):
        (guided, *_) = predictions(pipe, lambda: run(model, pipe, cfg_normalization=0.1))
    assert guided.norm().item() == pytest.approx(plain.norm().item(), rel=PIPELINE_TOLERANCE)


@pytest.mark.parametrize("normalise", [True, False])
def test_cfg_truncation_of_lumina2(normalise: bool) -> None:
    """Late steps have no call for the negative prompt and no normalisation."""
    model = MODELS["lumina2"]
    pipe = model.build()

    def short() -> torch.Tensor:
        return run(model, pipe, samples=2, cfg_trunc_ratio=0.5, cfg_normalization=normalise)

    slow = Perturbed(2.0, 1.5, model.modules)
    expected = transformer_run(model, pipe, [slow], short, normalise=normalise)
    with guide(pipe, SEG(scale=2.0, sigma=1.5, layers=model.layers)) as active:
        assert relative(short(), expected) < PIPELINE_TOLERANCE < relative(run(model, pipe, samples=2), expected)
    assert {row.fired for row in active.report().layers} == {6}


def test_lumina2_needs_its_arguments() -> None:
    """A call of the class's function does not tell whether a step has a call for the negative prompt."""
    model = MODELS["lumina2"]
    pipe = model.build()
    given = model.call(6, 4, 1, True) | {"height": 96, "width": 64, "num_inference_steps": 2}
    kind: Any = type(pipe)
    refused = pytest.raises(ValueError, match="needs the cfg_trunc_ratio of this Lumina2Pipeline")
    with refused, guide(pipe, SEG(layers=model.layers)), torch.no_grad():
        kind.__call__.__wrapped__(pipe, output_type="latent", **given)


@pytest.mark.parametrize("scheduler", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_the_changing_scale_of_cogvideox(scheduler: str) -> None:
    """Its scale of classifier-free guidance changes in every step, which does not change what guidance adds."""
    model = MODELS["cogvideox"]
    pipe = model.build()
    pipe.scheduler = getattr(diffusers, scheduler)()

    def short() -> torch.Tensor:
        return run(model, pipe, samples=2, use_dynamic_cfg=True)

    expected = transformer_run(model, pipe, [Perturbed(2.0, 1.5, model.modules)], short)
    assert relative(short(), expected) > 10 * PIPELINE_TOLERANCE
    with guide(pipe, SEG(scale=2.0, sigma=1.5, layers=model.layers)):
        assert relative(short(), expected) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("kind", ["seg", "pag", "tpg"])
def test_fully_masked_text_of_chroma(kind: str) -> None:
    """Padding attends to nothing if the mask is boolean."""
    model = MODELS["chroma"]
    pipe = model.build()
    blocks = [module.rpartition(".")[0] for module in model.modules]
    tpg = TPG(scale=2.0, layers=model.layers)
    specs = {"seg": SEG(scale=2.0, sigma=1.5, layers=model.layers), "pag": PAG(scale=2.0, layers=model.layers)}

    def short() -> torch.Tensor:
        masks = {"prompt_attention_mask": torch.tensor([[True, True, True, False, False], [True] * 5])}
        return run(model, pipe, samples=2, **masks | {f"negative_{name}": mask for name, mask in masks.items()})

    def order(step: int, block: str, tokens: int) -> torch.Tensor:
        return tpg.order(step, ("s" if "single" in block else "b") + "1", tokens)

    entry = 1.5 if kind == "seg" else None
    slow: Any = Perturbed(2.0, entry, model.modules)
    if kind == "tpg":
        slow = ChangedBlocks(2.0, blocks, order, sequence=model.sequence)
    expected = transformer_run(model, pipe, [slow], short)
    assert bool(expected.isfinite().all())
    with guide(pipe, specs.get(kind, tpg)):
        assert relative(short(), expected) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("name", ["framepack", "flux2 editing"])
def test_a_shuffle_leaves_other_images_in_place(name: str) -> None:
    """Earlier frames come before the video, and images to edit come after the image."""
    model = TASKS[name]
    pipe = model.build()
    tpg = TPG(scale=2.0, layers=model.layers)
    blocks = [module.rpartition(".")[0] for module in model.modules]

    def order(step: int, block: str, tokens: int) -> torch.Tensor:
        return tpg.order(step, ("s" if "single" in block else "b") + "1", tokens)

    def short() -> torch.Tensor:
        return run(model, pipe, cfg=name not in DISTILLED)

    slow = ChangedBlocks(2.0, blocks, order, sequence=model.sequence)
    expected = transformer_run(model, pipe, [slow], short, cfg=name not in DISTILLED)
    assert relative(short(), expected) > 5 * PIPELINE_TOLERANCE
    with guide(pipe, tpg):
        assert relative(short(), expected) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("spec", [SEG(2.0, 1.5, layers="1-2"), PAG(2.0, layers="1-2"), TPG(2.0, layers="1-2")])
def test_captions_of_different_lengths_in_one_batch(spec: Any) -> None:
    """The image of each sample begins after its own caption. Reference: the samples one by one."""
    model = MODELS["lumina2"]
    denoiser = model.build().transformer
    mask = torch.ones(4, 5, dtype=torch.long)
    for sample, length in enumerate((2, 5, 4, 3)):  # two unconditional and two conditional samples
        mask[sample, length:] = 0
    images = torch.randn(2, 4, 12, 8).repeat(2, 1, 1, 1)
    texts, time = torch.randn(4, 5, 12), torch.full((4,), 0.4)

    def prediction(samples: list[int]) -> torch.Tensor:
        given = {"encoder_hidden_states": texts[samples], "encoder_attention_mask": mask[samples]}
        longest = int(given["encoder_attention_mask"].sum(1).max())
        given = {name: value[:, :longest] for name, value in given.items()}
        output: torch.Tensor = denoiser(images[samples], time[samples], **given, return_dict=False)[0]
        return output

    with torch.no_grad():
        plain = prediction([0, 1, 2, 3])
        with guide(denoiser, spec, cfg="batch") as guidance, guidance.run([0.4]):
            together = prediction([0, 1, 2, 3])
        alone = []
        for sample in (2, 3):
            with guide(denoiser, spec, cfg="none") as guidance, guidance.run([0.4]):
                alone.append(prediction([sample]))
    assert relative(together[2:], torch.cat(alone)) < PIPELINE_TOLERANCE < relative(together[2:], plain[2:])
    assert relative(together[:2] - plain[:2], together[2:] - plain[2:]) < 1e-3


def test_the_key_value_cache_of_flux2_is_refused() -> None:
    """In its first call, tokens of reference images come before the image. Later calls have only their keys."""
    model = TASKS["flux2-klein-kv"]
    pipe = model.build()
    image = TASKS["flux2-klein editing"].call(6, 4, 1, False)["image"][0]
    refused = pytest.raises(ValueError, match="does not support the key-value cache of a Flux2Transformer2DModel")
    with refused, guide(pipe, SEG(layers=model.layers)):
        run(model, pipe, cfg=False, image=image)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_cache_is_refused(name: str) -> None:
    """A cache returns results of earlier calls with another batch."""
    model = MODELS[name]
    pipe = model.build()
    cache = diffusers.FirstBlockCacheConfig(threshold=0.1)
    pipe.transformer.enable_cache(cache)
    with pytest.raises(ValueError, match=r"with a cache.*disable_cache"):
        guide(pipe, SEG(layers=model.layers))
    pipe.transformer.disable_cache()
    with guide(pipe, SEG(layers=model.layers)):
        run(model, pipe)
        pipe.transformer.enable_cache(cache)
        with pytest.raises(ValueError, match="with a cache"):
            run(model, pipe)


def test_between_forwards_processors_are_the_models_own() -> None:
    """Code that inspects or changes them finds the original processors."""
    model = MODELS["flux"]
    pipe = model.build()
    own = dict(pipe.transformer.attn_processors)
    with attention_backend(), guide(pipe, SEG(layers=model.layers)):
        assert dict(pipe.transformer.attn_processors) == own
        run(model, pipe)
        assert dict(pipe.transformer.attn_processors) == own
        expected = run(model, pipe)
        with attention_backend("_native_math"):
            assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE
        pipe.transformer.set_attention_backend("_native_math")
        assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE
    assert all(processor._attention_backend == "_native_math" for processor in own.values())


def test_several_images_in_a_list_have_one_size() -> None:
    model = MODELS["z-image"]
    pipe = model.build()
    loop = guide(pipe.transformer, SEG(layers=model.layers), cfg="none")
    with loop.run([0.0]):
        images = [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 12)]
        with pytest.raises(ValueError, match=r"images of the same size.*\(4, 1, 8, 12\)"):
            pipe.transformer(images, torch.zeros(2), [torch.randn(5, 12)] * 2)
        with guide(pipe, SEG(layers=model.layers)) as active:
            run(model, pipe)
    assert active.report().layers[0].fired == 3
    with pytest.warns(UserWarning, match="fired in none of 1 denoiser calls"):
        loop.remove()


def test_modular_pipelines_have_guiders() -> None:
    with pytest.raises(ValueError, match="in a modular pipeline, guidance is a component; see SEGGuider"):
        guide(SequentialPipelineBlocks().init_pipeline(), SEG(layers=1))

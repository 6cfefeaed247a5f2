# SPDX-License-Identifier: Apache-2.0
"""Guiders: refusals, restored state, saved configurations, and compiled denoisers."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLAutoBlocks,
)
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from segkern.integrations.diffusers import (
    PAG,
    SAG,
    SEG,
    PAGGuider,
    SAGGuider,
    SEGAttnProcessor,
    SEGGuider,
    SLGGuider,
    TPGGuider,
    guide,
    list_layers,
)
from segkern.integrations.diffusers.runtime.denoiser_lock import denoiser_lock
from tests.diffusers.modular_pipelines import modular_sdxl, modular_transformer, run_sdxl
from tests.diffusers.probes import hooks_of
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, smaller_pipeline, tiny_pipeline
from tests.diffusers.subjects import failing
from tests.diffusers.transformer_cases import MODELS

LATENTS = noise(1, 8, 12)


class Stop(Exception):
    pass


def fail(*_: Any) -> None:
    raise Stop


def is_untouched(pipe: Any, processors: dict[str, Any]) -> bool:
    now = pipe.unet.attn_processors
    return hooks_of(pipe.unet) == 0 and all(now[name] is processor for name, processor in processors.items())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt], ids=lambda error: error.__name__)
@pytest.mark.parametrize("guider", [SEGGuider(guidance_scale=5.0), SAGGuider(guidance_scale=5.0)], ids=["SEG", "SAG"])
def test_an_exception_in_the_denoiser_leaves_it_as_it_was(guider: Any, error: type[BaseException]) -> None:
    pipe = tiny_pipeline()
    processors = dict(pipe.unet.attn_processors)
    modular = modular_sdxl(pipe, guider)
    expected = run_sdxl(modular, pipe, latents=LATENTS)
    with failing(pipe.unet.up_blocks[0], error), pytest.raises(error):
        run_sdxl(modular, pipe, latents=LATENTS)
    if error is KeyboardInterrupt:  # PyTorch then calls no hooks, and the next run would begin with this state
        guider.cleanup_models(pipe.unet)
    assert is_untouched(pipe, processors)
    assert torch.equal(run_sdxl(modular, pipe, latents=LATENTS), expected)


def test_hooks_whose_call_never_came_do_nothing_in_another_run() -> None:
    class Failing(SEGGuider):
        def prepare_models(self, denoiser: Any) -> None:
            super().prepare_models(denoiser)
            if self._step == 1:
                raise Stop  # like a ControlNet that runs out of memory

    pipe = tiny_pipeline()
    processors, plain = dict(pipe.unet.attn_processors), run(pipe, latents=LATENTS)
    modular = modular_sdxl(pipe, Failing(guidance_scale=5.0))
    for _ in range(2):
        with pytest.raises(Stop):
            run_sdxl(modular, pipe, latents=LATENTS)
    modular.update_components(guider=ClassifierFreeGuidance(5.0))
    assert relative(run_sdxl(modular, pipe, latents=LATENTS), plain) < PIPELINE_TOLERANCE
    assert is_untouched(pipe, processors)


@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "with a ControlNet's residuals"])
def test_a_loop_of_ones_own(controlled: bool) -> None:
    """Compares with layers whose processors are set manually."""
    pipe = tiny_pipeline(own_unet=True)
    text, _, pooled, _ = pipe.encode_prompt("a red fox")
    ids = torch.tensor([[64.0, 96.0, 0.0, 0.0, 64.0, 96.0]])
    given: dict[str, Any] = {}
    if controlled:
        shapes: list[torch.Size] = []
        blocks = [pipe.unet.conv_in, *pipe.unet.down_blocks, pipe.unet.mid_block]
        seen = [block.register_forward_hook(lambda _, __, out: shapes.extend(shapes_of(out))) for block in blocks]
    guider = SEGGuider(guidance_scale=1.0, scale=2.0, layers=["mid", "u0"])

    def predict(guider: Any, keep: int | None = None) -> Any:
        guider.set_state(0, 1, torch.tensor(999.0))
        (batch,) = guider.prepare_inputs({"text": (text, None), "pooled": (pooled, None)})
        guider.prepare_models(pipe.unet)
        added = {"text_embeds": batch.pooled, "time_ids": ids}
        output = pipe.unet(LATENTS, 999, encoder_hidden_states=batch.text, added_cond_kwargs=added, **given)[0]
        batch.noise_pred = output[:keep]
        guider.cleanup_models(pipe.unet)
        return guider([batch])

    with torch.no_grad():
        plain = predict(ClassifierFreeGuidance(1.0)).pred
        if controlled:
            for handle in seen:
                handle.remove()
            *down, mid = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
            given = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
            plain = predict(ClassifierFreeGuidance(1.0)).pred
        guided = predict(guider)
        assert relative(guided.pred_cond, plain) < PIPELINE_TOLERANCE
        for layer in list_layers(pipe, 8 * pipe.vae_scale_factor, 12 * pipe.vae_scale_factor):
            if layer.name in ("m0", "m1", "u0"):
                pipe.unet.get_submodule(layer.module).set_processor(SEGAttnProcessor(math.inf, layer.grid))
        perturbed = predict(ClassifierFreeGuidance(1.0)).pred
        assert relative(plain, perturbed) > 1e-3
        assert relative(guided.pred, plain + 2.0 * (plain - perturbed)) < PIPELINE_TOLERANCE
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        with pytest.raises(RuntimeError, match=r"1 predictions and as many perturbed ones.*received 1"):
            predict(guider, keep=1)
        with pytest.raises(ValueError, match="SAGGuider needs the pipeline's scheduler"):
            predict(SAGGuider(guidance_scale=1.0))


def shapes_of(output: Any) -> list[torch.Size]:
    """Return the shapes of a block's outputs for the up blocks."""
    if isinstance(output, tuple):
        return [skip.shape for skip in output[1]]
    return [output.shape]


def test_a_guider_that_is_not_asked_to_prepare_says_so() -> None:
    guider = SEGGuider(guidance_scale=1.0)
    guider.set_state(0, 1, torch.tensor(1.0))
    (batch,) = guider.prepare_inputs({"text": (torch.ones(1), None)})
    batch.noise_pred = torch.ones(1)
    with pytest.raises(RuntimeError, match="call prepare_models before each"):
        guider([batch])


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (SEGGuider, {"sigma": -1.0}, "SEG.sigma must be 0 .*got -1.0"),
        (SEGGuider, {"sigma": "large"}, "SEG.sigma must be 0 .*got 'large'"),
        (SEGGuider, {"scale": "3"}, "SEG.scale must be a finite number, got '3'"),
        (SEGGuider, {"layers": []}, r"SEG.layers must be a layer name.*got \[\]"),
        (SEGGuider, {"start": 0.8, "stop": 0.2}, "start=0.8, stop=0.2"),
        (SEGGuider, {"guidance_scale": None}, "SEGGuider.guidance_scale must be a finite number, got None"),
        (PAGGuider, {"guidance_rescale": math.nan}, "PAGGuider.guidance_rescale must be a finite number, got nan"),
        (PAGGuider, {"guidance_start": 0.5, "guidance_stop": 0.5}, "PAGGuider.guidance_start.*got 0.5 and 0.5"),
        (SEGGuider, {"spec": PAG()}, r"SEGGuider needs a SEG\(...\) spec or its arguments, got PAG"),
        (
            SAGGuider,
            {"spec": SAG(), "scale": 1.0, "layer": "m0"},
            "a spec or its arguments, got both SAG.*layer, scale",
        ),
    ],
)
def test_errors_quote_what_does_not_fit(kind: type, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**given)


def test_denoisers_and_layers_that_do_not_fit() -> None:
    pipe = tiny_pipeline()
    processors = dict(pipe.unet.attn_processors)
    for guider, message in [
        (SEGGuider(layers="m7"), "unknown layer 'm7'; valid names are 'down'"),
        (SEGGuider(sigma={"mid": 1.0}, layers="d0"), "SEG.sigma has no entry for layer d0"),
        (SEGGuider(sigma=[1.0, 2.0, 3.0]), "SEG.sigma has 3 entries, one per sample, for a batch with 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_sdxl(modular_sdxl(pipe, guider), pipe, latents=LATENTS)
        assert is_untouched(pipe, processors)
    guider = SEGGuider()
    modular = modular_sdxl(pipe, guider)
    run_sdxl(modular, pipe, latents=LATENTS)
    guidance = guide(pipe, PAG())
    hooks = hooks_of(pipe.unet)
    with pytest.raises(ValueError, match=r"under guide\(...\)"):
        run_sdxl(modular, pipe, latents=LATENTS)
    assert pipe.unet.attn_processors == processors
    assert hooks_of(pipe.unet) == hooks > 0
    guidance.remove()
    with pytest.raises(ValueError, match=r"segkern guides pipelines with .*got Linear"):
        guider.prepare_models(torch.nn.Linear(1, 1))
    sd3 = MODELS["sd3"].build()
    with pytest.raises(ValueError, match="SAG needs a UNet2DConditionModel; a SD3Transformer2DModel supports"):
        SAGGuider().prepare_models(sd3.transformer)
    flow = tiny_pipeline(scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    with pytest.raises(ValueError, match=r"SAG needs a scheduler with alphas_cumprod.*UniPC"):
        run_sdxl(modular_sdxl(flow, SAGGuider()), pipe, latents=LATENTS)
    with pytest.raises(RuntimeError, match="SEGGuider has nothing to report"):
        SEGGuider().report()


@pytest.mark.parametrize(
    "guider",
    [
        SEGGuider(),
        SEGGuider(guidance_scale=5.0, scale=2.0, sigma=2.5, layers=range(3, 6), stop=0.5, boundary="circular"),
        SEGGuider(sigma={"mid": math.inf, "u0-1": [1.0, 2.0]}, schedule="cosine", query_stride=1, guidance_stop=0.7),
        SEGGuider(sigma=[[1.0, math.inf]], layers=["d0", 4], use_original_formulation=True, enabled=False),
        PAGGuider(adaptive_scale=0.01, reuse=2, guidance_rescale=0.7),
        SAGGuider(layer="d0", threshold=0.5),
        SLGGuider(layers=range(3, 6), count=2, seed=3),
        TPGGuider(seed=5, start=0.1),
    ],
    ids=lambda guider: str(guider.spec),
)
def test_a_configuration_is_saved_and_loaded(guider: Any, tmp_path: Any) -> None:
    guider.save_pretrained(tmp_path)
    (file,) = tmp_path.iterdir()
    json.loads(file.read_text(), parse_constant=fail)  # no number that JSON does not have
    kind = type(guider)
    own = ("guidance_scale", "guidance_rescale", "use_original_formulation", "_start", "_stop", "_enabled")
    for copied in (
        kind.from_pretrained(tmp_path),
        kind.from_config(guider.config),
        kind.from_config(json.loads(guider.to_json_string())),
        guider.new(),
        copy.deepcopy(guider),
    ):
        assert type(copied) is kind
        assert copied.spec == guider.spec
        assert repr(copied.spec) == repr(guider.spec)
        assert [getattr(copied, name) for name in own] == [getattr(guider, name) for name in own]
        assert repr(copied) == repr(guider)


def test_a_configuration_with_fields_of_an_earlier_version_loads() -> None:
    config = {**SEGGuider(scale=2.0).config, "tolerance": 2.0**-8, "sigma_frames": 0.0}
    assert SEGGuider.from_config(config).spec == SEG(scale=2.0)


def test_a_new_guider_differs_in_what_is_given() -> None:
    guider = SEGGuider(guidance_scale=5.0, scale=3.0, sigma=2.0, layers="d0", guidance_rescale=0.5)
    other = guider.new(scale=1.0, layers="mid")
    assert other.spec == SEG(scale=1.0, sigma=2.0, layers="mid")
    assert (other.guidance_scale, other.guidance_rescale) == (5.0, 0.5)
    assert guider.new(spec=SEG(stop=0.5), guidance_scale=1.0).spec == SEG(stop=0.5)
    assert SEGGuider.from_config(guider.config, sigma=math.inf).spec == SEG(scale=3.0, layers="d0")
    with pytest.raises(TypeError, match="sigmas"):
        guider.new(sigmas=3.0)


def test_a_function_as_schedule_is_kept_but_not_saved(tmp_path: Any) -> None:
    guider = SEGGuider(schedule=math.cos)
    assert guider.new(scale=1.0).spec.schedule is math.cos
    assert '"schedule": "cos"' in repr(guider)
    with pytest.raises(ValueError, match="SEGGuider cannot save a function as schedule, got <built-in function cos>"):
        guider.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_default_layers_are_those_of_the_model() -> None:
    guider = SEGGuider.from_config(json.loads(SEGGuider().to_json_string()))
    for name in ("sd3", "qwen-image"):
        pipe = MODELS[name].build()
        modular_transformer(name, pipe, guider)
        guider.set_state(0, 3, torch.tensor(1.0))
        guider.prepare_models(pipe.transformer)
        guider.cleanup_models(pipe.transformer)
        with pytest.warns(UserWarning, match="fired in none of 1 denoiser calls"):
            assert [row.layer for row in guider.report().layers] == ["b2"]


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.slow
def test_a_compiled_denoiser_is_compiled_once_for_each_call_of_a_step() -> None:
    pipe, counter = smaller_pipeline(), CompileCounter()
    guider = SEGGuider(guidance_scale=5.0, scale=2.0, layers="m0")
    modular = modular_sdxl(pipe, guider)
    expected = run_sdxl(modular, pipe, latents=LATENTS)
    plain = run(pipe, latents=LATENTS)
    pipe.unet.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        assert relative(run_sdxl(modular, pipe, latents=LATENTS), expected) < PIPELINE_TOLERANCE
        assert counter.frame_count == 2
    modular.update_components(guider=ClassifierFreeGuidance(5.0))
    assert relative(run_sdxl(modular, pipe, latents=LATENTS), plain) < PIPELINE_TOLERANCE
    assert counter.frame_count == 2


def test_a_denoiser_in_the_wrapper_of_a_compiler() -> None:
    pipe = smaller_pipeline()
    guider = SEGGuider(guidance_scale=5.0, scale=2.0, layers="m0")
    expected = run_sdxl(modular_sdxl(pipe, guider), pipe, latents=LATENTS)
    model = pipe.unet
    pipe.unet = torch.compile(model)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(run_sdxl(modular_sdxl(pipe, guider), pipe, latents=LATENTS), expected)
    assert hooks_of(pipe.unet) == hooks_of(model) == 0
    assert all(row.fired == 3 for row in guider.report().layers)


def test_the_page_has_an_example_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "SEGGuider" in block)
    stock = tiny_pipeline()
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe.update_components(**{name: getattr(stock, name) for name in names})
    pipe.set_progress_bar_config(disable=True)
    for given, small in (("height=832, width=1216", "height=64, width=96, num_inference_steps=5"),):
        assert given in example
        example = example.replace(given, small)
    scope: dict[str, Any] = {"modular": pipe}
    exec(example, scope)
    assert scope["image"].size == (96, 64)
    assert "10 denoiser calls" in capsys.readouterr().out


def test_an_argument_that_its_spec_does_not_take_is_refused() -> None:
    for value in (None, 2.0):
        with pytest.raises(TypeError, match="SEGGuider got an unexpected argument 'sclae'; its spec accepts scale, "):
            SEGGuider(sclae=value)
    for name in ("schedular", "trusts"):
        with pytest.raises(TypeError, match=f"unexpected argument '{name}'"):
            SEGGuider().new(**{name: None})
    with pytest.raises(ValueError, match=r"trust must be a list of classes or functions.*got 'Own'"):
        SEGGuider(trust="Own")


class Own(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda guider: guider.new(scale=2.0), lambda guider: pickle.loads(pickle.dumps(guider))],
    ids=["deepcopy", "new", "pickle"],
)
def test_trust_and_the_scheduler_are_kept(copied: Callable[[Any], Any]) -> None:
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Own())
    guider = copied(SEGGuider(guidance_scale=5.0, scale=2.0, scheduler=pipe.scheduler, trust=[Own]))
    assert type(guider.scheduler) is type(pipe.scheduler)
    assert guider.trust == (Own,)
    with pytest.raises(ValueError, match=r"guider.trust = \[Own\]"):
        run_sdxl(modular_sdxl(pipe, SEGGuider(guidance_scale=5.0, scale=2.0)), pipe, latents=LATENTS)
    guided = run_sdxl(modular_sdxl(pipe, guider), pipe, latents=LATENTS)
    with guide(pipe, SEG(scale=2.0), trust=[Own]):
        assert relative(run(pipe, latents=LATENTS), guided) < PIPELINE_TOLERANCE
    guider.trust = ()
    with pytest.raises(ValueError, match=r"guider.trust = \[Own\]"):
        run_sdxl(modular_sdxl(pipe, guider), pipe, latents=LATENTS)


def predictions(unet: Any, guider: Any, given: dict[str, Any], steps: int = 1) -> torch.Tensor:
    """Return the predictions of a guider's calls in a custom loop."""
    for step in range(steps):
        guider.set_state(step, steps, torch.tensor(999.0))
        (batch,) = guider.prepare_inputs({"text": (given["encoder_hidden_states"], None)})
        guider.prepare_models(unet)
        batch.noise_pred = unet(LATENTS, 999, **given)[0]
        guider.cleanup_models(unet)
        prediction: torch.Tensor = guider([batch]).pred
    return prediction


def own_arguments(pipe: Any) -> dict[str, Any]:
    text, _, pooled, _ = (x.detach() for x in pipe.encode_prompt("a red fox"))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 96.0, 0.0, 0.0, 64.0, 96.0]])}
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


@pytest.mark.parametrize("kind", [SEGGuider, PAGGuider])
def test_guiders_of_two_threads_share_a_denoiser(kind: Any) -> None:
    pipe = smaller_pipeline()
    given = own_arguments(pipe)
    scales = (1.0, 4.0)
    expected = [predictions(pipe.unet, kind(guidance_scale=1.0, scale=s, layers="m0"), given) for s in scales]
    assert relative(expected[0], expected[1]) > 1e-4
    with ThreadPoolExecutor(2) as pool:
        guiders = [kind(guidance_scale=1.0, scale=scale, layers="m0") for scale in scales]
        drawn = list(pool.map(lambda guider: predictions(pipe.unet, guider, given, steps=8), guiders))
    for prediction, alone in zip(drawn, expected, strict=True):
        assert relative(prediction, alone) < PIPELINE_TOLERANCE
    assert hooks_of(pipe.unet) == 0
    assert not denoiser_lock(pipe.unet).is_held_here


def test_gradients_under_checkpointing() -> None:
    pipe = smaller_pipeline()
    given = own_arguments(pipe)
    parameter = next(iter(pipe.unet.mid_block.parameters()))

    def gradient() -> torch.Tensor:
        parameter.grad = None
        guider = SEGGuider(guidance_scale=1.0, scale=2.0, sigma=1.0, layers="m0")
        predictions(pipe.unet, guider, given).square().sum().backward()
        assert parameter.grad is not None
        return parameter.grad

    expected = gradient()
    pipe.unet.enable_gradient_checkpointing()
    assert relative(gradient(), expected) < 1e-6
    latents = LATENTS.clone().requires_grad_(True)
    for reentrant in (False, True):
        guider = SEGGuider(guidance_scale=1.0, layers="m0")
        guider.set_state(0, 1, torch.tensor(999.0))
        guider.prepare_inputs({"text": (given["encoder_hidden_states"], None)})
        guider.prepare_models(pipe.unet)
        with pytest.raises(RuntimeError, match=r"under torch.utils.checkpoint.*enable_gradient_checkpointing"):
            checkpoint(lambda x: pipe.unet(x, 999, **given)[0], latents, use_reentrant=reentrant)
        assert hooks_of(pipe.unet) == 0
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(RuntimeError, match="does not support gradient checkpointing inside compiled code"):
        gradient()


def test_a_subclass_may_have_arguments_of_its_own() -> None:
    class Strong(SEGGuider):
        spec_class = SEG

        def __init__(self, strength: float = 4.0) -> None:
            super().__init__(SEG(scale=strength))

    assert Strong(strength=5.0).spec.scale == 5.0

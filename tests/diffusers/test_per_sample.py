# SPDX-License-Identifier: Apache-2.0
"""Tensors with one entry per sample, on modules and in arguments for processors: supported, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection, MultiIPAdapterImageProjection

from segkern.integrations.diffusers import CFG, PAG, SAG, SEG, guide
from tests.diffusers import unet_cases
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.subjects import failing
from tests.diffusers.test_pag_pipelines import other
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.transformer_cases import run as run_transformer
from tests.diffusers.unet_image_cases import IMAGES

CASE = IMAGES["sd1-ip-adapter"]
IDS = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))  # of no face and of a face
CLIP = torch.randn(2, 1, 7, 10, generator=torch.Generator().manual_seed(9))


class ByFace(IPAdapterFaceIDPlusImageProjection):
    """Finds the embeddings of each sample by its face, independently of those on the projection."""

    def forward(self, id_embeds: torch.Tensor) -> torch.Tensor:
        faces = id_embeds.reshape(len(id_embeds), -1)
        rows = [int((IDS.flatten(1) - face).abs().sum(1).argmin()) for face in faces]
        self.clip_embeds = CLIP[rows]
        return super().forward(id_embeds)


def face_pipeline(kind: type = IPAdapterFaceIDPlusImageProjection) -> tuple[Any, Any]:
    """Return a pipeline with an IP-Adapter FaceID Plus, and its projection."""
    pipe = CASE.build(CASE)
    torch.manual_seed(0)
    sizes = {"embed_dims": 24, "output_dims": 24, "hidden_dims": 10, "id_embeddings_dim": 8}
    projection = kind(**sizes, depth=1, dim_head=8, heads=2, num_tokens=4).eval()
    for parameter in projection.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    projection.shortcut = True
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    return pipe, projection


def draw(pipe: Any, projection: Any, images: int, cfg: bool) -> torch.Tensor:
    projection.clip_embeds = CLIP[[0] * images * cfg + [1] * images]  # a pipeline has one face for all its prompts
    return pipe(
        **unet_cases.embeds(CASE, images, cfg),
        ip_adapter_image_embeds=[IDS if cfg else IDS[1:]],
        guidance_scale=5.0 if cfg else 1.0,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).images


def negative() -> CFG:
    return CFG(negative_prompt_embeds=torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(2)))


KINDS = {
    "PAG": ((PAG(),), True),
    "PAG down": ((PAG(layers="down"),), True),
    "SEG, without sharing": ((SEG(sigma=1.0),), False),
    "SAG": ((SAG(),), True),
    "SAG, SEG": ((SAG(), SEG()), False),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize("kind", [*KINDS, "CFG", "CFG, PAG, SAG"])
def test_embeddings_of_faces_follow_their_samples(kind: str, cfg: bool, images: int) -> None:
    if kind.startswith("CFG") and cfg:
        pytest.skip("CFG(...) is refused beside the pipeline's own classifier-free guidance")
    specs, share = KINDS.get(kind, ((negative(), *((PAG(), SAG()) if "," in kind else ())), True))
    results = []
    for projection_kind in (IPAdapterFaceIDPlusImageProjection, ByFace):
        pipe, projection = face_pipeline(projection_kind)
        with guide(pipe, *specs, share=share, trust=[ByFace]):
            results.append(draw(pipe, projection, images, cfg))
        if projection_kind is IPAdapterFaceIDPlusImageProjection:
            own = CLIP[[0] * images * cfg + [1] * images]
            assert torch.equal(projection.clip_embeds, own)
    assert relative(*results) < PIPELINE_TOLERANCE


def test_embeddings_of_faces_in_diffusers_pag() -> None:
    pipe, projection = face_pipeline(ByFace)
    theirs = other(StableDiffusionPAGPipeline, pipe, "mid_block.*attentions")
    given = unet_cases.embeds(CASE, 1, True) | {"ip_adapter_image_embeds": [IDS], "guidance_scale": 5.0}
    given |= {"num_inference_steps": 2, "output_type": "latent"}
    expected = theirs(**given, pag_scale=3.0, generator=torch.Generator().manual_seed(5)).images
    pipe, projection = face_pipeline()
    projection.clip_embeds = CLIP
    for share in (True, False):
        with guide(pipe, PAG(), share=share):
            ours = pipe(**given, generator=torch.Generator().manual_seed(5)).images
        assert relative(ours, expected) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("spec", [SEG(), SAG()], ids=str)
def test_embeddings_of_faces_are_put_back_after_an_exception(spec: Any, error: type[BaseException]) -> None:
    pipe, projection = face_pipeline()
    with guide(pipe, spec, share=False):
        expected = draw(pipe, projection, 1, True)
        # A hook after the first call of a step runs in SAG's second call.
        with failing(pipe.unet.conv_out, error, after=isinstance(spec, SAG)), pytest.raises(error):
            draw(pipe, projection, 1, True)
        if error is ZeroDivisionError:
            assert torch.equal(projection.clip_embeds, CLIP)
        assert torch.equal(draw(pipe, projection, 1, True), expected)
    assert torch.equal(projection.clip_embeds, CLIP)


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("value", [torch.ones(2, 1, 1), {"boxes": [torch.ones(2, 1, 1)]}], ids=["tensor", "nested"])
def test_unknown_tensors_for_processors_are_refused_by_name(value: Any, start: float) -> None:
    pipe, steps = tiny_pipeline(own_unet=True), []
    with guide(pipe, PAG(start=start)):
        with pytest.raises(ValueError, match=r"cross_attention_kwargs\['regions'\] of this UNet2DConditionModel"):
            run(
                pipe,
                latents=noise(),
                cross_attention_kwargs={"scale": 1.0, "regions": value},
                callback_on_step_end=lambda *given: steps.append(given) or {},
            )
        with pytest.raises(ValueError, match=r"cross_attention_kwargs\['gligen'\].*GLIGEN's boxes"):
            run(pipe, latents=noise(), cross_attention_kwargs={"gligen": {"boxes": torch.ones(2, 30, 4)}})
        run(pipe, latents=noise(), cross_attention_kwargs={"scale": 1.0})
    assert not steps


def test_unknown_tensors_for_processors_of_transformers() -> None:
    model = MODELS["flux"]
    pipe = model.build()
    with guide(pipe, PAG(layers=model.layers)):
        with pytest.raises(ValueError, match=r"joint_attention_kwargs\['regions'\] of this FluxTransformer2DModel"):
            run_transformer(model, pipe, joint_attention_kwargs={"regions": torch.ones(1, 3)})
        run_transformer(model, pipe, joint_attention_kwargs={"name": "none"})


def test_a_module_that_keeps_a_tensor_for_each_sample_is_refused_by_name() -> None:
    pipe, steps = tiny_pipeline(own_unet=True), []
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.weights = torch.tensor([1.0, 2.0])
    with guide(pipe, PAG(start=0.5)):
        with pytest.raises(ValueError, match=r"mid_block\S+ of .*BasicTransformerBlock, has a tensor 'weights'.*2"):
            run(pipe, latents=noise(), callback_on_step_end=lambda *given: steps.append(given) or {})
        run(pipe, ["a fox", "a boat"], latents=noise(2))
    with guide(pipe, PAG(), trust=[type(block)]):
        run(pipe, latents=noise())
    with guide(pipe, PAG(layers="up")):
        run(pipe, latents=noise())
    assert not steps

# SPDX-License-Identifier: Apache-2.0
"""A small random checkpoint of each supported transformer, its pipeline, and how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

TEXT = 5  # tokens of a prompt
HEADS, HEAD_DIM, BLOCKS = 2, 8, 4
WIDTH = HEADS * HEAD_DIM


@dataclass(frozen=True)
class TransformerCase:
    """One architecture and its text pipeline.

    Attributes:
        name: Name of the pipeline class.
        build: Creates a pipeline without text encoders and VAE.
        call: Returns arguments of a pipeline call for rows and columns of tokens, samples, and whether to use
            classifier-free guidance.
        layers: Layers to perturb, not starting at the first block.
        modules: Module names of these layers.
        start: First image token in each of these layers, the same for all samples or one per sample.
        sequence: Lists of blocks whose hidden states include the tokens before the image.
        frames: Number of latent frames.
        factor: Side of a token in pixels.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[[int, int, int, bool], dict[str, Any]]
    layers: Any
    modules: tuple[str, ...]
    start: int | tuple[int, ...] = 0
    sequence: tuple[str, ...] = ()
    frames: int = 1
    factor: int = 16


def pipeline(kind: type, transformer: torch.nn.Module, scheduler: Any, **parts: Any) -> Any:
    for parameter in transformer.parameters():
        if parameter.std() == 0:  # some layers are initialised as identity or zero, which would hide effects
            torch.nn.init.normal_(parameter, std=0.2)
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    import inspect

    taken = inspect.signature(kind.__init__).parameters
    none = {name: None for name in names if name in taken and name not in parts}
    pipe = kind(transformer=transformer.eval(), scheduler=scheduler, **none, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _text(samples: int, channels: int, seed: int, tokens: int = TEXT) -> torch.Tensor:
    return torch.randn(samples, tokens, channels, generator=torch.Generator().manual_seed(seed))


def _embeds(samples: int, cfg: bool, channels: int, pooled: int = 0, masks: bool = False) -> dict[str, Any]:
    """Return embeddings of prompts and negative prompts."""
    given: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_") if cfg else ("",)):
        given[f"{prefix}prompt_embeds"] = _text(samples, channels, seed)
        if pooled:
            given[f"{prefix}pooled_prompt_embeds"] = _text(samples, pooled, 10 + seed)[:, 0]
        if masks:
            mask = torch.ones(samples, TEXT)
            mask[0, TEXT - 1 - seed :] = 0
            given[f"{prefix}prompt_attention_mask"] = mask
    return given


def _sd3(**options: Any) -> Any:
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=10,
        pos_embed_max_size=32,
        **options,
    )
    return pipeline(diffusers.StableDiffusion3Pipeline, model, _flow())


def _sd3_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    return {"guidance_scale": 4.0 if cfg else 1.0, **_embeds(samples, cfg, 12, pooled=10)}


def _flux(guidance_embeds: bool = True) -> Any:
    torch.manual_seed(1)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    return pipeline(diffusers.FluxPipeline, model, _flow())


def _flux_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    return {"guidance_scale": 3.5, "true_cfg_scale": 4.0 if cfg else 1.0, **_embeds(samples, cfg, 12, pooled=10)}


def _qwen() -> Any:
    torch.manual_seed(2)
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )
    return pipeline(diffusers.QwenImagePipeline, model, _flow())


def _qwen_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    given = {"true_cfg_scale": 4.0 if cfg else 1.0, **_embeds(samples, cfg, 12)}
    for prefix in ("", "negative_") if cfg else ("",):
        mask = torch.ones(samples, TEXT, dtype=torch.long)
        mask[0, TEXT - 1 :] = 0
        given[f"{prefix}prompt_embeds_mask"] = mask
    return given


def _z_image() -> Any:
    torch.manual_seed(3)
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=BLOCKS,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=12,
        axes_dims=[2, 2, 4],
        axes_lens=[128, 64, 64],
    )
    for parameter in model.parameters():  # pad tokens are created without values
        if not parameter.isfinite().all() or parameter.abs().max() > 100:
            torch.nn.init.normal_(parameter, std=0.2)
    for pad in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(pad, std=0.2)
    return pipeline(diffusers.ZImagePipeline, model, _flow())


def _z_image_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    # Prompts of different lengths: 5 tokens are padded to 32, 40 to 64, and the shorter ones are masked.
    lengths = [TEXT, 40, 33]
    prompts = [_text(1, 12, i, lengths[i])[0] for i in range(samples)]
    given: dict[str, Any] = {"guidance_scale": 3.0 if cfg else 0.0, "prompt_embeds": prompts}
    given["negative_prompt_embeds"] = [_text(1, 12, 20 + i, 7)[0] for i in range(samples)] if cfg else []
    return given


def _pixart() -> Any:
    torch.manual_seed(4)
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=BLOCKS,
        cross_attention_dim=WIDTH,
        sample_size=16,
        patch_size=2,
        caption_channels=12,
        use_additional_conditions=False,
    )
    return pipeline(diffusers.PixArtSigmaPipeline, model, diffusers.DDIMScheduler())


def _pixart_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    options = {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 4.0 if cfg else 1.0}
    return {**options, **_embeds(samples, cfg, 12, masks=True)}


def _hunyuan() -> Any:
    torch.manual_seed(5)
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=WIDTH,
        num_layers=BLOCKS,
        mlp_ratio=2.0,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=TEXT,
        text_len_t5=TEXT,
    )
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return pipeline(diffusers.HunyuanDiTPipeline, model, diffusers.DDIMScheduler(), **parts)


def _hunyuan_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    given: dict[str, Any] = {"use_resolution_binning": False, "guidance_scale": 4.0 if cfg else 1.0}
    for seed, prefix in enumerate(("", "negative_") if cfg else ("",)):
        given[f"{prefix}prompt_embeds"] = _text(samples, 12, seed)
        given[f"{prefix}prompt_embeds_2"] = _text(samples, 16, 10 + seed)
        given[f"{prefix}prompt_attention_mask"] = torch.ones(samples, TEXT)
        given[f"{prefix}prompt_attention_mask_2"] = torch.ones(samples, TEXT)
    return given


def _wan() -> Any:
    torch.manual_seed(6)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=32,
        ffn_dim=32,
        num_layers=BLOCKS,
        rope_max_seq_len=32,
    )
    return pipeline(diffusers.WanPipeline, model, _flow())


def _wan_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    return {"num_frames": 9, "guidance_scale": 4.0 if cfg else 1.0, **_embeds(samples, cfg, 12)}


def _ltx() -> Any:
    torch.manual_seed(7)
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=HEADS,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=BLOCKS,
        caption_channels=12,
    )
    return pipeline(diffusers.LTXPipeline, model, _flow())


def _ltx_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    return {"num_frames": 17, "guidance_scale": 4.0 if cfg else 1.0, **_embeds(samples, cfg, 12, masks=True)}


def _chroma() -> Any:
    torch.manual_seed(9)
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=2,
    )
    return pipeline(diffusers.ChromaPipeline, model, _flow())


def _chroma_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    return {"guidance_scale": 4.0 if cfg else 1.0, **_embeds(samples, cfg, 12, masks=True)}


def _flux2_vae() -> Any:
    torch.manual_seed(28)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
    )
    return vae.eval()


def flux2(guidance_embeds: bool = False) -> Any:
    torch.manual_seed(10)
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    return pipeline(diffusers.Flux2KleinPipeline, model, _flow(), vae=_flux2_vae())


def _lumina2() -> Any:
    torch.manual_seed(11)
    model = diffusers.Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=BLOCKS,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(64, 32, 32),
        cap_feat_dim=12,
    )
    return pipeline(diffusers.Lumina2Pipeline, model, _flow())


def _lumina2_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    given = _chroma_call(rows, columns, samples, cfg)
    return {name: value.long() if name.endswith("_mask") else value for name, value in given.items()}


def hunyuan_video(**options: Any) -> Any:
    torch.manual_seed(12)
    sizes: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_refiner_layers": 1,
        "text_embed_dim": 12,
        "pooled_projection_dim": 10,
        "rope_axes_dim": (2, 2, 4),
    }
    model = diffusers.HunyuanVideoTransformer3DModel(**sizes | options)
    return pipeline(diffusers.HunyuanVideoPipeline, model, _flow())


def _hunyuan_video_call(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
    scales = {"num_frames": 9, "guidance_scale": 6.0, "true_cfg_scale": 4.0 if cfg else 1.0}
    return {**scales, **_embeds(samples, cfg, 12, pooled=10, masks=True)}


def cogvideox(**options: Any) -> Any:
    torch.manual_seed(13)
    sizes: dict[str, Any] = {
        "num_attention_heads": HEADS,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 12,
        "num_layers": BLOCKS,
        "sample_width": 8,
        "sample_height": 12,
        "sample_frames": 9,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": True,
    }
    model = diffusers.CogVideoXTransformer3DModel(**sizes | options)
    for block in model.transformer_blocks:  # attention changes little with the initial values
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return pipeline(diffusers.CogVideoXPipeline, model, diffusers.CogVideoXDDIMScheduler())


MODELS = {
    "sd3": TransformerCase(
        "StableDiffusion3Pipeline", _sd3, _sd3_call, "2-3", ("transformer_blocks.2.attn", "transformer_blocks.3.attn")
    ),
    "sd3.5": TransformerCase(
        "StableDiffusion3Pipeline",
        lambda: _sd3(dual_attention_layers=(0, 1, 2), qk_norm="rms_norm"),
        _sd3_call,
        [1, "b2"],
        tuple(f"transformer_blocks.{i}.{name}" for i in (1, 2) for name in ("attn", "attn2")),
    ),
    "flux": TransformerCase(
        "FluxPipeline",
        _flux,
        _flux_call,
        ["b1", "s1"],
        ("transformer_blocks.1.attn", "single_transformer_blocks.1.attn"),
        TEXT,
    ),
    "qwen-image": TransformerCase(
        "QwenImagePipeline",
        _qwen,
        _qwen_call,
        range(1, 3),
        ("transformer_blocks.1.attn", "transformer_blocks.2.attn"),
        TEXT,
    ),
    "z-image": TransformerCase("ZImagePipeline", _z_image, _z_image_call, 2, ("layers.2.attention",)),
    "pixart-sigma": TransformerCase(
        "PixArtSigmaPipeline", _pixart, _pixart_call, "transformer_blocks.2", ("transformer_blocks.2.attn1",)
    ),
    "hunyuan-dit": TransformerCase("HunyuanDiTPipeline", _hunyuan, _hunyuan_call, "1", ("blocks.1.attn1",)),
    "wan": TransformerCase("WanPipeline", _wan, _wan_call, "1-2", ("blocks.1.attn1", "blocks.2.attn1"), frames=3),
    "ltx-video": TransformerCase(
        "LTXPipeline", _ltx, _ltx_call, "1", ("transformer_blocks.1.attn1",), frames=3, factor=32
    ),
    "chroma": TransformerCase(
        "ChromaPipeline",
        _chroma,
        _chroma_call,
        ["b1", "s1"],
        ("transformer_blocks.1.attn", "single_transformer_blocks.1.attn"),
        TEXT,
        ("single_transformer_blocks",),
    ),
    "flux2-klein": TransformerCase(
        "Flux2KleinPipeline",
        flux2,
        lambda rows, columns, samples, cfg: {"guidance_scale": 4.0 if cfg else 1.0, **_embeds(samples, cfg, 12)},
        ["b1", "s1"],
        ("transformer_blocks.1.attn", "single_transformer_blocks.1.attn"),
        TEXT,
        ("single_transformer_blocks",),
    ),
    "lumina2": TransformerCase(
        "Lumina2Pipeline",
        _lumina2,
        _lumina2_call,
        "1-2",
        ("layers.1.attn", "layers.2.attn"),
        (TEXT - 1, TEXT),
        ("layers",),
    ),
    "hunyuan-video": TransformerCase(
        "HunyuanVideoPipeline",
        hunyuan_video,
        _hunyuan_video_call,
        ["b1", "s1"],
        ("transformer_blocks.1.attn", "single_transformer_blocks.1.attn"),
        frames=3,
    ),
    "cogvideox": TransformerCase(
        "CogVideoXPipeline",
        cogvideox,
        lambda rows, columns, samples, cfg: {
            "num_frames": 9,
            "guidance_scale": 4.0 if cfg else 1.0,
            **_embeds(samples, cfg, 12),
        },
        "1-2",
        ("transformer_blocks.1.attn1", "transformer_blocks.2.attn1"),
        TEXT,
        frames=3,
    ),
}


def run(
    model: TransformerCase, pipe: Any, rows: int = 6, columns: int = 4, samples: int = 1, cfg: bool = True, **more: Any
) -> torch.Tensor:
    """Return latents of a short run for an image with this number of tokens."""
    given = model.call(rows, columns, samples, cfg)
    given |= {"height": rows * model.factor, "width": columns * model.factor, "num_inference_steps": 3}
    given |= {"output_type": "latent", "generator": torch.Generator().manual_seed(5), **more}
    torch.manual_seed(6)  # some pipelines encode images without the generator
    output = pipe(**given)
    frames = output.frames if hasattr(output, "frames") else output.images
    return frames[0] if isinstance(frames, list) else frames  # a pipeline returns a list of sections

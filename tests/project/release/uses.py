# SPDX-License-Identifier: Apache-2.0
"""What somebody who installed an extra does with it: programs and commands, and what they must print."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Use:
    """A program or a command in an environment, in an empty folder.

    Attributes:
        what: in words, for the page.
        program: Python, where it is not a command.
        command: a module or script of the environment with arguments.
        says: what standard output and error must hold, together.
        code: the exit code.
        environment: variables.
        files: of the checkout that it needs, copied beside it.
    """

    what: str
    program: str = ""
    command: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    code: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """An environment: another one, with an extra on top or without a package.

    Attributes:
        name: of it.
        uses: that must work in it.
        base: the environment that it starts as.
        extra: installed there from the wheel; nothing for the package alone.
        without: a package that is taken away.
    """

    name: str
    uses: tuple[Use, ...]
    base: str = "none"
    extra: str = ""
    without: str = ""


ATTENTION = """
import math, torch
import segkern
assert "site-packages" in segkern.__file__, segkern.__file__
torch.manual_seed(0)
query, key, value = torch.randn(3, 2, 2, 6 * 5, 16).unbind()
for sigma in (0.0, 1.5, math.inf):
    found = segkern.seg_attention(query, key, value, segkern.Grid(6, 5), (0.0, sigma), backend={backend!r})
    wanted = segkern.reference.seg_attention(
        query.double(), key.double(), value.double(), segkern.Grid(6, 5), (0.0, sigma))
    assert torch.allclose(found.double(), wanted, atol=1e-5), (sigma, (found - wanted).abs().max())
print("agrees")
"""

GUIDED = """
import math, torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from segkern.integrations.diffusers import PAG, SEG, guide
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
    transformer_layers_per_block=1,
    addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16)
vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
pipe = StableDiffusionXLPipeline(vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
    unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False)
pipe.set_progress_bar_config(disable=True)
words, pooled = torch.randn(2, 1, 5, 16), torch.randn(2, 1, 16)
def draw():
    return pipe(prompt_embeds=words[:1].squeeze(0), negative_prompt_embeds=words[1:].squeeze(0),
        pooled_prompt_embeds=pooled[0], negative_pooled_prompt_embeds=pooled[1], width=24, height=16,
        num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="latent").images
plain = draw()
with guide(pipe, SEG(scale=3.0, sigma=math.inf), PAG(scale=1.0)) as guidance:
    guided = draw()
assert guided.isfinite().all()
assert (guided - plain).norm() > 1e-3 * plain.norm(), "guidance did nothing"
assert torch.equal(draw(), plain), "the pipeline is not what it was"
print(guidance.report())
"""

PICTURE = """
from PIL import Image
with Image.open("a.png") as image:
    image.load()
    assert image.size == (64, 48), image.size
    assert len(image.convert("RGB").getcolors(64 * 48)) > 50
    print(image.text["prompt"], image.text["seg_sigma"])
"""

TESTS = ("tests", "pyproject.toml")
INTERPRETER = {"TRITON_INTERPRET": "1"}
GENERATE = ("segkern", "generate", "demo", "a large red ring", "--width", "64", "--height", "48", "--steps", "2")


def refused(what: str, command: tuple[str, ...], package: str, extra: str) -> Use:
    """A command that names the package that it lacks, and the extra to install."""
    return Use(what, command=command, says=(package, f'pip install "segkern[{extra}]"'), code=2)


def report(*says: str) -> Use:
    """``segkern info --report``, which works with anything missing."""
    return Use("`segkern info --report`", command=("segkern", "info", "--report"), says=("```text", *says))


STAGES = (
    Stage(
        "none",
        (
            Use("`seg_attention` against the reference", program=ATTENTION.format(backend="auto"), says=("agrees",)),
            Use(
                "the adapter asks for diffusers",
                program="import segkern.integrations.diffusers",
                says=('pip install "segkern[diffusers]"',),
                code=1,
            ),
            refused("commands ask for typer", ("segkern", "layers", "demo"), "typer", "cli"),
            report("cli lacks "),
        ),
        base="",
    ),
    Stage(
        "triton",
        (
            Use(
                "the kernels against the reference, in Triton's interpreter",
                program=ATTENTION.format(backend="triton"),
                says=("agrees",),
                environment=INTERPRETER,
            ),
        ),
        extra="triton",
    ),
    Stage(
        "diffusers",
        (
            # transformers brings typer, so the commands may be there too.
            Use("`guide` on a small random SDXL pipeline", program=GUIDED, says=("fired",)),
        ),
        extra="diffusers",
    ),
    Stage(
        "cli",
        (
            Use("`segkern generate`", command=(*GENERATE, "--sigma", "2", "--out", "a.png"), says=("wrote a.png",)),
            Use("the picture and its settings", program=PICTURE, says=("a large red ring 2",), files=("a.png",)),
            Use("`segkern layers`", command=("segkern", "layers", "demo"), says=("m0", "mid_block")),
            refused("`energy` asks for matplotlib", ("segkern", "energy", "demo", "a"), "matplotlib", "evaluate"),
            report("evaluate lacks torchmetrics"),
        ),
        base="diffusers",
        extra="cli",
    ),
    Stage("cli without typer", (refused("asks for it", GENERATE, "typer", "cli"),), base="cli", without="typer"),
    Stage("cli without rich", (refused("asks for it", GENERATE, "rich", "cli"),), base="cli", without="rich"),
    Stage("cli without pillow", (refused("asks for it", GENERATE, "pillow", "cli"),), base="cli", without="pillow"),
    Stage(
        "cli without diffusers",
        (refused("asks for it", GENERATE, "diffusers", "cli"),),
        base="cli",
        without="diffusers",
    ),
    Stage(
        "ui",
        (
            Use("the page of `segkern ui`", program="import segkern.playground.page, matplotlib; print('both')"),
            Use("`segkern ui --help`", command=("segkern", "ui", "--help"), says=("--port",)),
        ),
        base="cli",
        extra="ui",
    ),
    Stage(
        "evaluate",
        (
            Use(
                "`segkern energy`",
                command=("segkern", "energy", "demo", "a large red ring", "--steps", "2", "--out", "e"),
                says=("e/energy.json",),
            ),
        ),
        base="cli",
        extra="evaluate",
    ),
    Stage(
        "docs",
        (
            Use("mkdocs", command=("mkdocs", "--version"), says=("mkdocs, version",)),
            Use("its theme and plugins", program="import material, mkdocstrings, mkdocstrings_handlers.python"),
        ),
        extra="docs",
    ),
    Stage(
        "test",
        (
            Use(
                "the tests of `tests/core/test_gaussian.py`",
                command=("pytest", "-q", "-p", "no:cacheprovider", "tests/core/test_gaussian.py"),
                says=(" passed",),
                files=TESTS,
            ),
        ),
        extra="test",
    ),
    Stage(
        "dev",
        (
            Use("ruff on the sources", command=("ruff", "check", "tests"), files=TESTS),
            Use("mypy", command=("mypy", "--version"), says=("mypy ",)),
            Use(
                "the wheel from the source archive",
                program="import glob, subprocess, sys; subprocess.run([sys.executable, '-m', 'build', '--wheel', "
                "'--no-isolation', *glob.glob('segkern-*/')], check=True)",
                says=("Successfully built segkern-",),
                files=("sdist",),
            ),
        ),
        extra="dev",
    ),
    Stage(
        "all",
        (
            report("triton, diffusers, cli, ui, evaluate, docs, test, dev, all"),
            Use(
                "the kernels against the reference, in Triton's interpreter",
                program=ATTENTION.format(backend="triton"),
                says=("agrees",),
                environment=INTERPRETER,
            ),
            Use("`guide` on a small random SDXL pipeline", program=GUIDED, says=("fired",)),
        ),
        base="ui",
        extra="all",
    ),
)

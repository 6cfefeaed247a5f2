# SPDX-License-Identifier: Apache-2.0
"""Other guidances than SEG on the command line, alone and together."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from segkern.generation.pictures import difference
from tests.cli.cli_tools import done, picture, refusal

PROMPT = "a large red ring"
SMALL = ("--width", "64", "--height", "48", "--device", "cpu")


def generate(out: Path, *arguments: object) -> Image.Image:
    done("generate", "demo", PROMPT, *SMALL, "--out", out, *arguments)
    return picture(out).convert("RGB")


@pytest.mark.parametrize("name", ["pag", "sag", "seg,pag"])
def test_each_guidance_draws_its_own_picture(name: str, tmp_path: Path) -> None:
    plain = generate(tmp_path / "plain.png", "--guidance", "none", "--steps", "4")
    scale = ("--pag-scale", "2") if "pag" in name else ()
    drawn = generate(tmp_path / "a.png", "--guidance", name, *scale, "--schedule", "linear", "--steps", "4")
    assert difference(plain, drawn) > 0
    text = picture(tmp_path / "a.png").text
    assert text["guidance"] == name.upper().replace(",", " + ")
    first = name.split(",")[-1]
    assert text[f"{first}_schedule"] == "linear"
    assert text.get("pag_scale") == ("2.0" if "pag" in name else None)
    assert ("seg_sigma" in text) == ("seg" in name)


def test_the_report_names_each_guidance(tmp_path: Path) -> None:
    said = done(
        "generate", "demo", PROMPT, *SMALL, "--guidance", "seg,pag", "--steps", "2", "--out", tmp_path / "a.png"
    )
    assert "SEG" in said
    assert "PAG" in said


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "a.png")
    assert "guidance takes some of seg, pag, sag with commas, or none, got 'cfg'" in refusal(
        "generate", "demo", "x", "--guidance", "seg,cfg", *out
    )
    assert "--sigma 4 is of seg, which is not in --guidance pag" in refusal(
        "generate", "demo", "x", "--guidance", "pag", "--sigma", "4", *out
    )
    assert "scale 9 is of seg, which is not in guidance pag" in refusal(
        "generate", "demo", "x", "--guidance", "pag", "--scale", "9", *out
    )
    assert "scale 7 is of sag" in refusal("generate", "demo", "x", "--sag-scale", "7", *out)
    assert "--sigma 4 is of seg, which is not in --guidance none" in refusal(
        "generate", "demo", "x", "--guidance", "none", "--sigma", "4", *out
    )
    assert "--compare is of seg" in refusal("generate", "demo", "x", "--guidance", "sag", "--compare", *out)
    assert "PAG.schedule must be one of" in refusal(
        "generate", "demo", "x", "--guidance", "pag", "--schedule", "wavy", *out
    )
    assert not (tmp_path / "a.png").exists()

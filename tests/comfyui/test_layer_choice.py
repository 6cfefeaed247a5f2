# SPDX-License-Identifier: Apache-2.0
"""Layer names of models that differ from Stable Diffusion, and the errors for unknown ones."""

from __future__ import annotations

import pytest
from segkern_pack.guidance import add_guidance, guidances_of

from segkern.integrations.specs import SEG

from .comparison import small
from .small_models import make_model


@pytest.mark.parametrize("depth", [-1, -2])
def test_a_model_without_middle_layers_has_no_default(depth: int) -> None:
    model = make_model("sdxl", transformer_depth_middle=depth)  # like SSD-1B and KOALA
    with pytest.raises(ValueError, match="no default layer for this model; name one or more of "):
        add_guidance(model, SEG(), "")


def test_layers_that_look_at_the_text_are_no_self_attention() -> None:
    model = make_model("sdxl", disable_self_attentions=[False, True])  # like the x4 upscaler
    (guidance,) = guidances_of(add_guidance(model, SEG(), "*").model_options)
    assert [layer.module for layer in guidance.layers] == ["middle.0.0", "middle.0.1", "middle.0.2"]
    with pytest.raises(ValueError, match="unknown layer 'up'"):
        add_guidance(model, SEG(), "up")


def test_examples_in_an_error_are_valid() -> None:
    message = r"unknown layer 'mid'; valid names are .* globs such as 'double.\*'; the node's help page explains"
    with pytest.raises(ValueError, match=message):
        add_guidance(small("flux"), SEG(), "mid")
    (guidance,) = guidances_of(add_guidance(small("flux"), SEG(), "double.*").model_options)
    assert [layer.module for layer in guidance.layers] == ["double.0", "double.1", "double.2"]


def test_a_sigma_for_each_image_is_refused() -> None:
    with pytest.raises(ValueError, match="needs one sigma for all images"):
        add_guidance(make_model("sd15"), SEG(sigma=(1.0, 2.0)), "mid")

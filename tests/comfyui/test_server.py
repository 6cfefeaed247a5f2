# SPDX-License-Identifier: Apache-2.0
"""Workflows posted to the real ComfyUI server."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import load_file

from .server import PACK, Server, Workflow, command, environment, link_pack, wait_for

_COMMON = {"layers": "mid", "start_percent": 0.0, "end_percent": 1.0, "rescale": 0.0}
WORKFLOW: Workflow = {
    "load": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "small.safetensors"}},
    "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": "fox"}},
    "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": ""}},
    "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 192, "height": 128, "batch_size": 1}},
    "guide": {
        "class_type": "SmoothedEnergyGuidanceSegkern",
        "inputs": {"model": ["load", 0], "scale": 3.0, "blur": "infinite", **_COMMON},
    },
    "sample": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["guide", 0],
            "seed": 1,
            "steps": 3,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "latent_image": ["empty", 0],
            "denoise": 1.0,
        },
    },
    "info": {"class_type": "GuidanceInfoSegkern", "inputs": {"model": ["guide", 0], "latent": ["sample", 0]}},
    "save": {"class_type": "SaveLatent", "inputs": {"samples": ["info", 0], "filename_prefix": "latents"}},
}
NODES = (
    "SmoothedEnergyGuidanceSegkern",
    "PerturbedAttentionGuidanceSegkern",
    "CombinedGuidanceSegkern",
    "GuidanceInfoSegkern",
)


def changed(**inputs: dict[str, Any]) -> Workflow:
    """Return the workflow with changed inputs of some nodes."""
    workflow = copy.deepcopy(WORKFLOW)
    for node, values in inputs.items():
        workflow[node]["inputs"] |= values
    return workflow


def run(server: Server, workflow: Workflow) -> tuple[torch.Tensor, str]:
    """Run a workflow without cached results, and return its latents and the text of its info node."""
    done = server.run(workflow)
    assert done["status"]["status_str"] == "success", done["status"]
    (cached,) = (message for kind, message in done["status"]["messages"] if kind == "execution_cached")
    assert "sample" not in cached["nodes"]
    (saved,) = done["outputs"]["save"]["latents"]
    latents = load_file(server.base / "output" / saved["filename"])["latent_tensor"]
    (text,) = done["outputs"].get("info", {"text": [""]})["text"]
    return latents, text


def again(attempt: int) -> dict[str, Any]:
    """Return sampler inputs that change only ComfyUI's key of the cached result."""
    return {"denoise": 1.0 - attempt * 1e-6}


def test_guidance_acts_in_every_run(server: Server) -> None:
    unguided, _ = run(server, changed(sample={"model": ["load", 0]}))
    for steps in (3, 5):
        latents, text = run(server, changed(sample={"steps": steps} | again(1)))
        assert f"SEG, scale 3, infinite sigma: acted in {steps} of {steps} evaluations" in text
        assert "middle.0.0: moved attention by" in text
        assert "shared the model's own forward pass up to its first perturbed layer (44% of the blocks)" in text
        assert latents.isfinite().all()
        if steps == 3:
            assert (latents - unguided).norm() > 1e-3 * unguided.norm()


def test_an_unchanged_workflow_computes_and_saves_nothing(server: Server) -> None:
    workflow = changed(sample=again(7))
    _, text = run(server, workflow)
    done = server.run(workflow)
    (cached,) = (message for kind, message in done["status"]["messages"] if kind == "execution_cached")
    assert {"sample", "info", "save"} <= set(cached["nodes"])
    assert done["outputs"]["info"]["text"] == [text]


def test_a_finite_blur_is_a_choice_with_a_number(server: Server) -> None:
    _, text = run(server, changed(guide={"blur": "finite", "blur.sigma": 1.5}))
    assert "SEG, scale 3, sigma 1.5: acted in 3 of 3" in text


def test_an_interrupt_changes_no_later_run(server: Server) -> None:
    unguided, _ = run(server, changed(sample={"model": ["load", 0]} | again(2)))
    guided, _ = run(server, changed(sample=again(3)))
    job = server.post(changed(sample={"steps": 2000}))
    wait_for(lambda: server.steps() > 2)
    server.text("/interrupt", {})
    status = server.finish(job)["status"]
    (interrupted,) = (message for kind, message in status["messages"] if kind == "execution_interrupted")
    assert interrupted["node_type"] == "KSampler"
    after, _ = run(server, changed(sample=again(4)))
    unguided_after, _ = run(server, changed(sample={"model": ["load", 0]} | again(5)))
    torch.testing.assert_close(after, guided, rtol=0.0, atol=0.0)
    torch.testing.assert_close(unguided_after, unguided, rtol=0.0, atol=0.0)


def test_a_wrong_layer_is_an_error_in_words(server: Server) -> None:
    status = server.run(changed(guide={"layers": "d9"}))["status"]
    (error,) = (message for kind, message in status["messages"] if kind == "execution_error")
    assert error["node_id"] == "guide"
    assert error["exception_message"].startswith("unknown layer 'd9'; valid names are 'down' (d0)")
    run(server, changed(sample=again(6)))


def test_the_server_lists_nodes_with_their_help_and_templates(server: Server) -> None:
    for node in NODES:
        described = server.get(f"/object_info/{node}")[node]
        inputs = described["input"]["required"]
        assert described["python_module"] == "custom_nodes.segkern"
        assert all(options["tooltip"] for _, options in inputs.values())
        assert server.text(f"/extensions/segkern/docs/{node}.md").startswith("#")
    templates = server.get("/api/workflow_templates")["segkern"]
    assert sorted(templates) == sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))
    for name in templates:
        assert server.get(f"/api/workflow_templates/segkern/{quote(name)}.json")["nodes"]


def test_comfyui_starts_without_segkern(tmp_path: Path) -> None:
    link_pack(tmp_path)
    (tmp_path / "sitecustomize.py").write_text("import sys\n\nsys.modules['segkern'] = None\n")
    arguments = command(tmp_path, "--quick-test-for-ci")
    done = subprocess.run(arguments, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "the package segkern is not installed in ComfyUI's Python; install it there" in said
    assert f"Cannot import {tmp_path}" not in said

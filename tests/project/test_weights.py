# SPDX-License-Identifier: Apache-2.0
"""Loading files cannot run code: no pickles, and weights only from safetensors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("segkern", "integrations", "studies", "benchmarks")
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def dangers(source: str) -> Iterator[str]:
    """Yield the statements of a program that could unpickle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in PICKLES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("torch.load", "torch.hub.load") and options.get("weights_only") != "True":
            yield f"{called} without weights_only=True"
        loads = called.endswith(".from_pretrained") and not called.partition(".")[0].endswith(("Tokenizer", "Config"))
        if loads and options.get("use_safetensors") != "True":
            yield f"{called} without use_safetensors=True"
        if called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            yield f"{called} with allow_pickle"
        if options.get("trust_remote_code", "False") != "False":
            yield f"{called} with trust_remote_code"


def test_no_source_unpickles() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        assert list(dangers(path.read_text(encoding="utf-8"))) == [], path


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "Pipeline.from_pretrained(x)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(x, use_safetensors=True, trust_remote_code=True)",
    ],
)
def test_each_danger_is_seen(source: str) -> None:
    assert list(dangers(source))
    assert not list(dangers("torch.load(p, weights_only=True); P.from_pretrained(x, use_safetensors=True)"))

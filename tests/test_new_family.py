"""One file adds a family of models: names, arguments, pixels, weights and folders of it are known everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# The file that docs/ tells a reader to write: families/acme.py.
ACME = '''
"""A made-up family: a ViT without biases in qkv, whose library has names of its own."""

from fastvit.checkpoints.configs import huggingface_options
from fastvit.checkpoints.rules import HuggingFace, Layout, block, rename, same
from fastvit.models.families.family import IMAGENET, Family, Model

LAYOUT = Layout(
    "acme",
    "stem.weight",
    (
        rename("token", "cls_token", "token"),
        rename("places", "pos_embed"),
        *same(("stem", "patch_embed.proj"), ("last_norm", "norm"), ("/classes", "head")),
        *block("layers.{i}", norm1="n1", attn__qkv=("q", "k", "v"), attn__proj="o"),
        *block("layers.{i}", norm2="n2", mlp__fc1="up", mlp__fc2="down"),
    ),
    tower="acme.",
    options=huggingface_options(1e-5, "gelu"),
    huggingface=lambda state: HuggingFace(
        "acme", "AcmeModel", "AcmeForImageClassification", ("cls_token",), accelerated=False
    ),
    written=("acme",),
    heads={48: 4},
)
FAMILY = Family(
    models={
        "acme_nano_patch8_32": Model(
            {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "qkv_bias": False}, IMAGENET
        )
    },
    aliases={"Acme-N/8": "acme_nano_patch8"},
    layouts=(LAYOUT,),
)
'''

SCRIPT = """
import json, sys
import timm, torch
import fastvit, fastvit.models.families as families
from fastvit.checkpoints import convert

folder = sys.argv[1]
assert fastvit.list_models("acme") == ["acme_nano_patch8_32"]
model = fastvit.create_model("Acme-N/8-64", num_classes=5, weight_init="reset").eval()
assert model.patch_embed.img_size == (64, 64)
torch.manual_seed(0)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
for block in (*model.blocks, model):
    for norm in (m for m in block.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.eps = 1e-5
images = torch.randn(2, 3, 64, 64)
with torch.no_grad():
    expected = model(images)
state = model.state_dict()

named = families.FAMILIES["acme"].layouts[0].from_ours(state)
assert "acme.layers.1.k.weight" in named and "classes.bias" in named
with torch.no_grad():
    torch.testing.assert_close(fastvit.from_checkpoint(named).eval()(images), expected)

convert(named, f"{folder}/acme", "acme", num_heads=4)
config = json.load(open(f"{folder}/acme/config.json"))
assert config["model_type"] == "acme" and config["layer_norm_eps"] == 1e-5 and config["num_attention_heads"] == 4
with torch.no_grad():
    torch.testing.assert_close(fastvit.from_checkpoint(f"{folder}/acme").eval()(images), expected)

assert "acme_nano_patch8_32_fastvit" in fastvit.timm_registry.register()
cfg = timm.create_model("acme_nano_patch8_32_fastvit").pretrained_cfg
assert cfg["mean"] == (0.485, 0.456, 0.406) and cfg["input_size"] == (3, 32, 32)
"""


def test_one_file_adds_a_family(tmp_path: Path) -> None:
    """In a copy of the package that has one file more."""
    root = Path(__file__).resolve().parent.parent
    package = shutil.copytree(root / "fastvit", tmp_path / "fastvit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "kernels" / "triton", package / "triton", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "models" / "families" / "acme.py").write_text(ACME)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr

"""``make test-peers``: other libraries' own tests of models, unchanged, on ours.

- timm's tests/test_models.py on fastvit's models in timm's registry;
- transformers' ModelTesterMixin (tests/test_modeling_common.py) on its ViT with attn_implementation="fastvit", and on
  the same after fastvit.accelerate.

The files are in the libraries' source distributions, which are fetched for it. Arguments are passed on to pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

# Which tests of which models (pytest's -k). One test prunes a model at every depth, which is slow: the smallest has it.
# No TorchScript: it is deprecated in PyTorch, and cannot express the choice of a backend.
SMALLEST, OTHERS = "vit_tiny_patch16_224_fastvit", "(vit_small_patch32_224_fastvit or vit_base_patch32_224_fastvit)"
TIMM = f"not torchscript and ({SMALLEST} or {OTHERS} and not prune_intermediate_layers_contract)"

TIMM_CONFTEST = """
from timm.models import _registry

from fastvit.integrations.timm_registry import register

# timm's feature tests pick models by the module that registered them: ours are tested with its ViTs.
_registry._module_to_models["vision_transformer"].update(register())
"""

# What the mixin asks of a model's own test file. It imports two more mixins, which are for generation and for exporters
# and not in the distribution.
TRANSFORMERS_TESTS = '''
import unittest

import fastvit
import transformers
from fastvit.integrations.transformers import register
from transformers import ViTConfig

from .test_modeling_common import ModelTesterMixin, floats_tensor

register()


class Tester:
    is_training = True
    batch_size, seq_length, num_hidden_layers, num_attention_heads, hidden_size = 3, 226, 2, 4, 32
    num_masks, mask_length = 112, 225

    def prepare_config_and_inputs_for_common(self):
        config = ViTConfig(
            image_size=30, patch_size=2, num_channels=3, num_labels=10, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=37, hidden_act="gelu", hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1, attn_implementation="fastvit",
        )
        return config, {"pixel_values": floats_tensor([self.batch_size, 3, 30, 30])}


class AttentionTest(ModelTesterMixin, unittest.TestCase):
    """transformers' ViT on our attention."""

    all_model_classes = (transformers.ViTModel, transformers.ViTForImageClassification)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = Tester()

    def test_inputs_embeds(self):
        self.skipTest("a ViT takes no embeddings")

    def test_model_get_set_embeddings(self):
        self.skipTest("its embeddings are a module of patches")

    def test_retain_grad_hidden_states_attentions(self):
        self.skipTest("asks for attention's weights, which only eager has")


class ViTModel(transformers.ViTModel):
    def __init__(self, config):
        super().__init__(config)
        fastvit.accelerate(self)


class ViTForImageClassification(transformers.ViTForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        fastvit.accelerate(self)


class AcceleratedTest(AttentionTest):
    """The same after fastvit.accelerate, which gives every model our attention, whatever its config asks for."""

    all_model_classes = (ViTModel, ViTForImageClassification)


for name in [name for name in dir(AcceleratedTest) if name.startswith("test_eager_matches_sdpa")] + [
    "test_attention_outputs", "test_can_set_attention_dynamically", "test_sdpa_can_dispatch_non_composite_models",
]:
    setattr(AcceleratedTest, name, unittest.skip("asks for an attention by name")(lambda self: None))
'''


def fetch(library: str, folder: Path) -> Path:
    """The tests of a library's source distribution, of the version that is installed, unpacked into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", f"{library}=={version(library)}", "--dest", str(folder)]
    subprocess.run(command, check=True)
    (archive,) = folder.glob(f"{library}-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests"


def pytest(folder: Path, *arguments: str) -> int:
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "-q", "-W", "ignore", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, *sys.argv[1:]], cwd=folder, env=environment).returncode


def check_timm(scratch: Path) -> int:
    # A folder that holds this file alone: beside timm's sources they would be imported, not the installed ones.
    alone = scratch / "timm-alone"
    alone.mkdir()
    (fetch("timm", scratch) / "test_models.py").rename(alone / "test_models.py")
    (alone / "conftest.py").write_text(TIMM_CONFTEST)
    return pytest(alone, "-k", TIMM, "test_models.py")


def check_transformers(scratch: Path) -> int:
    alone = scratch / "transformers-alone"
    files = {
        "__init__.py": "",
        "exporters/__init__.py": "",
        "exporters/test_export.py": "class ExportTesterMixin: pass\n",
        "generation/__init__.py": "",
        "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
        "test_vit.py": TRANSFORMERS_TESTS,
    }
    for name, text in files.items():
        path = alone / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copy(fetch("transformers", scratch) / "test_modeling_common.py", alone / "tests")
    return pytest(alone, "tests/test_vit.py")


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        return max(check_timm(Path(scratch)), check_transformers(Path(scratch)))


if __name__ == "__main__":
    sys.exit(main())

"""Rotary embeddings as other libraries compute them: DINOv3's angles and rotation."""

from __future__ import annotations

import pytest
import torch
from timm.layers import pos_embed_sincos as timms
from transformers import DINOv3ViTConfig
from transformers.models.dinov3_vit import modeling_dinov3_vit as hugging_face

from fastvit import ops
from fastvit.ops import rope


@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (1, 7)], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 72])
def test_axial_angles_are_timms(grid: tuple[int, int], head_dim: int) -> None:
    theirs = timms.RotaryEmbeddingDinoV3(head_dim, temperature=100.0)
    sin, cos = theirs.get_embed(list(grid)).chunk(2, -1)
    for ours in (rope.axial(grid, head_dim), rope.axial(grid, head_dim, periods=theirs.periods)):
        assert torch.equal(ours[0], cos) and torch.equal(ours[1], sin)


def test_axial_angles_are_hugging_faces() -> None:
    config = DINOv3ViTConfig(hidden_size=64, num_attention_heads=2, patch_size=4, rope_theta=100.0)
    theirs = hugging_face.DINOv3ViTRopePositionEmbedding(config).eval()  # training shifts and scales at random
    for ours, expected in zip(rope.axial((3, 5), 32), theirs(torch.empty(1, 3, 12, 20)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_rotation_is_timms_and_hugging_faces() -> None:
    """With a class token and four registers that nobody turns."""
    q, k = torch.randn(2, 2, 5 + 15, 3, 32)
    cos, sin = rope.axial((3, 5), 32)
    ours = ops.rotate(q, k, cos, sin)
    by_heads = [x.transpose(1, 2) for x in (q, k)]
    theirs = hugging_face.apply_rotary_pos_emb(*by_heads, cos, sin)
    for x, turned, expected in zip(by_heads, ours, theirs, strict=True):
        torch.testing.assert_close(turned.transpose(1, 2), expected)
        timm = timms.apply_rot_embed_cat(x[:, :, 5:], torch.cat([sin, cos], -1), half=True)
        torch.testing.assert_close(turned[:, 5:].transpose(1, 2), timm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 30}, "head dim 30; accepted: multiples of 4"),
        ({"head_dim": 32, "periods": torch.ones(4)}, r"periods has shape \(4,\), expected \(8,\)"),
    ],
)
def test_bad_angles_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope.axial((2, 2), **options)

"""The reference itself, against definitions written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastvit import reference


def test_attention_is_softmax_of_scores() -> None:
    q, k, v = torch.randn(2, 5, 3, 8).double(), torch.randn(2, 7, 3, 8).double(), torch.randn(2, 7, 3, 8).double()
    out, lse = reference.attention(q, k, v, scale=0.3, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v))
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())


def test_attention_without_keys_is_zero() -> None:
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 0, 3, 8)
    out, lse = reference.attention(q, k, k, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_rel_pos_keys_are_more_attention() -> None:
    """The ViT paper's appendix D.3, with one set of keys for all heads, and with one for each."""
    q, k, v = torch.randn(3, 2, 5, 3, 8).double().unbind(0)
    for keys in (torch.randn(9, 8).double(), torch.randn(3, 9, 8).double()):
        out = reference.attention(q, k, v, scale=0.3, rel_pos_keys=keys)
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        for h in range(3):
            for i in range(5):
                for j in range(5):
                    key = keys[i - j + 4] if keys.ndim == 2 else keys[h, i - j + 4]
                    scores[:, h, i, j] += q[:, i, h] @ key
        torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", (scores * 0.3).softmax(-1), v))


def test_packed_attention_is_attention() -> None:
    qkv = torch.randn(2, 5, 3, 4, 8)
    assert torch.equal(reference.attention_qkvpacked(qkv), reference.attention(*qkv.unbind(2)))


@pytest.mark.parametrize("what", ["plain", "bias", "table", "rel_pos_keys", "mask"])
def test_rows_of_attention_are_the_softmax(what: str) -> None:
    q, k = torch.randn(2, 2, 7, 3, 8).double()
    options = {
        "plain": {},
        "bias": {"bias": torch.randn(1, 3, 7, 7).double()},
        "table": {"rel_pos_table": torch.randn(3 * 5 + 3, 3).double(), "window": (2, 3)},
        "rel_pos_keys": {"rel_pos_keys": torch.randn(3, 13, 8).double()},
        "mask": {"key_mask": torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0] * 7]).bool()},
    }[what]
    _, lse = reference.attention(q, k, k, scale=0.3, return_lse=True, **options)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    scores = (
        scores
        + {
            "plain": lambda: 0,
            "bias": lambda: options["bias"],
            "table": lambda: reference.table_bias(options["rel_pos_table"], (2, 3)),
            "rel_pos_keys": lambda: reference.relative_bias(q, options["rel_pos_keys"], 0.3),
            "mask": lambda: torch.where(options["key_mask"], 0, -math.inf)[:, None, None],
        }[what]()
    )
    rows = torch.tensor([3, 0, -1])
    found = reference.attention_rows(q, k, lse, rows, scale=0.3, **options)
    torch.testing.assert_close(found, scores.softmax(-1)[:, :, rows].nan_to_num(0))


def test_attention_distance_weighs_the_distance_of_patches() -> None:
    """Of a 2 x 3 grid of 4 x 5 pixels behind a class token, whose weight counts for nothing."""
    q, k = torch.randn(2, 2, 7, 3, 8).double()
    _, lse = reference.attention(q, k, k, return_lse=True)
    p = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5).softmax(-1)[..., 1:, 1:]
    at = [(y * 4, x * 5) for y in range(2) for x in range(3)]
    expected = sum(p[..., i, j] * math.dist(at[i], at[j]) for i in range(6) for j in range(6)) / 6
    torch.testing.assert_close(reference.attention_distance(q, k, lse, (2, 3), patch_size=(4, 5)), expected)


@pytest.mark.parametrize("of_images", [False, True])
def test_rotation_turns_pairs_of_half_a_head_apart(of_images: bool) -> None:
    """As complex numbers times e^(i angle), all tokens but the first two."""
    q, k = torch.randn(2, 2, 7, 3, 8).double()
    angles = torch.randn(*[2] * of_images, 5, 4).double()
    cos, sin = (f(angles).repeat(*[1] * of_images, 1, 2) for f in (torch.cos, torch.sin))
    for x, turned in zip((q, k), reference.rotate(q, k, cos, sin), strict=True):
        pairs = torch.complex(*x[:, 2:].chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
        torch.testing.assert_close(turned, torch.cat([x[:, :2], torch.cat([pairs.real, pairs.imag], -1)], 1))


@pytest.mark.parametrize("prefix_position", [True, False])
def test_patch_embed_is_a_projection_of_flattened_patches(prefix_position: bool) -> None:
    images, weight, bias = torch.randn(2, 3, 8, 12).double(), torch.randn(6, 3, 4, 2).double(), torch.randn(6).double()
    prefix = torch.randn(1, 2, 6).double()
    pos = torch.randn(1, 12 + 2 * prefix_position, 6).double()
    out = reference.patch_embed(images, weight, bias, pos_embed=pos, prefix_tokens=prefix)
    patches = images.unfold(2, 4, 4).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(2, 12, 24)
    rows = patches @ weight.flatten(1).T + bias
    if prefix_position:
        expected = torch.cat([prefix.expand(2, -1, -1), rows], 1) + pos
    else:
        expected = torch.cat([prefix.expand(2, -1, -1), rows + pos], 1)
    torch.testing.assert_close(out, expected)


def test_uint8_images_are_normalised_in_either_layout() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    weight, mean, std = torch.randn(4, 3, 4, 4), torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    expected = F.conv2d((images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1), weight, stride=4)
    expected = expected.flatten(2).transpose(1, 2)
    for layout in (images, images.permute(0, 2, 3, 1).contiguous()):
        torch.testing.assert_close(reference.patch_embed(layout, weight, mean=mean, std=std), expected)


def test_mlp_with_everything() -> None:
    x, gamma, scale = torch.randn(2, 5, 8).double(), torch.randn(8).double(), torch.tensor([0.0, 2.0])
    w1, b1, w2, b2 = torch.randn(12, 8), torch.randn(12), torch.randn(8, 12), torch.randn(8)
    w1, b1, w2, b2 = (t.double() for t in (w1, b1, w2, b2))
    norm = (torch.randn(8).double(), torch.randn(8).double(), 1e-6)
    out = reference.mlp(x, w1, b1, w2, b2, norm=norm, residual=x, gamma=gamma, row_scale=scale)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm[0] + norm[1]
    pre = normed @ w1.T + b1
    hidden = pre * 0.5 * (1 + torch.erf(pre / math.sqrt(2)))
    torch.testing.assert_close(out, x + scale.view(2, 1, 1) * gamma * (hidden @ w2.T + b2))


def test_swiglu_gates_the_second_half() -> None:
    x = torch.randn(3, 8)
    torch.testing.assert_close(reference.activate(x, "swiglu"), F.silu(x[:, :4]) * x[:, 4:])


def test_results_keep_the_residuals_dtype() -> None:
    x, weight = torch.randn(2, 4, dtype=torch.bfloat16), torch.randn(4, 4, dtype=torch.bfloat16)
    for residual in (torch.randn(2, 4), torch.randn(2, 4, dtype=torch.bfloat16)):
        out = reference.linear(x, weight, residual=residual, gamma=torch.randn(4), row_scale=torch.ones(2))
        assert out.dtype == residual.dtype

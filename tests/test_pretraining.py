"""Masked patch prediction, BEiT and its tokenizer: masks, targets, gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit.data.datasets import open_data
from fastvit.models import AxialViT, HybridEmbed, ViT
from fastvit.training.objectives import Objective
from fastvit.training.pretrain import DVAE, Beit, Corruption, MaskedPatches, Tokenizing, blockwise_masks, mean_colours
from parity import Calls, assert_same

HALF = [0.5], [0.5]  # mean and std of one channel


def small(channels: int = 1, **options: Any) -> ViT:
    """16 patches of 4 x 4."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return ViT(**{**sizes, "in_chans": channels, **options})


BEIT = {"global_pool": "avg", "init_values": 0.1, "pos_embed": "none", "use_rel_pos_bias": True}

# Every kind of encoder, for images of 32 pixels: 4 x 4 patches of 8 x 8 pixels.
ENCODERS: dict[str, Any] = {
    "hybrid": partial(small, img_size=32, patch_size=1, embed_layer=partial(HybridEmbed, layers=(1, 1))),
    "axial": lambda: AxialViT(img_size=32, patch_size=8, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=0),
    "dinov3": lambda: fastvit.create_model(
        "vit_small_patch16_dinov3", img_size=32, patch_size=8, in_chans=1, num_classes=0, depth=2
    ),
    "beit": partial(small, img_size=32, patch_size=8, **BEIT),
}


# -- corrupting patch embeddings --------------------------------------------------------------------------------------


def test_shares_of_corrupted_patches() -> None:
    """Half of each image's patches, exactly; of these 80, 10 and 10 percent, each drawn on its own."""
    images, patches = 20_000, 16
    drawn = Corruption.draw(images, patches, 0.5)
    assert drawn.chosen.shape == (images, 8)
    assert all(len(set(row)) == 8 for row in drawn.chosen.tolist())
    corrupted = torch.zeros(images, patches, dtype=torch.bool).scatter(1, drawn.chosen, True)
    swapped = drawn.source != torch.arange(patches)
    kept = corrupted & ~drawn.masked & ~swapped
    assert not (drawn.masked & swapped).any()
    assert not ((drawn.masked | swapped) & ~corrupted).any()
    count = images * 8
    for found, share in ((drawn.masked, 0.8), (swapped, 0.1), (kept, 0.1)):
        spread = (share * (1 - share) * count) ** 0.5
        assert abs(int(found.sum()) - share * count) < 5 * spread
    # Each patch is as likely as any other, and so is each other patch to stand in for it.
    assert (corrupted.double().mean(0) - 0.5).abs().max() < 5 * (0.25 / images) ** 0.5
    offsets = ((drawn.source - torch.arange(patches)) % patches)[swapped].bincount(minlength=patches)
    assert offsets[0] == 0 and abs(offsets[1:] / offsets.sum() - 1 / 15).max() < 5 * (1 / 15 / offsets.sum()) ** 0.5
    # The number of masked patches of an image varies as that of independent draws does: variance 8 * 0.8 * 0.2.
    assert abs(drawn.masked.sum(1).double().var().item() / (8 * 0.8 * 0.2) - 1) < 0.15
    # Two patches are both corrupted as often as chance has it (7/15 of the time one is), and images differ.
    both = (corrupted[:, 0] & corrupted[:, 9]).double().mean().item()
    assert abs(both - 0.5 * 7 / 15) < 5 * (0.25 / images) ** 0.5
    assert len(set(map(tuple, corrupted.tolist()))) > images / 2


def test_corrupted_embeddings() -> None:
    x, token = torch.randn(1, 4, 3), torch.full((3,), 7.0)
    corruption = Corruption(
        torch.tensor([[1, 3, 2]]), torch.tensor([[False, True, False, False]]), torch.tensor([[0, 1, 2, 0]])
    )
    assert_same(corruption.apply(x, token), torch.stack([x[0, 0], token, x[0, 2], x[0, 0]]).unsqueeze(0))


@pytest.mark.parametrize("options", [{}, BEIT, {"rope": 100.0, "pos_embed": "none"}, {"dynamic_img_size": True}])
def test_corrupt_comes_before_positions(options: dict[str, Any]) -> None:
    """The result equals that of a hook on the patch embedding."""
    model, images = small(**options).double(), torch.randn(2, 1, 16, 16, dtype=torch.float64)
    plain = model.forward_features(images)
    assert_same(model.forward_features(images, corrupt=lambda x: x), plain)
    token = torch.randn(32, dtype=torch.float64)
    got = model.forward_features(images, corrupt=lambda x: torch.cat([token.expand(2, 1, 32), x[:, 1:]], 1))
    assert not torch.allclose(got, plain)
    model.patch_embed.register_forward_hook(lambda module, args, out: _with_first(out, token))
    assert_same(got, model.forward_features(images))


def _with_first(x: Tensor, token: Tensor) -> Tensor:
    x = x.clone()
    x.view(x.shape[0], -1, x.shape[-1])[:, 0] = token
    return x


def test_the_encoder_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the embedding, where nothing is corrupted: positions and class token are added by its op."""
    calls, model = Calls(monkeypatch), small()
    MaskedPatches(model, *HALF)({"image": torch.randn(2, 1, 16, 16)})
    tokens = ["linear", "attention_qkvpacked", "linear", "mlp"] * 2 + ["layer_norm"]
    assert calls.names == ["patch_embed", *tokens] and calls.made[0][2] == ()
    calls.made.clear()
    model.forward_features(torch.randn(2, 1, 16, 16))
    assert calls.names == ["patch_embed", *tokens] and calls.made[0][2] == ("pos_embed", "prefix_tokens")


# -- targets ----------------------------------------------------------------------------------------------------------


def test_colours_by_hand() -> None:
    """One 4 x 4 patch beside another, RGB in bytes: v >> 5 is a channel's level."""
    pixels = torch.zeros(1, 3, 4, 8)
    pixels[0, :, :, :4] = torch.tensor([255, 128, 31]).view(3, 1, 1) / 255  # levels 7, 4, 0
    pixels[0, :, :2, 4:] = torch.tensor([64, 32, 254]).view(3, 1, 1) / 255  # levels 2, 1, 7; below it black
    assert mean_colours(pixels, (4, 4)).tolist() == [[[7 * 64 + 4 * 8], [1 * 64 + 0 * 8 + 3]]]
    black, bright = 0, 2 * 64 + 1 * 8 + 7
    first = [7 * 64 + 4 * 8] * 4
    assert mean_colours(pixels, (4, 4), 2).tolist() == [[first, [bright, bright, black, black]]]
    # Parts of a patch are in reading order.
    pixels = torch.arange(16.0).view(1, 1, 4, 4) // 2 / 8  # levels 0 0 1 1 / 2 2 3 3 / ...
    assert mean_colours(pixels, (4, 4), 4).tolist() == [[[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]]]
    patches = mean_colours(pixels, (2, 2), 2)
    assert patches.tolist() == [[[0, 0, 2, 2], [1, 1, 3, 3], [4, 4, 6, 6], [5, 5, 7, 7]]]


def test_colours_are_of_pixels_before_normalisation() -> None:
    objective = MaskedPatches(small(3), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    pixels = torch.full((1, 3, 16, 16), 0.7)
    normal = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    target = objective.target.of(normal, objective.pixels(normal), (4, 4))
    assert target.unique().tolist() == [5 * 64 + 5 * 8 + 5]


@pytest.mark.parametrize(("target", "outputs"), [("colour", 512), ("colours", 16 * 512), ("pixels", 48)])
def test_targets(target: str, outputs: int) -> None:
    """The head's width is the paper's, and a head that knows the answer has no loss."""
    objective, images = MaskedPatches(small(3), [0.5] * 3, [0.5] * 3, target), torch.rand(2, 3, 16, 16) * 2 - 1
    assert objective.predict.out_features == outputs
    want = objective.target.of(images, objective.pixels(images), (4, 4))
    assert want.shape[:2] == (2, 16)
    if target == "pixels":
        assert_same(want[0, 1].view(3, 4, 4), images[0, :, :4, 4:8])
        right = want
    else:
        right = 50.0 * nn.functional.one_hot(want, 512).flatten(2)
    assert objective.target.scores(right, want)["loss"] < 1e-6
    assert objective.target.scores(right.roll(1, 1), want)["loss"] > 0.1


def test_only_corrupted_patches_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is that of the chosen patches, gathered by hand; the image's other patches may be anything."""
    model, images = small(), torch.rand(3, 1, 16, 16) * 2 - 1
    objective = MaskedPatches(model, *HALF)
    drawn = Corruption.draw(3, 16, 0.5)
    monkeypatch.setattr(Corruption, "draw", lambda *_: drawn)
    tokens = model.forward_features(images, corrupt=lambda x: drawn.apply(x, objective.mask_token))[:, 1:]
    target, losses = mean_colours(images / 2 + 0.5, (4, 4)), []
    for i in range(3):
        for j in drawn.chosen[i].tolist():
            losses.append(nn.functional.cross_entropy(objective.predict(tokens[i, j])[None], target[i, j]))
    torch.testing.assert_close(objective({"image": images})["loss"], torch.stack(losses).mean())


# -- BEiT -------------------------------------------------------------------------------------------------------------


def test_blockwise_masks() -> None:
    """BEiT's 14 x 14: up to 40%, mostly close to it, in blocks, everywhere, each image its own."""
    masks = blockwise_masks(300, (14, 14))
    counts = masks.sum((1, 2))
    assert masks.shape == (300, 14, 14) and counts.max() <= 78 and counts.min() >= 16
    assert counts.double().mean() > 70
    assert len(set(map(tuple, masks.flatten(1).tolist()))) == 300
    assert masks.double().mean(0).min() > 0.02  # corners are rare, and not never
    # Blocks: a masked patch has masked neighbours, far more than the 40% of masks drawn patch by patch.
    beside = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, :-1].sum()
    assert beside > 0.7


@pytest.mark.parametrize(
    ("shape", "height", "width"), [(0.0, 7, 2), (0.25, 5, 3), (0.5, 4, 4), (0.75, 3, 5), (1.0, 2, 7)]
)
def test_a_single_block(monkeypatch: pytest.MonkeyPatch, shape: float, height: int, width: int) -> None:
    """Of 16 patches before its sides are rounded, and these from 0.3 to 1 / 0.3 of each other, evenly in logarithms.

    The draws are always the same, so that no other block comes to the first.
    """
    places = torch.tensor([0.0, 0.5, 0.999])
    drawn = torch.stack([torch.zeros(3), torch.full((3,), shape), places, places.flip(0)])
    monkeypatch.setattr(torch, "rand", lambda *_: drawn)
    want = torch.zeros(3, 14, 14, dtype=torch.bool)
    for mask, down, right in zip(want, places.tolist(), places.flip(0).tolist(), strict=True):
        top, left = int(down * (15 - height)), int(right * (15 - width))
        mask[top : top + height, left : left + width] = True
    assert torch.equal(blockwise_masks(3, (14, 14)), want)


@pytest.mark.parametrize("options", [{}, BEIT])
def test_only_masked_patches_tokens_are_predicted(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    model, images = small(**options), torch.rand(3, 1, 16, 16) * 2 - 1
    tokenizer = DVAE(*HALF, codes=16, halvings=2, width=8)
    objective = Beit(model, tokenizer, least=2)
    masks = blockwise_masks(3, (4, 4), least=2)
    monkeypatch.setattr("fastvit.training.pretrain.beit.blockwise_masks", lambda *_: masks)
    codes, losses = tokenizer.tokenize(images, (4, 4)).flatten(1), []
    flat = masks.flatten(1)
    tokens = model.fc_norm(
        model.forward_features(images, corrupt=lambda x: torch.where(flat[..., None], objective.mask_token, x))
    )
    for i, j in flat.nonzero().tolist():
        losses.append(nn.functional.cross_entropy(objective.predict(tokens[i, 1 + j])[None], codes[i, j][None]))
    torch.testing.assert_close(objective({"image": images})["loss"], torch.stack(losses).mean())


@pytest.mark.parametrize("method", ["masked", "beit"])
@pytest.mark.parametrize("options", [{}, BEIT])
def test_masked_pixels_are_not_seen(monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any]) -> None:
    """What is predicted from: with every patch masked the same for any image, else of the other patches' pixels."""
    objective: MaskedPatches | Beit = MaskedPatches(small(**options), *HALF)
    if method == "beit":
        objective = Beit(small(**options), DVAE(*HALF, codes=16, halvings=2, width=8), least=2)
    read: list[Tensor] = []
    objective.predict.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))

    def tokens(images: Tensor, masks: Tensor) -> Tensor:
        """Return the representations of the masked patches (B, M, D), of images (B, 1, 16, 16) and masks (16,) bool."""
        masks = masks.expand(len(images), -1)
        chosen = masks[0].nonzero().flatten().expand(len(images), -1)
        drawn = Corruption(chosen, masks, torch.arange(16).expand(len(images), -1))
        monkeypatch.setattr(Corruption, "draw", lambda *_: drawn)
        monkeypatch.setattr("fastvit.training.pretrain.beit.blockwise_masks", lambda *_: masks.unflatten(1, (4, 4)))
        objective({"image": images})
        return read.pop().unflatten(0, (len(images), -1)) if method == "beit" else read.pop()

    images = torch.randn(2, 1, 16, 16)
    found = tokens(images, torch.ones(16, dtype=torch.bool))
    torch.testing.assert_close(found[0], found[1])
    some = torch.zeros(16, dtype=torch.bool)
    some[[5, 6]] = True
    found, masked, seen = tokens(images, some), images.clone(), images.clone()
    masked[:, :, 4:8, 4:12] += 1  # patches 5 and 6
    seen[:, :, 4:8, 12:] += 1  # patch 7
    torch.testing.assert_close(tokens(masked, some), found)
    assert not torch.allclose(tokens(seen, some), found)


NO_SHARES = ((0.01, 16), (0.5, 1), (1.5, 16), (-0.1, 16))

# What does not fit, and the message of the error.
REFUSED: list[tuple[Callable[[], Any], str]] = [
    *[(partial(Corruption.draw, 2, patches, share), "share") for share, patches in NO_SHARES],
    (lambda: small().forward_features([torch.randn(1, 16, 16)], corrupt=lambda x: x), "packed"),
    (lambda: MaskedPatches(small(), *HALF, "color"), r"'color'.*'colour'"),
    (lambda: MaskedPatches(small(patch_size=2), *HALF, "colours"), "2x2 has no 4x4"),
    (lambda: MaskedPatches(small(num_classes=3), *HALF), "num_classes=0"),
    (lambda: MaskedPatches(small(patch_drop_rate=0.1), *HALF), "patch_drop_rate=0"),
    (lambda: MaskedPatches(small(), [0.5], [0.0]), "std"),
    (lambda: MaskedPatches(small(), *HALF, share=0.01), r"share=0\.01 of 16 patches"),
    (
        lambda: MaskedPatches(small(dynamic_img_size=True, dynamic_img_pad=True), *HALF)(
            {"image": torch.rand(1, 1, 15, 16)}
        ),
        r"15x16; accepted: whole patches of 4x4 pixels",
    ),
    (lambda: blockwise_masks(1, (14, 14), least=79), "least=79"),
    (lambda: blockwise_masks(1, (14, 14), aspect=0.0), "aspect"),
    (lambda: blockwise_masks(1, (14, 14), share=1.2), "share"),
    (lambda: Beit(small(), DVAE(*HALF, codes=4, halvings=1, width=4)), r"least=16: .* 4x4"),
    (
        lambda: Beit(small(), DVAE([0.5] * 3, [0.5] * 3, codes=4, halvings=1, width=4), least=2),
        "tokenizer reads images of 3 channels, the model of 1",
    ),
    (lambda: DVAE(*HALF, codes=1), "codes=1"),
    (lambda: DVAE(*HALF, codes=4, halvings=2, width=4).logits(torch.rand(1, 1, 6, 8)), "halved 2 times"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- gradients --------------------------------------------------------------------------------------------------------


def objectives() -> dict[str, Objective]:
    tokenizer = DVAE(*HALF, codes=16, halvings=2, width=8)
    return {
        "masked": MaskedPatches(small(), *HALF),
        "pixels": MaskedPatches(small(**BEIT), *HALF, "pixels"),
        "beit": Beit(small(**BEIT), tokenizer, least=2),
        "tokenizer": Tokenizing(DVAE(*HALF, codes=16, halvings=2, width=8)),
    }


@pytest.mark.parametrize("name", objectives())
def test_gradients_reach_what_they_should(name: str) -> None:
    objective = objectives()[name]
    objective.progress = 0.5
    objective({"image": torch.rand(4, 1, 16, 16) * 2 - 1})["loss"].backward()
    for key, parameter in objective.named_parameters():
        if key.startswith("tokenizer."):
            assert parameter.grad is None and not parameter.requires_grad, key
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    if name != "tokenizer":
        assert not any("mask" in key for key in objective.model.state_dict())


@pytest.mark.parametrize("method", ["masked", "beit"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_step_of_every_encoder(encoder: str, method: str) -> None:
    """Patches are of pixels, also where a backbone comes before them; the same batch then is better predicted."""
    model, images = ENCODERS[encoder](), torch.rand(4, 1, 32, 32) * 2 - 1
    if method == "masked":
        objective: Objective = MaskedPatches(model, *HALF, "colours")
        assert objective.predict.out_features == 16 * 8  # 8 levels of each of 4 x 4 parts
    else:
        objective = Beit(model, DVAE(*HALF, codes=16, halvings=1, width=8), least=2)

    def loss() -> Tensor:
        torch.manual_seed(0)
        return objective({"image": images})["loss"]

    before = loss()
    before.backward()
    torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], 0.01).step()
    assert loss() < before
    assert all(p.grad is not None for p in model.parameters())


def test_the_tokenizer_of_beit_does_not_change() -> None:
    objective = objectives()["beit"].train()
    before = {key: value.clone() for key, value in objective.tokenizer.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        objective({"image": torch.rand(4, 1, 16, 16)})["loss"].backward()
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in objective.tokenizer.state_dict().items())


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def digits(count: int) -> Tensor:
    split = open_data("digits").train
    return torch.stack([split.image(i) for i in range(count)]) * 2 - 1


def test_the_tokenizer_learns_digits() -> None:
    """The bound falls, many codes come into use, and images come back from their codes."""
    images, model = digits(128), DVAE(*HALF, codes=32, halvings=1, width=16)
    objective = Tokenizing(model, divergence=0.2)
    optimizer = torch.optim.AdamW(objective.parameters(), 5e-3)

    def error() -> float:
        return (model.decode(model.tokenize(images, (4, 4))) - (images / 2 + 0.5)).square().mean().item()

    objective.eval()
    before, untrained = {k: v.item() for k, v in objective({"image": images}).items()}, error()
    objective.train()
    for step in range(100):
        objective.progress = step / 100
        objective({"image": images[torch.randperm(128)[:32]]})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    objective.eval()
    after = {k: v.item() for k, v in objective({"image": images}).items()}
    assert after["loss"] < before["loss"] - 0.5
    assert after["perplexity"] > 3 and model.tokenize(images, (4, 4)).unique().numel() > 4
    assert error() < untrained / 2


def test_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DVAE(*HALF, codes=4, halvings=1, width=4)
    objective, images, seen = Tokenizing(model, 2.0, warmup=0.2, anneal=0.5), torch.rand(2, 1, 8, 8), []
    plain = model.forward

    def watched(images: Tensor, temperature: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(temperature)
        return plain(images, temperature)

    monkeypatch.setattr(model, "forward", watched)
    weights = []
    for objective.progress in (0.0, 0.1, 0.25, 0.5, 1.0):
        found = objective({"image": images})
        weights.append(((found["loss"] - found["nll"]) / found["divergence"]).item())
    assert seen == pytest.approx([1, 1 + (1 / 16 - 1) * (0.5 - 0.5 * 0.8090169943749475), 0.53125, 1 / 16, 1 / 16])
    assert weights == pytest.approx([0, 1, 2, 2, 2], abs=1e-3)
    objective.eval()({"image": images})
    assert seen[-1] is None


def test_divergence_from_the_uniform_prior() -> None:
    model, images = DVAE(*HALF, codes=8, halvings=1, width=4), torch.rand(2, 1, 8, 8)
    last = model.encoder[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    torch.testing.assert_close(model(images, 1.0)[1], torch.zeros(2))
    with torch.no_grad():
        last.bias[3] = 50.0  # one code, always: log(8) at each of 16 places
    torch.testing.assert_close(model(images, 1.0)[1], torch.full((2,), 16 * 2.0794415))


def test_the_likelihood_is_a_density() -> None:
    """Of one pixel, integrated over all values that it is mapped to, it is 1 less the tails outside of (0.1, 0.9)."""
    model = DVAE(*HALF, codes=2, halvings=0, width=4)
    last = model.decoder[-1]
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.3, -1.0]))
    values = torch.linspace(0, 1, 2001)
    nll = model((values * 2 - 1).view(-1, 1, 1, 1))[0]
    mass = torch.trapezoid((-nll).exp(), values * 0.8)
    laplace = torch.distributions.Laplace(0.3, torch.tensor(-1.0).exp() + 0.03)
    edges = torch.tensor([0.1, 0.9]).logit()
    torch.testing.assert_close(mass, laplace.cdf(edges[1]) - laplace.cdf(edges[0]), rtol=1e-4, atol=0)


def test_a_tokenizer_from_its_file(tmp_path: Path) -> None:
    model = DVAE([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], codes=12, halvings=2, width=6)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other, images = DVAE.from_checkpoint(tmp_path / "model.pth"), torch.rand(2, 3, 16, 8)
    assert torch.equal(other.logits(images), model.logits(images)) and other.logits(images).shape == (2, 12, 4, 2)
    assert_same(other.pixels(images), model.pixels(images))
    torch.save(small().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"vit\.pth holds no tokenizer"):
        DVAE.from_checkpoint(tmp_path / "vit.pth")


def test_another_size_is_resampled_for_the_tokenizer() -> None:
    """BEiT's tokenizer reads 112 pixels of what the encoder reads 224 of."""
    model, images = DVAE(*HALF, codes=4, halvings=1, width=4), torch.rand(2, 1, 32, 32)
    assert model.tokenize(images, (8, 8)).shape == (2, 8, 8)
    assert torch.equal(model.tokenize(images, (16, 16)), model.logits(images).argmax(1))

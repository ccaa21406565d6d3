"""The tokenizer of BEiT: a discrete variational autoencoder, as DALL-E's (Ramesh et al., 2021), trained here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.layers.misc import count, positive
from fastvit.pretraining.encoder import Pixels
from fastvit.training.objectives import Objective

EPSILON = 0.1  # pixels lie in (0.1, 0.9) where the decoder models them, away from the logit's poles
FINEST = 0.03  # scale of a pixel's logit, a byte's step: pixels that never change would have an infinite likelihood


class Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, width, H, W) -> the same shape."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DVAE(nn.Module):
    """Images to a grid of codes out of a vocabulary, and back.

    Args:
        mean, std: C values each, which images were normalised with.
        codes: size of the vocabulary; BEiT's is 8192.
        halvings: how often the encoder halves height and width: 3 of 112 pixels give 14 x 14 codes.
        width: channels of the hidden layers.

    Raises:
        ValueError: a size that does not fit.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], codes: int = 8192, halvings: int = 3, width: int = 256
    ) -> None:
        super().__init__()
        if positive("codes", codes) < 2:
            raise ValueError(f"codes={codes}: a vocabulary has 2 codes at least")
        self.codes, self.halvings, width = codes, count("halvings", halvings), positive("width", width)
        self.pixels = Pixels(mean, std)
        channels = len(mean)
        down: list[nn.Module] = [Residual(width)]
        up: list[nn.Module] = [Residual(width)]
        for _ in range(halvings):
            down += [nn.MaxPool2d(2), Residual(width)]
            up += [nn.Upsample(scale_factor=2), Residual(width)]
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), *down, nn.ReLU(), nn.Conv2d(width, codes, 1)
        )
        self.decoder = nn.Sequential(nn.Conv2d(codes, width, 1), *up, nn.ReLU(), nn.Conv2d(width, 2 * channels, 1))

    def logits(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) normalised -> (B, codes, H / 2^halvings, W / 2^halvings).

        Raises:
            ValueError: sides that can't be halved so often.
        """
        if images.shape[2] % 2**self.halvings or images.shape[3] % 2**self.halvings:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} can't be halved {self.halvings} times into whole codes"
            )
        return self.encoder(images)

    @torch.no_grad()
    def tokenize(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """images (B, C, H, W) normalised, any size -> the likeliest codes (B, *grid), int64."""
        size = [side * 2**self.halvings for side in grid]
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.logits(images).argmax(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) -> the images of them, (B, C, H, W) in 0..1."""
        mu = self.decoder(F.one_hot(codes, self.codes).movedim(-1, 1).to(self.pixels.mean.dtype)).chunk(2, 1)[0]
        return ((mu.sigmoid() - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)

    def forward(self, images: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) -> negative log-likelihoods, and divergences from the uniform prior, nats (B,) each.

        The codes are drawn by the Gumbel-softmax relaxation, softer the higher the temperature. The likelihood of
        pixels is the logit-Laplace distribution's (DALL-E, appendix A.3).
        """
        logits = self.logits(images).float()
        gumbel = -torch.empty_like(logits).exponential_().log()
        mu, scale = self.decoder(((logits + gumbel) / temperature).softmax(1)).float().chunk(2, 1)
        scale = scale.exp() + FINEST
        x = (1 - 2 * EPSILON) * self.pixels(images).clamp(0, 1) + EPSILON
        nll = (x.logit() - mu).abs() / scale + (2 * scale * x * (1 - x)).log()
        log_q = logits.log_softmax(1)
        divergence = (log_q.exp() * (log_q + math.log(self.codes))).sum(1)
        return nll.flatten(1).sum(1), divergence.flatten(1).sum(1)


class Tokenizing(Objective):
    """The dVAE's evidence lower bound, per pixel, with DALL-E's schedules (appendix A.2).

    Args:
        model: the :class:`DVAE`.
        steps: calls over which the temperature falls from 1 to 1/16, by half a cosine.
        warmup: calls over which the weight of the divergence rises from 0, by half a cosine.
        divergence: that weight in the end; DALL-E's is 6.6.
    """

    model: DVAE
    calls: Tensor

    def __init__(self, model: DVAE, steps: int, warmup: int, divergence: float = 6.6) -> None:
        super().__init__()
        self.model = model
        self.steps, self.warmup = positive("steps", steps), positive("warmup", warmup)
        self.divergence = divergence
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))  # in the checkpoint, for a resumed run

    def _progress(self, over: int) -> Tensor:
        """From 0 to 1 by half a cosine, over so many calls."""
        return 0.5 - 0.5 * (self.calls.clamp(max=over) * (math.pi / over)).cos()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch["image"] (B, C, H, W) normalised -> "loss" and its parts, in nats per pixel and channel."""
        images = batch["image"]
        temperature = 1 + (1 / 16 - 1) * self._progress(self.steps)
        weight = self.divergence * self._progress(self.warmup)
        nll, divergence = (t.mean() / images[0].numel() for t in self.model(images, temperature))
        if self.training:
            self.calls += 1
        return {"loss": nll + weight * divergence, "nll": nll, "divergence": divergence, "temperature": temperature}

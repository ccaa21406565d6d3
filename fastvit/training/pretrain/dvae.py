"""The tokenizer of BEiT: a discrete variational autoencoder, as DALL-E's (Ramesh et al., 2021), trained here."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.checkpoints import files
from fastvit.layers.misc import count, positive
from fastvit.training.objectives import Batch, Objective
from fastvit.training.pretrain.encoder import Pixels

EPSILON = 0.1  # pixels lie in (0.1, 0.9) where the decoder models them, away from the logit's poles
FINEST = 0.03  # scale of a pixel's logit, a byte's step: pixels that never change would have an infinite likelihood


class Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, width, H, W) plus its residual, in the same shape."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DVAE(nn.Module):
    """Images to a grid of codes out of a vocabulary, and back.

    Args:
        mean, std: C values each, which images were normalised with.
        codes: size of the vocabulary; BEiT's is 8192.
        halvings: how often the encoder halves height and width: 3 of 112 pixels give 14 x 14 codes.
        width: channels of the hidden layers.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], codes: int = 8192, halvings: int = 3, width: int = 256
    ) -> None:
        super().__init__()
        if positive("codes", codes) < 2:
            raise ValueError(f"codes={codes}: a vocabulary has 2 codes at least")
        self.codes, self.halvings, width = codes, count("halvings", halvings), positive("width", width)
        self.pixels = Pixels(mean, std)
        self.channels = channels = len(mean)
        down: list[nn.Module] = [Residual(width)]
        up: list[nn.Module] = [Residual(width)]
        for _ in range(halvings):
            down += [nn.MaxPool2d(2), Residual(width)]
            up += [nn.Upsample(scale_factor=2), Residual(width)]
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), *down, nn.ReLU(), nn.Conv2d(width, codes, 1)
        )
        self.decoder = nn.Sequential(nn.Conv2d(codes, width, 1), *up, nn.ReLU(), nn.Conv2d(width, 2 * channels, 1))

    @classmethod
    def from_checkpoint(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> DVAE:
        """Build the tokenizer of some weights: a file, the folder of a run, or a state_dict."""
        raw = files.read(source)
        state = raw.tensors
        if "decoder.0.weight" not in state or "pixels.mean" not in state:
            raise ValueError(f"{raw.name} holds no tokenizer; `fastvit pretrain --method tokenizer` trains one")
        width, codes = state["decoder.0.weight"].shape[:2]
        halvings = sum(name.startswith("decoder.") and name.endswith(".conv1.weight") for name in state) - 1
        mean, std = (state[f"pixels.{name}"].flatten().tolist() for name in ("mean", "std"))
        model = cls(mean, std, codes, halvings, width)
        model.load_state_dict(state)
        return model

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, codes, H / 2^halvings, W / 2^halvings) of images (B, C, H, W), normalised."""
        if images.shape[2] % 2**self.halvings or images.shape[3] % 2**self.halvings:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} can't be halved {self.halvings} times into whole codes"
            )
        return self.encoder(images)

    @torch.no_grad()
    def tokenize(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the likeliest codes (B, *grid), int64, of images (B, C, H, W), normalised, of any size."""
        size = [side * 2**self.halvings for side in grid]
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.logits(images).argmax(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the images (B, C, H, W), in 0..1, of codes (B, h, w)."""
        mu = self.decoder(F.one_hot(codes, self.codes).movedim(-1, 1).to(self.pixels.mean.dtype)).chunk(2, 1)[0]
        return ((mu.sigmoid() - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)

    def forward(self, images: Tensor, temperature: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the terms of the evidence lower bound.

        Args:
            images: (B, C, H, W) normalised.
            temperature: of the Gumbel-softmax relaxation by which codes are drawn; None takes the likeliest.

        Returns:
            Of each image (B,), in nats: its negative log-likelihood, under logit-Laplace distributions of its pixels
            (DALL-E, appendix A.3), and the divergence of its codes from the uniform prior. And how often each code is
            taken, (codes,), as a distribution.
        """
        logits = self.logits(images).float()
        log_q = logits.log_softmax(1)
        if temperature is None:
            drawn = F.one_hot(logits.argmax(1), self.codes).movedim(-1, 1).to(logits.dtype)
        else:
            drawn = F.gumbel_softmax(logits, temperature, dim=1)
        mu, scale = self.decoder(drawn).float().chunk(2, 1)
        scale = scale.exp() + FINEST
        x = (1 - 2 * EPSILON) * self.pixels(images).clamp(0, 1) + EPSILON
        nll = (x.logit() - mu).abs() / scale + (2 * scale * x * (1 - x)).log()
        divergence = (log_q.exp() * (log_q + math.log(self.codes))).sum(1)
        return nll.flatten(1).sum(1), divergence.flatten(1).sum(1), drawn.detach().mean((0, 2, 3))


class Tokenizing(Objective):
    """The dVAE's evidence lower bound, per pixel, with two schedules over the run, of half a cosine each.

    Their ends are DALL-E's (appendix A.2). Its lengths are 5,000 and 150,000 of 3,000,000 steps; ours are shares of a
    run of any length, by default longer ones.

    Args:
        model: the :class:`DVAE`.
        divergence: weight of the divergence from the uniform prior in the end; DALL-E's is 6.6.
        warmup: share of the run over which that weight rises, from 0.
        anneal: share of the run over which the temperature falls, from 1 to 1/16.
    """

    model: DVAE

    def __init__(self, model: DVAE, divergence: float = 6.6, warmup: float = 0.1, anneal: float = 0.5) -> None:
        super().__init__()
        if not 0 <= divergence < math.inf:
            raise ValueError(f"divergence={divergence} is negative or not finite")
        self.model = model
        self.divergence, self.warmup, self.anneal = divergence, warmup, anneal
        for name, share in (("warmup", warmup), ("anneal", anneal)):
            if not 0 < share <= 1:
                raise ValueError(f"{name}={share}; accepted: above 0, at most 1")

    def _risen(self, share: float) -> float:
        """Return the height of a rise from 0 to 1 over so much of the run."""
        return 0.5 - 0.5 * math.cos(math.pi * min(self.progress / share, 1.0))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and its parts, in nats per pixel and channel, of batch["image"] (B, C, H, W), normalised.

        "perplexity" tells how many codes are in use: the exponential of their entropy over the batch. Evaluation takes
        the likeliest codes, and the whole weight of the divergence.
        """
        images = batch["image"]
        temperature = 1 + (1 / 16 - 1) * self._risen(self.anneal) if self.training else None
        weight = self.divergence * (self._risen(self.warmup) if self.training else 1.0)
        nll, divergence, used = self.model(images, temperature)
        nll, divergence = nll.mean() / images[0].numel(), divergence.mean() / images[0].numel()
        perplexity = torch.special.entr(used).sum().exp()
        return {"loss": nll + weight * divergence, "nll": nll, "divergence": divergence, "perplexity": perplexity}

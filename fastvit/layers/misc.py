"""Small layers without matrices: LayerScale, stochastic depth, patch dropout; and shape arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit.packing import Sequences


def positive(name: str, value: Any) -> int:
    """Return ``value`` as an int of at least 1, or raise a ValueError that names it."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value.__index__()


def count(name: str, value: Any) -> int:
    """Return ``value`` as an int of at least 0, or raise a ValueError that names it."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    return value.__index__()


def pair(name: str, value: Any) -> tuple[int, int]:
    """Return ``value`` as (height, width): a positive int stands for both."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2:
        raise ValueError(f"{name} must be an integer or (height, width), got {value!r}")
    return positive(name, values[0]), positive(name, values[1])


def rate(name: str, value: float) -> float:
    """Return ``value`` as a probability in [0, 1], or raise a ValueError that names it."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return float(value)


class LayerScale(nn.Module):
    """x * gamma, a learned scale per channel (Touvron et al., "Going deeper with Image Transformers", 2021).

    Args:
        dim: channels D.
        init_values: what gamma (D,) starts with.
        inplace: write the result over the input when run as a module.
    """

    def __init__(
        self,
        dim: int,
        init_values: float = 1e-5,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init_values = init_values
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gamma to ``init_values``."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result for x (..., D), of the same shape."""
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, zero whole images of a branch and scale up the rest."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = rate("drop_prob", drop_prob)

    def row_scale(self, x: Tensor, sequences: Sequences | None = None) -> Tensor | None:
        """Return 0 or 1 / (1 - drop_prob) for each image of x (B, ...), (B,) float32 at least; None if idle.

        Of images packed in x (1, total, ...), as ``sequences`` says, that of each token: (total,).
        """
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep, images = 1.0 - self.drop_prob, x.shape[0] if sequences is None else sequences.cu_seqlens.shape[0] - 1
        kept = x.new_empty(images, dtype=torch.promote_types(x.dtype, torch.float32)).bernoulli_(keep)
        kept = kept.div_(keep) if keep > 0.0 else kept
        return kept if sequences is None else kept[sequences.image]

    def forward(self, x: Tensor, sequences: Sequences | None = None) -> Tensor:
        """Return x (B, ...), or packed images (1, total, ...), with whole images dropped."""
        scale = self.row_scale(x, sequences)
        if scale is None:
            return x
        rows = (-1,) if sequences is None else (1, -1)
        return x * scale.to(x.dtype).view(*rows, *[1] * (x.ndim - len(rows)))

    def extra_repr(self) -> str:
        """Return the rate, for print(model)."""
        return f"drop_prob={self.drop_prob:0.3f}"


class PatchDropout(nn.Module):
    """In training, keep a random subset of the patch tokens of each image (Liu et al., "PatchDropout", 2022).

    Args:
        prob: share of the patches dropped, in [0, 1).
        num_prefix_tokens: leading tokens that always stay.
    """

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        if not 0.0 <= prob < 1.0:
            raise ValueError(f"patch_drop_rate must be in [0, 1), got {prob!r}")
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens

    def draw(self, x: Tensor) -> Tensor | None:
        """Return which patches of x (B, T, D) stay, (B, T' - P) int64, in a random order as in timm; None: all."""
        if not self.training or self.prob == 0.0:
            return None
        count = x.shape[1] - self.num_prefix_tokens
        keep = max(1, int(count * (1.0 - self.prob)))
        return torch.randn(x.shape[0], count, device=x.device).argsort(dim=-1)[:, :keep]

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the tokens of x (B, T, D) that stay, (B, T', D), in the order of ``kept``, by default a new draw."""
        kept = self.draw(x) if kept is None else kept
        if kept is None:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        patches = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return torch.cat([prefix, patches], dim=1)

    def of_packed(self, x: Tensor, sequences: Sequences) -> tuple[Tensor, Sequences, Tensor | None]:
        """Return the tokens of packed x (1, total, D) that stay, (1, total', D), their sequences, and their indices.

        These are the tokens of x by their index, (total',) int64, or None for all.

        How many stay in all must be known without a look at the sizes, which are on the device: of N patches of n
        images n + floor((N - n) (1 - prob)), and of each image its share of that to within one patch, one at least.
        """
        if not self.training or self.prob == 0.0:
            return x, sequences, None
        patches, places = sequences.without(self.num_prefix_tokens)
        images, share = sequences.images, 1.0 - self.prob
        one_each = torch.arange(images + 1, device=x.device)
        starts = one_each + ((patches.cu_seqlens - one_each).double() * share).floor().long()  # of what stays
        total = images + int((places.shape[0] - images) * share)

        # Patches in an order that is random within each image, of which each image's first ones stay.
        order = (patches.image + torch.rand(places.shape, device=x.device, dtype=torch.float64)).argsort()
        stay = Sequences.of(starts.int(), int((patches.longest - 1) * share) + 2, total)
        within = torch.arange(total, device=x.device) - starts[stay.image]
        kept = places[order[patches.cu_seqlens[stay.image] + within]]

        prefix = self.num_prefix_tokens
        rest = stay.with_leading(prefix)
        index = torch.empty(rest.image.shape, dtype=torch.long, device=x.device)
        index[rest.leading_tokens(prefix)] = sequences.leading_tokens(prefix)
        index[rest.without(prefix)[1]] = kept
        return x.index_select(1, index), rest, index

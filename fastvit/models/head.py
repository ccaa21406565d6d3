"""From a ViT's tokens to its logits: the pools."""

from __future__ import annotations

from torch import Tensor, nn

from fastvit.layers import AttentionPoolLatent, AttentionPoolPrr, fuse
from fastvit.layers.packed import leading, reduce_tokens, split
from fastvit.packing import Sequences

POOLS = ("", "avg", "avgmax", "max", "token", "map", "prr")
LEARNED_POOLS = {"map": AttentionPoolLatent, "prr": AttentionPoolPrr}


def check_pool(pool: str, class_token: bool, distilled: bool = False) -> None:
    """Raise a ValueError where there is no such pool, or not with these tokens."""
    if pool not in POOLS:
        raise ValueError(f"unknown global_pool {pool!r}; accepted: {', '.join(map(repr, POOLS))}")
    if pool == "token" and not class_token:
        raise ValueError("global_pool='token' reads the class token; give class_token=True or another pool")
    if distilled and pool != "token":
        raise ValueError(
            f"global_pool={pool!r}: the heads of a distilled model read their own tokens; accepted: 'token'"
        )


def pool_tokens(x: Tensor, pool: str, skip: int, sequences: Sequences | None, layer: nn.Module | None = None) -> Tensor:
    """Return the pooled tokens of each image, (B or n, D), or x where the pool is "".

    Args:
        x: (B, T, D), or packed images (1, total, D) with their ``sequences``.
        skip: leading tokens that a mean, a maximum or a ``layer`` leaves out.
        layer: an attention pool, which takes the place of ``pool``.

    Raises:
        ValueError: an unknown pool, or sequences of another number of tokens.
    """
    if sequences is not None and x.shape[1] != sequences.image.shape[0]:
        raise ValueError(
            f"{x.shape[1]} tokens with sequences of {sequences.image.shape[0]}; where patches are dropped in "
            "training, only the model itself knows which stayed"
        )
    if layer is not None:
        if sequences is None:
            return layer(x[:, skip:])
        return layer(split(x, skip, sequences)[1], sequences=sequences.without(skip)[0])
    match pool:
        case "":
            return x
        case "token":
            return x[:, 0] if sequences is None else leading(x, 1, sequences)[0]
        case "avg":
            return reduce_tokens(x, "mean", sequences, skip)
        case "max":
            return reduce_tokens(x, "max", sequences, skip)
        case "avgmax":
            return 0.5 * (reduce_tokens(x, "max", sequences, skip) + reduce_tokens(x, "mean", sequences, skip))
        case unknown:
            raise ValueError(f"unknown pool_type {unknown!r}; accepted: '', avg, avgmax, max, token")


def classify(head: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of pooled tokens x (B, D): (B, num_classes), or x without a classifier."""
    return head(x) if type(head) is nn.Identity else fuse.linear(head, x)

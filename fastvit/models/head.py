"""From a ViT's tokens to its logits: the pool, and the classifiers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvit.layers import AttentionPoolLatent, AttentionPoolPrr, fuse
from fastvit.layers.misc import count
from fastvit.layers.packed import leading, reduce_tokens, split
from fastvit.packing import Sequences

POOLS = ("", "avg", "avgmax", "max", "token", "map", "prr")
_LEARNED_POOLS = {"map": AttentionPoolLatent, "prr": AttentionPoolPrr}


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


class Head(nn.Module):
    """What a ViT does after its blocks."""

    attn_pool: nn.Module | None
    distilled_training: bool
    embed_dim: int
    fc_norm: nn.Module
    global_pool: str
    has_class_token: bool
    head: nn.Module
    head_dist: nn.Module | None
    head_drop: nn.Module
    head_hidden_size: int
    num_classes: int
    num_prefix_tokens: int
    patch_embed: Any
    pool_include_prefix: bool
    pre_logits: nn.Module

    def _classifier(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.patch_embed.proj.weight if hasattr(self.patch_embed, "proj") else next(self.parameters())
        return nn.Linear(self.head_hidden_size, self.num_classes, device=like.device, dtype=like.dtype)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The last layer: a Linear, or an Identity without classes; of a distilled model both."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return the logits of both heads of a distilled model, for a loss of each."""
        self.distilled_training = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the pre-training head by one zero-initialised linear layer (section 3.2 of the paper).

        Raises:
            ValueError: an unknown pool, one with weights that this model lacks, or one that a distilled model has not:
                there "" is "token", as in timm.
        """
        num_classes = count("num_classes", num_classes)
        if self.head_dist is not None:
            check_pool(global_pool or "token", self.has_class_token, distilled=True)
        elif global_pool is not None:
            check_pool(global_pool, self.has_class_token)
            if global_pool in _LEARNED_POOLS and type(self.attn_pool) is not _LEARNED_POOLS[global_pool]:
                raise ValueError(f"global_pool={global_pool!r} has layers of its own; build the model with it")
            if global_pool not in _LEARNED_POOLS:
                self.attn_pool = None
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.pre_logits = nn.Identity().train(self.training)
        self.head_hidden_size = self.embed_dim
        for name in ("head",) if self.head_dist is None else ("head", "head_dist"):
            head = self._classifier().train(self.training)
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
            setattr(self, name, head)

    def pool(self, x: Tensor, pool_type: str | None = None, sequences: Sequences | None = None) -> Tensor:
        """tokens (B, T, D) -> (B, D), or all of them where the pool is "".

        Of packed images, tokens (1, total, D) and ``sequences`` (``PackedImages.sequences(num_prefix_tokens)``) ->
        (n, D).

        Raises:
            ValueError: an unknown pool_type, or sequences of another number of tokens.
        """
        if sequences is not None and x.shape[1] != sequences.image.shape[0]:
            raise ValueError(
                f"{x.shape[1]} tokens with sequences of {sequences.image.shape[0]}; where patches are dropped in "
                "training, only the model itself knows which stayed"
            )
        skip = 0 if self.pool_include_prefix else self.num_prefix_tokens
        if self.attn_pool is not None:
            if sequences is None:
                return self.attn_pool(x[:, skip:])
            return self.attn_pool(split(x, skip, sequences)[1], sequences=sequences.without(skip)[0])
        match self.global_pool if pool_type is None else pool_type:
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

    def forward_head(self, x: Tensor, pre_logits: bool = False, sequences: Sequences | None = None) -> Any:
        """tokens (B, T, D) -> logits (B, num_classes), or with ``pre_logits`` what the classifier reads.

        Of packed images, tokens (1, total, D) with their ``sequences``, as in :meth:`pool`. Of a distilled model the
        mean of what its two heads give, or read; in training after :meth:`set_distilled_training` the logits of both.
        """
        if self.head_dist is None:
            x = self.pool(x) if sequences is None else self.pool(x, sequences=sequences)
            x = self.pre_logits(self.head_drop(self.fc_norm(x)))
            return x if pre_logits else _classified(self.head, x)
        tokens, _ = split(x, 2, sequences)
        read, read_dist = (self.head_drop(self.fc_norm(tokens[:, i])) for i in range(2))
        if not pre_logits:
            read, read_dist = _classified(self.head, read), _classified(self.head_dist, read_dist)
            if self.distilled_training and self.training:
                return read, read_dist
        return (read + read_dist) / 2


def _classified(head: nn.Module, x: Tensor) -> Tensor:
    return head(x) if type(head) is nn.Identity else fuse.linear(head, x)

"""Attention maps, rollout and distances, filters and positions of a ViT; ``fastvit inspect`` draws them."""

from fastvit.analysis.attention import (
    Rollout,
    attention_maps,
    distance_and_rollout,
    mean_attention_distance,
    patch_filters,
    position_similarity,
    rollout,
)

__all__ = [
    "Rollout",
    "attention_maps",
    "distance_and_rollout",
    "mean_attention_distance",
    "patch_filters",
    "position_similarity",
    "rollout",
]

"""What a Vision Transformer attends to and has learned; ``fastvit inspect`` draws it."""

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

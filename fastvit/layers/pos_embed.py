"""The other position embeddings that the ViT paper tried (appendix D.3, table 8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit.layers import fuse
from fastvit.layers.attention import Attention, Window
from fastvit.layers.resample import resample_pos_embed
from fastvit.layers.token_context import TokenContext

torch.fx.wrap("resample_pos_embed")


class PosEmbed(nn.Module):
    """Tables of learned position embeddings, (tables, P + h * w, D), where a patch's row may consist of two halves.

    Args:
        grid: (h, w) of the patches.
        prefix: P, how many rows are for prefix tokens.
        dim: width D.
        tables: how many there are.
        axes: a patch has an embedding of D / 2 for its column beside one for its row, in place of its own.
    """

    def __init__(
        self,
        grid: Window,
        prefix: int,
        dim: int,
        tables: int = 1,
        axes: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def table(rows: int, width: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(tables, rows, width, device=device, dtype=dtype)) if rows else None

        self.grid, self.tables = grid, tables
        self.prefix = table(prefix, dim)
        self.patches = None if axes else table(grid[0] * grid[1], dim)
        self.x, self.y = (table(size, dim // 2) if axes else None for size in (grid[1], grid[0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all rows from a normal of the deviation that timm's positions start with."""
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def set_grid(self, grid: Window) -> None:
        """Hold the tables for another grid of patches from now on."""
        for name, (new, old) in self._sizes(grid).items():
            table = getattr(self, name)
            rows = resample_pos_embed(table.detach(), new, old, 0)
            setattr(self, name, nn.Parameter(rows, requires_grad=table.requires_grad))
        self.grid = grid

    def _sizes(self, grid: Window) -> dict[str, tuple[Window, Window]]:
        """Return for each table of patches its rows in the other grid, and in its own."""
        if self.x is None:
            return {"patches": (grid, self.grid)}
        (h, w), (own_h, own_w) = grid, self.grid
        return {"x": ((w, 1), (own_w, 1)), "y": ((h, 1), (own_h, 1))}

    def forward(self, grid: Window) -> Tensor:
        """Return the tables for a grid (h, w), resampled from their own: (tables, P + h * w, D)."""
        found: dict[str, Any] = {
            name: resample_pos_embed(getattr(self, name), new, old, 0) for name, (new, old) in self._sizes(grid).items()
        }
        if self.x is None:
            patches = found["patches"]
        else:
            x, y = found["x"].unsqueeze(1), found["y"].unsqueeze(2)
            halves = x.expand(-1, grid[0], -1, -1), y.expand(-1, -1, grid[1], -1)
            patches = torch.cat(halves, dim=-1).flatten(1, 2)
        return patches if self.prefix is None else torch.cat([self.prefix, patches], dim=1)


@fuse.branch
class RelativeAttention(Attention):
    """Self-attention with relative position keys: a query's products with them are added to its scores.

    Distances count along the sequence, prefix tokens first, then patches in raster order. Each head has keys of its
    own.

    Args:
        dim: width D of the tokens.
        num_heads: heads H.
        tokens: T, as many as there are in a sequence.
        **options: as in :class:`Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        keys = torch.empty(num_heads, 2 * tokens - 1, self.head_dim, device=device, dtype=dtype)
        self.rel_pos_keys = nn.Parameter(keys)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the keys from a normal of the deviation that positions start with."""
        nn.init.trunc_normal_(self.rel_pos_keys, std=0.02)

    def relative_options(self, context: TokenContext) -> dict[str, Any]:
        """Return the arguments of ops.attention for the relative position keys."""
        return {"rel_pos_keys": self.rel_pos_keys}

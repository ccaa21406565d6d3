"""The layers of a Vision Transformer, with timm's arguments and state_dict keys, on :mod:`fastvit.ops`."""

from fastvit.activations import GELUTanh, QuickGELU, ReLUSquared
from fastvit.layers.attention import Attention, AttentionPoolLatent, AttentionPoolPrr
from fastvit.layers.axial import AxialAttention
from fastvit.layers.beit import BeitAttention, RelativePositionBias, Windowed
from fastvit.layers.block import BeitBlock, Block, Blocks
from fastvit.layers.fuse import remember_forward
from fastvit.layers.misc import DropPath, LayerScale, PatchDropout
from fastvit.layers.mlp import Mlp, SwiGLU
from fastvit.layers.norm import LayerNorm
from fastvit.layers.patch_embed import PatchEmbed
from fastvit.layers.pos_embed import PosEmbed, RelativeAttention
from fastvit.layers.token_context import TokenContext

remember_forward(BeitBlock, Block, Blocks, PatchEmbed)

__all__ = [
    "Attention",
    "AttentionPoolLatent",
    "AttentionPoolPrr",
    "AxialAttention",
    "BeitAttention",
    "BeitBlock",
    "Block",
    "Blocks",
    "DropPath",
    "GELUTanh",
    "LayerNorm",
    "LayerScale",
    "Mlp",
    "PatchDropout",
    "PatchEmbed",
    "PosEmbed",
    "QuickGELU",
    "ReLUSquared",
    "RelativeAttention",
    "RelativePositionBias",
    "SwiGLU",
    "TokenContext",
    "Windowed",
]

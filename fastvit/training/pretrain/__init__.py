"""Pre-training without labels: masked patch prediction, BEiT and the tokenizer that it needs."""

from fastvit.training.pretrain.beit import Beit, blockwise_masks
from fastvit.training.pretrain.dvae import DVAE, Tokenizing
from fastvit.training.pretrain.masked import Corruption, MaskedPatches, mean_colours

__all__ = ["DVAE", "Beit", "Corruption", "MaskedPatches", "Tokenizing", "blockwise_masks", "mean_colours"]

"""Pre-training without labels: masked patch prediction, BEiT and the tokenizer that it needs."""

from fastvit.pretraining.beit import Beit, blockwise_masks
from fastvit.pretraining.dvae import DVAE, Tokenizing
from fastvit.pretraining.masked import Corruption, MaskedPatches, mean_colours

__all__ = ["DVAE", "Beit", "Corruption", "MaskedPatches", "Tokenizing", "blockwise_masks", "mean_colours"]

"""Weights from files, in the layouts of timm, torchvision, Hugging Face, OpenCLIP, DINOv2, DINOv3, BEiT and Google.

:func:`load_checkpoint` puts them into a model, :func:`convert` writes them in another layout, and
:func:`fastvit.from_checkpoint` builds the model that they are of. Nothing here knows a model class.
"""

from fastvit.checkpoints.load import convert, load_checkpoint, read_checkpoint

__all__ = ["convert", "load_checkpoint", "read_checkpoint"]

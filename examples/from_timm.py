"""A timm model's weights in fastvit: the same logits on two photographs. Run: python examples/from_timm.py [MODEL]"""

import sys

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

import fastvit

name = sys.argv[1] if len(sys.argv) > 1 else "vit_small_patch16_224"
theirs = timm.create_model(name).eval()  # pretrained=True for trained weights
ours = fastvit.create_model(name).eval()
ours.load_state_dict(theirs.state_dict())

photographs = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])  # (2, H, W, 3)
images = F.interpolate(photographs.permute(0, 3, 1, 2) / 255, (224, 224), mode="bicubic", antialias=True)
images = (images - 0.5) / 0.5

with torch.no_grad():
    difference = (ours(images) - theirs(images)).abs().max().item()
print(f"{name}: logits of timm and fastvit differ by at most {difference:.1e}")

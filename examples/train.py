"""Train a small ViT to tell two photographs apart, in mixed precision. Run: python examples/train.py [STEPS]"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

from fastvit import ViT

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
model = ViT(img_size=64, patch_size=8, num_classes=2, embed_dim=128, depth=4, num_heads=4, drop_path_rate=0.1)
model = model.to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random 64 x 64 crops (B, 3, 64, 64) and which photograph each is from (B,)."""
    labels = torch.randint(2, (size,))
    crops = []
    for label in labels.tolist():
        height, width = photographs[label].shape[1:]
        top, left = torch.randint(height - 64, ()), torch.randint(width - 64, ())
        crops.append(photographs[label][:, top : top + 64, left : left + 64])
    return (torch.stack(crops).to(device) - 0.5) / 0.5, labels.to(device)


for step in range(steps):
    images, labels = batch(32)
    with torch.autocast(device, torch.bfloat16):
        loss = F.cross_entropy(model(images).float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0 or step == steps - 1:
        print(f"step {step:3d}: loss {loss.item():.3f}")

model.eval()
images, labels = batch(64)
with torch.no_grad():
    print(f"accuracy on new crops: {(model(images).argmax(1) == labels).float().mean().item():.0%}")

"""Train a ViT with Hugging Face Accelerate, on as many processes as there are.

Run: python examples/with_accelerate.py [EPOCHS], or accelerate launch examples/with_accelerate.py [EPOCHS]
"""

import sys

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import MODEL, load
from torch.utils.data import DataLoader

import fastvit

accelerator = Accelerator()
set_seed(0)
training, test = load()
model = fastvit.ViT(**MODEL)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
batches, tests = DataLoader(training, 64, shuffle=True), DataLoader(test, 64)
model, optimizer, batches, tests = accelerator.prepare(model, optimizer, batches, tests)

for epoch in range(int(sys.argv[1]) if len(sys.argv) > 1 else 15):
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

model.eval()
correct = []
with torch.no_grad():
    for images, labels in tests:
        correct.append(accelerator.gather_for_metrics(model(images).argmax(1) == labels))
accelerator.print(f"test accuracy: {torch.cat(correct).float().mean().item():.2%}")

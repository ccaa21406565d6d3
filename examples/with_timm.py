"""Train by timm's parts: a timm model on fastvit's ops, timm's optimizer, schedule and Mixup.

Run: python examples/with_timm.py [EPOCHS]
"""

import sys

import timm
import torch
from digits import MODEL, load
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader

import fastvit

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
torch.manual_seed(0)
training, test = load()
model = timm.models.VisionTransformer(**MODEL)
fastvit.accelerate(model)  # in place: the same parameters and the same state_dict, on fused ops

optimizer = create_optimizer_v2(model, "adamw", lr=2e-3, weight_decay=0.05)
scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=1e-5)
mixup = Mixup(mixup_alpha=0.2, num_classes=MODEL["num_classes"])
loss_of = SoftTargetCrossEntropy()
for epoch in range(epochs):
    model.train()
    scheduler.step(epoch)
    for images, labels in DataLoader(training, 64, shuffle=True, drop_last=True):
        images, targets = mixup(images, labels)
        loss = loss_of(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

model.eval()
images, labels = test[:]
with torch.no_grad():
    print(f"test accuracy: {(model(images).argmax(1) == labels).float().mean().item():.2%}")

"""Train a ViT with Lightning. Run: python examples/with_lightning.py [EPOCHS]"""

import sys

import lightning
import torch
import torch.nn.functional as F
from digits import MODEL, load
from torch.utils.data import DataLoader

import fastvit


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = fastvit.ViT(**MODEL)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[torch.Tensor], _: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


lightning.seed_everything(0)
training, test = load()
trainer = lightning.Trainer(
    max_epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 15, logger=False, enable_checkpointing=False
)
model = Classifier()
trainer.fit(model, DataLoader(training, 64, shuffle=True))
(result,) = trainer.test(model, DataLoader(test, 360), verbose=False)
print(f"test accuracy: {result['accuracy']:.2%}")

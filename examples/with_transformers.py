"""Train a Hugging Face ViT on fastvit's attention by transformers' Trainer.

Run: python examples/with_transformers.py [EPOCHS]
"""

import sys
import tempfile

import torch
from digits import MODEL, load
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import fastvit.integrations.transformers

fastvit.integrations.transformers.register()  # from now on attn_implementation="fastvit" is a name that models take

set_seed(0)
training, test = load()
model = ViTForImageClassification(
    ViTConfig(
        image_size=MODEL["img_size"],
        patch_size=MODEL["patch_size"],
        num_channels=MODEL["in_chans"],
        num_labels=MODEL["num_classes"],
        hidden_size=MODEL["embed_dim"],
        intermediate_size=4 * MODEL["embed_dim"],
        num_hidden_layers=MODEL["depth"],
        num_attention_heads=MODEL["num_heads"],
        attn_implementation="fastvit",
    )
)


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 15,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=360,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=training,
        data_collator=collate,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
    )
    trainer.train()
    print(f"test accuracy: {trainer.evaluate(test)['eval_accuracy']:.2%}")

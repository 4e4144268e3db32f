"""Lightning: a module with training and validation steps, a checkpoint."""

import lightning
import torch
from common import digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(784, 32)
        self.second = nn.Linear(32, 10)

    def forward(self, x):
        return self.second(torch.relu(self.first(x.flatten(1))))

    def training_step(self, batch, _):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        print("loss", repr(loss.item()))
        return loss

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


lightning.seed_everything(0)
data = TensorDataset(*digits())
trainer = lightning.Trainer(
    max_epochs=2,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=2,
    default_root_dir="out",
)
model = Digits()
trainer.fit(model, DataLoader(data, batch_size=16, shuffle=True), DataLoader(data, batch_size=64))
print("accuracy", repr(trainer.callback_metrics["accuracy"].item()))

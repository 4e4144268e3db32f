"""A GAN in Lightning with manual optimization, as in Lightning's documentation."""

# /// script
# dependencies = ["lightning"]
#
# [tool.field]
# title = "Lightning, GAN with manual optimization"
# command = ["{python}", "{file}", "{seed}"]
# result = 'last losses ([\d.]+) ([\d.]+), spread ([\d.]+)'
# clock = 'trained for ([\d.]+) s'
# ///

import sys
import time

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LATENT, PIXELS = 64, 28


class GAN(L.LightningModule):
    """Two networks and two optimizers, which the module steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(LATENT, 128 * 7 * 7),
            nn.Unflatten(1, (128, 7, 7)),
            nn.BatchNorm2d(128),
            nn.ConvTranspose2d(128, 64, 4, 2, 1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 1, 4, 2, 1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 64, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(128 * 7 * 7, 1),
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return images."""
        return self.generator(z)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Step the generator, then the discriminator."""
        (real,) = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(real.shape[0], LATENT, device=self.device)
        valid, fake = torch.ones(real.shape[0], 1), torch.zeros(real.shape[0], 1)

        self.toggle_optimizer(optimizer_g)
        found = self.discriminator(self(z))
        g_loss = F.binary_cross_entropy_with_logits(found, valid)
        optimizer_g.zero_grad()
        self.manual_backward(g_loss)
        optimizer_g.step()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real_loss = F.binary_cross_entropy_with_logits(self.discriminator(real), valid)
        fake_loss = F.binary_cross_entropy_with_logits(self.discriminator(self(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        optimizer_d.zero_grad()
        self.manual_backward(d_loss)
        optimizer_d.step()
        self.untoggle_optimizer(optimizer_d)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[object]]:
        """Return the optimizers of both networks."""
        options = {"lr": 2e-4, "betas": (0.5, 0.999)}
        return [
            torch.optim.Adam(self.generator.parameters(), **options),
            torch.optim.Adam(self.discriminator.parameters(), **options),
        ], []


def make_images(count: int) -> torch.Tensor:
    """Return soft rings of several sizes, in [-1, 1]."""
    random = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, PIXELS)] * 2, indexing="ij")
    centre = 0.4 * torch.randn(count, 2, 1, 1, generator=random)
    radius = 0.2 + 0.5 * torch.rand(count, 1, 1, generator=random)
    distance = ((x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2).sqrt()
    return (2 * torch.exp(-80 * (distance - radius) ** 2) - 1).unsqueeze(1)


def main() -> None:
    """Train, and sample from the generator."""
    L.seed_everything(int(sys.argv[1]))
    loader = DataLoader(TensorDataset(make_images(3_200)), batch_size=64, shuffle=True)
    model = GAN()
    trainer = L.Trainer(
        max_epochs=4, accelerator="cpu", devices=1, enable_progress_bar=False, logger=False
    )
    start_s = time.perf_counter()
    trainer.fit(model, loader)
    print(f"trained for {time.perf_counter() - start_s:.2f} s")
    losses = trainer.callback_metrics
    with torch.no_grad():
        spread = model.eval()(torch.randn(64, LATENT)).std(dim=0).mean()
    print(f"last losses {losses['g_loss']:.4f} {losses['d_loss']:.4f}, spread {spread:.4f}")


if __name__ == "__main__":
    main()

"""timm: a small vision transformer and its own optimizer and scheduler, random images."""

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224", pretrained=False, num_classes=4, img_size=32, patch_size=8, depth=2
)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
scheduler = CosineLRScheduler(optimizer, t_initial=8)
loss_function = LabelSmoothingCrossEntropy(0.1)
for step in range(8):
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 4, (8,))
    loss = loss_function(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step(step + 1)
    print("step", step, "loss", repr(loss.item()))
model.eval()
with torch.inference_mode():
    print("top", model(torch.randn(2, 3, 32, 32)).argmax(1).tolist())
torch.save(model.state_dict(), "model.pt")

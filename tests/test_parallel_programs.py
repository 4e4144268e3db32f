"""Programs that are not told how to be shared out, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import side_by_side

BEGIN = """
import atexit
import json
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from flatout import agent

torch.manual_seed(0)
lines = []

def show(*values):
    lines.append([float(value) for value in values])

def train(model, data, loss_of, steps=6, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    for step, batch in enumerate(DataLoader(data, 7, shuffle=True)):
        if step == steps:
            break
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        if step == 0:
            show(*(p.grad.norm() for p in model.parameters() if p.grad is not None))
        optimizer.step()
        show(loss)

def end():
    parallel = agent._session._parallel
    shared = sum(parallel._sharing.shared.values()) if parallel else 0
    whole = [reason for _, reason in parallel._sharing.whole] if parallel else []
    print(json.dumps([lines, shared, whole]))

atexit.register(end)

"""

SHARED = {
    "images": """
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(128, 5),
)
data = TensorDataset(torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))
train(model, data, lambda x, y: F.cross_entropy(model(x), y, label_smoothing=0.1), 9)
model.eval()
with torch.no_grad():
    show(model(data.tensors[0]).argmax(1).eq(data.tensors[1]).sum())
""",
    "language": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 20)
        self.head.weight = self.embedding.weight
    def forward(self, tokens, mask):
        return self.head(self.layers(self.embedding(tokens), mask=mask, is_causal=True))
model = Model()
mask = nn.Transformer.generate_square_subsequent_mask(9)
data = TensorDataset(torch.randint(20, (60, 10)))
def loss_of(x):
    return F.cross_entropy(model(x[:, :-1], mask).flatten(0, 1), x[:, 1:].flatten())
train(model, data, loss_of)
""",
    "speech": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 8, 2, bidirectional=True)
        self.head = nn.Linear(16, 6)
    def forward(self, x):
        out, (h, c) = self.rnn(x)
        return F.log_softmax(self.head(out), 2), h
model = Model()
data = TensorDataset(torch.randn(40, 11, 5), torch.randint(1, 6, (40, 4)))
def loss_of(x, y):
    out, h = model(x.transpose(0, 1))
    lengths = torch.full((len(x),), 11), torch.full((len(x),), 4)
    return F.ctc_loss(out, y, *lengths) + 0.01 * h.square().mean()
train(model, data, loss_of)
""",
    "adversary": """
G = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))
D = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
of_g, of_d = (torch.optim.Adam(m.parameters(), 1e-3) for m in (G, D))
for _ in range(6):
    real, noise = torch.randn(7, 6), torch.randn(7, 4)
    fake = G(noise)
    mixed = (0.5 * real + 0.5 * fake.detach()).requires_grad_()
    slope, = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    loss = D(fake.detach()).mean() - D(real).mean() + 10 * penalty
    of_d.zero_grad(); loss.backward(); of_d.step()
    other = -D(fake).mean()
    of_g.zero_grad(); other.backward(); of_g.step()
    show(loss, other)
""",
    "pairs": """
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
def contrast(x):
    a, b = (F.normalize(model(x + 0.1 * torch.randn_like(x))) for _ in range(2))
    return F.cross_entropy(a @ b.T / 0.1, torch.arange(len(x)))
train(model, TensorDataset(torch.randn(60, 6)), contrast)
""",
    "dropout": """
model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 1))
train(model, TensorDataset(torch.randn(60, 6)), lambda x: model(x).square().mean())
show(torch.rand(()))
""",
    "batch norm": """
model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 1))
train(model, TensorDataset(torch.randn(60, 6)), lambda x: model(x).square().mean())
show(*model[1].running_mean)
""",
    "language with dropout": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16, 20)
        self.head.weight = self.embedding.weight
    def forward(self, tokens, mask):
        h = self.drop(self.embedding(tokens))
        return self.head(self.layers(h, mask=mask, is_causal=True))
model = Model()
mask = nn.Transformer.generate_square_subsequent_mask(9)
data = TensorDataset(torch.randint(20, (60, 10)))
def loss_of(x):
    return F.cross_entropy(model(x[:, :-1], mask).flatten(0, 1), x[:, 1:].flatten())
train(model, data, loss_of)
show(torch.rand(()), torch.randn(()), *torch.get_rng_state()[:64])
model.eval()
with torch.no_grad():
    show(loss_of(data.tensors[0]))
""",
    "one sample on a rank, not the outermost in memory": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 1)
    def forward(self, x):
        h = self.first(x.transpose(0, 1).contiguous()).transpose(0, 1)
        return self.head(F.dropout(h, 0.4) + torch.rand_like(h))
model = Model()
data = TensorDataset(torch.randn(12, 5, 6))
train(model, data, lambda x: model(x).square().mean())
opt = torch.optim.SGD(model.parameters(), 0.1)
for rows in (3, 4, 3):
    loss = model(torch.randn(rows, 5, 6)).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    show(loss, torch.rand(()))
""",
    "speech with dropout": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 8, 3, dropout=0.3, bidirectional=True)
        self.head = nn.Linear(16, 6)
    def forward(self, x):
        return F.log_softmax(self.head(F.dropout(self.rnn(x)[0], 0.2, self.training)), 2)
model = Model()
data = TensorDataset(torch.randn(40, 11, 5), torch.randint(1, 6, (40, 4)))
def loss_of(x, y):
    lengths = torch.full((len(x),), 11), torch.full((len(x),), 4)
    return F.ctc_loss(model(x.transpose(0, 1)), y, *lengths)
train(model, data, loss_of)
show(torch.rand(()))
""",
    "images with batch norm": """
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2),
    nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 5),
)
data = TensorDataset(torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))
train(model, data, lambda x, y: F.cross_entropy(model(x), y), 9)
for name, buffer in model.named_buffers():
    show(*buffer.flatten())
show(torch.rand(()))
model.eval()
with torch.no_grad():
    show(F.cross_entropy(model(data.tensors[0]), data.tensors[1]))
""",
    "adversary with batch norm": """
def up(a, b, *more):
    return nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), *more
def down(a, b, *more):
    return nn.Conv2d(a, b, 4, 2, 1, bias=False), *more, nn.LeakyReLU(0.2)
G = nn.Sequential(*up(6, 8, nn.BatchNorm2d(8), nn.ReLU()), *up(8, 8, nn.BatchNorm2d(8), nn.ReLU()),
                  *up(8, 3, nn.Tanh()))
D = nn.Sequential(*down(3, 8), *down(8, 8, nn.BatchNorm2d(8), nn.Dropout2d(0.2)),
                  nn.Conv2d(8, 1, 2))
of_g, of_d = (torch.optim.Adam(m.parameters(), 1e-3) for m in (G, D))
images = DataLoader(TensorDataset(torch.randn(40, 3, 8, 8)), 7, shuffle=True)
for real, in images:
    ones = torch.ones(len(real))
    fake = G(torch.randn(len(real), 6, 1, 1))
    of_d.zero_grad()
    loss = F.binary_cross_entropy_with_logits(D(real).flatten(), ones)
    loss.backward()
    other = F.binary_cross_entropy_with_logits(D(fake.detach()).flatten(), 0 * ones)
    other.backward()
    show(loss, other, *(p.grad.norm() for p in D.parameters()))
    of_d.step()
    of_g.zero_grad()
    loss = F.binary_cross_entropy_with_logits(D(fake).flatten(), ones)
    loss.backward()
    show(loss, *(p.grad.norm() for p in G.parameters()))
    of_g.step()
for module in (G, D):
    for buffer in module.buffers():
        show(*buffer.flatten())
show(torch.rand(()))
""",
    "modes that change": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 3)
    def forward(self, x):
        return self.head(self.body(x))
model = Model()
x, y = torch.randn(60, 6), torch.randn(60, 3)
def loss_of(a, b):
    loss = (model(a) - b).square().mean()
    model.body.eval()
    loss = loss + 0.5 * (model(a) - b).abs().mean()
    model.train()
    with torch.no_grad():
        model(a * 2)
    model.eval()
    with torch.no_grad():
        show((model(a) - b).square().mean())
    model.train()
    return loss
train(model, TensorDataset(x, y), loss_of)
show(*model.body[1].running_var, model.body[1].num_batches_tracked, torch.rand(()))
""",
    "a penalty on slopes through batch norm": """
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Dropout(0.2),
                      nn.Linear(8, 1))
def loss_of(x):
    x = x.clone().requires_grad_()
    score = model(x)
    slope, = torch.autograd.grad(score.sum(), x, create_graph=True)
    return score.square().mean() + (slope.norm(dim=1) - 1).square().mean()
train(model, TensorDataset(torch.randn(60, 6)), loss_of)
show(torch.rand(()))
""",
}

PARTLY = {
    "a shard that raises beside batch norms": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])
        self.last = nn.Linear(8, 1)
    def forward(self, x):
        h = self.norms[0](F.dropout(self.first(x), 0.2))
        if x[0, 0] > 90 and len(x) < 7:
            raise ValueError("a shard begins with a large number")
        return self.last(self.norms[1](h))
model = Model()
x = torch.randn(60, 6)
for step in range(6):
    a = x[7 * step : 7 * step + 7].clone()
    if step == 3:
        a[:, 0] = torch.tensor([1.0, 1, 100, 100, 1, 1, 1])
    loss = model(a).square().mean()
    model.zero_grad()
    loss.backward()
    if step == 3:
        show(*(p.grad.norm() for p in model.parameters()))
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    show(loss)
show(*model.norms[1].running_mean, *model.norms[0].running_var, torch.rand(()))
""",
}

WHOLE = {
    "draws for samples in another order": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1))
    def forward(self, x):
        h = self.inner(x)
        return h + 0.1 * h[torch.randperm(len(h))]
model = Model()
train(model, TensorDataset(torch.randn(60, 6)), lambda x: model(x).square().mean())
show(torch.rand(()))
""",
    "attention over the batch": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.gate = nn.Parameter(torch.zeros(()))
    def forward(self, x):
        h = self.inner(x)
        return h + self.gate * torch.softmax(h @ h.T, 1) @ h
model = Model()
train(model, TensorDataset(torch.randn(60, 6)), lambda x: model(x).square().mean())
""",
    "a loss inside": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
    def forward(self, x):
        h = F.normalize(self.inner(x))
        return F.cross_entropy(h @ h.T, torch.arange(len(x)))
model = Model()
train(model, TensorDataset(torch.randn(60, 6)), model)
""",
}


@pytest.mark.parametrize("name", [*SHARED, *PARTLY, *WHOLE])
def test_a_program_computes_what_it_does_alone(name: str, tmp_path: Path) -> None:
    program = BEGIN + {**SHARED, **PARTLY, **WHOLE}[name]
    found = {}
    for ranks in (1, 2, 3):
        found[ranks] = []
        for outcome in side_by_side.run(program, ranks, tmp_path):
            assert outcome.status == 0, outcome.stderr
            found[ranks].append(json.loads(outcome.stdout))
    ((alone, _, _),) = found[1]
    for lines, shared, whole in found[2] + found[3]:
        assert [len(line) for line in lines] == [len(line) for line in alone]
        for line, expected in zip(lines, alone, strict=True):
            assert line == pytest.approx(expected, rel=1e-9)
        assert bool(shared) == (name not in WHOLE), whole
        assert bool(whole) == (name not in SHARED), whole

"""An actor-critic policy whose loss comes from a method of the module, as in stable-baselines3."""
# flatout run
# flatout run --set replay=operators
# flatout run --set optimizer=onepass --set gc=seldom --set evaluation=no_grad
# flatout run | rollouts
# flatout run --set replay=operators | rollouts

import sys

import torch
from torch import nn


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Flatten()
        self.body = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(4, 32), nn.Tanh()) for name in "ac"}
        )
        self.actor, self.critic = nn.Linear(32, 2), nn.Linear(32, 1)
        self.distribution = None

    def forward(self, x):
        x = self.features(x)
        self.distribution = torch.distributions.Categorical(logits=self.actor(self.body["a"](x)))
        return self.distribution.sample(), self.critic(self.body["c"](x))

    def evaluate(self, x, actions):
        x = self.features(x)
        self.distribution = torch.distributions.Categorical(logits=self.actor(self.body["a"](x)))
        values = self.critic(self.body["c"](x)).flatten()
        return values, self.distribution.log_prob(actions), self.distribution.entropy()


torch.manual_seed(0)
policy = Policy()
optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
for update in range(6):
    states, actions = torch.randn(64, 4), torch.randint(2, (64,))
    if "rollouts" in sys.argv:
        policy.train(False)
        with torch.no_grad():
            actions = torch.cat([policy(states[row : row + 1])[0] for row in range(64)])
        policy.train(True)
    for _ in range(5):
        values, log_prob, entropy = policy.evaluate(states, actions)
        loss = (values - 1).square().mean() - log_prob.mean() - 0.01 * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
    print(update, loss.item().hex(), policy.distribution.entropy().sum().item().hex())
print("evaluate" in vars(Policy), Policy.evaluate.__qualname__, policy.evaluate.__name__)
print([value.double().sum().item().hex() for value in policy.state_dict().values()])

"""What hooks, closures, schedulers and checkpoints see of an optimizer is what the program set."""
# long
# flatout run --set optimizer=fused

import pickle

import torch

torch.manual_seed(0)
net = torch.nn.Linear(4, 2)
inputs = torch.randn(16, 4)


def seen(optimizer: torch.optim.Optimizer) -> list[object]:
    saved = pickle.loads(pickle.dumps(optimizer))
    group = optimizer.state_dict()["param_groups"][0]
    return [group["fused"], group["foreach"], "fused: None" in repr(saved)]


for make in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
    optimizer = make(net.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: print("before", seen(o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: print("after", seen(o)))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure(optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
        print("closure", seen(optimizer))
        optimizer.zero_grad()
        loss = net(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        print(f"{float(optimizer.step(closure)):.4f}", seen(optimizer))
        schedule.step()
    kinds = {
        name: (value.dtype, value.device.type)
        for name, value in optimizer.state[net.weight].items()
        if value is not None
    }
    print(make.__name__, kinds, optimizer)

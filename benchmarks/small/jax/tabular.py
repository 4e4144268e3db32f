"""The same training as ``programs/tabular.py`` in JAX, with one jitted step."""

from __future__ import annotations

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def make_table(random: np.random.Generator, rows: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    x = random.normal(size=(rows, 32)).astype(np.float32)
    y = np.sin(2 * x[:, :8]).sum(1) + x[:, 8] * x[:, 9] + 0.1 * random.normal(size=rows)
    return x, y.astype(np.float32)[:, None]


def make_linear(random: np.random.Generator, inputs: int, outputs: int) -> list[jax.Array]:
    bound = inputs**-0.5
    return [
        jnp.asarray(random.uniform(-bound, bound, shape).astype(np.float32))
        for shape in ((inputs, outputs), (outputs,))
    ]


def loss_of(params: list[list[jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = params[-1]
    return jnp.square(x @ weight + bias - y).mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    x_all, y_all = make_table(random)
    sizes = (32, 64, 64, 1)
    params = [make_linear(random, *pair) for pair in itertools.pairwise(sizes)]
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state, x, y):
        loss, gradients = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    step = 0
    while step < arguments.steps:
        order = random.permutation(len(x_all))
        for rows in np.array_split(order, len(order) // 64):
            params, state, loss = train_step(params, state, x_all[rows], y_all[rows])
            if step % 100 == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)
            step += 1
            if step == arguments.steps:
                break


if __name__ == "__main__":
    main()

"""The same training as ``programs/gru.py`` in JAX, with one jitted step."""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

WINDOW, HIDDEN, BATCH_SIZE = 24, 32, 32


def make_series(random: np.random.Generator, length: int = 20_000) -> np.ndarray:
    hours = np.arange(length)[:, None]
    series = np.sin(2 * np.pi * hours / np.array([24.0, 60.0, 168.0, 37.0]))
    return (series + 0.1 * random.normal(size=(length, 4))).astype(np.float32)


def make_params(random: np.random.Generator) -> dict[str, jax.Array]:
    bound = HIDDEN**-0.5
    shapes = {
        "w_input": (4, 3 * HIDDEN),
        "b_input": (3 * HIDDEN,),
        "w_hidden": (HIDDEN, 3 * HIDDEN),
        "b_hidden": (3 * HIDDEN,),
        "w_head": (HIDDEN, 4),
        "b_head": (4,),
    }
    return {
        name: jnp.asarray(random.uniform(-bound, bound, shape).astype(np.float32))
        for name, shape in shapes.items()
    }


def forecast(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """After Cho et al., 2014, as torch.nn.GRU computes it."""
    gates_of_inputs = x @ params["w_input"] + params["b_input"]

    def advance(hidden, of_input):
        of_hidden = hidden @ params["w_hidden"] + params["b_hidden"]
        reset_x, update_x, new_x = jnp.split(of_input, 3, axis=1)
        reset_h, update_h, new_h = jnp.split(of_hidden, 3, axis=1)
        reset, update = jax.nn.sigmoid(reset_x + reset_h), jax.nn.sigmoid(update_x + update_h)
        new = jnp.tanh(new_x + reset * new_h)
        return (1 - update) * new + update * hidden, None

    start = jnp.zeros((x.shape[0], HIDDEN))
    last, _ = jax.lax.scan(advance, start, gates_of_inputs.swapaxes(0, 1))
    return last @ params["w_head"] + params["b_head"]


def loss_of(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.square(forecast(params, x) - y).mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    series = make_series(random)
    windows = np.lib.stride_tricks.sliding_window_view(series, WINDOW, axis=0)[:-1].swapaxes(1, 2)
    params = make_params(random)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state, x, y):
        loss, gradients = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    step = 0
    while step < arguments.steps:
        order = random.permutation(len(windows))
        for begin in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = order[begin : begin + BATCH_SIZE]
            batch = (windows[rows], series[rows + WINDOW])
            params, state, loss = train_step(params, state, *batch)
            if step % 25 == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)
            step += 1
            if step == arguments.steps:
                break


if __name__ == "__main__":
    main()

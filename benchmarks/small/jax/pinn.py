"""The same training as ``programs/pinn.py`` in JAX, with one jitted step."""

from __future__ import annotations

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

VISCOSITY = 0.01 / np.pi
SIZES = (2, 20, 20, 20, 1)


def make_linear(random: np.random.Generator, inputs: int, outputs: int) -> list[jax.Array]:
    bound = inputs**-0.5
    return [
        jnp.asarray(random.uniform(-bound, bound, shape).astype(np.float32))
        for shape in ((inputs, outputs), (outputs,))
    ]


def solution(params: list[list[jax.Array]], t: jax.Array, x: jax.Array) -> jax.Array:
    """At one point."""
    hidden = jnp.stack([t, x])
    for weight, bias in params[:-1]:
        hidden = jnp.tanh(hidden @ weight + bias)
    weight, bias = params[-1]
    return (hidden @ weight + bias)[0]


def residual_of(params: list[list[jax.Array]], t: jax.Array, x: jax.Array) -> jax.Array:
    """What the equation leaves at one point."""
    u, (u_t, u_x) = jax.value_and_grad(solution, argnums=(1, 2))(params, t, x)
    u_xx = jax.grad(jax.grad(solution, argnums=2), argnums=2)(params, t, x)
    return u_t + u * u_x - VISCOSITY * u_xx


def loss_of(params, points, x_start, u_start):
    residuals = jax.vmap(residual_of, (None, 0, 0))(params, points[:, 0], points[:, 1])
    found = jax.vmap(solution, (None, None, 0))(params, 0.0, x_start)
    return jnp.square(residuals).mean() + jnp.square(found - u_start).mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    params = [make_linear(random, *pair) for pair in itertools.pairwise(SIZES)]
    x_start = np.linspace(-1, 1, 100, dtype=np.float32)
    u_start = -np.sin(np.pi * x_start)
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state, points):
        loss, gradients = jax.value_and_grad(loss_of)(params, points, x_start, u_start)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    for step in range(arguments.steps):
        points = random.uniform((0, -1), (1, 1), (500, 2)).astype(np.float32)
        params, state, loss = train_step(params, state, points)
        if step % 25 == 0:
            print(f"step {step} loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    main()

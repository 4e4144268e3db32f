"""The same inference as ``programs/rows.py`` in JAX, with one jitted call."""

from __future__ import annotations

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np

SIZES = (32, 128, 64, 2)


def make_linear(random: np.random.Generator, inputs: int, outputs: int) -> list[jax.Array]:
    bound = inputs**-0.5
    return [
        jnp.asarray(random.uniform(-bound, bound, shape).astype(np.float32))
        for shape in ((inputs, outputs), (outputs,))
    ]


@jax.jit
def judge(params: list[list[jax.Array]], x: jax.Array) -> jax.Array:
    (w1, b1), (w2, b2), (w3, b3) = params
    x = x @ w1 + b1
    mean = x.mean(1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(1, keepdims=True) + 1e-5)
    x = jax.nn.gelu(x, approximate=False)
    x = jax.nn.gelu(x @ w2 + b2, approximate=False)
    return jax.nn.softmax(x @ w3 + b3, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    params = [make_linear(random, *pair) for pair in itertools.pairwise(SIZES)]
    requests = random.normal(size=(4096, 1, 32)).astype(np.float32)
    total = 0.0
    for step in range(arguments.steps):
        scores = judge(params, requests[step % 4096])
        total += float(scores[0, 1])
        if step % 1000 == 0:
            print(f"step {step} counts {total:.5f}", flush=True)


if __name__ == "__main__":
    main()

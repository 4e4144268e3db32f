"""A physics-informed network by DeepXDE for Burgers' equation: Adam, then L-BFGS by closures."""

# /// script
# dependencies = ["deepxde"]
#
# [tool.field]
# title = "DeepXDE, physics-informed network"
# command = ["{python}", "{file}", "{seed}"]
# environment = { DDE_BACKEND = "pytorch" }
# result = 'mean residual ([\d.e-]+), train loss ([\d.e-]+)'
# clock = 'trained for ([\d.]+) s'
# ///

import sys
import time

import deepxde as dde
import numpy as np

VISCOSITY = 0.01 / np.pi


def residual_of(x, y):
    """Return what the equation leaves at the points."""
    dy_x = dde.grad.jacobian(y, x, i=0, j=0)
    dy_t = dde.grad.jacobian(y, x, i=0, j=1)
    dy_xx = dde.grad.hessian(y, x, i=0, j=0)
    return dy_t + y * dy_x - VISCOSITY * dy_xx


def main() -> None:
    """Train with both optimizers."""
    dde.config.set_random_seed(int(sys.argv[1]))
    space, span = dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99)
    domain = dde.geometry.GeometryXTime(space, span)
    boundary = dde.icbc.DirichletBC(domain, lambda x: 0, lambda _, on_boundary: on_boundary)
    initial = dde.icbc.IC(
        domain, lambda x: -np.sin(np.pi * x[:, 0:1]), lambda _, on_initial: on_initial
    )
    data = dde.data.TimePDE(
        domain,
        residual_of,
        [boundary, initial],
        num_domain=2540,
        num_boundary=80,
        num_initial=160,
    )
    model = dde.Model(data, dde.nn.FNN([2] + [20] * 3 + [1], "tanh", "Glorot normal"))
    start_s = time.perf_counter()
    model.compile("adam", lr=1e-3)
    model.train(iterations=600)
    dde.optimizers.set_LBFGS_options(maxiter=500)
    model.compile("L-BFGS")
    model.train()
    print(f"trained for {time.perf_counter() - start_s:.2f} s")
    points = domain.random_points(2_000)
    residual = np.abs(model.predict(points, operator=residual_of)).mean()
    loss = np.sum(model.train_state.loss_train)
    print(f"mean residual {residual:.4e}, train loss {loss:.4e}")


if __name__ == "__main__":
    main()

"""Compressed sensing: the linear algebra, the iteration, and a small training."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import results
from examples.inverse import networks, sensing, train

FOLDER = Path(train.__file__).parent


@pytest.fixture(scope="module")
def digits():
    """Images of 8 × 8, with 16 measurements."""
    return sensing.load("digits", 0.25)


def test_the_script_is_short():
    assert len((FOLDER / "train.py").read_text().splitlines()) <= 200


def test_linear_reconstructions_are_those_of_their_formulas(apart, digits):
    """By dense solves in float64: the mean of a Gaussian posterior, and ridge."""
    rows = digits.rows.astype(float)
    np.testing.assert_allclose(rows @ rows.T, np.eye(16), atol=1e-6)
    y = digits.measure(digits.test[:3], (0,))
    mean = digits.train.mean(0)
    precision = np.linalg.inv(np.cov(digits.train.T) + 1e-8 * np.eye(64))
    normal = rows.T @ rows / sensing.NOISE**2 + precision
    known = rows.T @ y.T / sensing.NOISE**2 + (precision @ mean)[:, None]
    known = np.linalg.solve(normal, known).T
    # Both in single precision; pixels that are always 0 have a variance of 1e-8.
    np.testing.assert_allclose(digits.linear(y), known, atol=2e-3)
    normal = rows.T @ rows + sensing.NOISE**2 * np.eye(64)
    known = np.linalg.solve(normal, rows.T @ y.T).T
    np.testing.assert_allclose(digits.ridge(y), known, atol=1e-5)


@pytest.mark.full
def test_each_image_fits_what_was_measured(apart, digits):
    """At any iteration, as P projects; and the fixed point is one of the step."""
    model = networks.Reconstruction("fixed point", digits, 4, 0.8, 0)
    y = jnp.asarray(digits.measure(digits.test[:5], (0,)))
    for kind in networks.KINDS:
        x = networks.Reconstruction(kind, digits, 4, 0.8, 0)(y)
        np.testing.assert_allclose(x @ digits.rows.T, y, atol=1e-5)
    x, cell = model(y), model.state.cell
    image = cell(cell.injection(y), x)
    # The tolerance of the solve is 1e-3.
    assert jnp.linalg.norm(image - x) <= 1.01e-3 * jnp.linalg.norm(image)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_it_learns_and_stays_when_iterated_longer(apart):
    """Better than both linear reconstructions, and the same after 64 iterations."""
    train.Inverse(tiny=True).run()
    path = results.RESULTS / "example-inverse-custom.json"
    found = json.loads(path.read_text())
    (run,) = found["networks"]["fixed point"]
    loss, tests = run["history"]["mean"]["loss"], run["tests"]
    assert loss[-1] < 0.9 * loss[0]
    assert tests["psnr"][-1] > max(found["linear"].values()) + 0.3
    assert abs(tests["psnr"][-1] - tests["psnr"][-2]) < 0.01
    assert tests["residual"][-1] < 1e-4 and tests["radius"] < 1
    assert path.with_suffix(".png").exists()

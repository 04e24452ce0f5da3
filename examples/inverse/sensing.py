"""Images of digits, seen through few noisy measurements, and what linear algebra makes.

A measurement is y = Ax + noise, with orthonormal rows of A, at random.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import images

NOISE = 0.02


@dataclasses.dataclass(frozen=True, eq=False)
class Sensing:
    """Images as rows, and the operators on them.

    ``gain`` takes y - A · mean to the least-squares image under the covariance of
    training images: the best that is linear in y.
    """

    train: np.ndarray
    test: np.ndarray
    rows: np.ndarray
    mean: np.ndarray
    gain: np.ndarray

    @property
    def side(self) -> int:
        """Of an image, in pixels."""
        return round(self.train.shape[1] ** 0.5)

    def measure(self, x: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """What is seen of some images."""
        noise = np.random.default_rng(seed).normal(size=(len(x), len(self.rows)))
        return (x @ self.rows.T + NOISE * noise).astype(np.float32)

    def linear(self, y: jax.Array) -> jax.Array:
        """Least squares under the covariance of training images."""
        return self.mean + (y - self.rows @ self.mean) @ self.gain.T

    def ridge(self, y: jax.Array) -> jax.Array:
        """Plain regularized least squares: of all images that fit the smallest one."""
        return y @ self.rows / (1 + NOISE**2)


def load(name: str, fraction: float) -> Sensing:
    """The data mnist or digits, with measurements for a fraction of the pixels."""
    if name == "mnist":
        train, test = images.mnist("train")[0], images.mnist("test")[0][:1000]
    else:
        all_ = images.digits()[0]
        train, test = all_[:1437], all_[1437:]
    flat = lambda x: (x.reshape(len(x), -1) / train.max()).astype(np.float32)
    train, test = flat(train), flat(test)
    pixels = train.shape[1]
    random = np.random.default_rng(0).normal(size=(pixels, round(fraction * pixels)))
    rows = np.linalg.qr(random)[0].T
    covariance = np.cov(train[:20_000].T)
    seen = rows @ covariance @ rows.T + NOISE**2 * np.eye(len(rows))
    gain = covariance @ rows.T @ np.linalg.inv(seen)
    single = (np.asarray(a, np.float32) for a in (rows, train.mean(0), gain))
    return Sensing(train, test, *single)


def psnr(found: jax.Array, true: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in decibels, the mean over images."""
    return jnp.mean(-10 * jnp.log10(jnp.mean((found - true) ** 2, axis=1)))

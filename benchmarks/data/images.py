"""Images of digits: MNIST, and the small ones of scikit-learn."""

from __future__ import annotations

import gzip

import numpy as np

from benchmarks.data.fetch import fetch


def mnist(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """MNIST: images as uint8 ``[n, 28, 28]`` and labels ``[n]``."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images, labels = (
        gzip.decompress(fetch(f"mnist/{prefix}-{kind}-ubyte.gz").read_bytes())
        for kind in ("images-idx3", "labels-idx1")
    )
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels, np.frombuffer(labels, np.uint8, offset=8)


def load(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """The training images of mnist, or all digits: images and labels."""
    return mnist() if dataset == "mnist" else digits()


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits in scikit-learn: images uint8 0 … 16 ``[1797, 8, 8]``, labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)


def first_of_each_class(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The first image of each class, in the order of the classes."""
    return images[[int(np.flatnonzero(labels == c)[0]) for c in np.unique(labels)]]

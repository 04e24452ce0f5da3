"""Binary images, and what is left of them when they are corrupted."""

from __future__ import annotations

import numpy as np

from benchmarks.data import images as data


def load_images(dataset: str, num_images: int) -> np.ndarray:
    """The first image of each class, binary, flattened: float32 ``[image, pixel]``."""
    images, labels = data.load(dataset)
    # The paper's code calls every non-zero MNIST pixel on. The small digits are means
    # over 4×4 blocks, non-zero nearly everywhere: there, on is half or more.
    threshold = 1 if dataset == "mnist" else 8
    images = data.first_of_each_class(images, labels)[:num_images]
    return (images >= threshold).reshape(len(images), -1).astype(np.float32)


def corrupt(images: np.ndarray, draws: int) -> np.ndarray:
    """Half of the on-pixels of each image set to 0: ``[draw, image, pixel]``."""
    random = np.random.default_rng(1234)
    result = np.repeat(images[None], draws, axis=0)
    for image in result.reshape(-1, images.shape[1]):
        on = np.flatnonzero(image)
        image[random.choice(on, len(on) // 2, replace=False)] = 0
    return result


def pack(images: np.ndarray) -> list[str]:
    """Binary images as hexadecimal strings, for the result file."""
    return [np.packbits(image > 0.5).tobytes().hex() for image in images]


def unpack(packed: list[str], side: int) -> np.ndarray:
    """The inverse of ``pack``: ``[image, side, side]``."""
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(p), np.uint8)) for p in packed]
    return np.stack(bits)[:, : side * side].reshape(-1, side, side)

"""Data sets: downloaded with a checksum, or read from the folder in RBPJAX_DATA."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np

from benchmarks.harness import UsageError, require

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST = {
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}
WEATHER_URL = (
    "https://raw.githubusercontent.com/jesusgf96/NP_RNNs/"
    "0a33229c2bc114ad5ebb24132e34b8ac56384f85/data/"
)
WEATHER = {
    "WTH.csv": "153fead3ea2a83dc5c4127d3994af6b167322f6f5e292c99491f43a2caf14cd4",
    "WTH_2010-2013_hourly.csv.gz": (
        "e4acf7202cfc987c9ecabd9a797b0652a7292c136b2c34eb416450329443e3ca"
    ),
}


def fetch(folder: str, name: str, url: str, sha256: str | None) -> Path:
    """The file ``name``, whole and with the right checksum.

    ``$RBPJAX_DATA/folder/name`` if that variable is set, else the pooch cache, filled
    from ``url`` at need. A ``sha256`` of None is for a file that the caller checks.

    Raises:
      UsageError: if the folder or file is missing, the download fails, or the checksum
        is another one.
    """
    import pooch

    local = os.environ.get("RBPJAX_DATA")
    if local:
        path = Path(local) / folder / name
        require(
            path.is_file(),
            f"RBPJAX_DATA={local} has no {folder}/{name}; unset it to download",
        )
        require(
            sha256 is None or pooch.file_hash(str(path)) == sha256,
            f"{path} is damaged: its sha256 is not {sha256}",
        )
        return path
    pooch.get_logger().setLevel("ERROR")
    try:
        cache = pooch.os_cache("rbpjax") / folder
        known = sha256 and f"sha256:{sha256}"
        return Path(pooch.retrieve(url + name, known, name, cache))
    except Exception as error:  # no network, a bad mirror, a corrupt file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{name} could not be downloaded from {url}: {reason[:160]}; "
            f"or put it into a folder {folder}/ of RBPJAX_DATA"
        ) from None


def mnist(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """MNIST: images as uint8 ``[n, 28, 28]`` and labels ``[n]``."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images, labels = (
        gzip.decompress(fetch("mnist", name, MNIST_URL, MNIST[name]).read_bytes())
        for name in (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    )
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels, np.frombuffer(labels, np.uint8, offset=8)


def weather() -> tuple[np.ndarray, list[str]]:
    """Hourly weather 2010 to 2013: float32 ``[35064, 12]`` and the columns' names.

    As it is downloaded, or compressed in the folder of RBPJAX_DATA.
    """
    plain, packed = WEATHER
    local = os.environ.get("RBPJAX_DATA")
    if local and not (Path(local) / "weather" / plain).is_file():
        path = fetch("weather", packed, WEATHER_URL, WEATHER[packed])
        text = gzip.decompress(path.read_bytes()).decode()
    else:
        text = fetch("weather", plain, WEATHER_URL, WEATHER[plain]).read_text()
    head, *lines = text.strip().splitlines()
    values = np.array([line.split(",")[1:] for line in lines], np.float32)
    return values, head.strip().split(",")[1:]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits in scikit-learn: images uint8 0 … 16 ``[1797, 8, 8]``, labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)


def first_of_each_class(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The first image of each class, in the order of the classes."""
    return images[[int(np.flatnonzero(labels == c)[0]) for c in np.unique(labels)]]

"""Hourly weather."""

from __future__ import annotations

import gzip

import numpy as np

from benchmarks.data.fetch import fetch, is_local

PACKED, PLAIN = "weather/WTH_2010-2013_hourly.csv.gz", "weather/WTH.csv"


def weather() -> tuple[np.ndarray, list[str]]:
    """Hourly weather 2010 to 2013: float32 ``[35064, 12]`` and the columns' names.

    As it is downloaded, or compressed in the folder of RBPJAX_DATA.
    """
    if is_local() and not is_local(PLAIN):
        text = gzip.decompress(fetch(PACKED).read_bytes()).decode()
    else:
        text = fetch(PLAIN).read_text()
    head, *lines = text.strip().splitlines()
    values = np.array([line.split(",")[1:] for line in lines], np.float32)
    return values, head.strip().split(",")[1:]

"""Files of data: downloaded with a checksum, or read from the folder in RBPJAX_DATA."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.harness.options import UsageError, require

# Its SHA-256 is not known to us: its reader checks it by another sum.
UNCHECKED = {
    "planetoid/ind.pubmed.allx": (
        "https://raw.githubusercontent.com/kimiyoung/planetoid/"
        "af6abf468a772cc055bec88c52e4d6f51b7c37e3/data/ind.pubmed.allx"
    )
}


@cache
def registry() -> Any:
    """Pooch's registry of all files: checksums, addresses, and the cache folder."""
    import pooch

    pooch.get_logger().setLevel("ERROR")
    made = pooch.create(pooch.os_cache("rbpjax"), base_url="")
    made.load_registry(Path(__file__).with_name("registry.txt"))
    made.registry |= dict.fromkeys(UNCHECKED)
    made.urls |= UNCHECKED
    return made


def is_local(name: str = "") -> bool:
    """Whether RBPJAX_DATA is set, and holds the file ``name`` if there is one."""
    local = os.environ.get("RBPJAX_DATA")
    return bool(local) and (not name or (Path(local) / name).exists())


def fetch(name: str) -> Path:
    """The file ``folder/name`` of the registry, whole and with the right checksum.

    From the folder in RBPJAX_DATA if that variable is set, else from the cache, which
    is filled by a download at need.

    Raises:
      UsageError: if the folder or file is missing, the download fails, or the checksum
        is another one.
    """
    import pooch

    local = os.environ.get("RBPJAX_DATA")
    if local:
        path, known = Path(local) / name, registry().registry[name]
        require(
            path.is_file(), f"RBPJAX_DATA={local} has no {name}; unset it to download"
        )
        right = known is None or f"sha256:{pooch.file_hash(str(path))}" == known
        require(right, f"{path} is damaged: its checksum is not {known}")
        return path
    try:
        return Path(registry().fetch(name))
    except Exception as error:  # no network, a bad mirror, a corrupt file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{name} could not be downloaded from {registry().get_url(name)}: "
            f"{reason[:160]}; or put it into the folder RBPJAX_DATA"
        ) from None

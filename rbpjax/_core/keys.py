"""Keys: what is none is said before JAX fails on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def check_key(key: object, name: str = "key") -> None:
    """Raises ValueError unless ``key`` is one PRNG key, typed or raw."""
    dtype = getattr(key, "dtype", None)
    shape = getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == jnp.uint32 and shape in ((2,), (4,))
    if not raw and not (typed and shape == ()):
        shown = repr(key) if dtype is None else f"{dtype}{list(shape or ())}"
        remedy = "Use jax.vmap for several. " if typed else ""
        raise ValueError(
            f"`{name}` must be one PRNG key, such as jax.random.key(0); got {shown}. "
            f"{remedy}"
        )

"""Whether a fixed point can be differentiated, and by which rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rbpjax._core import sharding, tree
from rbpjax._core.convolution import channels_last
from rbpjax._core.step import ClosedStep, close
from rbpjax.diagnostics.errors import loop_cut
from rbpjax.diagnostics.spectrum import growth, growth_rate, radius, singular_range
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.backward.bicgstab import BiCGSTAB
from rbpjax.fixed_point.backward.cg_normal import CGNormal
from rbpjax.fixed_point.backward.gmres import GMRES
from rbpjax.fixed_point.backward.neumann import Neumann
from rbpjax.fixed_point.backward.rbp import RBP
from rbpjax.fixed_point.backward.rule import System, apply_rule
from rbpjax.fixed_point.forward.anderson import Anderson
from rbpjax.fixed_point.iterate import relative_change
from rbpjax.types import BackwardRule, PyTree, Status, StepFn

_INVERTIBLE = "I - J invertible"


class Candidate(NamedTuple):
    """A row of the table of rules that ``diagnose`` tries.

    Attributes:
      name: what the table calls it.
      make: the rule with a given tolerance.
      needs: its assumption, in words.
      holds: the assumption, of the numbers that ``diagnose`` found before.
    """

    name: str
    make: Callable[[float], BackwardRule]
    needs: str
    holds: Callable[[Diagnosis], jax.Array]


class Diagnosis(NamedTuple):
    """What ``diagnose`` found; arrays, and a table when printed.

    Arrays with one entry a rule are in the order of ``CANDIDATES``.

    Attributes:
      residual: ‖f(h) - h‖ / max(‖h‖, ‖f(h)‖). The rest means little where it is large.
      spectral_radius: ρ(J), from the growth of ‖(Jᵀ)ᵏg‖ and Ritz values.
      damped_radius: ρ((I + J) / 2), which half damping has to contract.
      jacobian_norm: ‖J‖₂, estimated from below.
      condition: σ_max / σ_min of I - J, estimated from below.
      inverse_norm: ‖(I - J)⁻¹‖, estimated from below: by how much an error of h or z
        may exceed its residual.
      loop_cut_error: ‖Jᵀg‖ / ‖g‖, the residual of the one-step gradient.
      neumann_steps: K that ``Neumann`` is predicted to take to ``tol``; may be inf.
      tol: the adjoint residual that is asked for.
      holds: whether each rule's assumption holds.
      products: the products with J or Jᵀ that each rule took, for a random cotangent.
      residuals: the adjoint residual that each rule reached.
      statuses: why each rule stopped, ``Status`` numbers.
      converged: whether each rule reported that it reached ``tol``.
      recommended: of the rules whose assumption holds and which converged, the first
        within 1.5 times the fewest products; -1 if there is none.
      null_residual: ‖Jᵀv - v‖ of the unit vector v that growth led to. Where I - J is
        singular and this is small, v is a left null vector of it: f conserves ⟨v, h⟩,
        for small changes at least.
    """

    residual: jax.Array
    spectral_radius: jax.Array
    damped_radius: jax.Array
    jacobian_norm: jax.Array
    condition: jax.Array
    inverse_norm: jax.Array
    loop_cut_error: jax.Array
    neumann_steps: jax.Array
    tol: jax.Array
    holds: jax.Array
    products: jax.Array
    residuals: jax.Array
    statuses: jax.Array
    converged: jax.Array
    recommended: jax.Array
    null_residual: jax.Array

    @property
    def rule(self) -> BackwardRule | None:
        """The recommended rule as an object, where the diagnosis is one and concrete.

        ``None`` if no rule is recommended.
        """
        if isinstance(self.recommended, jax.core.Tracer) or self.recommended.ndim:
            raise ValueError(
                "`Diagnosis.rule` needs one concrete diagnosis; this one is "
                f"{jax.typeof(self.recommended).str_short()}. Under jit use the index "
                "`recommended`; of a batch take one example by jax.tree.map."
            )
        index = int(self.recommended)
        return None if index < 0 else CANDIDATES[index].make(_short(self.tol))

    def __repr__(self) -> str:
        """A table; the plain tuple while it is being traced."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in self):
            return f"Diagnosis{tuple.__repr__(self)}"
        return _table(self)

    __str__ = __repr__


def _invertible(d: Diagnosis) -> jax.Array:
    return d.condition * jnp.finfo(d.condition.dtype).eps < 1


# Simple and lean ones first: a later one is recommended only if it saves a third of
# the products. A new rule is one row.
CANDIDATES: tuple[Candidate, ...] = (
    Candidate(
        "Neumann",
        lambda tol: Neumann(tol=tol),
        "ρ(J) < 1",
        lambda d: d.spectral_radius < 1,
    ),
    Candidate(
        "Neumann, damped",
        lambda tol: Neumann(tol=tol, damping=0.5),
        "ρ((I + J) / 2) < 1",
        lambda d: d.damped_radius < 1,
    ),
    Candidate("BiCGSTAB", lambda tol: BiCGSTAB(tol=tol), _INVERTIBLE, _invertible),
    Candidate("CGNormal", lambda tol: CGNormal(tol=tol), _INVERTIBLE, _invertible),
    Candidate("GMRES", lambda tol: GMRES(tol=tol), _INVERTIBLE, _invertible),
    Candidate(
        "RBP(Anderson)",
        lambda tol: RBP(Anderson(tol=tol)),
        _INVERTIBLE,
        _invertible,
    ),
    Candidate("Adaptive", lambda tol: Adaptive(tol=tol), _INVERTIBLE, _invertible),
)


def diagnose(
    key: jax.Array,
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    *,
    tol: float | None = None,
    num_steps: int = 200,
) -> Diagnosis:
    """Says whether h has a gradient, which rule to use, and what it costs.

    Estimates the numbers that decide (ρ(J), ‖J‖, the conditioning of I - J, the error
    of the one-step gradient), and then *tries* the rules of ``CANDIDATES`` on a random
    cotangent: the simplest of the cheap ones that worked is recommended. What counts
    are products with J, which dominate unless f is tiny. It prints as a short table.

    The numbers are random estimates: norms and condition from below, ρ(J) to about
    1/num_steps. One J is seen, that at h: diagnose again as training moves it.

    Cost: one linearization, 3 num_steps VJPs and 2 num_steps JVPs of f, and one run of
    each rule. Memory: six states or what the rules need. Wrap it in ``jax.jit`` to call
    it often; ``vmap`` gives each example its own diagnosis. A batched state without
    ``vmap`` gets one for the whole batch.

    Args:
      key: PRNG key of the directions.
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the fixed point, as found.
      tol: adjoint residual that the gradient shall have, in (0, 1). ``None``: three
        quarters of the digits of the coarsest dtype in the state.
      num_steps: products for each of the estimates, at least 4.

    Returns:
      A ``Diagnosis``.

    Raises:
      ValueError: if ``num_steps`` is below 4, ``tol`` is no Python number in (0, 1), or
        f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import diagnose
      >>> w = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6
      >>> x, h = jnp.zeros(2), jnp.zeros(2)
      >>> found = diagnose(jax.random.key(0), lambda w, x, h: w @ h + x, w, x, h)
      >>> round(float(found.spectral_radius), 1), found.neumann_steps.tolist()
      (2.4, inf)
      >>> bool(found.holds[0]), bool(found.converged[found.recommended])
      (False, True)

    References:
      The loop-cut error: https://github.com/pasteurlabs/tesseract-jax/issues/247. The
      assumptions of the rules: Liao et al. 2018, section 3.
    """
    if num_steps < 4:
        raise ValueError(f"`num_steps` must be at least 4; got {num_steps}.")
    if tol is not None and not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise ValueError(f"`tol` must be a Python number in (0, 1); got {tol!r}.")
    step, args, h = close(f, params, inputs, h)
    limit = _short(tree.default_tol(h)) if tol is None else float(tol)
    # One program: called eagerly, each loop would be compiled on its own.
    measure = jax.jit(partial(_measure, step, limit, num_steps))
    with sharding.summed(partial(step, args), h):
        return measure(args, h, key)


BASIS = 30
"""Ritz values that the spectral radius is looked for among."""


def _measure(
    closed: ClosedStep,
    limit: float,
    num_steps: int,
    args: PyTree,
    h: PyTree,
    key: jax.Array,
) -> Diagnosis:
    """The estimates and the trials of ``diagnose``."""
    step = partial(closed, args)
    jvp = jax.linearize(step, h)[1]
    vjp = channels_last(tree.adjoint(jvp, h), h)
    keys = jax.random.split(key, 3)
    g = tree.random_unit(keys[0], h)

    v, factors = growth(vjp, g, num_steps)
    # Rules measure terms leaf by leaf, and so does the prediction.
    system, own = System.of(vjp, g, limit), factors
    if system.units is not None:
        own = growth(system.vjp, system.g, num_steps)[1]
    halfway = lambda v: tree.scale(0.5, tree.add(v, vjp(v)))
    norm, _ = singular_range(jvp, tree.random_unit(keys[1], h), num_steps)
    residual_map = lambda v: tree.sub(v, jvp(v))
    largest, smallest = singular_range(residual_map, g, num_steps)

    trials = [apply_rule(c.make(limit), vjp, g) for c in CANDIDATES]
    products = jnp.stack([t.num_products for t in trials])
    rows = Diagnosis(
        residual=relative_change(step(h), h),
        spectral_radius=radius(vjp, g, factors, BASIS),
        damped_radius=growth_rate(growth(halfway, g, num_steps)[1]),
        jacobian_norm=norm,
        condition=largest / smallest,
        inverse_norm=1 / smallest,
        loop_cut_error=loop_cut(vjp, h, keys[2], 8),
        neumann_steps=_neumann_steps(own, system.tol),
        tol=jnp.asarray(limit, factors.dtype),
        holds=products > 0,
        products=products,
        residuals=jnp.stack([t.residual for t in trials]),
        statuses=jnp.stack([t.status for t in trials]),
        converged=jnp.stack([t.converged for t in trials]),
        recommended=products[0],
        null_residual=tree.norm(tree.sub(vjp(v), v)),
    )
    holds = jnp.stack([c.holds(rows) for c in CANDIDATES])
    usable = holds & rows.converged
    products = products.astype(norm.dtype)
    fewest = jnp.min(jnp.where(usable, products, jnp.inf))
    best = jnp.argmax(usable & (products <= 1.5 * fewest))
    best = jnp.where(jnp.any(usable), best, -1).astype(jnp.int32)
    return rows._replace(holds=holds, recommended=best)


def _neumann_steps(factors: jax.Array, tol: float | jax.Array) -> jax.Array:
    """The first K with ‖(Jᵀ)^{K+1} g‖ ≤ tol / 2, seen or else extrapolated."""
    decay = jnp.cumsum(jnp.log(factors))  # after K + 1 factors: log residual of z_K
    target = jnp.log(jnp.asarray(tol / 2, decay.dtype))  # as Neumann stops
    seen = jnp.argmax(decay <= target).astype(factors.dtype)
    rate = jnp.log(growth_rate(factors))
    safe = jnp.where(rate < 0, rate, -1)
    more = jnp.ceil((target - decay[-1]) / safe)
    later = jnp.where(rate < 0, len(factors) - 1 + more, jnp.inf)
    return jnp.where(jnp.any(decay <= target), seen, later)


def _short(x: float | jax.Array) -> float:
    """A number in three digits, as it is printed."""
    return float(f"{float(x):.3g}")


def _show(x: ArrayLike) -> str:
    """A number, or the range of a batch."""
    low, high = f"{np.min(x):.3g}", f"{np.max(x):.3g}"
    return low if low == high else f"{low} … {high}"


def _verdict(condition: ArrayLike, yes: str, no: str) -> str:
    """``yes`` or ``no``, or for how much of a batch it is yes."""
    share = np.mean(condition)
    return yes if share == 1 else no if share == 0 else f"{share:.0%}: {yes}"


def _stopped(statuses: ArrayLike) -> str:
    """Why a rule stopped, in a word or two; of a batch, all reasons that there were."""
    found = [Status(n) for n in sorted(set(np.ravel(statuses).tolist()))]
    return ", ".join(status.name.lower().replace("_", " ") for status in found)


def _table(d: Diagnosis) -> str:
    """The diagnosis in words and numbers."""
    d = jax.tree.map(np.asarray, d)
    conserves = _conserves(d)
    # The relative error of h, roughly; along what is conserved there is none.
    exact = d.residual <= np.where(conserves, np.finfo(d.residual.dtype).eps ** 0.75, 0)
    with np.errstate(invalid="ignore"):  # 0 · ∞ at an exact fixed point
        trusted = exact | (d.residual * d.inverse_norm <= 0.01)
    contracts = d.spectral_radius < 1
    reached = d.converged[..., 0] | ~contracts
    numbers = [
        (
            "residual ‖f(h) - h‖ / ‖h‖",
            d.residual,
            _verdict(
                trusted,
                "h is a fixed point",
                "h is NO fixed point: solve for it first",
            ),
        ),
        (
            "spectral radius ρ(J)",
            d.spectral_radius,
            _verdict(contracts, "Neumann converges", "Neumann diverges")
            if np.all(reached)
            else "below 1, and yet Neumann's trial failed: see there",
        ),
        ("  of (I + J) / 2", d.damped_radius, "the same, half damped"),
        (
            "norm ‖J‖",
            d.jacobian_norm,
            _verdict(d.jacobian_norm < 1, "a contraction", "no contraction"),
        ),
        ("condition of I - J", d.condition, "or more"),
        ("‖(I - J)⁻¹‖", d.inverse_norm, "or more: error per residual"),
        ("loop-cut error ‖Jᵀg‖ / ‖g‖", d.loop_cut_error, "of the one-step gradient"),
        (f"Neumann steps to {_show(d.tol)}", d.neumann_steps, "predicted"),
    ]
    head = [f"{name:<28}{_show(value):<16}{words}" for name, value, words in numbers]
    rules = [c.make(_short(np.max(d.tol))) for c in CANDIDATES]
    rows = [("rule", "products", "residual", "stopped", "needs")]
    for i, candidate in enumerate(CANDIDATES):
        rows.append(
            (
                candidate.name,
                _show(d.products[..., i]),
                _show(d.residuals[..., i]),
                _stopped(d.statuses[..., i]),
                f"{candidate.needs}: " + _verdict(d.holds[..., i], "yes", "NO"),
            )
        )
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    body = [
        "".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    picks = sorted(set(np.ravel(d.recommended).tolist()))
    names = [repr(rules[i]) if i >= 0 else "none, I - J looks singular" for i in picks]
    recommended = f"recommended: {', '.join(names)}"
    cure = [_CURE] if np.any(conserves) else []
    return "\n".join(["Diagnosis", *head, "", *body, "", *cure, recommended])


_CURE = """\
f conserves something: growth is exactly 1, and I - J has a left null vector. Pin the
total inside f, as in h = f(h); h + (total - sum(h)) / h.size, and I - J is regular.
"""


def _conserves(d: Diagnosis) -> np.ndarray:
    """Whether I - J is singular, and a left null vector was found."""
    singular = ~(d.condition * np.finfo(d.condition.dtype).eps < 1)  # True for NaN
    return singular & (d.null_residual <= 0.1)

"""Steps of pairs (a, b) whose inverse is as cheap as the step, whatever f and g are.

Each adds to one half a function of the other, so that the inverse subtracts what was
added; nothing has to be solved, and the functions need no inverse. Hand a step and its
``inverse`` to `recomputed_scan`::

    step = Leapfrog(force=force, dt=0.1)
    back = history.Inverse(inverse=step.inverse)
    (q, p), _ = recomputed_scan(step, params, inputs, (q, p), history=back)

In exact arithmetic the inverse is exact. In floating point each step rounds the sums,
and the way back returns that rounding, carried on by the steps between: what the probe
of `recomputed_scan` reports.
"""

from __future__ import annotations

from rbpjax._core.step import check_like
from rbpjax._core.strategy import function, real, strategy
from rbpjax._core.tree import add, axpy, scale, sub
from rbpjax.types import PyTree, StepFn

Pair = tuple[PyTree, PyTree]


@strategy
class Coupling:
    """Additive coupling: a ← a + f(b), then b ← b + g(a), a reversible residual step.

    Exact, and so is ``inverse``: b ← b - g(a), then a ← a - f(b). Volumes are kept, the
    norm is not: how far rounding is carried on depends on f and g. Cost of either: one
    f and one g. Memory: the pair. AD modes: all, those of f and g.

    Attributes:
      first: f, ``first(params, inputs, b)``, a pytree like a.
      second: g, ``second(params, inputs, a)``, a pytree like b.

    Raises:
      ValueError: if a function cannot be called, the state is no pair, or what a
        function returns is not like the half that it is added to.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import Coupling, history, recomputed_scan
      >>> step = Coupling(
      ...     first=lambda params, inputs, b: jnp.tanh(params * b + inputs),
      ...     second=lambda params, inputs, a: params * a**2)
      >>> back = history.Inverse(inverse=step.inverse)
      >>> def loss(params):
      ...     (a, b), _ = recomputed_scan(
      ...         step, params, jnp.ones(9), (jnp.zeros(4), jnp.ones(4)), history=back)
      ...     return jnp.sum(a * b)
      >>> bool(jnp.isfinite(jax.grad(loss)(0.1)))
      True

    References:
      Dinh, Krueger and Bengio, "NICE", https://arxiv.org/abs/1410.8516, equation 4;
      Gomez et al., "The Reversible Residual Network", NeurIPS 2017, equations 6 and 7.
    """

    first: StepFn = function(
        meaning="a function of the second half", call="first(params, inputs, b)"
    )
    second: StepFn = function(
        meaning="a function of the first half", call="second(params, inputs, a)"
    )

    def __call__(self, params: PyTree, inputs: PyTree, h: Pair) -> Pair:
        """The pair after the step."""
        a, b = _halves(h)
        a = add(a, _like(self.first(params, inputs, b), a, "first"))
        return a, add(b, _like(self.second(params, inputs, a), b, "second"))

    def inverse(self, params: PyTree, inputs: PyTree, h: Pair) -> Pair:
        """The pair before the step."""
        a, b = _halves(h)
        b = sub(b, _like(self.second(params, inputs, a), b, "second"))
        return sub(a, _like(self.first(params, inputs, b), a, "first")), b


@strategy
class Leapfrog:
    """Leapfrog (velocity Verlet) for dq/dt = p, dp/dt = F(q), kick, drift, kick.

    A step of second order in dt, symplectic where F is a gradient: the energy of an
    oscillation stays near its value for ever while dt times the largest frequency is
    below 2. The inverse is the step with -dt. Cost of either: two F. Memory: the pair.
    AD modes: all, those of F.

    ``dt`` is a number: for one that is learnt, scale inside of a `Coupling`.

    Attributes:
      force: F, ``force(params, inputs, q)``, a pytree like p.
      dt: length of the step.

    Raises:
      ValueError: if ``force`` cannot be called, ``dt`` is no positive number, the state
        is no pair, or the force or q is not like p.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import Leapfrog, history, recomputed_scan
      >>> step = Leapfrog(force=lambda params, inputs, q: -params * q, dt=0.1)
      >>> back = history.Inverse(inverse=step.inverse)
      >>> def energy(stiffness):
      ...     (q, p), _ = recomputed_scan(
      ...         step, stiffness, None, (jnp.array(1.0), jnp.array(0.0)),
      ...         history=back, length=1000)
      ...     return (p**2 + stiffness * q**2) / 2
      >>> bool(abs(energy(1.0) - 0.5) < 1e-2), bool(jnp.isfinite(jax.grad(energy)(1.0)))
      (True, True)

    References:
      Hairer, Lubich and Wanner, "Geometric numerical integration illustrated by the
      Störmer-Verlet method", Acta Numerica 12, 2003, equations 1.3 to 1.5.
    """

    force: StepFn = function(
        meaning="a function of the positions", call="force(params, inputs, q)"
    )
    dt: float = real(above=0.0)

    def __call__(self, params: PyTree, inputs: PyTree, h: Pair) -> Pair:
        """The pair (q, p) after the step."""
        return self._move(self.dt, params, inputs, h)

    def inverse(self, params: PyTree, inputs: PyTree, h: Pair) -> Pair:
        """The pair (q, p) before the step."""
        return self._move(-self.dt, params, inputs, h)

    def _move(self, dt: float, params: PyTree, inputs: PyTree, h: Pair) -> Pair:
        q, p = _halves(h, alike=True)
        kick = lambda q, p: axpy(dt / 2, self._force(params, inputs, q, p), p)
        p = kick(q, p)
        q = axpy(dt, p, q)
        return q, kick(q, p)

    def _force(self, params: PyTree, inputs: PyTree, q: PyTree, p: PyTree) -> PyTree:
        return _like(self.force(params, inputs, q), p, "force")


@strategy
class Momentum:
    """Momentum (heavy ball): p ← μ p + dt F(q), then q ← q + dt p.

    With F = -∇E it is gradient descent with momentum, with μ = 1 the symplectic Euler
    step. The inverse takes q ← q - dt p, then p ← (p - dt F(q))/μ. Cost of either: one
    F. Memory: the pair. AD modes: all, those of F.

    Where μ < 1 the step forgets: it shrinks volumes by μ for each entry of q, and the
    inverse blows rounding up as much, log₂(1/μ) bits a step. With K steps between the
    anchors of `Inverse` the error is about ε μ^(-K/2) where q oscillates, which divides
    the loss between q and p, and up to ε μ⁻ᴷ where it does not.

    Attributes:
      force: F, ``force(params, inputs, q)``, a pytree like p.
      dt: length of the step.
      decay: μ in (0, 1].

    Raises:
      ValueError: if ``force`` cannot be called, ``dt`` is no positive number, ``decay``
        is not in (0, 1] (at μ = 0 there is no inverse: use Replay), the state is no
        pair, or the force or q is not like p.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import Momentum, history, recomputed_scan
      >>> step = Momentum(force=lambda a, _, q: a - q, dt=0.3, decay=0.8)
      >>> back = history.Inverse(inverse=step.inverse, anchors=5)
      >>> def end(a):
      ...     start = (jnp.array(0.0), jnp.array(0.0))
      ...     return recomputed_scan(
      ...         step, a, None, start, history=back, length=100)[0][0]
      >>> round(float(end(2.0)), 3), round(float(jax.grad(end)(2.0)), 3)
      (2.0, 1.0)

    References:
      Polyak, "Some methods of speeding up the convergence of iteration methods", 1964;
      Maclaurin, Duvenaud and Adams, "Gradient-based Hyperparameter Optimization
      through Reversible Learning", ICML 2015, algorithms 1 and 2.
    """

    force: StepFn = function(
        meaning="a function of the positions", call="force(params, inputs, q)"
    )
    dt: float = real(above=0.0)
    decay: float = real(default=1.0, above=0.0, maximum=1.0)

    def __call__(self, params: PyTree, inputs: PyTree, h: Pair) -> Pair:
        """The pair (q, p) after the step."""
        q, p = _halves(h, alike=True)
        force = _like(self.force(params, inputs, q), p, "force")
        p = axpy(self.dt, force, scale(self.decay, p))
        return axpy(self.dt, p, q), p

    def inverse(self, params: PyTree, inputs: PyTree, h: Pair) -> Pair:
        """The pair (q, p) before the step."""
        q, p = _halves(h, alike=True)
        q = axpy(-self.dt, p, q)
        force = _like(self.force(params, inputs, q), p, "force")
        return q, scale(1 / self.decay, axpy(-self.dt, force, p))


def _halves(h: Pair, alike: bool = False) -> Pair:
    """The two halves of a state that is a pair, else ValueError."""
    if not isinstance(h, tuple) or len(h) != 2:
        raise ValueError(
            f"the state must be a pair, a tuple (a, b); got {type(h).__name__}. "
            "Put the two halves into a tuple."
        )
    if alike:
        remedy = "Each position has one momentum."
        check_like(h[0], h[1], "the state's q", "its p", remedy)
    return h


def _like(out: PyTree, half: PyTree, name: str) -> PyTree:
    """What a function returned, if it can be added to ``half``, else ValueError."""
    remedy = "It is added to that half."
    check_like(out, half, f"`{name}`'s output", "the half of the state", remedy)
    return out

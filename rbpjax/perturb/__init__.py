"""Forward-only gradients: from perturbed forward passes and a scalar.

A rule says what is perturbed; its fields say what that estimates. How to choose:

* ``WeightPerturbation``: any loss; variance grows with the number of weights.
* ``SeededPerturbation``: the same, with directions drawn anew from a key and never
  stored, of low rank if wanted; ``seeded_descent`` stores no gradient either.
* ``NodePerturbation``: a cell that shows its nodes; unbiased with ``causal`` credit;
  variance grows with nodes × steps × examples.
* ``ActivityPerturbation``: the same passes; not the gradient, but one preconditioned by
  the covariance of the activity's change; step sizes do not depend on σ.

``local_value_and_grad`` gives each layer of a network a loss of its own, so that the
variance is that of a layer.

For long unrolls there are estimators with a state, windows in and gradients out, in
the form of ``online`` (see ``Evolution``):

* ``pes``: fresh noise a window, unbiased; variance grows with the windows.
* ``nres``: one noise a sequence, unbiased, with less variance.
* ``truncated_es``: biased, the baseline.

``diagnose`` says before a run how many samples an angle takes, and how long a step is
stable.

The parts of a rule are in namespaces of their own:

* ``difference``: ``OneSided`` and ``Central`` use passes alone, ``Exact`` a forward
  derivative.
* ``credit``: ``instant`` estimates the gradient truncated to one step, ``causal`` that
  of BPTT, ``Trace`` what is between them.
* ``noise``: how directions are drawn.
* ``norm``: what activity perturbation divides by.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from rbpjax import perturb
  >>> rule = perturb.WeightPerturbation(
  ...     num_samples=3,
  ...     difference=perturb.difference.Exact(),
  ...     noise=perturb.noise.orthonormal,
  ... )
  >>> f = perturb.value_and_grad(lambda p: jnp.sum(p**2), rule)
  >>> p = jnp.array([1.0, 2.0, 3.0])
  >>> value, grads = f(jax.random.key(0), p)
  >>> bool(jnp.max(jnp.abs(grads - 2 * p)) < 1e-5)
  True
"""

from rbpjax.perturb import credit, difference, noise, norm
from rbpjax.perturb.activity import ActivityPerturbation
from rbpjax.perturb.advice import Advice, diagnose
from rbpjax.perturb.cell import DenseCell, Nodes
from rbpjax.perturb.decorrelate import Decorrelation, decorrelate
from rbpjax.perturb.evolution import Evolution, EvolutionCarry, EvolutionOutput
from rbpjax.perturb.local import local_value_and_grad
from rbpjax.perturb.node import NodePerturbation
from rbpjax.perturb.nres import nres
from rbpjax.perturb.paper_code import PaperCode, paper_code
from rbpjax.perturb.pes import pes
from rbpjax.perturb.recurrent import recurrent_value_and_grad
from rbpjax.perturb.seeded import SeededPerturbation
from rbpjax.perturb.truncated_es import truncated_es
from rbpjax.perturb.unroll import Trajectory, unroll
from rbpjax.perturb.weight import WeightPerturbation, seeded_descent, value_and_grad

__all__ = [
    "ActivityPerturbation",
    "Advice",
    "Decorrelation",
    "DenseCell",
    "Evolution",
    "EvolutionCarry",
    "EvolutionOutput",
    "NodePerturbation",
    "Nodes",
    "PaperCode",
    "SeededPerturbation",
    "Trajectory",
    "WeightPerturbation",
    "credit",
    "decorrelate",
    "diagnose",
    "difference",
    "local_value_and_grad",
    "noise",
    "norm",
    "nres",
    "paper_code",
    "pes",
    "recurrent_value_and_grad",
    "seeded_descent",
    "truncated_es",
    "unroll",
    "value_and_grad",
]

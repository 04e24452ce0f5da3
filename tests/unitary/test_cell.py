"""The unitary cell: laws of φ, norms of state and gradient, and the way back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax.unitary import UnitaryCell, conv_exp
from rbpjax.unitary.activation import (
    Activation,
    identity,
    max_min,
    modulus,
    saturate,
)


def field(cell, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=cell.field_shape)
    return jnp.array(
        z + 1j * rng.normal(size=cell.field_shape) if cell.complex_valued else z
    )


CELLS = {
    "linear, complex ring": UnitaryCell(lattice=(16,), activation=identity),
    "linear, real plane, 3 channels": UnitaryCell(
        lattice=(4, 5), channels=3, complex_valued=False, activation=identity
    ),
    "modulus, complex ring": UnitaryCell(lattice=(15,), activation=modulus),
    "modulus, real ring, 2 channels": UnitaryCell(
        lattice=(8,), channels=2, complex_valued=False, activation=modulus
    ),
    "max-min, real plane, 4 channels": UnitaryCell(
        lattice=(3, 4), channels=4, complex_valued=False, activation=max_min
    ),
    "max-min, complex ring, 2 channels": UnitaryCell(
        lattice=(8,), channels=2, complex_valued=True, activation=max_min
    ),
}


def run(cell, params, h, steps):
    step = lambda h, _: (cell(params, None, h), None)
    return jax.lax.scan(step, h, None, steps)[0]


TOL = {"float64": 1e-12, "float32": 1e-4}
ONCE = {
    ("linear, complex ring", "float64"),
    ("linear, real plane, 3 channels", "float32"),
    ("modulus, complex ring", "float64"),
    ("max-min, real plane, 4 channels", "float64"),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name, dtype, marks=() if (name, dtype) in ONCE else pytest.mark.full
        )
        for name in CELLS
        for dtype in TOL
    ],
)
def test_norms_of_state_and_gradient_over_1000_steps(key, name, dtype):
    """A norm-preserving cell keeps ‖h‖ and ‖∂L/∂h₀‖ = ‖∂L/∂h_T‖ for 1,000 steps."""
    cell, tol = CELLS[name], TOL[dtype]
    cast = lambda x: x.astype(jnp.zeros((), dtype).real.dtype)
    weights = jax.tree.map(cast, cell.init(key, radius=1, scale=1.0))
    to = lambda z: z.astype(jnp.complex64 if jnp.iscomplexobj(z) else jnp.float32)
    h0, g = field(cell), field(cell, 1)
    h0, g = (to(h0), to(g)) if dtype == "float32" else (h0, g)

    @jax.jit
    def both(weights, h0):
        params = cell.prepare(weights)
        end, vjp = jax.vjp(lambda h: run(cell, params, h, 1000), h0)
        return end, vjp(g)[0]

    end, g0 = both(weights, h0)
    assert end.dtype == h0.dtype
    norm = lambda z: jnp.linalg.norm(z.ravel().astype(complex))
    chex.assert_trees_all_close(norm(end) / norm(h0), jnp.ones(()), rtol=0, atol=tol)
    chex.assert_trees_all_close(norm(g0) / norm(g), jnp.ones(()), rtol=0, atol=tol)
    assert norm(end - h0) > 0.1 * norm(h0)


def test_saturating_cell_loses_gradient_in_proportion_to_amplitude(key):
    """φ contracts: ‖∂L/∂h₀‖ falls with the amplitude a, roughly as 1/√(1 + T a²)."""
    cell = UnitaryCell(lattice=(64,))
    params = cell.prepare(cell.init(key, radius=3, scale=1.0))
    z, g = field(cell), field(cell, 1)
    kept = {}
    for a in (1.0, 0.1, 0.01):
        h0 = z * jnp.array(a / np.sqrt(2) + 0j)  # rms amplitude a
        g0 = jax.vjp(lambda h: run(cell, params, h, 1000), h0)[1](g)[0]
        kept[a] = float(jnp.linalg.norm(g0) / jnp.linalg.norm(g))
        # A factor of two: the estimate is of order of magnitude, as the sources say.
        assert 0.5 < kept[a] * np.sqrt(1 + 1000 * a**2) < 2.0
    assert kept[1.0] < kept[0.1] < kept[0.01] < 1


def test_plane_wave_decays_as_a_power_law():
    """Without input 1/r_n² = 1/r₀² + n for a plane wave of amplitude r."""
    cell = UnitaryCell(lattice=(16,))
    params = cell.prepare(cell.init(jax.random.key(3), radius=2, scale=1.0))
    wave = jnp.array(0.5 * np.exp(2j * np.pi * 3 * np.arange(16) / 16))
    end = run(cell, params, wave, 1000)
    expected = jnp.full(16, 0.5 / np.sqrt(1 + 1000 * 0.25))  # 0.0315597…
    chex.assert_trees_all_close(jnp.abs(end), expected, rtol=1e-12)


def test_resonant_drive_is_compressed_to_its_cube_root():
    """The driven steady state obeys r/√(1-r²) - r = F, hence r ≈ (2F)^(1/3)."""
    cell = UnitaryCell(lattice=(4,))
    weights = cell.init(jax.random.key(0), radius=0)
    params = cell.prepare(weights._replace(kernel=jnp.zeros((1, 2))))  # U = δ
    force = 1e-4 * jnp.ones(4, complex)
    step = lambda _, h: cell(params, force, h)
    r = jax.lax.fori_loop(0, 20_000, step, cell.start()).real
    chex.assert_trees_all_close(r / jnp.sqrt(1 - r**2) - r, force.real, rtol=1e-9)
    # The next order of the expansion is relatively r²/4 ~ 1e-3.
    chex.assert_trees_all_close(r, jnp.full(4, (2e-4) ** (1 / 3)), rtol=2e-3)


def test_singular_values_of_saturate():
    """As a map of the plane φ has (1+r²)^(-3/2) radially and (1+r²)^(-1/2) across."""
    z = 0.6 - 1.1j
    r2 = abs(z) ** 2
    plane = lambda v: saturate(jax.lax.complex(v[0], v[1]))
    jacobian = jax.jacfwd(lambda v: jnp.stack([plane(v).real, plane(v).imag]))
    got = np.linalg.svd(jacobian(jnp.array([z.real, z.imag])), compute_uv=False)
    expected = [(1 + r2) ** -0.5, (1 + r2) ** -1.5]
    np.testing.assert_allclose(got, expected, rtol=1e-13)


def test_saturate_keeps_the_phase_and_its_inverse_undoes_it():
    """φ(e^{ia} z) = e^{ia} φ(z), |φ| < 1, φ⁻¹(φ(z)) = z; real fields stay real."""
    z = jnp.array([0.0, 1e-8, 0.3 - 0.4j, -5.0 + 2.0j])
    turn = jnp.array(np.exp(0.7j))
    chex.assert_trees_all_close(saturate(turn * z), turn * saturate(z), rtol=1e-14)
    assert jnp.max(jnp.abs(saturate(z))) < 1
    # φ⁻¹ amplifies rounding by (1 + r²)^(3/2), about 160 for the last entry.
    chex.assert_trees_all_close(saturate.inverse(saturate(z)), z, rtol=1e-13)
    x = jnp.array([-2.0, 0.5])
    chex.assert_trees_all_close(saturate(x), x / jnp.sqrt(1 + x**2), rtol=1e-15)


def test_norm_preserving_activations_by_hand():
    """modulus and max_min on a field small enough to write down."""
    z = jnp.array([[1.0, -3.0, 2.0, 5.0], [-4.0, 0.5, 7.0, -7.0]])
    expected = jnp.array([[1.0, -3.0, 5.0, 2.0], [0.5, -4.0, 7.0, -7.0]])
    chex.assert_trees_all_equal(max_min(z), expected)
    chex.assert_trees_all_equal(modulus(z), jnp.abs(z))
    z = jnp.array([1.0 - 2.0j, -3.0 + 0.0j])
    chex.assert_trees_all_equal(modulus(z), jnp.array([1.0 + 2.0j, 3.0 + 0.0j]))
    chex.assert_trees_all_equal(max_min(z), jnp.array([1.0 + 0.0j, -3.0 - 2.0j]))


@pytest.mark.parametrize(
    "complex_valued", [True, pytest.param(False, marks=pytest.mark.full)]
)
def test_step_and_readout_by_their_formulas(key, complex_valued):
    """φ(U ⊗ Z + B x) and Re(C Z) + bias, written out with sums."""
    cell = UnitaryCell(lattice=(3, 4), channels=2, complex_valued=complex_valued)
    weights = cell.init(key, radius=1, inputs=5, outputs=6, scale=1.0)
    weights = weights._replace(bias=jnp.arange(6.0))
    params, h = cell.prepare(weights), field(cell)
    x = jnp.arange(5.0) - 2
    b, c = params.encoder, params.decoder
    drive = jnp.einsum("xyci,i->xyc", b, x.astype(b.dtype))
    expected = saturate(params.kernel(h) + drive)
    chex.assert_trees_all_close(cell(params, x, h), expected, rtol=1e-13)
    out = jnp.einsum("oxyc,xyc->o", c, h).real + jnp.arange(6.0)
    chex.assert_trees_all_close(cell.readout(params, h), out, rtol=1e-13)
    if complex_valued:
        chex.assert_trees_all_equal(
            b, jax.lax.complex(*jnp.moveaxis(weights.encoder, -1, 0))
        )


def test_inputs_may_be_fields(key):
    """Without an encoder the input is the drive itself, and None is no drive."""
    cell = UnitaryCell(lattice=(6,), activation=identity)
    params, h = cell.prepare(cell.init(key, radius=1)), field(cell)
    drive = jnp.arange(6.0)
    got = cell(params, drive, h) - cell(params, None, h)
    chex.assert_trees_all_close(got, drive.astype(complex), rtol=0, atol=1e-14)


@pytest.mark.parametrize("activation", [identity, saturate])
@pytest.mark.parametrize("complex_valued", [True, False])
def test_inverse_undoes_the_step(key, activation, complex_valued):
    """inverse(params, x, f(params, x, h)) = h."""
    cell = UnitaryCell(
        lattice=(4, 3), channels=2, complex_valued=complex_valued, activation=activation
    )
    params = cell.prepare(cell.init(key, radius=1, inputs=3, scale=1.0))
    h, x = field(cell), jnp.array([0.5, -1.0, 2.0])
    back = cell.inverse(params, x, cell(params, x, h))
    # |z| < 4 here: φ⁻¹ amplifies rounding by less than (1 + 16)^(3/2) = 70.
    chex.assert_trees_all_close(back, h, rtol=0, atol=1e-13)


def test_cell_commutes_with_shifts(key):
    """Shifted state and drive give the shifted next state, nonlinearity included."""
    cell = UnitaryCell(lattice=(4, 5), channels=2)
    params = cell.prepare(cell.init(key, radius=1, scale=1.0))
    h, x = field(cell), field(cell, 1)
    shift = lambda z: jnp.roll(z, (1, 2), (0, 1))
    chex.assert_trees_all_close(
        cell(params, shift(x), shift(h)), shift(cell(params, x, h)), rtol=0, atol=1e-13
    )


def test_rms_rotation_angle_is_the_scale(key):
    """init's `scale` is the rms eigenvalue of Â, over √2 for real cells."""
    for cell, expected in [
        (UnitaryCell(lattice=(4096,)), 0.1),
        (UnitaryCell(lattice=(4096,), complex_valued=False), 0.1 / np.sqrt(2)),
        (UnitaryCell(lattice=(16,), channels=8), 0.1),
    ]:
        radius = 2048 if cell.channels is None else 2
        weights = cell.init(key, radius=radius, scale=0.1)
        hat = jax.jit(cell.prepare)(weights).kernel.hat
        omega = np.angle(hat if cell.channels is None else np.linalg.eigvals(hat))
        rms = np.sqrt(np.mean(omega**2))
        # 2,000 (and 80·64) independent normal numbers: standard error below 2 %.
        np.testing.assert_allclose(rms, expected, rtol=0.08)


def test_exponential_is_outside_the_scan(key):
    """prepare is not repeated: the step contains no exponential, no cosine."""
    for cell in (UnitaryCell(lattice=(8,)), UnitaryCell(lattice=(8,), channels=2)):
        params = cell.prepare(cell.init(key, radius=1))
        step = str(jax.make_jaxpr(cell)(params, None, field(cell)))
        assert "expm" not in step
        assert "cos" not in step
        prepared = str(jax.make_jaxpr(cell.prepare)(cell.init(key, radius=1)))
        assert "expm" in prepared or "cos" in prepared


def test_the_method_is_that_of_the_kernel(key):
    """Weights are drawn alike; the Cayley transform is not the exponential."""
    make = lambda **kw: UnitaryCell(lattice=(8,), complex_valued=False, **kw)
    weights = make().init(key, radius=1, scale=1.0)
    for method in ("taylor", "cayley"):
        got = make(method=method).prepare(weights).kernel.hat
        want = conv_exp(weights.kernel, (8,), method=method).hat
        chex.assert_trees_all_close(got, want, rtol=0, atol=1e-14)
    assert jnp.max(jnp.abs(got - make().prepare(weights).kernel.hat)) > 1e-3


def test_bad_cells_are_refused(key):
    """Static fields, missing inverses and read-outs are named."""
    with pytest.raises(ValueError, match="tuple of one to three"):
        UnitaryCell(lattice=(2, 2, 2, 2))
    with pytest.raises(
        ValueError, match="`lattice` must be a tuple of one to three Python ints"
    ):
        UnitaryCell(lattice=(2, 2.0))
    with pytest.raises(ValueError, match="`channels`"):
        UnitaryCell(lattice=(2,), channels=0)
    with pytest.raises(ValueError, match=r"`method` must be one of 'taylor'.*'cayley'"):
        UnitaryCell(lattice=(2,), method="exp")
    with pytest.raises(ValueError, match=r"`method` must be one of 'taylor'.*'cayley'"):
        conv_exp(jnp.zeros(3), (4,), method="exp")
    cell = UnitaryCell(lattice=(4,), channels=3, activation=max_min)
    params = cell.prepare(cell.init(key, radius=1))
    with pytest.raises(ValueError, match="must be even"):
        cell(params, None, field(cell))
    with pytest.raises(ValueError, match=r"use `recomputed_scan` with Replay"):
        cell.inverse(params, None, field(cell))
    with pytest.raises(ValueError, match="no read-out"):
        cell.readout(params, field(cell))
    with pytest.raises(ValueError, match="`radius`"):
        cell.init(key, radius=-1)


def test_strategies_compare_by_value_and_take_new_activations():
    """Equal cells are equal and hash alike; an Activation can be anyone's."""
    assert UnitaryCell(lattice=(4,)) == UnitaryCell(lattice=(4,))
    assert hash(UnitaryCell(lattice=(4,))) == hash(UnitaryCell(lattice=(4,)))
    assert UnitaryCell(lattice=(4,)) != UnitaryCell(lattice=(4,), activation=modulus)
    tanh = Activation(apply=jnp.tanh, inverse=jnp.arctanh)
    cell = UnitaryCell(lattice=(4,), complex_valued=False, activation=tanh)
    params = cell.prepare(cell.init(jax.random.key(0), radius=1))
    h = field(cell)
    back = cell.inverse(params, None, cell(params, None, h))
    chex.assert_trees_all_close(back, h, rtol=1e-12)


@pytest.mark.parametrize("z", [1e20, -3e38, 256.0, 1e-30, 0.0])
def test_saturation_of_any_magnitude(z):
    """z/√(1+z²) in float32 where z² has no room, with its derivative."""
    z = np.float32(z)
    wide = np.longdouble(z)
    got = saturate(z), jax.grad(saturate)(z)
    exact = wide / np.sqrt(1 + wide**2), (1 + wide**2) ** -1.5
    # The derivative is a difference of numbers of order one at large z.
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-6)
    assert abs(saturate(np.float16(6e4)) - 1) <= np.finfo(np.float16).eps
    unit = saturate(np.complex64(3e30 + 4e30j))
    np.testing.assert_allclose(unit, 0.6 + 0.8j, rtol=1e-6)


def test_inputs_and_parameters_of_another_cell_are_refused():
    """Imaginary parts are not dropped, fields not broadcast, weights not taken raw."""
    cell = UnitaryCell(lattice=(8,), complex_valued=False)
    other = UnitaryCell(lattice=(8,))
    weights = cell.init(jax.random.key(0), radius=1)
    encoded = cell.init(jax.random.key(0), radius=1, inputs=3)
    params, h = cell.prepare(weights), cell.start()
    with_encoder = cell.prepare(encoded)
    foreign = other.prepare(other.init(jax.random.key(0), radius=1))
    for call, words in (
        (lambda: cell(params, jnp.ones(8, complex), h), "`inputs` must be real"),
        (lambda: cell(with_encoder, jnp.ones(3, complex), h), "`inputs` must be real"),
        (lambda: cell(params, jnp.ones((3, 8)), h), r"`inputs`.*\(8,\), a field"),
        (lambda: cell(params, jnp.ones(1), h), r"`inputs`.*got \(1,\)"),
        (lambda: cell(with_encoder, jnp.ones(8), h), r"\(3,\), what the encoder"),
        (lambda: cell(params, None, h.astype(complex)), "`h` must be real"),
        (lambda: cell.inverse(params, None, h.astype(complex)), "`h` must be real"),
        (lambda: cell(weights, None, h), r"`params`.*prepare\(weights\).*CellWeights"),
        (lambda: cell(foreign, None, h), "`params` must be of a real cell"),
        (lambda: cell.init(3, radius=1), "`key` must be one PRNG key"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

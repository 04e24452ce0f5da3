"""What holds without chance: frames, enumerations, identities."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import (
    ActivityPerturbation,
    Central,
    Exact,
    NodePerturbation,
    OneSided,
    Trace,
    WeightPerturbation,
)
from rbpjax.perturb.cell import local_pullback
from tests.perturb.networks import (
    dense,
    distance,
    estimate,
    flat,
    gated,
    gradient,
    losses,
    node_gradient,
    plain,
    rows_of,
    signs,
    silent,
    table,
)

# Sums of up to 512 float64 numbers of order one.
TIGHT = 1e-12
ALL = dict(num_samples=512, difference=Exact(), noise=table(signs(9)))


def test_coordinate_differences_are_the_gradient():
    """One entry at a time by central differences: the gradient to 1e-9."""
    net = dense()
    # Steps of 1e-5: truncation about 1e-10, rounding about 1e-11.
    by = lambda d: dict(
        num_samples=d, difference=Central(1e-5 / d**0.5), noise=perturb.coordinate
    )
    for rule in (
        WeightPerturbation(**by(8)),
        NodePerturbation(**by(9), credit=perturb.total),
    ):
        assert distance(estimate(net, rule), gradient(net)) < 1e-9


@pytest.mark.parametrize("make", [dense, gated])
def test_orthonormal_frame_is_the_gradient(make):
    """A whole frame with exact derivatives has no variance: BPTT, any cell."""
    net = make()
    taps = flat(silent(net)).size
    for rule in (
        WeightPerturbation(flat(net.params).size),
        NodePerturbation(taps, credit=perturb.total),
        NodePerturbation(taps, credit=perturb.causal),
    ):
        fields = dict(difference=Exact(), noise=perturb.orthonormal)
        rule = type(rule)(rule.num_samples, **fields, credit=rule.credit)
        assert distance(estimate(net, rule), gradient(net)) < TIGHT


def test_assembly_from_tap_gradients():
    """True node errors give the true gradient: outer products and local derivatives."""
    net = dense(units=3, outputs=2, inputs=2, examples=4)
    run = perturb.unroll(net.cell, *net.data[:3])
    before = jnp.concatenate([net.h0[None], run.states[:-1]])
    errors = node_gradient(net)
    outer = net.cell.pullback(net.params, net.xs, before, run.states, errors)
    local = local_pullback(net.cell, net.params, net.xs, before, silent(net), errors)
    assert distance(outer, gradient(net)) < TIGHT
    assert distance(local, gradient(net)) < TIGHT


def test_assembly_keeps_nodes_of_a_step_apart():
    """With nodes that hang on nodes, no path within a step is counted twice."""
    net = gated()
    run = perturb.unroll(net.cell, *net.data[:3])
    before = jnp.concatenate([net.h0[None], run.states[:-1]])
    errors = node_gradient(net)
    local = local_pullback(net.cell, net.params, net.xs, before, silent(net), errors)
    assert distance(local, gradient(net)) < TIGHT
    one = jax.vmap(lambda p, n, x, h: net.cell(p, x, h, n)[2], (None, 0, 0, 0))
    _, twice = jax.vjp(lambda p: one(p, silent(net), net.xs, before), net.params)
    assert distance(twice(errors)[0], gradient(net)) > 0.1  # what it would be


def test_local_derivatives_do_not_run_the_network_backwards():
    """For a dense cell the local derivative is all steps at once."""
    net = dense()._replace(cell=plain)
    f = lambda e, xs, before: local_pullback(
        plain, net.params, xs, before, silent(net), e
    )
    args = silent(net), net.xs, jnp.zeros((3, 2))
    text = jax.jit(f).lower(*args).compile().as_text()
    assert "while" not in text  # all steps at once


@pytest.mark.parametrize("cell", ["dense", "plain"])
def test_node_perturbation_by_enumeration(cell):
    """Mean over all 512 signs: causal and total BPTT, instant one step's gradient."""
    net = dense()
    if cell == "plain":
        net = net._replace(cell=plain)
    fields = lambda credit: dict(credit=credit, readout_credit=credit)
    for credit in (perturb.causal, perturb.total):
        got = estimate(net, NodePerturbation(**ALL, **fields(credit)))
        assert distance(got, gradient(net)) < TIGHT
    got = estimate(net, NodePerturbation(**ALL, **fields(perturb.instant)))
    assert distance(got, gradient(net, truncated=True)) < TIGHT
    assert distance(gradient(net, truncated=True), gradient(net)) > 0.1


def test_readout_takes_instant_credit_without_bias():
    """The default, instant credit for the readout only, has the mean of BPTT."""
    got = estimate(dense(), NodePerturbation(**ALL))
    assert distance(got, gradient(dense())) < TIGHT


def test_finite_differences_are_off_by_sigma_squared():
    """With passes alone the bias falls a hundredfold with a tenth of σ."""
    net, errors = dense(), []
    for sigma in (1e-2, 1e-3):
        rule = NodePerturbation(512, difference=OneSided(sigma), noise=table(signs(9)))
        errors.append(distance(estimate(net, rule), gradient(net)))
    assert errors[0] > 1e-5  # far above rounding
    assert 80 < errors[0] / errors[1] < 120


def test_weight_perturbation_by_enumeration():
    """Over all 256 signs: mean exact, total variance (d - 1) ‖g‖² exactly."""
    net = dense()
    each = lambda i: estimate(
        net,
        WeightPerturbation(difference=Exact(), noise=table(jnp.roll(signs(8), -i, 0))),
    )
    got = rows_of(jax.vmap(each)(jnp.arange(256)))
    g = flat(gradient(net))
    assert distance(got.mean(0), g) < TIGHT
    variance = jnp.sum((got - g[None]) ** 2) / 256
    assert abs(variance / jnp.sum(g**2) - 7) < TIGHT


def test_fresh_weight_noise_by_enumeration():
    """Redrawn every step, two weights and three steps: credit decides the estimand."""
    cell = lambda w, x, h, n: (
        jnp.tanh(w[0] * h + w[1] * x + n),
        h * w[0] + x,  # a readout that w reaches past the state
        jnp.tanh(w[0] * h + w[1] * x + n) * 0 + n,
    )
    net = dense()._replace(
        cell=cell,
        loss=lambda out, y: (out - y[0]) ** 2,
        params=jnp.array([0.7, -1.2]),
        h0=jnp.array(0.3),
        xs=jnp.array([1.0, -0.5, 2.0]),
    )
    all_signs = signs(6).reshape(64, 3, 2)
    # The library folds the step into the key: find out which one it is at.
    key = jax.random.key(0)
    folded = jax.vmap(lambda t: jax.random.key_data(jax.random.fold_in(key, t)))(
        jnp.arange(3)
    )

    def noise(k, indices, size, dtype):
        step = jnp.argmax(jnp.all(folded == jax.random.key_data(k)[None], axis=1))
        return all_signs[indices, step]

    def mean(credit):
        rule = WeightPerturbation(
            64, difference=Exact(), noise=noise, every_step=True, credit=credit
        )
        return estimate(net, rule, key)

    assert distance(mean(perturb.causal), gradient(net)) < TIGHT
    assert distance(mean(perturb.total), gradient(net)) < TIGHT
    assert distance(mean(perturb.instant), gradient(net, truncated=True)) < TIGHT
    assert distance(gradient(net, truncated=True), gradient(net)) > 0.1


def covariances(net):
    """J with J[t, i, s, j] = ∂a_t,i/∂ξ_s,j over all nodes, flattened by step."""
    nodes = lambda n: perturb.unroll(net.cell, *net.data[:3], n).nodes
    jacobian = jax.jacobian(nodes)(silent(net))
    return jacobian


def test_activity_perturbation_is_preconditioned():
    """Unnormalized: E e = Cov·g; causal for the state, instant for the readout."""
    net = dense()
    jac = covariances(net)
    sources = lambda row: [row.recurrent, row.readout]
    cov = lambda row: sum(jnp.einsum("tisk,tjsk->tij", j, j) for j in sources(row))
    hidden, readout = cov(jac.recurrent), cov(jac.readout)
    g, g0 = node_gradient(net), node_gradient(net, truncated=True)

    def errors(credit, readout_credit):
        """The mean errors, read off a network whose weights are added to its nodes."""
        taps = net._replace(
            cell=lambda e, x, h, n: net.cell(
                net.params,
                x["x"],
                h,
                perturb.Nodes(
                    n.recurrent + x["i"] @ e.recurrent, n.readout + x["i"] @ e.readout
                ),
            ),
            params=silent(net),
            xs={"x": net.xs, "i": jnp.eye(3)},
        )
        # Weight [s] is an input to the nodes of step s alone, so that its gradient is
        # the error of that step.
        rule = ActivityPerturbation(
            **ALL, credit=credit, readout_credit=readout_credit, norm=None
        )
        return estimate(taps, rule)

    want = perturb.Nodes(
        jnp.einsum("tij,tj->ti", hidden, g.recurrent),
        jnp.einsum("tij,tj->ti", readout, g0.readout),
    )
    got = errors(perturb.causal, perturb.instant)
    assert distance(got.recurrent, want.recurrent) < TIGHT
    assert distance(got.readout, want.readout) < TIGHT
    assert distance(got.recurrent, g.recurrent) > 0.1  # it is not the gradient
    swapped = errors(perturb.total, perturb.causal)
    assert distance(swapped.recurrent, want.recurrent) > 0.1
    assert distance(swapped.readout, want.readout) > 0.01
    alone = errors(perturb.instant, perturb.instant)
    want0 = jnp.einsum("tij,tj->ti", hidden, g0.recurrent)
    assert distance(alone.recurrent, want0) < TIGHT


def test_normalized_activity_perturbation():
    """With the norm, E e_t = N S_t g_t; S_t from the enumerated δa themselves."""
    net = dense()
    rows = signs(9)
    jac = covariances(net).recurrent
    push = lambda v: (
        jnp.einsum("tisk,sk->ti", jac.recurrent, v[:6].reshape(3, 2))
        + jnp.einsum("tisk,sk->ti", jac.readout, v[6:].reshape(3, 1))
    )
    delta = jax.vmap(push)(rows)
    norm = jnp.sum(delta**2, axis=2)
    s = jnp.einsum("kti,ktj,kt->tij", delta, delta, 1 / norm) / 512
    errors = 2 * jnp.einsum("tij,tj->ti", s, node_gradient(net).recurrent)
    want = jnp.einsum("ti,tj->ij", errors, net.xs)
    got = estimate(net, ActivityPerturbation(**ALL))["input"]
    assert distance(got, want) < TIGHT
    half = estimate(net, ActivityPerturbation(**ALL, scale=1.0))["input"]
    assert distance(2 * half, want) < TIGHT
    assert distance(want, gradient(net)["input"]) > 0.1


def test_activity_norms_by_hand():
    """Blocks of a layer, a step, a sequence; a batch with one loss is one block."""
    a = jnp.arange(1.0, 25.0).reshape(2, 3, 4)
    b = jnp.ones((2, 3, 1))
    square = lambda x, axis: jnp.sum(x**2, axis=axis, keepdims=True)
    (s, n), (r, m) = perturb.per_layer_step([a, b])
    chex.assert_trees_all_close((s, r), (square(a, 2), square(b, 2)))
    assert (n, m) == (4, 1)
    (s, n), (r, _) = perturb.per_step([a, b])
    chex.assert_trees_all_close((s, r), (square(a, 2) + 1, square(a, 2) + 1))
    assert n == 5
    (s, n), _ = perturb.per_sequence([a, b])
    chex.assert_trees_all_close(s, square(a, (0, 2)) + 2)
    assert n == 10


@pytest.mark.parametrize("rule", [NodePerturbation, ActivityPerturbation])
def test_a_batch_is_the_mean_of_its_examples(rule):
    """With losses and noise of their own, examples know nothing of each other."""
    net = dense(units=3, outputs=2, examples=2)
    rows = signs(15)[jnp.array([5, 777])] * jnp.array([[1.0], [2.0]])
    hidden, out = rows[:, :9].reshape(2, 3, 3), rows[:, 9:].reshape(2, 3, 2)
    both = [hidden.swapaxes(0, 1).reshape(-1), out.swapaxes(0, 1).reshape(-1)]
    fields = dict(difference=Exact())
    batch = estimate(net, rule(noise=table(jnp.concatenate(both)[None]), **fields))
    alone = []
    for i in range(2):
        one = (a[:, i] for a in (net.xs, net.ys))
        single = net._replace(h0=net.h0[i], **dict(zip(("xs", "ys"), one, strict=True)))
        alone.append(estimate(single, rule(noise=table(rows[i : i + 1]), **fields)))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *alone)
    assert distance(batch, mean) < TIGHT


def test_white_activity_needs_no_norm():
    """Without recurrence and with signs, activity and node perturbation are one."""
    net = dense(units=3)
    net.params["recurrent"] = jnp.zeros((3, 3))
    shared = dict(num_samples=7, difference=Exact())
    node = estimate(net, NodePerturbation(**shared))
    activity = estimate(net, ActivityPerturbation(**shared))
    assert distance(activity["input"], node["input"]) < TIGHT
    assert distance(activity["recurrent"], node["recurrent"]) < TIGHT


def test_trace_is_an_eligibility_trace():
    """Trace(γ) pays δL to E = γE + ξ; γ = 0 is instant, γ = 1 is causal."""
    delta = jnp.array([0.5, -2.0, 3.0, 1.0])
    noise = jnp.array([1.0, 2.0, -1.0, 4.0])
    trace = paid = 0.0
    for d, n in zip(delta, noise, strict=True):
        trace = 0.3 * trace + n
        paid += d * trace
    assert abs(jnp.sum(Trace(0.3)(delta) * noise) - paid) < 1e-14
    chex.assert_trees_all_close(Trace(0.0)(delta), perturb.instant(delta), rtol=1e-15)
    chex.assert_trees_all_close(Trace(1.0)(delta), perturb.causal(delta), rtol=1e-15)
    batch = jnp.stack([delta, 2 * delta], axis=1)
    for credit in (Trace(0.3), perturb.causal, perturb.total):
        chex.assert_trees_all_close(credit(batch)[:, 0], credit(delta), rtol=1e-15)


def test_one_sided_both_ways_is_central():
    """The mean of one-sided estimates at +v and -v is the central one at v."""
    net, rows = dense(), signs(9)[100:101]
    both = table(jnp.concatenate([rows, -rows]))
    one = estimate(net, NodePerturbation(2, difference=OneSided(0.1), noise=both))
    two = estimate(net, NodePerturbation(1, difference=Central(0.1), noise=table(rows)))
    # Not the mean of differences of v alone: curvature shows at σ = 0.1.
    assert distance(one, two) < TIGHT
    single = estimate(
        net, NodePerturbation(1, difference=OneSided(0.1), noise=table(rows))
    )
    assert distance(single, two) > 1e-3


def test_quadratic_losses_have_no_bias():
    """Central differences are exact, the mean of one-sided ones too, at σ = 3."""
    matrix = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]])
    loss = lambda p: p["a"] @ matrix @ p["a"] / 2 + 3 * p["a"][0]
    params = {"a": jnp.array([1.0, -2.0, 0.5])}
    want = jax.grad(loss)(params)
    v = table(jnp.array([[1.0, 2.0, -3.0]]))
    rule = WeightPerturbation(1, difference=Central(3.0), noise=v)
    got = perturb.value_and_grad(loss, rule)(jax.random.key(0), params)[1]
    chex.assert_trees_all_close(
        got["a"], jnp.array([1.0, 2.0, -3.0]) * (want["a"] @ jnp.array([1.0, 2, -3]))
    )
    rule = WeightPerturbation(8, difference=OneSided(3.0), noise=table(signs(3)))
    value, got = perturb.value_and_grad(loss, rule)(jax.random.key(0), params)
    assert distance(got, want) < TIGHT
    assert value == loss(params)


def test_bias_of_a_cubic():
    """E is 3θ² + σ² for signs, 3θ² + 3σ² for Gaussians (by quadrature), 3θ² for jvp."""
    theta, sigma = jnp.array(1.5), 0.5
    two, six = jnp.array([[1.0], [-1.0]]), jnp.zeros((6, 1)).at[0].set(3**0.5)
    six = six.at[1].set(-(3**0.5))  # nodes ±√3 and 0: exact up to the fifth moment
    for rows, difference, bias in (
        (two, OneSided(sigma), sigma**2),
        (six, OneSided(sigma), 3 * sigma**2),
        (six, Central(sigma), 3 * sigma**2),
        (two, Exact(), 0.0),
    ):
        rule = WeightPerturbation(len(rows), difference=difference, noise=table(rows))
        got = perturb.value_and_grad(lambda p: p**3, rule)(jax.random.key(0), theta)[1]
        assert abs(got - (3 * theta**2 + bias)) < TIGHT


def test_credit_is_one_thing_without_memory():
    """One step, or no recurrence of noise: instant, causal and total agree in the mean.

    With one step they agree sample by sample.
    """
    net = dense(steps=1)
    one = [
        estimate(net, NodePerturbation(5, credit=c))
        for c in (perturb.instant, perturb.causal, perturb.total)
    ]
    chex.assert_trees_all_equal(*one)
    net = dense()
    net.params["recurrent"] = jnp.zeros((2, 2))
    for credit in (perturb.instant, perturb.causal, perturb.total):
        got = estimate(net, NodePerturbation(**ALL, credit=credit))
        assert distance(got["input"], gradient(net)["input"]) < TIGHT


def test_size_of_the_noise_cancels():
    """σ tenfold: node and activity rules stay, those of the paper's code scale."""
    net = dense(units=4)
    for rule in (NodePerturbation, ActivityPerturbation):
        a, b = (estimate(net, rule(3, difference=OneSided(s))) for s in (1e-5, 1e-4))
        assert distance(a, b) < 1e-3  # O(σ) of a single sample
    a, b = (perturb.paper_code(6, s) for s in (1e-5, 1e-4))
    assert distance(estimate(net, a.activity), estimate(net, b.activity)) < 1e-3
    for rule in ("node", "weight"):
        small, large = (estimate(net, getattr(code, rule)) for code in (a, b))
        assert distance(jax.tree.map(lambda x: 10 * x, small), large) < 1e-3


def test_paper_code_by_its_formulas():
    """ΔA, ΔR, ΔB as the public code has them, loop by loop, from the same noise."""
    net = dense(units=3, outputs=2, inputs=2, steps=4, examples=5)
    net = net._replace(loss=lambda out, y: jnp.mean((out - y) ** 2), h0=0 * net.h0)
    sigma, key = 1e-3, jax.random.key(3)
    code = perturb.paper_code(7, sigma)
    drawn = perturb.normal(key, jnp.arange(1), 4 * 5 * 5, jnp.float64)[0] * sigma
    xi, nu = drawn[:60].reshape(4, 5, 3), drawn[60:].reshape(4, 5, 2)
    a, r, b = (net.params[k] for k in ("input", "recurrent", "readout"))

    node = {k: 0 * v for k, v in net.params.items()}
    activity = {k: 0 * v for k, v in net.params.items()}
    h = noisy = jnp.zeros((5, 3))
    for t in range(4):
        pre, pre_noisy = (
            net.xs[t] @ a.T + s @ r.T + e for s, e in ((h, 0.0), (noisy, xi[t]))
        )
        before, h, noisy = h, jnp.tanh(pre), jnp.tanh(pre_noisy)
        out, out_noisy = h @ b.T, noisy @ b.T + nu[t]
        dl = net.loss(out_noisy, net.ys[t]) - net.loss(out, net.ys[t])
        da, db = pre_noisy - pre, out_noisy - out
        for made, e, f in (
            (node, dl / sigma * xi[t], dl / sigma * nu[t]),
            (activity, *(7**0.5 * dl * d / jnp.sum(d**2) for d in (da, db))),
        ):
            made["input"] += e.T @ net.xs[t]
            made["recurrent"] += e.T @ before
            made["readout"] += f.T @ h
    # The differences of losses, 1e-3 of them, keep 13 digits.
    assert distance(estimate(net, code.node, key), node) < 1e-10
    assert distance(estimate(net, code.activity, key), activity) < 1e-10


def test_chunks_change_nothing():
    """Samples are numbered: chunks of any length give the same gradient."""
    net = dense(units=3)
    for rule in (NodePerturbation, ActivityPerturbation, WeightPerturbation):
        whole, parts = (estimate(net, rule(12, chunk=c)) for c in (None, 3))
        assert distance(parts, whole) < TIGHT
    fresh = [
        estimate(net, WeightPerturbation(4, c, every_step=True)) for c in (None, 2)
    ]
    assert distance(*fresh) < TIGHT


def test_value_is_the_clean_loss():
    """Every rule returns Σ_t mean loss of the run without noise."""
    net = dense(examples=4)
    want = jnp.sum(losses(net, net.params, silent(net)))
    for rule in (
        NodePerturbation(),
        ActivityPerturbation(),
        WeightPerturbation(),
        WeightPerturbation(every_step=True),
    ):
        f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule)
        value = jax.jit(f)(jax.random.key(0), *net.data)[0]
        assert abs(value - want) < TIGHT


def test_weight_rule_is_one_in_both_functions():
    """A weight rule on a cell is the same rule on the total loss."""
    net = dense(examples=4)
    rule = WeightPerturbation(6, 3, difference=Central())
    total = lambda p: jnp.sum(losses(net, p, silent(net)))
    want = perturb.value_and_grad(total, rule)(jax.random.key(0), net.params)
    f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule)
    # 1e-3 of the loss is differenced: 13 digits of 16 are left, at best.
    chex.assert_trees_all_close(f(jax.random.key(0), *net.data), want, rtol=1e-10)


def test_noise_has_unit_covariance_and_numbers():
    """Frames are orthogonal, signs are signs; key and number alone decide."""
    key, six = jax.random.key(4), jnp.arange(6)
    for noise in (perturb.orthonormal, perturb.coordinate):
        v = noise(key, six, 6, jnp.float64)
        chex.assert_trees_all_close(v.T @ v / 6, jnp.eye(6), atol=1e-12)
    for noise in (
        perturb.normal,
        perturb.rademacher,
        perturb.sphere,
        perturb.orthonormal,
        perturb.coordinate,
    ):
        v = noise(key, six, 70, jnp.float64)
        chex.assert_trees_all_equal(noise(key, six[3:5], 70, jnp.float64), v[3:5])
        assert not jnp.array_equal(noise(jax.random.key(5), six, 70, jnp.float64), v)
        assert jnp.unique(v, axis=0).shape == v.shape
    signs = perturb.rademacher(key, jnp.arange(400), 70, jnp.float64).astype(float)
    assert bool(jnp.all(jnp.abs(signs) == 1))
    off = signs.T @ signs / 400 - jnp.eye(70)
    assert jnp.max(jnp.abs(off)) < 6 / 20  # six standard errors, also within a word
    assert jnp.max(jnp.abs(signs.mean(0))) < 6 / 20

"""Gradients of a Pareto manifold: a step that the authors' code took, numbers by hand, and laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmerge import UsageError, registry
from refmerge.procedures.averaging.pareto_gradients import penalty

pareto_gradients = registry.procedure("pareto_gradients")

# A step of nik-dim/pamal@26adf53 MultiForwardEnsembleTrainer.training_step on a toy: member i is a matrix, the prediction
# is X times the combined matrix transposed, and task t has the mean squared error of column t. Four draws, temperature 1,
# reg_coefficient 2; the code shows its penalty as 1.785.
MEMBERS = [
    [
        [-1.8743985917469141, -0.9936632303547206, 0.7184672290178716, -0.6984538692354079],
        [-1.4715552615532814, 0.17770021523511734, 1.455673876431823, 0.6403131485541208],
        [1.9355304066710832, -1.1401546845507113, -0.16562549040153832, 0.3919509290189973],
    ],
    [
        [1.0946176142172357, -0.4447758602425775, -1.0701772721033205, -2.571136968687678],
        [0.6639316726565146, 0.3103230408905933, -0.28780144893147463, -0.19864808513151347],
        [-1.5764417174948337, -0.6679336387568807, 0.333767619346531, -0.48908867063045397],
    ],
    [
        [-0.6111036845320164, 1.8097826584684127, -0.49682405972521365, -0.5998900916532038],
        [0.5922176130801138, -0.6393748770937225, 0.5385938400470651, -0.06484815218330009],
        [-1.919836047313707, 0.02908523871844396, 0.039814441841576974, -0.44808205199680623],
    ],
]
ALPHAS = [
    [0.2789297097370481, 0.39248069146534315, 0.3285895987976088],
    [0.21840440257289587, 0.04961462683849466, 0.7319809705886094],
    [0.45417891380099884, 0.20252928758361624, 0.3432917986153849],
    [0.7347795530159814, 0.14891565575755292, 0.11630479122646574],
]
X = [
    [-1.1017815324301032, -1.1057844996488624, -0.45665189195628686, 0.5536865152270125],
    [1.3222897931353967, 0.19004877023449754, 0.39053523074309066, -0.4223927268173484],
    [-1.067884992861654, -0.4351176814454013, 0.9800773838038302, -0.5528521335560392],
    [-1.4488315376545238, -2.1214717296737664, 1.5214046479884507, 0.6298955780833687],
    [0.6292250233897582, 0.5062750663663299, 1.5115909610768876, -0.7772523182328814],
    [-0.829602443461196, 0.4166581254072336, -0.6466722962863919, -0.9335886611824937],
    [0.08282139329022563, -0.06208327453929153, -0.10656284714411597, 1.43872915631102],
    [-0.024649884089550406, 0.1991802689733857, -2.7177907348941637, 0.9015260315023167],
]
Y = [
    [0.6376901941527995, 0.6560099252248044, 1.3266279919382744],
    [0.09470194139610666, 0.5965464401583016, 0.8928473654341553],
    [-1.6863213298458506, -0.058874400582551445, 2.8325937151746032],
    [1.7805085867383026, -0.5665395154300639, -1.151873837188793],
    [-0.1517824473738878, 0.7786308469314482, -0.30124402094363734],
    [1.658315156283276, 1.7914363744758628, 0.8293058677172587],
    [3.2057460248155696, -0.10740778829966091, 0.9254903859606024],
    [2.6255263641977846, 1.6712216976106151, 1.542248228882052],
]
LOSSES = [
    [6.475343049612963, 2.022928857451384, 2.9500281005301967],
    [5.71767372866051, 3.2721190324920775, 2.742029033420172],
    [5.824705605603032, 3.363144159252138, 2.3933606946096018],
    [7.858342409262405, 5.1234396574852035, 3.060710829980973],
]
GRADIENTS = [
    [
        [-0.7736468765364565, -0.20802878008965164, 2.4432384402887464, -2.200214594999799],
        [-1.594065668588607, -2.1734434766474875, 3.887001938115676, 0.1805484970111942],
        [0.19643216105342245, -0.5166238627285784, 0.9240669998309661, 0.2247069345503457],
    ],
    [
        [0.1894160146715403, 0.6631902242073411, 1.0714301034627478, -1.7959957557347876],
        [-0.30162728840695757, -0.30283179672372645, 0.3894540569464862, 0.030806991839997147],
        [-0.2388614405320705, -0.4366409162062628, 0.5733512316576375, 0.05001382853034868],
    ],
    [
        [0.3340042338092443, 0.8362986646412688, 0.7692466827299795, -1.6806457529239447],
        [-0.22008230806975532, -0.22697407566451966, 0.2924293776534648, 0.02227839775054494],
        [-0.9656125215784184, -1.088991568615532, 1.192737392618488, 0.02224701085589156],
    ],
]


def toy(x, y):
    """Losses and gradients of a combined matrix."""

    def evaluate(theta):
        off = x @ theta["w"].T - y
        losses = (off**2).mean(axis=0)
        gradients = []
        for t in range(y.shape[1]):
            g = np.zeros_like(theta["w"])
            g[t] = 2 / len(x) * (off[:, t] @ x)
            gradients.append({"w": g})
        return losses, gradients

    return evaluate


def test_a_step_of_the_authors_code():
    evaluate = toy(np.array(X), np.array(Y))
    members = [{"w": np.array(w)} for w in MEMBERS]
    for alpha, losses in zip(ALPHAS, LOSSES):
        combined = {"w": sum(a * m["w"] for a, m in zip(alpha, members))}
        np.testing.assert_allclose(evaluate(combined)[0], losses, rtol=1e-12)
    _, R, gradients = pareto_gradients(members, ALPHAS, evaluate, temperature=1.0, reg_coefficient=2.0)
    assert f"{R:.3f}" == "1.785"
    np.testing.assert_allclose([g["w"] for g in gradients], GRADIENTS, rtol=1e-12, atol=1e-13)


# --- By hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "losses", "value", "slope"),
    [
        ([0.75, 0.25], [1.0, 9.0], 8.0, [-1.0, 1.0]),  # log(e^8 / 1)
        ([0.25, 0.75], [1.0, 9.0], 0.0, [0.0, 0.0]),  # falls
        ([0.5, 0.25, 0.75], [3.0, 3.0, 3.0], 0.0, [0.0, 0.0, 0.0]),  # log(2 / 2); at the kink nothing
        ([0.25, 0.5, 0.75], [4.0, 2.0, 0.0], 2.0, [0.5, 0.0, -0.5]),  # two rises of 2: log(2 e^2 / 2)
        ([0.5], [3.0], 0.0, [0.0]),
        ([0.5, 0.5], [3.0, 4.0], 0.0, [0.0, 0.0]),  # no neighbours
        ([0.5, 0.5, 0.25], [9.0, 3.0, 3.0], -np.log(2), [0.0, 0.0, 0.0]),  # the last of equal ones; log(1 / 2)
        ([0.75, 0.25], [0.0, 1e6], 1e6, [-1.0, 1.0]),  # no overflow
    ],
)
def test_penalty(alpha, losses, value, slope):
    R, d = penalty(alpha, losses, 1.0)
    assert abs(R - value) < 1e-15 and d.tolist() == slope


def quadratic(theta):
    x = theta["x"]
    return [((x - 4) ** 2).sum(), (x**2).sum()], [{"x": 2 * (x - 4)}, {"x": 2 * x}]


def test_two_members_by_hand():
    """Points 3 and 1, losses (1, 9) and (9, 1): 6, a penalty of 8 for each task, and all weights 1/2 with 1/4 of it."""
    members = [{"x": np.array([4.0])}, {"x": np.array([0.0])}]
    alphas = [[0.75, 0.25], [0.25, 0.75]]
    for strength, loss, gradient in ((0.0, 6.0, 0.0), (0.25, 10.0, 1.0), (1.0, 6.0, 0.0)):
        got, R, gradients = pareto_gradients(members, alphas, quadratic, reg_coefficient=strength)
        assert (got, R) == (loss, 16.0)
        assert [g["x"].item() for g in gradients] == [gradient, -gradient]


# --- Laws -------------------------------------------------------------------------------------------------------------


@st.composite
def steps(draw):
    """Members, preferences that differ, a toy, and a strength."""
    T, W = draw(st.integers(2, 3)), draw(st.integers(1, 4))
    seed = np.random.default_rng(draw(st.integers(0, 1000)))
    members = [{"w": seed.standard_normal((T, 2))} for _ in range(T)]
    alphas = seed.dirichlet(np.ones(T), size=W).tolist()
    return (
        members,
        alphas,
        toy(seed.standard_normal((5, 2)), seed.standard_normal((5, T))),
        draw(st.sampled_from([0.0, 0.1])),
    )


@given(steps())
def test_gradients_are_those_of_the_loss(step):
    members, alphas, evaluate, strength = step
    loss, R, gradients = pareto_gradients(members, alphas, evaluate, reg_coefficient=strength)
    moved = [{"w": m["w"] - 1e-6 * g["w"]} for m, g in zip(members, gradients)]
    after, _, _ = pareto_gradients(moved, alphas, evaluate, reg_coefficient=strength)
    squared = sum(float((g["w"] ** 2).sum()) for g in gradients)
    if strength == 0 or abs(strength * R - loss) > 0.1:
        assert loss - after == pytest.approx(1e-6 * squared, rel=0.05, abs=1e-9)


@given(steps())
def test_draws_may_be_permuted(step):
    members, alphas, evaluate, strength = step
    one = pareto_gradients(members, alphas, evaluate, reg_coefficient=strength)
    other = pareto_gradients(members, alphas[::-1], evaluate, reg_coefficient=strength)
    assert one[:2] == pytest.approx(other[:2])
    for a, b in zip(one[2], other[2]):
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-9, atol=1e-9)


@given(steps(), st.integers(0, 1))
def test_a_corner_trains_its_member_alone(step, i):
    members, _, evaluate, _ = step
    corner = [float(t == i) for t in range(len(members))]
    losses, gradients = evaluate(members[i])
    loss, R, got = pareto_gradients(members, [corner], evaluate, reg_coefficient=1.0)
    assert (loss, R) == (losses[i], 0.0)
    for t, g in enumerate(got):
        assert np.array_equal(g["w"], gradients[i]["w"] if t == i else 0 * g["w"])


@given(steps())
def test_equal_members_share_the_gradient(step):
    members, alphas, evaluate, _ = step
    same = [members[0]] * len(members)
    _, gradients = evaluate(members[0])
    expected = sum(alpha[t] * gradients[t]["w"] for alpha in alphas for t in range(len(members)))
    _, _, got = pareto_gradients(same, alphas, evaluate)
    np.testing.assert_allclose(sum(g["w"] for g in got), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("alphas", "evaluate", "said"),
    [
        ([], quadratic, "at least one list"),
        ([[1.0]], quadratic, "lists of 2 numbers"),
        ([[0.5, 0.5]], lambda theta: ([1.0], [{}]), "2 losses and 2 gradients"),
    ],
)
def test_refusals(alphas, evaluate, said):
    with pytest.raises(UsageError, match=said):
        pareto_gradients([{"x": np.array([4.0])}, {"x": np.array([0.0])}], alphas, evaluate)

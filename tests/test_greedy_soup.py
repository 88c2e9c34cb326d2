"""greedy_soup: its three rules against the scripts that they come from, its laws, and what it does with files."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import refmerge
from refmerge import registry, testing
from refmerge.errors import InputError, UsageError
from refmerge.procedures.averaging.greedy_soup import Trial

greedy_soup = registry.procedure("greedy_soup")
RULES = ("strict", "at_least", "repeats")

# Model k is the k-th unit vector, so that an average says what it is made of: any table of scores is a score function.


def units(count):
    return [{"x": row} for row in np.eye(count)]


def recipe(soup):
    """What a soup of unit vectors holds: place -> share."""
    return {k: Fraction(float(v)).limit_denominator(64) for k, v in enumerate(soup["x"]) if v}


class Scores:
    """A score for each set of shares, drawn on first use and the same ever after."""

    def __init__(self, draw, values):
        self.draw, self.values, self.known, self.calls = draw, values, {}, 0

    def of(self, places):
        shares = frozenset((k, Fraction(places.count(k), len(places))) for k in set(places))
        if shares not in self.known:
            self.known[shares] = self.draw(self.values)
        return self.known[shares]

    def __call__(self, soup):
        self.calls += 1
        shares = frozenset(recipe(soup).items())
        if shares not in self.known:
            self.known[shares] = self.draw(self.values)
        return self.known[shares]


TIES = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, math.inf, -math.inf])
ANY = TIES | st.floats()


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


# --- The scripts, in their own words ----------------------------------------------------------------------------------


def model_soups(count, score):
    """Sorted upwards, then reversed; a model stays where the score is greater."""
    ordered = sorted(((k, score([k])) for k in range(count)), key=lambda item: item[1])
    ordered.reverse()
    soup, best = [ordered[0][0]], ordered[0][1]
    for k, _ in ordered[1:]:
        trial = score([*soup, k])
        if trial > best:
            soup, best = [*soup, k], trial
    return soup, best


def ratatouille(count, score):
    """Sorted downwards; from minus infinity; a model stays where the score is no smaller."""
    chosen, best = [], -math.inf
    for k in sorted(range(count), key=lambda k: score([k]), reverse=True):
        chosen.append(k)
        trial = score(chosen)
        if trial >= best:
            best = trial
        else:
            chosen.pop()
    return chosen, best


def time_vectors(count, score):
    """A queue to whose end every model returns; twenty trials; a score from zero on."""
    queue, soup, best = sorted(range(count), key=lambda k: score([k]), reverse=True), [], 0.0
    for _ in range(20):
        k = queue.pop(0)
        trial = score([*soup, k])
        if trial >= best:
            soup, best = [*soup, k], trial
        queue.append(k)
    return soup, best


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_the_strict_rule_is_that_of_model_soups(data, count):
    score = Scores(data.draw, TIES)
    got = greedy_soup(units(count), score)
    assert ([*got.ingredients], got.score) == model_soups(count, score.of)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_the_rule_at_least_is_that_of_ratatouille(data, count):
    score = Scores(data.draw, TIES)
    got = greedy_soup(units(count), score, rule="at_least")
    assert ([*got.ingredients], got.score) == ratatouille(count, score.of)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_the_rule_repeats_is_that_of_time_vectors(data, count):
    """Also where it stops early: the trials left out would not have been taken."""
    score = Scores(data.draw, st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
    got = greedy_soup(units(count), score, rule="repeats")
    assert ([*got.ingredients], got.score) == time_vectors(count, score.of)


# --- Laws -------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from(RULES))
def test_laws(data, count, rule):
    score = Scores(data.draw, ANY)
    models = units(count)
    alone = [score.of([k]) for k in range(count)]
    if all(map(math.isnan, alone)):
        with pytest.raises(UsageError, match="every model scores NaN"):
            greedy_soup(models, score, rule=rule)
        return
    got = greedy_soup(models, score, rule=rule)
    finite = [s for s in alone if not math.isnan(s)]
    # No worse than the best model, and what is said of it is so.
    assert got.score >= max(finite)
    assert all(map(same, got.scores, alone))
    assert got.score == score.of([*got.ingredients])
    assert recipe(got.merged) == {k: Fraction(got.ingredients.count(k), len(got.ingredients)) for k in got.ingredients}
    # The trials tell the whole story.
    soup, best = [], -math.inf
    for t in got.trials:
        assert same(t.score, score.of([*soup, t.model]))
        assert t.taken == (not soup or (t.score > best if rule == "strict" else t.score >= best))
        if t.taken:
            soup, best = [*soup, t.model], t.score
    assert tuple(soup) == got.ingredients
    assert got.trials[0].score == max(finite) and got.trials[0].taken
    if rule != "repeats":
        assert sorted(t.model for t in got.trials) == [*range(count)]
    # The same again.
    again = greedy_soup(models, score, rule=rule)
    assert (again.ingredients, again.score) == (got.ingredients, got.score)
    testing.assert_same(again.merged, got.merged)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from(RULES))
def test_a_model_whose_every_soup_scores_nan_changes_nothing(data, count, rule):
    score = Scores(data.draw, TIES)
    at = data.draw(st.integers(0, count))

    def refuses(soup):
        """The model at `at` is worthless in any company; the others score as they do without it."""
        if soup["x"][at]:
            return math.nan
        return score({"x": np.delete(soup["x"], at)})

    # Seats of the queue are trials too: give the longer one as many rounds.
    expected = greedy_soup(units(count), score, rule=rule, trials=4 * count)
    got = greedy_soup(units(count + 1), refuses, rule=rule, trials=4 * (count + 1))
    assert got.ingredients == tuple(k + (k >= at) for k in expected.ingredients)
    assert got.score == expected.score


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 32), st.permutations(range(5)), st.sampled_from(RULES))
def test_the_order_of_the_models_decides_only_between_equals(seed, order, rule):
    count, draw = len(order), np.random.default_rng(seed)
    score = Scores(lambda _: draw.random(), None)

    def permuted(soup):
        x = np.zeros(count)
        x[list(order)] = soup["x"]
        return score({"x": x})

    expected = greedy_soup(units(count), score, rule=rule)
    got = greedy_soup(units(count), permuted, rule=rule)
    assert [order[k] for k in got.ingredients] == [*expected.ingredients]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from(RULES))
def test_scores_that_are_known_are_not_asked_for(data, count, rule):
    score = Scores(data.draw, TIES)
    expected = greedy_soup(units(count), score, rule=rule)
    score.calls = 0
    got = greedy_soup(units(count), score, rule=rule, scores=expected.scores)
    assert got.trials == expected.trials
    assert score.calls == len(got.trials) - 1


@settings(max_examples=60, deadline=None)
@given(testing.checkpoints(max_models=4), st.sampled_from(RULES), st.data())
def test_what_is_scored_is_what_comes_out(drawn, rule, data):
    """To the bit, and it is refmerge's average of the ingredients."""
    models, _ = drawn
    seen = []

    def score(soup):
        seen.append({name: np.array(x) for name, x in soup.items()})
        return data.draw(TIES)

    with np.errstate(all="ignore"):
        got = greedy_soup(models, score, rule=rule, trials=6, nonfinite="propagate")
        expected = refmerge.merge([models[k] for k in got.ingredients], "linear", nonfinite="propagate")
    testing.assert_same(got.merged, expected)
    taken = [i for i, t in enumerate(got.trials) if t.taken][-1]
    if taken:
        testing.assert_same(got.merged, seen[len(models) + taken - 1])


# --- By hand ----------------------------------------------------------------------------------------------------------


def positive(soup):
    """How many of six entries are right, which is above zero, and not by rounding."""
    return int(np.count_nonzero(soup["x"] > 0.01))


SIX = [[4, 4, 4, 4, -1, -1], [1, 1, 1, -1, 4, -2], [-1, -1, -1, -1, -1, 4], [2, 2, 2, -1, -1, -1]]
SIX = [{"x": np.array(x, np.float64)} for x in SIX]


def test_by_hand():
    """Alone they have 4, 4, 1 and 3 right; 1 + 0 has 5, with 3 it still has 5, and with 2 all 6. 0 + 1 + 3 + 2 has 5."""
    strict = greedy_soup(SIX, positive)
    assert strict.scores == (4.0, 4.0, 1.0, 3.0)
    assert strict.trials == (Trial(1, 4.0, True), Trial(0, 5.0, True), Trial(3, 5.0, False), Trial(2, 6.0, True))
    assert (strict.ingredients, strict.score) == ((1, 0, 2), 6.0)
    testing.assert_same((3 * strict.merged["x"]).round(12), np.array([4.0, 4, 4, 2, 2, 1]))
    at_least = greedy_soup(SIX, positive, rule="at_least")
    assert (at_least.ingredients, at_least.score) == ((0, 1, 3, 2), 5.0)
    repeats = greedy_soup(SIX, positive, rule="repeats")
    assert repeats.ingredients == (0, 1, 3, 2)
    assert len(repeats.trials) == 8, "a round in vain is the last"


def test_repeats_weighs_by_counts():
    """Only the share of model 0 counts, and 2/3 is best: 0, then 0 + 1 (1/2), 0 + 1 + 0 (2/3), and nothing after."""
    score = lambda soup: -abs(soup["x"][0] - 2 / 3)  # noqa: E731
    got = greedy_soup(units(2), score, rule="repeats")
    assert got.ingredients == (0, 1, 0)
    assert recipe(got.merged) == {0: Fraction(2, 3), 1: Fraction(1, 3)}
    assert greedy_soup(units(2), score, rule="repeats", trials=2).ingredients == (0, 1)
    assert [t.taken for t in got.trials] == [True, True, True, False, False]


def test_the_numbers_of_the_authors_code():
    """Scores that it gave on six models around a target, and the order in which it took them."""
    individual = [0.011975118663, 0.012959613807, 0.013122432261, 0.01143157776, 0.01202859113, 0.011621815142]
    order = [2, 1, 4, 0, 5, 3]
    trials = [0.026433948178, 0.039114314218, 0.049136859884, 0.058256270152, 0.069122477191]
    table = {frozenset(order[: n + 2]): s for n, s in enumerate(trials)}
    table |= {frozenset([k]): s for k, s in enumerate(individual)}
    got = greedy_soup(units(6), lambda soup: table[frozenset(recipe(soup))])
    assert [*got.ingredients] == order
    assert [t.score for t in got.trials[1:]] == trials


# --- Its inputs and outputs -------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    for k, model in enumerate(SIX):
        (tmp_path / f"m{k}").mkdir()
        save_file(model, tmp_path / f"m{k}" / "model.safetensors")
        (tmp_path / f"m{k}" / "config.json").write_text("{}")
    return [tmp_path / f"m{k}" for k in range(len(SIX))]


def listed(folder):
    return sorted(p.name for p in folder.iterdir())


def test_files_give_what_arrays_give(folders, tmp_path):
    expected = greedy_soup(SIX, positive)
    for models in (folders, [refmerge.open_checkpoint(f) for f in folders], [*map(str, folders)]):
        got = greedy_soup(models, positive)
        assert got.trials == expected.trials
        testing.assert_same(got.merged, expected.merged)
    assert listed(tmp_path) == ["m0", "m1", "m2", "m3"]


@pytest.mark.parametrize("name", ["soup", "soup.safetensors"])
def test_scores_of_files(folders, tmp_path, name):
    """Where the soup is written, a trial is an open checkpoint beside it, whole while it is scored and gone then."""
    seen = []

    def score(soup):
        assert refmerge.open_checkpoint(soup.path).keys() == soup.keys()
        seen.append(soup.path)
        return positive(soup)

    got = greedy_soup(folders, score, out=tmp_path / "new" / name)
    assert got.trials == greedy_soup(SIX, positive).trials
    testing.assert_same(dict(got.merged), greedy_soup(SIX, positive).merged)
    assert [*seen[:4]] == folders
    assert len(set(seen)) == 7 and not any(p.exists() for p in seen[4:])
    assert listed(tmp_path / "new") == [name]
    assert name != "soup" or listed(tmp_path / "new" / "soup") == ["config.json", "model.safetensors"]


def test_a_score_that_fails_leaves_nothing(folders, tmp_path):
    calls = iter([4, 4, 1, 3])

    def score(soup):
        return next(calls, None) or 1 / 0

    with pytest.raises(ZeroDivisionError):
        greedy_soup(folders, score, out=tmp_path / "soup")
    assert listed(tmp_path) == ["m0", "m1", "m2", "m3"]


def test_a_score_may_keep_house_in_its_mapping():
    """What it takes out of its mapping stays in the models."""
    got = greedy_soup(SIX, lambda soup: np.count_nonzero(soup.pop("x") > 0))
    assert got.ingredients == (1, 0, 2) and "x" in got.merged and all("x" in m for m in SIX)


def test_batch_norm_statistics_of_the_best_model():
    """Another average may be asked for: here that of the rule's authors, whose first model keeps its buffers."""
    models = [{**m, "bn.running_mean": np.array([float(k)])} for k, m in enumerate(SIX)]
    got = greedy_soup(models, positive, rule="at_least", method="official:model_ratatouille")
    assert (got.ingredients, got.merged["bn.running_mean"][0]) == ((0, 1, 3, 2), 0.0)
    assert greedy_soup(models, positive, rule="at_least").merged["bn.running_mean"][0] == 1.5


def test_torch(torch):
    models = [{"x": torch.tensor(m["x"])} for m in SIX]
    got = greedy_soup(models, lambda soup: (soup["x"] > 0).sum())
    assert got.ingredients == (1, 0, 2) and isinstance(got.merged["x"], torch.Tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "best"}, "rule = 'best' is none of 'strict', 'at_least', 'repeats'"),
        ({"trials": 0}, "trials = 0 is no whole number above 0"),
        ({"scores": [1.0]}, "1 scores for 4 models"),
        ({"scores": [1.0, "2", 3.0, 4.0]}, "a score is a number, not str"),
        ({"scores": [math.nan] * 4}, "every model scores NaN"),
        ({"density": 0.5}, "linear has no parameter 'density'"),
        ({"method": "slerp"}, "slerp merges 2 models, 4 given"),
        ({"donor": "m0"}, "linear has no parameter 'donor'"),
        ({"models": []}, "0 given"),
        ({"models": "m0"}, r"models is a sequence: write \[a, b\]"),
        ({"models": SIX[0]}, r"models is a sequence: write \[a, b\]"),
        ({"score": lambda soup: "high"}, "a score is a number, not str"),
        ({"score": lambda soup: None}, "a score is a number, not NoneType"),
        ({"score": lambda soup: 1j}, "a score is a number, not complex"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        greedy_soup(**{"models": SIX, "score": positive} | arguments)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_averaged_is_refused_before_anything_is_scored(folders, tmp_path):
    def score(soup):
        raise AssertionError

    with pytest.raises(InputError, match="'x' has different shapes"):
        greedy_soup([*SIX, {"x": np.zeros(5)}], score)
    with pytest.raises(InputError, match="integer tensor 'n' differs"):
        greedy_soup([{"n": np.array([k])} for k in range(3)], score)
    with pytest.raises(UsageError, match="exists; overwrite=True replaces it"):
        greedy_soup(folders, score, out=folders[0])
    with pytest.raises(UsageError, match="lies in an input"):
        greedy_soup(folders, score, out=folders[0] / "soup")
    with pytest.raises(UsageError, match="lies in an input"):
        greedy_soup(folders, score, out=folders[0], overwrite=True)
    (tmp_path / "soup").mkdir()
    with pytest.raises(UsageError, match="exists; overwrite=True replaces it"):
        greedy_soup(folders, score, out=tmp_path / "soup")


@pytest.mark.parametrize("rule", ["strict", "repeats"])
def test_a_search_goes_on_from_its_log(rule, tmp_path):
    """After an interruption at any score, a half-written line included, with no score taken twice."""
    whole = greedy_soup(SIX, positive, rule=rule)
    log, calls = tmp_path / "log.jsonl", []

    def score(soup, stop):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(1)
        return positive(soup)

    for stop in (0, 2, 5):
        with pytest.raises(KeyboardInterrupt):
            greedy_soup(SIX, lambda m, stop=stop: score(m, stop), rule=rule, log=log)
        with log.open("a") as file:
            file.write('{"models": [0')
    found = greedy_soup(SIX, lambda m: score(m, None), rule=rule, log=log)
    again = greedy_soup(SIX, lambda m: 1 / 0, rule=rule, log=log)
    assert found.trials == again.trials == whole.trials and found.scores == whole.scores
    assert len(calls) == len(log.read_text().splitlines()) - 1 == 4 + len(whole.trials) - 1
    with pytest.raises(UsageError, match="is the log of another search"):
        greedy_soup(SIX, positive, rule="at_least", log=log)
    log.write_text("no log\n")
    with pytest.raises(UsageError, match="is the log of another search"):
        greedy_soup(SIX, positive, rule=rule, log=log)
    assert whole.plot().count("<circle") == len(whole.trials)


def test_a_command_scores(folders, tmp_path):
    program = tmp_path / "score.py"
    program.write_text(
        "import sys, refmerge\nprint('scoring')\nprint(int((refmerge.open_checkpoint(sys.argv[1])['x'] > 0.01).sum()))\n"
    )
    got = greedy_soup(folders, [sys.executable, str(program)], out=tmp_path / "soup")
    assert got.trials == greedy_soup(SIX, positive).trials
    with pytest.raises(UsageError, match="a command scores checkpoints: give models as paths, and out"):
        greedy_soup(folders, "evaluate")
    with pytest.raises(UsageError, match="greedy_soup: no_such_program cannot be run: No such file"):
        greedy_soup(folders, "no_such_program", out=tmp_path / "other")


def test_options_of_merge(folders, tmp_path):
    counters = [{**m, "n": np.array([k])} for k, m in enumerate(SIX)]
    got = greedy_soup(counters, positive, integers="base", out_dtype="float32")
    assert got.merged["x"].dtype == np.float32 and got.merged["n"][0] == 1
    (tmp_path / "soup").mkdir()
    (tmp_path / "soup" / "model.safetensors").write_bytes(b"old")
    got = greedy_soup(folders, positive, out=tmp_path / "soup", overwrite=True, threads=1)
    assert positive(got.merged) == 6

"""The search for settings: it finds the best, within the same budget for all."""

import pytest

from utils.evaluate import tuning
from utils.evaluate.tuning import BUDGET, tune

AXES = {"a": tuple(range(10)), "b": (1, 2, 3), "c": (False, True)}


def fit_log():
    log = []

    def fit(setting):
        log.append(dict(setting))
        return setting

    return fit, log


@pytest.mark.parametrize("best", [{"a": 9, "b": 1, "c": True}, {"a": 0, "b": 3, "c": False}])
def test_the_search_walks_to_the_best_and_keeps_to_its_budget(best):
    fit, log = fit_log()
    score = lambda s: -abs(s["a"] - best["a"]) - abs(s["b"] - best["b"]) - (s["c"] != best["c"])
    found = tune(fit, score, AXES, {"a": 5, "b": 2, "c": False}, ("a",))
    assert found.setting == found.fit == best and found.at_end == ["a"]
    assert len(log) == found.tried == BUDGET < 60
    assert len({tuple(s.values()) for s in log}) == BUDGET  # none is tried twice


def test_the_budget_is_used_whatever_the_scores_are_and_a_tie_keeps_the_first(monkeypatch):
    monkeypatch.setattr(tuning, "BUDGET", 7)
    for score in (lambda s: 0.0, lambda s: float(s["a"])):
        fit, log = fit_log()
        tune(fit, score, AXES, {"a": 4, "b": 2, "c": False})
        assert len(log) == 7
    assert tune(fit, lambda s: 0.0, AXES, {"a": 4, "b": 2, "c": False}).setting == {"a": 4, "b": 2, "c": False}


def test_a_small_grid_ends_early_and_without_a_score_the_start_is_taken():
    fit, _ = fit_log()
    assert tune(fit, lambda s: s["b"], {"b": (1, 2, 3)}, {"b": 1}).tried == 3
    found = tune(fit, None, AXES, {"a": 4, "b": 2, "c": True})
    assert (found.tried, found.setting["a"], str(found)) == (0, 4, "a 4, b 2, c yes")

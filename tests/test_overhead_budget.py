"""The budget against a simulated machine whose step takes a + bk seconds, with noise."""

import numpy as np
import pytest

from infomcr_dist.overhead_budget import WINDOW, OverheadBudget


def run(
    budget: OverheadBudget, steps: int, a: float, b: float, plain_first: int, seed: int = 0
) -> tuple[list[int], list[float]]:
    noise = np.random.default_rng(seed)
    drawn, means = [], []
    for _ in range(plain_first):
        budget.observe(None, a * noise.lognormal(0, 0.1))
    for step in range(steps):
        k = budget.draw(step)
        seconds = (a + b * k) * noise.lognormal(0, 0.1)
        budget.observe(k, seconds * (20 if noise.random() < 0.02 else 1))  # a step that was held up now and then
        drawn.append(k)
        if (step + 1) % WINDOW == 0:
            budget.mean = budget.propose()
        means.append(budget.mean)
    return drawn, means


@pytest.mark.parametrize("plain_first", [0, 100])
@pytest.mark.parametrize(
    ("ratio", "sub_batches", "share"), [(1.2, 8, 0.13), (1.2, 4, 0.25), (1.6, 8, 0.13), (1.1, 2, 0.5)]
)
def test_converges_to_the_ratio(ratio: float, sub_batches: int, share: float, plain_first: int) -> None:
    budget = OverheadBudget(ratio, sub_batches, seed=1)
    drawn, _ = run(budget, 2000, a=0.1, b=0.1 * share, plain_first=plain_first)
    achieved = 1 + share * np.mean(drawn[1000:])
    assert achieved == pytest.approx(ratio, abs=0.04)


def test_never_exceeds_all_sub_batches_nor_gives_up() -> None:
    _, means = run(OverheadBudget(9.0, 4, seed=1), 600, a=0.1, b=0.01, plain_first=50)
    assert means[-1] == 4.0
    _, means = run(OverheadBudget(1.0001, 4, seed=1), 600, a=0.1, b=0.5, plain_first=50)
    assert 0 < means[-1] < 0.2


@pytest.mark.parametrize("mean", [0.3, 1.0, 2.75])
def test_draws_have_the_mean_and_do_not_depend_on_the_worker(mean: float) -> None:
    budgets = [OverheadBudget(1.2, 4, seed=5) for _ in range(2)]
    for budget in budgets:
        budget.mean = mean
    draws = [[budget.draw(step) for step in range(4000)] for budget in budgets]
    assert draws[0] == draws[1]
    assert np.mean(draws[0]) == pytest.approx(mean, abs=4 * 0.5 / np.sqrt(4000))
    assert set(draws[0]) <= {int(mean), int(mean) + 1}


def test_state_survives_a_restart() -> None:
    first, second = OverheadBudget(1.2, 8, seed=1), OverheadBudget(1.2, 8, seed=1)
    run(first, 100, 0.1, 0.01, 50)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert [first.draw(s) for s in range(50)] == [second.draw(s) for s in range(50)]

"""The learning rate against its closed forms, and the regularizer's switch against every schedule."""

import math

import pytest

from infomcr_dist.config import RegularizerSettings, ScheduleSettings
from infomcr_dist.schedules import LearningRate, PenaltyWeight, TimeFraction

STEPS = 50  # an epoch


def rates(settings: ScheduleSettings, epochs: int, losses: list[float] | None = None) -> list[float]:
    schedule = LearningRate(settings, peak=0.4, epochs=epochs, steps_per_epoch=STEPS)
    result = []
    for epoch in range(epochs):
        result += [schedule.at(epoch + step / STEPS) for step in range(STEPS)]
        schedule.end_epoch(epoch, losses[epoch] if losses else 1.0)
    return result


def switch_on(
    settings: RegularizerSettings, schedule: ScheduleSettings, epochs: int, **more: list[float]
) -> float | None:
    """Progress in epochs at which the regularizer is switched on, or None."""
    weight = PenaltyWeight(settings, schedule.warmup_epochs)
    on = [weight.at(i / STEPS, rate) is not None for i, rate in enumerate(rates(schedule, epochs, **more))]
    assert on == sorted(on), "once on, the regularizer stays on"
    return on.index(True) / STEPS if True in on else None


AFTER_DROP = RegularizerSettings(sub_batch_size=16)


def test_warmup_rises_linearly_to_the_peak() -> None:
    seen = rates(ScheduleSettings(kind="constant", warmup_epochs=2), 3)
    assert seen[: 2 * STEPS] == pytest.approx([0.4 * (i + 1) / (2 * STEPS) for i in range(2 * STEPS)])
    assert set(seen[2 * STEPS :]) == {0.4}


def test_milestones_multiply_the_rate_at_their_epochs() -> None:
    seen = rates(ScheduleSettings(milestones=(1, 2.5), factor=0.1), 4)
    assert seen == pytest.approx([0.4] * STEPS + [0.04] * (STEPS * 3 // 2) + [0.004] * (STEPS * 3 // 2))


def test_cosine_follows_its_formula_after_the_warmup() -> None:
    seen = rates(ScheduleSettings(kind="cosine", warmup_epochs=1), 5)
    expected = [0.2 * (1 + math.cos(math.pi * i / (4 * STEPS))) for i in range(4 * STEPS)]
    assert seen[STEPS:] == pytest.approx(expected)


def test_plateau_drops_after_patience_epochs_without_a_lower_loss() -> None:
    settings = ScheduleSettings(kind="plateau", patience=2, factor=0.5, threshold=0.01)
    losses = [1.0, 0.9, 0.895, 0.892, 0.5, 0.5, 0.5, 0.5]  # 0.895 and 0.892 are less than 1 % below 0.9
    by_epoch = rates(settings, 8, losses)[::STEPS]
    assert by_epoch == pytest.approx([0.4, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.1])


def test_plateau_state_survives_a_restart() -> None:
    settings = ScheduleSettings(kind="plateau", patience=2)
    losses = [1.0, 1.0, 1.0, 1.0, 1.0]
    whole, first = (LearningRate(settings, 0.4, 5, STEPS) for _ in range(2))
    for epoch, loss in enumerate(losses):
        whole.end_epoch(epoch, loss)
    for epoch in range(2):
        first.end_epoch(epoch, losses[epoch])
    second = LearningRate(settings, 0.4, 5, STEPS)
    second.load_state_dict(first.state_dict())
    for epoch in range(2, 5):
        second.end_epoch(epoch, losses[epoch])
    assert second.state_dict() == whole.state_dict()
    assert second.at(5) == whole.at(5) == pytest.approx(0.004)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("factor", [0.1, 0.2, 0.7])
def test_is_switched_on_at_the_first_milestone(warmup: float, factor: float) -> None:
    schedule = ScheduleSettings(warmup_epochs=warmup, milestones=(2, 3), factor=factor)
    assert switch_on(AFTER_DROP, schedule, 5) == 2.0


def test_is_switched_on_at_the_first_plateau_drop() -> None:
    schedule = ScheduleSettings(kind="plateau", patience=1)
    assert switch_on(AFTER_DROP, schedule, 4, losses=[1.0, 0.5, 0.5, 0.4]) == 3.0


def test_is_switched_on_at_half_the_peak_of_a_cosine() -> None:
    assert switch_on(AFTER_DROP, ScheduleSettings(kind="cosine"), 4) == pytest.approx(2.0, abs=1 / STEPS)
    assert switch_on(AFTER_DROP, ScheduleSettings(kind="cosine", warmup_epochs=2), 6) == pytest.approx(4, abs=1 / STEPS)


def test_never_goes_on_where_the_rate_never_drops() -> None:
    assert switch_on(AFTER_DROP, ScheduleSettings(kind="constant", warmup_epochs=1), 4) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (RegularizerSettings(when="always", sub_batch_size=16), 0.0),
        (RegularizerSettings(when="never"), None),
        (RegularizerSettings(when="from_epoch", epoch=1.5, sub_batch_size=16), 1.5),
    ],
)
def test_other_switches_ignore_the_rate(settings: RegularizerSettings, expected: float | None) -> None:
    assert switch_on(settings, ScheduleSettings(milestones=(2,)), 3) == expected


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        ("linear", [0, 2, 4, 6]),
        ("cosine", [4 * (1 - math.cos(math.pi * i / 4)) for i in range(4)]),
        ("steps", [8 / 3, 8 / 3, 16 / 3, 16 / 3]),
    ],
)
def test_beta_rises_from_the_switch_on(ramp: str, expected: list[float]) -> None:
    settings = RegularizerSettings(sub_batch_size=16, beta=8, ramp=ramp, ramp_epochs=4, ramp_steps=2)  # type: ignore[arg-type]
    weight = PenaltyWeight(settings, 0)
    betas = [weight.at(epoch, 1.0 if epoch < 2 else 0.1) for epoch in range(8)]
    assert betas[:2] == [None, None]
    assert betas[2:] == pytest.approx([*expected, 8, 8])


def test_switch_survives_a_restart() -> None:
    def sequence(restart_after: int) -> list[float | None]:
        settings = RegularizerSettings(sub_batch_size=16, ramp_epochs=4)
        weight, seen = PenaltyWeight(settings, 0), []
        for i, rate in enumerate([1.0, 1.0, 0.1, 0.1, 0.1, 0.1]):
            if i == restart_after:
                old, weight = weight, PenaltyWeight(settings, 0)
                weight.load_state_dict(old.state_dict())
            seen.append(weight.at(float(i), rate))
        return seen

    assert all(sequence(i) == sequence(-1) for i in range(6))


@pytest.mark.parametrize(("share", "cost"), [(0.02, 5.0), (0.1, 0.3), (0.5, 40.0)])
def test_a_time_share_is_used_up_and_not_exceeded(share: float, cost: float) -> None:
    meter, now, count = TimeFraction(share, began=100.0), 100.0, 0
    for _ in range(10_000):
        now += 1.0
        if meter.allows(now, guess=2 * cost):
            meter.add(cost)
            now += cost
            count += 1
        assert meter.spent <= share * (now - 100.0)
    assert meter.spent == pytest.approx(cost * count)
    assert meter.spent > share * (now - 100.0) - 2 * cost - 1

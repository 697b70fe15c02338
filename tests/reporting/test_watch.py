"""Every alarm fires on an injected fault and stays silent on a healthy run."""

from collections.abc import Mapping, Sequence

import pytest

from rlalign.reporting.watch import Watch, WatchConfig

HEALTHY = {
    "ratio/max_abs_dev": 0.0,
    "clip_fraction": 0.1,
    "reward/zero_std_groups": 0.2,
    "grad_rms": 1e-4,
    "grad_norm": 0.5,
    "staleness": 0.0,
}


def watch(heldout: tuple[str, ...] = ()) -> Watch:
    return Watch(WatchConfig(), clip_range=1e-4, eps=1e-15, heldout=heldout)


def last(rows: Sequence[Mapping[str, float]], one: Watch) -> set[str]:
    return set([one.step(row) for row in rows][-1])


def test_a_healthy_run_is_silent() -> None:
    one = watch()
    assert not any(one.step(HEALTHY) for _ in range(30))
    assert not one.evaluation({"diversity": 0.95, "reward/mean": 0.5})


@pytest.mark.parametrize(
    ("name", "fault", "steps"),
    [
        ("off_policy", {"ratio/max_abs_dev": 2e-5}, 1),
        ("clip_saturation", {"clip_fraction": 0.7}, 5),
        ("dead_signal", {"reward/zero_std_groups": 0.6}, 1),
        ("swallowed_gradient", {"grad_rms": 5e-15}, 1),
    ],
)
def test_a_fault_is_named(name: str, fault: dict[str, float], steps: int) -> None:
    assert last([HEALTHY | fault] * steps, watch()) == {name}
    assert steps == 1 or not last([HEALTHY | fault] * (steps - 1), watch())


def test_ratios_of_a_first_update_do_not_hide_that_all_others_are_clipped() -> None:
    """Fresh samples have ratios of 1 there, so of two updates at most half of the ratios can be clipped."""
    rows = [HEALTHY | {"clip_fraction": 0.35}] * 5
    two = Watch(WatchConfig(), clip_range=1e-4, eps=1e-15, heldout=(), updates=2)
    assert not last(rows, watch()) and last(rows, two) == {"clip_saturation"}
    assert not last([row | {"staleness": 1.0} for row in rows], Watch(WatchConfig(), 1e-4, 1e-15, (), updates=2))


def test_a_tenfold_gradient_is_named_and_needs_a_history() -> None:
    assert last([HEALTHY] * 10 + [HEALTHY | {"grad_norm": 6.0}], watch()) == {"divergence"}
    assert not last([HEALTHY, HEALTHY | {"grad_norm": 6.0}], watch())


def test_staleness_excuses_a_ratio() -> None:
    assert not watch().step(HEALTHY | {"ratio/max_abs_dev": 1e-2, "staleness": 1.0})


def test_collapse_and_reward_hacking_are_seen_in_evaluations() -> None:
    assert set(watch().evaluation({"diversity": 0.7})) == {"collapse"}
    one = watch(heldout=("judge",))
    curve = [{"diversity": 1.0, "reward/mean": 0.1 * i, "reward/judge/mean": 1 - 0.1 * i} for i in range(4)]
    assert [set(one.evaluation(metrics)) for metrics in curve] == [set(), set(), set(), {"reward_hacking"}]
    honest = watch(heldout=("judge",))
    assert not any(honest.evaluation(metrics | {"reward/judge/mean": metrics["reward/mean"]}) for metrics in curve)

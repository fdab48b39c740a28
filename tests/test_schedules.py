"""Schedules: pure functions of progress, at their boundaries."""
import math

import pytest

import train_jepa as tj
from train_jepa import (
    Config,
    LossWeights,
    Progress,
    averaging_on,
    loss_weights,
    lr_scale,
    measure_progress,
    muon_momentum,
    qat_on,
)


def at(fraction=0.0, steps_left=math.inf, step=0):
    return Progress(step, fraction, steps_left)


def exactly(value):
    return pytest.approx(value, abs=1e-12)  # float64 arithmetic of three operations


# -- progress ----------------------------------------------------------------------------------------------------------

def test_without_a_cap_progress_counts_steps_whatever_the_clock_says():
    for elapsed in (0.0, 5.0, 1e9):
        assert measure_progress(0, 100, elapsed, 0) == (0, 0.0, 100)
        assert measure_progress(25, 100, elapsed, 0) == (25, 0.25, 75)
        assert measure_progress(100, 100, elapsed, 0) == (100, 1.0, 0)


def test_under_a_cap_progress_is_wall_clock():
    assert measure_progress(10, 10_000, 60.0, 600.0).fraction == exactly(0.1)
    assert measure_progress(0, 10_000, 0.0, 600.0).fraction == 0


def test_under_a_cap_steps_left_come_from_the_mean_step_time_so_far():
    assert measure_progress(10, 10_000, 60.0, 600.0).steps_left == exactly(90)     # 6 s a step, 540 s left
    assert measure_progress(0, 10_000, 0.0, 600.0).steps_left == 10_000            # no step yet: the limit alone
    assert measure_progress(9_990, 10_000, 60.0, 600.0).steps_left == 10           # the steps end first


def test_progress_reaches_its_end_by_whichever_limit_is_nearer_and_stays_there():
    assert measure_progress(100, 10_000, 600.0, 600.0)[1:] == (1.0, 0.0)
    assert measure_progress(100, 10_000, 700.0, 600.0)[1:] == (1.0, 0.0)
    assert measure_progress(10_000, 10_000, 60.0, 600.0)[1:] == (1.0, 0.0)


def test_progress_never_falls_during_a_run():
    for cap in (0.0, 50.0):
        seen = [measure_progress(step, 100, step * 0.7, cap).fraction for step in range(101)]
        assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 1


# -- learning rate -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p, scale", [(0, 1), (0.5, 1), (0.85, 1), (0.925, 0.5), (0.97, 0.2), (1, 0), (1.1, 0)])
def test_lr_is_constant_then_linear_to_zero_over_the_last_fraction(p, scale):
    assert lr_scale(at(p), Config()) == exactly(scale)


def test_lr_ends_at_its_floor():
    config = Config(warmdown_fraction=0.2, min_lr=0.1)
    assert lr_scale(at(0.5), config) == 1
    assert lr_scale(at(0.9), config) == exactly(0.55)
    assert lr_scale(at(1.0), config) == exactly(0.1)


@pytest.mark.parametrize("left, scale", [(50_000, 1), (2001, 1), (2000, 1), (1000, 0.5), (1, 1 / 2000), (0, 0)])
def test_lr_falls_over_the_last_steps(left, scale):
    assert lr_scale(at(0.2, left), Config(warmdown="iters")) == exactly(scale)


def test_warmdown_by_steps_under_a_cap_begins_when_the_time_left_holds_that_many_mean_steps():
    # 0.5 s a step, cap 100 s: 20 steps are left at 90 s
    config = Config(warmdown="iters", warmdown_iters=20)
    scale = lambda step: lr_scale(measure_progress(step, 10_000, step * 0.5, 100.0), config)
    assert scale(0) == scale(179) == scale(180) == 1
    assert scale(190) == exactly(0.5) and scale(199) == exactly(0.05) and scale(200) == 0


def test_no_warmdown_means_a_constant_rate():
    for p in (0.0, 0.5, 1.0):
        assert lr_scale(at(p, 0), Config(warmdown_fraction=0.0)) == 1
        assert lr_scale(at(p, 0), Config(warmdown="iters", warmdown_iters=0)) == 1


def test_a_fraction_of_one_falls_from_the_start():
    assert lr_scale(at(0.25), Config(warmdown_fraction=1.0)) == exactly(0.75)


def test_the_default_warmdown_of_both_systems():
    assert (Config().warmdown, Config().warmdown_fraction, Config().warmdown_iters) == ("fraction", 0.15, 2000)


# -- momentum ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step, momentum", [(0, 0.85), (250, 0.90), (499, 0.9498), (500, 0.95),
                                            (501, 0.95), (10**6, 0.95)])
def test_momentum_is_linear_in_steps_over_the_first_500(step, momentum):
    assert muon_momentum(step, Config()) == exactly(momentum)


def test_momentum_without_warm_up_is_final_at_once():
    assert muon_momentum(0, Config(muon_momentum_warmup_steps=0)) == 0.95


# -- loss weights ------------------------------------------------------------------------------------------------------

def test_joint_weights_are_constant():
    config = Config(jepa_weight=0.5, ce_weight=2.0, sigreg_lambda=3.0, jepa_cov=0.25)
    for p in (0.0, 0.3, 0.99, 1.0):
        assert loss_weights(p, config) == LossWeights(2.0, 0.5, 3.0, 0.25, "joint")


@pytest.mark.parametrize("p, ramp", [(0, 0), (0.15, 0.5), (0.3, 1), (0.31, 1), (1, 1)])
def test_sigreg_schedule_ramps_over_the_first_thirty_percent(p, ramp):
    assert loss_weights(p, Config(sigreg_lambda=2.0, sigreg_schedule=True))[:3] == exactly((1.0, 1.0, 2 * ramp))


@pytest.mark.parametrize("p, rest", [(0, 1), (0.2, 0.5), (0.4, 0), (0.41, 0), (1, 0)])
def test_jepa_anneal_falls_to_zero_at_its_fraction_and_stays(p, rest):
    assert loss_weights(p, Config(jepa_anneal=0.4, jepa_weight=3.0))[:3] == exactly((1.0, 3 * rest, 1.0))


def test_no_jepa_steps_means_no_jepa_weight():
    assert loss_weights(0.5, Config(jepa_steps=0)).jepa == 0 and loss_weights(0.5, Config(jepa_weight=0.0)).jepa == 0


@pytest.mark.parametrize("p, ce, others, stage", [
    (0.0, 0, 1, "jepa"), (0.0999, 0, 1, "jepa"), (0.10, 0, 1, "bridge"), (0.45, 0.5, 0.5, "bridge"),
    (0.625, 0.75, 0.25, "bridge"), (0.80, 1, 0, "ce"), (0.9, 1, 0, "ce"), (1.0, 1, 0, "ce")])
def test_staged_weights_at_every_boundary(p, ce, others, stage):
    config = Config(loss_schedule="staged", jepa_weight=2.0, ce_weight=0.5, jepa_cov=4.0)
    found = loss_weights(p, config)
    assert found[:4] == exactly((0.5 * ce, 2.0 * others, 0.05 * others, 4.0 * others)) and found.stage == stage


@pytest.mark.parametrize("off", [dict(jepa_weight=0.0), dict(jepa_steps=0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.45, 1.0])
def test_staged_without_jepa_is_cross_entropy_from_the_first_step(p, off):
    config = Config(loss_schedule="staged", ce_weight=0.5, jepa_cov=4.0, **off)
    assert loss_weights(p, config) == (0.5, 0.0, 0.0, 0.0, "ce") and not config.latent_on


def test_staged_weights_of_terms_out_of_stage_are_exactly_zero():
    config = Config(loss_schedule="staged")
    assert loss_weights(0.05, config).ce == 0.0
    assert loss_weights(0.8, config)[1:3] == (0.0, 0.0)


def test_staged_weights_are_continuous_where_stages_meet():
    config = Config(loss_schedule="staged")
    for edge in (0.1, 0.8):
        before, after = loss_weights(edge - 1e-9, config), loss_weights(edge + 1e-9, config)
        assert before[:3] == pytest.approx(after[:3], abs=1e-8)  # 2e-9 of progress over a bridge of 0.7


# -- switches ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p, fraction, on", [(0, 1.0, True), (1, 1.0, True), (0, 0.0, False), (1, 0.0, False),
                                             (0.74, 0.25, False), (0.75, 0.25, True), (1, 0.25, True)])
def test_qat_covers_the_last_fraction(p, fraction, on):
    assert qat_on(p, fraction) is on


@pytest.mark.parametrize("p, start, on", [(0, 1.0, False), (1, 1.0, False), (0.79, 0.8, False),
                                          (0.8, 0.8, True), (0, 0.0, True)])
def test_averaging_begins_at_its_fraction_and_one_means_never(p, start, on):
    assert averaging_on(p, start) is on


@pytest.mark.parametrize("world, fits", [(1, True), (2, True), (4, True), (8, True), (3, False), (5, False),
                                         (16, False)])
def test_the_number_of_ranks_must_divide_the_micro_batches(world, fits):
    if fits:
        tj.check_world(Config(), world)
    else:
        with pytest.raises(tj.UserError, match=f"{world} ranks.*MICRO_BATCHES=8"):
            tj.check_world(Config(), world)

"""Comparison: groups, mean and deviation, paired t-test against scipy, unfinished and broken runs, files, plot."""
import csv
import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

import train_jepa as tj

BASE = {42: 1.2566, 43: 1.2591, 44: 1.2548}
OTHER = {42: 1.2449, 43: 1.2502, 44: 1.2447}


def config(**knobs):
    return tj.Config(**{name.lower(): value for name, value in knobs.items()})


def make_run(folder, seed, bpb=None, validations=((0, 7.9), (100, 1.9), (200, 1.4)), **knobs):
    """A run folder as training leaves it: finished if `bpb` is given, else still going on."""
    folder.mkdir(parents=True)
    named = config(seed=seed, run_id=folder.name, **knobs).named()
    (folder / "config.json").write_text(json.dumps(named))
    lines = [json.dumps(dict(kind="validation", step=step, val_loss=bpb_, val_bpb=bpb_)) for step, bpb_ in validations]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "log.txt").write_text("log\n")
    if bpb is not None:
        (folder / "result.json").write_text(json.dumps(dict(
            roundtrip_val_bpb=bpb + 0.015, sliding_val_bpb=bpb, total_bytes=15_500_000 + seed,
            ms_per_step=98.0 + seed / 10, steps=200, device="cpu", world_size=1, script_sha256="x")))
    return folder


@pytest.fixture
def six(tmp_path, monkeypatch):
    """Two configurations, three paired seeds each."""
    monkeypatch.chdir(tmp_path)
    for seed in BASE:
        make_run(tmp_path / f"runs/a{seed}", seed, BASE[seed], jepa_weight=0.0)
        make_run(tmp_path / f"runs/b{seed}", seed, OTHER[seed], jepa_weight=1.0, train_log_every=7)
    return tmp_path


def test_t_distribution_matches_scipy():
    for freedom in (1, 2, 3, 5, 10, 30, 200, 5000):
        for t in (0.0, 1e-6, 0.1, 0.5, 1.0, 2.0, 4.3, 12.7, 50.0, 1e3, 1e6):
            assert tj.t_tail(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-10, abs=1e-300)
            assert tj.t_tail(-t, freedom) == tj.t_tail(t, freedom)
        assert tj.t_tail(math.inf, freedom) == 0
        assert tj.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)
        assert tj.t_quantile(freedom, 0.01) == pytest.approx(stats.t.ppf(0.995, freedom), rel=1e-10)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_paired_test_matches_scipy(n):
    generator = np.random.default_rng(n)
    a, b = generator.normal(1.25, 0.01, n), generator.normal(1.24, 0.01, n)
    ours, theirs = tj.paired((b - a).tolist()), stats.ttest_rel(b, a)
    interval = theirs.confidence_interval(0.95)
    assert ours["p"] == pytest.approx(theirs.pvalue, rel=1e-9)
    assert (ours["low"], ours["high"]) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert ours["difference"] == pytest.approx((b - a).mean()) and ours["n"] == n


def test_paired_without_a_distribution():
    assert tj.paired([0.5])["p"] is None and tj.paired([0.5])["difference"] == 0.5
    assert tj.paired([0.0, 0.0])["p"] is None
    assert tj.paired([0.25, 0.25, 0.25])["p"] == 0 and tj.paired([0.25] * 3)["low"] == 0.25


def test_six_runs_match_scipy(six, capsys):
    report = tj.compare(config(runs="runs/a* runs/b*"))
    base, other = report["groups"]
    assert (base["name"], other["name"]) == ("JEPA_WEIGHT=0", "JEPA_WEIGHT=1") and base["n"] == other["n"] == 3
    for facts, values in ((base, BASE), (other, OTHER)):
        values = list(values.values())
        assert facts["sliding_val_bpb"]["mean"] == pytest.approx(np.mean(values), rel=1e-12)
        assert facts["sliding_val_bpb"]["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
        assert facts["total_bytes"]["mean"] == 15_500_043 and facts["ms_per_step"]["mean"] == pytest.approx(102.3)
    assert report["knobs"] == {"JEPA_WEIGHT": [0.0, 1.0]}
    test = next(test for test in report["paired"] if test["column"] == "sliding_val_bpb")
    witness = stats.ttest_rel(list(OTHER.values()), list(BASE.values()))
    assert test["p"] == pytest.approx(witness.pvalue, rel=1e-9) and test["seeds"] == [42, 43, 44]
    assert test["low"] == pytest.approx(witness.confidence_interval().low, rel=1e-9)
    assert test["high"] == pytest.approx(witness.confidence_interval().high, rel=1e-9)
    text = (six / "compare/compare.md").read_text()
    assert text.strip() in capsys.readouterr().out and f"{test['p']:.2g}" in text and "1.25683 ± " in text
    rows = list(csv.DictReader(open(six / "compare/compare.csv")))
    assert [row["configuration"] for row in rows] == ["JEPA_WEIGHT=0", "JEPA_WEIGHT=1"]
    assert float(rows[1]["sliding_val_bpb_paired_p"]) == test["p"] and rows[0]["sliding_val_bpb_paired_p"] == ""
    assert (six / "compare/compare.png").stat().st_size > 10_000
    json.dumps(report, allow_nan=False)


def test_pairs_are_by_seed_not_by_order(six):
    for name in ("b42", "b43", "b44"):
        (six / "runs" / name).rename(six / "runs" / f"b{100 - int(name[1:])}")
    make_run(six / "runs/b7", 7, 9.0)  # a seed that the baseline lacks takes no part in the pairs
    test = tj.compare(config(runs="runs/a* runs/b*", out="o"))["paired"][-1]
    assert test["seeds"] == [42, 43, 44]
    assert test["difference"] == pytest.approx(np.mean([OTHER[s] - BASE[s] for s in BASE]))


def test_free_knobs_do_not_split_but_length_and_data_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "r/1", 1, 1.3, val_loss_every=5, data_path="/one/place/demo_bytes")
    make_run(tmp_path / "r/2", 2, 1.3, checkpoint_every=9, data_path="data/demo_bytes")
    make_run(tmp_path / "r/3", 1, 1.3, iterations=77, data_path="data/demo_bytes")
    make_run(tmp_path / "r/4", 1, 1.3, data_path="data/other")
    groups = tj.compare(config(runs="r/*"))["groups"]
    assert [group["n"] for group in groups] == [2, 1, 1]


def test_running_failed_and_broken_runs_are_told(six, capsys):
    going = make_run(six / "runs/b45", 45, validations=((0, 8.0), (100, 1.8)), jepa_weight=1.0, iterations=10_000)
    with open(going / "metrics.jsonl", "a") as file:
        file.write('{"kind": "validation", "step": 200, "val_')
    make_run(six / "runs/a46", 46, math.nan, jepa_weight=0.0)
    make_run(six / "runs/a47", 47, validations=(), jepa_weight=0.0)
    (six / "runs/a47/metrics.jsonl").unlink()
    (six / "runs/a47/result.json").write_text('{"roundtrip_')
    (six / "runs/a48").mkdir()
    report = tj.compare(config(runs="runs/a* runs/b*"))
    assert [(g["n"], g["unfinished"]) for g in report["groups"]] == [(3, 2), (3, 1)]
    states = report["unfinished"]
    assert set(states) == {"runs/a46", "runs/a47", "runs/a48", "runs/b45"}
    assert states["runs/b45"]["val_bpb"] == 1.8 and states["runs/b45"]["val_step"] == 100
    assert "step 100 of at most 10,000" in states["runs/b45"]["text"]
    assert "without a finite" in states["runs/a46"]["text"]
    assert "runs/b45" in capsys.readouterr().out and (six / "compare/compare.png").exists()
    json.dumps(report, allow_nan=False)


def test_names_say_what_differs_from_the_baseline(six):
    make_run(six / "runs/c1", 42, 1.2, jepa_weight=1.0, jepa_steps=3)
    names = [group["name"] for group in tj.compare(config(runs="runs/*"))["groups"]]
    assert [sorted(name.split(", ")) for name in names] == [
        ["JEPA_STEPS=1", "JEPA_WEIGHT=0"], ["JEPA_WEIGHT=1"], ["JEPA_STEPS=3", "JEPA_WEIGHT=1"]]


def test_many_knobs_repeated_seeds_and_one_run(six):
    make_run(six / "runs/c1", 42, 1.2, model_dim=256, num_layers=4, expand=1, d_state=16)
    make_run(six / "runs/c2", 42, 1.3, model_dim=256, num_layers=4, expand=1, d_state=16)
    report = tj.compare(config(runs="runs/a* runs/c*"))
    assert report["groups"][1]["name"] == "2: c1 etc." and set(report["knobs"]) >= {"MODEL_DIM", "D_STATE"}
    test = report["paired"][-1]
    assert test["n"] == 1 and test["p"] is None and test["difference"] == pytest.approx(1.25 - BASE[42])
    assert "more than once" in (six / "compare/compare.md").read_text()
    alone = tj.compare(config(runs="runs/a42 runs/a42", out="alone"))
    assert alone["groups"][0]["name"] == "all runs" and alone["groups"][0]["n"] == 1 and not alone["paired"]


def test_wrong_input(six):
    with pytest.raises(tj.UserError, match="RUNS=runs/z\\*: no such folder"):
        tj.compare(config(runs="runs/a* runs/z*"))
    with pytest.raises(tj.UserError, match="RUNS=: no such folder"):
        tj.compare(config())
    (six / "empty").mkdir()
    with pytest.raises(tj.UserError, match="has begun"):
        tj.compare(config(runs="empty"))
    (six / "file").write_text("")
    with pytest.raises(tj.UserError, match="OUT=file"):
        tj.compare(config(runs="runs/a*", out="file"))


def test_other_ranks_stay_silent(six, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert tj.run_mode(config(mode="compare", runs="runs/a*")) is None
    assert not (six / "compare").exists() and not capsys.readouterr().out


def test_mode_ends_with_json(six, capsys):
    assert tj.main(["MODE=compare", "RUNS=runs/*"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["groups"]) == 2


def test_config_of_an_older_script_counts_missing_knobs_as_defaults(six):
    path = six / "runs/a42/config.json"
    named = json.loads(path.read_text())
    del named["MUON_NS"]
    path.write_text(json.dumps(named))
    assert len(tj.compare(config(runs="runs/a*"))["groups"]) == 1
    assert dataclasses.asdict(tj.Config())["muon_ns"] == "quintic"

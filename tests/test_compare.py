"""tools/compare.py: groups, deviation, paired t-test, unfinished and broken runs, files, figure."""
import csv
import json
import math
import os
import sys
from pathlib import Path

import compare
import numpy as np
import pytest

import train_jepa as tj

BASE = {42: 1.2566, 43: 1.2591, 44: 1.2548}
OTHER = {42: 1.2449, 43: 1.2502, 44: 1.2447}
# 97.5% points of Student's t by degrees of freedom, as printed by NIST:
# https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 11: 2.201, 29: 2.045,
           100: 1.984}
# Hours of sleep gained with two drugs (Student 1908, The Probable Error of a Mean). Their paired
# t-test by R (data set `sleep`): mean 1.58, p = 0.002833, interval 0.7001142 to 2.4598858.
SLEEP = ((0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0),
         (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4))


def make_run(folder, seed, bpb=None, validations=((0, 7.9), (100, 1.9), (200, 1.4)), **knobs):
    """A run folder as training leaves it: finished if `bpb` is given, else still going on."""
    folder.mkdir(parents=True)
    config = tj.Config(seed=seed, run_id=folder.name, **knobs)
    (folder / "config.json").write_text(json.dumps(config.named()))
    lines = [json.dumps(dict(kind="validation", step=step, val_loss=value, val_bpb=value))
             for step, value in validations]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "log.txt").write_text("log\n")
    if bpb is not None:
        result = dict(roundtrip_val_bpb=bpb + 0.015, sliding_val_bpb=bpb,
                      total_bytes=15_500_000 + seed, ms_per_step=98.0 + seed / 10, steps=200,
                      train_seconds=20.0, device="cpu", world_size=1, script_sha256="x")
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def compared(runs, out="compare"):
    return compare.compare(compare.Settings(runs=runs, out=out))


@pytest.fixture
def six(tmp_path, monkeypatch):
    """Two configurations, three paired seeds each."""
    monkeypatch.chdir(tmp_path)
    for seed in BASE:
        make_run(tmp_path / f"runs/a{seed}", seed, BASE[seed], jepa_weight=0.0)
        make_run(tmp_path / f"runs/b{seed}", seed, OTHER[seed], jepa_weight=1.0, train_log_every=7)
    return tmp_path


@pytest.fixture
def no_figure(monkeypatch):
    """Half a second of matplotlib less."""
    monkeypatch.setattr(compare, "plot_comparison", lambda *_: None)


@pytest.fixture
def figure(monkeypatch):
    """The figure that the next comparison draws."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda *_: None)
    yield plt.gcf
    monkeypatch.undo()
    plt.close("all")


def test_interval_is_that_of_the_published_table():
    for freedom, quantile in T_TABLE.items():
        deltas = np.random.default_rng(freedom).normal(0.3, 1, freedom + 1)
        test, error = compare.paired_test(deltas), deltas.std(ddof=1) / math.sqrt(freedom + 1)
        assert test["high"] - test["difference"] == pytest.approx(quantile * error, rel=5e-4)
        assert test["difference"] - test["low"] == pytest.approx(quantile * error, rel=5e-4)
        assert test["difference"] == pytest.approx(deltas.mean()) and test["n"] == freedom + 1
        assert test["std"] == pytest.approx(deltas.std(ddof=1)) and test["deltas"] == list(deltas)


@pytest.mark.parametrize("deltas", [(0.3, 0.5), (-0.01, 0.02), (1e-5, 1.1e-5), (-3.0, -2.0)])
def test_two_pairs_follow_the_cauchy_distribution(deltas):
    """One degree of freedom: P(|T| > t) = 1 - 2 atan(t) / pi, and the quantile is tan(0.475 pi)."""
    test = compare.paired_test(deltas)
    mean, error = sum(deltas) / 2, abs(deltas[0] - deltas[1]) / 2
    assert test["p"] == pytest.approx(1 - 2 / math.pi * math.atan(abs(mean) / error), rel=1e-9)
    reach = math.tan(0.475 * math.pi) * error
    assert (test["low"], test["high"]) == pytest.approx((mean - reach, mean + reach), rel=1e-9)


def test_paired_test_of_students_data():
    test = compare.paired_test(np.subtract(SLEEP[1], SLEEP[0]).tolist())
    assert test["p"] == pytest.approx(0.002833, abs=5e-7)
    assert test["difference"] == pytest.approx(1.58)
    assert (test["low"], test["high"]) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)


def test_paired_without_a_distribution():
    assert compare.paired_test([0.5])["p"] is None
    assert compare.paired_test([0.5])["difference"] == 0.5
    assert compare.paired_test([0.0, 0.0])["p"] is None
    assert compare.paired_test([0.25, 0.25, 0.25])["p"] == 0
    assert compare.paired_test([0.25] * 3)["low"] == 0.25


def test_six_runs_match_the_closed_form(six, capsys):
    """Two degrees of freedom: P(|T| > t) = 1 - t / sqrt(2 + t^2)."""
    report = compared("runs/a* runs/b*")
    base, other = report["groups"]
    assert (base["name"], other["name"]) == ("JEPA_WEIGHT=0", "JEPA_WEIGHT=1")
    assert base["n"] == other["n"] == 3
    for facts, values in ((base, BASE), (other, OTHER)):
        values = list(values.values())
        assert facts["sliding_val_bpb"]["mean"] == pytest.approx(np.mean(values), rel=1e-12)
        assert facts["sliding_val_bpb"]["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
        assert facts["total_bytes"]["mean"] == 15_500_043
        assert facts["ms_per_step"]["mean"] == pytest.approx(102.3)
    assert report["knobs"] == {"JEPA_WEIGHT": [0.0, 1.0]}
    test = next(test for test in report["paired"] if test["column"] == "sliding_val_bpb")
    deltas = np.array(list(OTHER.values())) - list(BASE.values())
    error = deltas.std(ddof=1) / math.sqrt(3)
    t, quantile = abs(deltas.mean()) / error, 0.95 * math.sqrt(2 / (1 - 0.95 ** 2))
    assert test["p"] == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert test["seeds"] == [42, 43, 44]
    assert test["low"] == pytest.approx(deltas.mean() - quantile * error, rel=1e-9)
    assert test["high"] == pytest.approx(deltas.mean() + quantile * error, rel=1e-9)
    text = (six / "compare/compare.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert f"{test['p']:.2g}" in text and "1.25683 ± " in text
    rows = list(csv.DictReader(open(six / "compare/compare.csv")))
    assert [row["configuration"] for row in rows] == ["JEPA_WEIGHT=0", "JEPA_WEIGHT=1"]
    assert float(rows[1]["sliding_val_bpb_paired_p"]) == test["p"]
    assert rows[0]["sliding_val_bpb_paired_p"] == ""
    assert (six / "compare/compare.png").stat().st_size > 10_000
    json.dumps(report, allow_nan=False)


def test_pairs_are_by_seed_not_by_order(six, no_figure):
    for name in ("b42", "b43", "b44"):
        (six / "runs" / name).rename(six / "runs" / f"b{100 - int(name[1:])}")
    make_run(six / "runs/b7", 7, 9.0)  # a seed that the baseline lacks takes no part in the pairs
    test = compared("runs/a* runs/b*", out="o")["paired"][-1]
    assert test["seeds"] == [42, 43, 44]
    assert test["difference"] == pytest.approx(np.mean([OTHER[s] - BASE[s] for s in BASE]))


def test_free_knobs_do_not_split_but_length_and_data_do(tmp_path, monkeypatch, no_figure):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "r/1", 1, 1.3, val_loss_every=5, data_path="/one/place/demo_bytes")
    make_run(tmp_path / "r/2", 2, 1.3, checkpoint_every=9, data_path="data/demo_bytes")
    make_run(tmp_path / "r/3", 1, 1.3, iterations=77, data_path="data/demo_bytes")
    make_run(tmp_path / "r/4", 1, 1.3, data_path="data/other")
    assert [group["n"] for group in compared("r/*")["groups"]] == [2, 1, 1]


def test_running_failed_and_broken_runs_are_told(six, capsys):
    running = make_run(six / "runs/b45", 45, validations=((0, 8.0), (100, 1.8)), jepa_weight=1.0,
                       iterations=10_000)
    with open(running / "metrics.jsonl", "a") as file:
        file.write('{"kind": "validation", "step": 200, "val_')
    make_run(six / "runs/a46", 46, math.nan, jepa_weight=0.0)
    make_run(six / "runs/a47", 47, validations=(), jepa_weight=0.0)
    (six / "runs/a47/metrics.jsonl").unlink()
    (six / "runs/a47/result.json").write_text('{"roundtrip_')
    (six / "runs/a48").mkdir()
    report = compared("runs/a* runs/b*")
    assert [(g["n"], g["unfinished"]) for g in report["groups"]] == [(3, 2), (3, 1)]
    assert report["damage"] == ["runs/a47/result.json: holds no JSON object"]
    states = report["unfinished"]
    assert set(states) == {"runs/a46", "runs/a47", "runs/a48", "runs/b45"}
    assert states["runs/b45"]["val_bpb"] == 1.8 and states["runs/b45"]["val_step"] == 100
    assert "step 100 of at most 10,000" in states["runs/b45"]["text"]
    assert "without a finite" in states["runs/a46"]["text"]
    assert "runs/b45" in capsys.readouterr().out and (six / "compare/compare.png").exists()
    json.dumps(report, allow_nan=False)


def test_names_say_what_differs_from_the_baseline(six, no_figure):
    make_run(six / "runs/c1", 42, 1.2, jepa_weight=1.0, jepa_steps=3)
    names = [group["name"] for group in compared("runs/*")["groups"]]
    assert [sorted(name.split(", ")) for name in names] == [
        ["JEPA_STEPS=1", "JEPA_WEIGHT=0"], ["JEPA_WEIGHT=1"], ["c1"]]
    make_run(six / "runs/c2", 43, 1.2, jepa_weight=1.0, jepa_steps=3)
    assert compared("runs/*")["groups"][2]["name"] in (
        "JEPA_STEPS=3, JEPA_WEIGHT=1", "JEPA_WEIGHT=1, JEPA_STEPS=3")


def test_single_runs_are_named_by_their_id(six, no_figure):
    """Also where two folders have the same name."""
    (six / "more").mkdir()
    make_run(six / "more/a42", 42, 1.2, jepa_weight=2.0)
    report = compared("runs/a42 runs/b43 more/a42")
    assert [group["name"] for group in report["groups"]] == ["a42", "b43", "3: a42"]
    text = (six / "compare/compare.md").read_text()
    assert "| knob | a42 | b43 | 3: a42 |" in text and "| JEPA_WEIGHT | 0.0 | 1.0 | 2.0 |" in text


def test_steps_and_seconds_are_shown(six, no_figure):
    compared("runs/a*")
    text = (six / "compare/compare.md").read_text().splitlines()
    head = next(line for line in text if line.startswith("| configuration"))
    assert "| bytes | steps | seconds | ms/step |" in head
    assert any("| 200 ± 0 | 20 ± 0 |" in line for line in text)
    rows = list(csv.DictReader(open(six / "compare/compare.csv")))
    assert float(rows[0]["steps_mean"]) == 200 and float(rows[0]["train_seconds_mean"]) == 20


@pytest.mark.parametrize("knobs, unlike, words", [
    (dict(data_path="data/other_bytes"), ["data"], "DATA_PATH=other_bytes"),
    (dict(tokenizer="bpe", vocab_size=8192, tokenizer_path="t/a.model"), ["tokenizer"],
     "TOKENIZER=bpe, TOKENIZER_PATH=a.model, VOCAB_SIZE=8192"),
    (dict(val_max_tokens=1000), ["validation cap"], "VAL_MAX_TOKENS=1000"),
    (dict(iterations=5, max_wallclock_seconds=60.0), ["step cap", "time cap"],
     "ITERATIONS=5, MAX_WALLCLOCK_SECONDS=60"),
    (dict(model_dim=64), [], "")])
def test_other_data_tokenizers_and_caps_are_said(six, no_figure, capsys, knobs, unlike, words):
    """A warning and a column, in text, CSV and JSON; not where only the recipe differs."""
    for seed in BASE:
        make_run(six / f"runs/c{seed}", seed, OTHER[seed], jepa_weight=0.0, **knobs)
    report = compared("runs/a* runs/c*")
    text = (six / "compare/compare.md").read_text()
    name = report["groups"][1]["name"]
    assert report["groups"][1]["unlike"] == report["paired"][0]["unlike"] == unlike
    assert list(csv.DictReader(open(six / "compare/compare.csv")))[1]["also_differs"] == ", ".join(
        unlike)
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} | round trip BPB"))
    assert row.endswith(f"| {', '.join(unlike) or '–'} |")
    if unlike:
        warning, = report["warnings"]
        assert warning.startswith(f"{name} differs from the baseline ") and f"({words})" in warning
        assert f" in {' and '.join(unlike)} (" in warning
        assert f"**Warning:** {warning}." in text and warning in capsys.readouterr().out
    else:
        assert report["warnings"] == [] and "Warning" not in text


def test_byte_models_have_no_tokenizer(six, no_figure):
    make_run(six / "runs/a50", 50, 1.2, jepa_weight=0.0, tokenizer_path="data/x.model")
    assert len(compared("runs/a*")["groups"]) == 1


@pytest.mark.parametrize("content, lines, why", [
    (bytes(range(256)) * 40, 0, "metrics.jsonl: 40 of 40 lines are no JSON objects (the first is "
     "line 1); left out"),
    (b'{"kind": "validation", "step": 5, "val_bpb": 2.0}\n\xff\xfe{}\n[1]\n'
     + b"[" * 10 ** 5 + b"\n" + b'{"kind": "validation", "val_bpb": 1.0}\n{"kind": "val', 2,
     "metrics.jsonl: 3 of 5 lines are no JSON objects (the first is line 2); left out"),
    (b"", 0, ""), (None, 0, "metrics.jsonl: is no file")])
def test_a_damaged_journal_is_one_line(six, content, lines, why):
    path = six / "runs/a42/metrics.jsonl"
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    report = compared("runs/*")
    assert len(compare.read_run(six / "runs/a42").metrics) == lines
    assert report["damage"] == ([f"runs/a42/{why}"] if why else [])
    text = (six / "compare/compare.md").read_text()
    assert (f"- runs/a42/{why}" in text.splitlines()) == bool(why)
    assert [group["n"] for group in report["groups"]] == [3, 3]


def test_damaged_config_and_result_are_told(six, no_figure):
    (six / "runs/a42/config.json").write_bytes(b"\x80" * 50)
    (six / "runs/b42/result.json").write_text("[1, 2]")
    report = compared("runs/*")
    assert report["damage"] == ["runs/a42/config.json: holds no JSON object",
                                "runs/b42/result.json: holds no JSON object"]
    assert set(report["unfinished"]) == {"runs/a42", "runs/b42"}


def test_many_knobs_repeated_seeds_and_one_run(six, no_figure):
    make_run(six / "runs/c1", 42, 1.2, model_dim=256, num_layers=4, expand=1, d_state=16)
    make_run(six / "runs/c2", 42, 1.3, model_dim=256, num_layers=4, expand=1, d_state=16)
    report = compared("runs/a* runs/c*")
    assert report["groups"][1]["name"] == "2: c1 etc."
    assert set(report["knobs"]) >= {"MODEL_DIM", "D_STATE"}
    test = report["paired"][-1]
    assert test["n"] == 1 and test["p"] is None
    assert test["difference"] == pytest.approx(1.25 - BASE[42])
    assert "more than once" in (six / "compare/compare.md").read_text()
    alone = compared("runs/a42 runs/a42", out="alone")
    assert alone["groups"][0]["name"] == "a42" and alone["groups"][0]["n"] == 1
    assert not alone["paired"]


def test_figure_names_runs_by_their_id(six, figure):
    make_run(six / "runs/b45", 45, jepa_weight=1.0)
    compared("runs/*")
    left, right = figure().axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    labels = [label.replace("\n", " ") for label in labels]
    assert labels == ["a42, a43, a44: JEPA_WEIGHT=0 (baseline)",
                      "b42 … b45: JEPA_WEIGHT=1 (4 runs, dashed: 1 unfinished)"]
    curves = [line for line in left.lines if len(line.get_xdata())]
    assert len(curves) == 7 and [line.get_linestyle() for line in curves].count("--") == 1
    assert len({line.get_color() for line in curves}) == 2
    text, = (text.get_text() for text in right.texts)
    assert text.startswith("b42 … b45: JEPA_WEIGHT=1 (4 runs)\n-0.0102 sliding BPB, 3 pairs, p = ")


def test_groups_are_told_apart_by_colour_and_marker():
    groups = [compare.RunGroup(str(i), "", [], []) for i in range(49)]
    styles = [tuple(style.values()) for style in compare.group_styles(groups).values()]
    assert len(set(styles)) == 49 and len({color for color, _ in styles[:7]}) == 7
    # Okabe and Ito, Color Universal Design: black, orange, sky blue, bluish green, blue, vermilion,
    # reddish purple.
    assert {color for color, _ in styles} == {
        "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"}


def test_without_matplotlib_one_line_and_no_figure(six, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert len(compared("runs/*")["groups"]) == 2
    message, = capsys.readouterr().err.splitlines()
    assert "matplotlib is not installed" in message and "compare.png" in message
    names = sorted(path.name for path in (six / "compare").iterdir())
    assert names == ["compare.csv", "compare.md"]


def test_without_scipy_one_line(six, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert compare.main(["RUNS=runs/*"]) == 2
    message, = capsys.readouterr().err.splitlines()
    assert message.startswith("compare.py: scipy is not installed") and not Path("compare").exists()
    assert compare.main(["RUNS=runs/a*"]) == 0  # nothing to test


def test_wrong_input(six):
    with pytest.raises(tj.UserError, match="RUNS=runs/z\\*: no such folder"):
        compared("runs/a* runs/z*")
    with pytest.raises(tj.UserError, match="RUNS=: no such folder"):
        compared("")
    (six / "empty").mkdir()
    with pytest.raises(tj.UserError, match="has begun"):
        compared("empty")
    (six / "file").write_text("")
    with pytest.raises(tj.UserError, match="OUT=file"):
        compared("runs/a*", out="file")


def test_command_line(six, no_figure, monkeypatch, capsys):
    """Arguments win over the environment, an empty value is the default; JSON is the last line."""
    monkeypatch.setenv("RUNS", "runs/a*")
    monkeypatch.setenv("OUT", "")
    assert compare.main([]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["groups"]) == 1
    assert compare.main(["RUNS=runs/*", "OUT=o"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(report["groups"]) == 2 and report["out"] == "o"
    assert Path("compare/compare.md").exists()
    assert compare.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "  RUNS= " in text and "  OUT=compare " in text and "tools/compare.py RUNS=" in text


@pytest.mark.parametrize("argument", ["RUN=x", "MODE=compare", "runs/b1", "runs=x"])
def test_unknown_argument_is_one_line_and_exit_code_2(argument, six, capsys):
    assert compare.main(["RUNS=runs/*", argument]) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith(f"compare.py: {argument}: no such argument")
    assert error.count("\n") == 1
    assert not Path("compare").exists()


def test_config_of_an_older_script_counts_missing_knobs_as_defaults(six, no_figure):
    path = six / "runs/a42/config.json"
    named = json.loads(path.read_text())
    del named["ROW_NORM"]
    path.write_text(json.dumps(named))
    assert len(compared("runs/a*")["groups"]) == 1
    path.write_text(json.dumps(named | dict(ROW_NORM=False)))
    assert len(compared("runs/a*")["groups"]) == 2


def test_knobs_that_are_gone_split_only_away_from_their_default(six, no_figure, monkeypatch):
    path = six / "runs/a42/config.json"
    named = json.loads(path.read_text())
    monkeypatch.setitem(compare.FORMER_DEFAULTS, "GONE", 3)
    former = {name: value for name, value in compare.FORMER_DEFAULTS.items() if name not in named}
    path.write_text(json.dumps(named | former | dict(AUTHOR="someone")))
    assert len(compared("runs/a*")["groups"]) == 1
    path.write_text(json.dumps(named | former | dict(GONE=4)))
    report = compared("runs/a*")
    assert report["knobs"] == {"GONE": [4, None]} and [g["n"] for g in report["groups"]] == [1, 2]
    assert "| GONE | 4 | – |" in Path("compare/compare.md").read_text()

"""Hundreds of settings, made from what Config says about its knobs: each trains, or is refused in one line
before anything is made. None ends in a traceback, is refused late, or takes the machine's memory."""
import itertools
import json
import math
import os
import re

import harness
import pytest

import train_jepa as tj

MEMORY = 1 << 30
BASE = harness.TINY | dict(
    ITERATIONS=3, WARMUP_STEPS=0, TRAIN_SEQ_LEN=16, TRAIN_BATCH_TOKENS=32, VAL_MAX_TOKENS=32, DIAGNOSTICS=1,
    PROBE_STEPS=1, TEMP_SCALING=1, TEMP_CALIB=1, OVERWRITE=1, RUN_ID="r", SLIDING_EVAL_STRIDE=8)
ENDLESS = "WARMUP_STEPS ITERATIONS PROBE_STEPS MICRO_BATCHES NUM_LAYERS".split()  # large is slow, not wrong
ELSEWHERE = "RUNS_DIR OVERWRITE MODE PROFILE COMPILE_MODE".split()  # the sweep needs them; compilation takes a minute
SAMPLE = 1 if os.environ.get("SLOW") == "1" else 7     # every seventh of those that Config accepts is run by default
WHOLE = 1000, 10**9, 2**40, 2**63 - 1, 2**63, 10**30, -1
REAL = 1e-300, 1e9, 1e308, "1e400", "nan", -1
TEXT = "x", "ä" * 140, "a/b", "a\nb"


def values(name: str, f) -> list:
    """Values of one knob to try: all choices; bounds, what lies beyond them, and powers where there is no bound."""
    meta, kind = f.metadata, type(f.default)
    if meta["choices"]:
        return [*meta["choices"], "other"]
    if kind is bool:
        return [0, 1, 2]
    if kind is str:
        return list(TEXT)
    if meta["high"] < math.inf:
        bounds = [meta["low"], meta["high"], meta["high"] * 2, meta["low"] - 1]
        return bounds[::2] if name in ENDLESS else bounds
    powers = [meta["low"], *(WHOLE if kind is int else REAL)]
    return [value for value in powers if not (name in ENDLESS and 1000 <= value < 2**63)]


def table() -> list[dict[str, str]]:
    """Each knob by itself, and each two size knobs together at 64 and 4,096 times their value."""
    singles = [{name: value} for name, f in tj.Config.knobs().items() if name not in ELSEWHERE
               for value in values(name, f)]
    default = lambda name: int(BASE.get(name) or tj.Config.knobs()[name].default or BASE["MODEL_DIM"])
    pairs = [{a: default(a) * factor, b: default(b) * factor}
             for a, b in itertools.combinations(tj.Config.tagged("size"), 2) for factor in (64, 4096)
             if not {a, b} & set(ENDLESS)]
    for row in pairs:
        row.setdefault("TRAIN_BATCH_TOKENS", 2 * row.get("TRAIN_SEQ_LEN", 16))
    texts = [{name: str(value) for name, value in row.items()} for row in singles + pairs]
    return [row for row in texts if any(str(BASE.get(name)) != value for name, value in row.items())]


def accepted(row: dict[str, str]) -> bool:
    """Whether Config takes the setting; if not, it says so in a line per fault that names a knob."""
    try:
        tj.Config.from_env({name: str(value) for name, value in (BASE | row).items()}).validate()
    except tj.UserError as error:
        for line in str(error).splitlines():
            assert line.isprintable() and re.match(r"[A-Z0-9_*]+(=|:|, )", line) and len(line) < 400, line
        return False
    return True


def verdict(row: dict[str, str], code: int, seconds: float, memory: int, text: str) -> str:
    """What is wrong with an outcome of `harness.each`; "" if nothing is."""
    errors = [line for line in text.splitlines() if line.startswith("train_jepa.py: ")]
    trained = "step:3 " in text or "done: " in text and {"ITERATIONS", "MAX_WALLCLOCK_SECONDS"} & set(row)
    if "Traceback" in text or code not in (0, 1, 2, -9):
        return "no line"
    if code == 2 and ("step:1 " in text or len(errors) != 1 or seconds > 5 or memory > MEMORY):
        return "refused late, or dear, or in several lines"
    if code == 1 and (len(errors) != 1 or not re.search("finite|NaN", errors[0])):  # allowed, and diverges
        return "ends without a reason"
    return "" if trained or code in (1, 2) else "no third step"  # -9: it trains, but longer than is waited for


@pytest.mark.slow
def test_every_setting_trains_or_is_refused_in_one_line_before_anything_is_made(tmp_path, demo_data):
    rows, report = table(), tmp_path / "report.json"
    assert len(rows) > 600
    run = [row for row in rows if accepted(row)][::SAMPLE]
    child = harness.run(tmp_path, f"each({run!r}, {str(report)!r}, {MEMORY})", BASE, timeout=3000)
    assert child.code == 0, child.text()[-2000:]
    outcomes = [json.loads(line) for line in report.read_text().splitlines()]
    codes = [outcome[0] for outcome in outcomes]
    print(f"{len(rows)} settings, {len(run)} run: {codes.count(0)} trained, {codes.count(1)} diverged, "
          f"{codes.count(2)} refused, {sum(outcome[1] for outcome in outcomes):.0f} s of CPU")
    wrong = [f"{row}: {fault}: code {outcome[0]}, {outcome[1]:.1f} s, {outcome[2] >> 20} MB: {outcome[3][-300:]}"
             for row, outcome in zip(run, outcomes, strict=True) if (fault := verdict(row, *outcome))]
    assert not wrong, f"{len(wrong)} of {len(run)}:\n" + "\n".join(wrong)

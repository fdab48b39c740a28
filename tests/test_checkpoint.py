"""Runs that survive: exact resume after kill -9, signals, full disks, poisoned gradients, hostile checkpoints."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import test_artifact
import torch
from harness import SYSTEM_B, TINY, final_state, launch, metrics, run, write_shard

import train_jepa as tj

FUZZ = int(os.environ.get("FUZZ_COUNT", 2000))  # mutated checkpoints, and as many shards; 10,000 for the long test
KILLS = int(os.environ.get("KILLS", 20))  # of system A; half as many of system B
NARROW = TINY | dict(NUM_LAYERS=1, MLP_MULT=1, TRAIN_SEQ_LEN=16, TRAIN_BATCH_TOKENS=32, MICRO_BATCHES=1, SSD_CHUNK=16,
                     JEPA_STEPS=1, SIGREG_NUM_PROJ=8, VAL_MAX_TOKENS=200)
# ways to die inside a save, in turn
SAVES = ("half", "renamed", "pruning", "unnamed")


@pytest.fixture(autouse=True)
def _data(demo_data):
    pass


def survive(folder: Path, kills: int, seed: int, base: dict, patch: str, seconds: float, **knobs) -> int:
    """Runs of one configuration in folder/0, 1, ..., killed until all deaths are used up and the last has finished;
    a death is at a random moment or, every other one, inside a save. Returns the number of run folders."""
    rng, deaths, index = random.Random(seed), 0, 0
    while True:
        spec = None
        if deaths < kills:
            spec = f"die_in_save({SAVES[deaths // 2 % len(SAVES)]!r})" if deaths % 2 else \
                f"die_after({rng.uniform(0, seconds):.4f})"
        child = run(folder, f"{patch}\n{spec or ''}", base, RUN_ID=str(index), **knobs)
        assert child.code in (0, 137), child.text()[-3000:]
        deaths += child.code == 137
        if (folder / str(index) / "result.json").exists():  # finished, though perhaps killed on its way out
            index += 1
            if deaths >= kills:
                return index


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_survival(folder: Path, kills: int, seed: int, base: dict, patch: str = "", **knobs) -> None:
    knobs = dict(CHECKPOINT_EVERY=3, VAL_LOSS_EVERY=3) | knobs
    began = time.perf_counter()
    assert run(folder, patch, base, RUN_ID="whole", **knobs).code == 0
    lines = [json.loads(line) for line in (folder / "whole/metrics.jsonl").read_text().splitlines()]
    seconds = min(time.perf_counter() - began, 1.2 * lines[-1]["seconds"] + 0.1) if "clock" not in patch else 1.5
    count = survive(folder, kills, seed, base, patch, seconds, **knobs)
    print(f"{kills} kills in {count} runs")
    expected = final_state(folder / "whole")
    for index in range(count):
        found = final_state(folder / str(index))
        wrong = [name for name in expected if expected[name] != found.get(name)]
        assert not wrong and set(found) == set(expected), (index, wrong[:5], found["metrics"], expected["metrics"])


@pytest.mark.slow
@pytest.mark.parametrize("base, knobs, kills", [(TINY, dict(CARRY_STATE=1), KILLS), (SYSTEM_B, {}, KILLS // 2)],
                         ids=["system_A", "system_B"])
def test_resume_equals_uninterrupted_to_the_bit_after_random_kills(tmp_path, base, knobs, kills):
    """System A with carried states: its checkpoint holds all that one without them does."""
    check_survival(tmp_path, kills, 1, base, **knobs)


@pytest.mark.slow
def test_resume_under_a_wall_clock_cap_equals_uninterrupted(tmp_path):
    """The faked clock gives each step 0.5 s: the cap of 5 s, less two mean steps, ends the run at step 8 of
    12, and the warm-down follows the clock."""
    check_survival(tmp_path, 3, 3, TINY, "clock_by_steps(0.5)", MAX_WALLCLOCK_SECONDS=5, WARMDOWN="iters",
                   WARMDOWN_ITERS=4)
    assert json.loads((tmp_path / "whole/result.json").read_text())["steps"] == 8


@pytest.mark.parametrize("moment", ["half", "unnamed", "renamed", "pruning"])
def test_kill_inside_a_save_leaves_the_checkpoint_before_it(tmp_path, moment):
    child = run(tmp_path, f"die_in_save({moment!r}, {1 if moment == 'pruning' else 3})", CHECKPOINT_EVERY=2)
    assert child.code == 137
    found = tj.Checkpoints(tmp_path / "r/checkpoints", 2).newest(lambda line: pytest.fail(line))
    assert found[0]["step"] == (4 if moment in ("half", "unnamed") else 6)


@pytest.mark.slow
def test_a_validation_at_the_step_of_a_checkpoint_is_in_the_metrics_once(tmp_path):
    """The checkpoint of step 6 is written before step 6 is validated; a resume from there must still validate it."""
    knobs = dict(CHECKPOINT_EVERY=3, VAL_LOSS_EVERY=3, ITERATIONS=8)
    assert run(tmp_path, "before_step(8, lambda trainer: (time.sleep(0.5), die()))", **knobs).code == 137
    child = run(tmp_path, **knobs)
    assert child.code == 0 and "resumed at step 6" in child.text()
    assert [line["step"] for line in metrics(tmp_path / "r") if line["kind"] == "validation"] == [0, 3, 6, 8]


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_finishes_and_validates_once(tmp_path):
    knobs = dict(CHECKPOINT_EVERY=3, ITERATIONS=6)
    patch = "tj.Run.write_model = lambda self: (self.checkpoints.wait(), die())"
    assert run(tmp_path, patch, **knobs).code == 137
    assert run(tmp_path, **knobs).code == 0
    lines = [(line["kind"], line["step"]) for line in metrics(tmp_path / "r")]
    assert lines == [("train", step) for step in range(1, 7)] + [("validation", 6)]


@pytest.mark.slow
def test_temporary_files_of_killed_saves_do_not_pile_up(tmp_path):
    for moment in ("half", "unnamed"):
        assert run(tmp_path, f"die_in_save({moment!r})", CHECKPOINT_EVERY=2).code == 137
    assert run(tmp_path, CHECKPOINT_EVERY=2, ITERATIONS=4).code == 0
    assert names(tmp_path / "r/checkpoints") == ["step_000000002.ckpt", "step_000000004.ckpt"]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, demo_data):
    """A run folder killed before step 11, with checkpoints of steps 6 and 9."""
    folder = tmp_path_factory.mktemp("stopped")
    assert run(folder, "before_step(11, lambda trainer: (time.sleep(0.5), die()))", CHECKPOINT_EVERY=3).code == 137
    assert names(folder / "r/checkpoints") == ["step_000000006.ckpt", "step_000000009.ckpt"]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, demo_data):
    """The folder of the same run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, CHECKPOINT_EVERY=3).code == 0
    return folder / "r"


@pytest.fixture
def again(stopped, tmp_path):
    shutil.copytree(stopped / "r", tmp_path / "r")
    return tmp_path


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_log_says_so(again, how):
    path = again / "r/checkpoints/step_000000009.ckpt"
    damage(path) if how == "flipped" else os.truncate(path, 0 if how == "empty" else path.stat().st_size - 1)
    assert run(again, CHECKPOINT_EVERY=3).code == 0
    log = (again / "r/log.txt").read_text()
    assert re.search(r"(?m)^resumed at step 6 ", log)
    assert re.search(r"passed over.*step_000000009", log), "log.txt does not name the damaged checkpoint"


def test_one_kept_checkpoint_is_never_the_damaged_one(again):
    """CHECKPOINT_KEEP=1 and a damaged newer file: what this run saves afterwards must stay."""
    damage(again / "r/checkpoints/step_000000009.ckpt")
    patch = "before_step(9, lambda trainer: (time.sleep(0.5), die()))"
    assert run(again, patch, CHECKPOINT_EVERY=2, CHECKPOINT_KEEP=1).code == 137
    found = tj.Checkpoints(again / "r/checkpoints", 1).newest(lambda line: None)
    assert found is not None and found[0]["step"] == 8


def test_a_changed_fixed_knob_is_refused_with_the_list_of_differences(again):
    before = {p: p.read_bytes() for p in (again / "r").rglob("*") if p.is_file() and p.name != ".lock"}
    child = run(again, CHECKPOINT_EVERY=3, MATRIX_LR=0.03, D_CONV=3, SEED=8, QUANT_BITS=6)
    assert child.code == 2
    text = "\n".join(child.errors())
    for line in ("MATRIX_LR: 0.02 -> 0.03", "D_CONV: 4 -> 3", "SEED: 7 -> 8", "QUANT_BITS: 4 -> 6"):
        assert line in text
    assert "TRAIN_LOG_EVERY" not in text
    assert {p: p.read_bytes() for p in before} == before


def test_a_changed_free_knob_is_accepted_and_logged(again):
    assert run(again, CHECKPOINT_EVERY=5, TRAIN_LOG_EVERY=1, ITERATIONS=14).code == 0
    log = (again / "r/log.txt").read_text()
    assert "changed since the checkpoint: TRAIN_LOG_EVERY: 100 -> 1" in log and "ITERATIONS: 12 -> 14" in log
    steps = [line["step"] for line in metrics(again / "r") if line["kind"] == "train"]
    assert steps == list(range(1, 15)), "a step is missing or counted twice"


@pytest.mark.slow
def test_a_finished_run_is_refused_unless_overwrite(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "r")
    child = run(tmp_path, CHECKPOINT_EVERY=3)
    assert child.code == 2 and len(child.errors()) == 1 and "OVERWRITE=1" in child.errors()[0]
    assert final_state(tmp_path / "r") == final_state(whole)
    assert run(tmp_path, CHECKPOINT_EVERY=3, OVERWRITE=1).code == 0
    assert final_state(tmp_path / "r") == final_state(whole)
    assert not re.search(r"(?m)^resumed at", (tmp_path / "r/log.txt").read_text())


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoint_keep_are_kept(tmp_path, keep):
    assert run(tmp_path, CHECKPOINT_EVERY=2, CHECKPOINT_KEEP=keep, ITERATIONS=8).code == 0
    expected = [f"step_{step:09d}.ckpt" for step in (4, 6, 8)][-keep:]
    assert names(tmp_path / "r/checkpoints") == expected


@pytest.mark.slow
def test_two_runs_sharing_a_checkpoint_dir_do_not_mix(tmp_path, whole):
    knobs = dict(CHECKPOINT_EVERY=3, CHECKPOINT_DIR=tmp_path / "shared")
    for name, seed, step in (("a", 7, 8), ("b", 2, 5)):
        patch = f"before_step({step}, lambda trainer: (time.sleep(0.5), die()))"
        assert run(tmp_path, patch, RUN_ID=name, SEED=seed, **knobs).code == 137
    child = run(tmp_path, RUN_ID="a", **knobs)
    assert child.code == 0 and "resumed at step 6" in child.text()
    assert tj.file_hash(tmp_path / "a/model.jepa") == tj.file_hash(whole / "model.jepa")
    child = run(tmp_path, RUN_ID="b", SEED=2, ITERATIONS=4, **knobs)
    assert child.code == 0 and "resumed at step 3" in child.text()


# -- signals ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.slow
def test_a_signal_finishes_the_step_saves_and_tells_how_to_go_on(tmp_path, whole, number):
    # hit within step 7, which is no checkpoint step
    child = run(tmp_path, f"before_step(7, lambda trainer: os.kill(os.getpid(), {int(number)}))", CHECKPOINT_EVERY=5)
    assert child.code == 128 + number
    assert f"stopped by {number.name} after step 7" in child.errors()[0] and len(child.errors()) == 1
    assert "Traceback" not in child.text()
    assert tj.Checkpoints(tmp_path / "r/checkpoints", 2).newest(pytest.fail)[0]["step"] == 7
    assert run(tmp_path, CHECKPOINT_EVERY=5).code == 0
    assert final_state(tmp_path / "r") == final_state(whole)


def test_a_second_sigint_ends_at_once(tmp_path):
    child = launch(tmp_path, "before_step(4, lambda trainer: (print('asleep', flush=True), time.sleep(30)))")
    child.wait_for("asleep")
    child.signal(signal.SIGINT)
    time.sleep(0.3)
    assert child.poll() is None, "the first one waits for the step's end"
    child.signal(signal.SIGINT)
    assert child.wait(3) == 130


@pytest.mark.slow
def test_a_signal_during_warm_up_saves_step_0(tmp_path, whole):
    patch = "warm_up = tj.Trainer.warm_up\ntj.Trainer.warm_up = lambda self: (os.kill(os.getpid(), 15), warm_up(self))"
    assert run(tmp_path, patch).code == 143
    child = run(tmp_path)
    assert child.code == 0 and "resumed at step 0" in child.text()
    assert tj.file_hash(tmp_path / "r/model.jepa") == tj.file_hash(whole / "model.jepa")


# -- full disks ---------------------------------------------------------------------------------------------------

def one_line(child, *parts: str) -> None:
    assert child.code == 2, child.text()[-2000:]
    assert len(child.errors()) == 1 and all(part in child.errors()[0] for part in parts), child.text()[-2000:]
    assert "Traceback" not in child.text() and "Exception ignored" not in child.text(), child.text()[-2000:]


@pytest.mark.slow
def test_disk_full_at_the_log_one_line_and_the_run_goes_on_after_room_is_made(tmp_path, whole):
    """A real limit on file sizes (SIGXFSZ is ignored by Python, the write fails with EFBIG) from step 8 on."""
    limit = f"file_limit(os.path.getsize({str(tmp_path / 'r/log.txt')!r}) + 5)"
    child = run(tmp_path, f"before_step(8, lambda trainer: (time.sleep(0.5), {limit}))", CHECKPOINT_EVERY=3)
    one_line(child, "log.txt", "cannot be written")
    assert run(tmp_path, CHECKPOINT_EVERY=3).code == 0
    assert final_state(tmp_path / "r") == final_state(whole)


def test_disk_full_at_the_metrics(tmp_path):
    one_line(run(tmp_path, "full_disk('metrics.jsonl', 600)", CHECKPOINT_EVERY=3), "metrics.jsonl", "No space left")


def test_disk_full_at_a_checkpoint_keeps_the_earlier_ones(tmp_path):
    """The container is 1.1 MB, log and metrics are far smaller: the limit hits the checkpoint of step 6 alone."""
    child = run(tmp_path, "before_step(5, lambda trainer: (time.sleep(0.5), file_limit(700_000)))", CHECKPOINT_EVERY=3)
    one_line(child, "step_000000006.ckpt", "earlier files are intact")
    assert names(tmp_path / "r/checkpoints") == ["step_000000003.ckpt"]
    assert tj.Checkpoints(tmp_path / "r/checkpoints", 2).newest(pytest.fail)[0]["step"] == 3


@pytest.mark.slow
def test_disk_full_at_the_very_last_checkpoint_is_not_silent(tmp_path):
    child = run(tmp_path, "full_disk('step_000000012')", CHECKPOINT_EVERY=5)
    assert "step_000000012" in child.text() and "No space left" in child.text()


@pytest.mark.parametrize("part", ["model.jepa", "result.json"])
@pytest.mark.slow
def test_disk_full_at_artifact_or_result_then_the_same_command_finishes(tmp_path, part):
    one_line(run(tmp_path, f"full_disk({part!r}, 10)", CHECKPOINT_EVERY=6), part, "No space left")
    assert not (tmp_path / "r" / part).exists() and not list((tmp_path / "r").glob("*.tmp"))
    child = run(tmp_path, CHECKPOINT_EVERY=6)
    assert child.code == 0 and "resumed at step 12" in child.text()


def test_disk_full_at_the_start(tmp_path):
    one_line(run(tmp_path, "full_disk('config.json')"), "config.json", "No space left")


@pytest.mark.slow
def test_disk_full_at_the_curves_does_not_lose_the_result(tmp_path):
    child = launch(tmp_path, "import PIL.Image\ndef fail(*a, **k): raise OSError(28, 'No space left on device')\n"
                   "PIL.Image.Image.save = fail\nimport matplotlib.figure\nmatplotlib.figure.Figure.savefig = fail")
    assert child.wait() in (0, 2) and "Traceback" not in child.text(), child.text()[-1500:]
    assert (tmp_path / "r/result.json").exists()


# -- non-finite gradients -----------------------------------------------------------------------------------------

def test_a_non_finite_step_is_skipped_counted_and_changes_no_weight(tmp_path):
    patch = f"""
poison({{3, 4, 7}}, "blocks.1.mixer.out_proj.weight")
step, hashes = tj.Trainer.train_step, []
def watched(self, at):
    out = step(self, at)
    hashes.append(weights_hash(self))
    Path({str(tmp_path / 'hashes')!r}).write_text(json.dumps(hashes))
    return out
tj.Trainer.train_step = watched
"""
    child = run(tmp_path, patch, NONFINITE_LIMIT=3)
    assert child.code == 0, child.text()[-2000:]
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert result["skipped_steps"] == 3 and math.isfinite(result["val_bpb"])
    hashes = json.loads((tmp_path / "hashes").read_text())
    same = [step for step, (a, b) in enumerate(zip(hashes, hashes[1:]), start=2) if a == b]
    assert same == [3, 4, 7]
    counted = [line["skipped"] for line in metrics(tmp_path / "r") if line["kind"] == "train"]
    assert counted == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3]


@pytest.mark.slow
def test_n_non_finite_steps_in_a_row_stop_the_run_and_name_the_layer(tmp_path):
    child = run(tmp_path, 'poison(range(4, 99), "blocks.1.mixer.out_proj.weight")', NONFINITE_LIMIT=3)
    assert child.code == 1 and len(child.errors()) == 1 and "Traceback" not in child.text(), child.text()[-2000:]
    assert "blocks.1.mixer.out_proj.weight" in child.errors()[0] and "terms: all finite" in child.errors()[0]
    assert "3 steps in a row" in child.errors()[0] and "stopped at step 6" in child.errors()[0]
    meta, tensors = tj.Checkpoints(tmp_path / "r/checkpoints", 2).newest(pytest.fail)
    assert meta["step"] == 0 and all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
    child = run(tmp_path, NONFINITE_LIMIT=3)  # with the cause gone the same command goes on
    assert child.code == 0 and "resumed at step 0" in child.text()


@pytest.mark.slow
def test_what_the_report_computes_once_more_does_not_reach_the_checkpoint(tmp_path):
    """NaN in the forward pass of the batch that `guard` repeats, which would be NaN in the states that it carries."""
    patch = """
poison(range(4, 99), "blocks.1.mixer.out_proj.weight")
guard = tj.Run.guard
def spoiled(self, at, force):
    weights = self.trainer.weights
    load = weights.load
    def then(*args, **kwargs):
        load(*args, **kwargs)
        self.trainer.model.blocks[0].mixer.in_proj.weight.data[0, 0] = float("nan")
    weights.load = then
    try:
        guard(self, at, force)
    finally:
        weights.load = load
tj.Run.guard = spoiled
"""
    child = run(tmp_path, patch, CARRY_STATE=1, NONFINITE_LIMIT=3)
    assert child.code == 1 and "terms: ce, jepa, sigreg" in child.errors()[0], child.text()[-2000:]
    _, tensors = tj.Checkpoints(tmp_path / "r/checkpoints", 2).newest(pytest.fail)
    assert any(name.startswith("state/") for name in tensors)
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


def test_n_non_finite_steps_in_a_row_name_the_term(tmp_path):
    patch = "real = tj.sigreg\ntj.sigreg = lambda z, *a, **k: real(z, *a, **k) * float('nan')"
    child = run(tmp_path, patch, NONFINITE_LIMIT=2)
    assert child.code == 1 and re.search(r"terms: sigreg;", child.errors()[0]), child.text()[-1500:]
    log = (tmp_path / "r/log.txt").read_text()
    assert re.search(r"(?m)^.*stopped at step 2: 2 steps in a row", log), "the cause is not in log.txt"


@pytest.mark.slow
def test_a_passing_non_finite_forward_does_not_poison_carried_states(tmp_path):
    patch = """
def spoil(trainer):
    load = trainer.weights.load
    def once(*a, **k):
        load(*a, **k)
        trainer.model.blocks[0].mixer.in_proj.weight.data[0, 0] = float("nan")
        trainer.weights.load = load
    trainer.weights.load = once
before_step(4, spoil)
"""
    child = run(tmp_path, patch, CARRY_STATE=1, NONFINITE_LIMIT=3)
    assert child.code == 0, child.text()[-1500:]
    assert json.loads((tmp_path / "r/result.json").read_text())["skipped_steps"] == 1


# -- hostile checkpoints and shards -------------------------------------------------------------------------------

def reseal_checkpoint(path: Path, edit) -> None:
    """Rewrite a checkpoint with edited meta and tensors and a right checksum."""
    meta, tensors = tj.read_tensors(path, "checkpoint")
    edit(meta, tensors)
    tj.write_tensors(path, "checkpoint", meta, tensors)


def shrink(tensors, name):
    tensors[name] = tensors[name].reshape(-1)[:3].clone()


HOSTILE = {
    "no step": lambda m, t: m.pop("step"), "no journals": lambda m, t: m.pop("journals"),
    "journals no dict": lambda m, t: m.update(journals=3),
    "journal of text": lambda m, t: m.update(journals={"log.txt": "x", "metrics.jsonl": 0}),
    "negative journal": lambda m, t: m.update(journals={"log.txt": -1, "metrics.jsonl": 0}),
    "no fixed": lambda m, t: m.pop("fixed"), "fixed no dict": lambda m, t: m.update(fixed=[1]),
    "no config": lambda m, t: m.pop("config"), "config no dict": lambda m, t: m.update(config=7),
    "step of text": lambda m, t: m.update(step="nine"), "step negative": lambda m, t: m.update(step=-5),
    "seconds of text": lambda m, t: m.update(seconds="x"), "position of text": lambda m, t: m.update(position="x"),
    "stage a list": lambda m, t: m.update(stage=[]), "averaged without averages": lambda m, t: m.update(averaged=True),
    "no master": lambda m, t: t.pop("master/token_embed"), "short master": lambda m, t: shrink(t, "master/token_embed"),
    "no moment": lambda m, t: t.pop(next(n for n in t if "exp_avg_sq" in n)),
    "short moment": lambda m, t: shrink(t, next(n for n in t if "exp_avg_sq" in n)),
    "no momentum": lambda m, t: t.pop(next(n for n in t if "momentum" in n)),
    "no directions": lambda m, t: t.pop("directions"), "short directions": lambda m, t: shrink(t, "directions"),
    "no rng": lambda m, t: t.pop("rng"), "short rng": lambda m, t: shrink(t, "rng"),
    "rng of floats": lambda m, t: t.update(rng=torch.zeros(5056)),
    "no skipped": lambda m, t: t.pop("optimizer/skipped"),
    "step tensor long": lambda m, t: t.update({next(n for n in t if n.startswith("optimizer/step/")): torch.zeros(7)}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_foreign_checkpoint_with_a_right_checksum_is_refused_or_passed_over(again, what):
    for path in (again / "r/checkpoints").glob("*.ckpt"):
        reseal_checkpoint(path, HOSTILE[what])
    child = run(again, "after_step(lambda: leave(0))", CHECKPOINT_EVERY=50, VAL_MAX_TOKENS=64)
    assert "Traceback" not in child.text() and child.code in (0, 2), (child.code, child.text()[-1500:])
    assert child.code == 0 or child.errors()


def test_journals_of_a_hostile_checkpoint_never_touch_files_outside_the_run_folder(again):
    precious = again / "precious.txt"
    precious.write_text("keep me")
    for path in (again / "r/checkpoints").glob("*.ckpt"):
        reseal_checkpoint(path, lambda m, t: m["journals"].update({"../precious.txt": 0, str(precious): 0}))
    run(again, CHECKPOINT_EVERY=3)
    assert precious.read_text() == "keep me"


def test_fuzzed_checkpoints_and_shards_are_refused_or_read(tmp_path, stopped):
    """Mutations: flips, cuts, insertions, spans, header numbers; mostly resealed with a right checksum. Everything is
    refused by UserError or decoded, in bounded memory. (Artifacts: test_artifact.py.)"""
    rng, counts = random.Random(12), {"refused": 0, "read": 0}
    meta, tensors = tj.read_tensors(stopped / "r/checkpoints/step_000000009.ckpt", "checkpoint")
    small = {name: t for name, t in tensors.items() if t.numel() < 300}
    tj.write_tensors(tmp_path / "s", "checkpoint", meta, small)  # of a real run, small enough to do thousands
    original, folder = (tmp_path / "s").read_bytes(), tmp_path / "c"
    folder.mkdir()
    checkpoints, before = tj.Checkpoints(folder, 2), test_artifact.peak(reset=True)
    for _ in range(FUZZ):
        (folder / "step_000000009.ckpt").write_bytes(test_artifact.mutate(original, rng))
        try:
            assert checkpoints.newest(pytest.fail) is not None
            counts["read"] += 1
        except tj.UserError as error:
            assert "no checkpoint can be used" in str(error) and "\n" not in str(error)
            counts["refused"] += 1
    memory = test_artifact.peak() - before
    shards = fuzz_shards(FUZZ, tmp_path, rng)
    print(f"{FUZZ} mutated checkpoints: {counts}, {memory >> 20} MB; as many shards: {shards}")
    assert counts["refused"] > FUZZ / 2 and memory < 128 << 20


def fuzz_shards(count: int, folder: Path, rng: random.Random) -> dict:
    tokens = np.random.default_rng(0).integers(0, 256, 3000)
    path = folder / "fineweb_train_000000.bin"
    write_shard(path, tokens)
    original, counts = path.read_bytes(), {"refused": 0, "read": 0}
    for _ in range(count):
        data, way = bytearray(original), rng.randrange(5)
        at = rng.randrange(len(data))
        if way == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            data[rng.randrange(12)] ^= 1 << rng.randrange(8)
        elif way == 2:
            del data[at:]
        elif way == 3:
            data += rng.randbytes(rng.randrange(1, 50))
        else:
            data[8:12] = struct.pack("<i", rng.choice((-1, 0, 1, 2999, 3001, (1 << 31) - 1, -(1 << 31), 1 << 30)))
        path.write_bytes(data)
        try:
            stream = tj.TokenStream([path], 256)
            values = stream.read(rng.randrange(1 << 40), 100)
            assert len(values) == 100 and values.min() >= 0 and values.max() < 256
            counts["read"] += 1
        except tj.UserError as error:
            counts["refused"] += 1
            assert path.name in str(error) or str(folder) in str(error)
    return counts


# -- cost ---------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_memory_stays_flat_and_old_files_go_over_40_checkpoints(tmp_path):
    patch = f"""
facts = dict(resident=[])
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
step, save, finish = tj.Trainer.train_step, tj.Run.save, tj.Run.finish
def watched(self, at):
    if at.step % 5 == 4:
        facts["resident"].append(resident())
    return step(self, at)
def counted(self, seconds):
    save(self, seconds)
    facts["files"] = max(facts.get("files", 0), len(list(self.checkpoints.folder.glob("*"))))
def finished(self):
    Path({str(tmp_path / 'facts')!r}).write_text(json.dumps(facts))
    return finish(self)
tj.Trainer.train_step, tj.Run.save, tj.Run.finish = watched, counted, finished
"""
    child = run(tmp_path, patch, NARROW, ITERATIONS=200, CHECKPOINT_EVERY=5, WARMDOWN_FRACTION=0.5)
    assert child.code == 0, child.text()[-2000:]
    facts = json.loads((tmp_path / "facts").read_text())
    early, late = max(facts["resident"][5:13]), max(facts["resident"][-8:])
    assert late - early < 4 << 20, f"memory grows: {early >> 20} MB early, {late >> 20} MB late"
    assert facts["files"] <= 2 + 2  # two kept, one about to go, one being written
    assert names(tmp_path / "r/checkpoints") == ["step_000000195.ckpt", "step_000000200.ckpt"]


def test_checkpoints_hold_the_weights_of_their_step_though_written_later(tmp_path):
    """The writer works on a snapshot: training on while it writes changes nothing in the file."""
    w = torch.arange(1000.0)
    checkpoints = tj.Checkpoints(tmp_path, 2)
    checkpoints.save(1, {"step": 1}, {"w": w})
    w.zero_()
    checkpoints.wait()
    assert torch.equal(tj.read_tensors(checkpoints.paths()[0], "checkpoint")[1]["w"], torch.arange(1000.0))


@pytest.mark.parametrize("fault", [TypeError("a bug"), tj.UserError("a line"), KeyboardInterrupt(), MemoryError()],
                         ids=lambda fault: type(fault).__name__)
def test_any_error_of_the_writing_thread_is_raised_at_the_next_wait(tmp_path, monkeypatch, fault):
    def fail(*arguments):
        raise fault
    checkpoints = tj.Checkpoints(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(tj, "write_tensors", fail)
        checkpoints.save(1, {"step": 1}, {"w": torch.ones(3)})
        with pytest.raises(type(fault)) as caught:
            checkpoints.wait()
    assert caught.value is fault
    checkpoints.save(2, {"step": 2}, {"w": torch.ones(3)})  # it goes on
    checkpoints.wait()
    assert names(tmp_path) == ["step_000000002.ckpt"]


def test_a_score_that_is_not_finite_does_not_stop_the_writer(tmp_path):
    """JSON has no NaN: the thread died of it, and the run said that it was saved."""
    checkpoints = tj.Checkpoints(tmp_path, 2)
    checkpoints.save(1, {"step": 1, "score": tj.Score(math.nan, math.inf)}, {"w": torch.ones(3)})
    checkpoints.wait()
    assert checkpoints.newest(pytest.fail)[0] == {"step": 1, "score": [None, None]}


def test_a_run_resumes_from_a_checkpoint_whose_score_is_null(again):
    for path in (again / "r/checkpoints").glob("*.ckpt"):
        reseal_checkpoint(path, lambda meta, tensors: meta.update(score=[None, None], validated=9))
    child = run(again, CHECKPOINT_EVERY=50)
    assert child.code == 0 and "resumed at step 9" in child.text(), child.text()[-1500:]


def test_loading_a_checkpoint_executes_no_pickle(tmp_path, monkeypatch):
    import pickle
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(torch, "load", None)
    tj.write_tensors(tmp_path / "step_000000001.ckpt", "checkpoint", {"step": 1}, {"w": torch.ones(3)})
    assert tj.Checkpoints(tmp_path, 2).newest(pytest.fail)[0] == {"step": 1}
    assert hashlib.sha256((tmp_path / "step_000000001.ckpt").read_bytes()[:-32]).digest() == \
        (tmp_path / "step_000000001.ckpt").read_bytes()[-32:]

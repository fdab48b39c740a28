"""The run's folder: checkpoints that cannot be used, two runs at once, runs that diverge, ends by a signal."""
import hashlib
import json
import os
import random
import shutil
import signal
import time

import harness
import pytest
from test_distributed import SLOWER, ended, torchrun

import train_jepa as tj

LONG = os.environ.get("SLOW") == "1"  # as many repetitions as were promised, instead of a few

RUN = dict(ITERATIONS=6, CHECKPOINT_EVERY=2, CHECKPOINT_KEEP=3)


@pytest.fixture(autouse=True)
def _data(demo_data):
    pass


def contents(folder) -> dict[str, str]:
    """Hash of every file below the folder, but the lock's."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


@pytest.fixture
def unfinished(tmp_path):
    """A run with three checkpoints that was killed before its result."""
    child = harness.run(tmp_path, "tj.Run.finish = lambda self: die()", **RUN)
    assert child.code == 137 and len(list((tmp_path / "r/checkpoints").glob("*.ckpt"))) == 3
    return tmp_path


def damage(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# -- checkpoints that cannot be used -----------------------------------------------------------------------------------

def test_when_all_checkpoints_are_damaged_the_run_stops_and_keeps_every_file(unfinished):
    paths = sorted((unfinished / "r/checkpoints").glob("*.ckpt"))
    for path in paths:
        damage(path)
    before = contents(unfinished / "r")
    child = harness.run(unfinished, **RUN)
    assert child.code == 2 and len(child.errors()) == 1
    assert all(str(path) in child.errors()[0] for path in paths)
    assert "checksum" in child.errors()[0] and "OVERWRITE=1" in child.errors()[0]
    assert contents(unfinished / "r") == before
    child = harness.run(unfinished, OVERWRITE=1, **RUN)
    assert child.code == 0 and "resumed" not in child.text()


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(unfinished):
    newest = max((unfinished / "r/checkpoints").glob("*.ckpt"))
    damage(newest)
    child = harness.run(unfinished, **RUN)
    assert child.code == 0 and f"checkpoint passed over: {newest}: " in child.text()
    assert "resumed at step 4 " in child.text()


@pytest.mark.parametrize("patch", [
    "opened = open\ndef refuse(path, *a, **k):\n    if str(path).endswith('6.ckpt'):\n"
    "        raise PermissionError(13, 'denied')\n    return opened(path, *a, **k)\ntj.open = refuse",
    "listed = os.listdir\ndef refuse(path):\n    if str(path).endswith('checkpoints'): raise OSError(5, 'I/O error')\n"
    "    return listed(path)\nos.listdir = refuse"], ids=["file", "folder"])
def test_an_unreadable_checkpoint_is_not_taken_for_damage(unfinished, patch):
    before = contents(unfinished / "r")
    child = harness.run(unfinished, patch, **RUN)
    assert child.code == 2 and len(child.errors()) == 1 and "cannot be read" in child.errors()[0]
    assert contents(unfinished / "r") == before


# -- two runs in one folder --------------------------------------------------------------------------------------------

def test_of_two_starts_on_one_name_exactly_one_runs(tmp_path):
    for attempt in range(50 if LONG else 3):
        name = f"race{attempt}"
        pair = [harness.launch(tmp_path, "no_curves()", RUN_ID=name, SEED=seed, ITERATIONS=8) for seed in (1, 2)]
        codes = sorted(child.wait() for child in pair)
        assert codes == [0, 2], [child.text()[-500:] for child in pair]
        won, lost = sorted(pair, key=lambda child: child.code)
        (line,) = lost.errors()
        assert "is in use by process" in line or "holds a finished run" in line
        seed = json.loads((tmp_path / name / "result.json").read_text())["seed"]
        assert json.loads((tmp_path / name / "config.json").read_text())["SEED"] == seed == pair.index(won) + 1


def test_overwrite_does_not_break_the_lock_and_a_killed_holder_frees_it(tmp_path):
    knobs = dict(ITERATIONS=400, CHECKPOINT_EVERY=1)
    holder = harness.launch(tmp_path, "no_curves()", **knobs)
    holder.wait_for(r"(?m)^step:3 ")
    child = harness.run(tmp_path, OVERWRITE=1, **knobs)
    assert child.code == 2 and f"process {holder.pid} of" in child.errors()[0] and "RUN_ID=r" in child.errors()[0]
    holder.signal(signal.SIGKILL)
    holder.wait()
    child = harness.run(tmp_path, ITERATIONS=8, CHECKPOINT_EVERY=1)
    assert child.code == 0 and "resumed at step" in child.text()


def test_default_names_of_runs_that_start_together_differ(tmp_path):
    together = [harness.launch(tmp_path, "no_curves()", RUN_ID="", ITERATIONS=2)
                for _ in range(19 if LONG else 4)]
    together.append(harness.launch(tmp_path, "no_curves()", RUN_ID="", ITERATIONS=2, MUON_WD=0.5))
    assert not any(child.wait() for child in together)
    assert len(list(tmp_path.glob("*/result.json"))) == len(together)


def test_without_file_locks_one_line_says_so(tmp_path):
    patch = "import fcntl\ndef none(*a): raise OSError(37, 'No locks available')\nfcntl.flock = none"
    child = harness.run(tmp_path, patch, ITERATIONS=2)
    assert child.code == 0 and child.text().count("no file locks here (No locks available)") == 1


def test_leftovers_of_a_killed_process_are_removed(unfinished):
    left = unfinished / "r/.model.jepa.999.tmp"
    left.write_bytes(b"half")
    assert harness.run(unfinished, **RUN).code == 0 and not left.exists()


# -- divergence --------------------------------------------------------------------------------------------------------

WILD = dict(ITERATIONS=30, VAL_LOSS_EVERY=5, DIAGNOSTICS=1, PROBE_STEPS=0, NONFINITE_LIMIT=3)


@pytest.mark.parametrize("cause, words", [
    (dict(SCALAR_LR=100), "terms: ce, jepa, sigreg"), (dict(ADAM_EPS=0), "terms: ce, jepa, sigreg"),
    (dict(MATRIX_LR=1e308), "terms: ce, jepa, sigreg"), (dict(LOGIT_SOFTCAP=1e308), "terms: ce; layers: token_embed")],
    ids=lambda cause: next(iter(cause)) if isinstance(cause, dict) else "")
def test_a_diverging_run_ends_with_one_line_that_names_terms_and_layers(tmp_path, cause, words):
    child = harness.run(tmp_path, **WILD | cause)
    assert child.code == 1 and "Traceback" not in child.text(), child.text()[-2000:]
    (line,) = child.errors()
    assert words in line and "is saved" in line and "RESUME_AFTER_DIVERGENCE=1 RUN_ID=r" in line


def test_a_norm_that_overflows_fp32_is_named(tmp_path):
    """Entries of 1e38 are finite; the root of the sum of their squares is not."""
    child = harness.run(tmp_path, "poison(range(14, 40), 'token_embed', 1e38)", **WILD)
    assert child.code == 1 and "none, but the gradient's norm overflows" in child.errors()[0], child.errors()


def test_a_diverged_run_goes_on_from_its_last_good_state_with_lower_rates(tmp_path):
    """Infinite gradients from step 14 on: the state kept is one whose loss and norm were finite."""
    poisoned = "poison(range(14, 40), 'token_embed')"
    knobs = WILD | dict(CHECKPOINT_EVERY=4)
    child = harness.run(tmp_path, poisoned, **knobs)
    assert child.code == 1 and "of step 12, is saved" in child.errors()[0], child.errors()
    newest = tj.Checkpoints(tmp_path / "r/checkpoints", 2).newest(pytest.fail)
    assert newest[0]["step"] == 12 and all(t.isfinite().all() for t in newest[1].values() if t.is_floating_point())
    child = harness.run(tmp_path, SCALAR_LR=0.001, **knobs)
    assert child.code == 2 and any("SCALAR_LR: 0.01 -> 0.001" in line for line in child.errors())
    child = harness.run(tmp_path, SCALAR_LR=0.001, RESUME_AFTER_DIVERGENCE=1, **knobs)
    assert child.code == 0, child.text()[-1500:]
    assert "resumed at step 12 " in child.text()
    assert "changed since the checkpoint: SCALAR_LR: 0.01 -> 0.001" in child.text()


def test_checkpoints_that_lead_to_the_divergence_are_removed(tmp_path):
    """The weights of step 8 are poisoned although the step before was finite: its checkpoint must not stay."""
    spoil = "before_step(9, lambda trainer: [group.master.fill_(float('nan')) for group in trainer.weights.groups])"
    child = harness.run(tmp_path, spoil, **WILD | dict(CHECKPOINT_EVERY=1, CHECKPOINT_KEEP=2))
    assert child.code == 1 and "Traceback" not in child.text()
    meta, tensors = tj.Checkpoints(tmp_path / "r/checkpoints", 2).newest(pytest.fail)
    assert meta["step"] < 8 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_a_final_score_that_is_not_finite_is_the_last_line_and_code_1(tmp_path):
    spoil = ("finish = tj.Run.finish\ndef spoiled(self):\n    self.trainer.model.softcap = float('inf')\n"
             "    return finish(self)\ntj.Run.finish = spoiled")
    child = harness.run(tmp_path, spoil, ITERATIONS=2)
    assert child.code == 1 and "the final score is not finite" in child.text().splitlines()[-1]
    assert (tmp_path / "r/log.txt").read_text().splitlines()[-1].startswith("ended: the final score is not finite")


# -- signals -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_in_the_loop_saves_writes_the_end_and_kills_by_itself(tmp_path, number):
    child = harness.launch(tmp_path, "no_curves()", ITERATIONS=400)
    child.wait_for(r"(?m)^step:3 ")
    child.signal(number)
    assert child.wait() == 128 + number
    last = (tmp_path / "r/log.txt").read_text().splitlines()[-1]
    assert last.startswith(f"ended: stopped by {number.name} after step")
    assert list((tmp_path / "r/checkpoints").glob("*.ckpt")) and len(child.errors()) == 1


def test_a_signal_in_the_final_evaluation_writes_the_end_too(tmp_path):
    slow = "def finish(self):\n    print('evaluating', flush=True)\n    time.sleep(60)\ntj.Run.finish = finish"
    child = harness.launch(tmp_path, "no_curves()\n" + slow, ITERATIONS=2, CHECKPOINT_EVERY=2)
    child.wait_for("evaluating")
    child.signal(signal.SIGTERM)
    assert child.wait() == 143
    assert (tmp_path / "r/log.txt").read_text().splitlines()[-1].startswith("ended: stopped by SIGTERM in the final")


def test_a_full_console_does_not_end_the_training(tmp_path):
    full = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    child = harness.run(tmp_path, full, ITERATIONS=2)
    assert child.code == 0 and (tmp_path / "r/result.json").exists()


def test_long_runs_get_checkpoints_without_being_asked(tmp_path):
    """Five minutes a step on a replaced clock: a checkpoint after ten minutes, and one line that says so."""
    child = harness.run(tmp_path, "clock_by_steps(300.0)", ITERATIONS=8)
    assert child.code == 0 and child.text().count("checkpoints: every 10 minutes") == 1
    assert len(list((tmp_path / "r/checkpoints").glob("*.ckpt"))) == 2
    child = harness.run(tmp_path, "clock_by_steps(100.0)", RUN_ID="short", ITERATIONS=8)
    assert child.code == 0 and not (tmp_path / "short/checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_workers_end_when_torchrun_is_killed_and_the_next_start_is_bit_exact(tmp_path, world):
    knobs = dict(ITERATIONS=12, CHECKPOINT_EVERY=1)
    patch = "no_curves()\nclock_by_steps(0.01)"
    assert ended(torchrun(tmp_path, world, patch=patch, RUN_ID="whole", **knobs), tmp_path) == 0
    slower = patch + "\n" + SLOWER
    for repeat in range(10 if LONG else 1):
        folder = tmp_path / f"r{repeat}"
        process = torchrun(tmp_path, world, patch=slower, RUN_ID=folder.name, **knobs)
        harness_wait(folder / "log.txt", f"step:{random.Random(repeat).randint(2, 9)} ")
        workers = children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        end = time.time() + 10
        while any(alive(pid) for pid in workers) and time.time() < end:
            time.sleep(0.05)
        assert len(workers) == world and not any(alive(pid) for pid in workers)
        assert "ended: stopped by SIGTERM" in (folder / "log.txt").read_text().splitlines()[-1]
        assert ended(torchrun(tmp_path, world, patch=patch, RUN_ID=folder.name, **knobs), tmp_path) == 0
        assert harness.final_state(tmp_path / "whole") == harness.final_state(folder)


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(open(f"/proc/{name}/stat").read().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(name))
        except OSError:
            continue
    return found


def harness_wait(path, text: str, timeout: float = 90) -> None:
    end = time.time() + timeout
    while not path.exists() or text not in path.read_text():
        assert time.time() < end, f"no {text!r} in {path}"
        time.sleep(0.05)


# -- a busy machine ----------------------------------------------------------------------------------------------------

LOAD = "os.cpu_count, tj.machine_load = lambda: 2, lambda: {load}\nclock_by_steps(0.1)\n"


@pytest.mark.parametrize("load, lines", [(9.5, 1), (2.9, 0)])
def test_a_machine_that_is_busy_at_the_start_gets_a_line(tmp_path, load, lines):
    child = harness.run(tmp_path, LOAD.format(load=load), ITERATIONS=3)
    assert child.code == 0 and child.text().count("busy: ") == lines
    assert not lines or "busy: a load of 9.5 on 2 cores; other processes" in child.text()


@pytest.mark.parametrize("load, seconds, chosen", [
    (9, {1: 1, 2: 5}, 1), (9, {1: 5, 2: 1}, 2), (9, {1: 5, 2: 2, 4: 3}, 2), (9, {1: 1, 2: 2, 4: 0.1}, 1),
    (1, {1: 1, 2: 5}, 1), (0.5, {1: 1, 2: 5}, 2)])
def test_on_a_busy_machine_the_fastest_number_of_threads_is_taken_and_logged(tmp_path, load, seconds, chosen):
    """From one thread upwards, as long as twice as many are faster; on an idle machine all, without measuring."""
    patch = LOAD.format(load=load) + f"""
import torch
os.environ.pop("OMP_NUM_THREADS", None)
current = [{max(seconds)}]
torch.get_num_threads, torch.set_num_threads = lambda: current[0], lambda n: current.__setitem__(0, n)
accumulate, seconds = tj.Trainer.accumulate, {seconds}
def slow(self, *a, **k):
    parts, before = accumulate(self, *a, **k), tj.now
    if not self.position and not k.get("keep_states", True):
        reading = before() + seconds[current[0]]
        tj.now = lambda: reading
    return parts
tj.Trainer.accumulate = slow
tj.Run.train = lambda self: (self.log(f"{{current[0]}} threads"), die())
"""
    text = harness.run(tmp_path, patch, ITERATIONS=2).text()
    assert f"{chosen} threads" in text and text.count("threads: ") == (chosen != max(seconds)), text[-1500:]
    assert chosen == max(seconds) or f"threads: {chosen} instead of {max(seconds)}, measured" in text


# -- trackers ----------------------------------------------------------------------------------------------------------

FAKES = {"wandb": "def init(**k): print('init', k['project'], k['name'], k['config']['SEED'], k['resume'])\n"
                  "def log(values, step): print('log', step, sorted(values))\ndef finish(): print('finish')\n",
         "tensorboard": ""}
FAKES["trackio"] = FAKES["wandb"]
WRITER = """
import types
class SummaryWriter:
    def __init__(self, path, flush_secs): print('init', path)
    def add_scalar(self, name, value, step): print('log', step, name)
sys.modules['torch.utils.tensorboard'] = types.SimpleNamespace(SummaryWriter=SummaryWriter)
"""


@pytest.mark.parametrize("name", FAKES)
def test_a_tracker_gets_every_metric_and_is_named_when_it_is_missing(tmp_path, name):
    if tj.importlib.util.find_spec(name) is None:
        child = harness.run(tmp_path, TRACKER=name)
        assert child.code == 2 and child.errors() == [
            f"train_jepa.py: TRACKER={name}: not installed; .venv/bin/python -m pip install {name} brings it"]
        assert not (tmp_path / "r").exists()
    (tmp_path / f"{name}.py").write_text(FAKES[name])
    patch = f"sys.path.insert(0, {str(tmp_path)!r})\n" + (WRITER if name == "tensorboard" else "")
    child = harness.run(tmp_path, patch, TRACKER=name, ITERATIONS=2)
    text = child.text()
    assert child.code == 0, text
    if name == "tensorboard":
        assert f"init {tmp_path}/r" in text and "log 1 train/ce" in text and "log 2 validation/val_bpb" in text
    else:
        assert "init train_jepa r 7 allow" in text and text.rstrip().endswith("finish")
        assert "log 1 ['train/anti', 'train/ce'," in text and "log 2 ['validation/seconds'," in text


# -- shards and folders that fail during a run -------------------------------------------------------------------------

@pytest.fixture
def shards(tmp_path, demo_data):
    """A copy of the demo's byte shards; returns the training shard."""
    shutil.copytree(demo_data.bytes, tmp_path / "shards")
    return tmp_path / "shards/fineweb_train_000000.bin"


@pytest.mark.parametrize("world", [1, 2])
def test_a_shard_that_shrinks_during_training_ends_the_run_in_one_line_after_a_save(tmp_path, shards, world):
    knobs = dict(ITERATIONS=8, DATA_PATH=shards.parent, CHECKPOINT_EVERY=100)
    # of two ranks the second one reads the last micro-batch of step 5, behind the new end
    size = 1024 + 2 * (5 * 2 * 129 - 3)
    patch = f"no_curves(); before_step(4, lambda trainer: os.truncate({str(shards)!r}, {size}))"
    whole = shards.read_bytes()
    children = ([harness.run(tmp_path, patch, **knobs)] if world == 1 else
                harness.run_ranks(tmp_path, world, patch, **knobs))
    for child in children:
        assert child.code == 2 and len(child.errors()) == 1, child.text()[-2000:]
        assert "became shorter while in use" in child.errors()[0] and "step 4 is saved" in child.errors()[0]
    shards.write_bytes(whole)
    child = harness.run(tmp_path, **knobs)
    assert child.code == 0 and "resumed at step 4 " in child.text()


def test_a_bad_token_deep_in_a_shard_ends_the_run_in_one_line_after_a_save(tmp_path, shards):
    spoil = (f"tokens = np.fromfile({str(shards)!r}, '<u2'); tokens[512 + 2 * 129 * 3 + 5] = 300; "
             f"before_step(3, lambda trainer: tokens.tofile({str(shards)!r}))")
    child = harness.run(tmp_path, spoil, DATA_PATH=shards.parent)
    assert child.code == 2 and len(child.errors()) == 1, child.text()[-2000:]
    assert "token id 300" in child.errors()[0] and "step 3 is saved" in child.errors()[0]
    assert (tmp_path / "r/checkpoints/step_000000003.ckpt").exists()


def test_a_shard_that_fails_after_the_last_step_costs_the_temperature_alone(tmp_path, shards):
    patch = f"before_step(2, lambda trainer: os.truncate({str(shards)!r}, 1024 + 2 * 3 * 2 * 129))"
    child = harness.run(tmp_path, patch, DATA_PATH=shards.parent, ITERATIONS=3, TEMP_SCALING=1)
    assert child.code == 0 and "no temperature search: " in child.text(), child.text()[-2000:]


def test_a_run_folder_that_is_taken_away_ends_the_run_in_one_line(tmp_path):
    patch = f"import shutil; before_step(3, lambda trainer: shutil.rmtree({str(tmp_path / 'r')!r}))"
    child = harness.run(tmp_path, patch, CHECKPOINT_EVERY=3)
    assert child.code == 2 and len(child.errors()) == 1 and "folder is gone" in child.errors()[0], child.text()[-2000:]


@pytest.mark.parametrize("part", ["log.txt", ".lock", "config.json", ".tmp"])
def test_a_run_folder_of_someone_else_is_refused_in_one_line(tmp_path, part):
    """As for another user: opening, writing and removing files fail."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r/.left.tmp").write_text("")
    patch = f"""
opened, unlink = open, Path.unlink
def refuse(path, *a, **k):
    if str(path).endswith({part!r}) or {part!r} in str(path): raise PermissionError(13, "Permission denied", str(path))
    return opened(path, *a, **k)
def keep(path, **k):
    if str(path).endswith({part!r}): raise PermissionError(13, "Permission denied", str(path))
    unlink(path, **k)
tj.open, Path.unlink = refuse, keep
"""
    child = harness.run(tmp_path, patch)
    assert child.code == 2 and len(child.errors()) == 1, child.text()[-2000:]
    assert "Permission denied" in child.errors()[0] and str(tmp_path / "r") in child.errors()[0]
    assert "step:1 " not in child.text()


@pytest.mark.parametrize("place", ["/proc/nowhere", "file", "file/below"])
def test_a_checkpoint_dir_that_cannot_be_made_is_refused_at_the_start(tmp_path, place):
    (tmp_path / "file").write_text("")
    child = harness.run(tmp_path, CHECKPOINT_DIR=tmp_path / place)
    assert child.code == 2 and len(child.errors()) == 1 and "CHECKPOINT_DIR" in child.errors()[0], child.text()
    assert "step:1 " not in child.text()


# -- sizes beyond memory -----------------------------------------------------------------------------------------------

SIZES = dict(D_STATE=10**12, EXPAND=10**9, EMBED_DIM=10**9, MLP_MULT=10**10, PREDICTOR_HIDDEN_MULT=10**9,
             JEPA_DIM=10**8, SIGREG_KNOTS=10**10, SIGREG_NUM_PROJ=10**10, MODEL_DIM=2**40,
             TRAIN_BATCH_TOKENS=12800000000000, VAL_BATCH_SIZE=10**15)


@pytest.mark.parametrize("mode", ["train", "describe", "bench"])
def test_sizes_beyond_memory_are_refused_by_name_before_anything_is_made(mode, monkeypatch):
    monkeypatch.setattr(tj, "machine_memory", lambda cuda: 4e9)
    base = harness.TINY | dict(MODE=mode, VAL_MAX_TOKENS=0)
    read = lambda **knobs: tj.Config.from_env({name: str(value) for name, value in (base | knobs).items()}).validate()
    tj.check_memory(read(), cuda=False)
    for name, value in SIZES.items():
        if mode != "train" and name == "VAL_BATCH_SIZE" or mode == "describe" and name in (
                "TRAIN_BATCH_TOKENS", "SIGREG_KNOTS", "SIGREG_NUM_PROJ"):
            continue  # nothing of that size is made there
        with pytest.raises(tj.UserError, match=f"^{name}={value}: MODE={mode} needs .*4.0 GB are here") as caught:
            tj.check_memory(read(**{name: value}), cuda=False)
        assert "\n" not in str(caught.value)


def test_the_estimate_of_memory_is_of_the_size_of_what_a_step_takes(tmp_path):
    """Between a third of what a run takes beyond an almost empty one, and all of it: it must not refuse what fits."""
    def measure(**knobs) -> tuple[int, float]:
        config = harness.TINY | dict(VAL_MAX_TOKENS=128, WARMUP_STEPS=0, MICRO_BATCHES=1, OVERWRITE=1,
                                     NONFINITE_LIMIT=1) | knobs  # a copy of the state before each step
        child = harness.run(tmp_path, "import resource; before_step(3, lambda trainer: (print('peak', resource."
                            "getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True), leave(0)))", config)
        need = tj.memory_need(tj.Config.from_env({k: str(v) for k, v in config.items()}).validate(), cuda=False)
        return 1024 * int(child.text().split("peak ")[1].split()[0]), need
    empty, small = measure()
    for knobs in (dict(MODEL_DIM=512, MLP_MULT=8), dict(TRAIN_BATCH_TOKENS=4096, MODEL_DIM=128, TRAIN_SEQ_LEN=64),
                  dict(SIGREG_KNOTS=272, SIGREG_NUM_PROJ=256)):
        peak, need = measure(**knobs)
        assert (peak - empty) / 3 < need - small < peak - empty, (knobs, peak - empty, need - small)


@pytest.mark.parametrize("knobs, counted", [
    ({}, True), (dict(COMPILE_MODE="default"), False), (dict(COMPILE_MODE="default", DIAGNOSTICS=1), True),
    (dict(ANTICOLLAPSE="covariance"), False), (dict(SIGREG_LAMBDA=0), False)], ids=str)
def test_the_estimate_of_memory_covers_the_backward_pass_of_sigreg(knobs, counted):
    """Six tensors (4 sequences, 32 positions, directions, knots) of fp32, eager; a compiled step has none of them."""
    config = tj.Config.from_env({k: str(v) for k, v in (harness.TINY | knobs).items()}).validate()
    large = tj.dataclasses.replace(config, sigreg_knots=1088, sigreg_num_proj=4096)
    need = tj.memory_need(large, cuda=False)
    assert need > 6 * 4 * 4 * 32 * 4096 * 1088 if counted else need < 1e9

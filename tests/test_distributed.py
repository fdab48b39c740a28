"""Any number of ranks: the same losses, identical weights, restarts, deaths, signals. All on CPU with gloo."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
from harness import SYSTEM_B, TINY, final_state, free_port, losses_of, run, run_ranks

import train_jepa as tj

# Sums over ranks add in another order. The first step agrees to fp32 rounding (1e-6). From then on the early steps of
# Adam and Muon, which turn small gradients into full updates, enlarge it about threefold a step (7e-5 seen after 8);
# QAT enlarges it more, as a weight midway between two grid values may fall to the other side (5e-3 seen, in the small
# jepa term). Relative to the larger of the loss and 0.1.
FIRST, TIGHT, LOOSE = 1e-6, 3e-4, 2e-2


@pytest.fixture(autouse=True)
def _data(demo_data):
    pass


def close(a: list[float], b: list[float], tolerance: float) -> bool:
    apart = [abs(x - y) / max(abs(x), 0.1) for x, y in zip(a, b)]
    return len(a) == len(b) > 10 and max(apart[:2]) <= FIRST and max(apart) <= tolerance


def hashes(folder: Path, world: int) -> list[str]:
    return [(folder / f"hash.{rank}").read_text() for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("base, knobs, worlds", [
    (TINY, dict(QAT_FRACTION=0, MICRO_BATCHES=4), (1, 2, 4)), (TINY, dict(CARRY_STATE=1, QAT_FRACTION=0.3), (1, 2)),
    (SYSTEM_B, {}, (1, 2))], ids=["system_A", "system_A_carried_QAT", "system_B_all_stages"])
def test_any_number_of_ranks_has_the_same_losses_and_each_the_same_weights(tmp_path, base, knobs, worlds):
    seen = {}
    for world in worlds:
        folder = tmp_path / str(world)
        folder.mkdir()
        ranks = run_ranks(folder, world, f"hash_at_end({str(folder)!r})", base, ITERATIONS=8, VAL_LOSS_EVERY=4, **knobs)
        assert [child.code for child in ranks] == [0] * world, "\n".join(child.text()[-1500:] for child in ranks)
        assert len(set(hashes(folder, world))) == 1, "ranks ended with different weights"
        seen[world] = losses_of(folder / "r")
    tolerance = LOOSE if knobs.get("QAT_FRACTION", 0) else TIGHT
    for world in worlds[1:]:
        assert close(seen[1], seen[world], tolerance), (seen[1], seen[world])
    if base is SYSTEM_B:
        stages = re.findall(r"stage: (\w+) begins", (tmp_path / "2/r/log.txt").read_text())
        assert stages == ["jepa", "bridge", "ce"]


@pytest.mark.slow
def test_a_checkpoint_of_2_ranks_resumes_on_1_with_the_same_losses(tmp_path):
    knobs = dict(CHECKPOINT_EVERY=4, ITERATIONS=8, QAT_FRACTION=0, CARRY_STATE=1)
    assert run(tmp_path, RUN_ID="whole", **knobs).code == 0
    ranks = run_ranks(tmp_path, 2, "before_step(6, lambda trainer: (time.sleep(0.5), die()))", **knobs)
    assert 137 in [child.code for child in ranks]
    child = run(tmp_path, **knobs)
    assert child.code == 0 and "resumed at step 4" in child.text()
    assert close(losses_of(tmp_path / "whole"), losses_of(tmp_path / "r"), TIGHT)


def test_3_ranks_are_refused_naming_settings_that_do(tmp_path):
    ranks = run_ranks(tmp_path, 3, MICRO_BATCHES=4)
    assert [child.code for child in ranks] == [2, 2, 2]
    assert ranks[0].errors() == ["train_jepa.py: 3 ranks cannot share MICRO_BATCHES=4: start a number of ranks that "
                                 "divides it, or set MICRO_BATCHES=3"]
    assert not (tmp_path / "r").exists()
    config = tj.Config(train_batch_tokens=524_288)
    with pytest.raises(tj.UserError, match="MICRO_BATCHES=16"):
        tj.check_world(config, 16)
    tj.check_world(tj.Config(micro_batches=16), 16)


@pytest.mark.slow
def test_a_poisoned_rank_is_skipped_by_all_and_named(tmp_path):
    """The jepa term is NaN on rank 1 alone: all ranks skip, stop together, and the report names the term."""
    patch = """
real = tj.jepa_loss
tj.jepa_loss = lambda *a: real(*a) * (float("nan") if os.environ["RANK"] == "1" else 1.0)
"""
    ranks = run_ranks(tmp_path, 2, patch, NONFINITE_LIMIT=2)
    assert [child.code for child in ranks] == [1, 1], ranks[0].text()[-1500:]
    assert "terms: jepa" in ranks[0].errors()[0], ranks[0].errors()


def test_bad_input_is_said_once_and_ends_all_ranks(tmp_path):
    ranks = run_ranks(tmp_path, 2, DATA_PATH=tmp_path / "nowhere")
    assert [child.code for child in ranks] == [2, 2]
    assert len(ranks[0].errors()) == 1 and "nowhere" in ranks[0].errors()[0]
    assert "Traceback" not in ranks[0].text() + ranks[1].text()


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_once_and_ends_all_with_143(tmp_path):
    patch = "if os.environ['RANK'] == '1': before_step(4, lambda trainer: os.kill(os.getpid(), 15))"
    ranks = run_ranks(tmp_path, 2, patch, CHECKPOINT_EVERY=10)
    assert [child.code for child in ranks] == [143, 143], ranks[0].text()[-1500:]
    assert tj.Checkpoints(tmp_path / "r/checkpoints", 2).newest(pytest.fail)[0]["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hung"])
def test_without_torchrun_a_dead_or_hung_rank_ends_the_other_in_bounded_time(tmp_path, how):
    number = {"killed": "SIGKILL", "hung": "SIGSTOP"}[how]
    patch = f"if os.environ['RANK'] == '1': before_step(3, lambda trainer: os.kill(os.getpid(), signal.{number}))"
    port, began = free_port(), time.time()
    ranks = [harness.launch(tmp_path, "no_curves()\n" + patch, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2,
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, COLLECTIVE_TIMEOUT=8) for rank in range(2)]
    try:
        code = ranks[0].wait(90)
        assert code not in (0, None) and time.time() - began < 90
        assert re.search(r"closed|Timed out|timeout|reset", ranks[0].text(), re.I), ranks[0].text()[-1500:]
    finally:
        if ranks[1].poll() is None:
            os.kill(ranks[1].pid, signal.SIGKILL)
            ranks[1].wait(10)


# -- real torchrun ------------------------------------------------------------------------------------------------

def torchrun(folder: Path, world: int, *options: str, patch: str = "", **knobs) -> subprocess.Popen:
    """torchrun in a session of its own; its output goes to folder/torchrun.txt."""
    own = dict(RUNS_DIR=folder, RUN_ID="r", HARNESS_PATCH="no_curves()\n" + patch)
    env = harness.plain_environment(**TINY | own | knobs)
    out = open(folder / "torchrun.txt", "a")
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={world}",
                             f"--master_port={free_port()}", *options, str(harness.ROOT / "tests/harness.py")],
                            env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)


def ended(process, folder: Path, timeout: float = 150) -> int:
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError((folder / "torchrun.txt").read_text()[-3000:]) from None


def wait_for(path: Path, pattern: str, timeout: float = 120) -> str:
    end = time.time() + timeout
    while not (path.exists() and re.search(pattern, path.read_text(errors="replace"))):
        assert time.time() < end, path.read_text(errors="replace")[-2000:] if path.exists() else f"no {path}"
        time.sleep(0.05)
    return path.read_text(errors="replace")


NOTE_PID = "Path(os.environ['RUNS_DIR'], 'pid.' + os.environ['RANK'] + '.' + str(os.getpid())).touch()\n"
SLOWER = """
before = tj.Trainer.train_step
tj.Trainer.train_step = lambda self, at: (time.sleep(0.2), before(self, at))[1]
"""


def pids(folder: Path, rank: int) -> list[int]:
    found = sorted(folder.glob(f"pid.{rank}.*"), key=lambda p: p.stat().st_mtime)
    return [int(p.name.rpartition(".")[2]) for p in found]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def no_orphans(folder: Path) -> None:
    end = time.time() + 20
    everyone = [pid for rank in range(4) for pid in pids(folder, rank)]
    while any(map(alive, everyone)):
        assert time.time() < end, "ranks live on"
        time.sleep(0.1)


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank_and_ends_with_the_weights_of_an_undisturbed_run(tmp_path):
    knobs = dict(CHECKPOINT_EVERY=2, ITERATIONS=10, VAL_LOSS_EVERY=3)
    assert [c.code for c in run_ranks(tmp_path, 2, RUN_ID="whole", **knobs)] == [0, 0]
    process = torchrun(tmp_path, 2, "--max-restarts=2", patch=NOTE_PID + SLOWER, **knobs)
    wait_for(tmp_path / "r/log.txt", r"(?m)^step:5 ")
    os.kill(pids(tmp_path, 1)[-1], signal.SIGKILL)
    assert ended(process, tmp_path) == 0, (tmp_path / "torchrun.txt").read_text()[-3000:]
    assert re.search(r"(?m)^resumed at step \d", (tmp_path / "r/log.txt").read_text()) and len(pids(tmp_path, 0)) == 2
    assert final_state(tmp_path / "r") == final_state(tmp_path / "whole")
    no_orphans(tmp_path)


@pytest.mark.slow
def test_torchrun_without_restarts_ends_all_when_a_rank_dies(tmp_path):
    process = torchrun(tmp_path, 2, patch=NOTE_PID + SLOWER, ITERATIONS=500)
    wait_for(tmp_path / "r/log.txt", r"(?m)^step:2 ")
    began = time.time()
    os.kill(pids(tmp_path, 1)[-1], signal.SIGKILL)
    assert ended(process, tmp_path, 60) != 0 and time.time() - began < 60
    no_orphans(tmp_path)


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks_saves_and_leaves_the_log_readable(tmp_path):
    process = torchrun(tmp_path, 2, patch=NOTE_PID + SLOWER, ITERATIONS=500, CHECKPOINT_EVERY=400)
    wait_for(tmp_path / "r/log.txt", r"(?m)^step:3 ")
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process, tmp_path, 60) != 0
    no_orphans(tmp_path)
    text = (tmp_path / "torchrun.txt").read_text()
    assert re.search(r"stopped by SIGINT after step \d+", text), text[-2500:]
    step = tj.Checkpoints(tmp_path / "r/checkpoints", 2).newest(pytest.fail)[0]["step"]
    lines = (tmp_path / "r/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == min(step, 10)
    (tmp_path / "r/log.txt").read_text(encoding="utf-8")

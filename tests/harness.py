"""Runs of train_jepa.py in child processes at the price of a fork: importing torch takes seconds, forking does not.

As a module: `launch(...)` and `run(...)` start children of one warm process (in which torch and train_jepa are
imported but have not computed anything) with a given environment and with Python lines that break or watch the child.
As a script: that warm process. The functions below `# -- what a child can be told` are what those lines may call."""

import atexit
import functools
import gc
import hashlib
import json
import math
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    TOKENIZER="byte", DATA_PATH=str(ROOT / "data/datasets/demo_bytes"), MODEL_DIM=64, NUM_LAYERS=2, EXPAND=1,
    D_STATE=16, MLP_MULT=2, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=256, MICRO_BATCHES=2, COMPILE_MODE="off", QUANT_BITS=4,
    FP_STORAGE="FP8", JEPA_STEPS=2, VAL_LOSS_EVERY=0, VAL_MAX_TOKENS=2000, WARMUP_STEPS=1, ITERATIONS=12, DIAGNOSTICS=0,
    TEMP_SCALING=0, VAL_BATCH_SIZE=4096, SSD_CHUNK=16, DEVICE="cpu", SEED=7)
SYSTEM_B = TINY | dict(
    MIXER="attention", NUM_HEADS=4, NUM_KV_HEADS=2, LOSS_SCHEDULE="staged", ANTICOLLAPSE="covariance",
    EMBED_STYLE="tied", PROJECTOR_TYPE="none", PREDICTOR_NORM=1, MLP_NORM=0, VOCAB_BIAS=0, Z_LOSS=0, ROW_NORM=0,
    SWA_START=0.6, JEPA_PURE_FRAC=0.2, CE_PURE_FRAC=0.6, STORAGE="int8", QUANT_BITS=8, FP_STORAGE="BF16",
    SOFTCAP_TYPE="tanh", DETACH_TARGETS=1, WARMUP_ROLLBACK="all", TIE_EMBEDDINGS=1, QAT_FRACTION=0)
tj = None  # train_jepa, in the script
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def plain_environment(**values) -> dict[str, str]:
    """This environment without any knob of ours, and with `values`."""
    import train_jepa
    kept = {k: v for k, v in os.environ.items() if k not in train_jepa.Config.knobs() and k not in RANK_NAMES}
    own = dict(OMP_NUM_THREADS="1", MPLBACKEND="Agg", RUN_NICE="0")
    return kept | own | {k: str(v) for k, v in values.items()}


class Child:
    """One forked run: pid, output so far, exit code (128+n when signal n ended it)."""

    def __init__(self, pid: int, output: Path):
        self.pid, self.output, self.code = pid, output, None

    def poll(self):
        if self.code is None:
            self.code = _ask(op="poll", pid=self.pid)
        return self.code

    def wait(self, timeout: float = 120):
        end = time.time() + timeout
        while self.poll() is None:
            if time.time() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s:\n{self.text()[-3000:]}")
            time.sleep(0.02)
        return self.code

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for(self, pattern: str, timeout: float = 60) -> None:
        """Until its output matches."""
        end = time.time() + timeout
        while not re.search(pattern, self.text()):
            assert self.poll() is None and time.time() < end, f"no {pattern!r} in:\n{self.text()[-3000:]}"
            time.sleep(0.01)

    def errors(self) -> list[str]:
        """Lines of main's error reports."""
        return [line for line in self.text().splitlines() if line.startswith("train_jepa.py: ")]


@functools.cache
def _warm() -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}, cwd=ROOT)
    assert json.loads(process.stdout.readline()) == "ready"
    atexit.register(lambda: (process.stdin.close(), process.wait()))
    return process


_asking = threading.Lock()


def _ask(**request):
    with _asking:
        process = _warm()
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())


_count = iter(range(1, 1 << 30))


def launch(folder, patch: str = "", base: dict = TINY, **knobs) -> Child:
    """Start `main()` with RUNS_DIR=folder and the knobs of `base` and `knobs`, after the Python lines `patch`."""
    output = Path(folder) / f"output{next(_count)}.txt"
    env = {k: str(v) for k, v in (base | dict(RUNS_DIR=str(folder), RUN_ID="r") | knobs).items()}
    return Child(_ask(op="start", env=env, patch=patch, output=str(output)), output)


def run(folder, patch: str = "", base: dict = TINY, timeout: float = 120, **knobs) -> Child:
    """`launch`, then wait; its curves are not drawn (a second of matplotlib)."""
    child = launch(folder, "no_curves()\n" + patch, base, **knobs)
    child.wait(timeout)
    return child


def run_ranks(folder, world: int, patch: str = "", base: dict = TINY, timeout: float = 180, **knobs) -> list[Child]:
    """The same on `world` ranks (gloo), without torchrun."""
    port = free_port()
    ranks = [launch(folder, "no_curves()\n" + patch, base, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world,
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **knobs) for rank in range(world)]
    for child in ranks:
        child.wait(timeout)
    return ranks


def write_shard(path: Path, tokens) -> None:
    """Tokens in the challenge's shard format: 256 int32 (magic, version, count, zeros), then uint16."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def metrics(path: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def losses_of(path: Path) -> list[float]:
    """All losses that a run wrote down, in order."""
    return [line[key] for line in metrics(path) for key in ("ce", "jepa", "anti", "val_loss")
            if line.get(key) is not None]


def final_state(path: Path) -> dict:
    """What two equal runs have in common to the bit: last checkpoint, metrics, artifact, scores."""
    import train_jepa
    found = {}
    if checkpoints := train_jepa.Checkpoints(path / "checkpoints", 2).paths():
        meta, tensors = train_jepa.read_tensors(checkpoints[0], "checkpoint")
        found |= {name: (tuple(t.shape), hashlib.sha256(t.numpy().tobytes()).hexdigest())
                  for name, t in tensors.items()}
        found |= {key: meta[key] for key in ("step", "position", "averaged", "fixed")}
    result = json.loads((path / "result.json").read_text())
    return found | {"metrics": metrics(path), "artifact": train_jepa.file_hash(path / "model.jepa")} | {
        key: result[key] for key in ("val_bpb", "roundtrip_val_bpb", "steps", "skipped_steps")}


# -- what a child can be told -------------------------------------------------------------------------------------
# (functions of the script; `tj` is train_jepa)

def no_curves() -> None:
    tj.plot_curves = lambda folder: None


def on_gpu(branches: bool = True) -> None:
    """The run takes this CPU for a GPU, and does all that it does there, but for Triton's kernels. branches: the model,
    too; torch.compile does not trace that."""
    from gpu_stand_in import OnGpu, torch

    class Runtime(tj.Runtime):
        def __init__(self, config):
            torch.cuda.is_available = lambda: True
            super().__init__(config)
            torch.cuda.is_available = lambda: False  # torch's own code shall know
            self.device = torch.device("cpu")

        def to_device(self, tensor):
            return tensor.as_subclass(OnGpu) if branches else tensor

    answers = dict(device_count=1, set_device=None, get_device_name="a CPU", current_device=0, is_bf16_supported=True,
                   synchronize=None, max_memory_allocated=1, get_device_properties=SimpleNamespace(total_memory=80e9))
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    if not branches:  # what a CPU can multiply is no question for torch.compile
        tj.matmul_dtype = lambda device_type: torch.float32
    tj.Runtime = Runtime


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal may reach another thread first


def die_after(seconds: float) -> None:
    """kill -9 that long after the loop has begun, wherever it is then."""
    train = tj.Run.train

    def begin(self):
        threading.Thread(target=lambda: (time.sleep(seconds), die()), daemon=True).start()
        train(self)
    tj.Run.train = begin


def die_in_save(moment: str, nth: int = 1) -> None:
    """kill -9 inside the nth write of a checkpoint: with half the file written, complete but not renamed, just
    renamed, or about to delete an old one."""
    left = [nth]
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink
    writing = lambda: "checkpoint" in threading.current_thread().name

    def mine(name: str) -> bool:
        if name == moment and writing():
            left[0] -= 1
            return left[0] == 0
        return False

    def sync(fd):
        if stat.S_ISREG(os.fstat(fd).st_mode) and mine("half"):
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            die()
        return fsync(fd)

    def rename(a, b):
        if mine("unnamed"):
            die()
        replace(a, b)
        if mine("renamed"):
            die()

    def delete(path, **options):
        if path.suffix == ".ckpt" and mine("pruning"):
            die()
        unlink(path, **options)
    os.fsync, os.replace, Path.unlink = sync, rename, delete


def clock_by_steps(seconds: float) -> None:
    """The training clock advances by so much per step and stands still otherwise."""
    reading, step = [0.0], tj.Trainer.train_step

    def train_step(self, at):
        reading[0] += seconds
        return step(self, at)
    tj.Trainer.train_step, tj.now = train_step, lambda: reading[0]


def before_step(number: int, action) -> None:
    """Call action(trainer) before optimizer step `number` (1 = the first)."""
    step = tj.Trainer.train_step

    def train_step(self, at):
        if at.step == number - 1:
            action(self)
        return step(self, at)
    tj.Trainer.train_step = train_step


def after_step(action) -> None:
    """Call action() after the first optimizer step of this process."""
    step = tj.Trainer.train_step

    def train_step(self, at):
        step(self, at)
        action()
    tj.Trainer.train_step = train_step


def full_disk(part: str, room: int = 0) -> None:
    """Writing to a file whose path contains `part` fails with ENOSPC after `room` bytes (of this process)."""
    import errno
    true, left = open, [room]

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *fault):
            self.file.close()

    def opened(path, *arguments, **options):
        file = true(path, *arguments, **options)
        return Full(file) if part in str(path) else file
    tj.open = opened


def file_limit(size: int) -> None:
    """From now on no file of this process may grow beyond `size` bytes (EFBIG)."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def weights_hash(trainer) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.weights.tensors().items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def hash_at_end(folder: str) -> None:
    """Each rank writes the hash of its final masters into `folder`/hash.<rank>."""
    finish = tj.Run.finish

    def hashed(self):
        (Path(folder) / f"hash.{self.runtime.rank}").write_text(weights_hash(self.trainer))
        return finish(self)
    tj.Run.finish = hashed


def poison(steps, name: str, value: float = math.inf) -> None:
    """Entries of the summed gradient of parameter `name` have this value in these steps (a step that guard repeats,
    too): one for infinity, else all."""
    accumulate = tj.Trainer.accumulate

    def poisoned(self, step, at, **keep):
        parts = accumulate(self, step, at, **keep)
        if step + 1 in steps and self.started:
            for group in self.weights.groups:
                if name in group.names:
                    entries = group.grad[group.names.index(name)].view(-1)
                    entries[:1 if math.isinf(value) else None] = value
        return parts
    tj.Trainer.accumulate, tj.Trainer.started = poisoned, False
    train = tj.Run.train

    def begin(self):
        self.trainer.started = True
        train(self)
    tj.Run.train = begin


def each(settings: list[dict], report: str, memory: int, seconds: int = 20) -> None:
    """Run `main()` with each of the settings on top of this child's environment, in a fork of its own, and write
    [exit code, seconds of CPU, bytes of memory, text] as lines of JSON to `report`. The program believes that the
    machine has `memory` bytes; it gets four times as many, and so many seconds of CPU."""
    import resource
    tj.machine_memory, os.fsync = lambda cuda: memory, lambda fd: None
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    output = Path(report).with_suffix(".out")
    for values in settings:
        if pid := os.fork():
            status, usage = os.wait4(pid, 0)[1:]
            outcome = [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024,
                       output.read_text(errors="replace")]
            with open(report, "a") as file:
                file.write(json.dumps(outcome) + "\n")
            continue
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        resource.setrlimit(resource.RLIMIT_AS, (size + 4 * memory,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds,) * 2)
        os.environ.update(values)
        leave(tj.main([]))
    leave(0)


def _serve():
    """Forks a child per request; returns, in the child only, what it shall do."""
    children = set()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "poll":
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            if pid:
                children.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                answer = code if code >= 0 else 128 - code
            else:
                answer = None
        else:
            answer = os.fork()
            if answer == 0:
                return request
            children.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    return None


def leave(code: int) -> None:
    """sys.exit, except that the interpreter is not taken apart, which takes longer than a tiny run."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import torch._dynamo  # noqa: F401  (torch.optim imports it in every run: two thirds of a tiny run's time)

    import train_jepa as tj
    if os.environ.get("HARNESS_PATCH"):  # a rank of torchrun: no fork, the lines come by the environment
        exec(os.environ["HARNESS_PATCH"])
        leave(tj.main([]))
    gc.collect()
    gc.freeze()  # children neither walk nor free what they share with this process
    job = _serve()
    if job is None:
        sys.exit(0)
    os.setsid()
    out = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for knob_name in (*tj.Config.knobs(), *RANK_NAMES):
        os.environ.pop(knob_name, None)
    os.environ.update(job["env"])
    exec(job["patch"])
    leave(tj.main([]))

"""The stages of tools/gpu_check.sh; each runs in a process of its own, so that one that fails or hangs
does not end the others. TINY=1: smallest sizes, on a CPU in Triton's interpreter."""
from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT, TINY = Path(os.environ.get("OUT", "gpu_check")), os.environ.get("TINY") == "1"
# Parts, their stages, and the seconds after which a stage is ended: a part fits into ten minutes.
PARTS = {"correct": {"kernels": 120, "tests": 300, "parity": 150},
         "bench": {"ceilings": 50, "scans": 80, "mlps": 60, "bench_bpe": 130, "bench_byte": 120, "bench_b": 120},
         "run": {"train": 360, "eval": 200},
         "best": {"bench_best": 130, "train_best": 300, "eval_best": 120, "eval_speed": 60}}
PUBLISHED_MS = {"run_jepa_bpe.sh": 97.4, "run_jepa_byte.sh": 105}  # a step of 65,536 tokens per GPU
# Least ms of a BPE step's parts: products at 800 TFLOP/s, the rest by the bytes that must move at 2.8 TB/s
FLOOR_MS = {"products": 22.5, "mixer": 3.0, "snap": 0.1, "other": 0.5}
SMALL = dict(TOKENIZER="byte", MODEL_DIM=64, NUM_LAYERS=2, EXPAND=1, D_STATE=16, MLP_MULT=2, EMBED_DIM=32,
             TIE_EMBEDDINGS=1, JEPA_STEPS=2, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=64, MICRO_BATCHES=2,
             WARMUP_STEPS=0, QUANT_BITS=4, FP_STORAGE="FP8", SIGREG_NUM_PROJ=8)


def note(**row) -> None:
    """One result: a line for the reader and one for programs, at once."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    with (OUT / "gpu_check.jsonl").open("a") as journal:
        journal.write(json.dumps(row) + "\n")


def library():
    """torch and train_jepa, where the stage needs them."""
    sys.path.insert(0, str(ROOT))
    import torch

    import train_jepa
    return torch, train_jepa


def device() -> str:
    return "cpu" if TINY else "cuda"


def configuration(tj, **knobs):
    return tj.Config.from_env({name: str(value) for name, value in (SMALL | knobs).items()}).validate()


def kernels() -> None:
    """Each row of the self-check, in each dtype."""
    torch, tj = library()
    for dtype, chunk in ((torch.float32, 16),) if TINY else ((torch.float32, 16), (torch.bfloat16, 64)):
        c = configuration(tj, SSD_KERNEL="fused", SSD_CHUNK=chunk, D_STATE=16 if TINY else 64)
        for name, row in tj.check_table(c, torch.device(device()), dtype).items():
            began = time.time()
            fault = tj.kernel_fault(row)
            note(stage="kernels", kernel=name, dtype=str(dtype), fault=fault or "none",
                 seconds=time.time() - began)


def tests() -> None:
    """pytest -m cuda, as far as pytest is there."""
    if importlib.util.find_spec("pytest") is None or TINY:
        note(stage="tests", result="skipped: " + ("needs a GPU" if TINY else "no pytest"))
        return
    command = "-m pytest -c tests/pytest.ini -q -m cuda tests/test_kernels.py tests/test_storage.py"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    (OUT / "tests.txt").write_text(done.stdout + done.stderr)
    note(stage="tests", result=(done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1])


def parity() -> None:
    """Five steps of one small model: CPU fp32, then the GPU in fp32 and in bf16, compiled."""
    torch, tj = library()
    exact, fused = dict(DTYPE="fp32", COMPILE_MODE="off"), dict(DEVICE=device(), SSD_KERNEL="fused", SSD_CHUNK=16)
    runs = {"cpu fp32": exact | dict(DEVICE="cpu", SSD_KERNEL="torch", KERNEL_CHECK=0), "gpu fp32": exact | fused}
    if TINY:
        runs["gpu compiled"] = fused | dict(DTYPE="fp32", COMPILE_MODE="aot_eager")
    else:
        runs["gpu mamba_ssm"] = exact | dict(DEVICE="cuda", SSD_KERNEL="mamba_ssm")
        runs["gpu compiled"] = fused | dict(DTYPE="bf16", SSD_CHUNK=64)
    sizes = {} if TINY else dict(MODEL_DIM=256, NUM_LAYERS=4, D_STATE=64, TRAIN_SEQ_LEN=256,
                                 TRAIN_BATCH_TOKENS=4096)
    reference = None
    for name, knobs in runs.items():
        try:
            c = configuration(tj, **sizes, **knobs)
            with tj.Runtime(c) as runtime:
                trainer = tj.Trainer(c, runtime, tj.SyntheticStream(c.vocab_size))
                trainer.run_phases()
                losses = [trainer.train_step(tj.Progress(step, 0.5, 100)).tolist() for step in range(2 if TINY else 5)]
            found = {key: t.float().cpu().clone() for key, t in trainer.weights.tensors().items()}
        except Exception as error:
            note(stage="parity", run=name, error=f"{type(error).__name__}: {error}"[:500])
            continue
        reference = reference or (losses, found)
        moved = max(float((found[key] - w).norm() / w.norm().clamp(min=1e-3)) for key, w in reference[1].items())
        pairs = [pair for row, first in zip(losses, reference[0]) for pair in zip(row, first)]
        note(stage="parity", run=name, scan=trainer.kernels.name, notes=trainer.note or "none",
             loss_first=losses[0][0], loss_last=losses[-1][0], largest_weight_gap=moved,
             largest_loss_gap=max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs))


def timed(torch, work, repeats: int = 20) -> float:
    """Milliseconds of `work`, by CUDA's events where there is CUDA."""
    for _ in range(3):
        work()
    if TINY:
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / repeats


def ceilings() -> None:
    """Copy rate, and the rate of each product of the BPE step: forward, input gradient, weight gradient."""
    torch, _ = library()
    dtype, tokens, scale = (torch.float32, 64, 16) if TINY else (torch.bfloat16, 65536, 1)
    rand = lambda *shape: torch.randn(*shape, device=device(), dtype=dtype)
    x = torch.empty((1 << 30) // (scale << 6 if TINY else 1), dtype=torch.uint8, device=device())
    y = torch.empty_like(x)
    note(stage="ceilings", part="copy", tb_per_s=2 * x.numel() / timed(torch, lambda: y.copy_(x)) * 1e-9)
    total = 0.0
    for name, k, n, times in (("large", 8192, 8192, 0), ("in_proj", 640, 1424, 10), ("out_proj", 640, 640, 11),
                              ("up", 640, 2560, 5), ("down", 2560, 640, 5), ("embed", 336, 640, 1),
                              ("rev", 640, 336, 1), ("jepa fc", 640, 2560, 3), ("jepa out", 2560, 640, 3),
                              ("jepa proj", 640, 640, 3)):
        k, n, rows = k // scale, n // scale, tokens if times else 8192 // scale
        a, w, g = rand(rows, k), rand(n, k), rand(rows, n)
        ms = [timed(torch, functools.partial(torch.mm, *pair)) for pair in ((a, w.T), (g, w), (g.T, a))]
        total += times * sum(ms)
        note(stage="ceilings", part=f"{name} {k}x{n}", times=times, ms=ms,
             tflops=[2e-9 * rows * k * n / t for t in ms])
    note(stage="ceilings", part="all products but the head", ms=total)


def scans() -> None:
    """Convolution to norm, forward and backward: as one op, and with mamba-ssm's scan."""
    torch, tj = library()
    B, T, H, P, N, chunk = (1, 20, 1, 16, 16, 16) if TINY else (64, 1024, 10, 64, 64, 64)
    inner, channels = H * P, H * P + 2 * N
    dtype = torch.float32 if TINY else torch.bfloat16
    make = lambda *shape, dtype=torch.float32: torch.randn(*shape, device=device(), dtype=dtype)
    wide = make(B, T, inner + channels + H + 6, dtype=dtype)
    inputs = [wide, make(channels, 1, 4) * 0.5, make(channels), make(H) - 3, make(H)]
    inputs = [t.requires_grad_() for t in (*inputs, make(H), make(inner))]
    forms = {name: tj.FORMS[name] for name in ("fused", "torch" if TINY else "mamba_ssm")}
    reference = None
    for name, form in forms.items():
        run = functools.partial(form.mix, *inputs, chunk=min(form.chunk, chunk) if TINY else form.chunk)
        try:
            began = time.time()
            out = run()[0]
            upstream = torch.ones_like(out)
            grads = torch.autograd.grad(out, inputs, upstream)
            first = time.time() - began
            found = [out, *grads]
            reference = reference or found
            gap = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, reference))
            with torch.no_grad():
                forward = timed(torch, run)
            both = timed(torch, lambda run=run, to=upstream: torch.autograd.grad(run()[0], inputs, to))
            note(stage="scans", form=name, ms_forward=forward, ms_both=both, first_call_s=first, gap_to_first=gap)
        except Exception as error:
            note(stage="scans", form=name, error=f"{type(error).__name__}: {error}"[:500])


def mlps() -> None:
    """An MLP, forward and backward, compiled: the activation within its products, and apart."""
    torch, tj = library()
    rows, dtype = (40, torch.float32) if TINY else (65536, torch.bfloat16)
    for name, width, mult, activation, norm in (("bpe", 640, 4, "relu2", 1), ("best", 512, 3, "leaky_relu2", 1),
                                                ("bytejepa", 512, 2, "relu2", 0)):
        c = configuration(tj, MODEL_DIM=64 if TINY else width, MLP_MULT=mult, ACTIVATION=activation, MLP_NORM=norm)
        x = torch.randn(rows, c.model_dim, device=device(), dtype=dtype, requires_grad=True)
        reference = None
        for form in ("torch", "fused"):
            torch.manual_seed(0)
            mlp = tj.MLP(c, tj.Kernels(mlp=form == "fused"))
            torch.nn.init.normal_(mlp.down.weight, std=0.02)
            mlp.to(x.device, dtype)
            forward = mlp if TINY else torch.compile(mlp)
            leaves, upstream = [x, *mlp.parameters()], torch.ones_like(x)
            both = lambda run=forward, leaves=leaves, to=upstream: torch.autograd.grad(run(leaves[0]), leaves, to)
            found = both()
            reference = reference or found
            gap = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, reference))
            note(stage="mlps", model=name, form=form, ms=timed(torch, both), gap_to_first=gap)


def script(name: str, **knobs) -> subprocess.CompletedProcess:
    """A run script; its stdout and stderr go to a file as well."""
    tiny = dict(PROFILE="cpu", DEVICE="cpu", COMPILE_MODE="off", ITERATIONS=2, NPROC_PER_NODE=1, MODEL_DIM=64,
                NUM_LAYERS=2, EXPAND=1, D_STATE=16, MLP_MULT=2, SSD_CHUNK=16, TRAIN_SEQ_LEN=32,
                TRAIN_BATCH_TOKENS=64, MICRO_BATCHES=2, WARMUP_STEPS=0, SLIDING_EVAL_STRIDE=16, VAL_LOSS_EVERY=0)
    if "bytejepa" in name:
        tiny |= dict(NUM_HEADS=2, NUM_KV_HEADS=1)
    given = [f"{key}={value}" for key, value in ((tiny if TINY else {}) | knobs).items()]
    done = subprocess.run(["bash", name, *given], cwd=ROOT, capture_output=True, text=True)
    (OUT / f"{knobs['MODE']}_{name}.txt").write_text(done.stdout + done.stderr)
    return done


# By preset: the end of its stages' names, and what --tiny adds so that best has the parts of its full-size form.
SUFFIX = dict(published="", best="_best")
SHRUNK = dict(published={}, best=dict(
    MIXER="ma", NUM_HEADS=2, NUM_KV_HEADS=1, CARRY_STATE=0, QUANT_STEP="sigma", QUANT_K=0.4, DT_GRID="int8a",
    EMBED_GRID="int7", ROUNDING="compensated", ROUNDING_TOKENS=256, QAT_FRACTION=0, ADAPT_CHUNK_TOKENS=64))


def bench(name: str, preset: str = "published") -> None:
    """MODE=bench of a configuration, one H100's share of a step; the tables of the log and the JSON line."""
    share = dict(PROFILE="gpu", TRAIN_BATCH_TOKENS=65536, MICRO_BATCHES=1, ITERATIONS=40, NPROC_PER_NODE=1)
    share = (SHRUNK[preset] if TINY else share) | dict(PRESET=preset)
    done = script(name, MODE="bench", **share)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        note(stage="bench", script=name, preset=preset, error=(done.stderr or done.stdout)[-500:])
        return
    report = json.loads(lines[-1])
    sizes = json.loads(script(name, MODE="describe", **share).stdout.splitlines()[-1])
    # forward and backward multiply each parameter three times; attention, scan and lookups left out
    floor = 6e3 * (sizes["eval_params"] + sizes["train_only_params"]) * report["tokens_per_step"] / 800e12
    note(stage="bench", script=name, preset=preset,
         published_ms_on_h100=PUBLISHED_MS.get(name) if preset == "published" else None,
         products_ms_at_800_tflops=floor, **report)
    for kind, ms in report.get("kernel_ms", {}).items():
        note(stage="budget", script=name, preset=preset, part=kind, ms=ms,
             floor_ms=FLOOR_MS.get(kind) if (name, preset) == ("run_jepa_bpe.sh", "published") else None)


def train(preset: str = "published") -> None:
    """A short training on the demo corpus to its artifact."""
    stage, run = f"train{SUFFIX[preset]}", f"gpu_check{SUFFIX[preset]}"
    knobs = dict(PROFILE="gpu", DATA_PATH="data/datasets/demo_sp8192", NPROC_PER_NODE=1,
                 TOKENIZER_PATH="data/demo/fineweb_8192_bpe.model", TRAIN_BATCH_TOKENS=65536, MICRO_BATCHES=1,
                 ITERATIONS=200, MAX_WALLCLOCK_SECONDS=120, VAL_LOSS_EVERY=100)
    if TINY:
        knobs = dict(DATA_PATH="data/datasets/demo_bytes", VAL_MAX_TOKENS=256, VAL_BATCH_SIZE=256, DIAGNOSTICS=0,
                     SLIDING_EVAL=0, TEMP_SCALING=0) | SHRUNK[preset]
    name = "run_jepa_byte.sh" if TINY else "run_jepa_bpe.sh"
    done = script(name, MODE="train", PRESET=preset, RUNS_DIR=OUT.resolve(), RUN_ID=run, OVERWRITE=1, **knobs)
    result = OUT / run / "result.json"
    if done.returncode or not result.exists():
        note(stage=stage, error=(done.stderr or done.stdout)[-500:])
        return
    report = json.loads(result.read_text())
    note(stage=stage, **{key: report.get(key) for key in ("steps", "roundtrip_val_bpb", "ms_per_step", "total_bytes",
                                                          "peak_memory_bytes", "eval_seconds")})


def evaluate(preset: str = "published") -> None:
    """MODE=eval of that artifact: the scores of the training's end again."""
    stage, run = f"eval{SUFFIX[preset]}", f"gpu_check{SUFFIX[preset]}"
    name, data = ("run_jepa_byte.sh", "demo_bytes") if TINY else ("run_jepa_bpe.sh", "demo_sp8192")
    tiny = dict(VAL_MAX_TOKENS=256, VAL_BATCH_SIZE=256, SLIDING_EVAL=0, TEMP_SCALING=0)
    sizes = tiny | SHRUNK[preset] if TINY else dict(PROFILE="gpu")
    done = script(name, MODE="eval", PRESET=preset, ARTIFACT=(OUT / run / "model.jepa").resolve(), NPROC_PER_NODE=1,
                  DATA_PATH=f"data/datasets/{data}", **sizes)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    note(stage=stage, **({"error": (done.stderr or done.stdout)[-500:]} if done.returncode or not lines else
                          {key: value for key, value in json.loads(lines[-1]).items() if "val" in key}))


FINEWEB_TOKENS = 40.5e6  # BPE pieces of the validation set


def eval_speed() -> None:
    """Milliseconds of a piece of carried scoring and of a step of EVAL_ADAPT, by the model of train_best, and what the
    adapted pass over FineWeb's validation set would take on one GPU; eight share the steps, not the pieces."""
    torch, tj = library()
    run = OUT / f"gpu_check{SUFFIX['best']}"
    knobs = {name.lower(): value for name, value in json.loads((run / "config.json").read_text()).items()}
    given = tj.Config(**knobs | dict(mode="eval", artifact=str(run / "model.jepa"), tokenizer_path=""))
    with tj.Runtime(given) as runtime:
        c, model, vocabulary, _ = tj.open_artifact(given, runtime)
        forward = tj.compiled(model, c.compile_mode) if runtime.cuda else model
        length, later, chunk = c.train_seq_len, c.train_seq_len - c.overlap, c.adapt_chunk_tokens

        def seconds(targets: int, adapted: bool) -> float:
            tokens = torch.randint(1, c.vocab_size, (targets + 1,), generator=torch.Generator().manual_seed(0))
            scorer = tj.Evaluator(model, tokens, vocabulary, length, length, runtime, forward)
            began = time.time()
            scorer.adapted(c) if adapted else scorer.carried(overlap=c.overlap)
            return time.time() - began

        pieces, steps = (10, 2) if TINY else (100, 4)
        text = length + later * pieces, chunk * (steps + 1)
        seconds(text[0], False), seconds(text[1], True)  # the first time compiles
        piece = 1e3 * seconds(text[0], False) / (pieces + 1)
        step = (1e3 * seconds(text[1], True) - piece * text[1] / later) / steps
        whole = FINEWEB_TOKENS * (piece / later + step / chunk) / 1e3
        note(stage="eval_speed", ms_per_piece=piece, piece_tokens=later, ms_per_step=step, chunk_tokens=chunk,
             adapted_fineweb_seconds_on_one_gpu=whole)


STAGES = dict(kernels=kernels, tests=tests, parity=parity, ceilings=ceilings, scans=scans, mlps=mlps,
              bench_bpe=lambda: bench("run_jepa_bpe.sh"), bench_byte=lambda: bench("run_jepa_byte.sh"),
              bench_b=lambda: bench("run_bytejepa.sh"), train=train, eval=evaluate,
              bench_best=lambda: bench("run_jepa_bpe.sh", "best"), train_best=lambda: train("best"),
              eval_best=lambda: evaluate("best"), eval_speed=eval_speed)


def main(arguments: list[str]) -> int:
    if arguments[0] == "stage":
        STAGES[arguments[1]]()
        return 0
    failed = []
    for part, stages in PARTS.items():
        for stage, limit in stages.items() if arguments[0] == "all" or part in arguments else ():
            began, reason = time.time(), ""
            try:
                done = subprocess.run([sys.executable, __file__, "stage", stage], stderr=subprocess.PIPE, text=True,
                                      timeout=None if TINY else limit)
                reason = done.stderr[-800:] if done.returncode else ""
            except subprocess.TimeoutExpired:
                reason = f"ended after {limit} s"
            note(stage=stage, seconds=time.time() - began, failed=reason or "no")
            failed += [stage] if reason else []
    print(f"{len(failed)} stages failed: {failed}; results in {OUT / 'gpu_check.jsonl'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["all"]))

"""Train, store, reload, score: as a user does it, in processes of their own; bad input; compilation."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import harness
import numpy as np
import pytest
from harness import SYSTEM_B, TINY, losses_of, run

import train_jepa as tj

KEYS = """steps train_seconds ms_per_step tokens_per_second val_loss val_bpb roundtrip_val_bpb temperature
 tempered_val_bpb sliding_val_bpb sliding_stride artifact_bytes code_bytes total_bytes fits codec codec_bytes
 eval_params train_only_params world_size seed device eval_seconds diagnostics""".split()
SCORES = ("roundtrip_val_bpb", "tempered_val_bpb", "sliding_val_bpb", "temperature")


@pytest.fixture(autouse=True)
def _data(demo_data):
    pass


def command(folder: Path, *arguments: str, script: Path | None = None, timeout: float = 300, **knobs):
    """`python train_jepa.py ...` with nothing of ours in the environment but `knobs`."""
    return subprocess.run([sys.executable, str(script or harness.ROOT / "train_jepa.py"), *arguments], cwd=folder,
                          text=True, capture_output=True, timeout=timeout, env=harness.plain_environment(**knobs))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_data):
    """A finished run of system A with every way of scoring, started as a user would."""
    folder = tmp_path_factory.mktemp("trained")
    knobs = TINY | dict(RUNS_DIR=folder, RUN_ID="r", ITERATIONS=6, VAL_LOSS_EVERY=3, TEMP_SCALING=1, SLIDING_EVAL=1,
                        SLIDING_EVAL_STRIDE=8, DIAGNOSTICS=1, PROBE_STEPS=2, VAL_MAX_TOKENS=1000)
    done = command(folder, **knobs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "r", done


@pytest.mark.slow
def test_every_file_and_every_key_of_a_run(trained):
    path, done = trained
    names = {p.name for p in path.iterdir()}
    assert names >= {"log.txt", "metrics.jsonl", "config.json", "model.jepa", "result.json", "curves.png"}
    assert not [name for name in names if "tmp" in name]
    result = json.loads((path / "result.json").read_text())
    assert not [key for key in KEYS if key not in result]
    assert result["steps"] == 6 and result["sliding_stride"] == 8 and result["world_size"] == 1 and result["seed"] == 7
    assert result["artifact_bytes"] == (path / "model.jepa").stat().st_size
    assert result["code_bytes"] == len(tj.shipped_script((harness.ROOT / "train_jepa.py").read_text()))
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"] and result["fits"] is True
    assert result["codec"] in result["codec_bytes"] and all(size > 0 for size in result["codec_bytes"].values())
    assert all(math.isfinite(result[key]) for key in (*SCORES, "val_loss", "val_bpb", "ms_per_step", "eval_seconds"))
    config = json.loads((path / "config.json").read_text())
    assert config["MODEL_DIM"] == 64 and set(config) == set(tj.Config.knobs())
    assert (path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_log_opens_with_source_versions_hardware_and_configuration(trained):
    path, done = trained
    log = (path / "log.txt").read_text()
    source = (harness.ROOT / "train_jepa.py").read_text()
    assert log.startswith(source)
    assert re.search(r"sha256 [0-9a-f]{64}", log) and re.search(r"machine: .*torch", log)
    assert re.search(r"(?m)^  MODEL_DIM +64 +512 +environment$", log)
    assert re.search(r"(?m)^  D_CONV +4 +4 +default$", log)
    for pattern in (r"step:1 0% ce:", r"step:3 val_loss:[\d.]+ val_bpb:", "artifact: ", "roundtrip ",
                    "sliding stride:8", "size: .*FITS", "done: "):
        assert re.search("(?m)^" + pattern, log) and re.search("(?m)^" + pattern, done.stdout), pattern
    assert max(map(len, done.stdout.splitlines())) < 2500 and "\r" not in done.stdout + done.stderr
    kinds = [(line["kind"], line["step"]) for line in harness.metrics(path)]
    assert kinds == [("validation", 0), ("train", 1), ("train", 2), ("train", 3), ("validation", 3), ("train", 4),
                     ("train", 5), ("train", 6), ("validation", 6)]


# what MODE=eval must be told to score as `trained` did: the same sums in the same order
ALONE = {name: TINY[name] for name in (*tj.Config.tagged("eval"), "DATA_PATH", "DEVICE") if name in TINY} | dict(
    VAL_MAX_TOKENS=1000, SLIDING_EVAL=1, SLIDING_EVAL_STRIDE=8)


@pytest.mark.slow
def test_artifact_and_script_alone_in_an_empty_folder_give_the_same_bpb(trained, tmp_path):
    path, done_training = trained
    shutil.copy(path / "model.jepa", tmp_path)
    shutil.copy(harness.ROOT / "train_jepa.py", tmp_path)
    done = command(tmp_path, "MODE=eval", "ARTIFACT=model.jepa", script=tmp_path / "train_jepa.py", **ALONE)
    assert done.returncode == 0, done.stderr[-2000:]
    report, result = json.loads(done.stdout.splitlines()[-1]), json.loads((path / "result.json").read_text())
    for key in SCORES:
        assert report[key] == result[key], key  # same code, same batches, same machine
    printed = lambda text: re.findall(r"(?m)^(?:roundtrip|tempered|sliding) .*", text)
    assert printed(done.stdout) == printed(done_training.stdout)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["model.jepa", "train_jepa.py"]


@pytest.mark.slow
def test_the_score_of_an_artifact_does_not_depend_on_what_else_is_set(trained, tmp_path):
    """Batches of other sizes add up in another order: 1e-6 in bits per byte, where 1e-7 is seen."""
    child = run(tmp_path, base=ALONE, MODE="eval", ARTIFACT=trained[0] / "model.jepa", SEED=99, VAL_BATCH_SIZE=777,
                SLIDING_BATCH_SIZE=30, MODEL_DIM=640, NUM_LAYERS=9, QUANT_BITS=6, MICRO_BATCHES=1, TIE_EMBEDDINGS=1,
                LOSS_SCHEDULE="staged")
    assert child.code == 0, child.text()[-2000:]
    report, result = json.loads(child.text().splitlines()[-1]), json.loads((trained[0] / "result.json").read_text())
    for key in SCORES:
        assert report[key] == pytest.approx(result[key], abs=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("base,knobs", [(TINY, {}), (TINY, dict(QAT_FRACTION=0, QUANT_BITS=6)), (SYSTEM_B, {}),
                                        (TINY, dict(QUANT_STEP="sigma", TIE_EMBEDDINGS=2, EMBED_DIM=32)),
                                        (TINY, dict(MLP_GRID="int4s0.4", DT_GRID="int8a", EMBED_GRID="int5"))],
                         ids=["A", "A_without_QAT", "B", "sigma_tie2", "grids_by_role"])
def test_round_trip_equals_evaluating_the_snapped_weights_in_memory(tmp_path, base, knobs):
    """The final masters (or averages), snapped in memory, are scored before the artifact is written."""
    patch = f"""
write = tj.Run.write_model
def first(self):
    self.trainer.weights.load("average", qat=True)
    Path({str(tmp_path / 'bpb')!r}).write_text(repr(self.evaluator.standard()[0].bpb))
    self.trainer.weights.load("average")
    return write(self)
tj.Run.write_model = first
"""
    child = run(tmp_path, patch, base, ITERATIONS=4, **knobs)
    assert child.code == 0, child.text()[-2000:]
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert result["roundtrip_val_bpb"] == pytest.approx(float((tmp_path / "bpb").read_text()), abs=1e-9)
    if not knobs and base is TINY:
        assert result["roundtrip_val_bpb"] != result["val_bpb"]


@pytest.mark.slow
def test_a_hybrid_pattern_trains_stores_reloads_and_scores(tmp_path):
    child = run(tmp_path, MIXER="ma", NUM_HEADS=4, NUM_KV_HEADS=2, ITERATIONS=4)
    assert child.code == 0, child.text()[-2000:]
    result = json.loads((tmp_path / "r/result.json").read_text())
    alone = run(tmp_path, MODE="eval", ARTIFACT=tmp_path / "r/model.jepa")
    assert json.loads(alone.text().splitlines()[-1])["roundtrip_val_bpb"] == result["roundtrip_val_bpb"]
    sampled = run(tmp_path, MODE="sample", ARTIFACT=tmp_path / "r/model.jepa", PROMPT="Hi", SAMPLE_TOKENS=5)
    assert sampled.code == 0 and sampled.text().startswith("Hi")


@pytest.mark.slow
def test_bpe_run_trains_reloads_and_scores_without_the_tokenizer(tmp_path, demo_data):
    knobs = dict(TOKENIZER="bpe", VOCAB_SIZE=8192, DATA_PATH=demo_data.bpe, EMBED_DIM=32, TIE_EMBEDDINGS=1,
                 ITERATIONS=2, VAL_MAX_TOKENS=640)
    child = run(tmp_path, TOKENIZER_PATH=demo_data.tokenizer, **knobs)
    assert child.code == 0, child.text()[-2000:]
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert 0.25 < result["val_bpb"] / result["val_loss"] < 0.5
    alone = run(tmp_path, MODE="eval", ARTIFACT=tmp_path / "r/model.jepa", DATA_PATH=demo_data.bpe, VAL_MAX_TOKENS=640)
    report = json.loads(alone.text().splitlines()[-1])
    assert report["roundtrip_val_bpb"] == pytest.approx(result["roundtrip_val_bpb"], abs=1e-9)


# -- bad input ----------------------------------------------------------------------------------------------------

def shards(folder: Path, train=None, val=None) -> Path:
    folder.mkdir()
    for part, tokens in (("train", train), ("val", val)):
        harness.write_shard(folder / f"fineweb_{part}_000000.bin", np.full(5000, 65) if tokens is None else tokens)
    return folder


def spoil(folder: Path, part: str, how) -> Path:
    path = folder / f"fineweb_{part}_000000.bin"
    data = bytearray(path.read_bytes())
    path.write_bytes(how(data) or data)
    return folder


def bad_inputs(tmp: Path, demo) -> dict:
    bpe = dict(TOKENIZER="bpe", VOCAB_SIZE=8192, DATA_PATH=demo.bpe, TOKENIZER_PATH=demo.tokenizer)
    empty = tmp / "empty"
    empty.mkdir()
    no_val = shards(tmp / "noval")
    (no_val / "fineweb_val_000000.bin").unlink()
    data = lambda name, how, part="train": dict(DATA_PATH=spoil(shards(tmp / name), part, how))
    return {
        "no folder": (dict(DATA_PATH=tmp / "none"), "fineweb_(train|val)_.*(would do|setup_jepa.sh)"),
        "empty folder": (dict(DATA_PATH=empty), "DATA_PATH"),
        "no validation": (dict(DATA_PATH=no_val), "fineweb_val_"),
        "truncated shard": (data("cut", lambda d: d[:-7]), "promises 5000 tokens"),
        "truncated header": (data("head", lambda d: d[:100], "val"), "not a token shard"),
        "foreign shard": (data("text", lambda d: b"Once upon a time " * 200), "not a token shard"),
        "other version": (data("v", lambda d: d[:4] + b"\7" + d[5:]), "not a token shard of version 1"),
        "token too large": (dict(DATA_PATH=shards(tmp / "big", val=np.full(5000, 300))), "300.*VOCAB_SIZE=256"),
        "training token": (dict(DATA_PATH=shards(tmp / "big2", train=np.full(5000, 256))), "256.*VOCAB_SIZE=256"),
        "too little": (dict(DATA_PATH=shards(tmp / "few", val=np.full(20, 65))), "do not fill one sequence"),
        "no tokenizer": (bpe | dict(TOKENIZER_PATH=""), "TOKENIZER_PATH"),
        "tokenizer missing": (bpe | dict(TOKENIZER_PATH=tmp / "no.model"), "no.model"),
        "tokenizer no model": (bpe | dict(TOKENIZER_PATH=harness.__file__), "not a SentencePiece model"),
        "other vocabulary": (bpe | dict(VOCAB_SIZE=4096), "8192 pieces, but VOCAB_SIZE=4096"),
        "indivisible batch": (dict(TRAIN_BATCH_TOKENS=250), "TRAIN_BATCH_TOKENS=250.*64"),
        "d_inner": (dict(MODEL_DIM=72), "EXPAND.MODEL_DIM=72.*64"),
        "QUANT_BITS": (dict(QUANT_BITS=3), "QUANT_BITS=3"),
        "misspelled": (dict(JEPA_WIEGHT=1), "JEPA_WIEGHT.*JEPA_WEIGHT"),
        "no number": (dict(MATRIX_LR="fast"), "MATRIX_LR=fast"),
    }


NAMES = ["no folder", "empty folder", "no validation", "truncated shard", "truncated header", "foreign shard",
         "other version", "token too large", "training token", "too little", "no tokenizer", "tokenizer missing",
         "tokenizer no model", "other vocabulary", "indivisible batch", "d_inner", "QUANT_BITS", "misspelled",
         "no number"]


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_line_exit_code_2_and_no_run_folder(tmp_path, demo_data, name):
    cases = bad_inputs(tmp_path, demo_data)
    assert sorted(cases) == sorted(NAMES)
    knobs, pattern = cases[name]
    child = run(tmp_path, **knobs)
    assert child.code == 2, child.text()[-1500:]
    assert len(child.errors()) == 1 and re.search(pattern, child.errors()[0]), child.text()[-1500:]
    assert "Traceback" not in child.text() and not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, demo_data):
    folder = tmp_path_factory.mktemp("artifact")
    assert run(folder, ITERATIONS=1).code == 0
    return (folder / "r/model.jepa").read_bytes()


def of_another_model(tmp: Path, data: bytes, layers: int = 3) -> bytes:
    """The header says NUM_LAYERS=3, the tensors are of two layers; a right checksum."""
    (tmp / "a.jepa").write_bytes(data)
    meta, sections = _read(tmp / "a.jepa")
    meta["config"]["model"]["NUM_LAYERS"] = layers
    tj.write_container(tmp / "a.jepa", meta.pop("__kind__"), meta, sections)
    return (tmp / "a.jepa").read_bytes()


def _read(path: Path):
    import zlib
    data = path.read_bytes()
    stored = tj.PREFIX.unpack(data[:tj.PREFIX.size])[2]
    kind = json.loads(zlib.decompress(data[tj.PREFIX.size:tj.PREFIX.size + stored]))["kind"]
    meta, sections = tj.read_container(path, kind)
    return meta | {"__kind__": kind}, sections


@pytest.mark.parametrize("how,pattern", [("cut", "checksum"), ("flipped", "checksum"), ("empty", "damaged or foreign"),
                                         ("text", "does not begin with JEPAFILE"), ("endless", "NUM_LAYERS"),
                                         ("another", "tensors are not those|another model"),
                                         ("missing", "No such file")])
@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_a_bad_artifact_is_one_line_and_exit_code_2(tmp_path, artifact, mode, how, pattern):
    path, data = tmp_path / "model.jepa", artifact
    if how != "missing":
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        path.write_bytes({"cut": lambda: data[:-100], "flipped": lambda: bytes(flipped), "empty": lambda: b"",
                          "text": lambda: b"hello " * 100, "another": lambda: of_another_model(tmp_path, data),
                          "endless": lambda: of_another_model(tmp_path, data, 10**19)}[how]())
    child = run(tmp_path, MODE=mode, ARTIFACT=path)
    assert child.code == 2 and len(child.errors()) == 1 and re.search(pattern, child.errors()[0]), child.text()[-1500:]
    assert "Traceback" not in child.text() and not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, dict(CARRY_STATE=1)], ids=["plain", "carried"])
def test_bench_times_every_part_of_a_step_and_leaves_no_folder(tmp_path, knobs):
    child = run(tmp_path, MODE="bench", **knobs)
    assert child.code == 0 and not (tmp_path / "r").exists(), child.text()[-2000:]
    report = json.loads(child.text().splitlines()[-1])
    assert report["parts_ms"].keys() == {"snap", "data", "forward", "backward", "gradient sums", "optimizer"}
    assert all(ms > 0 for ms in report["parts_ms"].values())
    assert report["host_ms_per_step"] == report["ms_per_step"] > 0  # on a CPU the host does it all


def test_bench_on_a_gpu_says_that_no_profile_can_be_made_and_goes_on(tmp_path):
    child = run(tmp_path, "on_gpu()", MODE="bench", DEVICE="cuda", DTYPE="fp32", ITERATIONS=4)
    assert child.code == 0 and "kernels: no profile here (" in child.text(), child.text()[-2000:]
    report = json.loads(child.text().splitlines()[-1])
    assert "kernel_ms" not in report and 0 < report["host_ms_per_step"] <= 1.5 * report["ms_per_step"]


def test_kernels_of_a_profile_are_summed_by_kind():
    names = {"nvjet_tst_256x128_64x4_2x1": "products", "sm90_xmma_gemm_bf16bf16_bf16f32": "products",
             "ssd_scan": "mixer", "conv_bwd": "mixer", "gate_norm_bwd": "mixer", "_chunk_scan_fwd_kernel": "mixer",
             "head_rows": "head", "mlp_product": "MLP", "snap_rows": "snap", "triton_per_fused_add_mul_3": "generated",
             "triton_poi_fused_conv_1": "generated", "void pytorch_flash::flash_bwd_kernel": "attention",
             "Memcpy HtoD (Pinned -> Device)": "copies", "void multi_tensor_apply_kernel<FusedAdam>": "other"}
    report = tj.by_kind([(float(index + 1), name) for index, name in enumerate(names)])
    expected = dict.fromkeys(tj.KERNEL_KINDS, 0.0)
    for index, kind in enumerate(names.values()):
        expected[kind] += index + 1
    assert report["kernel_ms"] == expected
    assert report["largest_kernels"][0] == dict(kernel=list(names)[-1], ms=float(len(names)))
    assert len(report["largest_kernels"]) == 10


@pytest.mark.slow
def test_compensated_rounding_scores_the_same_from_its_file_and_stores_other_symbols(tmp_path):
    knobs = dict(QAT_FRACTION=0, ITERATIONS=6, ROUNDING_TOKENS=2048)
    results = []
    for rounding in ("nearest", "compensated"):
        child = run(tmp_path, RUN_ID=rounding, ROUNDING=rounding, **knobs)
        assert child.code == 0, child.text()[-2000:]
        results.append(json.loads((tmp_path / rounding / "result.json").read_text()))
    assert "rounding: 8 matrices compensated on 2,048 training tokens" in child.text()
    assert results[0]["val_bpb"] == results[1]["val_bpb"] and results[0]["roundtrip_val_bpb"] != \
        results[1]["roundtrip_val_bpb"]
    alone = run(tmp_path, MODE="eval", ARTIFACT=tmp_path / "compensated/model.jepa")
    assert json.loads(alone.text().splitlines()[-1])["roundtrip_val_bpb"] == results[1]["roundtrip_val_bpb"]


@pytest.mark.slow
@pytest.mark.parametrize("rounding, share", (("compensated", 0.85), ("nearest", 1.1)))
def test_a_run_fits_its_steps_to_the_bytes_that_are_left(tmp_path, rounding, share):
    knobs = dict(QAT_FRACTION=0, ITERATIONS=6, QUANT_STEP="sigma", QUANT_K=0.4, DT_GRID="int8a", MODEL_DIM=128,
                 ROUNDING=rounding, ROUNDING_TOKENS=2048)
    child = run(tmp_path, RUN_ID="plain", **knobs)
    assert child.code == 0, child.text()[-2000:]
    plain = json.loads((tmp_path / "plain/result.json").read_text())
    spare = 5_000
    limit = plain["code_bytes"] + int(share * plain["artifact_bytes"]) + spare
    child = run(tmp_path, f"tj.SIZE_LIMIT, tj.SIZE_SPARE = {limit}, {spare}", RUN_ID="fitted", QUANT_FIT=1, **knobs)
    assert child.code == 0, child.text()[-2000:]
    result = json.loads((tmp_path / "fitted/result.json").read_text())
    assert result["fits"] and abs(limit - spare - result["total_bytes"]) < 0.01 * plain["artifact_bytes"]
    assert plain["step_factor"] == 1 and (result["step_factor"] > 1) is (share < 1)
    assert f"storage: σ steps times {result['step_factor']:.4g}, to leave 5,000 bytes free" in child.text()
    assert result["val_bpb"] == plain["val_bpb"] and result["roundtrip_val_bpb"] != plain["roundtrip_val_bpb"]
    alone = run(tmp_path, MODE="eval", ARTIFACT=tmp_path / "fitted/model.jepa")
    assert json.loads(alone.text().splitlines()[-1])["roundtrip_val_bpb"] == result["roundtrip_val_bpb"]


@pytest.mark.slow
@pytest.mark.parametrize("base, knobs", [
    (TINY, dict(MIXER="ma", NUM_HEADS=4, NUM_KV_HEADS=2, ACTIVATION="leaky_relu2", EMBED_DIM=32, TIE_EMBEDDINGS=1,
                QAT_FRACTION=0, ROUNDING="compensated", ROUNDING_TOKENS=512, SWA_START=0.5, TEMP_SCALING=1)),
    (TINY, dict(CARRY_STATE=1, EVAL_STATE="carry", EVAL_ADAPT=1, ADAPT_CHUNK_TOKENS=600)),
    (SYSTEM_B, dict(SLIDING_EVAL=1, SLIDING_EVAL_STRIDE=8, DIAGNOSTICS=1, PROBE_STEPS=2))],
    ids=("hybrid", "carried", "B"))
def test_a_run_on_a_gpu_does_what_one_on_a_cpu_does(base, knobs, tmp_path):
    """All but Triton's kernels, on CPU tensors: batches, padded evaluation, moments, scores."""
    results, knobs = [], knobs | dict(ITERATIONS=4, CHECKPOINT_EVERY=2, DTYPE="fp32")
    for name, patch, device in (("cpu", "", "cpu"), ("gpu", "on_gpu()", "cuda")):
        child = run(tmp_path, patch, base, RUN_ID=name, DEVICE=device, **knobs)
        assert child.code == 0, child.text()[-2000:]
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    scores = [key for key, value in results[0].items() if key.endswith("bpb") and value is not None]
    assert len(scores) > 1 and max(abs(results[0][key] - results[1][key]) for key in scores) < 2e-3, results
    if base is TINY and "ROUNDING" in knobs:
        logs = [(tmp_path / name / "log.txt").read_text() for name in ("cpu", "gpu")]
        assert len({re.search(r"rounding: (\d+) matrices compensated", log)[1] for log in logs}) == 1


@pytest.mark.slow
def test_a_compiled_run_on_a_gpu_makes_one_graph_per_pass(tmp_path):
    """Training, Muon's halves and every way to score, compiled: a graph for sequences, for the first and for the later
    pieces of a text, whatever text it is, and for the gradients of test-time training."""
    knobs = dict(COMPILE_MODE="aot_eager", DTYPE="fp32", MIXER="ma", NUM_HEADS=4, NUM_KV_HEADS=2, ITERATIONS=2,
                 TRAIN_SEQ_LEN=128, WARMUP_STEPS=0, EVAL_STATE="carry", ATTENTION_OVERLAP=16, TEMP_SCALING=1,
                 VAL_BATCH_SIZE=2048, SLIDING_EVAL=1, SLIDING_EVAL_STRIDE=96, SLIDING_BATCH_SIZE=8, EVAL_ADAPT=1,
                 ADAPT_CHUNK_TOKENS=1024)
    counting = """
from torch._dynamo.utils import counters
atexit.register(lambda: print("graphs:", counters["stats"]["unique_graphs"]))"""
    child = run(tmp_path, "on_gpu(branches=False)" + counting, timeout=300, DEVICE="cuda", **knobs)
    assert child.code == 0, child.text()[-3000:]
    scoring = len("sequences, first piece, later pieces, gradients".split(", "))
    assert f"graphs: {1 + 2 + scoring}" in child.text()  # and the losses, and Muon's halves
    alone = run(tmp_path, "on_gpu(branches=False)" + counting, timeout=300, DEVICE="cuda", MODE="eval",
                ARTIFACT=tmp_path / "r/model.jepa", **knobs)
    assert alone.code == 0 and f"graphs: {scoring}" in alone.text(), alone.text()[-3000:]
    scores = [json.loads(line) for line in alone.text().splitlines() if line.startswith("{")][0]
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert {key: result[key] for key in scores if key.endswith("bpb")} == \
        {key: value for key, value in scores.items() if key.endswith("bpb")}


@pytest.mark.slow
def test_without_qat_the_storage_grid_can_still_be_chosen_after_the_training(tmp_path):
    knobs = dict(QAT_FRACTION=0, ITERATIONS=6, CHECKPOINT_EVERY=6)
    grids = dict(PROJ_GRID="int4s0.36", MLP_GRID="int4s0.46", EMBED_GRID="int6", QUANT_BITS=6)
    assert run(tmp_path, RUN_ID="plain", **knobs).code == 0
    assert run(tmp_path, RUN_ID="whole", **knobs, **grids).code == 0
    shutil.copytree(tmp_path / "plain", tmp_path / "again", ignore=shutil.ignore_patterns("result.json", "*.jepa"))
    assert run(tmp_path, RUN_ID="again", **knobs, **grids).code == 0
    plain, whole, again = ((tmp_path / name / "model.jepa").read_bytes() for name in ("plain", "whole", "again"))
    assert again == whole != plain


# -- compilation --------------------------------------------------------------------------------------------------

GRAPHS = """
import torch._dynamo as dynamo
from torch._dynamo.utils import counters
dynamo.config.error_on_recompile = False
train, facts = tj.Run.train, {}
def watched(self):
    facts["before"] = dict(counters["stats"])
    dynamo.config.error_on_recompile = True
    train(self)
    facts["after"] = dict(counters["stats"])
    facts["breaks"] = sum(counters["graph_break"].values())
    Path(os.environ["RUNS_DIR"], "graphs").write_text(json.dumps(facts))
tj.Run.train = watched
"""
CROSSING = {
    "A": (TINY, dict(QAT_FRACTION=0.4, SIGREG_SCHEDULE=1, SWA_START=0.5, JEPA_ANNEAL=0.6, CARRY_STATE=1,
                     VAL_LOSS_EVERY=5)),
    "B_staged": (SYSTEM_B, dict(VAL_LOSS_EVERY=4, QAT_FRACTION=0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CROSSING)
def test_one_graph_no_recompile_across_all_boundaries_and_the_losses_of_the_eager_run(tmp_path, name):
    """Everything is compiled before the first step. Losses to 1e-4 before QAT begins, then to 3e-3: a last bit moves a
    weight on a rounding edge by a whole step."""
    base, knobs = CROSSING[name]
    assert run(tmp_path, "", base, RUN_ID="eager", **knobs).code == 0
    child = run(tmp_path, GRAPHS, base, timeout=300, RUN_ID="compiled", COMPILE_MODE="aot_eager", **knobs)
    assert child.code == 0, child.text()[-3000:]
    facts = json.loads((tmp_path / "graphs").read_text())
    assert facts["breaks"] == 0 and facts["before"] == facts["after"], facts
    eager, compiled = (losses_of(tmp_path / run_id) for run_id in ("eager", "compiled"))
    assert len(eager) == len(compiled) > 12
    for a, b in zip(eager, compiled):
        assert abs(a - b) <= 3e-3 * max(abs(a), 0.1), (eager, compiled)
    assert all(abs(a - b) <= 1e-4 * max(abs(a), 0.1) for a, b in zip(eager[:12], compiled[:12])), (eager, compiled)


@pytest.mark.slow
def test_a_resumed_run_does_not_recompile_either(tmp_path):
    knobs = dict(CHECKPOINT_EVERY=3, CARRY_STATE=1, NUM_LAYERS=1)
    assert run(tmp_path, "before_step(5, lambda trainer: (time.sleep(0.5), die()))", **knobs).code == 137
    child = run(tmp_path, GRAPHS, timeout=300, COMPILE_MODE="aot_eager", **knobs)
    assert child.code == 0 and "resumed at step 3" in child.text(), child.text()[-3000:]
    facts = json.loads((tmp_path / "graphs").read_text())
    assert facts["before"] == facts["after"] and facts["breaks"] == 0


@pytest.mark.slow
def test_qat_changes_the_forward_pass_under_compile(tmp_path):
    """LR 0: the weights stand still, so any change of the loss on the same batch comes from the grid."""
    patch = """
tj.Batches.__call__ = (lambda call: lambda self, position, micro: call(self, 0, micro))(tj.Batches.__call__)
"""
    knobs = dict(MATRIX_LR=0, SCALAR_LR=0, EMBED_LR=0, HEAD_LR=0, QAT_FRACTION=0.5, SIGREG_LAMBDA=0, JEPA_STEPS=0,
                 WARMUP_STEPS=0, ITERATIONS=6, COMPILE_MODE="aot_eager", QUANT_BITS=4, NUM_LAYERS=1)
    child = run(tmp_path, patch, timeout=300, **knobs)
    assert child.code == 0, child.text()[-3000:]
    ce = [line["ce"] for line in harness.metrics(tmp_path / "r") if line["kind"] == "train"]
    assert ce[0] == ce[1] == ce[2] != ce[3] == ce[4] == ce[5]


def on_a_terminal(folder, *arguments, **knobs):
    """What a run prints on a pseudo-terminal, as text."""
    import pty
    env = harness.plain_environment(**harness.TINY | dict(RUNS_DIR=folder) | knobs)
    parent, child = pty.openpty()
    process = subprocess.Popen([sys.executable, tj.__file__, *arguments], stdout=child, stderr=child, env=env)
    os.close(child)
    text = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(parent, 65536):
            text += part
    os.close(parent)
    assert process.wait() == 0, text
    return text.decode().replace("\r\n", "\n")


@pytest.mark.slow
def test_on_a_terminal_reports_are_text_and_json_on_request(tmp_path, artifact):
    text = on_a_terminal(tmp_path, "MODE=describe")
    assert "FITS 16,000,000" in text.splitlines()[-1] and "\n  MODEL_DIM " in text and "\n  MLP_NORM " not in text
    assert "{" not in text and "MLP_NORM " in on_a_terminal(tmp_path, "MODE=describe", "ALL=1")
    path = tmp_path / "model.jepa"
    path.write_bytes(artifact)
    text = on_a_terminal(tmp_path, "MODE=eval", f"ARTIFACT={path}", "JSON=1")
    *_, summary, report = text.splitlines()
    assert summary.endswith(f"{json.loads(report)['roundtrip_val_bpb']:.4f} bits per byte")


@pytest.mark.parametrize("profile,gpu_here,rate", [
    ("gpu", False, 10), ("gpu", True, 10), ("cpu", False, 2.5), ("cpu", True, 2.5), ("auto", False, 2.5),
    ("auto", True, 10)])
def test_describe_assumes_the_steps_of_the_profile_and_not_of_the_host(monkeypatch, profile, gpu_here, rate):
    """Ten steps a second on a GPU, 2.5 on a CPU; the host decides only under PROFILE=auto."""
    config = tj.Config(profile=profile, max_wallclock_seconds=40, iterations=10_000, tokenizer="byte", vocab_size=256,
                       model_dim=64, num_layers=1, expand=1, mlp_mult=1, d_state=8).validate()
    monkeypatch.setattr(tj.torch.cuda, "is_available", lambda: gpu_here)
    scale, steps = tj.lr_scale, []
    monkeypatch.setattr(tj, "lr_scale", lambda progress, c: steps.append(progress.step) or scale(progress, c))
    assert tj.estimated_bytes(config) > 0
    assert steps == list(range(int(40 * rate)))


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_a_stride_longer_than_the_artifacts_sequences_is_shortened(tmp_path, artifact, mode):
    path = tmp_path / "model.jepa"
    path.write_bytes(artifact)
    child = run(tmp_path, MODE=mode, ARTIFACT=path, SLIDING_EVAL=1, SLIDING_EVAL_STRIDE=64, VAL_MAX_TOKENS=500)
    assert child.code == 0, child.text()
    assert mode == "sample" or f"sliding stride:{harness.TINY['TRAIN_SEQ_LEN']} " in child.text()


def test_messages_name_a_command_that_helps(tmp_path):
    """Shards beside the folder that has none; else the script that makes them."""
    child = run(tmp_path, DATA_PATH=tmp_path / "data/none")
    assert "bash run_jepa_byte.sh makes its shards" in child.errors()[0]
    (tmp_path / "data/other").mkdir(parents=True)
    harness.write_shard(tmp_path / "data/other/fineweb_val_000000.bin", range(9))
    assert f"{tmp_path}/data/other would do" in run(tmp_path, DATA_PATH=tmp_path / "data/none").errors()[0]
    for mode in ("eval", "sample"):
        assert f"bash run_jepa_bpe.sh MODE={mode} ARTIFACT=" in run(tmp_path, MODE=mode).errors()[0]

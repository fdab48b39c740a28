"""Data and scores of the long runs: `bash tools/experiments.sh horizon` calls this file.

    python tools/horizon.py data TEXT              data/datasets/horizon_bytes and horizon_docs
    python tools/horizon.py score RUN_FOLDER ...   scores.jsonl beside the run folders
    python tools/horizon.py store CHECKPOINT ...   storage.jsonl beside the run folders
    python tools/horizon.py curves FOLDER          validation.csv and curves.png there, from its runs

data   TEXT (plain or .xz) holds pieces separated by a line with one form feed. Technical
       documentation leaves the training text; about 200 kB of it are a text of a kind that no run
       has seen. A piece is documentation if its first line is no title and code-like words make up
       at least 1% of it; pieces in between (0.3% to 1%) are used for nothing.
score  Checkpoints of MILESTONES and the artifact, on three texts: the corpus' validation, Alice,
       the documentation. Of a checkpoint the masters are scored, and what its artifact would hold
       (plain rounding). A checkpoint before the last step is scored in the middle of its schedule,
       without a warmdown of its own. Scores that the file holds are not computed again.
store  The masters of a checkpoint on the grids of QUANT_GRIDS, rounded to the nearest symbol and by
       GPTQ with moments of 65,536 training tokens: bytes of the artifact, BPB on val and Alice.
curves Every validation during training, and what one choice changes at each step, by PAIRS.
"""
import csv
import dataclasses
import json
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import compare  # noqa: E402
import prepare_data  # noqa: E402
import torch  # noqa: E402

import train_jepa as jepa  # noqa: E402

DATASETS = ROOT / "data/datasets"
TEXTS = dict(val="horizon_bytes", alice="demo_bytes", docs="horizon_docs")
MILESTONES = (200, 1000, 3000, 10_000)
QUANT_GRIDS = ("int4", "int5", "int6", "int4s0.34", "int4s0.38", "int4s0.42", "int4s0.5")
SCORED_BYTES, DOCS_BYTES, DOCS_PIECE, PIECE = 200_000, 200_000, (1_000, 16_000), 1024
TECHNICAL = re.compile(
    r"\b(?:PostgreSQL|Python|Rust|Debian|SQL|Cargo|crate|trait|struct|API|Linux|files?|server|"
    r"default|module|functions?|table|object|returns?|value|type|code)\b|\w_\w|\w\(\)|::|\w\.\w+\(")


def kind_of(piece: str) -> str:
    """documentation, unclear or rest."""
    first, _, rest = piece.strip().partition("\n")
    titled = (len(first) <= 120 and first[-1] not in ".!?:;,\"”'’" and " : " not in first
              and (not rest or not rest.split("\n", 1)[0].strip()))
    density = len(TECHNICAL.findall(piece)) / len(piece.split())
    if titled:
        words = [word[:5] for word in re.findall(r"\w{3,}", first.lower())]
        known = not rest or 2 * sum(word in rest[:400].lower() for word in words) >= len(words)
        return "rest" if density < 0.003 or known else "unclear"
    return "documentation" if density >= 0.01 else "unclear" if density >= 0.003 else "rest"


def make_data(text: str) -> None:
    """Byte shards of the training corpus without documentation, and of the documentation."""
    pieces: dict[str, list[str]] = dict(documentation=[], unclear=[], rest=[])
    for piece in prepare_data.read_text(Path(text)).split("\f\n"):
        if piece.strip():
            pieces[kind_of(piece)].append(piece)
    low, high = DOCS_PIECE
    documents = [p for p in pieces["documentation"] if low <= len(p.encode()) <= high]
    random.Random(0).shuffle(documents)
    docs, length = [], 0
    while documents and length < DOCS_BYTES:
        docs.append(documents.pop())
        length += len(docs[-1].encode())
    rest = pieces["rest"]
    held_out = max(1, len(rest) // 50)
    cut = lambda part: prepare_data.cut_and_shuffle(part, PIECE)
    for name, part, texts in (("horizon_bytes", "train", cut(rest[held_out:])),
                              ("horizon_bytes", "val", cut(rest[:held_out])),
                              ("horizon_docs", "val", docs)):
        if texts:
            folder = DATASETS / name
            folder.mkdir(parents=True, exist_ok=True)
            tokens = prepare_data.np.concatenate([prepare_data.byte_document(t) for t in texts])
            prepare_data.write_shard(folder / f"fineweb_{part}_000000.bin", tokens)
            print(f"{name} {part}: {len(texts):,} documents, {len(tokens):,} values")


@torch.no_grad()
def models_of(path: Path, runtime: jepa.Runtime) -> tuple[jepa.Config, int | None, dict]:
    """Configuration, step and {weights: model} of a checkpoint or an artifact."""
    if path.suffix == ".jepa":
        asked = jepa.Config.from_env({}, [f"ARTIFACT={path}", "DEVICE=cpu", "COMPILE_MODE=off"])
        config, model, *_ = jepa.open_artifact(asked, runtime)
        return config, None, dict(artifact=model)
    meta, tensors = jepa.read_tensors(path, "checkpoint")
    known = jepa.Config.knobs()  # a checkpoint of an earlier version may have others
    config = jepa.Config(**{name.lower(): v for name, v in meta["config"].items() if name in known})
    prefix, models = "average/" if meta["averaged"] else "master/", {}
    for weights in ("master", "stored"):
        model = models[weights] = jepa.LanguageModel(config)
        plan = jepa.storage_plan(model, config)
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[prefix + name].reshape(parameter.shape))
            if weights == "stored":
                for out, w, grid in jepa.grid_pairs(parameter[None], parameter.clone()[None], plan[name]):
                    jepa.snap(w, grid, out=out)
    return config, meta["step"], models


def calibration(c: jepa.Config) -> torch.Tensor:
    """65,536 training tokens."""
    train = jepa.TokenStream(jepa.find_shards(str(DATASETS / "horizon_bytes"), "train"), c.vocab_size)
    return jepa.calibration_tokens(train, 0, c.train_seq_len)


def score(evaluator: jepa.Evaluator, c: jepa.Config, way: str) -> jepa.Score:
    """One of the ways of scoring a text."""
    if way == "sliding":
        return evaluator.sliding(256, 8)
    if way == "tempered":
        chooser = evaluator.on(calibration(c))
        return evaluator.standard([jepa.best_temperature(chooser.standard)])[0]
    if way == "adapted":
        c = dataclasses.replace(c, eval_state="carry", adapt_chunk_tokens=8192)
        return evaluator.adapted(c)
    return evaluator.standard()[0] if way == "reset" else evaluator.carried([1.0], c.overlap)[0]


def evaluator_of(model, c: jepa.Config, text: str, runtime: jepa.Runtime) -> jepa.Evaluator | None:
    """Of the first SCORED_BYTES of a text; None if there are no shards of it."""
    shards = sorted((DATASETS / TEXTS[text]).glob("fineweb_val_*.bin"))
    if not shards:
        return None
    stream, row = jepa.TokenStream(shards, c.vocab_size), c.train_seq_len
    tokens = stream.read(0, min(len(stream) - 1, SCORED_BYTES) // row * row + 1)
    return jepa.Evaluator(model, torch.from_numpy(tokens), jepa.byte_vocabulary(), row, 8 * row, runtime)


@torch.no_grad()
def store(path: Path, runtime: jepa.Runtime) -> None:
    """Lines of storage.jsonl for one checkpoint: its masters on each grid, rounded both ways."""
    config, step, models = models_of(path, runtime)
    model, out = models["master"], path.parents[2] / "storage.jsonl"
    masters = {name: w.clone() for name, w in model.named_parameters()}
    rows = calibration(config)[:-1].view(-1, config.train_seq_len)
    moments = jepa.input_moments(model, rows.split(8), lambda x: model(x, torch.float32)[0])
    evaluators = {text: evaluator_of(model, config, text, runtime) for text in ("val", "alice")}
    for grid in ("none", *QUANT_GRIDS):
        c = dataclasses.replace(config, storage="intn", mlp_grid=grid, proj_grid=grid, dt_grid="", embed_grid="")
        plan = jepa.storage_plan(model, c) if grid != "none" else {}
        tensors = jepa.artifact_tensors(((name, masters[name]) for name in plan), plan)
        for rounding in ("nearest", "compensated") if plan else ("none",):
            given, line = {}, dict(run=path.parents[1].name, step=step, grid=grid, rounding=rounding)
            if rounding == "compensated":
                given = jepa.compensated_arrays(tensors, moments)[0]
            stored = masters
            if plan:
                artifact = path.with_suffix(".jepa")
                line["bytes"] = jepa.write_artifact(artifact, {}, tensors, given=given)["bytes"]
                stored = jepa.whole_tensors(jepa.read_artifact(artifact)[1], artifact)
                artifact.unlink()
            for name, parameter in model.named_parameters():
                parameter.copy_(stored[name])
            line |= {text: evaluator.standard()[0].bpb for text, evaluator in evaluators.items()}
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def score_run(folder: Path, runtime: jepa.Runtime) -> None:
    """Lines of scores.jsonl for one run."""
    out = folder.parent / "scores.jsonl"
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    paths = [folder / f"checkpoints/step_{step:09d}.ckpt" for step in MILESTONES]
    for path in filter(Path.exists, [*paths, folder / "model.jepa"]):
        config, step, models = models_of(path, runtime)
        for text, weights, way in ((t, w, way) for t in TEXTS for w in models
                                   for way in ("reset", "tempered", "carried", "sliding", "adapted")):
            line = dict(run=folder.name, file=path.name, step=step, weights=weights, text=text,
                        way=way)
            known = any(line.items() <= old.items() for old in done)
            evaluator = evaluator_of(models[weights], config, text, runtime)
            if known or not evaluator or way in ("tempered", "adapted") and weights == "master":
                continue
            started = jepa.now()
            line["bpb"] = score(evaluator, config, way).bpb
            line["seconds"] = round(jepa.now() - started, 2)
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


# What one choice changes: a form, the form without it, both scored alike; its label.
PAIRS = (("preset_latent", "preset_min_lr", "narrow latent"), ("published", "base", "published JEPA and SIGReg"),
         ("mlp_everywhere", "base", "MLPs of half the width everywhere"), ("hybrid1", "base", "one attention block"),
         ("hybrid2", "base", "two attention blocks"), ("min_lr", "base", "learning rate ends at a tenth"))
WINDOW = 5  # validations of a running mean


def read_validations(folder: Path) -> dict[str, dict[int, float]]:
    """BPB of the validations of each run, by step."""
    runs = [compare.read_run(path.parent) for path in sorted(folder.glob("*/metrics.jsonl"))]
    return {run.path.name: dict(compare.validations(run)) for run in runs}


def difference(form: dict[int, float], other: dict[int, float]) -> tuple[list[float], list[float]]:
    """Steps and BPB of `form` less those of `other`, as running means over WINDOW common validations."""
    steps = sorted(set(form) & set(other) - {0})
    gaps = [form[step] - other[step] for step in steps]
    mean = lambda values: [sum(values[i:i + WINDOW]) / WINDOW for i in range(len(values) - WINDOW + 1)]
    return mean(steps), mean(gaps)


def draw_curves(folder: Path) -> None:
    """validation.csv and curves.png of the runs FORM-sSEED in a folder."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = read_validations(folder)
    with open(folder / "validation.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("run", "step", "val_bpb"))
        rows.writerows((run, step, f"{bpb:.4f}") for run, scores in runs.items() for step, bpb in scores.items())
    figure, panel = plt.subplots(figsize=(10, 4.8), layout="constrained")
    for (form, other, label), color in zip(PAIRS, compare.COLORS[1:]):
        for run in runs:
            name, seed = run.rsplit("-s", 1)
            pair = f"{other}-s{seed}"
            if name == form and pair in runs:
                style = "-" if seed == "1" else "--"
                panel.plot(*difference(runs[run], runs[pair]), style, color=color, label=f"{label}, seed {seed}")
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(xlabel="step", ylabel="difference in validation BPB", title="What one choice changes, by the horizon")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(folder / "curves.png", dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["data"] and len(sys.argv) == 3:
        make_data(sys.argv[2])
    elif sys.argv[1:2] == ["score"]:
        with jepa.Runtime(jepa.Config(device="cpu")) as the_runtime:
            for run_folder in sys.argv[2:]:
                score_run(Path(run_folder), the_runtime)
    elif sys.argv[1:2] == ["store"]:
        with jepa.Runtime(jepa.Config(device="cpu")) as the_runtime:
            for checkpoint in sys.argv[2:]:
                store(Path(checkpoint), the_runtime)
    elif sys.argv[1:2] == ["curves"] and len(sys.argv) == 3:
        draw_curves(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)

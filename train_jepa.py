#!/usr/bin/env python3
"""train_jepa.py: a JEPA-regularized Mamba-2 language model for the 16 MB challenge, in one file.

It trains a U-Net of Mamba-2 or attention blocks on FineWeb shards, with cross-entropy, with JEPA
heads that serve in training only, and on weights that already lie on their storage grid. It writes
a compressed artifact, reloads that file and scores it in bits per byte (BPB). Two published
systems are settings of the same parts:
    A  run_jepa_bpe.sh, run_jepa_byte.sh  https://github.com/openai/parameter-golf/pull/903
    B  run_bytejepa.sh                    https://github.com/openai/parameter-golf/pull/1443

    python train_jepa.py --help           every knob, with its default
    MODE=describe bash run_jepa_bpe.sh    what would run: knobs, parameters, estimated bytes
    bash run_jepa_bpe.sh SEED=43          train as published; arguments win over the environment
    torchrun --nproc_per_node=8 train_jepa.py SEED=43    train with the defaults of this file

Sections, each using only what stands above it: config, runtime, data; SSD (the scan in PyTorch),
kernels (slow parts in Triton), blocks, model; losses, schedules; storage, optimizers; artifact,
checkpoint; evaluation, training; evaluation alone and generation; describe, bench, main.

Names of shapes: B sequences of a batch, T positions, D model_dim, E embed_dim, V vocabulary,
H heads, P head width (64), N d_state, Q chunk of the scan, M projections or micro-batches,
K kernel size of the convolution.
"""
from __future__ import annotations

import atexit
import base64
import bz2
import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import lzma
import math
import os
import platform
import re
import resource
import signal
import struct
import sys
import threading
import time
import types
import warnings
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

brotli, zstandard = (importlib.import_module(name) if importlib.util.find_spec(name) else None
                     for name in ("brotli", "zstandard"))  # optional codecs of the artifact

SIZE_LIMIT = 16_000_000  # bytes of artifact + this file
SIZE_SPARE = 100_000     # of those, what QUANT_FIT leaves free
EVAL_SECONDS = 600       # that the challenge allows for evaluation, apart from training
HEADDIM = 64             # P: width of one Mamba-2 head, as in both published models
GATE_EPS = 1e-5          # epsilon of the norm behind Mamba-2's gate, as in mamba_ssm
MLP_EPS = 1e-6           # and of the norm over an MLP's hidden units


class UserError(Exception):
    """Invalid user input; the message says how to fix it. `main` prints it, exits with code 2."""


# ------------------------------------------------------------------------------
# config: one frozen dataclass with a line per knob; arguments win over the environment
# ------------------------------------------------------------------------------

def knob(default, help: str, tags: str = "", *, low: float = 0, high: float = math.inf, group=""):
    """Declare a knob: its default (whose type it has), help and limits. A default like "a|b" lists
    the words allowed, the default first. `group` begins a group of knobs. `tags`: free (a resumed
    run may change it), result (free, but runs that differ in it are no repetitions), model (the
    artifact carries it), grid (how tensors are stored), rate (RESUME_AFTER_DIVERGENCE=1 may change
    it), eval (MODE=eval needs the run's value to repeat scores), size (memory grows with it)."""
    choices = default.split("|") if isinstance(default, str) and "|" in default else []
    return field(default=choices[0] if choices else default, metadata=dict(
        help=help, tags=tags.split(), low=low, high=high, choices=choices, group=group))


# Only the run scripts and setup_jepa.sh read these.
SCRIPT_KNOBS = {
    "PRESET": "recipe of the run scripts: published or best",
    "NPROC_PER_NODE": "ranks that the run scripts start (default: the number of GPUs)",
    "TORCHRUN_ARGS": "arguments of torchrun instead of --standalone: several machines, restarts",
    "RUN_NICE": "niceness of a CPU run (default: -10 on a busy machine that allows it; 0: none)",
    "TRAIN_SHARDS": "training shards to download (default: 53, PRESET=best 75; all: every one)"}

# Later sections append checks of their own knobs: each yields one message per fault.
CHECKS: list[Callable[[Config], Iterable[str]]] = []


def format_knob(value) -> str:
    """Text that parse_knob reads back to the same value."""
    return str(int(value) if isinstance(value, bool) else value)


def parse_knob(name: str, f: dataclasses.Field, text: str):
    """Value of a knob from its text; UserError names knob, text and what is allowed."""
    kind, low, high = type(f.default), f.metadata["low"], f.metadata["high"]
    allowed = {choice.lower(): choice for choice in f.metadata["choices"]}
    right = "one of " + ", ".join(allowed.values())
    if kind is bool:
        allowed, right = {"0": False, "1": True, "false": False, "true": True}, "0 or 1"
    elif kind is not str:
        right = "a whole number" if kind is int else "a finite number"
        right += f" between {low} and {high}" if high < math.inf else f", at least {low}"
        right += ", below 2^63" if kind is int and high == math.inf else ""
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < (2**63 if kind is int else math.inf):
                return value
    elif not allowed:
        if name == "PROMPT" or not re.search(r"[\0-\x1f]", text):
            return text
        text, right = ascii(text[:60])[1:-1], "one line"
    if text.lower() not in allowed:
        raise UserError(f"{name}={text}: must be {right}")
    return allowed[text.lower()]


def check_spelling(environ: dict[str, str], known: Sequence[str]) -> list[str]:
    """An error per misspelled knob of the environment whose first word begins several knobs (JEPA_,
    MUON_). Others may be foreign (DEVICES, SEEDS): they share a warning on stderr."""
    words = [name.split("_")[0] for name in known]
    errors, foreign = [], []
    for name in sorted(set(environ).difference(known)):
        for near in difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            if words.count(name.split("_")[0]) > 1:
                errors.append(f"{name}: no such knob; did you mean {near}?")
            else:
                foreign.append(f"{name} (did you mean {near}?)")
    if foreign and environ.get("RANK", "0") == "0":
        print("warning: ignored in the environment, no such knob:", *foreign, file=sys.stderr)
    return errors


@dataclass(frozen=True)
class Config:
    """All settings of a run."""
    mode: str = knob("train|describe|bench|eval|sample", "what to do", "free", group="run")
    run_id: str = knob("", "name of the run's folder (empty: configuration and time)", "free")
    runs_dir: str = knob("runs", "folder of the run folders", "free")
    resume_after_divergence: bool = knob(
        False, "1 = go on from the last good state of a diverged run with lower rates", "free")
    overwrite: bool = knob(False, "1 = start over in the folder of an earlier run", "free")
    json: bool = knob(False, "1 = describe, bench, eval print JSON last on a terminal, too", "free")
    all: bool = knob(False, "1 = MODE=describe shows every knob", "free")
    profile: str = knob("auto|gpu|cpu", "machine whose defaults hold; describe assumes it", "free")
    tracker: str = knob("none|tensorboard|wandb|trackio", "gets the metrics, if installed", "free")
    seed: int = knob(42, "seed of initial weights, SIGReg directions and positions")
    device: str = knob("auto|cpu|cuda", "device to compute on (auto: CUDA if it is found)", "free")
    dtype: str = knob("auto|fp32|bf16", "compute type (auto: bf16 on CUDA, fp32 on CPU)", "eval")
    collective_timeout: int = knob(600, "seconds to wait for a rank", "free", low=1, high=10**7)

    tokenizer: str = knob("byte|bpe", "kind of tokens", "model", group="data")
    tokenizer_path: str = knob("", "SentencePiece model (TOKENIZER=bpe)", "free result")
    vocab_size: int = knob(256, "number of token ids", "model size", low=2, high=65536)
    data_path: str = knob("./data/datasets/fineweb10B_bytes", "folder of shards", "free result")
    val_max_tokens: int = knob(500_000, "validation tokens used (0 = all)", "free result eval")
    val_batch_size: int = knob(524_288, "validation tokens per MICRO_BATCHES forward passes",
                               "free eval size", low=1)

    model_dim: int = knob(512, "width D", "model size", low=1, group="model")
    num_layers: int = knob(12, "blocks: half encode, half decode", "model size", low=1, high=256)
    mixer: str = knob("mamba2", "mamba2, attention, or a letter m or a per block (mmmmam)", "model")
    d_state: int = knob(64, "state size N of the SSM", "model size", low=1)
    d_conv: int = knob(4, "kernel size of the causal convolution", "model size", low=1, high=64)
    expand: int = knob(2, "inner width of Mamba-2 / MODEL_DIM", "model size", low=1)
    ssd_chunk: int = knob(0, "chunk length Q of the scan (0: 256 for mamba_ssm, else 64)",
                          "free result eval", high=1024)
    ssd_kernel: str = knob("auto|mamba_ssm|fused|torch", "form of the scan (auto: on CUDA the "
                           "first of fused, mamba_ssm, torch that works)", "free result eval")
    mlp_kernel: str = knob("auto|torch", "form of the MLP in training (auto: on CUDA in bf16 its "
                           "activation is part of its products)", "free result eval")
    kernel_check: str = knob("1|0|strict", "1 = replace Triton kernels that deviate from PyTorch; "
                             "strict = end the run", "free")
    num_heads: int = knob(8, "attention heads", "model", low=1)
    num_kv_heads: int = knob(4, "attention heads of keys and values", "model", low=1)
    rope_base: float = knob(10000.0, "base of the rotary angles", "model", low=1)
    qk_gain_init: float = knob(1.5, "initial gain of the queries, per head", high=1e6)
    embed_dim: int = knob(0, "width E of the embedding (0 = MODEL_DIM)", "model size")
    embed_style: str = knob("projected|tied", "tied: system B's form, by TIED_EMBED_* and HEAD_LR")
    tied_embed_init_std: float = knob(0.005, "std of the embedding with EMBED_STYLE=tied")
    mlp_mult: int = knob(3, "hidden width of the MLP / MODEL_DIM (0 = no MLP)", "model size")
    mlp_every: int = knob(1, "an MLP in every n-th block", "model", low=1)
    activation: str = knob("relu2|swiglu|leaky_relu2", "activation of the MLP", "model")
    mlp_norm: bool = knob(True, "RMSNorm over the hidden units of the MLP", "model")
    norm_eps: float = knob(1e-6, "epsilon of the block norms", "model")
    tie_embeddings: int = knob(0, "unembedding: 0 separate, 1 tied to the embedding, 2 tied + "
                               "correction, 3 tied through an adapter", "model", high=3)
    vocab_bias: bool = knob(True, "a bias per token in the logits", "model")
    logit_softcap: float = knob(15.0, "cap of the logits (0 = off)", "model")
    softcap_type: str = knob("poly|tanh", "form of the cap", "model")
    projector_type: str = knob("linear|mlp|none", "map from h to the latent z (none: z = h)")
    predictor_hidden_mult: int = knob(2, "hidden width of predictor / latent width", "size", low=1)
    predictor_norm: bool = knob(False, "1 = RMSNorm before the predictor, no biases (system B)")

    loss_schedule: str = knob("joint|staged", "staged: JEPA, bridge, cross-entropy", group="losses")
    jepa_weight: float = knob(1.0, "weight of the latent prediction")
    jepa_steps: int = knob(1, "horizons of the latent rollout (0 = off)", "size")
    jepa_dim: int = knob(0, "width of the latent (0 = MODEL_DIM)", "size")
    jepa_anneal: float = knob(0.0, "progress at which JEPA_WEIGHT is 0 (0 = never)", high=1)
    detach_targets: bool = knob(False, "1 = no gradient into the targets")
    ce_weight: float = knob(1.0, "weight of the cross-entropy")
    z_loss: float = knob(1e-4, "weight of mean logsumexp^2 in training")
    anticollapse: str = knob("sigreg|covariance", "term that keeps the latent from collapsing")
    sigreg_lambda: float = knob(1.0, "weight of the anti-collapse term (LOSS_SCHEDULE=joint)")
    sigreg_weight: float = knob(0.05, "weight of the anti-collapse term (LOSS_SCHEDULE=staged)")
    sigreg_knots: int = knob(17, "knots of the characteristic function", "size", low=2)
    sigreg_num_proj: int = knob(0, "directions of SIGReg (0 = 2 * embedding width)", "size")
    sigreg_schedule: bool = knob(False, "1 = ramp the weight from 0 over the first 30%")
    sigreg_axis: str = knob("batch|time|both", "axis that one characteristic function pools")
    jepa_cov: float = knob(0.0, "weight of a variance-covariance term on z beside SIGReg")
    jepa_pure_frac: float = knob(0.10, "end of the pure JEPA stage (staged)", high=1)
    ce_pure_frac: float = knob(0.80, "start of the pure CE stage (staged)", high=1)

    train_seq_len: int = knob(4096, "tokens per sequence", "model size", low=1, group="training")
    train_batch_tokens: int = knob(524_288, "tokens per step, all ranks", "size", low=1)
    micro_batches: int = knob(8, "per step; a multiple of the number of ranks", "eval size", low=1)
    iterations: int = knob(10_000, "maximum number of steps", "free result", low=1)
    max_wallclock_seconds: float = knob(
        0.0, "time limit of all that reads training data (0 = none)", "free result")
    reserve_seconds: float = knob(
         0.0, "seconds of that kept for GPTQ and temperature (0 = measured)", "free result")
    warmup_steps: int = knob(10, "steps that are run before training and rolled back")
    warmup_rollback: str = knob("weights|all", "what warm-up steps roll back (all: moments, too)")
    warmdown: str = knob("fraction|iters", "LR falls to MIN_LR over WARMDOWN_FRACTION or _ITERS")
    warmdown_fraction: float = knob(0.15, "length of the warmdown / length of the run", high=1)
    warmdown_iters: int = knob(2000, "steps of the warmdown (time limit: at the mean step time)")
    min_lr: float = knob(0.0, "LR at the end / base LR", high=1)
    lanes: bool = knob(False, "1 = each sequence continues its own slice of the data")
    carry_state: bool = knob(False, "1 = LANES with carried recurrent state (truncated BPTT)")
    val_loss_every: int = knob(500, "steps between validations (0 = only at the end)", "free")
    train_log_every: int = knob(100, "steps between log lines", "free", low=1)
    compile_mode: str = knob("default|reduce-overhead|max-autotune|aot_eager|off",
                             "torch.compile mode; off = eager", "free result eval")
    nonfinite_limit: int = knob(10, "non-finite gradients in a row that end a run", "free", low=1)

    matrix_lr: float = knob(0.02, "Muon's LR: 2-D weights", "rate", group="optimizers")
    scalar_lr: float = knob(0.01, "AdamW's LR: everything else", "rate")
    embed_lr: float = knob(0.01, "AdamW's LR: the embedding", "rate")
    tied_embed_lr: float = knob(0.05, "AdamW's LR: the embedding with EMBED_STYLE=tied", "rate")
    head_lr: float = knob(0.008, "AdamW's LR: untied unembedding with EMBED_STYLE=tied", "rate")
    muon_momentum: float = knob(0.95, "Muon's final momentum", "rate", high=0.9999)
    muon_momentum_warmup_start: float = knob(0.85, "momentum at step 0", "rate", high=0.9999)
    muon_momentum_warmup_steps: int = knob(500, "steps until the final momentum", "rate")
    muon_backend_steps: int = knob(3, "Newton-Schulz iterations", "rate", low=1, high=20)
    muon_wd: float = knob(0.04, "Muon's decoupled weight decay", "rate")
    row_norm: bool = knob(True, "row-wise RMS normalization before Newton-Schulz", "rate")
    adam_wd: float = knob(0.05, "AdamW's weight decay (dt_bias, A_log and D are exempt)", "rate")
    beta1: float = knob(0.9, "Adam's first-moment decay", "rate", high=0.99999)
    beta2: float = knob(0.95, "Adam's second-moment decay", "rate", high=0.99999)
    adam_eps: float = knob(1e-8, "Adam's epsilon", "rate")
    grad_clip_norm: float = knob(1.0, "maximum global gradient norm (0 = off)", "rate")
    swa_start: float = knob(1.0, "progress where the weights' EMA starts (1 = off)", "rate", high=1)
    swa_decay: float = knob(0.995, "decay of the EMA of weights per step", "rate", high=0.999999)

    storage: str = knob("intn|int8", "int8: system B's format", "grid", group="storage")
    quant_bits: int = knob(5, "bits of a matrix weight: 4, 5, 6 (8 with STORAGE=int8)", "grid")
    quant_step: str = knob("absmax|sigma", "step of a row, from absmax or QUANT_K * σ", "grid")
    quant_k: float = knob(0.35, "step / σ of a row (QUANT_STEP=sigma)", "grid", low=0.01, high=4)
    int8_floor: bool = knob(False, "1 = int8 scales of at least 1/127, as published", "grid")
    fp_storage: str = knob("BF16|FP8", "format of embedding and tie correction", "grid")
    mlp_grid: str = knob("", "grid of the MLP matrices: int4 to int7, int8a, int4s0.35 (step of "
                         "0.35 σ), fp8, bf16 (empty: QUANT_BITS and QUANT_STEP)", "grid")
    proj_grid: str = knob("", "grid of other matrices (empty: QUANT_BITS and QUANT_STEP)", "grid")
    dt_grid: str = knob("", "grid of the rows of in_proj that make dt (empty: as in_proj)", "grid")
    embed_grid: str = knob("", "grid of embedding and correction (empty: FP_STORAGE)", "grid")
    qat_fraction: float = knob(1.0, "last fraction of the run, trained on the storage grid", high=1)
    rounding: str = knob("nearest|compensated", "final rounding (compensated: GPTQ)", "free result")
    rounding_tokens: int = knob(65_536, "training tokens for GPTQ", "free result size", low=1)
    quant_fit: bool = knob(False, "1 = lengthens or shortens σ steps at the end until the file "
                           "fills 16 MB (QAT_FRACTION=0)", "free result")
    fit: bool = knob(False, "1 = describe finds the largest MODEL_DIM or MLP_MULT that fit", "free")

    sliding_eval: bool = knob(False, "1 = score with sliding windows", "free", group="evaluation")
    sliding_eval_stride: int = knob(16, "tokens scored per window", "free result", low=1)
    sliding_batch_size: int = knob(64, "windows per forward pass", "free eval size", low=1)
    temp_scaling: bool = knob(True, "1 = fit a temperature to training tokens", "free result")
    temp_calib: float = knob(0.0, "temperature (0 = fit it)", "free result eval")
    eval_state: str = knob("reset|carry", "carry = one pass with carried states", "free eval")
    attention_overlap: int = knob(0, "earlier tokens that attention re-reads (EVAL_STATE=carry; "
                                  "0: TRAIN_SEQ_LEN / 4)", "free result eval")
    eval_adapt: bool = knob(False, "1 = score-first test-time training, by chunk", "free eval")
    adapt_steps: int = knob(1, "SGD steps per chunk of EVAL_ADAPT", "free result eval", low=1)
    adapt_lr: float = knob(0.002, "LR of EVAL_ADAPT at the first chunk; cosine to 0 at the last",
                           "free result eval")
    adapt_chunk_tokens: int = knob(32_768, "tokens per EVAL_ADAPT chunk", "free result eval", low=1)
    adapt_params: str = knob("all", "what EVAL_ADAPT trains: all, or matrices, embedding, scalars",
                             "free result eval")
    adapt_clip: float = knob(1.0, "EVAL_ADAPT's gradient clip (0 = off)", "free result eval")
    diagnostics: bool = knob(True, "1 = latent statistics at validations and at the end", "free")
    probe_steps: int = knob(200, "steps of the linear probe on frozen h (0 = none)", "free")

    checkpoint_every: int = knob(0, "steps between checkpoints (0 = 10 minutes, in runs over 30)",
                                 "free", group="checkpoints")
    checkpoint_dir: str = knob("", "folder of checkpoints (empty: in the run's folder)", "free")
    checkpoint_keep: int = knob(2, "number of checkpoints kept", "free", low=1)

    artifact: str = knob("", "artifact of MODE=eval and MODE=sample", "free", group="people")
    prompt: str = knob("", "start of the text (MODE=sample)", "free")
    sample_tokens: int = knob(200, "tokens per sample", "free", low=1)
    num_samples: int = knob(1, "number of samples", "free", low=1, high=1024)
    temperature: float = knob(0.8, "temperature of sampling (0 = most likely token)", "free")
    top_k: int = knob(0, "sample among the k most likely tokens (0 = all)", "free")
    top_p: float = knob(1.0, "sample among the likeliest tokens of this total probability",
                        "free", low=0.001, high=1)

    sources: dict = field(default_factory=dict, compare=False, repr=False)  # of values; no knob

    @classmethod
    def knobs(cls) -> dict[str, dataclasses.Field]:
        """Field of every knob by its upper-case name, in order."""
        return {f.name.upper(): f for f in dataclasses.fields(cls) if f.metadata}

    @classmethod
    def tagged(cls, tag: str) -> list[str]:
        """Names of the knobs with this tag (see `knob`), in order."""
        return [name for name, f in cls.knobs().items() if tag in f.metadata["tags"]]

    @classmethod
    def from_env(cls, environ: dict[str, str], argv: Sequence[str] = ()) -> Config:
        """From the environment and NAME=value arguments, which win; empty means the default.
        UserError with a line for every value that does not fit and every misspelled name."""
        knobs, values, sources = cls.knobs(), {}, {}
        errors = check_spelling(environ, [*knobs, *SCRIPT_KNOBS])
        # From tools/launch.sh: the script, the knobs that it set, what it replaced of them.
        script, *scripted = environ.get("RUN_SCRIPT_DEFAULTS", "").split() or [""]
        published = dict(re.findall(r"(\w+)=(\S*)", environ.get("RUN_SCRIPT_PUBLISHED", "")))
        given = {name: (text, script if name in scripted else "environment")
                 for name, text in environ.items() if name in knobs}
        for argument in argv:
            name, equals, text = argument.partition("=")
            if equals and name in knobs:
                given[name] = text, "argument"
                continue
            near = difflib.get_close_matches(name.upper(), knobs, n=1) or ["--help"]
            errors.append(f"{argument}: no NAME=value with a knob's name; did you mean {near[0]}?")
        for name, (text, source) in given.items():
            sources[name] = source
            if source == script and name in published:
                shown = published[name].replace("-", format_knob(knobs[name].default))
                sources[name] += f" (published: {shown})"
            try:
                if text:
                    values[name.lower()] = parse_knob(name, knobs[name], text)
            except UserError as error:
                errors.append(str(error))
        if errors:
            raise UserError("\n".join(errors))
        return cls(**values, sources=sources)

    def validate(self) -> Config:
        """Return self, or raise UserError with a line for every combination without sense."""
        c, unit = self, self.micro_batches * self.train_seq_len
        table = [  # (bad, knob, what would be right)
            (re.search(r"[/\\\0]|^\.", c.run_id) or len(os.fsencode(c.run_id)) > 255,
             "RUN_ID", "not a plain folder name of at most 255 bytes"),
            (c.tokenizer == "byte" and c.vocab_size != 256, "VOCAB_SIZE", "must be 256 for bytes"),
            (c.train_batch_tokens % unit,
             "TRAIN_BATCH_TOKENS", f"must be a multiple of MICRO_BATCHES*TRAIN_SEQ_LEN={unit}"),
            (0 < c.max_wallclock_seconds <= c.reserve_seconds,
             "RESERVE_SECONDS", "must be below MAX_WALLCLOCK_SECONDS"),
            (c.ce_weight == 0 and not (c.jepa_on and c.joint and c.jepa_anneal == 0),
             "CE_WEIGHT", "no loss is left with JEPA off, annealed or staged; raise it"),
            (not c.joint and c.jepa_on and c.jepa_pure_frac >= c.ce_pure_frac,
             "JEPA_PURE_FRAC", f"must be below CE_PURE_FRAC={c.ce_pure_frac}"),
            (c.jepa_on and c.jepa_steps >= c.train_seq_len,
             "JEPA_STEPS", f"must be below TRAIN_SEQ_LEN={c.train_seq_len}"),
            (c.jepa_dim and c.projector_type == "none", "JEPA_DIM", "needs PROJECTOR_TYPE=linear"),
            (c.anticollapse != "sigreg" and c.sigreg_axis != "batch",
             "SIGREG_AXIS", "needs ANTICOLLAPSE=sigreg"),
            (c.sliding_eval and c.sliding_eval_stride > c.train_seq_len,
             "SLIDING_EVAL_STRIDE", f"at most TRAIN_SEQ_LEN={c.train_seq_len}"),
            (c.tracker != "none" and not importlib.util.find_spec(c.tracker),
             "TRACKER", f"not installed; .venv/bin/python -m pip install {c.tracker} brings it")]
        faults = [f"{name}={format_knob(getattr(c, name.lower()))}: {fault}"
                  for bad, name, fault in table if bad]
        faults += [fault for check in CHECKS for fault in check(c)]
        if faults:
            raise UserError("\n".join(faults))
        return self

    # Values that follow from the knobs.
    d_inner = property(lambda c: c.expand * c.model_dim)
    embed = property(lambda c: c.embed_dim or c.model_dim)
    latent = property(lambda c: c.jepa_dim or c.model_dim)
    num_proj = property(lambda c: c.sigreg_num_proj or 2 * c.embed)
    joint = property(lambda c: c.loss_schedule == "joint")
    jepa_on = property(lambda c: c.jepa_weight > 0 and c.jepa_steps > 0)
    anti_weight = property(lambda c: c.sigreg_lambda if c.joint else c.sigreg_weight)
    latent_on = property(lambda c: c.jepa_on or c.joint and (c.anti_weight > 0 or c.jepa_cov > 0))
    in_lanes = property(lambda c: c.lanes or c.carry_state)
    micro_tokens = property(lambda c: c.train_batch_tokens // c.micro_batches)
    micro_sequences = property(lambda c: c.micro_tokens // c.train_seq_len)
    # The mixer of each block as a letter; ATTENTION_OVERLAP, for models with attention: a span of
    # more tokens than in training costs more than a longer past gains.
    pattern = property(lambda c: {"mamba2": "m" * c.num_layers,
                                  "attention": "a" * c.num_layers}.get(c.mixer, c.mixer))
    overlap = property(lambda c: (c.attention_overlap or c.train_seq_len // 4)
                       if "a" in c.pattern else None)

    def named(self) -> dict[str, Any]:
        """All values by knob name."""
        return {name: getattr(self, f.name) for name, f in self.knobs().items()}

    def fixed(self) -> dict[str, Any]:
        """What a resumed run may not change: all that alters model, data or trajectory."""
        free = self.tagged("free")
        return {name: value for name, value in self.named().items() if name not in free}

    def model_config(self) -> dict[str, Any]:
        """The knobs that an artifact carries, to rebuild the model."""
        return {name: getattr(self, name.lower()) for name in self.tagged("model")}

    def render(self, changed: bool = False) -> str:
        """Knobs by group with value, default and source; `changed`: only those that differ."""
        lines, values = [f"{'knob':<30} {'value':<32} {'default':<12} source"], self.named()
        for group, name, default, _ in knob_table()[:len(values)]:
            value, source = format_knob(values[name]), self.sources.get(name, "default")
            if value != default or not changed:
                lines += [] if f"{group}:" in lines else [f"{group}:"]
                lines.append(f"  {name:<28} {value:<32} {default:<12} {source}")
        rest = ["Everything else has its default; ALL=1 shows all knobs."] if changed else []
        return "\n".join(lines + rest)


def knob_table() -> list[tuple[str, str, str, str]]:
    """(group, knob, default, help) of every knob, for --help and KNOBS.md."""
    rows, group = [], ""
    for name, f in Config.knobs().items():
        group, choices = f.metadata["group"] or group, ", ".join(f.metadata["choices"])
        text = f.metadata["help"] + (f" ({choices})" if choices else "")
        rows.append((group, name, format_knob(f.default), text))
    return rows + [("run scripts", name, "", text) for name, text in SCRIPT_KNOBS.items()]


def help_text() -> str:
    """What --help prints."""
    lines = ["Every knob is an environment variable or a NAME=value argument (arguments win).", ""]
    for group, rows in itertools.groupby(knob_table(), key=lambda row: row[0]):
        lines.append(f"{group}:")
        lines += [f"  {name}={default} ".ljust(38) + text for _, name, default, text in rows]
    return "\n".join(lines)


# ------------------------------------------------------------------------------
# runtime: this process among its peers: ranks, device, clock and the files of a run
# ------------------------------------------------------------------------------

def now() -> float:
    """Seconds on the training clock; a function so that tests can replace it."""
    return time.perf_counter()


def check_world(config: Config, world: int) -> None:
    """UserError if the ranks cannot share the micro-batches."""
    if config.micro_batches % world:
        raise UserError(f"{world} ranks cannot share MICRO_BATCHES={config.micro_batches}: start a "
                        f"number of ranks that divides it, or set MICRO_BATCHES={world}")


def keep_freed_memory() -> None:
    """Make glibc reuse large freed blocks; returning them costs a third of a CPU step."""
    with contextlib.suppress(OSError, AttributeError):  # other systems
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD: blocks up to 1 GiB from the heap
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def machine_load() -> float:
    """Processes that want a core: on average over a minute, or just now if that is more."""
    running = 1  # this one
    with contextlib.suppress(OSError, ValueError, IndexError):
        running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    return max(os.getloadavg()[0], running - 1)


def busy_machine(factor: float = 1.5) -> str:
    """Load and cores in words if other processes want more than the cores give, else ""."""
    load, cores = machine_load(), os.cpu_count() or 1
    return f"a load of {load:.1f} on {cores} cores" if load > factor * cores else ""


def machine_memory(cuda: bool) -> float:
    """Bytes of the GPU, or those that this machine or container still has; infinite if unknown."""
    if cuda:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    memory = math.inf
    with contextlib.suppress(OSError, TypeError):
        match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        memory = 1024 * int(match[1])
        limit = Path("/sys/fs/cgroup/memory.max").read_text()  # "max": none
        return min(memory, float(limit.replace("max", "inf")))
    return memory


def package_version(name: str) -> str | None:
    """Installed version, without importing the package."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)


def cpu_name() -> str:
    """Processor name as the system gives it."""
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


class Runtime(contextlib.AbstractContextManager):
    """Rank, device, compute type and collectives; leaving the context ends the process group."""

    def __init__(self, config: Config):
        env = lambda name, default: int(os.environ.get(name, default))
        self.rank, self.world, local = env("RANK", 0), env("WORLD_SIZE", 1), env("LOCAL_RANK", 0)
        self.main = self.rank == 0
        check_world(config, self.world)
        self.cuda = config.device != "cpu" and torch.cuda.is_available()
        if config.device == "cuda" and not self.cuda:
            raise UserError("DEVICE=cuda: no CUDA device is found; take DEVICE=cpu or auto")
        bf16 = self.cuda if config.dtype == "auto" else config.dtype == "bf16"
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.device = torch.device("cuda", local) if self.cuda else torch.device("cpu")
        if not self.cuda:
            keep_freed_memory()
        elif local >= torch.cuda.device_count():
            raise UserError(f"rank {local} has no GPU, {torch.cuda.device_count()} are found here; "
                            "start as many ranks as GPUs (NPROC_PER_NODE)")
        else:
            torch.cuda.set_device(self.device)
            if bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
                raise UserError(f"{torch.cuda.get_device_name()} has no bf16; take DTYPE=fp32")
        # fp32 products keep all their bits (SIGReg, covariance, GPTQ moments): no TF32 unless a
        # kernel asks for it. The compiler would advise against that.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        if "TORCHELASTIC_RUN_ID" in os.environ:  # when torchrun is gone, this process gets SIGTERM
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if self.world > 1:
            self._join(timedelta(seconds=config.collective_timeout))

    def _join(self, limit: timedelta) -> None:
        # torchrun keeps one store over restarts, so each attempt gets its own keys in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        dist.init_process_group("nccl" if self.cuda else "gloo", timeout=limit, rank=self.rank,
                                store=dist.PrefixStore(f"attempt_{attempt}", store),
                                world_size=self.world, device_id=self.device if self.cuda else None)
        # Clock and signals travel over gloo, without waiting for the GPU's queue.
        self.control = dist.new_group(backend="gloo", timeout=limit)

    def __exit__(self, kind, error, trace) -> None:
        # After an error the peers may never answer, and destroying the group waits for them.
        if self.world > 1 and dist.is_initialized() and kind is None:
            dist.destroy_process_group()

    def agree(self, *values: float) -> list[float]:
        """Elementwise maximum over ranks of host numbers; a rank without a value passes -inf."""
        box = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return box.tolist()

    def sum_host(self, tensor: Tensor) -> Tensor:
        """Sum of a CPU tensor over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.control)
        return tensor

    def sum_(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def gather(self, part: Tensor) -> tuple[Tensor, Any]:
        """All ranks' (n, ...) as (W*n, ...) and the pending work (None on one rank)."""
        if self.world == 1:
            return part, None
        whole = part.new_empty(self.world * len(part), *part.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # old name
        return whole, gather(whole, part.contiguous(), async_op=True)

    def collect(self, value) -> list:
        """Every rank's picklable value, in rank order (never one from a file)."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def main_first(self, work: Callable[[], Any]):
        """Run `work` on rank 0 for all; its value, or its UserError, reaches every rank."""
        outcome = None
        if self.main:
            try:
                outcome = work()
            except UserError as error:
                outcome = error
        outcome = self.collect(outcome)[0]
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy from the host without stalling the GPU."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.cuda else tensor

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()

    def peak_memory(self) -> int:
        """Peak bytes allocated on the GPU, or resident in this process."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def describe(self) -> dict[str, Any]:
        """Machine and versions, for the log's head and result.json."""
        facts = dict(device=torch.cuda.get_device_name() if self.cuda else cpu_name(),
                     device_type=self.device.type, dtype=str(self.dtype).removeprefix("torch."),
                     world_size=self.world, cores=os.cpu_count(), threads=torch.get_num_threads(),
                     python=platform.python_version(), torch=torch.__version__)
        if self.cuda:
            facts |= dict(cuda=torch.version.cuda) | {
                name: package_version(name) for name in ("triton", "mamba_ssm")}
        return facts


def compiled(function: Callable, mode: str) -> Callable:
    """torch.compile as one graph with static shapes, or the function itself."""
    if mode == "off":
        return function
    torch._dynamo.config.recompile_limit = 64  # one graph per combination of terms
    how = dict(backend="aot_eager") if mode == "aot_eager" else dict(mode=mode)
    return torch.compile(function, fullgraph=True, dynamic=False, **how)


class Heartbeat(threading.Thread):
    """After every ten seconds without output, a line on stderr that says what is being done."""

    def __init__(self, every: float = 10):
        super().__init__(daemon=True)
        self.every, self.doing, self.spoke = every, "", math.inf

    def run(self) -> None:
        self.spoke = time.monotonic()
        while True:
            time.sleep(self.every / 20)
            if self.doing and time.monotonic() - self.spoke >= self.every:
                with contextlib.suppress(OSError, ValueError):  # stderr is closed
                    print(f"[{datetime.now():%H:%M:%S}] {self.doing}", file=sys.stderr, flush=True)
                self.spoke = time.monotonic()

    def follow(self, items, label: str, show: bool = True) -> Iterator:
        """The items; their number is what is being done."""
        for index, item in enumerate(items):
            if show:
                self.doing = f"{label} {index}/{len(items)}"
            yield item
        self.doing = ""


HEARTBEAT = Heartbeat()
progress_bar = HEARTBEAT.follow


@functools.cache
def source_text() -> str:
    """This file as it was at the first call; the self-extracting script keeps it in SOURCE."""
    return globals().get("SOURCE") or Path(__file__).read_text(encoding="utf-8")


SHIPPED_NAME = "train_gpt.py"  # what the challenge calls the script


@functools.cache
def shipped_script(source: str) -> bytes:
    """The script as a submission ships it, and as its bytes count: it unpacks and runs `source`.
    bz2 packs it 4% smaller than lzma; base85 survives editors."""
    packed = base64.b85encode(bz2.compress(source.encode())).decode()
    return f'''\
#!/usr/bin/env python3
# Self-extracting script. This prints its source:  python {SHIPPED_NAME} --source
import base64, bz2, linecache, sys
SOURCE = bz2.decompress(base64.b85decode("{packed}")).decode()
if sys.argv[1:] == ["--source"]:
    sys.stdout.buffer.write(SOURCE.encode())
else:  # inspect, and thereby Triton, reads the lines of functions from linecache
    linecache.cache[__file__] = len(SOURCE), None, SOURCE.splitlines(True), __file__
    exec(compile(SOURCE, __file__, "exec"))
'''.encode()


def printable(content, length: int = 60) -> str:
    """The beginning of a file's content, or of an error that may quote it, in printable ASCII."""
    return ascii(str(content))[1:-1][:length]


@contextlib.contextmanager
def file_errors(path, fault: str = "cannot be read", remedy: str = "") -> Iterator[None]:
    """Turns an OSError of the block into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {fault} ({error.strerror or error}){remedy}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that takes the place of `path` when the block ends: written under a temporary
    name, synced and renamed, all or nothing; UserError if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with file_errors(path, "cannot be written", "; earlier files are intact"):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):  # left over only after an error
            temporary.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, or leave it as it was."""
    with replacing(path) as file:
        file.write(data)


def file_hash(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def silence() -> None:
    """Nothing more goes to stdout: what is buffered would fail again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    """Print a line at once. A console on a full disk must not end a run; a closed pipe ends it."""
    HEARTBEAT.spoke = time.monotonic()
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        silence()


def open_tracker(c: Config, path: Path) -> Callable[[dict[str, float], int], Any] | None:
    """TRACKER: takes values and step to a tracker of experiments, under the name of the run."""
    if c.tracker == "none":
        return None
    if c.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(str(path), flush_secs=10)
        return lambda values, step: [writer.add_scalar(*item, step) for item in values.items()]
    package = importlib.import_module(c.tracker)
    again = dict(id=path.name) if c.tracker == "wandb" else {}  # a resumed run goes on there
    package.init(project="train_jepa", name=path.name, config=c.named(), resume="allow", **again)
    atexit.register(package.finish)
    return lambda values, step: package.log(values, step=step)


class RunFolder:
    """runs/<RUN_ID>/: log.txt, metrics.jsonl, config.json, result.json; written by rank 0 only."""

    def __init__(self, path: Path, main: bool, resume_bytes: dict[str, int] | None = None):
        """Open both journals; a resumed run cuts them to their lengths in the checkpoint."""
        self.path, self.main, self.files, self.track = path, main, {}, None
        with file_errors(path, "cannot be written", "; mend its rights, or take another RUN_ID"):
            for name in ("log.txt", "metrics.jsonl") if main else ():
                path.mkdir(parents=True, exist_ok=True)
                self.files[name] = file = open(path / name, "a", encoding="utf-8")
                file.truncate(min(file.tell(), (resume_bytes or {}).get(name, file.tell())))

    def _append(self, name: str, text: str) -> None:
        with file_errors(self.path / name, "cannot be written", "; make room"):
            self.files[name].write(text + "\n")
            self.files[name].flush()

    def log(self, line: str, console: bool = True) -> None:
        """One short greppable line to log.txt and the console."""
        if self.main:
            self._append("log.txt", line)
            if console:
                say(line)

    def metric(self, **values) -> None:
        """One line of metrics.jsonl; its numbers to the tracker, if there is one."""
        if self.main:
            self._append("metrics.jsonl", json.dumps(values))
        if self.track:
            self.track({f"{values['kind']}/{name}": value for name, value in values.items()
                        if isinstance(value, (int, float)) and name != "step"}, values["step"])

    def sizes(self) -> dict[str, int]:
        """Lengths of the journals in bytes, for the checkpoint."""
        with file_errors(self.path, "the run's folder is gone"):
            return {name: (self.path / name).stat().st_size for name in self.files}

    def write_json(self, name: str, value) -> None:
        """Replace one JSON file of the folder."""
        if self.main:
            write_atomically(self.path / name, (json.dumps(value, indent=2) + "\n").encode())


# ------------------------------------------------------------------------------
# data: shards, one endless token stream, batches, and the bytes that tokens stand for
# ------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 1024  # header: 256 little-endian int32
BYTE_BOS = 0     # bos_id of byte shards: a byte that UTF-8 text never contains
BYTES = "bytes"  # the tokenizer of byte shards in source.json, and Vocabulary.source


def shard_length(path: Path) -> int:
    """Number of tokens of a shard; UserError unless magic, version and size fit."""
    with file_errors(path):
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype="<i4", count=256) if path.is_file() else []
    if len(header) < 256 or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(f"{path}: not a token shard of version {SHARD_VERSION}")
    count, data = int(header[2]), "demo" if "demo" in path.parent.name else "fineweb"
    if size != SHARD_HEADER + 2 * count:
        raise UserError(f"{path}: {size} bytes, but its header promises {count} tokens; "
                        f"bash setup_jepa.sh {data} makes it anew")
    return count


def find_shards(data_path: str, part: str) -> list[Path]:
    """The shards `fineweb_<part>_*.bin` of a folder, in order; UserError if there are none."""
    paths = sorted(Path(data_path).glob(f"fineweb_{part}_*.bin"))
    if not paths:
        others = [path.parent for path in Path(data_path).parent.glob(f"*/fineweb_{part}_*.bin")]
        remedy = (f"{min(others)} would do" if others else
                  "bash run_jepa_byte.sh makes its shards itself; so does bash setup_jepa.sh demo")
        raise UserError(f"DATA_PATH={data_path}: holds no fineweb_{part}_*.bin; {remedy}")
    return paths


class TokenStream:
    """The tokens of many shards as one stream, readable at any position; it wraps around."""

    def __init__(self, paths: Sequence[Path], vocab_size: int):
        self.paths, self.vocab_size = paths, vocab_size
        self.lengths = [shard_length(path) for path in paths]
        self.ends = np.cumsum(self.lengths)
        if len(self) == 0:
            raise UserError(f"{paths[0].parent}: no tokens in these shards")
        for index, length in enumerate(self.lengths):  # small shards wholly, the head of large ones
            self._read(index, 0, min(length, 4_000_000))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _read(self, index: int, start: int, count: int) -> np.ndarray:
        # Not a memory map: if the file shrinks, that kills the process.
        path = self.paths[index]
        with file_errors(path):
            tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER + 2 * start)
        if len(tokens) < count:
            raise UserError(f"{path}: became shorter while in use")
        if (largest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise UserError(f"{path}: token id {largest}, but VOCAB_SIZE={self.vocab_size}; these "
                            "shards were made with another tokenizer")
        return tokens

    def read(self, position: int, count: int) -> np.ndarray:
        """`count` tokens from `position` (modulo the length) as int64 (count,)."""
        pieces = []
        while count > 0:
            position %= len(self)
            index = int(np.searchsorted(self.ends, position, side="right"))
            left = int(self.ends[index]) - position  # in this shard
            pieces.append(self._read(index, self.lengths[index] - left, min(left, count)))
            position, count = position + left, count - left
        return np.concatenate(pieces).astype(np.int64)


@dataclass
class Batches:
    """Micro-batches by position and index alone: the same for any number of ranks.

    Each takes its tokens + 1 values of the stream: x is all but the last, y all but the first. With
    `lanes` the stream is cut into one lane per sequence of the whole batch, and each step reads the
    next `seq_len` tokens of every lane."""
    stream: TokenStream
    micro_batches: int
    sequences: int
    seq_len: int
    lanes: bool = False

    def span(self) -> int:
        """Positions until the run reads the same tokens again: the stream, or one lane."""
        return len(self.stream) // (self.micro_batches * self.sequences if self.lanes else 1)

    def values_per_step(self) -> int:
        """How far one step advances the position."""
        values = self.sequences * self.seq_len + 1
        return self.seq_len if self.lanes else self.micro_batches * values

    def __call__(self, position: int, micro: int) -> tuple[Tensor, Tensor]:
        """x and y, (sequences, seq_len) int64 each, of one micro-batch of the step there."""
        n, length = self.sequences, self.seq_len
        if self.lanes:
            starts = [row * self.span() + position for row in range(micro * n, (micro + 1) * n)]
            values = np.stack([self.stream.read(start, length + 1) for start in starts])
            return torch.from_numpy(values[:, :-1].copy()), torch.from_numpy(values[:, 1:].copy())
        count = n * length + 1
        values = torch.from_numpy(self.stream.read(position + micro * count, count))
        return values[:-1].view(n, length), values[1:].view(n, length)


@dataclass(frozen=True)
class Vocabulary:
    """How many bytes of UTF-8 text each token stands for; those of a document add up to its text's
    length as the tokenizer normalizes it. Control, unknown and unused pieces count 0 and are
    boundaries; byte pieces count 1; others their UTF-8 length without a leading "\u2581" (the space
    mark), which counts 1 unless the previous token is a boundary."""
    base_bytes: Tensor  # (V,) int64
    space: Tensor       # (V,) bool: begins with the space mark
    boundary: Tensor    # (V,) bool: control, unknown or unused
    bos_id: int         # begins a document
    source: str = ""    # what made the tokens: BYTES, or the sha256 of the SentencePiece file

    def target_bytes(self, previous: Tensor, targets: Tensor) -> Tensor:
        """Bytes (int64) of `targets`, each after its `previous` token; any shape."""
        return self.base_bytes[targets] + (self.space[targets] & ~self.boundary[previous])

    def pack(self) -> dict[str, Any]:
        """Form for JSON; with it in the artifact, scoring needs no tokenizer."""
        codes = (self.base_bytes * 4 + self.space * 2 + self.boundary).numpy().astype("<u2")
        packed = base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode()
        return {"bos_id": self.bos_id, "codes": packed, "source": self.source}

    @classmethod
    def unpack(cls, packed: dict[str, Any], vocab_size: int) -> Vocabulary:
        """Inverse of `pack`; UserError if the form is damaged or of another size."""
        try:
            data = base64.b64decode(packed["codes"])
            data = zlib.decompressobj().decompress(data, 2 * vocab_size + 1)
            codes = torch.from_numpy(np.frombuffer(data, dtype="<u2").astype(np.int64))
            bos_id, source = int(packed["bos_id"]), str(packed.get("source", ""))  # v0.1 has none
            if len(codes) != vocab_size or not 0 <= bos_id < vocab_size:
                raise ValueError(f"{len(codes)} tokens")
        except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
            raise UserError(f"the artifact's vocabulary is damaged ({ascii(error)[:60]})") from None
        return cls(codes >> 2, (codes & 2) > 0, (codes & 1) > 0, bos_id, source)


def byte_vocabulary() -> Vocabulary:
    """256 byte values of one byte each, except BYTE_BOS: 0 bytes."""
    bos = torch.arange(256) == BYTE_BOS
    return Vocabulary(1 - bos.long(), torch.zeros_like(bos), bos, BYTE_BOS, BYTES)


def load_sentencepiece(path: str):
    """The SentencePiece model at TOKENIZER_PATH; UserError if it is missing or damaged."""
    try:
        import sentencepiece
        model = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        model.id_to_piece(list(range(model.vocab_size())))  # all are UTF-8
        return model
    except ImportError:
        raise UserError("TOKENIZER=bpe: the package sentencepiece is missing; bash setup_jepa.sh "
                        "env installs it") from None
    except Exception as error:  # OSError, RuntimeError, UnicodeDecodeError
        raise UserError(f"TOKENIZER_PATH={path}: not a SentencePiece model ({printable(error)}); "
                        "bash run_jepa_bpe.sh with the same arguments names it") from None


def bpe_vocabulary(path: str, vocab_size: int) -> Vocabulary:
    """Byte counts of a SentencePiece model's pieces."""
    model, rows, mark = load_sentencepiece(path), [], "\u2581"
    if (size := model.vocab_size()) != vocab_size:
        raise UserError(f"TOKENIZER_PATH={path}: has {size} pieces, but VOCAB_SIZE={vocab_size}")
    for token in range(size):
        special = model.is_control(token) or model.is_unknown(token) or model.is_unused(token)
        piece = "" if special else model.id_to_piece(token)
        length = 1 if model.is_byte(token) else len(piece.removeprefix(mark).encode())
        rows.append((length, piece.startswith(mark), special))
    base, space, boundary = (torch.tensor(column) for column in zip(*rows))
    bos_id = model.bos_id() if model.bos_id() >= 0 else 1
    return Vocabulary(base, space, boundary, bos_id, file_hash(path))


def load_vocabulary(config: Config) -> Vocabulary:
    """The vocabulary of TOKENIZER."""
    bpe = config.tokenizer == "bpe"
    return bpe_vocabulary(config.tokenizer_path, config.vocab_size) if bpe else byte_vocabulary()


def shards_source(data_path: str) -> str | None:
    """What made the shards (Vocabulary.source), from their source.json; None if it is silent."""
    path = Path(data_path) / "source.json"
    try:
        return json.loads(path.read_bytes()).get("tokenizer") if path.is_file() else None
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({ascii(error)[:60]}); setup_jepa.sh makes it "
                        "anew") from None


def check_source(config: Config, vocabulary: Vocabulary) -> None:
    """UserError if the shards were made with another tokenizer: their ids would mean other text."""
    source = shards_source(config.data_path)
    if source and vocabulary.source and source != vocabulary.source:
        raise UserError(f"DATA_PATH={config.data_path}: its source.json says that the shards hold "
                        f"{source!s:.8}, but the model reads {vocabulary.source:.8}")


def load_validation(config: Config) -> Tensor:
    """Validation tokens (n * TRAIN_SEQ_LEN + 1,) int64: whole sequences, VAL_MAX_TOKENS at most."""
    stream = TokenStream(find_shards(config.data_path, "val"), config.vocab_size)
    length, limit = config.train_seq_len, config.val_max_tokens or len(stream)
    count = min(len(stream) - 1, limit) // length * length
    if count <= 0:
        raise UserError(f"DATA_PATH={config.data_path}: its validation tokens, {limit} at most, "
                        f"do not fill one sequence of TRAIN_SEQ_LEN={length}")
    return torch.from_numpy(stream.read(0, count + 1))

# ------------------------------------------------------------------------------
# SSD: the selective state-space scan of Mamba-2 and its convolution, in PyTorch
# ------------------------------------------------------------------------------
def as_new(t: Tensor) -> Tensor:
    """A copy with the strides of a new tensor: torch.compile makes a graph for others."""
    return t.clone(memory_format=torch.contiguous_format)


def decay_between(logs: Tensor) -> Tensor:
    """exp(logs_i - logs_j) for j <= i, else 0; (..., n) -> (..., n, n)."""
    gaps = logs.unsqueeze(-1) - logs.unsqueeze(-2)
    future = torch.ones(gaps.shape[-2:], dtype=torch.bool, device=logs.device).triu(1)
    return gaps.masked_fill_(future, -math.inf).exp_()  # masked first, else inf * 0 = NaN


def ssd_chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *,
                chunk: int = 64, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t, for any length T.

    x (B,T,H,P); dt (B,T,H) fp32, after softplus; A (H,) fp32, negative; B, C (B,T,N); D (H,);
    initial_state (B,H,P,N) fp32. Returns y (B,T,H,P) in x's dtype and the final state in fp32.
    Steps: https://arxiv.org/abs/2405.21060, section 6."""
    (length, heads, width), chunk = x.shape[1:], min(chunk, x.size(1))
    if pad := -length % chunk:  # dt = 0 neither decays nor adds: padding keeps the state
        x, dt, B, C = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, pad)) for t in (x, dt, B, C))
    split = lambda t: t.unflatten(1, (-1, chunk))
    u, B, C = split((x * dt.unsqueeze(-1)).to(x.dtype)), split(B), split(C)  # (b,c,Q,...)
    logs = split(dt * A).transpose(2, 3).cumsum(-1)  # (b,c,H,Q) log decay so far
    # 1. Within a chunk: y_i = sum_{j<=i} (C_i.B_j) exp(logs_i - logs_j) u_j.
    scores = (C @ B.mT).unsqueeze(2) * decay_between(logs)  # (b,c,H,Q,Q)
    y = (scores.to(x.dtype) @ u.transpose(2, 3)).transpose(2, 3)  # (b,c,Q,H,P)
    # 2. What each chunk adds to the state by its end.
    to_end = (logs[..., -1:] - logs).exp().transpose(2, 3).unsqueeze(-1)
    added = ((u * to_end).to(x.dtype).flatten(3).mT @ B).to(logs.dtype)  # (b,c,H*P,N)
    # 3. States at chunk starts and at the end, by one (c+1, c+1) decay matrix.
    carry = decay_between(F.pad(logs[..., -1].transpose(1, 2), (1, 0)).cumsum(-1))
    states = carry[..., 1:] @ added.view(*logs.shape[:3], -1).transpose(1, 2)  # (b,H,c+1,P*N)
    if initial_state is not None:
        states = states + carry[..., :1] * initial_state.to(logs.dtype).flatten(2).unsqueeze(2)
    # 4. What the state at a chunk's start gives to its positions.
    starts = states[:, :, :-1].transpose(1, 2).to(x.dtype).unflatten(-1, (width, -1)).flatten(2, 3)
    carried = (C @ starts.mT).unflatten(-1, (heads, width))
    y = torch.addcmul(y.to(logs.dtype), carried, logs.exp().transpose(2, 3).unsqueeze(-1))
    y = torch.addcmul(y.flatten(1, 2), D.unsqueeze(-1), x)
    return y[:, :length].to(x.dtype), states[:, :, -1].unflatten(-1, (width, -1))


def ssd_position(x, dt, A, B, C, D, *, chunk: int, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """ssd_chunked for T = 1, by the recurrence itself."""
    added = (dt.unsqueeze(-1) * x).unsqueeze(-1) * B[:, :, None, None]  # (B,1,H,P,N)
    state = (dt * A).exp()[..., None, None] * initial_state.unsqueeze(1) + added
    y = (state * C[:, :, None, None]).sum(-1) + D.unsqueeze(-1) * x
    return y.to(x.dtype), state[:, 0]


class EagerConv(torch.autograd.Function):
    """bias + sum_k weight[:, k] x[t + k] of x (B,T+K-1,C), weight (C,K), with the gradients summed
    in place: where nothing fuses them, autograd's zeros and copies cost half as much again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return shifted_sums(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx, taps = torch.zeros_like(x), weight.T.contiguous()
        dtaps = torch.zeros_like(taps)
        for inputs, upstream, total in zip(x, grad, dx):  # one sequence stays in a CPU's cache
            for k, tap in enumerate(taps):
                part = slice(k, k + len(upstream))
                total[part].addcmul_(upstream, tap)
                dtaps[k] += (upstream * inputs[part]).sum(0)
        return dx, dtaps.T, grad.sum((0, 1))


def shifted_sums(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """bias + sum_k weight[:, k] x[t + k] of x (B,T+K-1,C), weight (C,K)."""
    out, length = bias, x.size(1) - weight.size(1) + 1
    for k, tap in enumerate(weight.T):
        out = torch.addcmul(out, x[:, k:k + length], tap)
    return out


def causal_conv_silu(u: Tensor, weight: Tensor, bias: Tensor, *,
                     initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """SiLU of the depthwise causal convolution of u (B,T,C) by weight (C,1,K), plus bias (C,).
    initial: the K-1 inputs before the first, else zeros. Returns (B,T,C), the last K-1 inputs."""
    padded = F.pad(u, (0, 0, weight.size(-1) - 1, 0))
    if initial is not None:
        padded = torch.cat((initial.to(u.dtype), u), dim=1)
    convolve = shifted_sums if u.is_cuda else EagerConv.apply
    out = convolve(padded, weight[:, 0].to(u.dtype), bias.to(u.dtype))
    return F.silu(out), as_new(padded[:, u.size(1):])  # a view would keep all inputs in memory


class EagerNorm(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps), with a gradient of few passes: on a CPU, where nothing fuses them,
    autograd's own of F.rms_norm takes 1.7 times as long, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        power = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.size(-1)
        scale = (power + eps).rsqrt()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        inward = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, inward, value=-1) * scale, None


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x / sqrt(mean x^2 + eps), over the last dimension (https://arxiv.org/abs/1910.07467)."""
    if x.is_cuda or x.dtype == torch.bfloat16:  # bf16: the mean needs fp32
        return F.rms_norm(x, (x.size(-1),), weight, eps)
    return EagerNorm.apply(x, eps) if weight is None else EagerNorm.apply(x, eps) * weight


def mamba_mix(wide: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor,
              D: Tensor, norm_weight: Tensor, *, chunk: int = 64, state: tuple | None = None,
              ssd: Callable = ssd_chunked) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What lies between Mamba-2's projections: convolution, scan, gate, RMSNorm with gain.
    wide (B,T,W): z, x, B, C, dt, perhaps padding. state: the convolution's last K-1 inputs
    (B,K-1,C), the scan's state (B,H,P,N); None: zeros. Returns (B,T,H*P), and the new state."""
    sizes = inner, channels, heads = len(norm_weight), len(conv_bias), len(A_log)
    A = -A_log.exp()
    z, xBC, dt, _ = wide.split((*sizes, wide.size(-1) - sum(sizes)), dim=-1)
    conv_state, ssm_state = state or (None, None)
    xBC, conv_state = causal_conv_silu(xBC, conv_weight, conv_bias, initial=conv_state)
    x, B, C = xBC.split((inner, (channels - inner) // 2, (channels - inner) // 2), dim=-1)
    y, ssm_state = ssd(x.unflatten(-1, (heads, -1)), F.softplus(dt.float() + dt_bias), A, B, C, D,
                       chunk=chunk, initial_state=ssm_state)
    gated = y.flatten(2).float() * F.silu(z.float())
    return rms_norm(gated, GATE_EPS, norm_weight).to(y.dtype), (conv_state, ssm_state)


# ------------------------------------------------------------------------------
# kernels: Triton forms of head, mixer and rounding to the storage grid, each with its launcher
#
# Head and mixer are custom ops: torch.compile makes one graph around them. No atomics, and sums in
# a fixed order: equal inputs give equal bits (mamba-ssm's backward pass excepted).
# TRITON_INTERPRET=1, set before the import, runs the kernels on CPU tensors; tests use that.
# ------------------------------------------------------------------------------
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
jit = triton.jit if triton else lambda function: function
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REPLACED: set[str] = set()  # kernels that PyTorch replaces: the self-check found them wrong here


def runs_triton(device: torch.device) -> bool:
    """Whether tensors of this device go to the kernels."""
    return triton is not None and (device.type == "cuda" or INTERPRETED)


def error_text(error: Exception) -> str:
    """Type and first line of an exception of Triton's compiler or of the driver."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"[:300]


def custom_op(name: str, tensors: str, options: str, results: int, outputs: Callable,
              launch: Callable, backward: Callable, traced: bool = False) -> Callable:
    """The op jepa::name of tensors and options; the first two of its results have gradients.

    outputs(*arguments) allocates the results, for tracing as well; launch(*results, *arguments)
    fills them, or returns others. So does backward with the gradients of the tensors, as an op of
    (*upstream, *tensors, *results[2:], *options); traced: it is no op and returns the gradients."""
    count, listing = tensors.count("Tensor"), lambda n: ", ".join(["Tensor"] * n)

    def register(name, schema, outputs, launch):
        def run(*arguments):
            made = outputs(*arguments)
            return launch(*made, *arguments) or made
        op = torch.library.custom_op(f"jepa::{name}", run, mutates_args=(), schema=schema)
        op.register_fake(outputs)
        return op

    def gradients(*arguments):
        inputs = (arguments[2][:0] if t is None else t for t in arguments[2:2 + count])
        return tuple(t.new_empty(t.shape) for t in inputs)

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:count], *output[2:])
        ctx.options = inputs[count:]

    def differentiate(ctx, *upstream):
        found = backward(*upstream[:2], *ctx.saved_tensors, *ctx.options)
        found = [t if t is None else g.to(t.dtype) for t, g in zip(ctx.saved_tensors, found)]
        return *found, *(None,) * len(ctx.options)

    if not traced:
        saved = "".join(f"Tensor saved{i}, " for i in range(results - 2))
        schema = f"(Tensor? up0, Tensor? up1, {tensors}, {saved}{options}) -> ({listing(count)})"
        backward = register(f"{name}_backward", schema, gradients, backward)
    op = register(name, f"({tensors}, {options}) -> ({listing(results)})", outputs, launch)
    op.register_autograd(differentiate, setup_context=save)
    return op


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


# -- head ----------------------------------------------------------------------
def soft_cap(logits: Tensor, cap: float, kind: str) -> Tensor:
    """Smooth bound of |logits| by cap (0: none). With u = logits / cap: cap tanh(u)
    (https://arxiv.org/abs/2408.00118), or the odd polynomial cap (u - u^3/3 + u^5/15), which
    reaches the cap near u = 1.69 and stays there (system A)."""
    if not cap:
        return logits
    if kind == "tanh":
        return cap * torch.tanh(logits / cap)
    u = (logits / cap).clamp(-2, 2)
    square = u * u
    return cap * (u * (1 - square / 3 + square * square / 15)).clamp(-1, 1)


@jit
def head_rows(logits, bias, targets, nll, lse, n, V, cap, inverse, z_loss,
              CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """nll and logsumexp of ROWS rows of logits (n, V), V <= BLOCK; their gradient overwrites the
    logits. A row stays in registers: read once, one exponential per logit. inverse = 1 / cap."""
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    live = (row < n)[:, None] & (col < V)
    logits += row.to(tl.int64)[:, None] * V + col
    target = tl.load(targets + row, mask=row < n, other=0).to(tl.int32)[:, None]
    x = tl.load(logits, mask=live, other=0.0).to(tl.float32)
    x += tl.load(bias + col, mask=col < V, other=0.0)
    slope = 1.0
    if CAP == "poly":  # |p| passes 1 before |u| passes 2: one mask serves both clamps
        u = tl.minimum(tl.maximum(x * inverse, -2.0), 2.0)
        u2 = u * u
        p = u * (1.0 + u2 * (u2 * (1.0 / 15.0) - 1.0 / 3.0))
        slope = tl.where(tl.abs(p) <= 1.0, 1.0 + u2 * (u2 * (1.0 / 3.0) - 1.0), 0.0)
        x = cap * tl.minimum(tl.maximum(p, -1.0), 1.0)
    elif CAP == "tanh":
        th = 2.0 * tl.sigmoid(2.0 * x * inverse) - 1.0
        x, slope = cap * th, 1.0 - th * th
    picked = tl.sum(tl.where(col == target, x, 0.0), 1)
    x = tl.where(col < V, x, -float("inf"))
    peak = tl.max(x, 1)
    e = tl.exp(x - peak[:, None])
    total = tl.sum(e, 1)
    log_sum = peak + tl.log(total)
    # d(nll + z lse^2) / dlogit = softmax (1 + 2 z lse) - [target], times the cap's derivative
    grad = e * ((1.0 + 2.0 * z_loss * log_sum) / total)[:, None]
    grad = (grad - tl.where(col == target, 1.0, 0.0)) * slope
    tl.store(logits, grad.to(logits.dtype.element_ty), mask=live)
    tl.store(lse + row, log_sum, mask=row < n)
    tl.store(nll + row, log_sum - picked, mask=row < n)


def _head_chunk(logits, bias, targets, nll, lse, cap, kind, z_loss):
    """head_rows, or the same in PyTorch, in place: on a CPU each pass over the chunk costs."""
    if runs_triton(logits.device) and "head" not in REPLACED and logits.size(1) <= 16384:
        n, V, block = *logits.shape, triton.next_power_of_2(logits.size(1))
        rows = max(1, 2048 // block)
        head_rows[(triton.cdiv(n, rows),)](
            logits, bias, targets, nll, lse, n, V, cap, 1 / (cap or 1), z_loss, CAP=kind,
            ROWS=rows, BLOCK=block, num_warps=16 if block > 4096 else 8)
        return
    x, slope, one = logits.float().add_(bias), None, torch.ones((), device=logits.device)
    if kind == "poly":
        u = x.mul_(1 / cap)
        low, high = torch.aminmax(u)
        # Clamp only if some logit passes 1.69 caps, where the polynomial saturates, or is NaN.
        saturates = not max(-float(low), float(high)) < 1.69
        u2 = (u.clamp_(-2, 2) if saturates else u).square()
        p = torch.add(one / -3, u2, alpha=1 / 15)
        p = torch.addcmul(one, u2, p, out=p).mul_(u)
        slope = torch.add(-one, u2, alpha=1 / 3)
        slope = torch.addcmul(one, u2, slope, out=slope)
        if saturates:
            slope.mul_(p.abs() <= 1)
            p.clamp_(-1, 1)
        x = p.mul_(cap)
    elif kind == "tanh":
        th = x.mul_(1 / cap).tanh_()
        slope = torch.addcmul(one, th, th, value=-1)
        x = th.mul_(cap)
    picked = x.gather(1, targets[:, None]).squeeze(1)
    bounded = kind and cap <= 60  # exp is finite without subtracting the maximum
    top = None if bounded else x.amax(1, keepdim=True)
    e = (x if bounded else x.sub_(top)).exp_()
    total = e.sum(1, keepdim=True)
    log_sum = total.log() if bounded else total.log() + top
    lse.copy_(log_sum.squeeze(1))
    torch.sub(lse, picked, out=nll)
    e.mul_((1 + 2 * z_loss * log_sum) / total)
    e.scatter_add_(1, targets[:, None], e.new_full((1, 1), -1.0).expand(len(e), 1))
    logits.copy_(e if slope is None else e.mul_(slope))


def _head_outputs(h, weight, *_):
    """Loss, mean nll, and n times the gradients of h, weight and bias."""
    zeros = functools.partial(h.new_zeros, dtype=torch.float32)
    return zeros(()), zeros(()), h.new_empty(h.shape), zeros(weight.shape), zeros(len(weight))


def _launch_head(loss, mean, dh, dw, db, h, weight, bias, targets, cap, kind, z_loss, rows):
    """Gradients are divided by n in the backward pass, in fp32: bf16 never holds tiny values."""
    (n, width), V, gpu = h.shape, len(weight), h.is_cuda
    h, w = h.contiguous(), weight.to(h.dtype).contiguous()
    bias = torch.zeros(V, device=h.device) if bias is None else bias.float()
    nll, lse = torch.empty(2, n, device=h.device).unbind(0)
    # 64 MiB of bf16 logits on a GPU, 2 MiB of fp32 in a CPU's cache
    rows = min(n, rows or (max(256, (1 << 25) // V) if gpu else max(64, (1 << 19) // V)))
    # [h, 1]: the bias gradient is one more column of dW. 8 columns keep rows aligned.
    ones = torch.cat((h, h.new_ones(n, 1), h.new_zeros(n, 7)), 1) if gpu else h
    sums, buffer = dw.new_zeros(V, ones.size(1)) if gpu else dw, h.new_empty(rows, V)
    for i in range(0, n, rows):
        part = slice(i, min(n, i + rows))
        logits = torch.mm(h[part], w.T, out=buffer[:part.stop - i])
        _head_chunk(logits, bias, targets[part], nll[part], lse[part], cap, kind, z_loss)
        torch.mm(logits, w, out=dh[part])
        if not gpu or "head" in REPLACED:
            sums += (logits.T @ ones[part]).float()
        else:  # bf16: the GEMM itself adds in fp32, without rounding the product
            how = {} if h.dtype == torch.float32 else dict(out_dtype=torch.float32)
            torch.addmm(sums, logits.T, ones[part], **how, out=sums)
        if not gpu:
            db += logits.sum(0, dtype=torch.float32)
    if gpu:
        dw.copy_(sums[:, :width])
        db.copy_(sums[:, width])
    mean = nll.mean()
    return mean + z_loss * lse.square().mean(), mean, dh, dw, db


def _head_backward(grad, _, h, weight, bias, dh, dw, db, *options):
    scale = grad.float() / len(h)
    return dh.float() * scale, dw * scale, db * scale


_head = custom_op("head_train", "Tensor h, Tensor weight, Tensor? bias",
                  "Tensor targets, float cap, str kind, float z_loss, int rows", 5,
                  _head_outputs, _launch_head, _head_backward, traced=True)


def token_loss_fused(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *,
                     softcap: float = 0.0, softcap_type: str = "poly", z_loss: float = 0.0,
                     rows: int = 0) -> tuple[Tensor, Tensor]:
    """Mean of nll + z_loss logsumexp^2, and mean nll for the log, without gradient; fp32.

    h (n,E); weight (V,E), cast to h's dtype, its gradient summed in fp32; bias (V,); targets (n,)
    int64. Computes gradients on the way, `rows` tokens at a time (0: by vocabulary), so that no
    (n,V) tensor exists."""
    kind = softcap_type if softcap else ""
    loss, nll, *_ = _head(h, weight, bias, targets, softcap, kind, z_loss, rows)
    return loss, nll.detach()


# -- rounding to the storage grid ----------------------------------------------
FORMATS = {"bf16": 0, "fp8": 1, "int": 2, "sigma": 3}  # `kind` of the kernel


@jit
def round_mantissa(x, BITS: tl.constexpr):
    """fp32 with the last BITS bits rounded off, half to even; the interpreter's casts truncate."""
    i = x.to(tl.int32, bitcast=True)
    i += (1 << (BITS - 1)) - 1 + ((i >> BITS) & 1)
    return ((i >> BITS) << BITS).to(tl.float32, bitcast=True)


@jit
def round_fp8(x):
    """fp32 rounded to e4m3fn, still fp32: 3 mantissa bits, or multiples of 2^-9 below 2^-6."""
    v = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    small = ((v + 24576.0) - 24576.0).to(tl.int32, bitcast=True)  # 1.5 * 2^14
    small |= v.to(tl.int32, bitcast=True) & -2147483648  # keeps -0.0
    small = small.to(tl.float32, bitcast=True)
    return tl.where(tl.abs(v) < 0.015625, small, round_mantissa(v, 20))


@jit
def snap_rows(table, OUT: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Rounds one row per program. table (rows, 5) int64: address, target's address, size, format,
    and bits of the fp64 parameter."""
    entry, lane = table + tl.program_id(0) * 5, tl.arange(0, BLOCK)
    source = tl.load(entry).to(tl.pointer_type(tl.float32))
    target = tl.load(entry + 1).to(tl.pointer_type(OUT))
    size, kind = tl.load(entry + 2), tl.load(entry + 3)
    if EVEN:  # wide loads and stores
        source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
        size = tl.multiple_of(size, 8)
    param = tl.load(entry + 4).to(tl.float64, bitcast=True)
    bound = param.to(tl.float32)
    scale = bound * 0.0 + 1.0
    if kind >= 2:  # the sum is in fp64, so that its order cannot show in bf16
        peak, square = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float64)
        for i in range(0, size, BLOCK):
            w = tl.load(source + i + lane, mask=i + lane < size, other=0.0)
            peak = tl.maximum(peak, tl.abs(w))
            square += w.to(tl.float64) * w.to(tl.float64)
        by_peak = tl.div_rn(tl.maximum(tl.max(peak, 0), 1e-8), bound)
        by_rms = tl.maximum((tl.sqrt(tl.sum(square, 0) / size) * param).to(tl.float32), 1e-8)
        scale = round_mantissa(tl.where(kind == 2, by_peak, by_rms), 16)
        bound = tl.where(kind == 2, bound, 127.0)
    for i in range(0, size, BLOCK):
        w = tl.load(source + i + lane, mask=i + lane < size, other=0.0)
        if kind >= 2:  # adding 1.5 * 2^23 rounds half to even; NaN passes through
            q = tl.clamp(tl.div_rn(w, scale), -bound, bound, propagate_nan=tl.PropagateNan.ALL)
            value = round_mantissa(((q + 12582912.0) - 12582912.0) * scale, 16)
        elif kind == 1:
            value = round_fp8(w)
        else:
            value = round_mantissa(w, 16)
        tl.store(target + i + lane, value.to(OUT), mask=i + lane < size)


class FusedSnap:
    """Rounds many fp32 masters to their grids, into compute-dtype tensors, in one launch.

    items: (master, target, format, parameter); contiguous, of equal shape, targets of one dtype;
    parameter: the bound 2^(n-1) - 1 (int), the step in standard deviations (sigma). Addresses are
    kept: update tensors in place. Bit-equal to `snap`."""

    def __init__(self, items: list[tuple[Tensor, Tensor, str, float]]):
        self.dtype, rows = items[0][1].dtype, []
        for master, target, kind, parameter in items:
            assert master.shape == target.shape and all(map(Tensor.is_contiguous, (master, target)))
            size = master.numel()  # a vector is one row; bf16 and fp8 take rows of 1024
            columns = size // (len(master) if master.dim() > 1 else 1)
            start = torch.arange(0, size, 1024 if FORMATS[kind] < 2 else columns)
            addresses = (t.data_ptr() + t.element_size() * start for t in (master, target))
            bits = torch.tensor(parameter, dtype=torch.float64).view(torch.int64)
            constants = (torch.full_like(start, int(n)) for n in (FORMATS[kind], bits))
            sizes = start.diff(append=torch.tensor([size]))
            rows.append(torch.stack((*addresses, sizes, *constants), 1))
        table = torch.cat(rows)
        self.even = not (table[:, :3] % torch.tensor([16, 16, 8])).any()
        self.table = table.to(items[0][0].device)

    def __call__(self) -> None:
        out = getattr(tl, str(self.dtype).removeprefix("torch."))
        snap_rows[(len(self.table),)](self.table, OUT=out, EVEN=self.even, BLOCK=1024, num_warps=4)


# -- mixer: all between Mamba-2's projections as one op ------------------------
# As ops of their own, convolution, scan and gate would hand the compiler slices of in_proj's
# output, and gradients to be joined and padded: 1.6 GB a layer at 65,536 tokens.
# wide (B,T,W) holds z, x, B, C, dt and padding; v (B,T,H*P+2N) the convolution's x, B, C.
@jit
def conv_input(u, init, t, c, ok, C, W, K: tl.constexpr):
    """Inputs at time t; before time 0 those of init (K-1 rows), else zeros."""
    x = tl.load(u + t * W + c, mask=ok & (t >= 0), other=0.0).to(tl.float32)
    if init is not None:
        earlier = ok & (t < 0) & (t > -K)
        x += tl.load(init + (t + K - 1) * C + c, mask=earlier, other=0.0).to(tl.float32)
    return x


@jit
def conv_begin(u, w, bias, init, t, c, ok, C, W, K: tl.constexpr):
    """For a walk from time t on: bias, four taps (0 beyond K), and the three inputs before t."""
    u1 = conv_input(u, init, t - 1, c, ok, C, W, K)
    u2 = conv_input(u, init, t - 2, c, ok, C, W, K)
    u3 = conv_input(u, init, t - 3, c, ok, C, W, K)
    w += c * K + K - 1
    w0 = tl.load(w, mask=ok, other=0.0).to(tl.float32)
    w1 = tl.load(w - 1, mask=ok & (K > 1), other=0.0).to(tl.float32)
    w2 = tl.load(w - 2, mask=ok & (K > 2), other=0.0).to(tl.float32)
    w3 = tl.load(w - 3, mask=ok & (K > 3), other=0.0).to(tl.float32)
    return tl.load(bias + c, mask=ok, other=0.0).to(tl.float32), w0, w1, w2, w3, u1, u2, u3


@jit
def conv_fwd(u, w, bias, init, out, T, C, W, K: tl.constexpr, S: tl.constexpr, BC: tl.constexpr):
    """S times of BC channels; u in rows of W, K <= 4. The inputs before stay in registers."""
    c, start = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1) * S
    b, ok = tl.program_id(2).to(tl.int64), c < C
    u, out = u + b * T * W, out + b * T * C + c
    if init is not None:
        init += b * (K - 1) * C
    shift, w0, w1, w2, w3, u1, u2, u3 = conv_begin(u, w, bias, init, start, c, ok, C, W, K)
    for i in range(0, S, 8):
        for j in tl.static_range(8):
            t = start + i + j
            live = ok & (t < T)
            u0 = tl.load(u + t * W + c, mask=live, other=0.0).to(tl.float32)
            x = shift + w0 * u0 + w1 * u1 + w2 * u2 + w3 * u3
            tl.store(out + t * C, (x * tl.sigmoid(x)).to(out.dtype.element_ty), mask=live)
            u1, u2, u3 = u0, u1, u2


@jit
def conv_bwd(u, w, bias, init, dout, du, dinit, part, T, C, W,
             K: tl.constexpr, S: tl.constexpr, BC: tl.constexpr):
    """du, dinit and, per strip of S times, the K + 1 sums for weight and bias. The walk goes on for
    three times past the strip, whose gradients reach back into it."""
    c, strip = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1)
    b, ok, start = tl.program_id(2).to(tl.int64), c < C, strip * S
    u, dout, du = u + b * T * W, dout + b * T * C + c, du + b * T * W + c
    if init is not None:
        init, dinit = init + b * (K - 1) * C, dinit + b * (K - 1) * C + c
    shift, w0, w1, w2, w3, u1, u2, u3 = conv_begin(u, w, bias, init, start, c, ok, C, W, K)
    zero = tl.zeros((BC,), tl.float32)
    d1, d2, d3, a0, a1, a2, a3, total = zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(0, S + 4, 4):
        for j in tl.static_range(4):
            t, r = start + i + j, i + j
            live = ok & (t < T)
            u0 = tl.load(u + t * W + c, mask=live, other=0.0).to(tl.float32)
            g = tl.load(dout + t * C, mask=live, other=0.0).to(tl.float32)
            x = shift + w0 * u0 + w1 * u1 + w2 * u2 + w3 * u3
            gate = tl.sigmoid(x)
            d0 = g * gate * (1.0 + x * (1.0 - gate))
            if i < S:
                a0, a1, a2, a3 = a0 + d0 * u0, a1 + d0 * u1, a2 + d0 * u2, a3 + d0 * u3
                total += d0
            grad = w0 * d3 + w1 * d2 + w2 * d1 + w3 * d0  # of the input three times before
            inside = ok & (r >= 3) & (r < S + 3) & (t < T + 3)
            tl.store(du + (t - 3) * W, grad.to(du.dtype.element_ty), mask=inside)
            if init is not None:
                before = ok & (strip == 0) & (r < 3) & (r >= 4 - K)
                tl.store(dinit + (r + K - 4) * C, grad.to(dinit.dtype.element_ty), mask=before)
            u1, u2, u3, d1, d2, d3 = u0, u1, u2, d0, d1, d2
    part += (b * tl.num_programs(1) + strip) * (K + 1) * C + c
    tl.store(part + K * C, total, mask=ok)
    tl.store(part + (K - 1) * C, a0, mask=ok)
    tl.store(part + (K - 2) * C, a1, mask=ok & (K > 1))
    tl.store(part + (K - 3) * C, a2, mask=ok & (K > 2))
    tl.store(part + (K - 4) * C, a3, mask=ok & (K > 3))


# The scan. The state of a head stays on chip; Q, P and N are tile sizes. Row lengths are constexpr:
# as run-time values they cost thirty registers. Rows past T load as zeros, dt too, and change
# nothing. States in memory are (N, P) in the compute dtype, one per chunk.
@jit
def dot_tiles(a, b, acc=None):
    """Product of tiles in fp32; without TF32 where the tiles are fp32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def load_dt(raw, bias, ok):
    """x = raw + bias, and dt = softplus(x); both where ok, else dt = 0."""
    x = tl.load(raw, mask=ok, other=0.0).to(tl.float32) + bias
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e  # log(1 + e) without the rounding of 1 + e
    dt = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return x, tl.where(ok, tl.where(x > 20.0, x, dt), 0.0)


@jit
def ssd_scan(x, v, raw, bias, A_log, D, first, y, states, last, T, W: tl.constexpr, H: tl.constexpr,
             P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BACK: tl.constexpr):
    """One program per (head, sequence) walks the chunks: y from x, which is v, with left = C and
    right = B; the state with which each chunk begins goes to `states`.

    BACK: dx (y, in rows like v) from dy (x) is the same scan backwards in time, with left = B,
    right = C; its state is the gradient of the state."""
    ROW: tl.constexpr = H * P + 2 * N  # of v
    X: tl.constexpr = H * P if BACK else ROW
    Y: tl.constexpr = ROW if BACK else H * P
    STEP: tl.constexpr = -1 if BACK else 1
    dtype: tl.constexpr = x.dtype.element_ty
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, p, n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    row, chunks = i[:, None], tl.cdiv(T, Q)
    x, y = x + b * T * X + h * P + p[None, :], y + b * T * Y + h * P + p[None, :]
    raw, B = raw + b * T * W + h, v + b * T * ROW + H * P + n[None, :]
    left, right = (B, B + N) if BACK else (B + N, B)
    tile = (b * H + h) * chunks * N * P + n[:, None] * P + p[None, :]
    cell = (b * H + h) * P * N + p[None, :] * N + n[:, None]  # (N, P) view of a (P, N) state
    shift = tl.load(bias + h)
    rate = -tl.exp(tl.load(A_log + h)) * 1.4426950408889634  # log2(e): decays by exp2
    skip = tl.load(D + h).to(tl.float32)
    state = tl.load(first + cell) if first is not None else tl.zeros((N, P), tl.float32)
    c = (chunks - 1) * Q if BACK else 0
    dt = load_dt(raw + (c + i) * W, shift, c + i < T)[1]
    for _ in range(chunks):
        ok = c + row < T
        Ls = tl.load(left + (c + row) * ROW, mask=ok, other=0.0)
        Rs = tl.load(right + (c + row) * ROW, mask=ok, other=0.0)
        xs = tl.load(x + (c + row) * X, mask=ok, other=0.0)
        cs, total, now = tl.cumsum(dt * rate, 0), tl.sum(dt * rate, 0), state.to(dtype)
        if states is not None:
            tl.store(states + c // Q * N * P + tile, now)
        enter, leave = tl.exp2(cs), tl.exp2(total - cs) * dt
        if BACK:
            enter, leave = leave, enter
        out = dot_tiles(Ls, now) * enter[:, None]
        # x_j reaches y_i if j <= i; BACK: rows are j
        mix = dot_tiles(Ls, tl.trans(Rs)) * (dt[:, None] if BACK else dt[None, :])
        gap = STEP * (cs[:, None] - cs[None, :])  # masked before exp2, which may overflow there
        mix *= tl.exp2(tl.where(STEP * (row - i[None, :]) >= 0, gap, -float("inf")))
        out = dot_tiles(mix.to(dtype), xs, out) + skip * xs
        tl.store(y + (c + row) * Y, out.to(y.dtype.element_ty), mask=ok)
        Rs = (Rs * leave[:, None]).to(dtype)
        state = dot_tiles(tl.trans(Rs), xs, state * tl.exp2(total))
        c += STEP * Q
        dt = load_dt(raw + (c + i) * W, shift, (c + i < T) & (c >= 0))[1]
    if last is not None:
        tl.store(last + cell, state)


@jit
def ssd_bwd_bc(v, dy, raw, bias, A_log, states, dstates, draw, dv, part, T, W: tl.constexpr,
               H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr):
    """One program per (chunk, sequence) sums dB and dC over the heads in registers.

    B and C serve all heads: the gradient of C B^T is summed first and multiplied once; the rest of
    dB and dC passes through the states. The gradient of the log decay is the reverse sum of
    C_i.dC_i - B_i.dB_i, without the terms through the chunk's end, which cancel."""
    ROW: tl.constexpr = H * P + 2 * N  # of v and dv
    dtype: tl.constexpr = v.dtype.element_ty
    c, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, p, n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    chunks, start, ok = tl.num_programs(0), b * T + c * Q, c * Q + i < T
    row, live = i[:, None], ok[:, None]
    raw, draw = raw + start * W + i * W, draw + start * W + i * W
    part += (b * chunks + c) * 3 * H
    dy += start * H * P + row * (H * P) + p[None, :]
    x_at, B_at = start * ROW + row * ROW + p[None, :], start * ROW + H * P + row * ROW + n[None, :]
    Bs = tl.load(v + B_at, mask=live, other=0.0)
    Cs = tl.load(v + B_at + N, mask=live, other=0.0)
    cell = (b * H * chunks + c) * N * P + n[:, None] * P + p[None, :]
    gain = dot_tiles(Cs, tl.trans(Bs))
    acc = tl.zeros((Q, Q), tl.float32)
    sum_B, sum_C = tl.zeros((Q, N), tl.float32), tl.zeros((Q, N), tl.float32)
    for h in range(H):
        xs = tl.load(v + x_at + h * P, mask=live, other=0.0)
        g = tl.load(dy + h * P, mask=live, other=0.0)
        rate = -tl.exp(tl.load(A_log + h))
        x, step = load_dt(raw + h, tl.load(bias + h), ok)
        logs = step * (rate * 1.4426950408889634)
        cs, total = tl.cumsum(logs, 0), tl.sum(logs, 0)
        share = dot_tiles(g, tl.trans(xs))  # dy_i . x_j
        share *= tl.exp2(tl.where(row >= i[None, :], cs[:, None] - cs[None, :], -float("inf")))
        dD = tl.sum(tl.sum(tl.where(row == i[None, :], share, 0.0), 1), 0)
        column = tl.sum(share * gain, 0)  # by j, without dt_j
        share *= step[None, :]
        acc += share
        inside = tl.sum(share * gain, 1) - column * step
        S = tl.load(states + h * chunks * N * P + cell)
        dS = tl.load(dstates + h * chunks * N * P + cell)
        through = tl.exp2(total) * tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1), 0)
        out = dot_tiles(g, tl.trans(S)) * tl.exp2(cs)[:, None]
        sum_C += out
        q = tl.sum(out * Cs, 1)
        out = dot_tiles(xs, tl.trans(dS)) * tl.exp2(total - cs)[:, None]
        sum_B += out * step[:, None]
        r = tl.sum(out * Bs, 1)
        da = tl.cumsum(inside + q, 0, reverse=True) + tl.cumsum(r * step, 0) - r * step + through
        dx = tl.where(ok, (rate * da + column + r) * tl.sigmoid(x), 0.0)
        tl.store(draw + h, dx.to(dtype), mask=ok)
        tl.store(part + h, tl.sum(step * da, 0) * rate)
        tl.store(part + H + h, dD)
        tl.store(part + 2 * H + h, tl.sum(dx, 0))
    acc = acc.to(dtype)
    sum_B, sum_C = dot_tiles(tl.trans(acc), Cs, sum_B), dot_tiles(acc, Bs, sum_C)
    tl.store(dv + B_at, sum_B.to(dtype), mask=live)
    tl.store(dv + B_at + N, sum_C.to(dtype), mask=live)


@jit
def gate_norm(y, z, weight, out, rows, W, n, eps, R: tl.constexpr, BLOCK: tl.constexpr):
    """out = RMSNorm(y silu(z)) weight: R rows of n columns; z in rows of W."""
    col = tl.arange(0, BLOCK)
    w = tl.load(weight + col, mask=col < n, other=0.0).to(tl.float32)
    for i in range(R):
        row = (tl.program_id(0) * R + i).to(tl.int64)
        ok = (col < n) & (row < rows)
        gate = tl.load(z + row * W + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(y + row * n + col, mask=ok, other=0.0).to(tl.float32) * gate
        g *= tl.sigmoid(gate)
        g *= tl.rsqrt(tl.sum(g * g, 0) / n + eps) * w
        tl.store(out + row * n + col, g.to(out.dtype.element_ty), mask=ok)


@jit
def gate_norm_bwd(y, z, weight, dout, dy, dz, part, rows, W, n, eps,
                  R: tl.constexpr, BLOCK: tl.constexpr):
    """dy, dz (in rows of W like z), and the weight's gradient summed over R rows."""
    col = tl.arange(0, BLOCK)
    w = tl.load(weight + col, mask=col < n, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(R):
        row = (tl.program_id(0) * R + i).to(tl.int64)
        ok = (col < n) & (row < rows)
        gate = tl.load(z + row * W + col, mask=ok, other=0.0).to(tl.float32)
        value = tl.load(y + row * n + col, mask=ok, other=0.0).to(tl.float32)
        grad = tl.load(dout + row * n + col, mask=ok, other=0.0).to(tl.float32)
        sig = tl.sigmoid(gate)
        silu = gate * sig
        scale = tl.rsqrt(tl.sum(value * value * silu * silu, 0) / n + eps)
        normed = value * silu * scale
        total += grad * normed
        grad *= w
        grad = (grad - normed * (tl.sum(grad * normed, 0) / n)) * scale
        tl.store(dy + row * n + col, (grad * silu).to(dy.dtype.element_ty), mask=ok)
        dgate = grad * value * sig * (1.0 + gate * (1.0 - sig))
        tl.store(dz + row * W + col, dgate.to(dz.dtype.element_ty), mask=ok)
    tl.store(part + tl.program_id(0) * n + col, total, mask=col < n)


def _mix_outputs(wide, conv_weight, conv_bias, dt_bias, A_log, D, gain, conv_state, ssm_state,
                 chunk, save):
    """Result, final state; for the backward pass v, the scan's output, states at chunk starts."""
    (b, T, _), inner, channels, H = wide.shape, len(gain), len(conv_bias), len(A_log)
    P, N, new = inner // H, (channels - inner) // 2, wide.new_empty
    states = new((b, H, (T + chunk - 1) // chunk, N, P) if save else 0)
    final = new(b, H, P, N, dtype=torch.float32)
    return new(b, T, inner), final, new(b, T, channels), new(b, T, inner), states


def _mix_options(wide, conv_weight, A_log, gain, chunk):
    """Grid of the convolution, and what the launches of both passes share: its arguments, those of
    the scan and those of the gate."""
    (b, T, W), inner, channels, H = wide.shape, len(gain), len(conv_weight), len(A_log)
    grid = triton.cdiv(channels, 128), triton.cdiv(T, 64), b
    conv = dict(T=T, C=channels, W=W, K=conv_weight.size(-1), S=64, BC=128, num_warps=2)
    scan = dict(T=T, W=W, H=H, P=inner // H, N=(channels - inner) // 2, Q=chunk)
    gate = dict(rows=b * T, W=W, n=inner, eps=GATE_EPS, BLOCK=triton.next_power_of_2(inner))
    return grid, conv, scan, gate | dict(num_warps=4)


def _launch_mix(out, final, v, y, states, *inputs):
    *inputs, chunk, save = inputs
    (wide, conv_weight, conv_bias, dt_bias, A_log, D, gain, conv_state,
     ssm_state) = contiguous(*inputs)
    grid, conv, scan, gate = _mix_options(wide, conv_weight, A_log, gain, chunk)
    xBC, raw = wide[..., len(gain):], wide[..., len(gain) + len(conv_bias):]
    conv_fwd[grid](xBC, conv_weight, conv_bias, conv_state, v, **conv)
    ssd_scan[len(A_log), len(wide)](
        v, v, raw, dt_bias, A_log, D, ssm_state, y, states if save else None, final, **scan,
        BACK=False, num_warps=4, num_stages=3)
    gate_norm[(triton.cdiv(gate["rows"], 8),)](y, wide, gain, out, **gate, R=8)


def _launch_mix_backward(dwide, dconv_weight, dconv_bias, ddt_bias, dA_log, dD, dgain, dconv_state,
                         dssm_state, dout, dfinal, *inputs):
    *inputs, v, y, states, chunk, _ = inputs
    dout = torch.zeros_like(y) if dout is None else dout
    (dout, dfinal, wide, conv_weight, conv_bias, dt_bias, A_log, D, gain, conv_state,
     ssm_state) = contiguous(dout, dfinal, *inputs)
    grid, conv, scan, gate = _mix_options(wide, conv_weight, A_log, gain, chunk)
    xBC, raw = wide[..., len(gain):], wide[..., len(gain) + len(conv_bias):]
    dxBC, draw = dwide[..., len(gain):], dwide[..., len(gain) + len(conv_bias):]
    dy, dv, dstates = map(torch.empty_like, (y, v, states))
    chunks, new = states.size(2), functools.partial(wide.new_empty, dtype=torch.float32)
    part = new(triton.cdiv(gate["rows"], 64), len(gain))
    gate_norm_bwd[(len(part),)](y, wide, gain, dout, dy, dwide, part, **gate, R=64)
    torch.sum(part, 0, out=dgain)
    first = dssm_state if dssm_state.numel() else None
    ssd_scan[len(A_log), len(wide)](dy, v, raw, dt_bias, A_log, D, dfinal, dv, dstates, first,
                                    **scan, BACK=True, num_warps=4, num_stages=3)
    part = new(len(wide), chunks, 3, len(A_log))
    ssd_bwd_bc[chunks, len(wide)](v, dy, raw, dt_bias, A_log, states, dstates, draw, dv, part,
                                  **scan, num_warps=8, num_stages=2)
    draw[..., len(A_log):].zero_()  # padding
    taps = new(len(wide) * grid[1], conv["K"] + 1, len(conv_bias))
    conv_bwd[grid](xBC, conv_weight, conv_bias, conv_state, dv, dxBC, dconv_state, taps, **conv)
    taps = taps.sum(0)
    sums = *part.sum((0, 1)), taps[:-1].T.unsqueeze(1), taps[-1]
    for gradient, total in zip((dA_log, dD, ddt_bias, dconv_weight, dconv_bias), sums):
        gradient.copy_(total)


_mix = custom_op(
    "mamba_mix", "Tensor wide, Tensor conv_weight, Tensor conv_bias, Tensor dt_bias, Tensor A_log, "
    "Tensor D, Tensor gain, Tensor? conv_state, Tensor? ssm_state", "int chunk, bool save", 5,
    _mix_outputs, _launch_mix, _launch_mix_backward)


def mamba_mix_triton(wide: Tensor, *parameters: Tensor, chunk: int = 64,
                     state: tuple | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """mamba_mix by kernels."""
    (conv_weight, conv_bias, *_, gain), length = parameters, wide.size(1)
    reach = conv_weight.size(-1) - 1
    if length < reach:  # earlier inputs stay in the state
        return mamba_mix(wide, *parameters, chunk=chunk, state=state)
    inputs = wide, *parameters, *(state or (None, None))
    needed = any(t is not None and t.requires_grad for t in inputs)
    out, final, *_ = _mix(*inputs, chunk, needed and torch.is_grad_enabled())
    tail = wide[:, length - reach:, len(gain):len(gain) + len(conv_bias)]
    return out, (as_new(tail), final)  # a view would keep all of wide in memory


# -- MLP: the activation as part of its two products ---------------------------
# On its own, the activation would read the hidden units once more forward and twice more backward,
# and write them once more each time; its norm waits until after `down`, since a row's factor
# commutes with a product. The idea is from https://github.com/KellerJordan/modded-nanogpt.
LEAKS = {"relu2": 0.0, "leaky_relu2": 0.5}  # slope below 0, before squaring, by ACTIVATION


@jit
def leaky_square(h, LEAK: tl.constexpr):
    """Leaky ReLU, squared, and its derivative."""
    kept = tl.where(h > 0.0, h, LEAK * h)
    return kept * kept, 2.0 * kept * tl.where(h > 0.0, 1.0, LEAK)


@jit
def mlp_end(acc, h, out, power, row, n, cell, LEAK: tl.constexpr, BACK: tl.constexpr):
    """What mlp_product makes of half of its tile's columns; `cell` from the first of them."""
    live = row < n
    ok = live[:, None]
    if BACK:
        square, slope = leaky_square(tl.load(h + cell, mask=ok, other=0.0).to(tl.float32), LEAK)
        if power is not None:
            acc += square * (2.0 * tl.load(power + row, mask=live, other=0.0))[:, None]
        acc *= slope
    else:
        tl.store(h + cell, acc.to(h.dtype.element_ty), mask=ok)
        acc, _ = leaky_square(acc, LEAK)
        if power is not None:
            tl.store(power + row, tl.sum(acc * acc, 1), mask=live)
    tl.store(out + cell, acc.to(out.dtype.element_ty), mask=ok)


@jit
def mlp_product(x, w, h, out, power, n, K, F, wk, wf, LEAK: tl.constexpr, BACK: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A tile of the product of x (n, K) and w (K, F), which has strides wk and wf; BK divides K, BN
    divides F. Forward: h = x w, out = leaky_square(h), power (2F / BN, n) sums of out^2 in a row.
    BACK: out is the gradient of h, from those of leaky_square(h), x w, and of power, (n,)."""
    f, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    row, start = tl.arange(0, BM), (tl.program_id(1) * BM).to(tl.int64)
    left = n - tl.program_id(1) * BM  # rows
    x_cell, w_cell = row[:, None] * K + k[None, :], k[:, None] * wk + f[None, :] * wf
    x += start * K
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        tile = tl.load(x + x_cell, mask=(row < left)[:, None], other=0.0)
        acc = dot_tiles(tile, tl.load(w + w_cell), acc)
        x += BK
        w += BK * wk
    if power is not None:
        power += start if BACK else start + 2 * tl.program_id(0) * n
    cell = row[:, None] * F + tl.arange(0, BN // 2)[None, :]
    start = start * F + tl.program_id(0) * BN
    # in halves: the whole tile would spill registers
    first, second = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
    mlp_end(first, h + start, out + start, power, row, left, cell, LEAK, BACK)
    if power is not None and not BACK:
        power += n
    start += BN // 2
    mlp_end(second, h + start, out + start, power, row, left, cell, LEAK, BACK)


def _launch_mlp_product(x, w, h, out, power, leak, back):
    (n, K), F = x.shape, w.size(1)
    tile = mlp_tile(h)
    mlp_product[F // tile, triton.cdiv(n, 128)](
        x, w, h, out, power, n, K, F, *w.stride(), LEAK=leak, BACK=back, BM=128, BN=tile,
        BK=128 // x.element_size(), num_warps=8, num_stages=3)


def mlp_tile(h: Tensor) -> int:
    """Columns of a program; wider tiles of fp32 do not fit into shared memory."""
    return 128 if h.size(1) % 256 or h.element_size() > 2 else 256


def _mlp_outputs(x, up, down, leak, norm):
    """Result without the norm, sums of squares per row; for the backward pass h and its square."""
    new, n = x.new_empty, len(x)
    power = new(n if norm else 0, dtype=torch.float32)
    return new(n, len(down)), power, new(n, len(up)), new(n, len(up))


def _launch_mlp(z, power, h, square, x, up, down, leak, norm):
    x, up, down = contiguous(x, up, down)
    parts = power.new_empty(2 * len(up) // mlp_tile(h), len(x)) if norm else None
    _launch_mlp_product(x, up.T, h, square, parts, leak, back=False)
    if norm:
        torch.sum(parts, 0, out=power)
    torch.mm(square, down.T, out=z)


def _launch_mlp_backward(dx, dup, ddown, dz, dpower, x, up, down, h, square, leak, norm):
    dz = x.new_zeros(len(x), len(down)) if dz is None else dz
    dz, dpower, x, up, down = contiguous(dz, dpower, x, up, down)
    dh = torch.empty_like(h)
    _launch_mlp_product(dz, down, h, dh, dpower, leak, back=True)
    for pair, gradient in (((dz.T, square), ddown), ((dh.T, x), dup), ((dh, up), dx)):
        torch.mm(*pair, out=gradient)


_mlp = custom_op("mlp", "Tensor x, Tensor up, Tensor down", "float leak, bool norm", 4,
                 _mlp_outputs, _launch_mlp, _launch_mlp_backward)


def mlp_fused(x: Tensor, up: Tensor, down: Tensor, leak: float, eps: float | None) -> Tensor:
    """down(norm(leaky_relu(up x)^2)) of x (...,D), up (F,D), down (D,F), all in one dtype; D a
    multiple of 64, F of 128. eps: of the RMSNorm (None: no norm)."""
    z, power, *_ = _mlp(x.flatten(0, -2), up, down, leak, eps is not None)
    if eps is not None:
        z = (z.float() * (power / len(up) + eps).rsqrt()[:, None]).to(z.dtype)
    return z.view(*x.shape[:-1], -1)


# -- scan by mamba-ssm ---------------------------------------------------------
def mamba_ssm(launcher: str, *arguments, **options):
    """Call launcher fwd or bwd of https://github.com/state-spaces/mamba; without arguments only
    import it. Turns import-time and launch-time Triton mismatches into one UserError."""
    try:
        if "mamba_ssm" not in sys.modules:
            spec = importlib.util.find_spec("mamba_ssm")
            if spec is None:
                raise ModuleNotFoundError("the package is not installed")
            # Its __init__ imports a CUDA extension that a pure-Python build lacks.
            parent = sys.modules["mamba_ssm"] = types.ModuleType("mamba_ssm")
            parent.__path__, parent.__spec__ = list(spec.submodule_search_locations), spec
        from mamba_ssm.ops.triton import ssd_combined
        launch = getattr(ssd_combined, f"_mamba_chunk_scan_combined_{launcher}")
        if arguments:
            return launch(*arguments, **options)
        inspect.signature(launch).bind_partial(D=0, initial_states=0)  # TypeError if unknown
    except (torch.OutOfMemoryError, AssertionError):
        raise
    except Exception as e:  # an incompatible Triton fails in many ways
        ours, tritons = (package_version(name) or "(none)" for name in ("mamba_ssm", "triton"))
        raise UserError(
            f"SSD_KERNEL=mamba_ssm: mamba_ssm {ours} does not work with triton {tritons} and torch "
            f"{torch.__version__} ({error_text(e)}); install mamba-ssm==2.3.2.post1 (setup_jepa.sh "
            "does), or set SSD_KERNEL=fused or SSD_KERNEL=torch") from e


def _launch_scan(y, final, x, dt, A, B, C, D, initial_state, chunk):
    results = mamba_ssm("fwd", x, dt, A, B[:, :, None], C[:, :, None], chunk, D=D.float(),
                        initial_states=initial_state)
    return results[0], results[5]


def _launch_scan_backward(dx, ddt, dA, dB, dC, dD, dinitial, dy, dfinal, x, dt, A, B, C, D,
                          initial_state, chunk):
    dy, dfinal = contiguous(torch.zeros_like(dx) if dy is None else dy, dfinal)
    results = mamba_ssm(  # x stands in for the output, of which only the shape is read
        "bwd", dy, x, dt, A, B[:, :, None], C[:, :, None], x, chunk, D=D.float(),
        initial_states=initial_state, dfinal_states=dfinal,
        dx=dx, ddt=ddt, dB=dB[:, :, None], dC=dC[:, :, None])
    for gradient, result in zip((dA, dD, dinitial), (results[2], results[5], results[8])):
        if result is not None:
            gradient.copy_(result)


_scan = custom_op(
    "ssd_mamba_ssm", "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, "
    "Tensor? initial_state", "int chunk", 2, lambda x, dt, A, B, *_: (
        x.new_empty(x.shape), dt.new_empty(len(x), *x.shape[2:], B.size(2))),
    _launch_scan, _launch_scan_backward)


def ssd_mamba_ssm(*inputs: Tensor, chunk: int = 256, initial_state: Tensor | None = None):
    """ssd_chunked by mamba-ssm."""
    return _scan(*inputs, initial_state, chunk)


class Kernels(NamedTuple):
    """What the mixers call: `mix` has the arguments and results of mamba_mix."""
    name: str = "torch"  # of the scan
    mix: Callable = mamba_mix
    chunk: int = 64      # where SSD_CHUNK=0
    mlp: bool = False    # whether mlp_fused takes the MLPs that it can, in training


FORMS = {  # in order of preference; mamba-ssm writes fp32 states: 2.5 GB a layer, 3.5 at chunk 64
    "fused": Kernels("fused", mamba_mix_triton),
    "mamba_ssm": Kernels("mamba_ssm", functools.partial(mamba_mix, ssd=ssd_mamba_ssm), 256),
    "torch": Kernels()}


# -- self-check and choice -----------------------------------------------------
# A user's GPU may be the first that runs a kernel: it meets its PyTorch twin there, on small odd
# sizes, forward and backward.
CHECK_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # largest difference / largest entry
COSTS = {"head": "about +10 ms", "mixer": "about +17 ms by mamba-ssm, +32 ms by PyTorch",
         "mlp": "about +1 ms", "snap": "about +2 ms"}  # modelled


def random_tensors(device: torch.device, dtype: torch.dtype, *shapes) -> list[Tensor]:
    """Normal values, the same on every device: fp32 from one generator, then cast."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def check_table(c: Config, device: torch.device, dtype: torch.dtype) -> dict[str, tuple]:
    """Kernel, PyTorch twin and inputs of what this configuration uses; smallest tiles on a CPU."""
    real = device.type == "cuda"
    P, N, V, H = (HEADDIM, c.d_state, c.vocab_size, 3) if real else (16, 16, 300, 2)
    chunk, T, f32 = c.ssd_chunk or 64 if real else 16, 101 if real else 19, torch.float32
    cap, kind, make = c.logit_softcap, c.softcap_type, functools.partial(random_tensors, device)
    targets = torch.arange(37, device=device) % V

    def head(*inputs):
        return token_loss_fused(*inputs, targets, softcap=cap, softcap_type=kind, z_loss=1e-2)

    def head_twin(h, w, bias):
        logits = soft_cap(F.linear(h, w) + bias, cap, kind)
        nll = F.cross_entropy(logits, targets)
        return nll + 1e-2 * logits.logsumexp(1).square().mean(), nll.detach()

    def mlp(form, *inputs):
        out = form(*inputs, LEAKS[c.activation], MLP_EPS if c.mlp_norm else None)
        return (out,)

    def mlp_twin(x, up, down, leak, eps):
        hidden = F.leaky_relu(F.linear(x, up), leak).square()
        return F.linear(hidden if eps is None else rms_norm(hidden, eps), down)

    def mix(form, wide, *rest):
        out, state = form(wide, *rest[:6], chunk=chunk, state=rest[6:])
        return out, *state

    table = {"head": (head, head_twin, [*make(dtype, (37, 32), (V, 32)), *make(f32, V)])}
    if "m" in c.pattern and c.ssd_kernel in ("auto", "fused") and not obstacle("fused", c, device):
        inner, channels = H * P, H * P + 2 * N
        wide, tail = make(dtype, (2, T, inner + channels + H + 5), (2, c.d_conv - 1, channels))
        weight, *rest = make(f32, (channels, 1, c.d_conv), channels, H, H, H, inner, (2, H, P, N))
        bias, dt_bias, A_log, D, gain, state = rest
        inputs = [wide, weight * 0.5, bias, dt_bias - 2, A_log, D, gain, tail, state]
        forms = (functools.partial(mix, form) for form in (mamba_mix_triton, mamba_mix))
        table["mixer"] = *forms, inputs
    if c.mlp_mult and c.activation in LEAKS and c.mlp_kernel == "auto":
        forms = (functools.partial(mlp, form) for form in (mlp_fused, mlp_twin))
        table["mlp"] = *forms, make(dtype, (37, 64), (256, 64), (64, 256))
    return table


def values_and_gradients(function: Callable, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results of function(*inputs), and the gradients of a fixed linear form of them."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = function(*leaves)
    weights = random_tensors(leaves[0].device, torch.float32, *(t.shape for t in results))
    total = sum((t.float() * w).sum() for t, w in zip(results, weights) if t.requires_grad)
    return [*(t.detach() for t in results), *torch.autograd.grad(total, leaves)]


def kernel_fault(row: tuple) -> str:
    """Fault of a row of check_table: an exception or too large a difference; "" if none."""
    kernel, twin, inputs = row
    exact = values_and_gradients(twin, [t.float() for t in inputs])
    try:
        gaps = [(a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-6)
                for a, b in zip(values_and_gradients(kernel, inputs), exact)]
        worst = float(torch.stack(gaps).max())  # NaN stays NaN
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error_text(error)
    limit = CHECK_LIMITS[inputs[0].dtype]
    return "" if worst <= limit else f"off by {worst:.2g} of the largest value, limit {limit:g}"


def replaced(name: str, fault: str, check: str) -> str:
    """The log's line about a kernel that PyTorch replaces; UserError under KERNEL_CHECK=strict."""
    if check == "strict":
        raise UserError(f"KERNEL_CHECK=strict: kernel {name}: {fault}")
    return f"kernel {name}: {fault}; replaced ({COSTS[name]} per step of 65,536 tokens, modelled)"


def check_kernels(c: Config, runtime: Runtime) -> dict[str, str]:
    """Fault of each kernel, "" if none; remembered beside Triton's own cache, by device, versions,
    source and configuration."""
    if c.kernel_check == "0" or not runs_triton(runtime.device):
        return {}
    facts = [runtime.describe(), c.model_config(), c.ssd_kernel, c.ssd_chunk, source_text()]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton/cache")
    path, faults = folder / f"train_jepa_check_{key}.json", {}
    with contextlib.suppress(OSError, ValueError):
        faults = dict(json.loads(path.read_text()))
    dtype = torch.float32 if INTERPRETED else runtime.dtype  # its bf16 products are wrong
    for name, row in check_table(c, runtime.device, dtype).items():
        if name in faults:
            continue
        faults[name] = kernel_fault(row)
        with contextlib.suppress(OSError, UserError):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(faults).encode())
        try:
            runtime.synchronize()
        except RuntimeError:  # an illegal access: nothing more runs in this process
            raise UserError(f"kernel {name} broke the GPU's context ({faults[name]}); start again: "
                            f"{path} now says so, and PyTorch replaces it") from None
    return faults


def obstacle(form: str, c: Config, device: torch.device) -> str:
    """Why this form of the mixer cannot run here, or ""."""
    if form != "torch" and device.type != "cuda" and not INTERPRETED:
        return f"SSD_KERNEL={form} needs a CUDA device; on {device.type} set it to torch or auto"
    if form == "fused":
        if triton is None:
            return "SSD_KERNEL=fused needs the package triton: pip install triton"
        for name, size in (("D_STATE", c.d_state), ("SSD_CHUNK", c.ssd_chunk or 64)):
            if size not in (16, 32, 64, 128):
                return f"{name}={size}: SSD_KERNEL=fused takes 16, 32, 64 or 128; else set torch"
        if c.d_conv > 4:
            return f"D_CONV={c.d_conv}: SSD_KERNEL=fused takes up to 4; else set torch"
    if form == "mamba_ssm":
        try:
            mamba_ssm("fwd"), mamba_ssm("bwd")
        except UserError as error:
            return str(error)
    return ""


def choose_kernels(c: Config, runtime: Runtime) -> tuple[Kernels, str]:
    """The forms for this device and SSD_KERNEL, and lines for the log about what was replaced.

    auto: the first of FORMS that works on this GPU. UserError if a form asked for by name cannot
    run, or under KERNEL_CHECK=strict if a kernel is at fault."""
    on_gpu, forms = runtime.device.type == "cuda" or INTERPRETED, list(FORMS)
    faults = runtime.main_first(lambda: check_kernels(c, runtime))
    faults = {name: fault for name, fault in faults.items() if fault}
    REPLACED.clear()
    REPLACED.update(faults)
    notes = [replaced(name, fault, c.kernel_check) for name, fault in faults.items()]
    auto = "fused" if on_gpu else "torch"
    for form in forms[forms.index(auto if c.ssd_kernel == "auto" else c.ssd_kernel):]:
        if form == "fused" and "mixer" in faults:
            continue
        reason = obstacle(form, c, runtime.device)
        if not reason:
            break
        if form == c.ssd_kernel:
            raise UserError(reason)
        notes.append(f"{reason}; taking another form")
    narrow = runtime.dtype == torch.bfloat16 or INTERPRETED  # products of fp32 are slow in Triton
    mlp = runs_triton(runtime.device) and narrow and c.mlp_kernel == "auto" and "mlp" not in faults
    return FORMS[form]._replace(mlp=mlp), "\n".join(notes)


# ------------------------------------------------------------------------------
# blocks: norm, linear layer, mixers, MLP, residual block
# ------------------------------------------------------------------------------

# Each module names the roles of its parameters; a role decides the optimizer and the storage.
MATRICES = MATRIX, MLP_MATRIX, IN_PROJ = "matrix", "MLP matrix", "in_proj"  # Muon, INT rows
EMBEDDING, HEAD, CORRECTION = "embedding", "head", "correction"
SCALAR, STATE = "scalar", "state"  # STATE: of a recurrence, without weight decay
CONTROL = "control"                # scales, mixes and gains, which system B stores in fp32
FP32_EPS = torch.finfo(torch.float32).eps
State = tuple[Tensor, ...]  # what a mixer carries from one call to the next, batch first


def named_roles(module: nn.Module, prefix: str = "") -> list[tuple[str, str, nn.Parameter]]:
    """(name, role, parameter) of every parameter; KeyError for one whose module names no role."""
    return [(f"{prefix}{path}.{name}" if path else prefix + name, part.roles[name], parameter)
            for path, part in module.named_modules()
            for name, parameter in part.named_parameters(recurse=False)]


class Linear(nn.Module):
    """y = x W^T (+ b) with W (out, in) and torch's Linear init; W is cast to x's type at use."""

    def __init__(self, inputs: int, outputs: int, bias=False, zero=False, role=MATRIX):
        super().__init__()
        self.roles = {"weight": role, "bias": SCALAR}
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        for parameter in () if zero else self.parameters():
            nn.init.uniform_(parameter, -inputs ** -0.5, inputs ** -0.5)

    def cast(self, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """The weight in dtype, its rows times scale (out,)."""
        return (self.weight if scale is None else scale[:, None] * self.weight).to(dtype)

    def forward(self, x: Tensor, scale: Tensor | None = None, pad: int = 0) -> Tensor:
        """scale (out,): factors of the outputs; pad: zeros to append to them. On a GPU the scale
        goes into the weights, which saves reading the outputs again for its gradient, and writing a
        gradient for the product."""
        weight = self.cast(x.dtype, scale if x.is_cuda else None)
        if pad:
            weight = F.pad(weight, (0, 0, 0, pad))
        y = F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        return y if scale is None or x.is_cuda else scale.to(x.dtype) * y


class Mamba2(nn.Module):
    """Mamba-2 (https://arxiv.org/abs/2405.21060), with the weights of mamba_ssm's
    Mamba2(headdim=64, ngroups=1). State: the convolution's last K-1 inputs (B,K-1,C), and the
    SSM's (B,H,P,N) in fp32."""
    roles = {"dt_bias": STATE, "A_log": STATE, "D": STATE}

    def __init__(self, c: Config, kernels: Kernels):
        super().__init__()
        self.kernels, self.chunk = kernels, c.ssd_chunk or kernels.chunk
        inner, heads = c.d_inner, c.d_inner // HEADDIM
        channels = inner + 2 * c.d_state  # x, B, C; in_proj's rows are z, x, B, C, dt
        self.state_shapes = (c.d_conv - 1, channels), (heads, HEADDIM, c.d_state)
        self.in_proj = Linear(c.model_dim, inner + channels + heads, role=IN_PROJ)
        self.conv1d = nn.Conv1d(channels, channels, c.d_conv, groups=channels)
        dt = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner)
        self.conv1d.roles = self.norm.roles = {"weight": SCALAR, "bias": SCALAR}
        self.out_proj = Linear(inner, c.model_dim)

    def empty_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        conv, ssm = self.state_shapes
        return (torch.zeros(batch, *conv, dtype=dtype, device=device),
                torch.zeros(batch, *ssm, device=device))

    def forward(self, u: Tensor, state=None, scale: Tensor | None = None) -> tuple[Tensor, State]:
        generates = state is not None and u.size(1) == 1  # by the recurrence itself
        mix = functools.partial(mamba_mix, ssd=ssd_position) if generates else self.kernels.mix
        pad = -len(self.in_proj.weight) % 8 if u.is_cuda else 0  # wide loads need aligned rows
        wide, conv = self.in_proj(u, pad=pad), self.conv1d
        out, state = mix(wide, conv.weight, conv.bias, self.dt_bias, self.A_log, self.D,
                         self.norm.weight, chunk=self.chunk, state=state)
        return self.out_proj(out, scale), state


def rotary_table(positions: int, width: int, base: float, device: torch.device) -> Tensor:
    """Cosines and sines (2,positions,width/2), in fp32: bf16 has too few positions above 256."""
    frequency = base ** (-torch.arange(width // 2, device=device) / (width // 2))
    angle = torch.outer(torch.arange(positions, device=device), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding (https://arxiv.org/abs/2104.09864), half split, of x (B,T,heads,width)."""
    (a, b), (cos, sin) = x.float().chunk(2, dim=-1), table.unsqueeze(2)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last T of S positions: q (B,T,heads,width), k and v (B,S,kv heads,width).

    Queries of the earlier positions are zeros, whose results are dropped: on CUDA grouped queries
    have a fast kernel for square causal attention; with a mask they would take the fp32 one."""
    earlier = k.size(1) - q.size(1) if q.size(1) > 1 else 0  # a single query sees all positions
    if earlier:
        q = F.pad(q, (0, 0, 0, 0, earlier, 0))
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(*heads_first, is_causal=q.size(1) > 1,
                                       enable_gqa=q.size(2) != k.size(2)).transpose(1, 2)
    return y[:, earlier:] if earlier else y


class Attention(nn.Module):
    """Causal attention: grouped queries (https://arxiv.org/abs/2305.13245), RMS-normalized q and k,
    rotary positions, a gain per query head. State: keys (before rotation) and values so far."""
    roles = {"q_gain": CONTROL}
    empty_state = staticmethod(lambda *_: None)  # keys and values have no fixed size

    def __init__(self, c: Config, kernels: Kernels):
        super().__init__()
        dim, heads, kv_heads = c.model_dim, c.num_heads, c.num_kv_heads
        self.width, self.base, self.eps = dim // heads, c.rope_base, c.norm_eps
        self.sizes = heads, kv_heads
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, kv_heads * self.width)
        self.v_proj = Linear(dim, kv_heads * self.width)
        self.out_proj = Linear(dim, dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((heads,), c.qk_gain_init))
        length, cpu = min(c.train_seq_len, 1 << 16), torch.device("cpu")
        table = rotary_table(length, self.width, self.base, cpu)  # a buffer: kernels only read it
        self.register_buffer("table", table, persistent=False)

    def forward(self, u: Tensor, state=None, scale: Tensor | None = None) -> tuple[Tensor, State]:
        (heads, kv), layers = self.sizes, (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([layer.weight for layer in layers]).to(u.dtype)  # u is read once
        qk, v = F.linear(u, weight).unflatten(-1, (-1, self.width)).split((heads + kv, kv), dim=2)
        qk, start = rms_norm(qk, self.eps), 0
        k = qk[:, :, heads:]
        if state is not None:
            start = state[0].size(1)
            k, v = torch.cat((state[0], k), dim=1), torch.cat((state[1], v), dim=1)
        length, table = k.size(1), self.table[:, :k.size(1)]
        if length > table.size(1):
            table = rotary_table(length, self.width, self.base, u.device)
        gain = torch.cat((self.q_gain, self.q_gain.new_ones(kv)))[:, None]
        gain = gain.expand(*qk.shape[:3], 1)  # the gradient's first sums are then over one head
        q, rotated = rotate(qk * gain, table[:, start:]).to(u.dtype).split(self.sizes, dim=2)
        y = causal_attention(q, rotated if state is None else rotate(k, table), v)
        return self.out_proj(y.flatten(2), scale), (k, v)


# By letter. forward: u (B,T,D), the state before it (None: empty), a scale of the output (D,)
# -> (B,T,D), the state after it.
MIXERS = {"m": Mamba2, "a": Attention}


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x = (gate, up) (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# By ACTIVATION: the function, and how many inputs make one output.
ACTIVATIONS = {
    "relu2": (lambda x: F.relu(x).square(), 1),  # https://arxiv.org/abs/2109.08668
    "leaky_relu2": (lambda x: F.leaky_relu(x, 0.5).square(), 1),
    "swiglu": (swiglu, 2)}


class MLP(nn.Module):
    """up, activation, RMSNorm over the hidden units if asked for, zero-initialized down."""

    def __init__(self, c: Config, kernels: Kernels):
        super().__init__()
        self.activation, ratio = ACTIVATIONS[c.activation]
        self.eps, hidden = MLP_EPS if c.mlp_norm else None, c.mlp_mult * c.model_dim
        self.leak = LEAKS.get(c.activation)
        whole = c.model_dim % 64 == 0 and hidden % 128 == 0  # tiles
        self.fused = kernels.mlp and self.leak is not None and whole
        self.up = Linear(c.model_dim, hidden * ratio, role=MLP_MATRIX)
        self.down = Linear(hidden, c.model_dim, zero=True, role=MLP_MATRIX)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if self.fused and torch.is_grad_enabled():
            up, down = self.up.cast(x.dtype), self.down.cast(x.dtype, scale)
            return mlp_fused(x, up, down, self.leak, self.eps)
        hidden = self.activation(self.up(x))
        return self.down(hidden if self.eps is None else rms_norm(hidden, self.eps), scale)


class Block(nn.Module):
    """x = mix0 x + mix1 x0; x += scale * mixer(norm x); x += scale * MLP(norm x), if it has one.
    x, x0 (B,T,D); the state is the mixer's."""
    roles = {"mix": CONTROL, "mixer_scale": CONTROL, "mlp_scale": CONTROL}

    def __init__(self, c: Config, index: int, kernels: Kernels):
        super().__init__()
        dim, self.eps, self.mlp = c.model_dim, c.norm_eps, None
        self.mix = nn.Parameter(torch.eye(2, 1).repeat(1, dim))
        self.mixer = MIXERS[c.pattern[index]](c, kernels)
        self.mixer_scale = nn.Parameter(torch.ones(dim))
        if c.mlp_mult and index % c.mlp_every == 0:
            self.mlp, self.mlp_scale = MLP(c, kernels), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, x0: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        mixed, state = self.mixer(rms_norm(x, self.eps), state, self.mixer_scale)
        x = x + mixed
        if self.mlp is not None:
            x = x + self.mlp(rms_norm(x, self.eps), self.mlp_scale)
        return x, state


@CHECKS.append
def check_mixers(c: Config) -> Iterator[str]:
    if len(c.pattern) != c.num_layers or not set(c.pattern) <= set(MIXERS):
        yield f"MIXER={c.mixer}: mamba2, attention, or NUM_LAYERS={c.num_layers} letters m or a"
    if "m" in c.pattern and c.d_inner % HEADDIM:
        yield f"EXPAND*MODEL_DIM={c.d_inner}: must be a multiple of {HEADDIM}, Mamba-2's head width"
    if "a" in c.pattern and c.model_dim % (2 * c.num_heads):
        yield f"NUM_HEADS={c.num_heads}: must divide MODEL_DIM={c.model_dim} into even widths"
    if "a" in c.pattern and c.num_heads % c.num_kv_heads:
        yield f"NUM_KV_HEADS={c.num_kv_heads}: must divide NUM_HEADS={c.num_heads}"
    if "a" in c.pattern and c.carry_state:
        yield "CARRY_STATE=1: attention has no fixed-size state; use MIXER=mamba2"


# ------------------------------------------------------------------------------
# model: embedding, U-Net, output head with its tie modes, JEPA head
# ------------------------------------------------------------------------------

class Kept(torch.autograd.Function):
    """x as a tensor in memory; the compiler would look it up again wherever it is read."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.as_strided(x.size(), x.stride())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class LanguageModel(nn.Module):
    """Token ids to hidden states h, and h to logits; all that the artifact stores. A U-Net: the
    second half of the blocks adds the outputs of the first half, last in, first out."""
    roles = {"token_embed": EMBEDDING, "lm_head": HEAD, "lm_head_correction": CORRECTION,
             "vocab_bias": SCALAR, "skip_weights": CONTROL}

    def __init__(self, c: Config, kernels: Kernels | None = None):
        super().__init__()
        dim, embed, vocab, self.tie = c.model_dim, c.embed, c.vocab_size, c.tie_embeddings
        self.softcap, self.softcap_type, self.eps = c.logit_softcap, c.softcap_type, c.norm_eps
        untied = 0.02 if c.embed_style == "projected" else 1.0
        std = c.tied_embed_init_std if c.embed_style == "tied" and self.tie else untied
        self.token_embed = nn.Parameter(torch.randn(vocab, embed) * std)
        self.embed_proj = Linear(embed, dim) if embed != dim else None
        self.blocks = nn.ModuleList(
            Block(c, index, kernels or Kernels()) for index in range(c.num_layers))
        self.encoders = c.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(self.encoders, dim))
        self.vocab_bias = nn.Parameter(torch.zeros(vocab)) if c.vocab_bias else None
        self.embed_proj_rev = Linear(dim, embed) if self.tie in (1, 2) and embed != dim else None
        if self.tie == 0:
            bound = dim ** -0.5 if c.embed_style == "projected" else 0.0
            self.lm_head = nn.Parameter(torch.empty(vocab, dim).uniform_(-bound, bound))
        elif self.tie == 2:
            self.lm_head_correction = nn.Parameter(torch.zeros(vocab, embed))
        elif self.tie == 3:
            self.adapter = Linear(dim, embed)

    def empty_states(self, batch: int, dtype: torch.dtype, device: torch.device) -> list:
        return [block.mixer.empty_state(batch, dtype, device) for block in self.blocks]

    def trim_states(self, states: list, overlap: int) -> list:
        """The states with the last `overlap` positions of attention's keys and values."""
        trim = lambda part: as_new(part[:, max(0, part.size(1) - overlap):])
        return [tuple(map(trim, state)) if isinstance(block.mixer, Attention) else state
                for block, state in zip(self.blocks, states)]

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (B,T) -> x0 (B,T,D), RMS-normalized."""
        whole = ids.numel() > len(self.token_embed)  # then project the table, not each token
        x = (self.token_embed if whole else F.embedding(ids, self.token_embed)).to(dtype)
        x = rms_norm(x if self.embed_proj is None else self.embed_proj(x), FP32_EPS)
        return Kept.apply(F.embedding(ids, x) if whole else x)  # all blocks read it

    def forward(self, ids: Tensor, dtype: torch.dtype, states=None) -> tuple[Tensor, list]:
        """ids (B,T), the blocks' states before (None: empty) -> h (B,T,D), states after."""
        x = x0 = self.embed(ids, dtype)
        skips, new_states = [], []
        for index, block in enumerate(self.blocks):
            if index >= self.encoders and skips:
                x = x + self.skip_weights[index - self.encoders].to(dtype) * skips.pop()
            x, state = block(x, x0, states and states[index])
            new_states.append(state)
            if index < self.encoders:
                skips.append(x)
        return rms_norm(x, self.eps), new_states

    def features(self, h: Tensor) -> Tensor:
        """h (...,D) -> what the rows of `head` are multiplied with, (...,E), untied (...,D)."""
        if self.tie == 3:
            return F.gelu(self.adapter(h))
        return h if self.embed_proj_rev is None else self.embed_proj_rev(h)

    def head(self) -> Tensor:
        """The unembedding, (V,E), untied (V,D)."""
        if self.tie == 0:
            return self.lm_head
        return self.token_embed + self.lm_head_correction if self.tie == 2 else self.token_embed

    def logits(self, h: Tensor) -> Tensor:
        """h (...,D) -> capped logits (...,V) in fp32."""
        logits = F.linear(self.features(h), self.head().to(h.dtype)).float()
        if self.vocab_bias is not None:
            logits = logits + self.vocab_bias
        return soft_cap(logits, self.softcap, self.softcap_type)


def map_states(function: Callable[..., Tensor], *states: list[State]) -> list[State]:
    """A model's states with `function` of each tensor, or of those at one place of several."""
    return [tuple(map(function, *layer)) for layer in zip(*states)]


class NormedMLP(nn.Module):
    """Linear, LayerNorm, GELU, Linear, with a hidden width of twice the output."""
    roles = {"gain": SCALAR, "shift": SCALAR}

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.fc = Linear(inputs, 2 * outputs, bias=True)
        self.out = Linear(2 * outputs, outputs, bias=True)
        self.gain = nn.Parameter(torch.ones(2 * outputs))
        self.shift = nn.Parameter(torch.zeros(2 * outputs))

    def forward(self, x: Tensor) -> Tensor:
        gain, shift = self.gain.to(x.dtype), self.shift.to(x.dtype)
        return self.out(F.gelu(F.layer_norm(self.fc(x), gain.shape, gain, shift)))


PROJECTORS = {"none": nn.Identity, "linear": Linear, "mlp": NormedMLP}  # by PROJECTOR_TYPE


class JepaHead(nn.Module):
    """h to the latent z, and z to predictions of later latents; for training only, not stored.

    On CUDA a latent of linear projectors is extended by a 1 and, to align rows, seven zeros: each
    bias is a column of a weight, and no pass over the activations sums its gradient."""

    def __init__(self, c: Config):
        super().__init__()
        projector, latent = PROJECTORS[c.projector_type], c.latent
        self.normed, self.eps = c.predictor_norm, c.norm_eps
        self.projector, self.latent = projector(c.model_dim, latent), latent
        if c.jepa_on:
            hidden = c.predictor_hidden_mult * latent
            self.fc = Linear(latent, hidden, bias=not self.normed)
            self.out = Linear(hidden, latent, bias=not self.normed, zero=True)
            self.pred_proj = projector(latent, latent)
        self.extends = c.jepa_on and not self.normed and c.projector_type == "linear"

    def project(self, h: Tensor, extend: bool = False) -> Tensor:
        """h (...,D) -> z (...,L), extended (...,L+8)."""
        if not (extend and self.extends):
            return self.projector(h)
        one = F.pad(h.new_ones(1), (self.latent, 7))
        return F.linear(h, F.pad(self.projector.weight.to(h.dtype), (0, 0, 0, 8)), one)

    def predict(self, z: Tensor) -> Tensor:
        """z (...,L or L+8) -> predictions of the latents one position later, of the same width."""
        fc, out, last, dtype = self.fc, self.out, self.pred_proj, z.dtype
        if z.size(-1) > self.latent:
            extended = lambda layer: torch.cat((layer.weight, layer.bias[:, None]), 1).to(dtype)
            hidden = F.pad(F.gelu(F.linear(z, F.pad(extended(fc), (0, 7)))), (0, 1), value=1.0)
            weight = F.pad(last.weight.to(dtype) @ extended(out), (0, 7, 0, 8))
            one = F.pad(z.new_ones(1, 1), (out.weight.size(1), 7, self.latent, 7))
            return F.linear(F.pad(hidden, (0, 7)), weight + one)
        hidden = F.gelu(fc(rms_norm(z, self.eps) if self.normed else z))
        if not isinstance(last, Linear):
            return last(out(hidden))
        weight = last.weight.to(dtype)  # both layers as one
        bias = None if out.bias is None else weight @ out.bias.to(dtype)
        return F.linear(hidden, weight @ out.weight.to(dtype), bias)


# ------------------------------------------------------------------------------
# losses: tensors in, scalars out
# ------------------------------------------------------------------------------

TERMS = "ce", "jepa", "anti", "cov"  # order of loss weights, log columns and gradient shares
Active = namedtuple("Active", TERMS)  # which terms a step computes: a graph for each combination


@torch.compiler.assume_constant_result  # a tensor on the device, not a copy within the graph
def sigreg_knots(count: int, device: torch.device) -> Tensor:
    """(3, count) fp32: knots t on [0.2, 4], exp(-t^2/2), and that times trapezoid weights."""
    step = 3.8 / (count - 1)
    knots = [0.2 + step * i for i in range(count)]
    target = [math.exp(-t * t / 2) for t in knots]
    weights = [step * (1 if i in (0, count - 1) else 2) * target[i] for i in range(count)]
    return torch.tensor((knots, target, weights), device=device)


def sigreg_null(samples: int, knots: int = 17) -> float:
    """Expected SIGReg of standard normal samples: the integral of (1 - phi^2) w / samples."""
    _, target, weights = sigreg_knots(knots, torch.device("cpu")).double()
    return float((weights * (1 - target * target)).sum()) / samples


class Picked(torch.autograd.Function):
    """z[:, positions] of z (B,T,L). The gradient is looked up by position: adding it to zeros would
    write and read a tensor as large as z."""

    @staticmethod
    def forward(ctx, z: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.length = z.size(1)
        return z[:, positions]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        positions, = ctx.saved_tensors
        same = (positions[:, None] == positions).to(grad.dtype)  # a position may come twice
        place = torch.full((ctx.length,), len(positions), device=grad.device)
        place[positions] = torch.arange(len(positions), device=grad.device)
        return F.pad(same @ grad, (0, 0, 0, 1))[:, place], None


def sigreg(z: Tensor, directions: Tensor, knots: int = 17, axis: str = "batch") -> Tensor:
    """Distance of latents z (B,S,L) from an isotropic Gaussian along unit directions (M,L), by the
    characteristic function over `axis` (SIGReg, eq. 7, https://arxiv.org/abs/2511.08544)."""
    points, target, weights = sigreg_knots(knots, z.device)
    phase = F.linear(z.float(), directions).unsqueeze(-1) * points         # (B,S,M,knots)
    pooled = {"batch": (0,), "time": (1,), "both": (0, 1)}[axis]
    real, imaginary = phase.cos().mean(pooled), phase.sin().mean(pooled)
    return (((real - target).square() + imaginary.square()) * weights).sum(-1).mean()


def covariance_term(z: Tensor) -> Tensor:
    """System B's anti-collapse term over all positions of z (..., L), as in VICReg
    (https://arxiv.org/abs/2105.04906): mean relu(1 - std) + 0.04 * squared covariances / L."""
    flat = z.float().flatten(0, -2)
    flat = flat - flat.mean(0).detach()  # no gradient: the rows of flat sum to 0
    product = flat.T @ flat.detach()
    product = product + product.T - product.detach()  # one product in the backward pass, not two
    covariance = product / (len(flat) - 1)
    variance = covariance.diagonal()
    off_diagonal = covariance.square().sum() - variance.square().sum()
    return F.relu(1 - (variance + 1e-8).sqrt()).mean() + 0.04 * off_diagonal / z.size(-1)


def rollout(jepa: JepaHead, z: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(prediction, target) per horizon k = 1..steps: prediction k is made from prediction k-1 (at
    first from z, perhaps extended); its target is z (B,T,L) shifted by k."""
    prediction, width = z, jepa.latent
    for target in [z[:, k:, :width] for k in range(1, steps + 1)]:
        length = target.size(1)  # on CUDA all rows are predicted: the products would copy slices
        prediction = jepa.predict(prediction if z.is_cuda else prediction[:, :length])
        yield prediction[:, :length, :width], target


def jepa_loss(jepa: JepaHead, z: Tensor, steps: int, detach: bool) -> Tensor:
    """Mean over horizons of the MSE between prediction and target, in fp32."""
    errors = [F.mse_loss(prediction.float(), (target.detach() if detach else target).float())
              for prediction, target in rollout(jepa, z, steps)]
    return torch.stack(errors).mean()


def loss_terms(c: Config, model: LanguageModel, jepa: JepaHead | None, h: Tensor, targets: Tensor,
               positions: Tensor, directions: Tensor, active: Active) -> dict[str, Tensor]:
    """The active TERMS of h (B,T,D) for targets (B,T), unweighted; positions (S,), directions (M,L)
    are SIGReg's. "nll" is "ce" without z-loss and gradient, for the log, in nats per token."""
    terms = {}
    if active.ce:
        terms["ce"], terms["nll"] = token_loss_fused(
            model.features(h).flatten(0, 1), model.head(), model.vocab_bias, targets.flatten(),
            softcap=c.logit_softcap, softcap_type=c.softcap_type, z_loss=c.z_loss)
    if any(active[1:]):
        z = jepa.project(h, extend=active.jepa and h.is_cuda)
    if active.jepa:
        terms["jepa"] = jepa_loss(jepa, z, c.jepa_steps, c.detach_targets)
        z = z[..., :jepa.latent]
    if active.anti and c.anticollapse == "sigreg":
        picked = Picked.apply(z, positions)
        terms["anti"] = sigreg(picked, directions, c.sigreg_knots, c.sigreg_axis)
    elif active.anti:
        terms["anti"] = covariance_term(z)
    if active.cov:
        terms["cov"] = covariance_term(z)
    return terms


# ------------------------------------------------------------------------------
# schedules: pure functions of the progress p in [0, 1] (and, for the momentum, of the step)
# ------------------------------------------------------------------------------

class Progress(NamedTuple):
    """Steps done, fraction of the run done (of the wall clock under a cap), steps left."""
    step: int
    fraction: float
    steps_left: float


def measure_progress(step: int, iterations: int, elapsed: float, cap: float) -> Progress:
    """The progress that all schedules read. The nearer limit ends the run. The clock's is two mean
    steps before the cap (0: none), so that the last step lies within."""
    cap, mean = cap or math.inf, elapsed / step if step else 0.0
    left = min(iterations - step, (cap - elapsed) / mean if mean else math.inf)
    fraction = 1.0 if elapsed + 2 * mean >= cap else max(elapsed / cap, step / iterations)
    return Progress(step, min(fraction, 1.0), max(left, 0.0))


def lr_scale(progress: Progress, c: Config) -> float:
    """Rate over its base: 1, then linear to MIN_LR over WARMDOWN_FRACTION or WARMDOWN_ITERS."""
    left, warmdown = {"fraction": (1 - progress.fraction, c.warmdown_fraction),
                      "iters": (progress.steps_left, c.warmdown_iters)}[c.warmdown]
    scale = min(max(left / warmdown, 0.0), 1.0) if warmdown else 1.0
    return c.min_lr + (1 - c.min_lr) * scale


def muon_momentum(step: int, c: Config) -> float:
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM over the first steps."""
    start, steps = c.muon_momentum_warmup_start, c.muon_momentum_warmup_steps
    if not steps:
        return c.muon_momentum
    return start + (c.muon_momentum - start) * min(step / steps, 1.0)


class LossWeights(namedtuple("LossWeights", (*TERMS, "stage"))):
    """Weights of TERMS at one moment, and the stage's name for the log."""
    active = property(lambda self: Active(*(weight > 0 for weight in self[:len(TERMS)])))


def loss_weights(p: float, c: Config) -> LossWeights:
    """Joint: constant, with optional ramp and anneal. Staged (system B): JEPA, bridge, CE."""
    jepa = c.jepa_weight if c.jepa_on else 0.0
    if c.jepa_anneal:
        jepa *= max(0.0, 1 - p / c.jepa_anneal)
    if c.loss_schedule == "joint":
        ramp = min(p / 0.3, 1.0) if c.sigreg_schedule else 1.0
        return LossWeights(c.ce_weight, jepa, c.sigreg_lambda * ramp, c.jepa_cov, "joint")
    if p >= c.ce_pure_frac or not c.jepa_on:
        return LossWeights(c.ce_weight, 0.0, 0.0, 0.0, "ce")
    bridge = max(0.0, (p - c.jepa_pure_frac) / (c.ce_pure_frac - c.jepa_pure_frac))
    latent = [(1 - bridge) * weight for weight in (jepa, c.sigreg_weight, c.jepa_cov)]
    return LossWeights(c.ce_weight * bridge, *latent, "jepa" if p < c.jepa_pure_frac else "bridge")


def qat_on(p: float, fraction: float) -> bool:
    """Whether training runs on the storage grid: the last `fraction` of the run."""
    return fraction > 0 and p >= 1 - fraction


def averaging_on(p: float, start: float) -> bool:
    """Whether the EMA of the weights has begun (start 1 = never)."""
    return start < 1 and p >= start


# ------------------------------------------------------------------------------
# storage: the grid of every stored tensor; training snaps to exactly what the artifact decodes to
# ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Grid:
    """Fake-quantization grid: the values that a stored tensor can take, and their form in the file.
    A kind of grid is a subclass in GRIDS: encode(rows), of (R, C) in fp32, gives the file's arrays,
    decode(arrays) the values."""
    name: str        # as in the artifact: "int4", "fp8"
    pattern = ""     # regular expression of the kind's names
    symbols = True   # whether array q holds an int8 symbol per weight, -qmax..qmax
    qmax = 0
    top = 255        # the largest q + qmax; below 16, two share a byte
    dtype = None     # of the other array, if there is one
    values = "v"     # its name: s for scales (R,), v for plain values (R, C)
    fused = None     # format and parameter for FusedSnap, if it has a kernel

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def parse(name: str) -> Grid:
        """The grid of that name; UserError if there is none."""
        for kind in GRIDS:
            if re.fullmatch(kind.pattern, str(name)):
                return kind(name)
        raise UserError(f"storage grid {ascii(name)[:60]} is unknown; int4, int5, int6, int7, "
                        "int8a, int4s0.35, int8, int8f, fp8, bf16, fp16, fp32 are known")


class FloatGrid(Grid):
    """Numbers of a smaller type. fp8 (e4m3fn, https://arxiv.org/abs/2209.05433) saturates at +-448;
    its bits are the symbols."""
    pattern = "fp8|bf16|fp16|fp32"
    type = property(lambda self: dict(fp8=torch.float8_e4m3fn, bf16=torch.bfloat16,
                                      fp16=torch.float16, fp32=torch.float32)[self.name])
    symbols = property(lambda self: self.name == "fp8")
    dtype = property(lambda self: None if self.symbols else self.type)
    fused = property(lambda self: (self.name, 0.0) if self.name in ("fp8", "bf16") else None)
    key = property(lambda self: "q" if self.symbols else "v")

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        return {self.key: (rows.clamp(-448, 448) if self.symbols else rows).to(self.type)}

    def decode(self, arrays: dict[str, Tensor]) -> Tensor:
        return arrays[self.key].view(self.type).float()


class RowGrid(Grid):
    """Integers times one scale per row; a subclass has scales(rows): (R, 1) fp32."""
    qmax = 127
    top = property(lambda self: 2 * self.qmax)
    values, dtype = "s", torch.bfloat16
    value_dtype = torch.bfloat16  # the product is rounded to it

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        s = self.scales(rows).to(self.dtype)
        q = (rows / s.float()).round_().clamp_(-self.qmax, self.qmax)
        return {"q": q.to(torch.int8), "s": s[:, 0]}

    def decode(self, arrays: dict[str, Tensor]) -> Tensor:
        q, s = (arrays[key].to(self.value_dtype) for key in "qs")
        return (q * s[:, None]).float()  # a bf16 product is the rounded fp32 product


class AbsmaxGrid(RowGrid):
    """intN: scale = absmax / qmax, qmax = 2^(N-1) - 1; int8a, as int8 is system B's."""
    pattern = "int([4-7]|8a)"
    qmax = property(lambda self: 2 ** (int(self.name[3]) - 1) - 1)
    fused = property(lambda self: ("int", self.qmax))

    def scales(self, rows: Tensor) -> Tensor:
        peak = rows.abs().amax(1, keepdim=True).clamp_min_(1e-8)
        return peak / peak.new_tensor(self.qmax)  # CUDA divides by a Python number inexactly


class SigmaGrid(RowGrid):
    """intNsK: scale = K times the row's root mean square, K from 0.001 to 10."""
    pattern = r"int[4-8]s(10|[1-9](\.\d{0,14}[1-9])?|0\.(?!000)\d{0,14}[1-9])"
    k = property(lambda self: float(self.name.partition("s")[2]))
    fused = property(lambda self: ("sigma", self.k))

    def times(self, factor: float) -> SigmaGrid:
        """The grid with a step `factor` times as long, to four digits."""
        k = min(10.0, max(0.001, self.k * factor))
        return SigmaGrid(f"{self.name.partition('s')[0]}s{k:.4g}")

    def scales(self, rows: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        rms = norm / math.sqrt(rows.shape[1])  # fp64: the same bf16 in any order of summing
        return (rms * self.k).float().clamp_min_(1e-8)


class PercentileGrid(RowGrid):
    """System B: scale = 99.99984th percentile of |row| / 127, with int8f at least 1/127."""
    pattern = "int8f?"
    dtype, value_dtype = torch.float16, torch.float32
    floor = property(lambda self: 1 / 127 if self.name == "int8f" else 2.0 ** -24)

    def scales(self, rows: Tensor) -> Tensor:
        n = rows.shape[1]
        place = 0.9999984 * (n - 1)  # between two order statistics
        largest = rows.abs().topk(n - int(place), dim=1).values
        above = largest[:, -2:-1] if n > 1 else largest
        clip = torch.lerp(largest[:, -1:], above, place - int(place))
        return (clip / 127).clamp_min_(self.floor)


GRIDS = AbsmaxGrid, SigmaGrid, PercentileGrid, FloatGrid


def rows_columns(shape) -> tuple[int, int]:
    """The first dimension counts rows; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def as_rows(w: Tensor) -> Tensor:
    return w.detach().float().reshape(rows_columns(w.shape))


def snap(w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    """decode(encode(w)) in fp32 or in out (contiguous, may be w itself). NaN gives NaN."""
    if out is None:
        out = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    rows = as_rows(w)
    block = 1 << 18 if w.device.type == "cpu" else rows.numel()  # weights that stay in cache
    size = block // max(rows.shape[1], 1) + 1
    for part, target in zip(rows.split(size), out.detach().view(rows.shape).split(size)):
        target.copy_(grid.decode(grid.encode(part)))
    return out


def all_finite(t: Tensor) -> bool:
    return bool(t.isfinite().all())


def encode(w: Tensor, grid: Grid, name: str = "tensor") -> dict[str, Tensor]:
    """The file's arrays, made on the device of training. UserError with the name for NaN, infinity
    and what overflows the grid."""
    rows = as_rows(w)
    if not all_finite(rows):
        raise UserError(f"{name} holds NaN or infinity and cannot be stored")
    arrays = grid.encode(rows)
    if not all_finite(grid.decode(arrays)):
        raise UserError(f"{name} holds values too large for {grid}")
    return arrays


def decode(arrays: dict[str, Tensor], grid: Grid, shape) -> Tensor:
    """fp32 grid values of the given shape from encode's arrays."""
    return grid.decode(arrays).reshape(shape)


def storage_plan(model: nn.Module, c: Config) -> dict[str, str]:
    """How each stored tensor is kept, by name; training, describe and the artifact use this plan.

    intn: matrices from 4096 elements as INT rows; embedding, tie correction, small matrices as FP8
    under FP_STORAGE=FP8. int8 (system B): 2-D tensors above 65,536 elements as INT8 rows."""
    int_rows = f"int{c.quant_bits}" + (f"s{c.quant_k:.12g}" if c.quant_step == "sigma" else "")
    if c.storage == "int8":
        int_rows = "int8f" if c.int8_floor else "int8"
    plan = {}
    for name, role, w in named_roles(model):
        matrix, table = role in (*MATRICES, HEAD), role in (EMBEDDING, CORRECTION)
        if c.storage == "int8":
            small = "fp32" if role == CONTROL else "fp16"
            large = w.ndim == 2 and w.numel() > 65_536 and role != CONTROL
            plan[name] = int_rows if large else small
        elif matrix and w.numel() >= 4096:
            plan[name] = (c.mlp_grid if role == MLP_MATRIX else c.proj_grid) or int_rows
            if role == IN_PROJ and c.dt_grid:
                plan[name] += f"+{c.d_inner // HEADDIM}x{c.dt_grid}"
        else:
            small = "fp8" if (matrix or table) and c.fp_storage == "FP8" else "bf16"
            plan[name] = table and c.embed_grid or small
    return plan


@functools.cache
def row_grids(plan: str, rows: int) -> tuple[tuple[slice, Grid], ...]:
    """(rows, grid) pairs of an entry of the plan; "int4+10xint8a": int8a for the last 10 rows."""
    head, _, tail = plan.partition("+")
    count, _, other = tail.partition("x")
    first = rows - int(count or 0)
    pairs = (slice(0, first), head), (slice(first, rows), other)
    return tuple((part, Grid.parse(name)) for part, name in pairs if name)


def artifact_tensors(weights: Iterable[tuple[str, Tensor]],
                     plan: dict[str, str]) -> dict[str, tuple[Tensor, Grid]]:
    """{name: (weights, grid)} as the artifact keeps named tensors: whole, or with the last rows
    apart, named by the first of them: "in_proj[202]"."""
    return {f"{name}[{part.start}]" if part.start else name: (w[part], grid)
            for name, w in weights for part, grid in row_grids(plan[name], len(w))}


def whole_tensors(parts: dict[str, Tensor], path) -> dict[str, Tensor]:
    """Inverse of `artifact_tensors` for the weights; UserError where parts do not join."""
    whole: dict[str, Tensor] = {}
    for name, tensor in parts.items():
        base, _, start = name.partition("[")
        if start:
            first = whole.get(base, torch.empty(()))
            if name != f"{base}{[*first.shape[:1]]}" or first.shape[1:] != tensor.shape[1:]:
                raise UserError(f"{path}: the parts of {ascii(base)[:60]} do not join")
            tensor = torch.cat((first, tensor))
        whole[base] = tensor
    return whole


def grid_pairs(compute: Tensor, master: Tensor, plan: str) -> list[tuple[Tensor, Tensor, Grid]]:
    """Views (compute, master, grid) of stacks (k, *shape): all rows at once if of the same grid."""
    pieces = row_grids(plan, master.size(1))
    if len(pieces) > 1:
        return [(c[part], m[part], grid) for c, m in zip(compute, master) for part, grid in pieces]
    if master.ndim > 2:
        compute, master = compute.flatten(0, 1), master.flatten(0, 1)
    return [(compute, master, pieces[0][1])]


@CHECKS.append
def check_grids(c: Config) -> Iterator[str]:
    int8 = c.storage == "int8"
    if c.quant_bits not in ((8,) if int8 else (4, 5, 6)):
        yield f"QUANT_BITS={c.quant_bits}: STORAGE=intn needs 4, 5 or 6, STORAGE=int8 needs 8"
    if c.int8_floor and not int8:
        yield "INT8_FLOOR=1: needs STORAGE=int8"
    for name in ("fp_storage", "quant_step", "mlp_grid", "proj_grid", "dt_grid", "embed_grid"):
        value = getattr(c, name)
        kinds = [kind for kind in GRIDS if re.fullmatch(kind.pattern, value)]
        if int8 and value != getattr(Config, name):
            yield f"{name.upper()}={value}: needs STORAGE=intn"
        elif name.endswith("grid") and value and not any(kind(value).fused for kind in kinds):
            yield f"{name.upper()}={value}: must be int4 to int7, int8a, int4s0.35, fp8 or bf16"
    if c.quant_fit and (c.qat_fraction or c.quant_step != "sigma"):
        yield ("QUANT_FIT=1: needs QUANT_STEP=sigma and QAT_FRACTION=0; QUANT_FIT=0 keeps the grids "
               "that are given")


@torch.no_grad()
def round_compensated(w: Tensor, grid: RowGrid, moments: Tensor) -> tuple[dict[str, Tensor], float]:
    """GPTQ (https://arxiv.org/abs/2210.17323): encode's arrays, rounded so that the layer's output
    changes least, and the output's squared error as a share of plain rounding's.

    w (R, C); moments (C, C): mean of x x^T over the layer's inputs x. In order of falling input
    power, each column's error is spread over the later ones by the inverse of the moments. Plain
    rounding's scales stay, and its rows whose error would grow."""
    plain, rows, moments = encode(w, grid), as_rows(w).double(), moments.double()
    scale, power = plain["s"].double(), moments.diagonal()
    order = power.argsort(descending=True, stable=True)
    damping = torch.full_like(power, 1).diag() * (0.01 * power.mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order] + damping))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, q = rows[:, order], torch.empty_like(rows)
    for start in range(0, len(order), 128):  # the errors of 128 columns move on in one product
        stop = min(start + 128, len(order))
        errors = left.new_zeros(len(left), stop - start)
        for j in range(start, stop):
            q[:, j] = (left[:, j] / scale).round().clamp(-grid.qmax, grid.qmax)
            errors[:, j - start] = (left[:, j] - q[:, j] * scale) / factor[j, j]
            left[:, j + 1:stop] -= errors[:, j - start, None] * factor[j, j + 1:stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    choices, damage = (plain["q"], q[:, order.argsort()].to(torch.int8)), []
    for symbols in choices:
        error = rows - grid.decode({"q": symbols, "s": plain["s"]}).double()
        damage.append(((error @ moments) * error).sum(1))  # (R,)
    best = torch.where((damage[1] < damage[0])[:, None], *choices[::-1])
    share = torch.minimum(*damage).sum() / damage[0].sum().clamp_min(1e-300)
    return {"q": best, "s": plain["s"]}, float(share)


def compensated_arrays(tensors: dict[str, tuple[Tensor, Grid]], moments: dict[str, Tensor]
                       ) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """`round_compensated` for the INT matrices of `artifact_tensors` whose layer has moments: the
    file's arrays by name, and each one's share of plain rounding's error."""
    arrays, shares = {}, []
    for name, (w, grid) in tensors.items():
        layer = name.partition("[")[0].removesuffix(".weight")
        if isinstance(grid, RowGrid) and layer in moments:
            arrays[name], share = round_compensated(w, grid, moments[layer])
            shares.append(share)
    return arrays, shares


# ------------------------------------------------------------------------------
# optimizers: each parameter in one group; Muon for matrices, AdamW for the rest
# ------------------------------------------------------------------------------

def matmul_dtype(device_type: str) -> torch.dtype:
    """bf16 where the hardware multiplies it, else fp32, which is faster on such a CPU."""
    fast = device_type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """About U V^T of the SVDs of matrices (k,rows,cols), by Newton-Schulz, in matmul_dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315  # a x + b x^3 + c x^5 moves singular values to [0.7, 1.2]
    x = matrices.to(matmul_dtype(matrices.device.type))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, *((x, poly) if tall else (poly, x)), beta=a)
    return x


@dataclass
class Group:
    """Parameters of one shape, owner and storage grid, as views of stacked buffers (k, *shape).

    master: fp32 truth, touched by the optimizer alone. compute: what forward and backward see, in
    its own type, rewritten from the masters before each step (on the storage grid under QAT), so
    nothing has to be restored. grad: fp32 sum over micro-batches and ranks, a view of
    Weights.grad. state: what the optimizer keeps, by its names."""
    names: list[str]
    owner: str              # matrix, embed, head, scalar, state
    grid: str               # how the tensors are stored ("" = not stored)
    master: Tensor
    compute: Tensor
    grad: Tensor
    average: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    touched: bool = False   # whether autograd reached it in this step

    def stack(self, which: str) -> Tensor:
        """master, compute or average; the master as long as there is no average."""
        return self.master if getattr(self, which) is None else getattr(self, which)

    def touch(self, _: nn.Parameter) -> None:
        """Called when autograd has added a gradient."""
        self.touched = True


def owner_of(role: str, c: Config) -> str:
    """Who trains tensors of this role: matrix = Muon; embed, head, scalar, state = AdamW."""
    if role in MATRICES or role == HEAD and c.embed_style == "projected":
        return "matrix"
    return {EMBEDDING: "embed", HEAD: "head", STATE: "state"}.get(role, "scalar")


def base_rates(c: Config) -> dict[str, float]:
    """Base learning rate of each owner."""
    embed = c.tied_embed_lr if c.embed_style == "tied" and c.tie_embeddings else c.embed_lr
    return dict(matrix=c.matrix_lr, embed=embed, head=c.head_lr, scalar=c.scalar_lr,
                state=c.scalar_lr)


@torch.no_grad()
def restore_views(views: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy a file's tensors into the views of their names; KeyError where one is missing,
    ValueError where its shape or dtype, which the kernels do not check, is another."""
    for name, view in views.items():
        tensor = tensors[name]
        if tensor.shape != view.shape or tensor.dtype != view.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
        view.copy_(tensor)


def fused_snaps(groups: list[Group]) -> list[FusedSnap]:
    """A launch per dtype that snaps all stored masters; none if a grid has no kernel."""
    jobs: dict[torch.dtype, list] = {}
    for group in groups:
        pairs = grid_pairs(group.compute, group.master, group.grid) if group.grid else ()
        for compute, master, grid in pairs:
            if grid.fused is None:
                return []
            jobs.setdefault(compute.dtype, []).append((master, compute, *grid.fused))
    return [FusedSnap(items) for items in jobs.values()]


COMPUTE_OWNERS = "matrix", "embed", "head"  # their weights have the compute type, others fp32


class Weights:
    """All parameters of the modules in groups; each belongs to exactly one, which is checked. One
    buffer holds all gradients (grad, fp32): one sum over ranks, one norm, one clip. Autograd adds
    those of COMPUTE_OWNERS, which come first, to `raw` in the compute type."""

    def __init__(self, stored: nn.Module, extra: nn.Module | None, plan: dict[str, str],
                 config: Config, runtime: Runtime):
        self.runtime, device, narrow = runtime, runtime.device, runtime.dtype != torch.float32
        members: dict[tuple, dict[str, nn.Parameter]] = {}  # by what a group has in common
        everything = named_roles(stored) + (named_roles(extra, "jepa.") if extra else [])
        for name, role, parameter in everything:
            key = owner_of(role, config), plan.get(name, ""), parameter.shape
            members.setdefault(key, {})[name] = parameter
        unique = {id(parameter) for *_, parameter in everything}
        assert len(unique) == len(everything), "a parameter without exactly one owner"
        keys = sorted(members, key=lambda key: key[0] not in COMPUTE_OWNERS)
        sizes = [len(members[key]) * key[2].numel() for key in keys]
        ends = [0, *itertools.accumulate(-(-size // 64) * 64 for size in sizes)]  # 64: aligned
        self.grad = torch.zeros(ends[-1], device=device)
        self.raw = self.grad[:ends[sum(key[0] in COMPUTE_OWNERS for key in keys)]]
        if narrow:
            self.raw = torch.zeros_like(self.raw, dtype=runtime.dtype)
        self.groups: list[Group] = []
        for (owner, grid, shape), start, size in zip(keys, ends, sizes):
            named = members[owner, grid, shape]
            grad, raw = (flat[start:start + size].view(len(named), *shape) for flat in (
                self.grad, self.raw if owner in COMPUTE_OWNERS else self.grad))
            master = torch.stack([parameter.detach().float() for parameter in named.values()])
            master = master.to(device)
            compute = master.to(raw.dtype, copy=True)
            group = Group(list(named), owner, grid, master, compute, grad)
            for index, parameter in enumerate(named.values()):
                parameter.data, parameter.grad = compute[index], raw[index]
                parameter.register_post_accumulate_grad_hook(group.touch)
            self.groups.append(group)
        self.fused_snap = fused_snaps(self.groups) if runtime.cuda else []

    def collect(self) -> None:
        """After a backward pass: add to `grad` what autograd left in `raw`."""
        if self.raw.dtype != torch.float32:
            self.grad[:len(self.raw)].add_(self.raw)
            self.raw.zero_()

    def finish_gradients(self) -> None:
        """After the step's last backward pass: sum the gradients over ranks."""
        self.runtime.sum_(self.grad)

    def zero_grad(self) -> None:
        self.grad.zero_()
        for group in self.groups:
            group.touched = False

    @torch.no_grad()
    def load(self, which: str = "master", qat: bool = False) -> None:
        """Write masters or averages into the compute weights, on the storage grid under `qat`."""
        fused = self.fused_snap if qat and which == "master" else []
        for snap_all in fused:
            snap_all()
        plain = [group for group in self.groups if not (qat and group.grid)]
        if plain:
            torch._foreach_copy_([group.compute for group in plain],
                                 [group.stack(which) for group in plain])
        for group in self.groups if qat and not fused else ():
            pairs = grid_pairs(group.compute, group.stack(which), group.grid) if group.grid else ()
            for out, w, grid in pairs:
                snap(w, grid, out=out)

    def snap_fault(self) -> str:
        """What is wrong with the kernel, which must equal `snap` on the weights bit for bit and
        else is not used again; "" if nothing."""
        try:
            self.load(qat=True)
            snapped = [group.compute.clone() for group in self.groups]
            self.runtime.synchronize()
            fused, self.fused_snap = self.fused_snap, []
            self.load(qat=True)
            if all(map(torch.equal, snapped, [group.compute for group in self.groups])):
                self.fused_snap = fused
                return ""
            return "differs from the grid of the artifact"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.fused_snap = []
            return error_text(error)

    @torch.no_grad()
    def average(self, decay: float, ok: Tensor) -> None:
        """Update the EMA of the masters, which starts as a copy; ok (0-dim): 0 skips the update."""
        for group in self.groups:
            if group.average is None:
                group.average = group.master.clone()
            else:
                group.average.lerp_(group.master, ((1 - decay) * ok).to(group.master.device))

    def tensors(self, which: str = "master") -> dict[str, Tensor]:
        """Views by name: master, compute or average (the master as long as there is none)."""
        return {name: view for group in self.groups
                for name, view in zip(group.names, group.stack(which))}


class Muon:
    """Orthogonalized Nesterov momentum (https://kellerjordan.github.io/posts/muon/) with decoupled
    weight decay. Another optimizer for matrices is a class with the same `init` and `update`.
    Rates are 0-dim tensors, so that on CUDA both halves compile once."""

    def __init__(self, config: Config, runtime: Runtime):
        mode = config.compile_mode if runtime.cuda else "off"
        self.config, self.runtime = config, runtime
        self.directions = compiled(self._directions, mode)
        self.descend = compiled(self._descend, mode)

    def init(self, group: Group) -> None:
        group.state["momentum"] = torch.zeros_like(group.master)

    def _directions(self, grads: list[Tensor], buffers: list[Tensor], momentum: Tensor,
                    ok: Tensor) -> list[Tensor]:
        """Momentum, in place, and the orthogonalized directions of this rank's shares."""
        directions, rank, world = [], self.runtime.rank, self.runtime.world
        for grad, buffer in zip(grads, buffers):
            grad = torch.where(ok > 0, grad, 0.0)
            buffer.mul_(1 - ok * (1 - momentum)).add_(grad)
            count = -(-len(grad) // world)
            share = slice(rank * count, (rank + 1) * count)
            update = torch.addcmul(grad[share], buffer[share], momentum)
            if missing := count - len(update):  # the last ranks may have fewer, or none
                update = F.pad(update, (0, 0, 0, 0, 0, missing))
            if self.config.row_norm:
                update = rms_norm(update, FP32_EPS)
            directions.append(orthogonalize(update, self.config.muon_backend_steps))
        return directions

    def _descend(self, masters: list[Tensor], directions: list[Tensor], lr: Tensor,
                 ok: Tensor) -> None:
        for master, direction in zip(masters, directions):
            rows, columns = master.shape[-2:]
            factor = -lr * max(1, rows / columns) ** 0.5 * ok
            master.mul_(1 - lr * self.config.muon_wd * ok)
            master.add_(direction[:len(master)].float() * factor)

    def update(self, groups: list[Group], scale: float, momentum: float, ok: Tensor) -> None:
        """Update the masters at LR `scale`; where ok (0-dim) is 0, nothing changes. Each rank
        orthogonalizes its share of a group."""
        rates = self.runtime.to_device(torch.tensor([self.config.matrix_lr * scale, momentum]))
        buffers = [group.state["momentum"] for group in groups]
        directions = self.directions([group.grad for group in groups], buffers, rates[1], ok)
        gathered = [self.runtime.gather(direction) for direction in directions]
        for work in filter(None, (work for _, work in gathered)):
            work.wait()
        self.descend([group.master for group in groups], [whole for whole, _ in gathered],
                     rates[0], ok)


class Optimizer:
    """Muon for the matrices, fused AdamW for the rest, one clip; a non-finite gradient leaves
    everything as it was. All on the device: the norm, the clip and the verdict are 0-dim tensors,
    so no step waits for the host."""

    def __init__(self, weights: Weights, config: Config):
        self.weights, self.config = weights, config
        c, rates, zero = config, base_rates(config), torch.zeros((), device=weights.runtime.device)
        self.skipped, self.skipped_in_row = zero.clone(), zero.clone()  # steps without an update
        self.matrix, self.adam_groups = Muon(c, weights.runtime), []
        for group in weights.groups:
            if group.owner == "matrix":
                self.matrix.init(group)
            else:
                self.adam_groups.append(group)
                moments = {key: torch.zeros_like(group.master) for key in ("exp_avg", "exp_avg_sq")}
                group.state = dict(step=zero.clone(), **moments)
        self.adam = torch.optim.AdamW(
            [dict(params=[nn.Parameter(group.master)], base_lr=rates[group.owner],
                  weight_decay=0.0 if group.owner == "state" else c.adam_wd)
             for group in self.adam_groups],
            lr=1.0, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)
        for group, settings in zip(self.adam_groups, self.adam.param_groups):
            self.adam.state[settings["params"][0]] = group.state  # the same dict, and tensors

    @torch.no_grad()
    def step(self, scale: float, momentum: float, clip: bool = True) -> tuple[Tensor, Tensor]:
        """Update the masters at LR `scale`; the gradient norm and whether it is finite (0-dim)."""
        c, weights = self.config, self.weights
        norm = torch.linalg.vector_norm(weights.grad, dtype=torch.float64).float()
        ok = torch.isfinite(norm).float()
        limit = c.grad_clip_norm if clip and c.grad_clip_norm else math.inf
        weights.grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        matrices = [group for group in weights.groups if group.owner == "matrix" and group.touched]
        self.matrix.update(matrices, scale, momentum, ok)
        for group, settings in zip(self.adam_groups, self.adam.param_groups):
            settings["lr"] = settings["base_lr"] * scale
            settings["params"][0].grad = group.grad if group.touched else None
        self.adam.found_inf = 1 - ok  # 1: the fused kernel leaves weights, moments, counters alone
        self.adam.step()
        self.skipped += 1 - ok
        self.skipped_in_row = (self.skipped_in_row + 1) * (1 - ok)
        return norm, ok

    def reset_after_warmup(self, everything: bool) -> None:
        """After the warm-up steps: counters go to 0, with `everything` moments, too."""
        for name, tensor in self.state().items():
            if everything or name.startswith(("step/", "skipped")):
                tensor.zero_()

    def state(self) -> dict[str, Tensor]:
        """Moments and counters by name, for the checkpoint (views, not copies)."""
        tensors = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        for group in self.weights.groups:
            for key, tensor in group.state.items():
                parts = tensor if tensor.ndim else [tensor]  # a counter: by the first name
                tensors |= {f"{key}/{name}": part for name, part in zip(group.names, parts)}
        return tensors


# ------------------------------------------------------------------------------
# artifact: one container without pickle for artifacts and checkpoints, codecs, strict read
# ------------------------------------------------------------------------------

# A container, little-endian: magic, version, bytes of the header as stored and as JSON; the zlib'd
# header {"kind", "meta", "sections": [Section as a dict]}; payloads; sha256 of all before.
MAGIC, VERSION, PREFIX = b"JEPAFILE", 2, struct.Struct("<8sIII")
Section = namedtuple("Section", "name codec stored raw dtype shape")  # bytes in the file, decoded
MAX_ENTRIES = dict(artifact=1 << 12, checkpoint=1 << 15)  # full-size models need 230 and 1,200
MAX_HEADER = {kind: 256 * entries for kind, entries in MAX_ENTRIES.items()}  # bytes of JSON
MAX_DEPTH = 8           # of its nesting
MAX_ELEMENTS = 1 << 27  # stored weights of one artifact
DTYPES = {name: getattr(torch, name) for name in (
    "float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8")}


def require(ok, fault: str) -> None:
    if not ok:
        raise ValueError(fault)


@contextlib.contextmanager
def parsing(path) -> Iterator[None]:
    """Turns whatever a damaged or foreign file raises in the parser into one UserError."""
    try:
        yield
    except UserError as error:  # an unknown grid, a codec that is not installed
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # each codec has its own class of errors
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: damaged or foreign file ({printable(reason)})") from error


def write_container(path, kind: str, meta: dict, sections: list[tuple[Section, Any]]) -> int:
    """Write the file of sections and payloads (bytes-like), all or nothing; its size in bytes."""
    header = dict(kind=kind, meta=meta, sections=[section._asdict() for section, _ in sections])
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_HEADER[kind] or entry_count(header) > MAX_ENTRIES[kind]:
        raise UserError(f"{path}: {entry_count(header)} tensors are too many for one file")
    packed, digest = zlib.compress(text, 9), hashlib.sha256()
    head = PREFIX.pack(MAGIC, VERSION, len(packed), len(text)) + packed
    with replacing(Path(path)) as file:
        for part in (head, *(payload for _, payload in sections)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())
        return file.tell()


def entry_count(header: dict) -> int:
    tables = (header["meta"].get(name, ()) for name in ("tensors", "streams"))
    return max(map(len, (header["sections"], *tables)))


def inflate(data, raw: int) -> bytes:
    """zlib data of exactly `raw` bytes; no more are ever made."""
    out = zlib.decompressobj().decompress(data, raw + 1)
    require(len(out) == raw, "zlib data of another size")
    return out


def read_container(path, kind: str) -> tuple[dict, list[tuple[Section, memoryview]]]:
    """Meta and [(section, payload)] of a whole file; any fault is a UserError."""
    with parsing(path), open(path, "rb") as file:
        data = memoryview(file.read())
        require(data[:8] == MAGIC, "it does not begin with JEPAFILE")
        require(hashlib.sha256(data[:-32]).digest() == data[-32:], "checksum differs")
        _, version, stored, raw = PREFIX.unpack_from(data)
        require(version == VERSION, f"format version {version}; this program reads {VERSION}")
        require(raw <= MAX_HEADER[kind], "its header is too large")
        start = PREFIX.size + stored
        header = parse_header(inflate(data[PREFIX.size:start], raw), kind)
        sections = []
        for entry in header["sections"]:
            section = Section(**entry)
            sections.append((section, data[start:start + section.stored]))
            start += section.stored
        require(start == len(data) - 32, "its sections have another size")
        return header["meta"], sections


def parse_header(text: bytes, kind: str) -> dict:
    """JSON of bounded nesting, without NaN and infinity."""
    plain = re.sub(rb'"[^"]*"?', b"", re.sub(rb"(?s)\\.", b"", text))  # without strings
    steps = ((mark in b"[{") - (mark in b"]}") for mark in plain)
    depth = max(itertools.accumulate(steps, initial=0))
    require(depth <= MAX_DEPTH, "its header is nested too deep")
    header = json.loads(text.decode(), parse_constant=int)  # int refuses NaN and Infinity
    require(header["kind"] == kind, f"its kind is {header['kind']!r:.20}, not {kind!r}")
    require(entry_count(header) <= MAX_ENTRIES[kind], "it has too many entries")
    return header


def write_tensors(path, kind: str, meta: dict, tensors: dict[str, Tensor]) -> int:
    """Uncompressed tensors of any device; NaN and infinity in meta become null."""
    sections = []
    for name, t in tensors.items():
        dtype = str(t.dtype).removeprefix("torch.")
        assert dtype in DTYPES, f"{name} has dtype {dtype}, which is not stored"
        payload = t.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        sections.append((Section(name, "raw", t.nbytes, t.nbytes, dtype, list(t.shape)), payload))
    meta = json.loads(json.dumps(meta), parse_constant=lambda name: None)
    return write_container(path, kind, meta, sections)


def read_tensors(path, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """Meta and tensors (CPU) of write_tensors; any fault is a UserError."""
    meta, sections = read_container(path, kind)
    tensors = {}
    with parsing(path):
        for section, payload in sections:
            require(section.codec == "raw", "a section is compressed")
            flat = torch.empty(len(payload), dtype=torch.uint8)
            flat.numpy()[:] = payload
            tensors[section.name] = flat.view(DTYPES[section.dtype]).reshape(section.shape)
    return meta, tensors


# Weights on a grid are noise with a skewed histogram: only symbol frequencies can be exploited.
# rANS (Duda, https://arxiv.org/abs/0902.0271; interleaved: Giesen, https://arxiv.org/abs/1402.3392)
# comes within 0.1% of the entropy, where Huffman codes lose 0.5-2%.
BITS, LOW = 15, 1 << 31  # precision of a frequency; a coder's state lies in [2^31, 2^63)


def rans_coders(size: int) -> int:
    """Interleaved coders: each costs 4 bytes of the file; more make longer array operations."""
    return min(max(size >> 12, 1), 2048)


def rans_steps(lengths, coders: int) -> Iterator[tuple[int, int, int, int]]:
    """(stream, start, middle, stop): two rows per step, of at most one symbol per coder each."""
    end = 0
    for stream, length in enumerate(lengths):
        first, end = end, end + length
        for start in range(first, end, 2 * coders):
            yield stream, start, min(start + coders, end), min(start + 2 * coders, end)


def frequencies(counts: np.ndarray) -> np.ndarray:
    """(256,) integers that sum to 2^BITS, positive where counts are."""
    f = np.maximum(counts * ((1 << BITS) / max(counts.sum(), 1)), counts > 0).astype(np.int64)
    while (excess := f.sum() - (1 << BITS)) and counts.any():  # the largest bear the rounding
        f[f.argmax()] -= excess if excess < 0 else min(excess, f.max() // 2)
    return f


def rans_encode(data: np.ndarray, lengths) -> bytes:
    """uint8 streams laid end to end, each with its own frequency table.

    Symbol i of a row belongs to coder i. Two symbols are coded between renormalizations, whose
    32-bit words go to one common list; coding runs backwards so that decoding runs forwards.
    Layout: bytes of the zlib'd tables u32, tables, coder states u64, words u32."""
    cuts = np.cumsum([0, *lengths])
    tables = [frequencies(np.bincount(data[a:b], minlength=256)) for a, b in zip(cuts, cuts[1:])]
    tables = np.array(tables, np.int64).reshape(-1, 256)
    starts = np.cumsum(tables, 1) - tables
    x, words = np.full(rans_coders(len(data)), LOW, np.int64), []
    for stream, a, b, c in reversed(list(rans_steps(lengths, len(x)))):
        first, second = data[a:b], data[b:c]
        f, g = tables[stream][first], tables[stream][second]
        top = x[:b - a]
        limit = f << BITS
        limit[:c - b] = f[:c - b] * g
        full = np.flatnonzero(top >> (63 - 2 * BITS) >= limit)
        words.append(top[full].astype("<u4").tobytes())  # the low 32 bits
        top[full] >>= 32
        for symbol, freq in ((second, g), (first, f)):
            state = x[:len(symbol)]
            state += state // freq * ((1 << BITS) - freq) + starts[stream][symbol]
    table = tables.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes()  # high bytes apart
    table = zlib.compress(table, 9)
    return b"".join([struct.pack("<I", len(table)), table, x.astype("<u8").tobytes(), *words[::-1]])


def rans_decode(payload, lengths) -> np.ndarray:
    """Inverse of rans_encode: uint8 (sum of lengths,)."""
    coders, head = rans_coders(sum(lengths)), 4 + int.from_bytes(payload[:4], "little")
    tables = np.frombuffer(inflate(payload[4:head], 512 * len(lengths)), np.uint8)
    tables = tables.reshape(2, -1).T.copy().view("<u2").astype(np.int64).reshape(-1, 256)
    whole = tables.sum(1) == np.where(np.array(lengths) > 0, 1 << BITS, 0)
    x = np.frombuffer(payload, "<i8", coders, head).astype(np.int64)
    words = np.frombuffer(payload, "<u4", offset=head + 8 * coders).astype(np.int64)
    require(whole.all() and (x >= LOW).all(), "rans data are damaged")
    out, used, current = np.empty(sum(lengths), np.uint8), 0, -1
    for stream, a, b, c in rans_steps(lengths, coders):
        if stream != current:  # slot -> frequency << 32 | offset within the symbol << 8 | symbol
            f, current = tables[stream], stream
            slot = np.repeat(f << 32 | np.arange(256), f)
            slot |= (np.arange(1 << BITS) - np.repeat(np.cumsum(f) - f, f)) << 8
        for start, stop in ((a, b), (b, c)):
            state = x[:stop - start]
            entry = slot.take(state & ((1 << BITS) - 1))
            out[start:stop] = entry  # keeps the low byte
            state >>= BITS
            state *= entry >> 32
            state += entry >> 8 & 0xffffff
        low = np.flatnonzero(x < LOW)
        x[low] = x[low] << 32 | words[used:used + len(low)]
        used += len(low)
    require(used == len(words) and (x == LOW).all(), "rans data are damaged")
    return out


# A row per codec; of equal sizes the first wins. encode(piece) gives bytes, decode(bytes, limit) at
# most about `limit` bytes of the piece. module: None if its package is missing. whole: all streams
# are one piece; encode takes their lengths, too, and decode takes them in place of the limit.
Codec = namedtuple("Codec", "encode decode module whole", defaults=(False,))
PIECE = 1 << 19  # bytes of a piece
LZMA2 = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 22, "lc": 0, "lp": 0, "pb": 0}]
CODECS = {
    "rans": Codec(rans_encode, rans_decode, np, whole=True),
    "zlib": Codec(lambda piece: zlib.compress(piece, 9),
                  lambda data, limit: zlib.decompressobj().decompress(data, limit), zlib),
    "zstd": Codec(lambda piece: zstandard.ZstdCompressor(level=22).compress(piece),
                  lambda data, limit: zstandard.ZstdDecompressor(max_window_size=1 << 27)
                  .stream_reader(data).read(limit), zstandard),
    "lzma": Codec(lambda piece: lzma.compress(piece, lzma.FORMAT_RAW, filters=LZMA2),
                  lambda data, limit: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA2)
                  .decompress(data, limit), lzma),
    "brotli": Codec(lambda piece: brotli.compress(piece, quality=11, lgwin=20),
                    lambda data, limit: brotli.Decompressor()
                    .process(data, output_buffer_limit=limit), brotli)}


def pack(data: np.ndarray, lengths: list[int], codecs: Iterable[str]) -> tuple[list, dict]:
    """The smallest coding of the streams: ([(section, payload)], report)."""
    pieces = [data[start:start + PIECE] for start in range(0, len(data), PIECE)]
    parts = {False: (pieces,), True: ([data], [lengths])}  # by Codec.whole
    rows = {name: CODECS[name] for name in codecs if CODECS[name].module}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {name: pool.map(row.encode, *parts[row.whole]) for name, row in rows.items()}
    coded = {name: list(payloads) for name, payloads in jobs.items()}
    sizes = {name: sum(map(len, payloads)) for name, payloads in coded.items()}
    best = min(sizes, key=sizes.get)
    sections = [(Section(str(i), best, len(payload), len(part), "uint8", [len(part)]), payload)
                for i, (part, payload) in enumerate(zip(parts[rows[best].whole][0], coded[best]))]
    return sections, {"codec": best, "codec_bytes": sizes}


def unpack(sections: list[tuple[Section, memoryview]], lengths: list[int]) -> np.ndarray:
    """Inverse of `pack`: the streams laid end to end."""
    parts = []
    for section, payload in sections:
        codec = CODECS[section.codec]
        if codec.module is None:
            raise UserError(f"codec {section.codec} is missing: install brotli and zstandard")
        parts.append(codec.decode(payload, lengths if codec.whole else section.raw + 1))
    data = np.frombuffer(b"".join(parts), np.uint8)
    require(len(data) == sum(lengths), "data have another size than the header says")
    return data


# Streams of each grid: which tensors are transposed, the class of each row, the symbols of each
# class (rows with similar histograms); then scales or plain values, a stream per byte.
CLASSES = 16


def row_classes(rows: list[np.ndarray], pairs: bool) -> tuple[np.ndarray, float]:
    """Class of each row of uint8 symbols, and the bits that coding them takes, tables included:
    entropy-constrained clustering (Chou et al. 1989, https://doi.org/10.1109/29.17498)."""
    width = 1 + max((int(q.max()) for q in rows if q.size), default=0)
    cells = [np.arange(len(q), dtype=np.int64)[:, None] * width + q for q in rows]
    counts = [np.bincount(c.ravel(), minlength=len(c) * width).reshape(-1, width) for c in cells]
    counts = np.concatenate(counts).astype(np.float32)
    total = counts.sum(0)
    used = (total > 0).sum()
    table_bits = 10.0 * (used ** 2 if pairs else used)
    code = -np.log2(np.maximum(total, 1) / total.sum().clip(1))  # bits of a symbol in one class
    order = np.argsort(counts @ code / counts.sum(1).clip(1), kind="stable")
    best = np.zeros(len(counts), np.uint8), math.inf
    for number in (1, 4, CLASSES):
        ids = np.empty(len(counts), np.int64)
        ids[order] = np.arange(len(counts)) * number // max(len(counts), 1)
        for _ in range(6 if number > 1 else 1):
            share = np.stack([counts[ids == c].sum(0) for c in range(number)]) + 0.01
            prior = np.bincount(ids, minlength=number) + 0.01
            bits = counts @ -np.log2(share / share.sum(1, keepdims=True)).T
            bits = bits - np.log2(prior / prior.sum())  # fp64
            ids = bits.argmin(1)
        cost = bits.min(1).sum() + table_bits * len(np.unique(ids))
        if cost < best[1]:
            best = ids.astype(np.uint8), float(cost)
    return best


def by_columns(q: np.ndarray, pairs: bool) -> bool:
    """Whether classes of columns cost less than classes of rows: so with an embedding, whose rows
    share a mean that differs by column, and behind an activation whose units differ in size."""
    return bool(q.size) and row_classes([q.T], pairs)[1] < row_classes([q], pairs)[1]


def move_parts(parts: list[tuple[np.ndarray, Any]], pairs: bool, move: Callable) -> None:
    """Move array[index] of all (array, index) as one stream, two symbols to a byte if `pairs`."""
    pieces = [array[index] for array, index in parts]
    stream = np.concatenate([piece.ravel() for piece in pieces])
    if pairs:
        stream = np.append(stream, np.zeros(len(stream) % 2, np.uint8))
        stream = stream[::2] << 4 | stream[1::2]
    moved = move(stream)
    if moved is stream:  # it was written
        return
    if pairs:
        moved = np.stack((moved >> 4, moved & 15), 1).reshape(-1)
    ends = np.cumsum([piece.size for piece in pieces])
    for (array, index), piece, values in zip(parts, pieces, np.split(moved, ends)):
        array[index] = values.reshape(piece.shape)


def move_streams(grids: list[Grid], arrays: list[dict[str, Tensor]], streams: list[np.ndarray],
                 reading: bool) -> None:
    """Append the streams of all tensors' arrays to `streams`, or fill the arrays from there."""
    def move(stream: np.ndarray) -> np.ndarray:
        if not reading:
            streams.append(stream)
            return stream
        require(streams and len(streams[0]) == len(stream), "streams and shapes disagree")
        return streams.pop(0)

    for grid in dict.fromkeys(grids):  # in order of appearance
        members = [a for a, other in zip(arrays, grids) if other == grid]
        if grid.symbols:
            pairs, stored = grid.top < 16, [a["q"].view(torch.uint8).numpy() for a in members]
            symbols = [q + np.uint8(grid.qmax) for q in stored]
            turned = [not reading and by_columns(q, pairs) for q in symbols]
            turned = move(np.array(turned, np.uint8))
            views = [q.T if turn else q for q, turn in zip(symbols, turned)]
            ends = np.cumsum([len(q) for q in views])
            ids = move(np.empty(ends[-1], np.uint8) if reading else row_classes(views, pairs)[0])
            require(turned.max() < 2 and ids.max(initial=0) < CLASSES, "a class is out of range")
            for c in range(CLASSES):
                move_parts(list(zip(views, np.split(ids == c, ends))), pairs, move)
            for q, symbol in zip(stored, symbols) if reading else ():
                require(symbol.max(initial=0) <= grid.top, "a symbol is out of range")
                q[:] = symbol - np.uint8(grid.qmax)
        if grid.dtype:
            values = [a[grid.values].reshape(-1, 1).view(torch.uint8).numpy() for a in members]
            for byte in reversed(range(grid.dtype.itemsize)):
                move_parts([(v, np.s_[:, byte]) for v in values], False, move)


def entropy_bytes(symbols: np.ndarray) -> float:
    """Bytes of the empirical order-0 entropy of uint8 symbols."""
    counts = np.bincount(symbols.reshape(-1), minlength=256).astype(np.float64)
    counts = counts[counts > 0]
    bits = math.log2(max(counts.sum(), 1)) - np.log2(counts)
    return float((counts * bits).sum() / 8)


def artifact_streams(config: dict, tensors: dict, given: dict) -> tuple[dict, list, list]:
    """Meta, streams and encoded arrays of an artifact; the arguments are `write_artifact`'s."""
    streams, encoded = [], []
    for name, (w, grid) in tensors.items():
        arrays = given[name] if name in given else encode(w, grid, name)
        encoded.append({key: t.cpu() for key, t in arrays.items()})
    move_streams([grid for _, grid in tensors.values()], encoded, streams, reading=False)
    meta = {"config": config,
            "tensors": [(name, str(grid), list(w.shape)) for name, (w, grid) in tensors.items()],
            "streams": [len(stream) for stream in streams]}
    return meta, streams, encoded


def estimate_bytes(tensors: dict[str, tuple[Tensor, Grid]], given=None) -> int:
    """Artifact bytes predicted from the entropies of its streams, nothing compressed; arguments as
    of `write_artifact`."""
    meta, streams, _ = artifact_streams({}, tensors, given or {})
    counts = [np.bincount(stream, minlength=256) for stream in streams]
    tables = zlib.compress(b"".join(frequencies(n).astype("<u2").tobytes() for n in counts), 9)
    header = zlib.compress(json.dumps(meta).encode(), 9)
    states = 4 * rans_coders(sum(map(len, streams)))
    return round(sum(map(entropy_bytes, streams)) + len(tables) + len(header) + 150 + states)


def fit_steps(tensors: dict[str, tuple[Tensor, Grid]], budget: int,
              rounded: Callable[[dict], dict] = lambda tensors: {}) -> tuple[dict, dict, float, int]:
    """QUANT_FIT: tensors whose σ steps are all multiplied by one factor, from 1/2 to 2, so that the
    estimate ends at most 0.3% below `budget` bytes; their rounded(tensors), factor and estimate."""
    weights = sum(w.numel() for w, grid in tensors.values() if isinstance(grid, SigmaGrid))
    exponent = better = 0.0  # of two, in the factor
    for _ in range(8):  # two or three do: a step twice as long costs one bit per weight less
        exponent = better
        scaled = {name: (w, grid.times(2 ** exponent) if isinstance(grid, SigmaGrid) else grid)
                  for name, (w, grid) in tensors.items()}
        given = rounded(scaled)
        size = estimate_bytes(scaled, given)
        surplus = 8 * (size - 0.9985 * budget) / max(weights, 1)  # bits per weight
        better = min(1.0, max(-1.0, exponent + surplus))
        if 0.997 * budget <= size <= budget or better == exponent:
            break
    return scaled, given, 2 ** exponent, size


def write_artifact(path, config: dict, tensors: dict[str, tuple[Tensor, Grid]],
                   codecs: Iterable[str] = CODECS, given=None) -> dict:
    """Store tensors {name: (weights, grid)} and a JSON-able config; the same input makes the same
    file. given: arrays of tensors already rounded, by name. Returns a report: codec, codec_bytes
    (by each codec), bytes (of the file), entropy_bytes (of the symbols, tensor by tensor; all else
    at full width)."""
    meta, streams, encoded = artifact_streams(config, tensors, given or {})
    data = np.concatenate([*streams, np.empty(0, np.uint8)])
    sections, report = pack(data, meta["streams"], codecs)
    size = write_container(path, "artifact", meta, sections)
    need = [entropy_bytes(t.view(torch.uint8).numpy()) if key == "q" else t.nbytes
            for found in encoded for key, t in found.items()]
    return report | {"bytes": size, "entropy_bytes": round(sum(need))}


def read_artifact(path) -> tuple[dict, dict[str, Tensor], dict[str, Grid]]:
    """(config, {name: fp32 grid values}, {name: grid}); any fault is a UserError."""
    meta, sections = read_container(path, "artifact")
    with parsing(path):
        lengths, raws = meta["streams"], [section.raw for section, _ in sections]
        table = [(name, Grid.parse(grid), shape) for name, grid, shape in meta["tensors"]]
        right = all(isinstance(name, str) and len(shape) <= 8 for name, _, shape in table)
        require(right and isinstance(meta["config"], dict), "an entry has another form")
        sizes = [n for _, _, shape in table for n in shape] + raws + lengths
        require(all(type(n) is int and 0 <= n < 1 << 40 for n in sizes), "a size is out of range")
        need = sum(max(math.prod(shape), rows_columns(shape)[0]) for _, _, shape in table)
        require(need <= MAX_ELEMENTS, f"{need} weights are more than {MAX_ELEMENTS}")
        require(sum(lengths) == sum(raws) <= 4 * need + 16, "streams and sections disagree")
        streams = np.split(unpack(sections, lengths), np.cumsum(lengths))  # and an empty one
        arrays = [encode(torch.zeros(shape), grid) for _, grid, shape in table]  # to be filled
        move_streams([grid for _, grid, _ in table], arrays, streams, reading=True)
        tensors = {name: decode(a, grid, shape) for (name, grid, shape), a in zip(table, arrays)}
        require(len(tensors) == len(table), "a tensor name occurs twice")
        require(len(streams) == 1, "it has more streams than its tensors")
        require(all(map(all_finite, tensors.values())), "it holds NaN or infinity")
        return meta["config"], tensors, {name: grid for name, grid, _ in table}


# ------------------------------------------------------------------------------
# checkpoint: everything an uninterrupted run would have at that step, in the artifact's container
# ------------------------------------------------------------------------------

class Checkpoints:
    """The folder of a run's checkpoints; rank 0 writes them in a background thread."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.writer, self.writing = ThreadPoolExecutor(1, "checkpoint"), None

    def paths(self) -> list[Path]:
        """Existing checkpoints, newest first; UserError if the folder cannot be read."""
        with parsing(self.folder):
            names = sorted(os.listdir(self.folder), reverse=True) if self.folder.exists() else []
        return [self.folder / name for name in names if re.fullmatch(r"step_\d+\.ckpt", name)]

    def probe(self) -> None:
        """Make the folder; UserError if no file can be made there."""
        with file_errors(f"CHECKPOINT_DIR={self.folder}", "cannot be written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".probe").write_bytes(b"")
            (self.folder / ".probe").unlink()

    def save(self, step: int, meta: dict, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors, then write in a background thread; raises an earlier write's error."""
        self.wait()
        snapshot = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self.writing = self.writer.submit(self.write, step, meta, snapshot)

    def write(self, step: int, meta: dict, tensors: dict[str, Tensor]) -> None:
        with file_errors(self.folder, f"no checkpoint of step {step}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step_*.tmp"):  # by a writer that was killed
                left.unlink()
            write_tensors(self.folder / f"step_{step:09d}.ckpt", "checkpoint", meta, tensors)
            by_age = sorted(self.paths(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for old in by_age[self.keep:]:  # by step, a damaged newer one would outlive this one
                old.unlink()

    def wait(self) -> None:
        """Until the last write is on disk; raises its error."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def newest(self, note: Callable[[str], None]) -> tuple[dict, dict[str, Tensor]] | None:
        """Meta and tensors of the newest sound checkpoint, or None; `note` hears of damaged
        ones. UserError if all are damaged, or one cannot be read: nothing may replace them then."""
        faults = []
        for path in self.paths():
            try:
                newest = read_tensors(path, "checkpoint")
            except UserError as error:
                if isinstance(error.__cause__, OSError):  # no damage: it may be readable later
                    raise UserError(f"{error}; mend that, or OVERWRITE=1 starts over") from error
                faults.append(str(error))
            else:
                for fault in faults:
                    note(f"checkpoint passed over: {fault}")
                return newest
        if faults:
            raise UserError(f"no checkpoint can be used ({'; '.join(faults)}); OVERWRITE=1 starts "
                            "over")
        return None


def differences(old: dict[str, Any], new: dict[str, Any], but: Iterable[str] = ()) -> list[str]:
    """Knobs that differ, as lines `NAME: old -> new`, except those of `but`."""
    return [f"{name}: {format_knob(old.get(name))} -> {format_knob(new.get(name))}"
            for name in sorted((set(old) | set(new)).difference(but))
            if old.get(name) != new.get(name)]


# ------------------------------------------------------------------------------
# evaluation: bits per byte in several passes; statistics of the latent
# ------------------------------------------------------------------------------

class Score(NamedTuple):
    """Mean negative log-likelihood per token (nats) and bits per byte."""
    loss: float
    bpb: float


LANE = 1 << 20  # tokens of a lane of Evaluator.carried, at least


class Evaluator:
    """Scores a model on tokens (n,) int64. Every token but the first is a target exactly once."""

    def __init__(self, model: LanguageModel, tokens: Tensor, vocabulary: Vocabulary, seq_len: int,
                 batch_tokens: int, runtime: Runtime, forward: Callable | None = None):
        self.model, self.tokens, self.vocabulary = model, tokens, vocabulary
        self.runtime, self.forward = runtime, model if forward is None else forward
        self.seq_len, self.sequences = seq_len, max(1, batch_tokens // seq_len)
        self.targets = len(tokens) - 1
        self.bytes = int(vocabulary.target_bytes(tokens[:-1], tokens[1:]).sum())

    def on(self, tokens: Tensor) -> Evaluator:
        """The same evaluation of other tokens."""
        return Evaluator(self.model, tokens, self.vocabulary, self.seq_len,
                         self.sequences * self.seq_len, self.runtime, self.forward)

    def standard(self, temperatures: Sequence[float] = (1.0,)) -> list[Score]:
        """Sequences of seq_len tokens, each from an empty context; one score per temperature."""
        return self._score(temperatures, self._windows, self.seq_len, self.sequences)

    def sliding(self, stride: int, batch: int, temperature: float = 1.0) -> Score:
        """Windows of seq_len every `stride` tokens, and one that ends with the text: each token is
        scored once, with the longest context that the windows offer."""
        return self._score([temperature], self._windows, stride, batch)[0]

    def carried(self, temperatures: Sequence[float] = (1.0,), overlap: int | None = None
                ) -> list[Score]:
        """One sequential pass on rank 0, the recurrent state carried from piece to piece. With
        `overlap` (models with attention), attention sees so many tokens before a piece. From 8 LANE
        tokens on, the text is cut into eight lanes, each from empty states, for all ranks to share:
        in a single sequence most of a GPU would idle."""
        lanes = 8 if self.targets >= 8 * LANE else 1
        return self._score(temperatures, self._pieces, overlap, lanes)

    def adapted(self, c: Config, temperature: float = 1.0) -> Score:
        """Score-first test-time training: each chunk is scored as the configuration asks, then
        trained on, so that a score depends on the past alone. Then the weights are put back.
        https://github.com/openai/parameter-golf/issues/1017"""
        way = self._windows, self.seq_len, self.sequences
        if c.eval_state == "carry":
            way = self._pieces, c.overlap
        elif c.sliding_eval:
            way = self._windows, c.sliding_eval_stride, c.sliding_batch_size
        with Adaptation(self, c) as adaptation:
            return self._score([temperature], *way, chunk=c.adapt_chunk_tokens,
                               learn=adaptation.train)[0]

    def _score(self, temperatures: Sequence[float], way: Callable, *options, chunk: int = 0,
               learn: Callable[[int, int], None] | None = None) -> list[Score]:
        """A way scores this rank's share of a chunk (about `chunk` targets, 0: all), then yields
        where the chunk ends. learn(first, stop) follows all chunks but the last."""
        total = torch.zeros(len(temperatures), dtype=torch.float64, device=self.runtime.device)
        add = lambda h, targets: total.add_(self._nll(h, targets, temperatures))
        first = 0
        for stop in way(add, chunk or self.targets, *options):
            if learn and stop < self.targets:
                learn(first, stop)
            first = stop
        return [Score(nll / self.targets, nll / math.log(2) / max(self.bytes, 1))
                for nll in self.runtime.sum_host(total.to("cpu")).tolist()]

    def _score_ends(self, add: Callable, windows: Tensor, last: int, batch: int) -> None:
        """Add the last targets of at most `batch` windows (B,T+1), each from an empty context."""
        h, _ = self._hidden(windows[:, :-1], (batch, self.seq_len))
        add(h[:, -last:], windows[:, -last:])

    @torch.no_grad()
    def _windows(self, add: Callable, chunk: int, stride: int, batch: int) -> Iterator[int]:
        T, n, main = self.seq_len, self.targets, self.runtime.main
        windows = self.tokens.unfold(0, T + 1, stride)
        begun, step = int(stride < T), -(-chunk // (batch * stride)) * batch
        if begun and main:  # the first window scores all its tokens, later ones their last
            self._score_ends(add, windows[:1], T, batch)
        for low in range(begun, len(windows), step):
            high = min(low + step, len(windows))
            first, stop = (low + bound for bound in self.share(high - low))
            for start in progress_bar(range(first, stop, batch), "evaluation batch", main):
                self._score_ends(add, windows[start:min(start + batch, stop)], stride, batch)
            yield T + (high - 1) * stride
        rest = (n - T) % stride
        if rest and main:
            self._score_ends(add, self.tokens[None, n - T:], rest, batch)

    @torch.no_grad()
    def _pieces(self, add: Callable, chunk: int, overlap: int | None, lanes: int = 1
                ) -> Iterator[int]:
        T, main, states, scored = self.seq_len, self.runtime.main, None, 0
        n, rest = divmod(self.targets, lanes)  # targets of a lane
        inputs, targets = (t[:lanes * n].view(lanes, n)[slice(*self.share(lanes))]
                           for t in (self.tokens[:-1], self.tokens[1:]))  # those of this rank
        piece = T if overlap is not None else max(1, self.sequences // max(1, len(inputs))) * T
        later = piece if overlap is None or overlap >= T else T - overlap
        starts = [0, *range(piece, n, later)]
        for start, stop in progress_bar(list(zip(starts, [*starts[1:], n])), "carried", main):
            if len(inputs):
                shape = len(inputs), later if start else piece  # only the last piece is padded
                h, states = self._hidden(inputs[:, start:stop], shape, states)
                states = states if overlap is None else self.model.trim_states(states, overlap)
                add(h, targets[:, start:stop])
            if lanes == 1 and (stop - scored >= chunk or stop == n):
                scored = stop
                yield stop
        if rest and main:
            self._score_ends(add, self.tokens[None, self.targets - T:], rest, self.sequences)

    def share(self, count: int) -> tuple[int, int]:
        """First and last + 1 of this rank's items out of `count`; of one item, that is rank 0."""
        rank, world = self.runtime.rank, self.runtime.world
        return -(-count * rank // world), -(-count * (rank + 1) // world)

    def _hidden(self, ids: Tensor, shape: tuple[int, int], states: list | None = None
                ) -> tuple[Tensor, list]:
        """h (B,T,D) of ids (B,T) and the states after them. On CUDA ids are padded to `shape`, so
        that torch.compile makes one graph per pass; states after a padded piece are not real."""
        sequences, length = ids.shape
        if self.runtime.cuda:
            ids = as_new(F.pad(ids, (0, shape[1] - length, 0, shape[0] - sequences)))
        h, states = self.forward(self.runtime.to_device(ids), self.runtime.dtype, states)
        return h[:sequences, :length], states

    def _nll(self, h: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Tensor:
        """Sum of the NLL at each temperature (K,) fp64; the V-wide logits are made in pieces."""
        def nll(h: Tensor, ids: Tensor) -> Tensor:
            logits = self.model.logits(h)
            scaled = (logits if t == 1 else logits / t for t in temperatures)
            return torch.stack([F.cross_entropy(x, ids, reduction="none").double().sum()
                                for x in scaled])

        h, targets = h.reshape(-1, h.size(-1)), self.runtime.to_device(targets.reshape(-1))
        piece = max(1, (1 << (25 if h.is_cuda else 22)) // self.vocabulary.base_bytes.numel())
        return sum(map(nll, h.split(piece), targets.split(piece)))


# By ADAPT_PARAMS: roles of the parameters that test-time training changes.
ADAPT_ROLES = {"matrices": MATRICES, "embedding": (EMBEDDING, HEAD, CORRECTION),
               "scalars": (SCALAR, STATE, CONTROL)}
ADAPT_ROLES["all"] = sum(ADAPT_ROLES.values(), ())
adapt_words = lambda c: c.adapt_params.replace(" ", "").split(",")
CHECKS.append(lambda c: [] if ADAPT_ROLES.keys() >= set(adapt_words(c)) else [
    f"ADAPT_PARAMS={c.adapt_params}: must be all, or some of matrices, embedding, scalars, joined "
    "by commas"])


class Adaptation(contextlib.AbstractContextManager):
    """SGD with momentum 0.9 on a model under evaluation; leaving the context puts the weights back.
    Masters, gradient and momentum are fp32 vectors over all parameters that learn."""

    def __init__(self, evaluator: Evaluator, c: Config):
        self.evaluator, self.config = evaluator, c
        roles = {role for word in adapt_words(c) for role in ADAPT_ROLES[word]}
        self.parameters = [p for _, role, p in named_roles(evaluator.model) if role in roles]
        self.before = [(p.detach().clone(), p.requires_grad) for p in self.parameters]
        self.master = torch.cat([value.float().flatten() for value, _ in self.before])
        self.momentum = torch.zeros_like(self.master)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    @torch.no_grad()
    def __exit__(self, *error) -> None:
        for parameter, (value, trained) in zip(self.parameters, self.before):
            parameter.copy_(value).requires_grad_(trained)

    def gradient(self, first: int, stop: int) -> Tensor:
        """Of the mean NLL of sequences that cover the targets first..stop and end with them."""
        e, T = self.evaluator, self.evaluator.seq_len
        rows, total = min(-(-(stop - first) // T), stop // T), torch.zeros_like(self.master)
        low, high = e.share(rows)
        for row in range(low, high, e.sequences):
            count, start = min(e.sequences, high - row), stop - (rows - row) * T
            tokens = e.runtime.to_device(e.tokens[start:start + count * T + 1])
            with torch.enable_grad():
                h, _ = e.forward(tokens[:-1].view(-1, T), e.runtime.dtype, None)
                loss, _ = token_loss_fused(
                    e.model.features(h).flatten(0, 1), e.model.head(), e.model.vocab_bias,
                    tokens[1:], softcap=e.model.softcap, softcap_type=e.model.softcap_type)
                grads = torch.autograd.grad(loss * (count / rows), self.parameters,
                                            materialize_grads=True)
            total += torch.cat([grad.float().flatten() for grad in grads])
        e.runtime.sum_(total)
        return total

    @torch.no_grad()
    def train(self, first: int, stop: int) -> None:
        """ADAPT_STEPS on the targets first..stop, which have been scored."""
        c, sizes = self.config, [parameter.numel() for parameter in self.parameters]
        lr = c.adapt_lr * (1 + math.cos(math.pi * first / self.evaluator.targets)) / 2
        for _ in range(c.adapt_steps):
            grad = self.gradient(first, stop)
            norm = grad.norm()
            limit = (c.adapt_clip or math.inf) / (norm + 1e-6)
            self.momentum.mul_(0.9).add_(torch.where(norm.isfinite(), grad * limit.clamp(max=1), 0))
            self.master.sub_(self.momentum, alpha=lr)
            for parameter, value in zip(self.parameters, self.master.split(sizes)):
                parameter.copy_(value.view_as(parameter))


def best_temperature(score: Callable[[Sequence[float]], list[Score]]) -> float:
    """Temperature of the lowest loss: a coarse list, then +-0.06 around its best by 0.02."""
    best_of = lambda temperatures: min(zip(score(temperatures), temperatures))[1]
    best = best_of([0.5, 0.7, 0.85, 0.95, 1.0, 1.1, 1.3, 1.5, 2.0])
    return best_of([round(best + 0.02 * i, 4) for i in range(-3, 4)])


def search_temperatures(chooser: Evaluator, c: Config) -> tuple[float, float]:
    """The best temperature with states reset and, under EVAL_STATE=carry, with carried states."""
    carried = functools.partial(chooser.carried, overlap=c.overlap)
    return (best_temperature(chooser.standard),
            best_temperature(carried) if c.eval_state == "carry" else 1.0)


# Ways to score the stored model, by name: who asks for it, whether states are carried (the
# temperature is then of its own), and the score, of evaluator, configuration and temperature.
carries = lambda c: c.eval_state == "carry"
PASSES = {
    "roundtrip": (lambda c: True, lambda c: False, lambda e, c, t: e.standard()[0]),
    "tempered": (lambda c: c.temp_scaling, lambda c: False, lambda e, c, t: e.standard([t])[0]),
    "sliding": (lambda c: c.sliding_eval, lambda c: False,
                lambda e, c, t: e.sliding(c.sliding_eval_stride, c.sliding_batch_size, t)),
    "carried": (carries, carries, lambda e, c, t: e.carried([t], c.overlap)[0]),
    "adapted": (lambda c: c.eval_adapt, carries, lambda e, c, t: e.adapted(c, t))}


def final_scores(evaluator: Evaluator, c: Config, calibration: Tensor | None,
                 log: Callable[[str], None]) -> dict[str, Any]:
    """Scores of PASSES for the weights read from the artifact. `calibration`: training tokens that
    the temperature is chosen on (None: temperature 1)."""
    started, chosen = now(), (c.temp_calib or 1.0,) * 2  # with states reset, and carried
    if c.temp_scaling and not c.temp_calib:
        if calibration is None:
            log("temperature: 1 (no unseen training tokens to choose one on)")
        else:
            chosen = search_temperatures(evaluator.on(calibration), c)
    result = dict(temperature=chosen[0] if c.temp_scaling else None,
                  sliding_stride=c.sliding_eval_stride if c.sliding_eval else None,
                  temperature_seconds=now() - started)
    if c.temp_scaling and c.eval_state == "carry":
        result["carried_temperature"] = chosen[1]
    for name, (asked, carried, score) in PASSES.items():
        result[f"{name}_val_bpb"] = None
        if asked(c):
            started, t = now(), chosen[carried(c)] if c.temp_scaling else 1.0
            if name != "tempered" or t != 1:  # else the round trip's score stands
                loss, bpb = score(evaluator, c, t)
            result |= {f"{name}_val_loss": loss, f"{name}_val_bpb": bpb}
            how = f" stride:{c.sliding_eval_stride}" if name == "sliding" else ""
            how += f" temperature:{t:g}" if name != "roundtrip" else ""
            log(f"{name}{how} val_loss:{loss:.6f} val_bpb:{bpb:.6f}")
            if name == "adapted":
                log(f"adapted: {now() - started:.1f} s of the {EVAL_SECONDS} s of evaluation")
    if result["roundtrip_val_bpb"] > 8 and shards_source(c.data_path) is None:
        log("warning: more than 8 bits per byte: are these shards of the model's tokenizer? No "
            f"source.json in DATA_PATH={c.data_path} says it")
    return result


# Statistics of the latent: tensors in, numbers out; nan for values that are not finite.

def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the covariance's normalized eigenvalues, from 1 to L; x (...,L).
    https://ieeexplore.ieee.org/document/7098875"""
    covariance = torch.cov(x.float().flatten(0, -2).T).double().reshape(x.size(-1), -1)
    if not bool(covariance.isfinite().all()):
        return math.nan
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    return float(torch.special.entr(values / values.sum().clamp(min=1e-30)).sum().exp())


def within_share(x: Tensor) -> float:
    """Share of the variance of x (B,T,L) within sequences: near 1 if sequences are alike."""
    x = x.double()
    within, whole = (x.var(dims, correction=0).mean() for dims in (1, (0, 1)))
    return float(within / whole.clamp(min=1e-30))


def lag1_autocorrelation(x: Tensor) -> float:
    """Cosine of x_t - m and x_{t+1} - m, over all of x (B,T,L) with its mean m."""
    x = x.double() - x.double().mean((0, 1))
    return float(F.cosine_similarity(x[:, :-1].flatten(), x[:, 1:].flatten(), dim=0))


def latent_statistics(name: str, x: Tensor) -> dict[str, float]:
    """The three statistics above of x (B,T,L), under `name`."""
    return {f"{name}_{statistic.__name__}": statistic(x)
            for statistic in (effective_rank, within_share, lag1_autocorrelation)}


def predictability(prediction: Tensor, target: Tensor) -> float:
    """1 - MSE / variance of the target, each (B,S,L): 1 perfect, 0 no better than the mean."""
    variance = target.double().var((0, 1), correction=0).mean().clamp(min=1e-30)
    return float(1 - F.mse_loss(prediction.double(), target.double()) / variance)


def gradient_shares(leaf: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
    """Norm of each weighted loss's gradient in `leaf` over that of "ce", and their cosine."""
    grads = {name: torch.autograd.grad(loss, leaf, retain_graph=True)[0].double().flatten()
             for name, loss in terms.items()}
    ce, shares = grads.pop("ce"), {}
    for name, grad in grads.items():
        shares[f"{name}_grad_ratio"] = float(grad.norm() / ce.norm().clamp(min=1e-30))
        shares[f"{name}_grad_cosine"] = float(F.cosine_similarity(grad, ce, dim=0, eps=1e-30))
    return shares


def linear_probe(h: Tensor, targets: Tensor, lengths: Tensor, vocab_size: int, steps: int,
                 seed: int) -> float:
    """Bits per byte of a linear classifier on frozen h (n,D): trained on 80% of the positions by
    Adam, scored on the rest. targets (n,) ids, lengths (n,) their bytes."""
    h, cut, generator = h.float(), int(0.8 * len(h)), torch.Generator().manual_seed(seed)
    weight = torch.zeros(vocab_size, h.size(-1), device=h.device, requires_grad=True)
    bias = torch.zeros(vocab_size, device=h.device, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=1e-3)
    for _ in progress_bar(range(steps), "probe step"):
        adam.zero_grad()
        batch = torch.randint(cut, (min(4096, cut),), generator=generator).to(h.device)
        with torch.enable_grad():
            token_loss_fused(h[batch], weight, bias, targets[batch])[0].backward()
        adam.step()
    nll = sum(float(F.cross_entropy(F.linear(part, weight, bias).detach(), ids, reduction="sum"))
              for part, ids in zip(h[cut:].split(1024), targets[cut:].split(1024)))
    return float(nll / math.log(2) / lengths[cut:].sum().clamp(min=1))


@torch.no_grad()
def input_moments(model: LanguageModel, batches: Iterable, hidden: Callable) -> dict[str, Tensor]:
    """Mean of x x^T (C,C) in fp64 over the inputs x of every Linear layer, by the layer's name, and
    of Attention for the three that it applies as one. hidden(batch) gives h by the model."""
    sums, counts = {}, {}

    def add(name: str, _: nn.Module, inputs: tuple) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
        sums[name] = sums.get(name, 0) + (x.T @ x).double()
        counts[name] = counts.get(name, 0) + len(x)

    hooks = [layer.register_forward_pre_hook(functools.partial(add, name))
             for name, layer in model.named_modules() if isinstance(layer, (Linear, Attention))]
    for batch in batches:
        model.features(hidden(batch))
    for hook in hooks:
        hook.remove()
    means = {name: total / counts[name] for name, total in sums.items()}
    for name in [name for name, layer in model.named_modules() if isinstance(layer, Attention)]:
        means |= dict.fromkeys([f"{name}.{part}_proj" for part in "qkv"], means.pop(name))
    return means


# ------------------------------------------------------------------------------
# training: build, warm up, one step, the loop, the end of a run
# ------------------------------------------------------------------------------

def count_parameters(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def build_models(c: Config, kernels: Kernels | None = None
                 ) -> tuple[LanguageModel, JepaHead | None]:
    """The stored model and the head for training only (None: no latent term), drawn from SEED."""
    torch.manual_seed(c.seed)
    model = LanguageModel(c, kernels)
    return model, JepaHead(c) if c.latent_on else None


def memory_need(c: Config, cuda: bool) -> float:
    """Rough bytes of memory that MODE needs on one rank, rather too few than too many."""
    try:
        with torch.device("meta"):  # shapes only
            weights = sum(map(count_parameters, build_models(c)))
    except (RuntimeError, OverflowError, TypeError, ValueError):
        return math.inf  # a shape overflows
    if c.mode == "describe":
        return 12 * weights  # initial, synthetic, symbols
    L, D, mambas, tokens = c.num_layers, c.model_dim, c.pattern.count("m"), c.micro_tokens
    size = 2 if c.dtype == "bf16" or cuda and c.dtype == "auto" else 4
    kept = (8 * L * D + mambas * (6 * c.d_inner + 4 * c.d_state - 4 * D)  # by autograd, per token
            + 2 * c.mlp_mult * D * len(range(0, L, c.mlp_every)))
    latents = c.latent * (2 + c.predictor_hidden_mult) * c.jepa_steps if c.jepa_on else 0
    states = 4 * c.d_inner * c.d_state * mambas  # bytes per sequence
    training = tokens * (size * (kept + latents) + states / (c.ssd_chunk or 64))
    training *= 2 if c.compile_mode == "off" else 1  # eager: autograd keeps what lies between
    phases = 0  # of SIGReg: its backward pass holds six such tensors; compiled, none
    if c.latent_on and c.anti_weight > 0 and c.anticollapse == "sigreg":
        phases = 4 * c.micro_sequences * min(c.train_seq_len, 64) * c.num_proj * c.sigreg_knots
    training += phases * {"off": 6, "aot_eager": 4}.get(c.compile_mode, 0)
    training += states * c.micro_sequences * c.micro_batches if c.carry_state else 0
    need = 4 * c.num_proj * c.latent + 16 * c.train_batch_tokens
    if c.mode == "bench":
        return need + training + 16 * weights  # fp32 masters, compute weights, gradients, moments
    limit = c.val_max_tokens or math.inf
    batch = min(c.val_batch_size // c.micro_batches, limit)
    if c.sliding_eval:
        windows = min(c.sliding_batch_size, limit / c.sliding_eval_stride)
        batch = max(batch, c.train_seq_len * windows)
    validation = batch * size * (L * D + kept / L) / 2  # skips, and half of a layer
    report = 6 * phases * min(1, limit / tokens) if c.diagnostics else 0  # is never compiled
    return need + max(training, validation, report) + 32 * weights  # two good states besides


def check_memory(c: Config, cuda: bool) -> None:
    """UserError if MODE needs more than there is; it names the size furthest above its default."""
    need, memory = memory_need(c, cuda), machine_memory(cuda)
    need *= 1 if cuda else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if need > memory:
        values, knobs = c.named(), Config.knobs()
        excess = lambda name: values[name] / (knobs[name].default or c.model_dim)
        name = max(Config.tagged("size"), key=excess)
        amount = f"about {need / 1e9:,.1f} GB of memory" if need < 1e18 else "memory beyond measure"
        raise UserError(f"{name}={values[name]}: MODE={c.mode} needs {amount}, and "
                        f"{memory / 1e9:,.1f} GB are here; lower it, or another size")


def keyed_generator(*key: int) -> torch.Generator:
    """Depends on the key alone: equal on every rank and after a resume."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class Trainer:
    """Model, optimizer and data, and the step that joins them."""

    def __init__(self, config: Config, runtime: Runtime, stream: TokenStream):
        c = self.config = config
        self.runtime, self.stream = runtime, stream
        self.kernels, self.note = choose_kernels(c, runtime)
        self.model, self.jepa = build_models(c, self.kernels)
        self.plan = storage_plan(self.model, c)
        directions = torch.randn(c.num_proj, c.latent, generator=keyed_generator(c.seed, 1))
        self.directions = F.normalize(directions, dim=-1).to(runtime.device)
        for module in filter(None, (self.model, self.jepa)):
            module.to(runtime.device)
        self.weights = Weights(self.model, self.jepa, self.plan, c, runtime)
        if runtime.cuda and c.kernel_check != "0" and (fault := self.weights.snap_fault()):
            self.note = f"{self.note}\n{replaced('snap', fault, c.kernel_check)}".strip()
        self.optimizer = Optimizer(self.weights, c)
        self.batches = Batches(stream, c.micro_batches, c.micro_sequences, c.train_seq_len,
                               c.in_lanes)
        share = c.micro_batches // runtime.world
        self.micros = range(runtime.rank * share, (runtime.rank + 1) * share)  # those of this rank
        # CARRY_STATE: the mixers' states of each micro-batch. Zeros at the start, not None: the
        # first step then has the graph of all others.
        zeros = lambda: self.model.empty_states(c.micro_sequences, runtime.dtype, runtime.device)
        self.states = {micro: zeros() if c.carry_state else None for micro in self.micros}
        self.position = self.tokens = 0  # position in the stream; tokens trained on so far
        self.step_seconds = 0.0  # of the last warm-up step
        self.ahead: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of `read_ahead`
        self.losses = compiled(self._losses, c.compile_mode)
        self.forward = compiled(self.model, c.compile_mode) if runtime.cuda else self.model

    def _losses(self, x: Tensor, y: Tensor, positions: Tensor, weights: Tensor, states,
                active: Active) -> tuple[Tensor, Tensor, list | None]:
        """One graph: weighted sum of TERMS, the terms for the log, states under CARRY_STATE."""
        c, model = self.config, self.model
        h, states = model(x, self.runtime.dtype, states)
        terms = loss_terms(c, model, self.jepa, h, y, positions, self.directions, active)
        total = sum(weight * terms[name] for weight, name in zip(weights, TERMS) if name in terms)
        shown = terms | ({"ce": terms["nll"]} if "ce" in terms else {})
        zero = h.new_zeros((), dtype=torch.float32)
        parts = torch.stack([shown.get(name, zero).detach() for name in TERMS])
        return total, parts, map_states(torch.detach, states) if c.carry_state else None

    def step_inputs(self, step: int, micro: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, y (B,T) and SIGReg's positions (S,) of one micro-batch, on the device."""
        x, y = self.ahead.pop((self.position, micro), None) or self.batches(self.position, micro)
        generator = keyed_generator(self.config.seed, 2, step, micro)
        positions = torch.randint(x.size(1), (min(64, x.size(1)),), generator=generator)
        return tuple(map(self.runtime.to_device, (x, y, positions)))

    def read_ahead(self) -> str:
        """Read the next step's batches while all ranks can still save; returns a shard's fault."""
        try:
            self.ahead = {(self.position, i): self.batches(self.position, i) for i in self.micros}
        except UserError as fault:
            return str(fault)
        return ""

    def accumulate(self, step: int, weights: LossWeights, keep_states: bool = True) -> Tensor:
        """Gradients, summed over ranks; returns this rank's share of the mean of TERMS."""
        c, parts = self.config, torch.zeros(len(TERMS), device=self.runtime.device)
        numbers = self.runtime.to_device(torch.tensor(weights[:len(TERMS)]))
        for micro in self.micros:
            inputs = self.step_inputs(step, micro)
            loss, terms, states = self.losses(*inputs, numbers, self.states[micro], weights.active)
            (loss / c.micro_batches).backward()
            self.weights.collect()
            parts += terms / c.micro_batches
            if c.carry_state and keep_states:  # clone: CUDA graphs overwrite outputs at a replay
                self.states[micro] = map_states(torch.clone, states)
        self.weights.finish_gradients()
        return parts

    def train_step(self, progress: Progress) -> Tensor:
        """Returns this rank's share of TERMS, then the gradient norm."""
        c, before = self.config, dict(self.states)
        self.weights.load(qat=qat_on(progress.fraction, c.qat_fraction))
        parts = self.accumulate(progress.step, loss_weights(progress.fraction, c))
        norm, ok = self.optimizer.step(lr_scale(progress, c), muon_momentum(progress.step, c))
        if averaging_on(progress.fraction, c.swa_start):
            self.weights.average(c.swa_decay, ok)
        for micro in self.micros if c.carry_state else ():  # a skipped step may have left NaN
            self.states[micro] = map_states(functools.partial(torch.where, ok > 0),
                                            self.states[micro], before[micro])
        self.weights.zero_grad()
        self.position += self.batches.values_per_step()
        self.tokens += c.train_batch_tokens
        return torch.cat((parts, norm.view(1)))

    def choose_threads(self) -> str:
        """On a busy CPU, set the fastest number of threads; returns a line for the log, or ""."""
        limit, seconds, threads = torch.get_num_threads(), {}, 1
        settled = self.runtime.cuda or self.runtime.world > 1 or "OMP_NUM_THREADS" in os.environ
        if settled or not busy_machine(0.4):
            return ""
        while threads <= limit and (threads < 2 or seconds[threads // 2] == min(seconds.values())):
            torch.set_num_threads(threads)
            started = now()
            self.accumulate(0, loss_weights(0.0, self.config), keep_states=False)
            self.weights.zero_grad()
            seconds[threads] = now() - started
            threads *= 2
        torch.set_num_threads(best := min(seconds, key=seconds.get))
        measured = ", ".join(f"{count}: {time:.2f} s" for count, time in seconds.items())
        return "" if best == limit else (
            f"threads: {best} instead of {limit}, measured on this busy machine ({measured}); last "
            f"bits may differ for it; OMP_NUM_THREADS={limit} sets their number")

    def warm_up(self) -> None:
        """Steps at the base rates, without QAT and clip; the optimizer's moments stay, all else is
        rolled back."""
        c = self.config
        masters = [group.master.clone() for group in self.weights.groups]
        position, states, rng = self.position, dict(self.states), torch.get_rng_state()
        for step in progress_bar(range(c.warmup_steps), "warm-up step", self.runtime.main):
            started = now()
            self.weights.load()
            self.accumulate(step, loss_weights(0.0, c))
            self.optimizer.step(1.0, c.muon_momentum, clip=False)
            self.weights.zero_grad()
            self.position += self.batches.values_per_step()
            self.runtime.synchronize()
            self.step_seconds = now() - started
        self.run_phases()
        for group, master in zip(self.weights.groups, masters):
            group.master.copy_(master)
        self.position, self.states = position, states
        torch.set_rng_state(rng)
        self.optimizer.reset_after_warmup(c.warmup_rollback == "all")

    def run_phases(self) -> None:
        """Compile ahead: forward and backward for every combination of terms in the schedule."""
        if self.config.compile_mode == "off":
            return
        self.weights.load()
        schedule = [loss_weights(p, self.config) for p in np.linspace(1, 0, 1001).tolist()]
        phases = {weights.active: weights for weights in schedule}  # the first of each
        for weights in progress_bar([*phases.values()], "compilation", self.runtime.main):
            self.accumulate(0, weights, keep_states=False)
            self.weights.zero_grad()


class RunStopped(Exception):
    """A run that ended early on purpose, with this exit code; the message says how to go on."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Stopwatch:
    """Training seconds: stands still while validating, goes on after a resume."""

    def __init__(self, seconds: float = 0.0):
        self.before, self.started = seconds, None

    def seconds(self) -> float:
        return self.before + (now() - self.started if self.started is not None else 0.0)

    def run(self, on: bool) -> None:
        self.before, self.started = self.seconds(), now() if on else None


def default_run_id(c: Config) -> str:
    """Kind, size, seed, time, process and a hash of the configuration: unique, and the same after
    a restart by torchrun."""
    kind = {"mamba2": "mamba2", "attention": "bytejepa"}.get(c.mixer, "hybrid")
    process, begun = os.getpid(), datetime.now()
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        process = os.getppid()
        with contextlib.suppress(OSError):
            begun = datetime.fromtimestamp(os.stat(f"/proc/{process}").st_ctime)
    size = f"{c.num_layers}x{c.model_dim}-seed{c.seed}"
    digest = hashlib.sha256(repr(c.named()).encode()).hexdigest()[:6]
    return f"{kind}-{c.tokenizer}-{size}-{begun:%Y%m%d-%H%M%S}-{process}-{digest}"


class Run:
    """One training run, from the first line of its log to result.json."""

    def __init__(self, config: Config, runtime: Runtime):
        """Read and build everything: its faults show before a file is made."""
        c = self.config = config
        self.runtime, self.folder = runtime, None
        runtime.main_first(lambda: check_memory(c, runtime.cuda))
        HEARTBEAT.doing = "reading the shards"
        self.vocabulary = load_vocabulary(c)
        check_source(c, self.vocabulary)
        validation = load_validation(c)
        stream = TokenStream(find_shards(c.data_path, "train"), c.vocab_size)
        self.trainer = Trainer(c, runtime, stream)
        self.evaluator = Evaluator(
            self.trainer.model, validation, self.vocabulary, c.train_seq_len,
            max(1, c.val_batch_size // c.micro_batches), runtime, self.trainer.forward)
        self.step, self.clock, self.stage = 0, Stopwatch(), ""
        self.score, self.validated = None, -1  # of the last validation: its score and its step
        self.good: list[tuple[int, dict, dict]] = []  # the last two snapshots, see `remember`
        self.saved_at = self.reserve = self.moments_seconds = 0.0
        self.calibrates = c.temp_scaling and not c.temp_calib  # fits a temperature at the end
        self.caught, self.evaluating = 0, False  # a signal's number; see `catch`
        self.labels = [c.anticollapse if name == "anti" else name for name in TERMS]  # for the log

    def open(self) -> None:
        """Open the run's folder, go on from its newest checkpoint if it has one, and warm up."""
        c, trainer, runtime, notes = self.config, self.trainer, self.runtime, []
        with contextlib.suppress(ValueError):  # outside the main thread, in tests
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, self.catch)
        path = Path(c.runs_dir) / runtime.main_first(lambda: c.run_id or default_run_id(c))
        folder = Path(c.checkpoint_dir) / path.name if c.checkpoint_dir else path / "checkpoints"
        self.checkpoints = Checkpoints(folder, c.checkpoint_keep)
        runtime.main_first(lambda: self.claim(path, notes.append))
        saved = self.restore(path, notes.append)
        journals = saved["journals"] if saved else {"metrics.jsonl": 0}
        self.folder = RunFolder(path, runtime.main, journals)
        self.log = self.folder.log
        if saved:
            seconds, changes = self.clock.seconds(), differences(saved["config"], c.named())
            notes.append(f"resumed at step {self.step} after {seconds:.1f} s of training")
            notes += [f"changed since the checkpoint: {change}" for change in changes]
        for note in notes if saved else [*notes, *self.head()]:
            self.log(note)
        self.folder.write_json("config.json", c.named())
        if runtime.main:
            self.folder.track = open_tracker(c, path)
        HEARTBEAT.doing = "first steps"
        if note := trainer.choose_threads():
            self.log(note)
        try:
            trainer.run_phases() if saved else trainer.warm_up()
        except torch.OutOfMemoryError:
            raise UserError(f"out of GPU memory with {c.micro_tokens} tokens at a time; raise "
                            f"MICRO_BATCHES={c.micro_batches} or take a smaller model") from None
        if cap := c.max_wallclock_seconds:
            mean = trainer.step_seconds or self.clock.seconds() / max(self.step, 1)
            steps = min(c.iterations, cap / runtime.agree(max(mean, 1e-9))[0]) if mean else 0
            # Where the run will see all tokens, none are left to fit a temperature on.
            self.calibrates &= steps * c.train_batch_tokens < 1.1 * trainer.batches.span()
            self.reserve = c.reserve_seconds or min(self.measure_reserve(), cap / 2)
            self.log(f"clock: {self.reserve:.1f} s of MAX_WALLCLOCK_SECONDS={cap:g} are kept for "
                     "GPTQ's moments and the temperature search")

    def catch(self, number: int, frame) -> None:
        """A flag for the loop; a second SIGINT ends at once, any signal in the final evaluation."""
        if self.evaluating:
            name = signal.Signals(number).name
            raise RunStopped(f"stopped by {name} in the final evaluation; the same command "
                             "repeats it", 128 + number)
        if self.caught and number == signal.SIGINT:
            os._exit(128 + number)
        self.caught = number

    def claim(self, path: Path, note: Callable[[str], None]) -> None:
        """Rank 0 makes and locks the folder. A finished run is refused; OVERWRITE=1 removes it."""
        names = "log.txt metrics.jsonl config.json model.jepa result.json curves.png".split()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = open(path / ".lock", "a+", encoding="utf-8")  # as long as it is open
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.lock.seek(0)
                holder = printable(self.lock.read(200)) or "another run"
                raise UserError(f"RUN_ID={path.name}: {path} is in use by {holder}; stop that run, "
                                "or choose another RUN_ID") from None
            except OSError as error:
                note(f"{path}: no file locks here ({error.strerror}); two runs must not share it")
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} of {os.getppid()} on {platform.node()}")
            self.lock.flush()
            old = list(path.glob(".*.tmp"))  # by a process that was killed
            if self.config.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                old += [path / name for name in names] + self.checkpoints.paths()
            elif (path / "result.json").exists():
                if not (path / "curves.png").exists():  # the run was killed just before it
                    plot_curves(path)
                raise UserError(f"RUN_ID={path.name}: {path} holds a finished run; choose another "
                                "RUN_ID, or OVERWRITE=1")
            for file in old:
                file.unlink(missing_ok=True)
        except OSError as error:
            place = error.filename or path
            raise UserError(f"{place}: cannot be used ({error.strerror})") from error
        if self.config.checkpoint_dir:
            self.checkpoints.probe()

    def head(self) -> Iterator[str]:
        """The log's first lines: source, configuration, machine, sizes."""
        c, trainer, evaluator, source = self.config, self.trainer, self.evaluator, source_text()
        size, digest = len(source.encode()), hashlib.sha256(source.encode()).hexdigest()
        text = f"{source}\nscript: {size} bytes, sha256 {digest}\n\n{c.render()}\n"
        self.log(text, console=False)
        yield "machine: " + ", ".join(f"{k} {x}" for k, x in self.runtime.describe().items())
        yield (f"run: {self.folder.path}  parameters: {count_parameters(trainer.model):,} stored + "
               f"{count_parameters(trainer.jepa):,} training-only")
        yield (f"data: {len(trainer.stream):,} training tokens, {evaluator.targets:,} validation "
               f"tokens = {evaluator.bytes:,} bytes")
        if trainer.note:
            yield trainer.note
        yield (f"scan: {trainer.kernels.name}; compile: {c.compile_mode}; step: "
               f"{c.train_batch_tokens:,} tokens in {c.micro_batches} micro-batches on "
               f"{self.runtime.world} rank(s)")
        if not self.runtime.cuda and (busy := busy_machine()):
            yield f"busy: {busy}; other processes slow this run down: fewer steps in a limited time"
        if c.warmup_steps:
            yield f"warm-up: {c.warmup_steps} steps, rolled back afterwards"

    def measure_reserve(self) -> float:
        """1.25 times the seconds of what reads training data after the last step, by one batch."""
        c, runtime, total = self.config, self.runtime, 0.0
        batch = self.evaluator.sequences * c.train_seq_len
        search = lambda count: search_temperatures(self.evaluator.on(self.next_tokens(count)), c)
        jobs = [(self.layer_moments, c.rounding_tokens)] if c.rounding == "compensated" else []
        jobs += [(search, CALIBRATION)] if self.calibrates else []
        for work, count in jobs:
            for _ in range(2 if runtime.cuda else 1):  # the first compiles
                runtime.synchronize()
                started = now()
                work(batch)
            runtime.synchronize()
            total += (now() - started) * max(1.0, count / batch)
        return runtime.agree(1.25 * total)[0]

    def train(self) -> None:
        """The loop: agree on the clock, validate when due, step, log, save."""
        c, trainer, runtime, clock = self.config, self.trainer, self.runtime, self.clock
        cap = max(c.max_wallclock_seconds - self.reserve, 0.0)
        clock.run(True)
        while True:
            seconds, fault = clock.seconds() if runtime.main else -math.inf, trainer.read_ahead()
            elapsed, caught, bad = runtime.agree(seconds, self.caught, bool(fault))
            progress = measure_progress(self.step, c.iterations, elapsed, cap)
            fraction, finished = progress.fraction, progress.fraction >= 1
            due = finished or c.val_loss_every and self.step % c.val_loss_every == 0
            if due and self.step != self.validated:
                self.validate(elapsed)
            if finished:
                break
            if caught or bad:
                self.leave(int(caught), fault)
            stage = loss_weights(fraction, c).stage
            if stage != self.stage and not c.joint:
                self.log(f"stage: {stage} begins at step {self.step} (progress {fraction:.3f})")
            self.stage = stage
            self.remember(elapsed)
            HEARTBEAT.doing = f"step {self.step + 1}, {100 * fraction:.0f}% of the training"
            parts = trainer.train_step(progress)
            self.step += 1
            if self.step % c.train_log_every == 0 or self.step <= 10:
                self.log_step(progress, parts)
            self.guard(progress, force=self.step % max(c.train_log_every, c.nonfinite_limit) == 0)
            if self.checkpoint_due(progress, elapsed):
                self.save(clock.seconds())
        clock.run(False)
        if c.checkpoint_every:
            self.save(clock.seconds())
        self.checkpoints.wait()
        self.evaluating = True

    def validate(self, elapsed: float) -> None:
        """Score the masters, or their EMA where it has begun, while the clock stands still."""
        self.runtime.synchronize()
        self.clock.run(False)
        self.trainer.weights.load("average")
        self.score, self.validated = self.evaluator.standard()[0], self.step
        loss, bpb = self.score
        self.log(f"step:{self.step} val_loss:{loss:.4f} val_bpb:{bpb:.4f} "
                 f"train_time:{elapsed:.1f}s")
        latent = self.latent_report() if self.config.diagnostics else {}
        self.folder.metric(kind="validation", step=self.step, val_loss=loss, val_bpb=bpb,
                           seconds=elapsed, **latent)
        self.runtime.synchronize()
        self.clock.run(True)

    def leave(self, caught: int, fault: str) -> None:
        """Save and end: on a signal, or with the fault of the shard that a rank reads."""
        self.save(self.clock.seconds())
        self.checkpoints.wait()
        if caught:
            name, run_id = signal.Signals(caught).name, self.folder.path.name
            raise RunStopped(f"stopped by {name} after step {self.step}; the same command with "
                             f"RUN_ID={run_id} goes on from there", 128 + caught)
        faults = [text for text in self.runtime.collect(fault) if text]
        raise UserError(f"{faults[0]}; the state of step {self.step} is saved")

    def checkpoint_due(self, progress: Progress, elapsed: float) -> bool:
        """Every CHECKPOINT_EVERY steps, or ten minutes of a run longer than thirty; not while steps
        are skipped."""
        every = self.config.checkpoint_every
        due = bool(every) and self.step % every == 0
        if not every and elapsed - self.saved_at >= 600 and elapsed > 1800 * progress.fraction:
            if not self.saved_at:
                self.log("checkpoints: every 10 minutes (CHECKPOINT_EVERY sets another interval)")
            due, self.saved_at = True, elapsed
        return due and not self.trainer.optimizer.skipped_in_row

    def log_step(self, progress: Progress, parts: Tensor) -> None:
        """Only here does the loop wait for the device."""
        c, fraction, seconds = self.config, progress.fraction, self.clock.seconds()
        self.runtime.sum_(parts[:-1])
        *values, norm = parts.tolist()
        scale, active = lr_scale(progress, c), loss_weights(fraction, c).active
        values = [x if on else None for x, on in zip(values, active)]
        shown = " ".join(f"{k}:{x:.4f}" for k, x in zip(self.labels, values) if x is not None)
        left = int(seconds * (1 - fraction) / max(fraction, 1e-9))
        eta = f" eta:{left // 60}:{left % 60:02d}" if fraction > 1e-4 else ""
        self.log(f"step:{self.step} {100 * fraction:.0f}%{eta} {shown} grad_norm:{norm:.3f} "
                 f"lr_scale:{scale:.3f} time:{seconds:.1f}s "
                 f"step_avg:{1e3 * seconds / self.step:.1f}ms "
                 f"tok/s:{self.trainer.tokens / max(seconds, 1e-9):.0f}")
        self.folder.metric(kind="train", step=self.step, progress=fraction,
                           **dict(zip(TERMS, values)), grad_norm=norm, lr_scale=scale,
                           seconds=seconds, skipped=int(self.trainer.optimizer.skipped))

    def remember(self, elapsed: float) -> None:
        """Keep copies of two recent states: a finite step followed at least the older one."""
        every = self.config.train_log_every if self.runtime.cuda else self.config.nonfinite_limit
        if self.step % every == 0 and not self.trainer.optimizer.skipped_in_row:
            meta, tensors = self.snapshot(elapsed)
            copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self.good = [*self.good[-1:], (self.step, meta, copies)]

    def guard(self, progress: Progress, force: bool) -> None:
        """End after NONFINITE_LIMIT non-finite steps in a row, the last good state saved; the
        failing batch is run once more, to name terms and layers."""
        trainer, c, fraction = self.trainer, self.config, progress.fraction
        if self.runtime.cuda and not force or trainer.optimizer.skipped_in_row < c.nonfinite_limit:
            return
        trainer.weights.load(qat=qat_on(fraction, c.qat_fraction))
        trainer.position -= trainer.batches.values_per_step()
        parts = trainer.accumulate(progress.step, loss_weights(fraction, c), keep_states=False)
        self.runtime.sum_(parts)
        terms = [k for k, x in zip(self.labels, parts.tolist()) if not math.isfinite(x)]
        layers = [name for group in trainer.weights.groups if group.touched
                  for name, grad in zip(group.names, group.grad) if not grad.isfinite().all()]
        if not terms and not layers:
            layers = ["none, but the gradient's norm overflows"]
        skipped = int(trainer.optimizer.skipped_in_row)
        first_bad = max(self.step - skipped, 1)
        good = [state for state in self.good if state[0] < first_bad][-1]
        self.checkpoints.wait()
        if self.runtime.main:
            for path in self.checkpoints.paths():  # they lead to the divergence
                if int(path.stem.removeprefix("step_")) >= first_bad:
                    path.unlink()
            self.checkpoints.save(*good)
            self.checkpoints.wait()
        raise RunStopped(
            f"stopped at step {self.step}: {skipped} steps in a row had a non-finite gradient; "
            f"terms: {', '.join(terms) or 'all finite'}; "
            f"layers: {', '.join(layers[:4]) or 'none'}; the last good state, of step {good[0]}, "
            "is saved: lower rates and RESUME_AFTER_DIVERGENCE=1 "
            f"RUN_ID={self.folder.path.name} go on from it", 1)

    def save(self, seconds: float) -> None:
        """Hand a snapshot to the checkpoint writer."""
        meta, tensors = self.snapshot(seconds)
        if self.runtime.main:
            self.checkpoints.save(self.step, meta, tensors)

    def snapshot(self, seconds: float) -> tuple[dict, dict[str, Tensor]]:
        """Everything a checkpoint holds: meta data for JSON, and tensors (views)."""
        c, trainer, tensors = self.config, self.trainer, self.tensors()
        meta = dict(step=self.step, stage=self.stage, validated=self.validated, score=self.score,
                    position=trainer.position, tokens=trainer.tokens, seconds=seconds,
                    averaged=any(name.startswith("average/") for name in tensors),
                    journals=self.folder.sizes(), fixed=c.fixed(), config=c.named())
        if c.carry_state:
            own = {name: t.cpu() for name, t in tensors.items() if name.startswith("state/")}
            tensors |= {k: t for states in self.runtime.collect(own) for k, t in states.items()}
        return meta, tensors | {"rng": torch.get_rng_state()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint that `restore` writes into."""
        weights = self.trainer.weights
        averaged = weights.groups[0].average is not None
        parts = {"master": weights.tensors(), "optimizer": self.trainer.optimizer.state(),
                 "average": weights.tensors("average") if averaged else {},
                 "state": {f"{micro}/{layer}/{index}": tensor  # CARRY_STATE, of this rank
                           for micro, states in self.trainer.states.items()
                           for layer, state in enumerate(states or ())
                           for index, tensor in enumerate(state)}}
        named = {f"{part}/{name}": t for part, own in parts.items() for name, t in own.items()}
        return named | {"directions": self.trainer.directions}

    def restore(self, path: Path, note: Callable[[str], None]) -> dict | None:
        """Put back the newest valid checkpoint; returns its meta data, or None without any."""
        c, trainer, free = self.config, self.trainer, []
        if (newest := self.checkpoints.newest(note)) is None:
            return None
        meta, tensors = newest
        try:
            if not meta["fixed"]["QAT_FRACTION"] and not c.qat_fraction:  # no training on the grid
                free += Config.tagged("grid")
            free += Config.tagged("rate") if c.resume_after_divergence else []
            if lines := differences(meta["fixed"], c.fixed(), but=free):
                raise UserError(f"RUN_ID={path.name}: its checkpoint was made with other settings; "
                                "undo these, or start another RUN_ID:\n  " + "\n  ".join(lines))
            if meta["averaged"]:  # makes room
                trainer.weights.average(c.swa_decay, torch.ones(()))
            restore_views(self.tensors(), tensors)
            torch.set_rng_state(tensors["rng"])
            numbers = [int(meta[key]) for key in ("step", "validated", "position", "tokens")]
            self.step, self.validated, trainer.position, trainer.tokens = numbers
            self.stage, self.clock = meta["stage"], Stopwatch(float(meta["seconds"]))
            if meta["score"]:  # null stands for a number that was not finite
                self.score = Score(*(math.nan if x is None else x for x in meta["score"]))
            counts = self.step, trainer.position, trainer.tokens, *meta["journals"].values()
            if min(counts) < 0 or not dict(meta["config"]):
                raise ValueError("its meta data")
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"{self.checkpoints.folder}: the newest checkpoint is not one of this run "
                f"({type(error).__name__}: {str(error)[:80]}); move it away") from error
        return meta

    def finish(self) -> dict[str, Any]:
        """After the last step: diagnostics, artifact, scores of the file read back, result.json."""
        c, trainer, runtime, started = self.config, self.trainer, self.runtime, now()
        for name, weight in trainer.weights.tensors("average").items():
            if not all_finite(weight):
                raise RunStopped(f"the last steps diverged: {name} holds NaN or infinity; lower "
                                 "the learning rates", 1)
        last = None
        if trainer.weights.groups[0].average is not None:
            trainer.weights.load()
            last = self.evaluator.standard()[0].bpb
            self.log(f"last weights: val_bpb:{last:.4f}, averaged {self.score.bpb:.4f}")
        trainer.weights.load("average")
        diagnostics = self.latent_report() | self.diagnose() if c.diagnostics else {}
        if c.diagnostics:
            self.log("diagnostics " + " ".join(f"{k}:{x:.4g}" for k, x in diagnostics.items()))
        sizes, path, calibration = self.write_model(), self.folder.path / "model.jepa", None
        trainer.model.load_state_dict(whole_tensors(read_artifact(path)[1], path))
        if self.calibrates and self.unseen_position() is not None:
            read = lambda: self.next_tokens(CALIBRATION)
            calibration = read_calibration(read, runtime, self.log)
        scores = final_scores(self.evaluator, c, calibration, self.log)
        seconds, moments = self.clock.seconds(), self.moments_seconds
        data_seconds = seconds + moments + scores["temperature_seconds"]
        if cap := c.max_wallclock_seconds:
            self.log(f"clock: training {seconds:.1f} s + moments {moments:.1f} s + temperature "
                     f"search {scores['temperature_seconds']:.1f} s = {data_seconds:.1f} s: "
                     f"{'WITHIN' if data_seconds <= cap else 'OVER'} {cap:g} s")
        self.log("size: artifact {artifact_bytes:,} ({codec}) + code {code_bytes:,} = "
                 "{total_bytes:,} bytes: {} {:,}".format(
                     "FITS" if sizes["fits"] else "OVER", SIZE_LIMIT, **sizes))
        machine, (val_loss, val_bpb) = runtime.describe(), self.score
        result = dict(
            run_id=self.folder.path.name, steps=self.step, val_loss=val_loss, val_bpb=val_bpb,
            last_val_bpb=last, train_seconds=seconds, data_seconds=data_seconds,
            ms_per_step=1e3 * seconds / max(self.step, 1),
            tokens_per_second=trainer.tokens / max(seconds, 1e-9), **sizes, **scores,
            artifact_sha256=file_hash(path), eval_seconds=now() - started, seed=c.seed,
            script_sha256=hashlib.sha256(source_text().encode()).hexdigest(),
            eval_params=count_parameters(trainer.model),
            train_only_params=count_parameters(trainer.jepa), world_size=runtime.world,
            device=machine["device"], skipped_steps=int(trainer.optimizer.skipped),
            peak_memory_bytes=runtime.peak_memory(), diagnostics=diagnostics, machine=machine)
        self.folder.write_json("result.json", result)
        try:
            if runtime.main:
                plot_curves(self.folder.path)
        except OSError as error:
            self.log(f"curves.png cannot be written ({error.strerror})")
        HEARTBEAT.doing, bpb = "", result["roundtrip_val_bpb"]
        self.log(f"done: {self.folder.path}  roundtrip_val_bpb:{bpb:.6f} "
                 f"eval_time:{result['eval_seconds']:.1f}s")
        if not math.isfinite(bpb):
            raise RunStopped("the final score is not finite: the stored model predicts nothing; "
                             "lower the learning rates, or mend LOGIT_SOFTCAP and the like", 1)
        return result

    def write_model(self) -> dict[str, Any]:
        """Write model.jepa on rank 0; every rank gets the sizes of artifact and code."""
        c, plan, weights = self.config, self.trainer.plan, self.trainer.weights.tensors("average")
        header = dict(model=c.model_config(), vocabulary=self.vocabulary.pack(),
                      position=self.unseen_position())
        code = len(shipped_script(source_text()))

        def write() -> dict:
            tensors = artifact_tensors(((name, weights[name]) for name in plan), plan)
            rounded = self.compensation() if c.rounding == "compensated" else lambda tensors: {}
            if c.quant_fit:
                budget = SIZE_LIMIT - SIZE_SPARE - code
                tensors, given, factor, _ = fit_steps(tensors, budget, rounded)
                self.log(f"storage: σ steps times {factor:.4g}, to leave {SIZE_SPARE:,} bytes free")
            else:
                given, factor = rounded(tensors), 1.0
            path = self.folder.path / "model.jepa"
            return dict(write_artifact(path, header, tensors, given=given), step_factor=factor)

        HEARTBEAT.doing = "coding the artifact"
        report = self.runtime.main_first(write)
        size, codec, sizes = (report[key] for key in ("bytes", "codec", "codec_bytes"))
        listed = ", ".join(f"{name} {count:,}" for name, count in sizes.items())
        self.log(f"artifact: {size:,} bytes with {codec} ({listed}); "
                 f"entropy {report['entropy_bytes']:,}")
        return dict(artifact_bytes=size, code_bytes=code, total_bytes=size + code,
                    fits=size + code <= SIZE_LIMIT, codec=codec, codec_bytes=sizes,
                    step_factor=report["step_factor"])

    def unseen_position(self) -> int | None:
        """Start of unseen training tokens; None after an epoch: seen ones bias the temperature."""
        position = self.trainer.position
        return position if position + CALIBRATION < self.trainer.batches.span() else None

    def next_tokens(self, count: int) -> Tensor:
        """About `count` training tokens from where the next step would read on."""
        stream, position = self.trainer.stream, self.trainer.position
        return calibration_tokens(stream, position, self.config.train_seq_len, count)

    def layer_moments(self, count: int) -> dict[str, Tensor]:
        """`input_moments` over training tokens, on the plain grid: near what layers will see."""
        model, runtime = self.trainer.model, self.runtime
        self.trainer.weights.load("average", qat=True)
        sequences = self.next_tokens(count)[:-1].view(-1, self.config.train_seq_len)
        hidden = lambda x: model(runtime.to_device(x), runtime.dtype)[0]
        return input_moments(model, sequences.split(self.evaluator.sequences), hidden)

    def compensation(self) -> Callable[[dict], dict[str, dict[str, Tensor]]]:
        """A function of `artifact_tensors` that gives the arrays of the INT matrices, rounded by
        their effect on the layer's output; the training tokens that this takes are read here."""
        tokens, started = self.config.rounding_tokens, now()
        moments = self.layer_moments(tokens)
        self.trainer.weights.load("average")
        self.runtime.synchronize()
        self.moments_seconds = now() - started

        def rounded(tensors: dict[str, tuple[Tensor, Grid]]) -> dict[str, dict[str, Tensor]]:
            began = now()
            arrays, shares = compensated_arrays(tensors, moments)
            seconds = self.moments_seconds + now() - began
            self.log(f"rounding: {len(arrays)} matrices compensated on {tokens:,} training tokens "
                     f"in {seconds:.1f}s; output error x{np.median(shares or [1]):.3f} of plain "
                     "rounding's (median)")
            return arrays

        return rounded

    @torch.no_grad()
    def latent_report(self) -> dict[str, float]:
        """Statistics of h and z on a micro-batch of validation text, with the weights as loaded."""
        c, trainer, jepa, to = self.config, self.trainer, self.trainer.jepa, self.runtime.to_device
        HEARTBEAT.doing = "statistics of the latent"
        tokens = self.evaluator.tokens[:c.micro_tokens + 1]
        x, y = (to(t.view(-1, c.train_seq_len)) for t in (tokens[:-1], tokens[1:]))
        h, _ = trainer.model(x, self.runtime.dtype)
        report = latent_statistics("h", h)
        if jepa is None:
            return report
        z = jepa.project(h)
        positions = to(torch.linspace(0, c.train_seq_len - 1, 64).long().unique())
        value = float(sigreg(z[:, positions], trainer.directions, c.sigreg_knots))
        null = sigreg_null(len(z), c.sigreg_knots)
        report |= latent_statistics("z", z)
        report |= dict(z_dim=z.size(-1), sigreg=value, sigreg_over_null=value / null)
        for k, pair in enumerate(rollout(jepa, z, c.jepa_steps) if c.jepa_on else (), 1):
            report[f"predictability_{k}"] = predictability(*pair)
        unramped = dataclasses.replace(c, sigreg_schedule=False)
        weights = loss_weights(0.0 if c.joint else 0.5, unramped)._replace(ce=1.0)
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            terms = loss_terms(c, trainer.model, jepa, leaf, y, positions, trainer.directions,
                               weights.active)
            weighted = {name: w * terms[name] for name, w in zip(TERMS, weights) if name in terms}
            return report | gradient_shares(leaf, weighted)

    @torch.no_grad()
    def diagnose(self) -> dict[str, float]:
        """On at most 50,000 validation tokens: cosine and MSE of the prediction, accuracies, and
        bits per byte of a linear probe on h."""
        c, evaluator, to = self.config, self.evaluator, self.runtime.to_device
        model, mean = self.trainer.model, lambda parts: float(torch.cat(parts).mean())
        rows, jepa = min(50_000, evaluator.targets) // c.train_seq_len or 1, self.trainer.jepa
        tokens = evaluator.tokens[:rows * c.train_seq_len + 1]
        hidden, cosines, errors, places = [], [], [], []
        batches = tokens[:-1].view(-1, c.train_seq_len).split(evaluator.sequences)
        for x in progress_bar(batches, "hidden states", self.runtime.main):
            h = model(to(x), self.runtime.dtype)[0]
            hidden += h.flatten(0, 1).split(1024)
            if c.jepa_on:
                prediction, target = (t.float() for t in next(rollout(jepa, jepa.project(h), 1)))
                cosines.append(F.cosine_similarity(prediction, target, dim=-1).flatten())
                errors.append((prediction - target).square().mean(-1).flatten())
        h, ids = torch.cat(hidden), to(tokens[1:])
        for part, targets in zip(h.split(1024), ids.split(1024)):
            logits = model.logits(part)
            places.append((logits > logits.gather(1, targets[:, None])).sum(1))  # 0: the likeliest
        report = {f"top{k}_accuracy": mean([place.lt(k).float() for place in places])
                  for k in (1, 5, 10)}
        if c.jepa_on:
            report |= dict(jepa_cosine=mean(cosines), jepa_mse=mean(errors))
        if c.probe_steps:
            lengths = to(self.vocabulary.target_bytes(tokens[:-1], tokens[1:]))
            report["probe_bpb"] = linear_probe(h, ids, lengths, c.vocab_size, c.probe_steps, c.seed)
        return report


CALIBRATION = 65_536  # training tokens that the temperature is chosen on


def calibration_tokens(stream: TokenStream, position: int, seq_len: int,
                       count: int = CALIBRATION) -> Tensor:
    """About `count` training tokens from `position`, in whole sequences."""
    return torch.from_numpy(stream.read(position, max(count // seq_len, 1) * seq_len + 1))


def read_calibration(read: Callable[[], Tensor], runtime: Runtime,
                     log: Callable[[str], None]) -> Tensor | None:
    """What rank 0 reads for the temperature, on every rank; None and a line if that fails."""
    try:
        return runtime.main_first(read)
    except UserError as error:
        log(f"no temperature search: {error}; TEMP_CALIB sets a temperature")
        return None


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def plot_curves(folder: Path) -> None:
    """curves.png: cross-entropy, latent terms and BPB over steps; none without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    plt.switch_backend("Agg")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    titles = ("Cross-entropy, nats per token", "Latent terms, unweighted (log scale)",
              "Validation before storage, bits per byte")
    curves = ((0, "ce", "", "#0072B2"), (1, "jepa", "JEPA", "#E69F00"),  # colors of Okabe and Ito
              (1, "anti", "anti-collapse", "#009E73"), (1, "cov", "covariance", "#CC79A7"),
              (2, "val_bpb", "", "#D55E00"))
    for panel, name, label, color in curves:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if name == "val_bpb" and len(points) > 2:  # the untrained model would flatten the rest
            points = points[1:]
        if points:
            marker = "." if len(points) < 40 else None
            panels[panel].plot(*zip(*points), label=label, color=color, marker=marker)
    for panel, title in zip(panels, titles):
        panel.set(xlabel="step", title=title)
        panel.grid(alpha=0.3)
    if panels[1].lines:
        panels[1].set_yscale("log")
        panels[1].legend(frameon=False)
    figure.suptitle(folder.name)
    figure.savefig(folder / "curves.png", dpi=120)


# ------------------------------------------------------------------------------
# evaluation alone and generation: from an artifact, on any machine
# ------------------------------------------------------------------------------

def config_of_artifact(c: Config, header: dict) -> Config:
    """The user's knobs with the artifact's model knobs in their place, and training off."""
    model, knobs = header.get("model"), Config.knobs()
    if not isinstance(model, dict) or set(model) != set(Config.tagged("model")):
        raise UserError(f"ARTIFACT={c.artifact}: its header describes no model of this script")
    values = {name.lower(): parse_knob(name, knobs[name], printable(format_knob(value), 256))
              for name, value in model.items()}
    length = values["train_seq_len"]
    values |= dict(train_batch_tokens=c.micro_batches * length, loss_schedule="joint",
                   ce_weight=1.0, jepa_weight=0.0, sigreg_lambda=0.0, jepa_cov=0.0,
                   carry_state=False, sliding_eval_stride=min(c.sliding_eval_stride, length))
    return dataclasses.replace(c, **values).validate()


def open_artifact(c: Config, runtime: Runtime) -> tuple[Config, LanguageModel, Vocabulary, dict]:
    """Read ARTIFACT strictly and build its model on this device: configuration, model, vocabulary,
    header."""
    if not c.artifact:
        raise UserError(f"ARTIFACT: MODE={c.mode} needs the model.jepa of a run: bash "
                        f"run_jepa_bpe.sh MODE={c.mode} ARTIFACT=runs/<RUN_ID>/model.jepa")
    header, parts, _ = read_artifact(c.artifact)
    own = config_of_artifact(c, header)
    kernels, note = choose_kernels(own, runtime)
    if note and runtime.main:
        say(note)
    tensors = whole_tensors(parts, c.artifact)
    with parsing(c.artifact), torch.device("meta"):
        require(own.num_layers <= len(tensors), "it has fewer tensors than blocks")
        model = LanguageModel(own, kernels)
        require(shapes_of(dict(model.named_parameters())) == shapes_of(tensors),
                "its tensors are not those of the model in its header")
    vocabulary = Vocabulary.unpack(header.get("vocabulary"), own.vocab_size)
    if own.tokenizer == "byte" or own.tokenizer_path:
        known = load_vocabulary(own)
        source = vocabulary.source or known.source  # artifacts of v0.1 name none
        if dataclasses.replace(vocabulary, source=source).pack() != known.pack():
            other = "bytes" if own.tokenizer == "byte" else f"TOKENIZER_PATH={c.tokenizer_path}"
            raise UserError(f"{c.artifact}: its byte counts are not those of {other}; take the "
                            "artifact as its run wrote it, and the tokenizer of its training")
    for name, role, _ in named_roles(model):
        low = role in (*MATRICES, EMBEDDING, HEAD)
        tensors[name] = tensors[name].to(runtime.device, runtime.dtype if low else torch.float32)
    model.load_state_dict(tensors, assign=True)
    return own, model.to(runtime.device), vocabulary, header


def evaluate_alone(c: Config) -> dict[str, Any]:
    """MODE=eval: scores of an artifact on the validation shards at DATA_PATH, equal to those of
    the run that wrote it."""
    with Runtime(c) as runtime:
        own, model, vocabulary, header = open_artifact(c, runtime)
        check_source(own, vocabulary)
        log = lambda line: say(line) if runtime.main else None
        started, position, calibration = now(), header.get("position"), None
        forward = compiled(model, own.compile_mode) if runtime.cuda else model
        evaluator = Evaluator(model, load_validation(own), vocabulary, own.train_seq_len,
                              max(1, own.val_batch_size // own.micro_batches), runtime, forward)
        if own.temp_scaling and not own.temp_calib and isinstance(position, int):
            stream = lambda: TokenStream(find_shards(own.data_path, "train"), own.vocab_size)
            read = lambda: calibration_tokens(stream(), position, own.train_seq_len)
            calibration = read_calibration(read, runtime, log)
        size, device = os.path.getsize(c.artifact), runtime.describe()["device"]
        log(f"artifact: {c.artifact} ({size:,} bytes), {count_parameters(model):,} parameters; "
            f"{evaluator.targets:,} validation tokens = {evaluator.bytes:,} bytes")
        if own.tokenizer == "bpe" and not own.tokenizer_path:
            log("byte counts: as the artifact says; TOKENIZER_PATH checks them")
        scores, seconds = final_scores(evaluator, own, calibration, log), now() - started
        best = min(value for name, value in scores.items() if name.endswith("_bpb") and value)
        log(f"evaluated in {seconds:.1f} s on {device}: {best:.4f} bits per byte")
        return scores | dict(
            artifact=str(c.artifact), artifact_bytes=size, artifact_sha256=file_hash(c.artifact),
            eval_params=count_parameters(model), val_tokens=evaluator.targets,
            val_bytes=evaluator.bytes, eval_seconds=seconds, world_size=runtime.world,
            device=device)


def choose_token(logits: Tensor, temperature: float, top_k: int, top_p: float,
                 generator: torch.Generator) -> int:
    """An id drawn from logits (V,): temperature (0 = the most likely id), then the top k, then the
    nucleus of probability top_p (https://arxiv.org/abs/1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    probability = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    ranked, ids = probability.sort(descending=True)
    likelier = ranked.cumsum(0) - ranked  # probability of the likelier ids; 0 for the first
    allowed = (torch.arange(len(ranked)) < (top_k or len(ranked))) & (likelier < top_p)
    return int(ids[torch.multinomial(ranked * allowed, 1, generator=generator)])


def stream_text(tokens: Iterable[int], pieces=None, prompt: Sequence[int] = ()) -> Iterator[str]:
    """Text of ids after a prompt's, as they come: whole UTF-8 characters, and a replacement
    character for bytes that make none. pieces: a SentencePiece model; None: the ids are bytes."""
    decode = pieces.decode if pieces else lambda ids: bytes(ids).decode("utf-8", "replace")
    ids = list(prompt)
    shown = decode(ids)
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else within a character
            yield text[len(shown):]
            shown = text
    yield decode(ids)[len(shown):]


@torch.no_grad()
def generate(model: LanguageModel, prompt: list[int], count: int, runtime: Runtime,
             choose: Callable[[Tensor], int], stop: int) -> Iterator[int]:
    """At most `count` ids after `prompt` (not empty), until `stop`. The chunked scan reads the
    prompt; each id is then one step of the recurrence."""
    ids = lambda *tokens: torch.tensor([tokens], device=runtime.device)
    h, states = model(ids(*prompt), runtime.dtype)
    for _ in range(count):
        token = choose(model.logits(h[0, -1]))
        if token == stop:
            return
        yield token
        h, states = model(ids(token), runtime.dtype, states)


def sample(c: Config) -> None:
    """MODE=sample: NUM_SAMPLES continuations of PROMPT, streamed to the terminal."""
    with Runtime(c) as runtime:
        if runtime.world > 1:
            raise UserError("MODE=sample: one process; start it without torchrun")
        own, model, vocabulary, _ = open_artifact(c, runtime)
        pieces = load_sentencepiece(c.tokenizer_path) if own.tokenizer == "bpe" else None
        bos, silent = vocabulary.bos_id, vocabulary.boundary.clone()
        silent[bos] = False  # the end of the document may be drawn; padding and unknown ids never
        body = pieces.encode(c.prompt) if pieces else [b for b in c.prompt.encode() if b != bos]
        generator = torch.Generator()
        choose = lambda logits: choose_token(logits.cpu().masked_fill(silent, -math.inf),
                                             c.temperature, c.top_k, c.top_p, generator)
        for index in range(c.num_samples):
            generator.manual_seed(c.seed + index)
            if c.num_samples > 1:
                print(f"--- sample {index + 1}")
            print(c.prompt, end="", flush=True)
            tokens = generate(model, [bos, *body], c.sample_tokens, runtime, choose, bos)
            for text in stream_text(tokens, pieces, body):
                print(text, end="", flush=True)
            print()


# ------------------------------------------------------------------------------
# describe, bench, main
# ------------------------------------------------------------------------------

def assumed_steps(c: Config) -> int:
    """Steps that a run of this configuration may do, by a rough speed of PROFILE's machine."""
    host_gpu = c.device != "cpu" and torch.cuda.is_available()
    gpu = host_gpu if c.profile == "auto" else c.profile == "gpu"
    by_clock = int((10.0 if gpu else 2.5) * c.max_wallclock_seconds)
    return max(1, min(c.iterations, by_clock or c.iterations))


def synthetic_weights(c: Config, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor): synthetic weights distributed like trained ones of this configuration. The
    constants are a fit to runs of 40 to 300 steps (RESULTS.md, Storage): how far weights move, by
    learning rate and path, the sum of LR scales. Only the distributions' shape matters here."""
    draw, steps, rates = torch.Generator().manual_seed(0), assumed_steps(c), base_rates(c)
    scales = np.array([lr_scale(Progress(i, i / steps, steps - i), c) for i in range(steps)])
    normal = lambda *shape: torch.empty(shape).normal_(generator=draw)

    def decayed(lr: float, decay: float) -> tuple[float, float]:
        """What weight decay leaves of the sum of LR scales, and of the initial weights."""
        left = np.cumprod((1 - lr * decay * scales).clip(0)[::-1])[::-1]
        return float((scales * left).sum()), float(left[0])

    for name, role, w in named_roles(model):
        w, owner = w.detach(), owner_of(role, c)
        lr = rates[owner]
        if owner == "matrix":
            path, start = decayed(lr, c.muon_wd)
            # a random walk has power 0.5; momentum makes steps correlated
            walk = 1.25 * lr * path ** 0.66 * w.size(1) ** -0.5
            if name.endswith("mlp.down.weight"):  # units behind a squaring activation differ
                walk = walk * (0.33 * normal(1, w.size(1))).exp()
            yield name, start * w + walk * normal(*w.shape)
        elif role in (EMBEDDING, HEAD, CORRECTION):
            path, start = decayed(lr, c.adam_wd)
            rows, columns = w.shape
            shared = 1.16 * rows ** 0.15 * path ** 0.22  # direction that its rows share
            shared = (shared if role == EMBEDDING and c.tie_embeddings else 0) * normal(1, columns)
            spread = 0.4 * normal(rows, 1) + 0.2 * normal(1, columns)
            row = 0.16 * rows ** 0.1 * path ** 0.55
            yield name, start * w + lr * (shared + row * spread.exp() * normal(rows, columns))
        else:
            shift = -2.5 if name == "vocab_bias" else 0.0  # rare tokens all go down
            yield name, w + lr * scales.sum() ** 0.4 * (shift + normal(*w.shape))


def estimated_bytes(c: Config, model: nn.Module | None = None, budget: int | None = None) -> int:
    """Expected bytes of this configuration's trained artifact, from entropies. With a budget, as
    QUANT_FIT fits it; the factor of its steps is printed."""
    model = model or build_models(c)[0]
    tensors = artifact_tensors(synthetic_weights(c, model), storage_plan(model, c))
    if budget is None:
        return estimate_bytes(tensors)
    *_, factor, size = fit_steps(tensors, budget)
    print(f"\nQUANT_FIT=1: σ steps times about {factor:.4g}")
    return size


def largest_fit(c: Config, name: str, step: int, budget: int) -> int | None:
    """The largest multiple of `step` for a size knob whose artifact fits `budget` bytes, if any."""
    fits = lambda value: estimated_bytes(dataclasses.replace(c, **{name: value})) <= budget
    low, high = 0, step
    while fits(high):
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // (2 * step) * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def describe_fit(c: Config, budget: int) -> dict[str, int | None]:
    """FIT=1: the largest MODEL_DIM and the largest MLP_MULT that fit, all else as it is."""
    width = HEADDIM // math.gcd(HEADDIM, c.expand)
    width = math.lcm(width, 2 * c.num_heads) if "a" in c.pattern else width
    steps = {"MODEL_DIM": width} | ({"MLP_MULT": 1} if c.mlp_mult else {})
    fit = {name: largest_fit(c, name.lower(), step, budget) for name, step in steps.items()}
    print("\n" + "; ".join(f"the largest {name} that fits, all else as it is: {value or 'none'}"
                           for name, value in fit.items()))
    return fit


def describe(c: Config) -> dict[str, Any]:
    """MODE=describe: knobs with their sources, parameters by kind, expected bytes."""
    check_memory(c.validate(), cuda=False)
    model, jepa = build_models(c)
    plan, rows, by_storage = storage_plan(model, c), {}, {}
    print(c.render(changed=not c.all) + "\n")
    for name, _, parameter in named_roles(model) + (named_roles(jepa, "jepa.") if jepa else []):
        large = parameter.numel() >= 1024 and parameter.ndim > 1
        kind = re.sub(r"\.\d+\.", ".*.", name) if large else "small tensors"
        rows.setdefault((kind, plan.get(name, "not stored")), []).append(parameter.numel())
    print(f"{'parameter':<32}{'storage':<14}{'tensors':>8}{'parameters':>14}")
    for (kind, grid), sizes in sorted(rows.items(), key=lambda row: -sum(row[1])):
        print(f"{kind:<32}{grid:<14}{len(sizes):>8}{sum(sizes):>14,}")
        by_storage[grid] = by_storage.get(grid, 0) + sum(sizes)
    stored, extra = count_parameters(model), count_parameters(jepa)
    code = len(shipped_script(source_text()))
    estimate = estimated_bytes(c, model, SIZE_LIMIT - SIZE_SPARE - code if c.quant_fit else None)
    fit = describe_fit(c, SIZE_LIMIT - code) if c.fit else None
    fits = estimate + code <= SIZE_LIMIT
    print(f"\nstored {stored:,} + training-only {extra:,} parameters; artifact about {estimate:,} "
          f"bytes (entropy of weights as short runs leave them) + code {code:,} bytes: "
          f"{'FITS' if fits else 'OVER'} {SIZE_LIMIT:,}")
    return dict(eval_params=stored, train_only_params=extra, estimated_artifact_bytes=estimate,
                code_bytes=code, fits=fits, parameters_by_storage=by_storage, largest_fit=fit)


@dataclass
class SyntheticStream:
    """Random tokens in place of shards: MODE=bench needs no data."""
    vocab_size: int

    def __len__(self) -> int:
        return 1 << 40

    def read(self, position: int, count: int) -> np.ndarray:
        return np.random.default_rng(position).integers(0, self.vocab_size, count)


def timed(times: dict[str, list], name: str, work: Callable, runtime: Runtime) -> Callable:
    """`work`, whose milliseconds, the device's queue included, are appended to times[name]."""
    def wrapped(*args, **options) -> Any:
        runtime.synchronize()
        started = now()
        value = work(*args, **options)
        runtime.synchronize()
        times.setdefault(name, []).append(1e3 * (now() - started))
        return value
    return wrapped


def bench(c: Config) -> dict[str, Any]:
    """MODE=bench: ms per step on random tokens (CPU: median; CUDA: mean of steps that the host
    queues without waiting, and how long it takes to queue one), then of a step's parts, with a wait
    between them; on CUDA, a step's kernels by kind, and the largest."""
    with Runtime(c.validate()) as runtime:
        runtime.main_first(lambda: check_memory(c, runtime.cuda))
        trainer, times = Trainer(c, runtime, SyntheticStream(c.vocab_size)), {}
        trainer.run_phases()
        steps, warm = min(c.iterations, 50 if runtime.cuda else 5), 10 if runtime.cuda else 1
        seconds = []
        for index in progress_bar(range(warm + steps), "step", runtime.main):
            if index == warm:
                runtime.synchronize()
                began = now()
            started = now()
            trainer.train_step(Progress(0, 0.5, steps))
            seconds.append(now() - started)
        ms = host_ms = 1e3 * float(np.median(seconds[warm:]))
        if runtime.cuda:
            runtime.synchronize()
            ms = 1e3 * (now() - began) / steps
        peak, kernels = runtime.peak_memory(), kernel_profile(trainer) if runtime.cuda else {}
        step = timed(times, "step", trainer.train_step, runtime)
        weights, rounds = trainer.weights, max(1, min(steps, 10) // 2)
        for name, owner, method in (
                ("snap", weights, "load"), ("data", trainer, "step_inputs"),
                ("forward", trainer, "losses"), ("gradient sums", weights, "finish_gradients"),
                ("optimizer", trainer.optimizer, "step")):
            setattr(owner, method, timed(times, name, getattr(owner, method), runtime))
        for _ in range(rounds):
            step(Progress(0, 0.5, steps))
        parts = {name: float(np.median(np.array(values).reshape(rounds, -1).sum(1)))
                 for name, values in times.items()}
        total = parts.pop("step")
        parts["backward"] = total - sum(parts.values())
        speed = 1e3 * c.train_batch_tokens / ms
        if runtime.main:
            print(f"{'part':<16}{'ms':>10}{'share':>8}")
            for name, part in sorted(parts.items(), key=lambda row: -row[1]):
                print(f"{name:<16}{part:>10.2f}{part / total:>8.1%}")
            for kind, part in kernels.get("kernel_ms", {}).items():
                print(f"kernels: {kind:<16}{part:>10.2f} ms")
            print(f"{ms:.1f} ms per step of {c.train_batch_tokens:,} tokens, {steps} steps "
                  f"(host {host_ms:.1f}): {speed:,.0f} tokens a second; peak memory "
                  f"{peak / 1e9:.2f} GB; scan: {trainer.kernels.name}")
        return dict(ms_per_step=ms, host_ms_per_step=host_ms, tokens_per_second=speed, steps=steps,
                    parts_ms=parts, tokens_per_step=c.train_batch_tokens, peak_memory_bytes=peak,
                    scan=trainer.kernels.name, fused_mlp=trainer.kernels.mlp,
                    compile_mode=c.compile_mode, **kernels, **runtime.describe())


# Kinds of kernels in a profile, by the first pattern that their name matches.
KERNEL_KINDS = {"generated": "^triton_", "attention": "flash|fmha|sdpa", "head": "head_rows",
                "MLP": "mlp_product",
                "mixer": "ssd_|conv_|gate_norm|chunk_|state_passing", "snap": "snap_rows",
                "products": "gemm|nvjet|cutlass|xmma|cublas", "copies": "Memcpy|Memset",
                "other": ""}


def kernel_profile(trainer: Trainer) -> dict[str, Any]:
    """GPU time of one step's kernels by kind, ms, and the ten that take the most."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            trainer.train_step(Progress(0, 0.5, 1))
            trainer.runtime.synchronize()
    except (AssertionError, RuntimeError) as error:  # some machines forbid it
        say(f"kernels: no profile here ({error_text(error)})")
        return {}
    return by_kind([(event.self_device_time_total / 1e3, event.key)
                    for event in profile.key_averages()])


def by_kind(rows: list[tuple[float, str]]) -> dict[str, Any]:
    """Sums of (ms, kernel) by KERNEL_KINDS, and the ten largest."""
    kinds = dict.fromkeys(KERNEL_KINDS, 0.0)
    for ms, name in rows:
        kinds[next(kind for kind, text in KERNEL_KINDS.items() if re.search(text, name))] += ms
    largest = [dict(kernel=name[:100], ms=ms) for ms, name in sorted(rows, reverse=True)[:10]]
    return dict(kernel_ms=kinds, largest_kernels=largest)


def train(c: Config) -> None:
    """MODE=train. However the run ends once its log is open, the log's last line says it."""
    with Runtime(c.validate()) as runtime:
        run = Run(c, runtime)
        try:
            run.open()
            run.train()
            run.finish()
        except BaseException as end:
            if run.folder is not None:
                kind = "" if isinstance(end, (UserError, RunStopped)) else f"{type(end).__name__}: "
                with contextlib.suppress(UserError):  # the disk may be full
                    run.log(f"ended: {kind}{end}", console=False)
            raise


MODES = dict(train=train, describe=describe, bench=bench, eval=evaluate_alone, sample=sample)


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch on MODE. Exit codes: 0 done, 1 a run that diverged, 2 wrong input (a line each on
    stderr), 128 + n stopped by signal n."""
    argv, rank = sys.argv[1:] if argv is None else argv, int(os.environ.get("RANK", 0))
    try:
        if {"-h", "--help"} & set(argv):
            print(help_text(), flush=True)
            return 0
        config = Config.from_env(dict(os.environ), argv)
        if config.mode in ("train", "eval", "bench") and rank == 0:
            HEARTBEAT.start()
        report = MODES[config.mode](config)
        if report is not None and rank == 0 and (config.json or not sys.stdout.isatty()):
            print(json.dumps(report), flush=True)
        return 0
    except UserError as error:
        if rank:  # rank 0 reports faults of all ranks first; torchrun then ends this one
            time.sleep(2)
        for line in str(error).splitlines():
            print(f"train_jepa.py: {line}", file=sys.stderr, flush=True)
        return 2
    except RunStopped as stopped:
        if rank == 0:
            print(f"train_jepa.py: {stopped}", file=sys.stderr, flush=True)
        if stopped.code > 128:  # die by the signal itself: a shell loop around this run ends, too
            signal.signal(stopped.code - 128, signal.SIG_DFL)
            os.kill(os.getpid(), stopped.code - 128)
        return stopped.code
    except BrokenPipeError:  # the output's reader is gone, as after `| head`
        silence()
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())

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

Sections, each using only what stands above it:
    config         every knob, one line each        storage        grids of the stored weights
    runtime        ranks, device, run folder        optimizers     parameter groups, Muon, AdamW
    data           shards, batches, vocabulary      artifact       container, codecs
    SSD            Mamba-2's scan in PyTorch        checkpoint     exact resume
    kernels        Triton forms of slow parts       evaluation     BPB and statistics of the latent
    blocks, model  mixers, MLP, U-Net, JEPA head    training       one run, from log to result
    losses         SIGReg, covariance, rollout      generation     evaluate or sample an artifact
    schedules      functions of the progress        describe, bench, main

Names of shapes: B sequences of a batch, T positions, D model_dim, E embed_dim, V vocabulary,
H heads, P head width (64), N d_state, Q chunk of the scan, M projections or micro-batches,
K kernel size of the convolution.
"""
from __future__ import annotations

import atexit
import base64
import bz2
import codecs
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
import shutil
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

try:  # optional codecs of the artifact
    import brotli
except ImportError:
    brotli = None
try:
    import zstandard
except ImportError:
    zstandard = None

SIZE_LIMIT = 16_000_000  # bytes of artifact + this file
EVAL_SECONDS = 600       # that the challenge allows for evaluation, apart from training
HEADDIM = 64             # P: width of one Mamba-2 head, as in both published models
GATE_EPS = 1e-5          # epsilon of the norm behind Mamba-2's gate, as in mamba_ssm


class UserError(Exception):
    """Invalid user input; the message says how to fix it. `main` prints it, exits with code 2."""


# ------------------------------------------------------------------------------
# config: one frozen dataclass with a line per knob.
# NAME=value on the command line wins over the environment, which wins over the default.
# ------------------------------------------------------------------------------

def knob(default, help: str, tags: str = "", *, choices: str = "", low: float = 0,
         high: float = math.inf, group: str = ""):
    """Declare a knob: its default (whose type it has), help text and allowed values.

    `tags`, separated by spaces:
        free    a resumed run may change it
        result  free, but runs that differ in it are no repetitions of each other
        model   the artifact carries it, to rebuild the model
        grid    how tensors are stored
        rate    of the optimizers: RESUME_AFTER_DIVERGENCE=1 may change it
        eval    MODE=eval needs the run's value to repeat the run's scores
        size    the need for memory grows with it
    `group` names the group that starts here and goes on to the next knob with a group."""
    return field(default=default, metadata=dict(help=help, tags=tags.split(), low=low, high=high,
                                                choices=choices.split(), group=group))


# Only the run scripts and setup_jepa.sh read these.
SCRIPT_KNOBS = {
    "PRESET": "recipe that the run scripts take: published or best",
    "NPROC_PER_NODE": "ranks that the run scripts start (default: the number of GPUs)",
    "TORCHRUN_ARGS": "arguments of torchrun instead of --standalone: several machines, restarts",
    "TRAIN_SHARDS": "training shards that setup_jepa.sh downloads (default: 53; all: every one)"}

# Later sections append checks of their own knobs: each yields one message per fault.
CHECKS: list[Callable[[Config], Iterable[str]]] = []


def format_knob(value) -> str:
    """Text that parse_knob reads back to the same value."""
    if isinstance(value, bool):
        return str(int(value))
    return repr(value) if isinstance(value, float) else str(value)


def parse_knob(name: str, f: dataclasses.Field, text: str):
    """Value of a knob from its text; UserError names knob, text and what is allowed."""
    kind, meta = type(f.default), f.metadata
    low, high = meta["low"], meta["high"]
    allowed = {choice.lower(): choice for choice in meta["choices"]}
    right = "one of " + ", ".join(meta["choices"])
    if kind is bool:
        allowed, right = {"0": False, "1": True, "false": False, "true": True}, "0 or 1"
    elif kind is str and not allowed:
        if name != "PROMPT" and re.search(r"[\0-\x1f]", text):
            raise UserError(f"{name}={ascii(text[:60])[1:-1]}: must be one line")
        return text
    elif kind is not str:
        right, limit = ("a whole number", 2 ** 63) if kind is int else ("a finite number", math.inf)
        right += f", at least {low}" if high == math.inf else f" between {low} and {high}"
        right += ", below 2^63" if kind is int and high == math.inf else ""
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and abs(value) < limit:
                return value
    if text.lower() not in allowed:
        raise UserError(f"{name}={text}: must be {right}")
    return allowed[text.lower()]


def one_edit_apart(a: str, b: str) -> bool:
    """Whether one insertion, deletion, substitution or swap of neighbours turns a into b."""
    start = len(os.path.commonprefix([a, b]))
    a, b = a[start:], b[start:]
    swapped = a[:2] == b[:2][::-1] and a[2:] == b[2:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or swapped


def check_spelling(environ: dict[str, str], known: Sequence[str]) -> list[str]:
    """An error per misspelled knob in the environment; a warning for names that may be foreign.

    A name that is one edit away from a knob is an error if several knobs begin with its first
    word (JEPA_, MUON_); all others (DEVICES, SEEDS) share one line on stderr."""
    words = [name.split("_")[0] for name in known if "_" in name]
    errors, ignored = [], []
    for name in sorted(set(environ).difference(known)):
        near = [other for other in known if one_edit_apart(name, other)]
        if near and "_" in name and words.count(name.split("_")[0]) > 1:
            errors.append(f"{name}: no such knob; did you mean {near[0]}?")
        elif near and len(name) > (6 if len(name) == len(near[0]) else 4):  # not LINES, NODE
            ignored.append(f"{name} (did you mean {near[0]}?)")
    if ignored and environ.get("RANK", "0") == "0":
        print("warning: ignored in the environment, no such knob:", ", ".join(ignored),
              file=sys.stderr)
    return errors


@dataclass(frozen=True)
class Config:
    """All settings of a run."""
    mode: str = knob("train", "what to do", "free", choices="train describe bench eval sample",
                     group="run")
    run_id: str = knob("", "name of the run's folder (empty: configuration and time)", "free")
    runs_dir: str = knob("runs", "folder of the run folders", "free")
    resume_after_divergence: bool = knob(
        False, "1 = a run that diverged goes on from its last good state with other optimizer knobs",
        "free")
    overwrite: bool = knob(False, "1 = start over in a run folder that exists", "free")
    json: bool = knob(False, "1 = describe, bench and eval print JSON as the last line on a terminal, "
                      "too", "free")
    all: bool = knob(False, "1 = MODE=describe shows every knob, not only those that differ from "
                     "the defaults", "free")
    profile: str = knob("auto", "machine that the run scripts choose defaults for and "
                        "MODE=describe assumes (auto: gpu if CUDA is found)", "free",
                        choices="auto gpu cpu")
    tracker: str = knob("none", "package that gets the metrics, too; installed by hand", "free",
                        choices="none tensorboard wandb trackio")
    seed: int = knob(42, "seed of initial weights, SIGReg directions and positions")
    device: str = knob("auto", "device to compute on (auto: CUDA if it is found)", "free",
                       choices="auto cpu cuda")
    dtype: str = knob("auto", "compute type (auto: bf16 on CUDA, fp32 on CPU)", "eval",
                      choices="auto fp32 bf16")
    collective_timeout: int = knob(600, "seconds after which a missing rank ends the run",
                                   "free", low=1, high=10**7)

    tokenizer: str = knob("byte", "kind of tokens", "model", choices="byte bpe", group="data")
    tokenizer_path: str = knob("", "SentencePiece model (TOKENIZER=bpe)", "free result")
    vocab_size: int = knob(256, "number of token ids", "model size", low=2, high=65536)
    data_path: str = knob("./data/datasets/fineweb10B_bytes",
                          "folder of fineweb_train_*.bin and fineweb_val_*.bin", "free result")
    val_max_tokens: int = knob(500_000, "validation tokens used (0 = all)", "free result eval")
    val_batch_size: int = knob(
        524_288, "validation tokens per batch of MICRO_BATCHES micro-batches: one forward pass "
        "takes VAL_BATCH_SIZE / MICRO_BATCHES", "free eval size", low=1)

    model_dim: int = knob(512, "width D", "model size", low=1, group="model")
    num_layers: int = knob(12, "blocks: the first half encodes, the rest decodes",
                           "model size", low=1, high=256)
    mixer: str = knob("mamba2", "mamba2, attention, or a letter per block: m or a, as in "
                      "mmmmmmammm", "model")
    d_state: int = knob(64, "state size N of the SSM", "model size", low=1)
    d_conv: int = knob(4, "kernel size of the causal convolution", "model size", low=1)
    expand: int = knob(2, "inner width of Mamba-2 / MODEL_DIM", "model size", low=1)
    ssd_chunk: int = knob(0, "chunk length Q of the scan, for speed only (0: 256 for mamba_ssm, "
                          "else 64)", "free result eval", high=1024)
    ssd_kernel: str = knob("auto", "form of the scan (auto: on CUDA the first of fused, mamba_ssm, "
                           "torch that works; torch on CPU)",
                           "free result eval", choices="auto mamba_ssm fused torch")
    kernel_check: str = knob("1", "1 = compare each Triton kernel with PyTorch once per GPU, and "
                             "replace one that deviates; strict = end the run instead", "free",
                             choices="1 0 strict")
    num_heads: int = knob(8, "attention heads", "model", low=1)
    num_kv_heads: int = knob(4, "attention heads of keys and values", "model", low=1)
    rope_base: float = knob(10000.0, "base of the rotary angles", "model", low=1)
    qk_gain_init: float = knob(1.5, "initial gain of the queries, per head", high=1e6)
    embed_dim: int = knob(0, "width E of the embedding (0 = MODEL_DIM)", "model size")
    embed_style: str = knob(
        "projected", "projected: std 0.02, EMBED_LR, untied unembedding by Muon; tied: "
        "TIED_EMBED_INIT_STD, TIED_EMBED_LR; untied: std 1, EMBED_LR, zero unembedding by Adam at "
        "HEAD_LR",
        choices="projected tied")
    tied_embed_init_std: float = knob(0.005, "std of the embedding with EMBED_STYLE=tied")
    mlp_mult: int = knob(3, "hidden width of the MLP / MODEL_DIM (0 = no MLP)", "model size")
    mlp_every: int = knob(1, "an MLP in every n-th block", "model", low=1)
    activation: str = knob("relu2", "activation of the MLP", "model",
                           choices="relu2 swiglu leaky_relu2")
    mlp_norm: bool = knob(True, "RMSNorm over the hidden units of the MLP", "model")
    norm_eps: float = knob(1e-6, "epsilon of the block norms", "model")
    tie_embeddings: int = knob(
        0, "unembedding: 0 separate, 1 tied to the embedding, 2 tied + learned correction, "
        "3 tied through an adapter", "model", high=3)
    vocab_bias: bool = knob(True, "a bias per token in the logits", "model")
    logit_softcap: float = knob(15.0, "cap of the logits (0 = off)", "model")
    softcap_type: str = knob("poly", "form of the cap", "model", choices="poly tanh")
    projector_type: str = knob("linear", "map from h to the latent z (none: z = h)",
                               choices="linear mlp none")
    predictor_hidden_mult: int = knob(2, "hidden width of the predictor / latent width", "size",
                                      low=1)
    predictor_norm: bool = knob(False, "1 = RMSNorm before the predictor, no biases (system B)")

    loss_schedule: str = knob("joint", "joint: constant weights; staged: pure JEPA, bridge, "
                              "pure CE", choices="joint staged", group="losses")
    jepa_weight: float = knob(1.0, "weight of the latent prediction")
    jepa_steps: int = knob(1, "horizons of the latent rollout (0 = off)", "size")
    jepa_dim: int = knob(0, "width of the latent (0 = MODEL_DIM)", "size")
    jepa_anneal: float = knob(
        0.0, "fraction of the run at which JEPA_WEIGHT has fallen to 0 (0 = never)", high=1)
    detach_targets: bool = knob(False, "1 = no gradient into the targets")
    ce_weight: float = knob(1.0, "weight of the cross-entropy")
    z_loss: float = knob(1e-4, "weight of mean logsumexp^2 in training")
    anticollapse: str = knob("sigreg", "term that keeps the latent from collapsing",
                             choices="sigreg covariance")
    sigreg_lambda: float = knob(1.0, "weight of the anti-collapse term (LOSS_SCHEDULE=joint)")
    sigreg_weight: float = knob(0.05, "weight of the anti-collapse term (LOSS_SCHEDULE=staged)")
    sigreg_knots: int = knob(17, "knots of the characteristic function", "size", low=2)
    sigreg_num_proj: int = knob(0, "directions of SIGReg (0 = 2 * embedding width)", "size")
    sigreg_schedule: bool = knob(False, "1 = ramp the weight from 0 over the first 30%")
    sigreg_axis: str = knob("batch", "axis that one characteristic function pools",
                            choices="batch time both")
    jepa_cov: float = knob(0.0, "weight of a variance-covariance term on z beside SIGReg")
    jepa_pure_frac: float = knob(0.10, "end of the pure JEPA stage (staged)", high=1)
    ce_pure_frac: float = knob(0.80, "start of the pure CE stage (staged)", high=1)

    train_seq_len: int = knob(4096, "tokens per sequence", "model size", low=1, group="training")
    train_batch_tokens: int = knob(524_288, "tokens per optimizer step, all ranks", "size", low=1)
    micro_batches: int = knob(8, "micro-batches per step; the number of ranks must divide it",
                              "eval size", low=1)
    iterations: int = knob(10_000, "maximum number of steps", "free result", low=1)
    max_wallclock_seconds: float = knob(
        0.0, "maximum time of training and of all else that reads training data (0 = no limit)",
        "free result")
    reserve_seconds: float = knob(
        0.0, "part of MAX_WALLCLOCK_SECONDS for GPTQ's moments and the temperature search "
        "(0 = measure it in the warm-up)", "free result")
    warmup_steps: int = knob(10, "steps that are run before training and rolled back")
    warmup_rollback: str = knob("weights", "what is rolled back (all: the optimizer's moments too)",
                                choices="weights all")
    warmdown: str = knob("fraction", "LR falls to MIN_LR over WARMDOWN_FRACTION or WARMDOWN_ITERS",
                         choices="fraction iters")
    warmdown_fraction: float = knob(0.15, "length of the warmdown / length of the run", high=1)
    warmdown_iters: int = knob(2000, "steps of the warmdown (under MAX_WALLCLOCK_SECONDS: at the "
                               "mean step time so far)")
    min_lr: float = knob(0.0, "LR at the end / base LR", high=1)
    lanes: bool = knob(
        False, "1 = contiguous batches: each sequence continues its own slice of the data")
    carry_state: bool = knob(False, "1 = LANES, with the recurrent state carried from step to "
                             "step (truncated BPTT)")
    val_loss_every: int = knob(500, "steps between validations (0 = only at the end)", "free")
    train_log_every: int = knob(100, "steps between log lines", "free", low=1)
    compile_mode: str = knob(
        "default", "torch.compile mode; off = eager; aot_eager = traced, without generated code",
        "free result eval", choices="default reduce-overhead max-autotune aot_eager off")
    nonfinite_limit: int = knob(
        10, "stop after this many steps in a row with a non-finite gradient", "free", low=1)

    matrix_lr: float = knob(0.02, "Muon's LR: 2-D weights", "rate", group="optimizers")
    scalar_lr: float = knob(0.01, "AdamW's LR: everything else", "rate")
    embed_lr: float = knob(0.01, "AdamW's LR: the embedding", "rate")
    tied_embed_lr: float = knob(0.05, "AdamW's LR: the embedding with EMBED_STYLE=tied", "rate")
    head_lr: float = knob(0.008, "AdamW's LR: the untied unembedding with EMBED_STYLE=tied", "rate")
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
    swa_start: float = knob(1.0, "progress at which the EMA of weights starts (1 = off)", "rate", high=1)
    swa_decay: float = knob(0.995, "decay of the EMA per step", "rate", high=0.999999)

    storage: str = knob("intn", "intn: QUANT_BITS per matrix weight; int8: system B's format",
                        "grid", choices="intn int8", group="storage")
    quant_bits: int = knob(5, "bits of a matrix weight: 4, 5, 6 (8 with STORAGE=int8)", "grid")
    quant_step: str = knob("absmax", "step of a row: absmax / (2^(bits-1) - 1), or QUANT_K * σ",
                           "grid", choices="absmax sigma")
    quant_k: float = knob(0.35, "step / σ of a row (QUANT_STEP=sigma)", "grid", low=0.01, high=4)
    int8_floor: bool = knob(False, "1 = int8 scales of at least 1/127, as published", "grid")
    fp_storage: str = knob("BF16", "format of embedding and tie correction", "grid",
                           choices="BF16 FP8")
    mlp_grid: str = knob("", "grid of the MLP matrices: int4 to int7, int8a, int4s0.35 (step "
                         "of 0.35 σ), fp8, bf16 (empty: QUANT_BITS and QUANT_STEP)", "grid")
    proj_grid: str = knob("", "grid of all other matrices: projections of mixers and embedding, "
                          "untied unembedding (empty: QUANT_BITS and QUANT_STEP)", "grid")
    dt_grid: str = knob("", "grid of the rows of in_proj that make dt (empty: as in_proj)", "grid")
    embed_grid: str = knob("", "grid of embedding and tie correction (empty: FP_STORAGE)", "grid")
    qat_fraction: float = knob(1.0, "last fraction of the run that trains on the storage grid",
                               high=1)
    rounding: str = knob("nearest", "rounding of the final weights: nearest, or compensated "
                         "(GPTQ)", "free result", choices="nearest compensated")
    rounding_tokens: int = knob(65_536, "training tokens for GPTQ's moments", "free result size",
                               low=1)
    fit: bool = knob(
        False, "1 = MODE=describe finds the largest MODEL_DIM and MLP_MULT that fit", "free")

    sliding_eval: bool = knob(False, "1 = score with sliding windows after training", "free",
                              group="evaluation")
    sliding_eval_stride: int = knob(16, "tokens scored per window", "free result", low=1)
    sliding_batch_size: int = knob(64, "windows per forward pass", "free eval size", low=1)
    temp_scaling: bool = knob(
        True, "1 = score at a temperature fitted to training tokens", "free result")
    temp_calib: float = knob(0.0, "temperature (0 = fit it)", "free result eval")
    eval_state: str = knob("reset", "carry = one pass with the recurrent state carried",
                           "free eval", choices="reset carry")
    attention_overlap: int = knob(
        1024, "tokens before a piece that attention sees (EVAL_STATE=carry)", "free result eval")
    eval_adapt: bool = knob(False, "1 = score a chunk of the text, train on it, go on with the "
                            "next (score-first test-time training)", "free eval")
    adapt_steps: int = knob(1, "SGD steps per chunk", "free result eval", low=1)
    adapt_lr: float = knob(0.002, "LR at the first chunk; cosine to 0 at the end of the text",
                           "free result eval")
    adapt_chunk_tokens: int = knob(32_768, "tokens per chunk, rounded up to whole batches",
                                   "free result eval", low=1)
    adapt_params: str = knob("all", "parameters that learn: all, or some of matrices, embedding, "
                             "scalars, joined by commas", "free result eval")
    adapt_clip: float = knob(1.0, "maximum gradient norm (0 = off)", "free result eval")
    diagnostics: bool = knob(
        True, "1 = statistics of the latent at each validation and after training", "free")
    probe_steps: int = knob(200, "steps of the linear probe on frozen h (0 = none)", "free")

    checkpoint_every: int = knob(0, "steps between checkpoints (0 = off)", "free",
                                 group="checkpoints")
    checkpoint_dir: str = knob("", "folder of checkpoints (empty: in the run's folder)", "free")
    checkpoint_keep: int = knob(2, "number of checkpoints kept", "free", low=1)

    artifact: str = knob("", "artifact of MODE=eval and MODE=sample", "free", group="people")
    prompt: str = knob("", "start of the text (MODE=sample)", "free")
    sample_tokens: int = knob(200, "tokens per sample", "free", low=1)
    num_samples: int = knob(1, "number of samples", "free", low=1, high=1024)
    temperature: float = knob(0.8, "temperature of sampling (0 = most likely token)", "free")
    top_k: int = knob(0, "sample among the k most likely tokens (0 = all)", "free")
    top_p: float = knob(1.0, "sample among the fewest tokens with this probability", "free",
                        low=0.001, high=1)

    sources: dict = field(default_factory=dict, compare=False, repr=False)  # of values; no knob

    @classmethod
    def knobs(cls) -> dict[str, dataclasses.Field]:
        """Field of every knob by its upper-case name, in order."""
        return {f.name.upper(): f for f in dataclasses.fields(cls) if f.name != "sources"}

    @classmethod
    def tagged(cls, tag: str) -> list[str]:
        """Names of the knobs with this tag (see `knob`), in order."""
        return [name for name, f in cls.knobs().items() if tag in f.metadata["tags"]]

    @classmethod
    def from_env(cls, environ: dict[str, str], argv: Sequence[str] = ()) -> Config:
        """Read knobs from NAME=value arguments and the environment; empty means the default.

        UserError with a line for every value that does not fit and every misspelled name."""
        knobs = cls.knobs()
        known = [*knobs, *SCRIPT_KNOBS]
        errors = check_spelling(environ, known)
        # The run scripts export this: their name, then the knobs that they set by default.
        script, *scripted = environ.get("RUN_SCRIPT_DEFAULTS", "").split() or [""]
        published = dict(pair.split("=", 1) for pair in environ.get("RUN_SCRIPT_PUBLISHED", "").split())
        given = {name: (value, script if name in scripted else "environment")
                 for name, value in environ.items() if name in knobs}
        for argument in argv:
            name, equals, value = argument.partition("=")
            if equals and name in knobs:
                given[name] = value, "argument"
                continue
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all knobs"
            if name in SCRIPT_KNOBS:
                hint = "that one is for the run scripts"
            errors.append(f"{argument}: arguments are NAME=value with the name of a knob; {hint}")
        values, sources = {}, {}
        for name, (text, source) in given.items():
            sources[name] = source if text else f"{source} (empty: default)"
            if source == script and name in published:
                replaced = published[name].replace("-", format_knob(knobs[name].default))
                sources[name] = f"{script} (published: {replaced})"
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
        c, faults = self, []

        def forbid(bad: bool, message: str) -> None:
            if bad:
                faults.append(message)

        unit, cap = c.micro_batches * c.train_seq_len, c.max_wallclock_seconds
        forbid(re.search(r"[/\\\0]|^\.", c.run_id) or len(os.fsencode(c.run_id)) > 255,
               f"RUN_ID={c.run_id[:60]}: not a plain folder name of at most 255 bytes")
        forbid(c.tokenizer == "byte" and c.vocab_size != 256,
               f"VOCAB_SIZE={c.vocab_size}: TOKENIZER=byte needs 256")
        forbid(c.train_batch_tokens % unit, f"TRAIN_BATCH_TOKENS={c.train_batch_tokens}: must be "
               f"a multiple of MICRO_BATCHES*TRAIN_SEQ_LEN={unit}")
        forbid(cap and c.reserve_seconds >= cap, f"RESERVE_SECONDS={c.reserve_seconds:g}: must be "
               f"below MAX_WALLCLOCK_SECONDS={cap:g}")
        forbid(c.ce_weight == 0 and not (c.jepa_on and c.joint and c.jepa_anneal == 0),
               "CE_WEIGHT=0 with JEPA off, annealed or staged: no loss is left; raise it")
        forbid(not c.joint and c.jepa_on and c.jepa_pure_frac >= c.ce_pure_frac,
               f"JEPA_PURE_FRAC={c.jepa_pure_frac}: must be below CE_PURE_FRAC={c.ce_pure_frac}")
        forbid(c.jepa_on and c.jepa_steps >= c.train_seq_len,
               f"JEPA_STEPS={c.jepa_steps}: must be below TRAIN_SEQ_LEN={c.train_seq_len}")
        forbid(c.jepa_dim and c.projector_type == "none",
               f"JEPA_DIM={c.jepa_dim}: PROJECTOR_TYPE=none leaves z = h; take linear")
        forbid(c.anticollapse != "sigreg" and c.sigreg_axis != "batch",
               f"SIGREG_AXIS={c.sigreg_axis}: needs ANTICOLLAPSE=sigreg")
        forbid(c.sliding_eval and c.sliding_eval_stride > c.train_seq_len, f"SLIDING_EVAL_STRIDE="
               f"{c.sliding_eval_stride}: at most TRAIN_SEQ_LEN={c.train_seq_len}")
        forbid(c.tracker != "none" and not importlib.util.find_spec(c.tracker), f"TRACKER={c.tracker}: "
               f"not installed; .venv/bin/python -m pip install {c.tracker} brings it")
        for check in CHECKS:
            faults += check(c)
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

    @property
    def overlap(self) -> int | None:
        """ATTENTION_OVERLAP for models with attention, which alone need it."""
        return self.attention_overlap if "a" in self.pattern else None

    @property
    def pattern(self) -> str:
        """Mixer of each block as a letter: m Mamba-2, a attention."""
        letter = {"mamba2": "m", "attention": "a"}.get(self.mixer)
        return letter * self.num_layers if letter else self.mixer

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

    def render(self) -> str:
        """Every knob with its value and source, for logs and ALL=1."""
        return "\n".join(f"{name:<28} {format_knob(value):<34} {self.sources.get(name, 'default')}"
                         for name, value in self.named().items())

    def render_changed(self) -> str:
        """By group, the knobs that differ from the defaults, with these and the source."""
        lines, group = [f"{'knob':<30} {'value':<32} {'default':<12} source"], ""
        for name, f in self.knobs().items():
            value, group = getattr(self, f.name), f.metadata["group"] or group
            if value != f.default:
                if f"{group}:" not in lines:
                    lines.append(f"{group}:")
                lines.append(f"  {name:<28} {format_knob(value):<32} {format_knob(f.default):<12} "
                             f"{self.sources.get(name, '')}")
        return "\n".join(lines) + "\nEverything else has its default; ALL=1 shows all knobs."


def knob_table() -> list[tuple[str, str, str, str]]:
    """(group, knob, default, help) of every knob, for --help and README.md."""
    rows, group = [], ""
    for name, f in Config.knobs().items():
        group, choices = f.metadata["group"] or group, ", ".join(f.metadata["choices"])
        text = f.metadata["help"] + (f" ({choices})" if choices else "")
        rows.append((group, name, format_knob(f.default), text))
    return rows + [("run scripts", name, "", text) for name, text in SCRIPT_KNOBS.items()]


def help_text() -> str:
    """What --help prints."""
    lines, last = ["Every knob is an environment variable or a NAME=value argument "
                   "(arguments win).", ""], ""
    for group, name, default, text in knob_table():
        if group != last:
            lines.append(f"{group}:")
        lines.append(f"  {name}={default} ".ljust(38) + text)
        last = group
    return "\n".join(lines)


# ------------------------------------------------------------------------------
# runtime: this process among its peers: ranks, device, clock and the files of a run
# ------------------------------------------------------------------------------

def now() -> float:
    """Seconds on the training clock; a function so that tests can replace it."""
    return time.perf_counter()


def check_world(config: Config, world: int) -> None:
    """UserError if the ranks cannot share the micro-batches, with settings that work."""
    parts = config.micro_batches
    if parts % world:
        fits = [n for n in range(1, parts + 1) if parts % n == 0]
        raise UserError(f"{world} ranks cannot share MICRO_BATCHES={parts}: start {fits} ranks, or "
                        f"set MICRO_BATCHES={world} (with TRAIN_BATCH_TOKENS a multiple of "
                        f"{world * config.train_seq_len})")


def end_with_parent() -> None:
    """Ask Linux for SIGTERM when torchrun is gone, so that no worker trains on beside the next start."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:  # it was gone before
            os.kill(os.getpid(), signal.SIGTERM)


def keep_freed_memory() -> None:
    """Make glibc reuse large freed blocks; returning them costs a third of a CPU step."""
    with contextlib.suppress(OSError, AttributeError):  # other systems
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD: blocks up to 1 GiB from the heap
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def busy_machine(factor: float = 1.5) -> str:
    """Load average and cores in words if other processes want more than the cores give, else ""."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"load average {load:.1f} on {cores} cores" if load > factor * cores else ""


def machine_memory(cuda: bool) -> float:
    """Bytes of the GPU, or those that this machine or container still has; infinite if unknown."""
    if cuda:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    memory = math.inf
    with contextlib.suppress(OSError):
        if match := re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text()):
            memory = 1024 * int(match[1])
        limit = Path("/sys/fs/cgroup/memory.max").read_text()  # "max": none
        memory = min(memory, int(limit)) if limit.strip().isdigit() else memory
    return memory


def package_version(name: str) -> str | None:
    """Installed version, without importing the package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Processor name as the system gives it."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if match := re.search(r"model name\s*:\s*(.+)", text):
            return match[1]
    return platform.processor() or platform.machine()


class Runtime(contextlib.AbstractContextManager):
    """Rank, device, compute type and collectives; leaving the context ends the process group."""

    def __init__(self, config: Config):
        env = lambda name, default: int(os.environ.get(name, default))
        self.rank, self.world = env("RANK", 0), env("WORLD_SIZE", 1)
        check_world(config, self.world)
        has_cuda = torch.cuda.is_available()
        if config.device == "cuda" and not has_cuda:
            raise UserError("DEVICE=cuda: no CUDA device is found; take DEVICE=cpu or auto")
        self.cuda = has_cuda and config.device != "cpu"
        bf16 = self.cuda if config.dtype == "auto" else config.dtype == "bf16"
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.device = torch.device("cpu")
        if self.cuda:
            self._take_gpu(env("LOCAL_RANK", 0))
        else:
            keep_freed_memory()
        # fp32 products keep all their bits (SIGReg, covariance, GPTQ moments): no TF32 unless a
        # kernel asks for it. The compiler would advise against that.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        self.control = None
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent()
        if self.world > 1:
            self._join(timedelta(seconds=config.collective_timeout))

    def _take_gpu(self, index: int) -> None:
        if index >= torch.cuda.device_count():
            raise UserError(f"rank {index} has no GPU, {torch.cuda.device_count()} are found here; "
                            "start as many ranks as GPUs (NPROC_PER_NODE)")
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if self.dtype == torch.bfloat16 and not has_bf16:
            raise UserError(f"{torch.cuda.get_device_name()} has no bf16; take DTYPE=fp32")

    def _join(self, limit: timedelta) -> None:
        # torchrun keeps one store over restarts, so each attempt gets its own keys in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        dist.init_process_group("nccl" if self.cuda else "gloo", timeout=limit, rank=self.rank,
                                store=dist.PrefixStore(f"attempt_{attempt}", store),
                                world_size=self.world,
                                device_id=self.device if self.cuda else None)
        # Clock and signals travel over gloo, without waiting for the GPU's queue.
        self.control = dist.new_group(backend="gloo", timeout=limit)

    main = property(lambda self: self.rank == 0)

    def __exit__(self, kind, error, trace) -> None:
        # After an error the peers may never answer, and destroying the group waits for them.
        if self.world > 1 and dist.is_initialized() and kind is None:
            dist.destroy_process_group()

    def agree(self, *values: float) -> list[float]:
        """Elementwise maximum over ranks of host numbers; a rank without a value passes -inf."""
        if self.world == 1:
            return list(values)
        box = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return box.tolist()

    def sum_host(self, tensor: Tensor) -> Tensor:
        """Sum of a CPU tensor over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.control)
        return tensor

    def sum_(self, tensor: Tensor, wait: bool = True):
        """Sum over ranks, in place; wait=False returns the pending work (None on one rank)."""
        return None if self.world == 1 else dist.all_reduce(tensor, async_op=not wait)

    def gather(self, part: Tensor) -> tuple[Tensor, Any]:
        """All ranks' (n, ...) as (W*n, ...) and the pending work (None on one rank)."""
        if self.world == 1:
            return part, None
        whole = part.new_empty(self.world * len(part), *part.shape[1:])
        return whole, dist.all_gather_into_tensor(whole, part.contiguous(), async_op=True)

    def collect(self, value) -> list:
        """Every rank's picklable value, in rank order (never one from a file)."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value):
        """Rank 0's picklable value on every rank (never one from a file)."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, group=self.control)
        return box[0]

    def main_first(self, work: Callable[[], Any]):
        """Run `work` on rank 0 for all; its value, or its UserError, reaches every rank."""
        outcome = None
        if self.main:
            try:
                outcome = work(), None
            except UserError as fault:
                outcome = None, str(fault)
        value, error = self.from_main(outcome)
        if error is not None:
            raise UserError(error)
        return value

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
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def describe(self) -> dict[str, Any]:
        """Machine and versions, for the log's head and result.json."""
        facts = dict(device=torch.cuda.get_device_name() if self.cuda else cpu_name(),
                     device_type=self.device.type, dtype=str(self.dtype).removeprefix("torch."),
                     world_size=self.world, cores=os.cpu_count(), threads=torch.get_num_threads(),
                     python=platform.python_version(), torch=torch.__version__)
        if self.cuda:
            facts |= dict(cuda=torch.version.cuda, triton=package_version("triton"),
                          mamba_ssm=package_version("mamba_ssm"))
        return facts


class Heartbeat:
    """After every ten seconds without output, a line on stderr that says what is being done."""

    def __init__(self, every: float = 10):
        self.every, self.doing, self.spoke, self.thread = every, "", 0.0, None

    def start(self) -> None:
        """Begin to watch; once per process."""
        self.spoke = time.monotonic()
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()

    def _watch(self) -> None:
        while True:
            time.sleep(self.every / 20)
            if self.doing and time.monotonic() - self.spoke >= self.every:
                with contextlib.suppress(OSError, ValueError):  # stderr is closed
                    print(f"[{datetime.now():%H:%M:%S}] {self.doing}", file=sys.stderr, flush=True)
                self.spoke = time.monotonic()

    def follow(self, items, label: str) -> Iterator:
        """The items; their number is what is being done."""
        for index, item in enumerate(items):
            self.doing = f"{label} {index}/{len(items)}"
            yield item
        self.doing = ""


HEARTBEAT = Heartbeat()


def progress_bar(items, label: str, show: bool = True):
    """tqdm on a terminal; elsewhere the heartbeat tells how many items are done."""
    if not show:
        return items
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm
            HEARTBEAT.doing = ""  # it would tear the bar
            columns = shutil.get_terminal_size().columns  # 80 where tqdm would see a width of 0
            return tqdm(items, desc=label, leave=False, ncols=columns)
    return HEARTBEAT.follow(items, label)


@functools.cache
def source_text() -> str:
    """This file as it was at the first call: it may be edited during a run. The self-extracting
    script of a submission keeps it in SOURCE."""
    return globals().get("SOURCE") or Path(__file__).read_text(encoding="utf-8")


SHIPPED_NAME = "train_gpt.py"  # what the challenge calls the script


@functools.cache
def shipped_script(source: str) -> bytes:
    """The script as a submission ships it, and as its bytes count: a Python file that unpacks `source`
    in memory and runs it as its own text. bz2 packs it 4% smaller than lzma; base85 survives editors."""
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that takes the place of `path` when the block ends: all or nothing.

    It is written under a temporary name, synced and renamed; UserError if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); earlier files "
                        "are intact") from error
    finally:
        with contextlib.suppress(OSError):  # left over only after an error
            temporary.unlink()


def say(line: str) -> None:
    """Print a line at once. A console on a full disk must not end a run; a closed pipe ends it."""
    HEARTBEAT.spoke = time.monotonic()
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, or leave it as it was."""
    with replacing(path) as file:
        file.write(data)


def file_hash(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def open_tracker(c: Config, path: Path) -> Callable[[dict[str, float], int], Any] | None:
    """TRACKER: takes values and step to a tracker of experiments, under the name of the run."""
    if c.tracker == "none":
        return None
    if c.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(str(path), flush_secs=10)
        return lambda values, step: [writer.add_scalar(*item, step) for item in values.items()]
    package = importlib.import_module(c.tracker)
    again = dict(id=path.name) if c.tracker == "wandb" else {}  # a resumed run goes on in its curves
    package.init(project="train_jepa", name=path.name, config=c.named(), resume="allow", **again)
    atexit.register(package.finish)
    return lambda values, step: package.log(values, step=step)


class RunFolder:
    """runs/<RUN_ID>/: log.txt, metrics.jsonl, config.json, result.json; written by rank 0 only."""

    def __init__(self, path: Path, main: bool, resume_bytes: dict[str, int] | None = None):
        """Open both journals; a resumed run cuts them to their lengths in the checkpoint."""
        self.path, self.main, self.files, self.track = path, main, {}, None
        if not main:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in ("log.txt", "metrics.jsonl"):
                self.files[name] = open(path / name, "a", encoding="utf-8")
                if name in (resume_bytes or {}):
                    size = (path / name).stat().st_size
                    os.truncate(path / name, min(resume_bytes[name], size))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); mend its rights, "
                            "or take another RUN_ID") from error

    def _append(self, name: str, text: str) -> None:
        try:
            self.files[name].write(text + "\n")
            self.files[name].flush()
        except OSError as error:
            path = self.path / name
            raise UserError(f"{path}: cannot be written ({error.strerror}); make room") from error

    def log(self, line: str, console: bool = True) -> None:
        """One short greppable line to log.txt and the console."""
        if self.main:
            self._append("log.txt", line)
            if console:
                say(line)

    def metric(self, **values) -> None:
        """One line of metrics.jsonl; its numbers to the tracker, if there is one."""
        if self.main:
            self._append("metrics.jsonl", json.dumps(values, allow_nan=True))
        if self.track:
            self.track({f"{values['kind']}/{name}": value for name, value in values.items()
                        if isinstance(value, (int, float)) and name != "step"}, values["step"])

    def sizes(self) -> dict[str, int]:
        """Lengths of the journals in bytes, for the checkpoint."""
        try:
            return {name: (self.path / name).stat().st_size for name in self.files}
        except OSError as error:
            raise UserError(f"{self.path}: the run's folder is gone ({error.strerror})") from error

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


def shard_remedy(path: Path) -> str:
    """The command that makes the shard anew."""
    return f"bash setup_jepa.sh {'demo' if 'demo' in path.parent.name else 'fineweb'} makes it anew"


def shard_length(path: Path) -> int:
    """Number of tokens of a shard; UserError unless magic, version and size fit."""
    remedy = shard_remedy(path)
    try:
        size, regular = os.path.getsize(path), path.is_file()
        header = np.fromfile(path, dtype="<i4", count=256) if regular else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(header) < 256 or header[0] != SHARD_MAGIC:
        raise UserError(f"{path}: not a token shard (no magic {SHARD_MAGIC}); {remedy}")
    version, count = int(header[1]), int(header[2])
    if version != SHARD_VERSION:
        raise UserError(f"{path}: shard version {version}, not {SHARD_VERSION}; {remedy}")
    if count < 0 or size != SHARD_HEADER + 2 * count:
        raise UserError(f"{path}: {size} bytes, but its header promises {count} tokens "
                        f"({SHARD_HEADER + 2 * count} bytes); {remedy}")
    return count


def read_shard(path: Path, start: int, count: int) -> np.ndarray:
    """`count` tokens from `start`. Not a memory map: if the file shrinks, that kills the process."""
    try:
        tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER + 2 * start)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(tokens) < count:
        raise UserError(f"{path}: became shorter while in use; {shard_remedy(path)}")
    return tokens


def find_shards(data_path: str, part: str) -> list[Path]:
    """The shards `fineweb_<part>_*.bin` of a folder, in order; UserError if there are none."""
    paths = sorted(Path(data_path).glob(f"fineweb_{part}_*.bin"))
    if not paths:
        others = sorted({str(path.parent) for path in
                         Path(data_path).parent.glob(f"*/fineweb_{part}_*.bin")})
        raise UserError(f"DATA_PATH={data_path}: holds no fineweb_{part}_*.bin; " + (
            f"{', '.join(others[:3])} would do" if others else "bash run_jepa_byte.sh makes its shards "
            "itself; bash setup_jepa.sh demo makes data/datasets/demo_bytes"))
    return paths


class TokenStream:
    """The tokens of many shards as one stream, readable at any position; it wraps around."""

    def __init__(self, paths: Sequence[Path], vocab_size: int):
        self.paths, self.vocab_size = list(paths), vocab_size
        self.lengths = [shard_length(path) for path in self.paths]
        self.ends = np.cumsum(self.lengths)
        if len(self) == 0:
            raise UserError(f"{self.paths[0].parent}: no tokens in these shards")
        for index, length in enumerate(self.lengths):  # small shards wholly, the head of large ones
            self._read(index, 0, min(length, 4_000_000))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _read(self, index: int, start: int, count: int) -> np.ndarray:
        """Tokens of one shard; UserError if an id is not in the vocabulary."""
        tokens = read_shard(self.paths[index], start, count)
        largest = int(tokens.max(initial=0))
        if largest >= self.vocab_size:
            raise UserError(f"{self.paths[index]}: token id {largest}, but VOCAB_SIZE="
                            f"{self.vocab_size}; these shards were made with another tokenizer")
        return tokens

    def read(self, position: int, count: int) -> np.ndarray:
        """`count` tokens from `position` (modulo the length) as int64 (count,)."""
        pieces = []
        while count > 0:
            position %= len(self)
            index = int(np.searchsorted(self.ends, position, side="right"))
            left = int(self.ends[index]) - position  # in this shard
            piece = self._read(index, self.lengths[index] - left, min(left, count))
            pieces.append(piece.astype(np.int64))
            position, count = position + len(piece), count - len(piece)
        return np.concatenate(pieces)


class Batches:
    """Micro-batches by position and index alone: the same for any number of ranks.

    Each takes its tokens + 1 values of the stream: x is all but the last, y all but the first,
    cut into sequences. With `lanes` (LANES, CARRY_STATE) the stream is cut into one lane per
    sequence of the whole batch, and each step reads the next `seq_len` tokens of every lane."""

    def __init__(self, stream: TokenStream, micro_batches: int, sequences: int, seq_len: int,
                 lanes: bool = False):
        self.stream, self.micro_batches, self.sequences = stream, micro_batches, sequences
        self.seq_len, self.lanes = seq_len, lanes

    def span(self) -> int:
        """Positions until the run reads the same tokens again: the stream, or one lane."""
        return len(self.stream) // (self.micro_batches * self.sequences if self.lanes else 1)

    def values_per_step(self) -> int:
        """How far one step advances the position."""
        if self.lanes:
            return self.seq_len
        return self.micro_batches * (self.sequences * self.seq_len + 1)

    def __call__(self, position: int, micro: int) -> tuple[Tensor, Tensor]:
        """x and y, (sequences, seq_len) int64 each, of one micro-batch of the step there."""
        n, length = self.sequences, self.seq_len
        if self.lanes:
            lane = self.span()
            starts = [(micro * n + i) * lane + position for i in range(n)]
            values = np.stack([self.stream.read(start, length + 1) for start in starts])
            return torch.from_numpy(values[:, :-1].copy()), torch.from_numpy(values[:, 1:].copy())
        count = n * length + 1
        values = torch.from_numpy(self.stream.read(position + micro * count, count))
        return values[:-1].view(n, length), values[1:].view(n, length)


@dataclass(frozen=True)
class Vocabulary:
    """How many bytes of UTF-8 text each token stands for.

    Control, unknown and unused pieces count 0 and are boundaries; byte pieces count 1; other
    pieces count their UTF-8 length without a leading "\u2581" (the space mark), which counts 1
    unless the previous token is a boundary. The counts of a document thus add up to the UTF-8
    length of its text as the tokenizer normalizes it."""
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
            packed_codes, bos_id = base64.b64decode(packed["codes"]), int(packed["bos_id"])
            source = str(packed.get("source", ""))  # artifacts of v0.1 have none
            data = zlib.decompressobj().decompress(packed_codes, 2 * vocab_size + 1)
            codes = torch.from_numpy(np.frombuffer(data, dtype="<u2").astype(np.int64))
        except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
            raise UserError(f"the artifact's vocabulary is damaged ({ascii(error)[:60]})") from None
        if len(codes) != vocab_size or not 0 <= bos_id < vocab_size:
            raise UserError(f"the artifact's vocabulary has {len(codes)} tokens, not {vocab_size}")
        return cls(codes >> 2, (codes & 2) > 0, (codes & 1) > 0, bos_id, source)


def byte_vocabulary() -> Vocabulary:
    """256 byte values of one byte each, except BYTE_BOS: 0 bytes."""
    base = torch.ones(256, dtype=torch.int64)
    base[BYTE_BOS] = 0
    return Vocabulary(base, torch.zeros(256, dtype=torch.bool), base == 0, BYTE_BOS, BYTES)


def load_sentencepiece(path: str):
    """The SentencePiece model at TOKENIZER_PATH; UserError if it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"TOKENIZER_PATH={path}: BPE tokens need a SentencePiece model there; bash "
                        "run_jepa_bpe.sh with the same arguments names the right one")
    try:
        import sentencepiece
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except ImportError:
        raise UserError("TOKENIZER=bpe: the package sentencepiece is missing; bash setup_jepa.sh env "
                        "installs it into .venv") from None
    except Exception as error:  # RuntimeError, OSError or TypeError for a damaged file
        reason = str(error).splitlines()[0]
        raise UserError(f"TOKENIZER_PATH={path}: not a SentencePiece model ({reason})") from None


def bpe_vocabulary(path: str, vocab_size: int) -> Vocabulary:
    """Byte counts of a SentencePiece model's pieces."""
    model, rows = load_sentencepiece(path), []
    size, mark = model.vocab_size(), "\u2581"
    if size != vocab_size:
        raise UserError(f"TOKENIZER_PATH={path}: has {size} pieces, but VOCAB_SIZE={vocab_size}")
    for token in range(size):
        try:
            piece = model.id_to_piece(token)
        except UnicodeDecodeError:
            raise UserError(f"TOKENIZER_PATH={path}: piece {token} is no UTF-8; fetch the file "
                            "again with setup_jepa.sh") from None
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            rows.append((0, False, True))
        elif model.is_byte(token):
            rows.append((1, False, False))
        else:
            length = len(piece.removeprefix(mark).encode())
            rows.append((length, piece.startswith(mark), False))
    base, space, boundary = (torch.tensor(column) for column in zip(*rows))
    bos_id = model.bos_id() if model.bos_id() >= 0 else 1
    return Vocabulary(base, space, boundary, bos_id, file_hash(path))


def load_vocabulary(config: Config) -> Vocabulary:
    """The vocabulary of TOKENIZER."""
    if config.tokenizer == "byte":
        return byte_vocabulary()
    return bpe_vocabulary(config.tokenizer_path, config.vocab_size)


def shards_source(data_path: str) -> str | None:
    """What made the shards of a folder (Vocabulary.source), as set-up wrote into its source.json;
    None where nothing says it."""
    path = Path(data_path) / "source.json"
    try:
        facts = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        reason = ascii(str(error))[1:61]
        raise UserError(f"{path}: cannot be read ({reason}); run setup_jepa.sh") from None
    source = facts.get("tokenizer") if isinstance(facts, dict) else None
    return source if isinstance(source, str) else None


def check_source(config: Config, vocabulary: Vocabulary) -> None:
    """UserError if the shards were made with another tokenizer: their ids would mean other text."""
    source = shards_source(config.data_path)
    if source and vocabulary.source and source != vocabulary.source:
        name = lambda text: text if text == BYTES else f"tokenizer {ascii(text)[1:9]}..."
        raise UserError(f"DATA_PATH={config.data_path}: its source.json says that the shards hold "
                        f"{name(source)}, but the model reads {name(vocabulary.source)}")


def load_validation(config: Config) -> Tensor:
    """Validation tokens (n * TRAIN_SEQ_LEN + 1,) int64: whole sequences, VAL_MAX_TOKENS at most."""
    stream = TokenStream(find_shards(config.data_path, "val"), config.vocab_size)
    length, limit = config.train_seq_len, config.val_max_tokens or len(stream)
    count = min(len(stream) - 1, limit) // length * length
    if count <= 0:
        raise UserError(f"DATA_PATH={config.data_path}: {len(stream)} validation tokens do not "
                        f"fill one sequence of TRAIN_SEQ_LEN={length}; "
                        f"VAL_MAX_TOKENS={config.val_max_tokens}")
    return torch.from_numpy(stream.read(0, count + 1))


# ------------------------------------------------------------------------------
# SSD: the selective state-space scan of Mamba-2 and its convolution, in PyTorch
# ------------------------------------------------------------------------------
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


def causal_conv_silu(u: Tensor, weight: Tensor, bias: Tensor, *,
                     initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """SiLU of the depthwise causal convolution of u (B,T,C) by weight (C,1,K), plus bias (C,).
    initial: the K-1 inputs before the first, else zeros. Returns (B,T,C), the last K-1 inputs."""
    size, length = weight.size(-1), u.size(1)
    padded, out = F.pad(u, (0, 0, size - 1, 0)), bias.to(u.dtype)
    if initial is not None:
        padded = torch.cat((initial.to(u.dtype), u), dim=1)
    for k in range(size):
        out = out + padded[:, k:k + length] * weight[:, 0, k].to(u.dtype)
    return F.silu(out), padded[:, length:].clone()  # a view would keep all inputs in memory


def mamba_mix(wide: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor,
              D: Tensor, norm_weight: Tensor, *, chunk: int = 64, state: tuple | None = None,
              ssd: Callable = ssd_chunked) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What lies between Mamba-2's projections: convolution, scan, gate, RMSNorm with gain.
    wide (B,T,W): z, x, B, C, dt, perhaps padding. state: the convolution's last K-1 inputs
    (B,K-1,C), the scan's state (B,H,P,N); None: zeros. Returns (B,T,H*P), and the new state."""
    sizes = inner, channels, heads = len(norm_weight), len(conv_bias), len(A)
    z, xBC, dt, _ = wide.split((*sizes, wide.size(-1) - sum(sizes)), dim=-1)
    conv_state, ssm_state = state or (None, None)
    xBC, conv_state = causal_conv_silu(xBC, conv_weight, conv_bias, initial=conv_state)
    x, B, C = xBC.split((inner, (channels - inner) // 2, (channels - inner) // 2), dim=-1)
    y, ssm_state = ssd(x.unflatten(-1, (heads, -1)), F.softplus(dt.float() + dt_bias), A, B, C, D,
                       chunk=chunk, initial_state=ssm_state)
    gated = y.flatten(2).float() * F.silu(z.float())
    return F.rms_norm(gated, (inner,), norm_weight, GATE_EPS).to(y.dtype), (conv_state, ssm_state)


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
def ssd_scan(x, v, raw, bias, A, D, first, y, states, last, T, W: tl.constexpr, H: tl.constexpr,
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
    rate, shift = tl.load(A + h) * 1.4426950408889634, tl.load(bias + h)  # log2(e): decays by exp2
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
def ssd_bwd_bc(v, dy, raw, bias, A, states, dstates, draw, dv, part, T, W: tl.constexpr,
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
        rate = tl.load(A + h)
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
        tl.store(part + h, tl.sum(step * da, 0))
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


def _mix_outputs(wide, conv_weight, conv_bias, dt_bias, A, D, gain, conv_state, ssm_state,
                 chunk, save):
    """Result, final state; for the backward pass v, the scan's output, states at chunk starts."""
    (b, T, _), inner, channels, H = wide.shape, len(gain), len(conv_bias), len(A)
    P, N, new = inner // H, (channels - inner) // 2, wide.new_empty
    states = new((b, H, (T + chunk - 1) // chunk, N, P) if save else 0)
    final = new(b, H, P, N, dtype=torch.float32)
    return new(b, T, inner), final, new(b, T, channels), new(b, T, inner), states


def _mix_options(wide, conv_weight, A, gain, chunk):
    """Grid of the convolution, and what the launches of both passes share: its arguments, those of
    the scan and those of the gate."""
    (b, T, W), inner, channels, H = wide.shape, len(gain), len(conv_weight), len(A)
    grid = triton.cdiv(channels, 128), triton.cdiv(T, 64), b
    conv = dict(T=T, C=channels, W=W, K=conv_weight.size(-1), S=64, BC=128, num_warps=2)
    scan = dict(T=T, W=W, H=H, P=inner // H, N=(channels - inner) // 2, Q=chunk)
    gate = dict(rows=b * T, W=W, n=inner, eps=GATE_EPS, BLOCK=triton.next_power_of_2(inner))
    return grid, conv, scan, gate | dict(num_warps=4)


def _launch_mix(out, final, v, y, states, *inputs):
    *inputs, chunk, save = inputs
    wide, conv_weight, conv_bias, dt_bias, A, D, gain, conv_state, ssm_state = contiguous(*inputs)
    grid, conv, scan, gate = _mix_options(wide, conv_weight, A, gain, chunk)
    xBC, raw = wide[..., len(gain):], wide[..., len(gain) + len(conv_bias):]
    conv_fwd[grid](xBC, conv_weight, conv_bias, conv_state, v, **conv)
    ssd_scan[len(A), len(wide)](
        v, v, raw, dt_bias, A, D, ssm_state, y, states if save else None, final, **scan,
        BACK=False, num_warps=4, num_stages=3)
    gate_norm[(triton.cdiv(gate["rows"], 8),)](y, wide, gain, out, **gate, R=8)


def _launch_mix_backward(dwide, dconv_weight, dconv_bias, ddt_bias, dA, dD, dgain, dconv_state,
                         dssm_state, dout, dfinal, *inputs):
    *inputs, v, y, states, chunk, _ = inputs
    dout = torch.zeros_like(y) if dout is None else dout
    (dout, dfinal, wide, conv_weight, conv_bias, dt_bias, A, D, gain, conv_state,
     ssm_state) = contiguous(dout, dfinal, *inputs)
    grid, conv, scan, gate = _mix_options(wide, conv_weight, A, gain, chunk)
    xBC, raw = wide[..., len(gain):], wide[..., len(gain) + len(conv_bias):]
    dxBC, draw = dwide[..., len(gain):], dwide[..., len(gain) + len(conv_bias):]
    dy, dv, dstates = map(torch.empty_like, (y, v, states))
    chunks, new = states.size(2), functools.partial(wide.new_empty, dtype=torch.float32)
    part = new(triton.cdiv(gate["rows"], 64), len(gain))
    gate_norm_bwd[(len(part),)](y, wide, gain, dout, dy, dwide, part, **gate, R=64)
    torch.sum(part, 0, out=dgain)
    ssd_scan[len(A), len(wide)](
        dy, v, raw, dt_bias, A, D, dfinal, dv, dstates, dssm_state if dssm_state.numel() else None,
        **scan, BACK=True, num_warps=4, num_stages=3)
    part = new(len(wide), chunks, 3, len(A))
    ssd_bwd_bc[chunks, len(wide)](v, dy, raw, dt_bias, A, states, dstates, draw, dv, part, **scan,
                                  num_warps=8, num_stages=2)
    draw[..., len(A):].zero_()  # padding
    taps = new(len(wide) * grid[1], conv["K"] + 1, len(conv_bias))
    conv_bwd[grid](xBC, conv_weight, conv_bias, conv_state, dv, dxBC, dconv_state, taps, **conv)
    taps = taps.sum(0)
    sums = *part.sum((0, 1)), taps[:-1].T.unsqueeze(1), taps[-1]
    for gradient, total in zip((dA, dD, ddt_bias, dconv_weight, dconv_bias), sums):
        gradient.copy_(total)


_mix = custom_op(
    "mamba_mix", "Tensor wide, Tensor conv_weight, Tensor conv_bias, Tensor dt_bias, Tensor A, "
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
    return out, (tail.clone(), final)  # a view would keep all of wide in memory


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


FORMS = {  # in order of preference; mamba-ssm writes fp32 states: 2.5 GB a layer, 3.5 at chunk 64
    "fused": Kernels("fused", mamba_mix_triton),
    "mamba_ssm": Kernels("mamba_ssm", functools.partial(mamba_mix, ssd=ssd_mamba_ssm), 256),
    "torch": Kernels()}


# -- self-check and choice -----------------------------------------------------
# A user's GPU may be the first that runs a kernel: it meets its PyTorch twin there, on small odd
# sizes, forward and backward.
CHECK_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # largest difference / largest entry
COSTS = {"head": "about +10 ms", "mixer": "about +17 ms by mamba-ssm, +32 ms by PyTorch",
         "snap": "about +2 ms"}  # modelled


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

    def mix(form, wide, *rest):
        out, state = form(wide, *rest[:6], chunk=chunk, state=rest[6:])
        return out, *state

    table = {"head": (head, head_twin, [*make(dtype, (37, 32), (V, 32)), *make(f32, V)])}
    if "m" in c.pattern and c.ssd_kernel in ("auto", "fused") and not obstacle("fused", c, device):
        inner, channels = H * P, H * P + 2 * N
        wide, tail = make(dtype, (2, T, inner + channels + H + 5), (2, c.d_conv - 1, channels))
        weight, *rest = make(f32, (channels, 1, c.d_conv), channels, H, H, H, inner, (2, H, P, N))
        bias, dt_bias, A, D, gain, state = rest
        inputs = [wide, weight * 0.5, bias, dt_bias - 2, -A.abs() - 0.1, D, gain, tail, state]
        forms = (functools.partial(mix, form) for form in (mamba_mix_triton, mamba_mix))
        table["mixer"] = *forms, inputs
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
    return FORMS[form], "\n".join(notes)


# ------------------------------------------------------------------------------
# blocks: norm, linear layer, mixers, MLP, residual block
# ------------------------------------------------------------------------------

# Each module names the roles of its parameters; a role decides the optimizer and the storage.
MATRIX, MLP_MATRIX, IN_PROJ = "matrix", "MLP matrix", "in_proj"
MATRICES = MATRIX, MLP_MATRIX, IN_PROJ  # trained by Muon; stored as INT rows, on three grids
EMBEDDING, HEAD, CORRECTION = "embedding", "head", "correction"
SCALAR, STATE = "scalar", "state"       # STATE: of a recurrence, without weight decay
CONTROL = "control"                     # scales, mixes and gains, which system B stores in fp32

FP32_EPS = torch.finfo(torch.float32).eps
State = tuple[Tensor, ...]  # what a mixer carries from one call to the next, batch first


def named_roles(module: nn.Module, prefix: str = "") -> list[tuple[str, str, nn.Parameter]]:
    """(name, role, parameter) of every parameter; KeyError for one whose module names no role."""
    return [(f"{prefix}{path}.{name}" if path else prefix + name, part.roles[name], parameter)
            for path, part in module.named_modules()
            for name, parameter in part.named_parameters(recurse=False)]


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x / sqrt(mean x^2 + eps), over the last dimension (https://arxiv.org/abs/1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), weight, eps)


class Linear(nn.Module):
    """y = x W^T (+ b) with W (out, in) and torch's Linear init; W is cast to x's type at use."""

    def __init__(self, inputs: int, outputs: int, bias=False, zero=False, role=MATRIX):
        super().__init__()
        self.roles = {"weight": role, "bias": SCALAR}
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        if not zero:
            bound = inputs ** -0.5
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, padded: bool = False) -> Tensor:
        """padded: on CUDA the outputs may be followed by zeros up to a multiple of 8."""
        weight = self.weight.to(x.dtype)
        if self.bias is not None:
            return F.linear(x, weight, self.bias.to(x.dtype))
        outputs = weight.size(0)
        if x.is_cuda and outputs % 8:  # the GPU's wide loads need aligned rows
            y = F.linear(x, F.pad(weight, (0, 0, 0, -outputs % 8)))
            return y if padded else y[..., :outputs]
        return F.linear(x, weight)


class Mamba2(nn.Module):
    """Mamba-2 (Dao & Gu 2024, https://arxiv.org/abs/2405.21060), weight-compatible with
    mamba_ssm.modules.mamba2.Mamba2(headdim=64, ngroups=1). Its state: the convolution's last K-1
    inputs (B,K-1,C) and the SSM state (B,H,P,N), in fp32."""
    roles = {"dt_bias": STATE, "A_log": STATE, "D": STATE}

    def __init__(self, dim: int, d_state: int, d_conv: int, expand: int, kernels: Kernels,
                 chunk: int):
        super().__init__()
        inner = self.d_inner = expand * dim
        self.d_state, self.heads = d_state, inner // HEADDIM
        self.kernels, self.chunk = kernels, chunk
        channels = inner + 2 * d_state  # x, B, C; in_proj's rows are z, x, B, C, dt
        self.in_proj = Linear(dim, inner + channels + self.heads, role=IN_PROJ)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels)
        self.conv1d.roles = {"weight": SCALAR, "bias": SCALAR}
        log_dt = torch.empty(self.heads).uniform_(math.log(0.001), math.log(0.1))
        dt = log_dt.exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(inner)
        self.norm.roles = {"weight": SCALAR}
        self.out_proj = Linear(inner, dim)

    @classmethod
    def from_config(cls, c: Config, kernels: Kernels) -> Mamba2:
        return cls(c.model_dim, c.d_state, c.d_conv, c.expand, kernels,
                   c.ssd_chunk or kernels.chunk)

    @staticmethod
    def flops(c: Config) -> float:
        """Multiply-adds per token beyond those of the parameters: state, and within a chunk."""
        return c.d_inner * (2 * c.d_state + 1.5 * (c.ssd_chunk or 64) / 2)

    def empty_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        """The state before the first position: zeros."""
        channels, _, kernel_size = self.conv1d.weight.shape
        return (torch.zeros(batch, kernel_size - 1, channels, dtype=dtype, device=device),
                torch.zeros(batch, self.heads, HEADDIM, self.d_state, device=device))

    def _mix(self, mix: Callable, u: Tensor, state: State | None) -> tuple[Tensor, State]:
        out, state = mix(
            self.in_proj(u, padded=True), self.conv1d.weight, self.conv1d.bias, self.dt_bias,
            -self.A_log.exp(), self.D, self.norm.weight, chunk=self.chunk, state=state)
        return self.out_proj(out), state

    def forward(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """u (B,T,D) and the state before it (None: zeros) -> (B,T,D) and the state after it."""
        return self._mix(self.kernels.mix, u, state)

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """One position, u (B,1,D), by the recurrence itself, for generation."""
        return self._mix(functools.partial(mamba_mix, ssd=ssd_position), u, state)

    def trim(self, state: State, overlap: int) -> State:
        """The state as it is: its size is fixed."""
        return state


class Attention(nn.Module):
    """Causal attention: grouped queries (https://arxiv.org/abs/2305.13245), RMS-normalized q
    and k, rotary positions, a learned gain per query head. Its state: the keys, before their
    rotation, and values so far, each (B,kv_heads,S,width)."""
    roles = {"q_gain": CONTROL}

    def __init__(self, dim: int, heads: int, kv_heads: int, base: float, gain: float, eps: float,
                 positions: int = 0):
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, dim // heads
        self.base, self.eps = base, eps
        table = self.cos_sin(0, positions, torch.device("cpu"))
        self.register_buffer("table", table, persistent=False)  # for the first `positions`
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, kv_heads * self.width)
        self.v_proj = Linear(dim, kv_heads * self.width)
        self.out_proj = Linear(dim, dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((heads,), gain))

    @classmethod
    def from_config(cls, c: Config, kernels: Kernels) -> Attention:
        heads = c.num_heads, c.num_kv_heads
        positions = min(c.train_seq_len, 1 << 16)
        return cls(c.model_dim, *heads, c.rope_base, c.qk_gain_init, c.norm_eps, positions)

    @staticmethod
    def flops(c: Config) -> float:
        """Multiply-adds per token beyond those of the parameters: q k and the sum of v, causal."""
        return c.model_dim * c.train_seq_len

    def empty_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """None: keys and values have no fixed size."""

    def cos_sin(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Cosines and sines (2,T,width/2) of the rotary angles at positions start <= t < stop. They
        are fp32: bf16 cannot tell positions above 256 apart."""
        half, fp32 = self.width // 2, dict(device=device, dtype=torch.float32)
        frequency = self.base ** (-torch.arange(half, **fp32) / half)
        angle = torch.outer(torch.arange(start, stop, **fp32), frequency)
        return torch.stack((angle.cos(), angle.sin()))

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotary embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), half split, of x
        (B,heads,T,width) at positions start, start+1, ..."""
        stop = start + x.size(2)
        known = stop <= self.table.size(1)
        cos, sin = self.table[:, start:stop] if known else self.cos_sin(start, stop, x.device)
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)

    def forward(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """u (B,T,D), keys and values before it -> (B,T,D), keys and values with its own."""
        q, k, v = [project(u).unflatten(-1, (-1, self.width)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, mask, start = rms_norm(q, self.eps), rms_norm(k, self.eps), None, 0
        if state is not None:
            start = state[0].size(2)
            k, v = torch.cat((state[0], k), dim=2), torch.cat((state[1], v), dim=2)
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=u.device).tril(start)
        q = self.rotate(q, start) * self.q_gain.to(u.dtype).view(-1, 1, 1)
        y = F.scaled_dot_product_attention(q, self.rotate(k, 0), v, attn_mask=mask,
                                           is_causal=mask is None,
                                           enable_gqa=self.kv_heads != self.heads)
        return self.out_proj(y.transpose(1, 2).flatten(2)), (k, v)

    step = forward

    def trim(self, state: State, overlap: int) -> State:
        """The last `overlap` keys and values; positions then count from the first of them."""
        return tuple(part[:, :, max(0, part.size(2) - overlap):] for part in state)


MIXERS = {"m": Mamba2, "a": Attention}  # by letter; a new mixer defines the same methods


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x = (gate, up) (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# By ACTIVATION: the function, and how many inputs make one output.
# relu2: So et al. 2021, https://arxiv.org/abs/2109.08668
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "relu2": (lambda x: F.relu(x).square(), 1),
    "leaky_relu2": (lambda x: F.leaky_relu(x, 0.5).square(), 1),
    "swiglu": (swiglu, 2)}


class MLP(nn.Module):
    """up, activation, RMSNorm over the hidden units if asked for, zero-initialized down."""

    def __init__(self, dim: int, mult: int, activation: str, norm: bool):
        super().__init__()
        self.activation, ratio = ACTIVATIONS[activation]
        self.norm = norm
        self.up = Linear(dim, mult * dim * ratio, role=MLP_MATRIX)
        self.down = Linear(mult * dim, dim, zero=True, role=MLP_MATRIX)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.up(x))
        return self.down(rms_norm(hidden, 1e-6) if self.norm else hidden)


class Block(nn.Module):
    """x = mix0 x + mix1 x0; x += scale * mixer(norm x); x += scale * MLP(norm x), if it has one."""
    roles = {"mix": CONTROL, "mixer_scale": CONTROL, "mlp_scale": CONTROL}

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module | None, eps: float):
        super().__init__()
        self.mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.mixer, self.mlp, self.eps = mixer, mlp, eps
        self.mixer_scale = nn.Parameter(torch.ones(dim))
        if mlp is not None:
            self.mlp_scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, x0: Tensor, state: State | None = None, step: bool = False
                ) -> tuple[Tensor, State]:
        """x, x0 (B,T,D) -> (B,T,D) and the mixer's state."""
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        mixer = self.mixer.step if step else self.mixer
        mixed, state = mixer(rms_norm(x, self.eps), state)
        x = x + self.mixer_scale.to(x.dtype) * mixed
        if self.mlp is not None:
            x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x, self.eps))
        return x, state


def check_mixers(c: Config) -> Iterator[str]:
    """Faults of the knobs that choose and size the mixers."""
    if len(c.pattern) != c.num_layers or not re.fullmatch("[ma]+", c.pattern):
        yield f"MIXER={c.mixer}: mamba2, attention, or NUM_LAYERS={c.num_layers} letters m or a"
    if "m" in c.pattern and c.d_inner % HEADDIM:
        yield (f"EXPAND*MODEL_DIM={c.d_inner}: Mamba-2 heads are {HEADDIM} wide; take a MODEL_DIM "
               f"such that the product is a multiple of {HEADDIM}")
    if "a" in c.pattern:
        if c.model_dim % (2 * c.num_heads):
            yield f"NUM_HEADS={c.num_heads}: must divide MODEL_DIM={c.model_dim} into even widths"
        if c.num_heads % c.num_kv_heads:
            yield f"NUM_KV_HEADS={c.num_kv_heads}: must divide NUM_HEADS={c.num_heads}"
        if c.carry_state:
            yield "CARRY_STATE=1: attention has no fixed-size state; use MIXER=mamba2"


CHECKS.append(check_mixers)


# ------------------------------------------------------------------------------
# model: embedding, U-Net, output head with its tie modes, JEPA head
# ------------------------------------------------------------------------------

class LanguageModel(nn.Module):
    """Token ids to hidden states h, and h to logits; everything that the artifact stores.

    A U-Net: the first half of the blocks encodes, and the others add the outputs of these, last
    in, first out."""
    roles = {"token_embed": EMBEDDING, "lm_head": HEAD, "lm_head_correction": CORRECTION,
             "vocab_bias": SCALAR, "skip_weights": CONTROL}

    def __init__(self, c: Config, kernels: Kernels | None = None):
        super().__init__()
        kernels = kernels or Kernels()
        dim, embed, vocab, tie = c.model_dim, c.embed, c.vocab_size, c.tie_embeddings
        self.softcap, self.softcap_type, self.tie = c.logit_softcap, c.softcap_type, tie
        self.eps, self.encoders = c.norm_eps, c.num_layers // 2
        untied = 0.02 if c.embed_style == "projected" else 1.0
        std = c.tied_embed_init_std if c.embed_style == "tied" and tie else untied
        self.token_embed = nn.Parameter(torch.randn(vocab, embed) * std)
        self.embed_proj = Linear(embed, dim) if embed != dim else None
        self.blocks = nn.ModuleList()
        for index, letter in enumerate(c.pattern):
            mixer, mlp = MIXERS[letter].from_config(c, kernels), None
            if c.mlp_mult and index % c.mlp_every == 0:
                mlp = MLP(dim, c.mlp_mult, c.activation, c.mlp_norm)
            self.blocks.append(Block(dim, mixer, mlp, c.norm_eps))
        skips = min(self.encoders, c.num_layers - self.encoders)
        self.skip_weights = nn.Parameter(torch.ones(skips, dim))
        self.vocab_bias = nn.Parameter(torch.zeros(vocab)) if c.vocab_bias else None
        self.embed_proj_rev = None
        if tie == 0:
            bound = dim ** -0.5 if c.embed_style == "projected" else 0.0
            self.lm_head = nn.Parameter(torch.empty(vocab, dim).uniform_(-bound, bound))
        elif tie == 3:
            self.adapter = Linear(dim, embed)
        elif embed != dim:
            self.embed_proj_rev = Linear(dim, embed)
        if tie == 2:
            self.lm_head_correction = nn.Parameter(torch.zeros(vocab, embed))

    def empty_states(self, batch: int, dtype: torch.dtype, device: torch.device) -> list:
        """One state per block, as before the first token."""
        return [block.mixer.empty_state(batch, dtype, device) for block in self.blocks]

    def trim_states(self, states: list, overlap: int) -> list:
        """The states with the last `overlap` positions of attention's keys and values."""
        return [block.mixer.trim(state, overlap) for block, state in zip(self.blocks, states)]

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (B,T) -> x0 (B,T,D), RMS-normalized."""
        x = F.embedding(ids, self.token_embed).to(dtype)
        return rms_norm(x if self.embed_proj is None else self.embed_proj(x), FP32_EPS)

    def forward(self, ids: Tensor, dtype: torch.dtype, states: list | None = None,
                step: bool = False) -> tuple[Tensor, list]:
        """ids (B,T) and the states before them (None: empty) -> h (B,T,D), normalized, and one
        state per block. step: T = 1, by the mixers' `step`."""
        x = x0 = self.embed(ids, dtype)
        skips, new_states = [], []
        for index, block in enumerate(self.blocks):
            decoder = index - self.encoders
            if decoder >= 0 and skips:
                x = x + self.skip_weights[decoder].to(dtype) * skips.pop()
            x, state = block(x, x0, None if states is None else states[index], step)
            new_states.append(state)
            if decoder < 0:
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
    """h to the latent z, and z to predictions of later latents; for training only, not stored."""

    def __init__(self, c: Config):
        super().__init__()
        projector, latent = PROJECTORS[c.projector_type], c.latent
        self.projector = projector(c.model_dim, latent)
        if c.jepa_on:
            hidden, norm = c.predictor_hidden_mult * latent, c.predictor_norm
            self.normed, self.eps = norm, c.norm_eps
            self.fc = Linear(latent, hidden, bias=not norm)
            self.out = Linear(hidden, latent, bias=not norm, zero=True)
            self.pred_proj = projector(latent, latent)

    def project(self, h: Tensor) -> Tensor:
        """h (...,D) -> z (...,L)."""
        return self.projector(h)

    def predict(self, z: Tensor) -> Tensor:
        """z (...,L) -> predictions (...,L) of the latents one position later."""
        x = rms_norm(z, self.eps) if self.normed else z
        return self.pred_proj(self.out(F.gelu(self.fc(x))))


# ------------------------------------------------------------------------------
# losses: tensors in, scalars out
# ------------------------------------------------------------------------------

TERMS = ("ce", "jepa", "anti", "cov")  # order of loss weights, log columns and gradient shares


class Active(NamedTuple):
    """Which terms a step computes; a term of weight 0 costs nothing. The compiler makes one graph
    for each combination."""
    ce: bool
    jepa: bool
    anti: bool
    cov: bool


@torch.compiler.assume_constant_result  # a tensor on the device, not a copy within the graph
def sigreg_knots(count: int, device: torch.device) -> Tensor:
    """Knots t on [0.2, 4], the characteristic function exp(-t^2/2) there, and trapezoid weights
    times that function: (3, count) fp32."""
    step = 3.8 / (count - 1)
    knots = [0.2 + step * i for i in range(count)]
    target = [math.exp(-t * t / 2) for t in knots]
    weights = [step * (1 if i in (0, count - 1) else 2) * target[i] for i in range(count)]
    return torch.tensor((knots, target, weights), device=device)


def sigreg_null(samples: int, knots: int = 17) -> float:
    """Expected SIGReg of standard normal samples: the integral of (1 - phi^2) w / samples."""
    _, target, weights = sigreg_knots(knots, torch.device("cpu")).double()
    return float((weights * (1 - target * target)).sum()) / samples


def sigreg(z: Tensor, directions: Tensor, knots: int = 17, axis: str = "batch") -> Tensor:
    """Distance of latents from an isotropic Gaussian along unit directions (SIGReg; LeJEPA, eq. 7,
    https://arxiv.org/abs/2511.08544).

    z (B,S,L) at S sampled positions, directions (M,L). Per direction the empirical characteristic
    function is compared with exp(-t^2/2). Its mean is taken over the batch ("batch", system A),
    over the positions ("time") or over both; the result is the mean over the rest."""
    points, target, weights = sigreg_knots(knots, z.device)
    phase = F.linear(z.float(), directions).unsqueeze(-1) * points         # (B,S,M,knots)
    pooled = {"batch": (0,), "time": (1,), "both": (0, 1)}[axis]
    real, imaginary = phase.cos().mean(pooled), phase.sin().mean(pooled)
    return (((real - target).square() + imaginary.square()) * weights).sum(-1).mean()


def covariance_term(z: Tensor) -> Tensor:
    """mean relu(1 - std) + 0.04 * sum of squared off-diagonal covariances / L over all positions of
    z (..., L): the anti-collapse term of system B (VICReg, https://arxiv.org/abs/2105.04906)."""
    flat = z.float().flatten(0, -2)
    flat = flat - flat.mean(0)
    variance = flat.square().sum(0) / (len(flat) - 1)
    covariance = flat.T @ flat / (len(flat) - 1)
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - (variance + 1e-8).sqrt()).mean() + 0.04 * off_diagonal / z.size(-1)


def rollout(jepa: JepaHead, z: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(prediction, target) for each horizon k = 1..steps; z (B,T,L).

    Prediction k starts from prediction k-1 (from z at first); its target is z shifted by k. On
    CUDA all rows are predicted: slices would have to be copied for the products."""
    prediction, targets = z, [z[:, k:] for k in range(1, steps + 1)]
    for target in targets:
        length = target.size(1)
        prediction = jepa.predict(prediction if z.is_cuda else prediction[:, :length])
        yield prediction[:, :length], target


def jepa_loss(jepa: JepaHead, z: Tensor, steps: int, detach: bool) -> Tensor:
    """Mean over horizons of the MSE between prediction and target, in fp32."""
    errors = []
    for prediction, target in rollout(jepa, z, steps):
        target = target.detach() if detach else target
        errors.append(F.mse_loss(prediction.float(), target.float()))
    return torch.stack(errors).mean()


def loss_terms(c: Config, model: LanguageModel, jepa: JepaHead | None, h: Tensor, targets: Tensor,
               positions: Tensor, directions: Tensor, active: Active) -> dict[str, Tensor]:
    """The active TERMS of hidden states h (B,T,D), unweighted scalars, and "nll" (nats per token).

    targets (B,T) ids; positions (S,) and directions (M,L) are SIGReg's. "ce" includes the z-loss;
    "nll" is the cross-entropy without it and without gradient, for the log."""
    terms = {}
    if active.ce:
        terms["ce"], terms["nll"] = token_loss_fused(
            model.features(h).flatten(0, 1), model.head(), model.vocab_bias, targets.flatten(),
            softcap=c.logit_softcap, softcap_type=c.softcap_type, z_loss=c.z_loss)
    if active.jepa or active.anti or active.cov:
        z = jepa.project(h)
    if active.jepa:
        terms["jepa"] = jepa_loss(jepa, z, c.jepa_steps, c.detach_targets)
    if active.anti and c.anticollapse == "sigreg":
        terms["anti"] = sigreg(z[:, positions], directions, c.sigreg_knots, c.sigreg_axis)
    elif active.anti:
        terms["anti"] = covariance_term(z)
    if active.cov:
        terms["cov"] = covariance_term(z)
    return terms


# ------------------------------------------------------------------------------
# schedules: pure functions of the progress p in [0, 1] (and, for the momentum, of the step)
# ------------------------------------------------------------------------------

class Progress(NamedTuple):
    """Where a run stands: steps done, fraction done, steps left. The fraction is that of the wall
    clock under a cap, else that of the steps."""
    step: int
    fraction: float
    steps_left: float


def measure_progress(step: int, iterations: int, elapsed: float, cap: float) -> Progress:
    """The progress that all schedules read, from rank 0's clock. The nearer limit ends the run; the
    clock ends it (fraction 1) two mean steps before the cap, so that the last step lies within."""
    by_steps = step / iterations
    if not cap:
        return Progress(step, by_steps, iterations - step)
    mean = elapsed / step if step else 0.0
    steps_left = min(iterations - step, (cap - elapsed) / mean if mean else math.inf)
    fraction = 1.0 if elapsed + 2 * mean >= cap else max(elapsed / cap, by_steps)
    return Progress(step, min(fraction, 1.0), max(steps_left, 0.0))


def lr_scale(progress: Progress, c: Config) -> float:
    """Learning rate over its base: 1, then linear to MIN_LR over the last WARMDOWN_FRACTION of the
    run or its last WARMDOWN_ITERS steps."""
    left = 1.0
    if c.warmdown == "fraction" and c.warmdown_fraction:
        left = (1 - progress.fraction) / c.warmdown_fraction
    elif c.warmdown == "iters" and c.warmdown_iters:
        left = progress.steps_left / c.warmdown_iters
    return c.min_lr + (1 - c.min_lr) * min(max(left, 0.0), 1.0)


def muon_momentum(step: int, c: Config) -> float:
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM over the first steps."""
    final, steps = c.muon_momentum, c.muon_momentum_warmup_steps
    start = c.muon_momentum_warmup_start
    return start + (final - start) * min(step / steps, 1.0) if steps else final


class LossWeights(NamedTuple):
    """Weights of TERMS at one moment, and the stage's name for the log."""
    ce: float
    jepa: float
    anti: float
    cov: float
    stage: str

    @property
    def active(self) -> Active:
        return Active(*(weight > 0 for weight in self[:len(TERMS)]))


def loss_weights(p: float, c: Config) -> LossWeights:
    """Joint: constant, with the optional ramp and anneal. Staged: pure JEPA, linear bridge, pure CE
    (system B); pure CE throughout without JEPA."""
    jepa = c.jepa_weight if c.jepa_on else 0.0
    if c.jepa_anneal:
        jepa *= max(0.0, 1 - p / c.jepa_anneal)
    if c.loss_schedule == "joint":
        ramp = min(p / 0.3, 1.0) if c.sigreg_schedule else 1.0
        return LossWeights(c.ce_weight, jepa, c.sigreg_lambda * ramp, c.jepa_cov, "joint")
    if p >= c.ce_pure_frac or not c.jepa_on:
        return LossWeights(c.ce_weight, 0.0, 0.0, 0.0, "ce")
    if p < c.jepa_pure_frac:
        return LossWeights(0.0, jepa, c.sigreg_weight, c.jepa_cov, "jepa")
    bridge = (p - c.jepa_pure_frac) / (c.ce_pure_frac - c.jepa_pure_frac)
    latent = 1 - bridge
    return LossWeights(c.ce_weight * bridge, jepa * latent, c.sigreg_weight * latent,
                       c.jepa_cov * latent, "bridge")


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

    A kind of grid is a subclass in GRIDS. On rows (R, C) in fp32, encode(rows) gives the file's
    arrays, decode(arrays) the values; snap(rows, out) writes decode(encode(rows)) to out.
    """
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
            if isinstance(name, str) and re.fullmatch(kind.pattern, name):
                return kind(name)
        raise UserError(f"storage grid {ascii(name)[:60]} is unknown; int4, int5, int6, int7, "
                        "int8a, int4s0.35, int8, int8f, fp8, bf16, fp16, fp32 are known")


class PlainGrid(Grid):
    """Numbers of a smaller type."""
    pattern, symbols, key = "bf16|fp16|fp32", False, "v"
    types = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
    dtype = type = property(lambda self: self.types[self.name])
    fused = property(lambda self: ("bf16", 0.0) if self.name == "bf16" else None)

    def cast(self, rows: Tensor) -> Tensor:
        return rows.to(self.type)

    def snap(self, rows: Tensor, out: Tensor) -> None:
        out.copy_(self.cast(rows))

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        return {self.key: self.cast(rows)}

    def decode(self, arrays: dict[str, Tensor]) -> Tensor:
        return arrays[self.key].view(self.type).float()


class Fp8Grid(PlainGrid):
    """e4m3fn (https://arxiv.org/abs/2209.05433), saturating at +-448; its bits are the symbols."""
    pattern, symbols, key = "fp8", True, "q"
    dtype, type, fused = None, torch.float8_e4m3fn, ("fp8", 0.0)

    def cast(self, rows: Tensor) -> Tensor:
        return rows.clamp(-448, 448).to(self.type)


class RowGrid(Grid):
    """Integers times one scale per row. A subclass has scales(rows, work): (R, 1) fp32, each
    exactly a number of `dtype`; work is scratch memory (R, C)."""
    values, dtype = "s", torch.bfloat16
    value_dtype = torch.bfloat16   # the product is rounded to it
    qmax = 127
    top = property(lambda self: 2 * self.qmax)
    clamps = True                  # False: |w| / scale cannot exceed qmax

    def rounded(self, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields (slice, symbols (r, C) fp32 in scratch memory, scales (r, 1)), on CPU in blocks
        that stay in cache."""
        if not rows.numel():
            return
        size = max(1, (1 << 18) // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
        scratch = torch.empty_like(rows[:size])
        for start in range(0, len(rows), size):
            part = rows[start:start + size]
            work = scratch[:len(part)]
            scale = self.scales(part, work)
            torch.div(part, scale, out=work).round_()
            if self.clamps:
                work.clamp_(-self.qmax, self.qmax)
            yield slice(start, start + len(part)), work, scale

    def snap(self, rows: Tensor, out: Tensor) -> None:
        for part, symbols, scale in self.rounded(rows):
            symbols.mul_(scale).add_(0.0)  # the file has no -0
            out[part].copy_(symbols.to(self.value_dtype))

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        q = torch.zeros_like(rows, dtype=torch.int8)
        s = rows.new_zeros(len(rows), dtype=self.dtype)
        for part, symbols, scale in self.rounded(rows):
            q[part], s[part] = symbols, scale[:, 0]
        return {"q": q, "s": s}

    def decode(self, arrays: dict[str, Tensor]) -> Tensor:
        q, s = (arrays[key].to(self.value_dtype) for key in "qs")
        return (q * s[:, None]).float()    # a bf16 product is the rounded fp32 product


class AbsmaxGrid(RowGrid):
    """intN: scale = absmax / qmax, qmax = 2^(N-1) - 1; int8a, as int8 is system B's."""
    pattern = "int([4-7]|8a)"
    qmax = property(lambda self: 2 ** (int(self.name[3]) - 1) - 1)
    clamps = False                 # absmax / bf16(scale) <= qmax (1 + 2^-8), which rounds to qmax
    fused = property(lambda self: ("int", self.qmax))

    def scales(self, rows: Tensor, work: Tensor) -> Tensor:
        peak = torch.abs(rows, out=work).amax(1, keepdim=True).clamp_min_(1e-8)
        divisor = peak.new_tensor(self.qmax)   # CUDA divides by a Python number inexactly
        return (peak / divisor).bfloat16().float()


class SigmaGrid(RowGrid):
    """intNsK: scale = K times the row's root mean square, K from 0.001 to 10."""
    pattern = r"int[4-8]s(10|[1-9](\.\d{0,14}[1-9])?|0\.(?!000)\d{0,14}[1-9])"
    k = property(lambda self: float(self.name.partition("s")[2]))
    fused = property(lambda self: ("sigma", self.k))

    def scales(self, rows: Tensor, work: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        rms = norm / math.sqrt(rows.shape[1])  # fp64: the same bf16 in any order of summing
        return (rms * self.k).float().clamp_min_(1e-8).bfloat16().float()


class PercentileGrid(RowGrid):
    """System B: scale = 99.99984th percentile of |row| / 127, with int8f at least 1/127."""
    pattern = "int8f?"
    dtype, value_dtype = torch.float16, torch.float32
    floor = property(lambda self: 1 / 127 if self.name == "int8f" else 2.0 ** -24)

    def scales(self, rows: Tensor, work: Tensor) -> Tensor:
        n = rows.shape[1]
        place = 0.9999984 * (n - 1)            # between two order statistics
        largest = torch.abs(rows, out=work).topk(n - int(place), dim=1).values
        above = largest[:, -2:-1] if n > 1 else largest
        clip = torch.lerp(largest[:, -1:], above, place - int(place))
        return (clip / 127).clamp_min_(self.floor).half().float()


GRIDS = (AbsmaxGrid, SigmaGrid, PercentileGrid, Fp8Grid, PlainGrid)


def rows_columns(shape) -> tuple[int, int]:
    """The first dimension counts rows; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def as_rows(w: Tensor) -> Tensor:
    return w.detach().float().reshape(rows_columns(w.shape))


def snap(w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    """The grid values of w in fp32 or in out (contiguous, may be w itself): bit for bit
    decode(encode(w)), at about 1.5 ns per INT4 weight on two cores. NaN gives NaN."""
    if out is None:
        out = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    grid.snap(as_rows(w), out.detach().view(rows_columns(w.shape)))
    return out


def all_finite(t: Tensor) -> bool:
    """Without a mask of t's size."""
    return not t.numel() or bool(torch.stack((t.amin(), t.amax())).isfinite().all())


def encode(w: Tensor, grid: Grid, name: str = "tensor") -> dict[str, Tensor]:
    """The file's arrays. UserError with the name for NaN, infinity and what overflows the grid.
    Use the device that training used."""
    rows = as_rows(w)
    if not all_finite(rows):
        raise UserError(f"{name} holds NaN or infinity and cannot be stored")
    arrays = grid.encode(rows)
    largest = rows.new_full((len(rows), 1), grid.qmax, dtype=torch.int8)
    if not all_finite(grid.decode(arrays | {"q": largest})):
        raise UserError(f"{name} holds values too large for {grid}")
    return arrays


def decode(arrays: dict[str, Tensor], grid: Grid, shape) -> Tensor:
    """fp32 grid values of the given shape from encode's arrays."""
    return grid.decode(arrays).reshape(shape)


def storage_plan(model: nn.Module, c: Config) -> dict[str, str]:
    """How each stored tensor is kept, by name; training, describe and the artifact use this plan.

    intn: matrices of at least 4096 elements as INT rows; the embedding, the tie correction and
    small matrices as FP8 under FP_STORAGE=FP8; all else bf16. int8 (system B): 2-D tensors above
    65,536 elements as INT8 rows; control tensors fp32; all else fp16.
    """
    step = f"int{c.quant_bits}" + (f"s{c.quant_k:.12g}" if c.quant_step == "sigma" else "")
    plan = {}
    for name, role, parameter in named_roles(model):
        matrix, table = role in (*MATRICES, HEAD), role in (EMBEDDING, CORRECTION)
        if c.storage == "int8":
            large = parameter.ndim == 2 and parameter.numel() > 65_536
            grid = ("int8f" if c.int8_floor else "int8") if large else "fp16"
            plan[name] = "fp32" if role == CONTROL else grid
        elif matrix and parameter.numel() >= 4096:
            plan[name] = (c.mlp_grid if role == MLP_MATRIX else c.proj_grid) or step
            if role == IN_PROJ and c.dt_grid:
                plan[name] += f"+{c.d_inner // HEADDIM}x{c.dt_grid}"
        elif table and c.embed_grid:
            plan[name] = c.embed_grid
        else:
            plan[name] = "fp8" if (matrix or table) and c.fp_storage == "FP8" else "bf16"
    return plan


@functools.cache
def row_grids(plan: str, rows: int) -> tuple[tuple[slice, Grid], ...]:
    """(rows, grid) pairs of an entry of the plan: "int4+10xint8a" has int8a for the last 10 rows."""
    head, _, tail = plan.partition("+")
    if not tail:
        return ((slice(0, rows), Grid.parse(head)),)
    count, _, other = tail.partition("x")
    first = rows - int(count)
    return (slice(0, first), Grid.parse(head)), (slice(first, rows), Grid.parse(other))


def stored_parts(name: str, w: Tensor, plan: str) -> Iterator[tuple[str, Tensor, Grid]]:
    """The tensor as the artifact keeps it: whole, or its last rows apart, named by the first of
    them: "in_proj[202]"."""
    for part, grid in row_grids(plan, len(w) if w.ndim else 1):
        yield (f"{name}[{part.start}]" if part.start else name), (w[part] if w.ndim else w), grid


def artifact_tensors(weights: Iterable[tuple[str, Tensor]],
                     plan: dict[str, str]) -> dict[str, tuple[Tensor, Grid]]:
    """{name: (rows, grid)} of named tensors, as `write_artifact` and `estimate_bytes` take them."""
    return {part: (rows, grid) for name, w in weights
            for part, rows, grid in stored_parts(name, w, plan[name])}


def whole_tensors(parts: dict[str, Tensor], path) -> dict[str, Tensor]:
    """Inverse of `stored_parts` over an artifact's tensors; UserError where parts do not join."""
    whole: dict[str, Tensor] = {}
    for name, tensor in parts.items():
        base, _, start = name.partition("[")
        if start:
            first = whole.get(base, torch.empty(()))
            fits = first.ndim and first.shape[1:] == tensor.shape[1:] and start == f"{len(first)}]"
            if not fits:
                raise UserError(f"{path}: the parts of {ascii(base)[:60]} do not join")
            tensor = torch.cat((first, tensor))
        whole[base] = tensor
    return whole


def grid_pairs(compute: Tensor, master: Tensor, plan: str) -> list[tuple[Tensor, Tensor, Grid]]:
    """Views (compute, master, grid) of stacks (k, *shape): all rows at once if of the same grid."""
    pieces = row_grids(plan, master.size(1) if master.ndim > 1 else 1)
    if len(pieces) > 1:
        return [(c[part], m[part], grid) for c, m in zip(compute, master) for part, grid in pieces]
    if master.ndim > 2:
        compute, master = compute.flatten(0, 1), master.flatten(0, 1)
    return [(compute, master, pieces[0][1])]


def snap_into(compute: Tensor, master: Tensor, plan: str) -> None:
    """Write the grid values of a stack of masters (k, *shape) into the compute weights."""
    for target, source, grid in grid_pairs(compute, master, plan):
        snap(source, grid, out=target)


def fused_form(grid: Grid) -> tuple[str, float] | None:
    """Format and parameter of a grid for FusedSnap; None without a kernel (int8, fp16, fp32)."""
    return grid.fused


def fits_training(name: str) -> bool:
    """Whether a knob can ask for that grid: it exists and has a fused kernel."""
    with contextlib.suppress(UserError):
        return Grid.parse(name).fused is not None
    return False


def check_grids(c: Config) -> Iterator[str]:
    """Faults of the knobs that choose how tensors are stored."""
    int8 = c.storage == "int8"
    if int8 and c.quant_bits != 8 or not int8 and c.quant_bits not in (4, 5, 6):
        yield f"QUANT_BITS={c.quant_bits}: STORAGE=intn needs 4, 5 or 6, STORAGE=int8 needs 8"
    if int8 and c.fp_storage != "BF16":
        yield f"FP_STORAGE={c.fp_storage}: STORAGE=int8 needs BF16"
    if int8 and c.quant_step != "absmax":
        yield f"QUANT_STEP={c.quant_step}: needs STORAGE=intn"
    if c.int8_floor and not int8:
        yield "INT8_FLOOR=1: needs STORAGE=int8"
    for name in ("MLP_GRID", "PROJ_GRID", "DT_GRID", "EMBED_GRID"):
        value = getattr(c, name.lower())
        if value and int8:
            yield f"{name}={value}: needs STORAGE=intn"
        if value and not fits_training(value):
            yield f"{name}={value}: must be int4 to int7, int8a, int4s0.35, fp8 or bf16"


CHECKS.append(check_grids)


@torch.no_grad()
def round_compensated(w: Tensor, grid: RowGrid, moments: Tensor) -> tuple[dict[str, Tensor], float]:
    """GPTQ (https://arxiv.org/abs/2210.17323): encode's arrays, rounded so that the layer's output
    changes least, and the output's squared error as a share of plain rounding's.

    w (R, C); moments (C, C): mean of x x^T over the layer's inputs x. Columns are rounded in
    order of falling input power; each one's error is spread over the later columns by the inverse
    of the moments. Plain rounding's scales stay, and its rows whose error would grow.
    """
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
    compensated = q[:, order.argsort()].to(torch.int8)

    def output_error(symbols: Tensor) -> Tensor:
        error = rows - grid.decode({"q": symbols, "s": plain["s"]}).double()
        return ((error @ moments) * error).sum(1)  # (R,)

    new, old = output_error(compensated), output_error(plain["q"])
    best = torch.where((new < old)[:, None], compensated, plain["q"])
    share = torch.minimum(new, old).sum() / old.sum().clamp_min(1e-300)
    return {"q": best, "s": plain["s"]}, float(share)


# ------------------------------------------------------------------------------
# optimizers: each parameter in one group; Muon for matrices, AdamW for the rest
# ------------------------------------------------------------------------------

# An odd polynomial a x + b x^3 + c x^5 that moves singular values to about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/


@functools.cache
def matmul_dtype(device_type: str) -> torch.dtype:
    """bf16 where the hardware multiplies it, else fp32, which is faster on such a CPU."""
    fast = device_type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """About U V^T of the SVDs of matrices (k,rows,cols), by Newton-Schulz, in matmul_dtype.

    Tall matrices are multiplied from the right: their rows stay as they are aligned."""
    x = matrices.to(matmul_dtype(matrices.device.type))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall, (a, b, c) = x.size(-2) > x.size(-1), QUINTIC
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
    nothing has to be restored. grad: fp32 sum over micro-batches and ranks. raw: what autograd
    adds to (grad itself where types agree). state: what the optimizer keeps, by its names."""
    names: list[str]
    owner: str              # matrix, embed, head, scalar, state
    grid: str               # how the tensors are stored ("" = not stored)
    master: Tensor
    compute: Tensor
    grad: Tensor
    raw: Tensor
    average: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    touched: bool = False   # whether autograd reached it in this step
    waiting: int = 0        # parameters without a gradient yet in this micro-batch
    work: Any = None        # pending sum over ranks

    def stack(self, which: str) -> Tensor:
        """master, compute or average; the master as long as there is no average."""
        return self.master if getattr(self, which) is None else getattr(self, which)

    def collect(self) -> None:
        """Add what autograd left in `raw` to the fp32 sum."""
        if self.raw is not self.grad:
            self.grad.add_(self.raw)
            self.raw.zero_()


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


def checked_tensor(tensors: dict[str, Tensor], name: str, reference: Tensor) -> Tensor:
    """tensors[name], read from a file, after checking shape and dtype, which the kernels do not
    check. KeyError where it is missing, ValueError where it is another's."""
    tensor = tensors[name]
    if tensor.shape != reference.shape or tensor.dtype != reference.dtype:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
    return tensor


class Weights:
    """All parameters of the modules in groups; each belongs to exactly one, which is checked."""

    def __init__(self, stored: nn.Module, extra: nn.Module | None, plan: dict[str, str],
                 config: Config, runtime: Runtime):
        self.runtime, self.last_micro = runtime, False
        self.kernel_snap = runtime.cuda  # by the kernel, until it is found wrong
        self.fused_snap: list[FusedSnap] | None = None
        members: dict[tuple, dict[str, nn.Parameter]] = {}  # by what a group has in common
        everything = named_roles(stored) + (named_roles(extra, "jepa.") if extra else [])
        for name, role, parameter in everything:
            key = owner_of(role, config), plan.get(name, ""), tuple(parameter.shape)
            members.setdefault(key, {})[name] = parameter
        self.groups = [self._make(*key[:2], named) for key, named in members.items()]
        unique = len({id(parameter) for *_, parameter in everything})
        assert unique == len(everything), "a parameter without exactly one owner"

    def _make(self, owner: str, grid: str, named: dict[str, nn.Parameter]) -> Group:
        master = torch.stack([parameter.detach().float() for parameter in named.values()])
        master = master.to(self.runtime.device)
        dtype = self.runtime.dtype if owner in ("matrix", "embed", "head") else torch.float32
        compute, grad = master.to(dtype, copy=True), torch.zeros_like(master)
        raw = grad if dtype == torch.float32 else torch.zeros_like(compute)
        group = Group(list(named), owner, grid, master, compute, grad, raw)
        arrived = functools.partial(self._arrived, group)
        for index, parameter in enumerate(named.values()):
            parameter.data, parameter.grad = compute[index], raw[index]
            parameter.register_post_accumulate_grad_hook(arrived)
        return group

    def _arrived(self, group: Group, _: nn.Parameter) -> None:
        """Autograd has added a gradient; after the group's last one, its sum over ranks starts."""
        group.touched = True
        group.waiting -= 1
        if self.last_micro and group.waiting == 0:
            self._send(group)

    def _send(self, group: Group) -> None:
        group.collect()
        group.work = self.runtime.sum_(group.grad, wait=False)

    def begin_micro(self, last: bool) -> None:
        """Before a backward pass; the step's last one starts the sums over ranks on its way."""
        self.last_micro = last
        for group in self.groups:
            if group.touched:
                group.collect()
            group.waiting = len(group.names)

    def finish_gradients(self) -> None:
        """After the last backward pass: send what has not been sent, wait for all sums."""
        for group in self.groups:
            if group.touched and group.waiting > 0:  # the loss left out some of its parameters
                self._send(group)
        for group in self.groups:
            if group.work is not None:
                group.work.wait()
                group.work = None

    def zero_grad(self) -> None:
        for group in self.groups:
            if group.touched:
                group.grad.zero_()
                group.touched = False

    @torch.no_grad()
    def load(self, which: str = "master", qat: bool = False) -> None:
        """Write masters or averages into the compute weights, on the storage grid under `qat`."""
        if which == "master" and qat and self.kernel_snap and self.snap_fused():
            return
        for group in self.groups:
            if qat and group.grid:
                snap_into(group.compute, group.stack(which), group.grid)
            else:
                group.compute.copy_(group.stack(which))

    def snap_fused(self) -> bool:
        """Masters onto their grids in one launch per dtype; False if a grid has no kernel."""
        if self.fused_snap is None:
            jobs = [pair for group in self.groups if group.grid
                    for pair in grid_pairs(group.compute, group.master, group.grid)]
            if any(fused_form(grid) is None for *_, grid in jobs):
                return False
            by_dtype: dict[torch.dtype, list] = {}
            for compute, master, grid in jobs:
                job = master, compute, *fused_form(grid)
                by_dtype.setdefault(compute.dtype, []).append(job)
            self.fused_snap = [FusedSnap(items) for items in by_dtype.values()]
        for snap_all in self.fused_snap:
            snap_all()
        for group in self.groups:
            if not group.grid:
                group.compute.copy_(group.master)
        return True

    @torch.no_grad()
    def snap_fault(self) -> str:
        """What is wrong with the kernel: it must equal `snap` on the weights bit for bit. "" if
        nothing; else it is not used again."""
        try:
            if not self.snap_fused():
                return ""
            found = [group.compute.clone() for group in self.groups]
            self.runtime.synchronize()
            self.kernel_snap = False
            self.load(qat=True)
            self.kernel_snap = all(map(torch.equal, found, [g.compute for g in self.groups]))
            return "" if self.kernel_snap else "differs from the grid of the artifact"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.kernel_snap = False
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

    @torch.no_grad()
    def restore(self, which: str, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave, masters or averages; errors of `checked_tensor`."""
        for group in self.groups:
            if which == "average" and group.average is None:
                group.average = torch.empty_like(group.master)
        for name, view in self.tensors(which).items():
            view.copy_(checked_tensor(tensors, name, view))

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Global gradient norm (0-dim, on the device: no host sync)."""
        return torch.stack([group.grad.norm() for group in self.groups if group.touched]).norm()


class Muon:
    """Orthogonalized Nesterov momentum (https://kellerjordan.github.io/posts/muon/) with decoupled
    weight decay. Another optimizer for matrices is a class with the same `init` and `update`."""

    def __init__(self, config: Config, runtime: Runtime):
        self.config, self.runtime = config, runtime

    def init(self, group: Group) -> None:
        group.state["momentum"] = torch.zeros_like(group.master)

    def update(self, groups: list[Group], scale: float, momentum: float, ok: Tensor) -> None:
        """Update the masters at LR `scale`; where ok (0-dim) is 0, nothing changes. Each rank
        orthogonalizes its share of a group; gathers overlap the next group."""
        c = self.config
        lr = c.matrix_lr * scale
        pending = [(group, *self.runtime.gather(self._share(group, momentum, ok)))
                   for group in groups]
        for group, update, work in pending:
            if work is not None:
                work.wait()
            rows, columns = group.master.shape[-2:]
            group.master.mul_(1 - lr * c.muon_wd * ok)
            factor = -lr * max(1, rows / columns) ** 0.5 * ok
            group.master.add_(update[:len(group.names)].float() * factor)

    def _share(self, group: Group, momentum: float, ok: Tensor) -> Tensor:
        """Update the momentum; orthogonalized updates of this rank's matrices (n,rows,columns)."""
        c, world, rank = self.config, self.runtime.world, self.runtime.rank
        grad, buffer = torch.where(ok > 0, group.grad, 0.0), group.state["momentum"]
        buffer.mul_(1 - ok * (1 - momentum)).add_(grad)
        count = -(-len(group.names) // world)
        share = slice(rank * count, (rank + 1) * count)  # the last ranks may have fewer, or none
        update = grad[share].add(buffer[share], alpha=momentum)
        if missing := count - len(update):
            update = F.pad(update, (0, 0, 0, 0, 0, missing))
        if c.row_norm:
            update = rms_norm(update, FP32_EPS)
        return orthogonalize(update, c.muon_backend_steps)


class Optimizer:
    """Muon for the matrices, fused AdamW for the rest, one clip; a non-finite gradient leaves
    everything as it was. All on the device: the norm, the clip and the verdict are 0-dim tensors,
    so no step waits for the host."""

    def __init__(self, weights: Weights, config: Config):
        self.weights, self.config = weights, config
        c, rates, zero = config, base_rates(config), torch.zeros((), device=weights.runtime.device)
        self.skipped, self.skipped_in_row = zero.clone(), zero.clone()  # steps without an update
        self.matrix = Muon(c, weights.runtime)
        self.matrix_groups = [group for group in weights.groups if group.owner == "matrix"]
        for group in self.matrix_groups:
            self.matrix.init(group)
        self.adam_groups = [group for group in weights.groups if group.owner != "matrix"]
        self.adam = torch.optim.AdamW(
            [dict(params=[nn.Parameter(group.master)], base_lr=rates[group.owner],
                  weight_decay=0.0 if group.owner == "state" else c.adam_wd)
             for group in self.adam_groups],
            lr=1.0, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)
        for group, settings in zip(self.adam_groups, self.adam.param_groups):
            moments = {key: torch.zeros_like(group.master) for key in ("exp_avg", "exp_avg_sq")}
            group.state = dict(step=zero.clone(), **moments)
            self.adam.state[settings["params"][0]] = group.state  # the same dict, and tensors

    @torch.no_grad()
    def step(self, scale: float, momentum: float, clip: bool = True) -> tuple[Tensor, Tensor]:
        """Update the masters at LR `scale`; the gradient norm and whether it is finite (0-dim)."""
        c, norm = self.config, self.weights.norm()
        ok = torch.isfinite(norm).float()
        limit = c.grad_clip_norm if clip and c.grad_clip_norm else math.inf
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for group in self.weights.groups:
            if group.touched:
                group.grad.mul_(factor)
        matrices = [group for group in self.matrix_groups if group.touched]
        self.matrix.update(matrices, scale, momentum, ok)
        for group, settings in zip(self.adam_groups, self.adam.param_groups):
            settings["lr"] = settings["base_lr"] * scale
            settings["params"][0].grad = group.grad if group.touched else None
        self.adam.found_inf = 1 - ok  # 1: the fused kernel leaves weights, moments, counters alone
        self.adam.grad_scale = None
        self.adam.step()
        self.skipped += 1 - ok
        self.skipped_in_row = (self.skipped_in_row + 1) * (1 - ok)
        return norm, ok

    def reset_after_warmup(self, everything: bool) -> None:
        """After the warm-up steps: Adam's counters go to 0, with `everything` all moments, too."""
        for group in self.weights.groups:
            for key, tensor in group.state.items():
                if everything or key == "step":
                    tensor.zero_()
        self.skipped.zero_()
        self.skipped_in_row.zero_()

    def state(self) -> dict[str, Tensor]:
        """Moments and counters by name, for the checkpoint (views, not copies)."""
        tensors = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        for group in self.weights.groups:
            for key, tensor in group.state.items():
                parts = tensor if tensor.ndim else [tensor]  # a counter: by the first name
                tensors |= {f"{key}/{name}": part for name, part in zip(group.names, parts)}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave; errors of `checked_tensor`."""
        for name, tensor in self.state().items():
            tensor.copy_(checked_tensor(tensors, name, tensor))


# ------------------------------------------------------------------------------
# artifact: one container without pickle for artifacts and checkpoints, codecs, strict read
# ------------------------------------------------------------------------------

# A container, little-endian: magic, version, bytes of the header as stored and as JSON; the zlib'd
# header {"kind", "meta", "sections": [Section as a dict]}; payloads; sha256 of all before.
MAGIC, VERSION, PREFIX = b"JEPAFILE", 2, struct.Struct("<8sIII")
Section = namedtuple("Section", "name codec stored raw dtype shape")  # bytes in the file, decoded
MAX_ENTRIES = dict(artifact=1 << 12, checkpoint=1 << 15)  # full-size models need 230 and 1,200
MAX_HEADER = {kind: 256 * entries for kind, entries in MAX_ENTRIES.items()}  # bytes of JSON
MAX_DEPTH = 8            # of its nesting
MAX_ELEMENTS = 1 << 27   # stored weights of one artifact
PIECE = 1 << 19          # raw bytes per section of the codecs that work on pieces
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
    except UserError as error:  # of Grid.parse or a caller's check
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # each codec has its own class of errors
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: damaged or foreign file ({ascii(reason)[1:-1][:80]})") from error


def write_container(path, kind: str, meta: dict, sections: list[tuple[Section, Any]]) -> int:
    """Writes the file all or nothing and returns its size in bytes. A payload is bytes-like, or a
    function that makes it, so that one copy of one tensor lives at a time."""
    entries = [section._asdict() for section, _ in sections]
    header = {"kind": kind, "meta": meta, "sections": entries}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_HEADER[kind] or entry_count(header) > MAX_ENTRIES[kind]:
        raise UserError(f"{path}: {entry_count(header)} tensors are too many for one file")
    packed, digest = zlib.compress(text, 9), hashlib.sha256()
    with replacing(Path(path)) as file:
        def put(data) -> None:
            digest.update(data)
            file.write(data)
        put(PREFIX.pack(MAGIC, VERSION, len(packed), len(text)) + packed)
        for section, payload in sections:
            payload = memoryview(payload() if callable(payload) else payload).cast("B")
            assert len(payload) == section.stored, section
            put(payload)
        file.write(digest.digest())
        return file.tell()


def entry_count(header: dict) -> int:
    return max(len(header["sections"]), len(header["meta"].get("tensors", ())))


def inflate(data, raw: int) -> bytes:
    """zlib data of exactly `raw` bytes; no more are ever made."""
    out = zlib.decompressobj().decompress(data, raw + 1)
    require(len(out) == raw, "zlib data have another size than the file says")
    return out


def read_container(path, kind: str) -> tuple[dict, list[tuple[Section, memoryview]]]:
    """Meta and [(section, payload)] of a whole file; any fault is a UserError."""
    with parsing(path), open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)
                             ) as file:  # a FIFO must not wait for its writer
        data = memoryview(file.read(os.fstat(file.fileno()).st_size))
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
        require(start == len(data) - 32, "section sizes do not add up to the file's")
        return header["meta"], sections


def parse_header(text: bytes, kind: str) -> dict:
    """Strict JSON, its nesting bounded before it is parsed."""
    plain = np.frombuffer(re.sub(rb"(?s)\\.", b"", text), np.uint8)
    outside = np.cumsum(plain == ord('"')) % 2 == 0  # of strings
    opened, closed = (np.isin(plain, list(marks)) & outside for marks in (b"[{", b"]}"))
    depth = np.cumsum(opened.astype(np.int64) - closed).max(initial=0)
    require(depth <= MAX_DEPTH, "its header is nested too deep")
    header = json.loads(text.decode(), parse_constant=int)  # int refuses NaN and Infinity
    require(header["kind"] == kind, f"its kind is {ascii(header['kind'])[:40]}, not {kind!r}")
    require(entry_count(header) <= MAX_ENTRIES[kind], "it has too many entries")
    return header


def without_nonfinite(value):
    """Data for JSON, which has no NaN and infinity: None in their place."""
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path, kind: str, meta: dict, tensors: dict[str, Tensor]) -> int:
    """Uncompressed tensors of any device (checkpoints). NaN and infinity in meta become null."""
    sections = []
    for name, t in tensors.items():
        dtype, size = str(t.dtype).removeprefix("torch."), t.nbytes
        assert dtype in DTYPES, f"{name} has dtype {dtype}, which is not stored"
        payload = lambda t=t: t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        sections.append((Section(name, "raw", size, size, dtype, list(t.shape)), payload))
    return write_container(path, kind, without_nonfinite(meta), sections)


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
    Layout: bytes of the zlib'd tables u32, tables, coder states u64, words u32.
    """
    cuts = np.cumsum([0, *lengths])
    tables = [frequencies(np.bincount(data[a:b], minlength=256)) for a, b in zip(cuts, cuts[1:])]
    tables = np.array(tables, np.int64).reshape(-1, 256)
    starts = np.cumsum(tables, 1) - tables
    coders = rans_coders(len(data))
    x, words = np.full(coders, LOW, np.int64), []
    for stream, a, b, c in reversed(list(rans_steps(lengths, coders))):
        first, second = data[a:b], data[b:c]
        f, g = tables[stream][first], tables[stream][second]
        top = x[:b - a]
        limit = f << BITS
        limit[:c - b] = f[:c - b] * g
        full = np.flatnonzero(top >> (63 - 2 * BITS) >= limit)
        words.append(top[full].astype(np.uint32))  # the low 32 bits
        top[full] >>= 32
        for symbol, freq in ((second, g), (first, f)):
            state = x[:len(symbol)]
            state += state // freq * ((1 << BITS) - freq) + starts[stream][symbol]
    table = tables.astype("<u2").view(np.uint8).reshape(-1, 2).T  # high bytes apart
    table = zlib.compress(np.ascontiguousarray(table).tobytes(), 9)
    words = [w.astype("<u4").tobytes() for w in reversed(words)]
    return b"".join([struct.pack("<I", len(table)), table, x.astype("<u8").tobytes(), *words])


def rans_decode(payload, lengths) -> np.ndarray:
    """Inverse of rans_encode: uint8 (sum of lengths,)."""
    coders, head = rans_coders(sum(lengths)), 4 + int.from_bytes(payload[:4], "little")
    tables = inflate(payload[4:head], 512 * len(lengths))
    tables = np.frombuffer(tables, np.uint8).reshape(2, -1).astype(np.int64)
    tables = (tables[0] + tables[1] * 256).reshape(-1, 256)
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
# most about `limit` bytes of the piece. whole: it takes all streams at once, and their lengths in
# place of the limit. module: None if its package is missing.
Codec = namedtuple("Codec", "encode decode module whole", defaults=(False,))
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
    sections = []
    for part, payload in zip(parts[rows[best].whole][0], coded[best]):
        name, raw = str(len(sections)), len(part)
        sections.append((Section(name, best, len(payload), raw, "uint8", [raw]), payload))
    return sections, {"codec": best, "codec_bytes": sizes}


def unpack(sections: list[tuple[Section, memoryview]], lengths: list[int]) -> np.ndarray:
    """Inverse of `pack`: the streams laid end to end."""
    def decoded(section: Section, payload: memoryview):
        codec = CODECS[section.codec]
        if codec.module is None:
            raise UserError(f"codec {section.codec} is missing: install brotli and zstandard")
        require(not codec.whole or len(sections) == 1, "rans data in pieces")
        return codec.decode(payload, lengths if codec.whole else section.raw + 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        data = b"".join(pool.map(decoded, *zip(*sections)))
    require(len(data) == sum(lengths), "data have another size than the header says")
    return np.frombuffer(data, np.uint8)


# Streams of each grid: which tensors are transposed, the class of each row, the symbols of each
# class; then scales or plain values, a stream per byte. Rows with similar histograms share a class.
CLASSES = 16


def row_classes(rows: list[np.ndarray], pairs: bool) -> tuple[np.ndarray, float]:
    """Class of each row of uint8 symbols, and the bits that coding them takes, tables included:
    entropy-constrained clustering (Chou et al. 1989, https://doi.org/10.1109/29.17498)."""
    def histogram(q: np.ndarray) -> np.ndarray:
        cells = np.arange(len(q), dtype=np.int64)[:, None] * width + q
        return np.bincount(cells.ravel(), minlength=len(q) * width).reshape(len(q), width)

    width = 1 + max((int(q.max()) for q in rows if q.size), default=0)
    counts = np.concatenate([histogram(q) for q in rows]).astype(np.float32)
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


def symbol_streams(symbols: list[np.ndarray], pairs: bool) -> list[np.ndarray]:
    """Streams of the uint8 symbols (R, C) of all tensors of a grid."""
    turned = np.array([by_columns(q, pairs) for q in symbols], np.uint8)
    symbols = [q.T if turn else q for q, turn in zip(symbols, turned)]
    ids = row_classes(symbols, pairs)[0]
    owners = np.split(ids, np.cumsum([len(q) for q in symbols])[:-1])
    streams = [turned, ids]
    for c in range(CLASSES):
        stream = np.concatenate([q[owner == c].ravel() for q, owner in zip(symbols, owners)])
        if pairs:
            stream = np.append(stream, np.zeros(len(stream) % 2, np.uint8))
            stream = stream[::2] << 4 | stream[1::2]
        streams.append(stream)
    return streams


def read_symbols(take: Callable, shapes: list[tuple[int, int]], pairs: bool) -> list[np.ndarray]:
    """Inverse of `symbol_streams`; take(length) gives the next stream."""
    turned = take(len(shapes))
    symbols = [np.empty(shape[::-1] if turn else shape, np.uint8)
               for shape, turn in zip(shapes, turned)]
    ids = take(sum(map(len, symbols)))
    require(turned.max() < 2 and ids.max(initial=0) < CLASSES, "a class is out of range")
    owners = np.split(ids, np.cumsum([len(q) for q in symbols])[:-1])
    for c in range(CLASSES):
        sizes = [np.count_nonzero(owner == c) * q.shape[1] for q, owner in zip(symbols, owners)]
        stream = take((sum(sizes) + 1) // 2 if pairs else sum(sizes))
        if pairs:
            stream = np.stack((stream >> 4, stream & 15), 1).reshape(-1)
        for q, owner, part in zip(symbols, owners, np.split(stream, np.cumsum(sizes))):
            q[owner == c] = part.reshape(-1, q.shape[1]) if part.size else 0
    return [np.ascontiguousarray(q.T) if turn else q for q, turn in zip(symbols, turned)]


def grid_groups(table: list) -> dict[Grid, list[int]]:
    """Indices of each grid's tensors; table: [(name, grid, shape)]."""
    groups: dict[Grid, list[int]] = {}
    for i, (_, grid, _) in enumerate(table):
        groups.setdefault(grid, []).append(i)
    return groups


def build_streams(table: list, encoded: list[dict[str, Tensor]]) -> list[np.ndarray]:
    """The uint8 streams of all tensors' arrays."""
    streams = []
    for grid, members in grid_groups(table).items():
        arrays = [encoded[i] for i in members]
        if grid.symbols:
            symbols = [a["q"].cpu().view(torch.int8) + grid.qmax for a in arrays]
            symbols = [q.view(torch.uint8).numpy() for q in symbols]
            streams += symbol_streams(symbols, grid.top < 16)
        if grid.dtype:
            values = torch.cat([a[grid.values].reshape(-1) for a in arrays]).cpu()
            planes = values.view(torch.uint8).numpy().reshape(-1, values.itemsize).T
            streams += list(planes[::-1])  # the high bytes first
    return streams


def read_streams(table: list, lengths: list[int], data: np.ndarray) -> list[dict[str, Tensor]]:
    """Inverse of `build_streams`, from the streams laid end to end."""
    streams, arrays = iter(np.split(data, np.cumsum(lengths)[:-1])), [{} for _ in table]

    def take(length: int) -> np.ndarray:
        stream = next(streams)
        require(len(stream) == length, "stream lengths and tensor shapes disagree")
        return stream

    for grid, members in grid_groups(table).items():
        shapes = [rows_columns(table[i][2]) for i in members]
        if grid.symbols:
            for i, q in zip(members, read_symbols(take, shapes, grid.top < 16)):
                require(q.max(initial=0) <= grid.top, "a symbol is out of range")
                arrays[i]["q"] = torch.from_numpy((q - np.uint8(grid.qmax)).view(np.int8))
        if grid.dtype:
            sizes = [rows if grid.symbols else rows * columns for rows, columns in shapes]
            planes = [take(sum(sizes)) for _ in range(grid.dtype.itemsize)]
            values = torch.from_numpy(np.stack(planes[::-1], 1).reshape(-1)).view(grid.dtype)
            for i, part in zip(members, values.split(sizes)):
                arrays[i][grid.values] = part
    return arrays


def entropy_bytes(symbols: np.ndarray) -> float:
    """Bytes of the empirical order-0 entropy of uint8 symbols."""
    counts = np.bincount(symbols.reshape(-1), minlength=256).astype(np.float64)
    counts = counts[counts > 0]
    bits = math.log2(max(counts.sum(), 1)) - np.log2(counts)
    return float((counts * bits).sum() / 8)


def artifact_streams(config: dict, tensors: dict, given=None) -> tuple[dict, list, int]:
    """Meta and streams of an artifact, and the bytes that its tensors need one by one: entropy of
    the symbols, all else at full width. given: arrays of tensors already rounded, by name."""
    table = [(name, grid, list(w.shape)) for name, (w, grid) in tensors.items()]
    encoded = [(given or {}).get(name) or encode(*tensors[name], name) for name in tensors]
    streams = build_streams(table, encoded)
    meta = {"config": config, "tensors": [(name, str(grid), shape) for name, grid, shape in table],
            "streams": [len(stream) for stream in streams]}
    need = 0.0
    for key, t in (array for arrays in encoded for array in arrays.items()):
        need += entropy_bytes(t.cpu().view(torch.uint8).numpy()) if key == "q" else t.nbytes
    return meta, streams, round(need)


def estimate_bytes(tensors: dict[str, tuple[Tensor, Grid]], config: dict | None = None) -> dict:
    """Artifact bytes predicted from entropies, nothing compressed: {"bytes", "entropy_bytes"}."""
    meta, streams, entropy = artifact_streams(config or {}, tensors)
    counts = [np.bincount(stream, minlength=256) for stream in streams]
    tables = zlib.compress(b"".join(frequencies(n).astype("<u2").tobytes() for n in counts), 9)
    header = zlib.compress(json.dumps(meta).encode(), 9)
    states = 4 * rans_coders(sum(map(len, streams)))
    total = sum(map(entropy_bytes, streams)) + len(tables) + len(header) + 150 + states
    return {"bytes": round(total), "entropy_bytes": entropy}


def write_artifact(path, config: dict, tensors: dict[str, tuple[Tensor, Grid]],
                   codecs: Iterable[str] = CODECS, given=None) -> dict:
    """Stores tensors {name: (weights, grid)} and a JSON-able config; the same input makes the same
    file. Returns a report: codec, codec_bytes (payload of each codec that is installed), bytes (of
    the file), entropy_bytes. given, entropy_bytes: see artifact_streams."""
    meta, streams, entropy = artifact_streams(config, tensors, given)
    data = np.concatenate([*streams, np.empty(0, np.uint8)])
    sections, report = pack(data, meta["streams"], codecs)
    size = write_container(path, "artifact", meta, sections)
    return report | {"bytes": size, "entropy_bytes": entropy}


def parse_table(meta: dict, raws: list[int]) -> list[tuple[str, Grid, list[int]]]:
    """The tensor table of an artifact whose sections decode to so many bytes, bounds checked."""
    table, lengths = [], meta["streams"]
    require(isinstance(meta["config"], dict), "its configuration has another form")
    for name, grid, shape in meta["tensors"]:
        require(isinstance(name, str) and len(shape) <= 8, "a tensor's entry has another form")
        table.append((name, Grid.parse(grid), shape))
    sizes = [n for _, _, shape in table for n in shape] + raws + lengths
    require(all(type(n) is int and 0 <= n < 1 << 40 for n in sizes), "a size is out of range")
    need = sum(max(math.prod(shape), rows_columns(shape)[0]) for _, _, shape in table)
    require(need <= MAX_ELEMENTS, f"{need} weights are more than {MAX_ELEMENTS}")
    counts = [(2 + CLASSES) * grid.symbols + (grid.dtype.itemsize if grid.dtype else 0)
              for grid in grid_groups(table)]
    require(len(lengths) == sum(counts) and sum(lengths) == sum(raws) <= 4 * need + 16,
            "streams, tensors and sections disagree")
    return table


def artifact_outline(path) -> tuple[dict, dict[str, tuple]]:
    """Configuration and {name: shape} of an artifact whose checksum and sizes hold, undecoded."""
    meta, sections = read_container(path, "artifact")
    with parsing(path):
        table = parse_table(meta, [section.raw for section, _ in sections])
        return meta["config"], {name: tuple(shape) for name, _, shape in table}


def read_artifact(path) -> tuple[dict, dict[str, Tensor], dict[str, Grid]]:
    """(config, {name: fp32 grid values}, {name: grid}); any fault is a UserError."""
    meta, sections = read_container(path, "artifact")
    with parsing(path):
        table = parse_table(meta, [section.raw for section, _ in sections])
        arrays = read_streams(table, meta["streams"], unpack(sections, meta["streams"]))
        tensors = {name: decode(a, grid, shape) for (name, grid, shape), a in zip(table, arrays)}
        require(len(tensors) == len(table), "a tensor name occurs twice")
        require(all(map(all_finite, tensors.values())), "it holds NaN or infinity")
        return meta["config"], tensors, {name: grid for name, grid, _ in table}


# ------------------------------------------------------------------------------
# checkpoint: everything an uninterrupted run would have at that step, in the artifact's container
# ------------------------------------------------------------------------------

class Checkpoints:
    """The folder of a run's checkpoints; rank 0 writes them in a background thread."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.thread: threading.Thread | None = None
        self.fault: BaseException | None = None

    def paths(self) -> list[Path]:
        """Existing checkpoints, newest first; UserError if the folder cannot be read."""
        try:
            names = sorted(os.listdir(self.folder), reverse=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({error.strerror})") from error
        return [self.folder / name for name in names if re.fullmatch(r"step_\d+\.ckpt", name)]

    def probe(self) -> None:
        """Make the folder; UserError if no file can be made there."""
        probe = self.folder / ".probe"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"CHECKPOINT_DIR: {self.folder} cannot be written ({error.strerror})"
                            ) from error

    def save(self, step: int, meta: dict, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors, then write in a background thread; raises an earlier write's error."""
        self.wait()
        snapshot = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self.thread = threading.Thread(target=self.write, args=(step, meta, snapshot),
                                       name="checkpoint")
        self.thread.start()

    def write(self, step: int, meta: dict, tensors: dict[str, Tensor]) -> None:
        """The thread: writes, then removes the oldest files. Any error is kept for `wait`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step_*.tmp"):  # by a writer that was killed
                left.unlink()
            write_tensors(self.folder / f"step_{step:09d}.ckpt", "checkpoint", meta, tensors)
            by_age = sorted(self.paths(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for old in by_age[self.keep:]:  # by step, a damaged newer one would outlive this one
                old.unlink()
        except OSError as error:
            reason = error.strerror or error
            self.fault = UserError(f"{self.folder}: no checkpoint of step {step} ({reason})")
        except BaseException as error:
            self.fault = error

    def wait(self) -> None:
        """Until the last write is on disk; raises its error."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault

    def newest(self, note: Callable[[str], None]) -> tuple[dict, dict[str, Tensor]] | None:
        """Meta and tensors of the newest sound checkpoint, None without any; `note` is told of damaged
        ones. UserError if all are damaged, or one cannot be read: nothing may replace them then."""
        faults = []
        for path in self.paths():
            try:
                newest = read_tensors(path, "checkpoint")
            except UserError as error:
                if isinstance(error.__cause__, OSError):  # no damage: it may be readable later
                    raise UserError(f"{error}; make it readable, or OVERWRITE=1 starts over") from error
                faults.append(str(error))
                continue
            for fault in faults:
                note(f"checkpoint passed over: {fault}")
            return newest
        if faults:
            raise UserError(f"no checkpoint can be used ({'; '.join(faults)}); OVERWRITE=1 starts over")
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


class Evaluator:
    """Scores a model on tokens (n,) int64. Every token but the first is a target exactly once."""

    def __init__(self, model: LanguageModel, tokens: Tensor, vocabulary: Vocabulary, seq_len: int,
                 batch_tokens: int, runtime: Runtime, forward: Callable | None = None):
        self.model, self.tokens, self.vocabulary = model, tokens, vocabulary
        self.runtime, self.forward = runtime, forward or model
        self.seq_len, self.sequences = seq_len, max(1, batch_tokens // seq_len)
        self.targets = len(tokens) - 1
        self.bytes = int(vocabulary.target_bytes(tokens[:-1], tokens[1:]).sum())

    def on(self, tokens: Tensor) -> Evaluator:
        """The same evaluation of other tokens."""
        return Evaluator(self.model, tokens, self.vocabulary, self.seq_len,
                         self.sequences * self.seq_len, self.runtime, self.forward)

    def _share(self, count: int) -> tuple[int, int]:
        """First and last + 1 of this rank's items out of `count`."""
        rank, world = self.runtime.rank, self.runtime.world
        return count * rank // world, count * (rank + 1) // world

    def _scores(self, total: Tensor) -> list[Score]:
        """This rank's sums of NLL (K,) fp64 -> scores over all ranks."""
        total = self.runtime.sum_host(total.to("cpu"))
        return [Score(nll / self.targets, nll / math.log(2) / max(self.bytes, 1))
                for nll in total.tolist()]

    def _zeros(self, count: int = 1) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self.runtime.device)

    def _hidden(self, ids: Tensor, shape: tuple[int, int], states: list | None = None
                ) -> tuple[Tensor, list]:
        """h (B,T,D) of ids (B,T) and the states after them. On CUDA ids are padded to `shape`, so
        that torch.compile makes one graph per pass; states after a padded piece are not real."""
        sequences, length = ids.shape
        if self.runtime.cuda:
            ids = F.pad(ids, (0, shape[1] - length, 0, shape[0] - sequences))
        h, states = self.forward(self.runtime.to_device(ids), self.runtime.dtype, states)
        return h[:sequences, :length], states

    def _nll(self, h: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Tensor:
        """Sum of the NLL at each temperature (K,) fp64; h (...,D), targets (...). The V-wide
        logits are made in pieces."""
        h, targets = h.reshape(-1, h.size(-1)), self.runtime.to_device(targets.reshape(-1))
        piece = max(1, (1 << (25 if h.is_cuda else 22)) // self.vocabulary.base_bytes.numel())
        total = self._zeros(len(temperatures))
        for part, ids in zip(h.split(piece), targets.split(piece)):
            logits = self.model.logits(part)
            for index, temperature in enumerate(temperatures):
                scaled = logits if temperature == 1 else logits / temperature
                total[index] += F.cross_entropy(scaled, ids, reduction="none").double().sum()
        return total

    def standard(self, temperatures: Sequence[float] = (1.0,), label: str = "validation"
                 ) -> list[Score]:
        """Sequences of seq_len tokens, each from an empty context; one score per temperature."""
        return self._finish(self._sequences, temperatures, label=label)

    def sliding(self, stride: int, batch: int, temperature: float = 1.0) -> Score:
        """Windows of seq_len every `stride` tokens. The first window scores all its tokens, later
        ones their last `stride`; one more window ends with the text if the others do not. Each
        token is scored once, with the longest context that the windows offer."""
        return self._finish(self._windows, [temperature], stride=stride, batch=batch)[0]

    def carried(self, temperatures: Sequence[float] = (1.0,), overlap: int | None = None
                ) -> list[Score]:
        """One pass with the recurrent state carried from piece to piece: each token is scored with
        its whole past. The pass is sequential: rank 0 does it alone, in pieces of a batch. With
        `overlap` (models with attention) a piece has seq_len tokens, of which the first `overlap`
        are those before it, as keys and values of attention; the SSM states are carried."""
        return self._finish(self._pieces, temperatures, overlap=overlap)

    def adapted(self, c: Config, temperature: float = 1.0) -> Score:
        """Score-first test-time training: each chunk of the text is scored, carried, sliding or in
        sequences as the configuration asks, then trained on; the last one is only scored. A score
        thus depends on the past alone (https://github.com/openai/parameter-golf/issues/1017).
        Afterwards the weights are what they were."""
        total, chunk = self._zeros(), c.adapt_chunk_tokens
        if c.eval_state == "carry":
            scoring = self._pieces(total, [temperature], chunk, overlap=c.overlap)
        elif c.sliding_eval:
            scoring = self._windows(total, [temperature], chunk, stride=c.sliding_eval_stride,
                                    batch=c.sliding_batch_size)
        else:
            scoring = self._sequences(total, [temperature], chunk, label="adapted")
        with Adaptation(self, c) as adaptation:
            first = 0
            for stop in scoring:
                if stop < self.targets:
                    adaptation.train(first, stop)
                first = stop
        return self._scores(total)[0]

    def _finish(self, scoring: Callable, temperatures: Sequence[float], **options) -> list[Score]:
        """Scores of the whole text, as one chunk."""
        total = self._zeros(len(temperatures))
        for _ in scoring(total, temperatures, self.targets, **options):
            pass
        return self._scores(total)

    # Three ways of scoring. Each adds the NLL of this rank's share of a chunk (about `chunk` targets,
    # whole batches) to `total` (K,), and then yields how many targets all ranks have scored.

    @torch.no_grad()
    def _sequences(self, total: Tensor, temperatures: Sequence[float], chunk: int, label: str
                   ) -> Iterator[int]:
        T, rows = self.seq_len, self.targets // self.seq_len
        step = -(-chunk // (self.sequences * T)) * self.sequences
        for low in range(0, rows, step):
            high = min(low + step, rows)
            first, last = self._share(high - low)
            batches = range(low + first, low + last, self.sequences)
            for start in progress_bar(batches, label, self.runtime.main):
                span = self.tokens[start * T:min(start + self.sequences, low + last) * T + 1]
                h, _ = self._hidden(span[:-1].view(-1, T), (self.sequences, T))
                total += self._nll(h, span[1:], temperatures)
            yield high * T

    @torch.no_grad()
    def _windows(self, total: Tensor, temperatures: Sequence[float], chunk: int, stride: int,
                 batch: int) -> Iterator[int]:
        T, n = self.seq_len, self.targets
        windows = self.tokens[:-1].unfold(0, T, stride)                       # (W,T), a view
        targets = self.tokens[1:].unfold(0, T, stride)[:, T - stride:]        # (W,stride), a view
        rest, step = (n - T) % stride, -(-chunk // (batch * stride)) * batch
        if self.runtime.main:
            h, _ = self._hidden(self.tokens[:T].view(1, T), (batch, T))
            total += self._nll(h, self.tokens[1:T + 1], temperatures)
        for low in range(1, len(windows), step):  # without the first window
            high = min(low + step, len(windows))
            first, last = self._share(high - low)
            batches = range(low + first, low + last, batch)
            for index in progress_bar(batches, "sliding", self.runtime.main):
                part = slice(index, min(index + batch, low + last))
                h, _ = self._hidden(windows[part], (batch, T))
                total += self._nll(h[:, T - stride:], targets[part], temperatures)
            yield T + (high - 1) * stride
        if self.runtime.main and rest:
            h, _ = self._hidden(self.tokens[n - T:n].view(1, T), (batch, T))
            total += self._nll(h[:, T - rest:], self.tokens[n + 1 - rest:], temperatures)

    @torch.no_grad()
    def _pieces(self, total: Tensor, temperatures: Sequence[float], chunk: int,
                overlap: int | None) -> Iterator[int]:
        T, n, states, scored = self.seq_len, self.targets, None, 0
        piece = self.sequences * T if overlap is None else T
        later = piece if overlap is None or overlap >= T else T - overlap
        starts = [0, *range(piece, n, later)]
        for start, stop in progress_bar(list(zip(starts, [*starts[1:], n])), "carried",
                                        self.runtime.main):
            if self.runtime.main:
                shape = 1, later if start else piece  # only the last piece is padded
                h, states = self._hidden(self.tokens[start:stop].unsqueeze(0), shape, states)
                states = states if overlap is None else self.model.trim_states(states, overlap)
                total += self._nll(h, self.tokens[start + 1:stop + 1], temperatures)
            if stop - scored >= chunk or stop == n:
                scored = stop
                yield stop


# By ADAPT_PARAMS: roles of the parameters that test-time training changes.
ADAPT_ROLES = {"matrices": MATRICES, "embedding": (EMBEDDING, HEAD, CORRECTION),
               "scalars": (SCALAR, STATE, CONTROL)}


def adapt_roles(c: Config) -> list[str]:
    """Roles that ADAPT_PARAMS names; KeyError for an unknown word."""
    words = list(ADAPT_ROLES) if c.adapt_params == "all" else c.adapt_params.split(",")
    return [role for word in words for role in ADAPT_ROLES[word.strip()]]


def check_adapt(c: Config) -> Iterator[str]:
    """Faults of the knobs of test-time training."""
    try:
        adapt_roles(c)
    except KeyError:
        yield (f"ADAPT_PARAMS={c.adapt_params}: must be all, or some of "
               f"{', '.join(ADAPT_ROLES)}, joined by commas")


CHECKS.append(check_adapt)


class Adaptation(contextlib.AbstractContextManager):
    """SGD with momentum 0.9 on a model under evaluation; leaving the context puts the weights back.
    Masters, gradient and momentum are fp32 vectors over all parameters that learn."""

    def __init__(self, evaluator: Evaluator, c: Config):
        self.evaluator, self.config, roles = evaluator, c, adapt_roles(c)
        self.parameters = [p for _, role, p in named_roles(evaluator.model) if role in roles]
        self.before = [(p.detach().clone(), p.requires_grad) for p in self.parameters]
        self.master = self.flat(self.parameters)
        self.momentum = torch.zeros_like(self.master)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    @staticmethod
    def flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().float().flatten() for tensor in tensors])

    @torch.no_grad()
    def __exit__(self, *error) -> None:
        for parameter, (value, trained) in zip(self.parameters, self.before):
            parameter.copy_(value).requires_grad_(trained)

    def gradient(self, first: int, stop: int) -> Tensor:
        """Of the mean NLL of sequences that cover the targets first..stop and end with them; each
        rank computes its share."""
        e, T = self.evaluator, self.evaluator.seq_len
        rows, total = min(-(-(stop - first) // T), stop // T), torch.zeros_like(self.master)
        low, high = e._share(rows)
        tokens = e.tokens[stop - (rows - low) * T:stop - (rows - high) * T + 1]
        inputs, targets = (t.view(-1, T).split(e.sequences) for t in (tokens[:-1], tokens[1:]))
        for x, y in zip(inputs, targets) if low < high else ():
            with torch.enable_grad():
                h, _ = e._hidden(x, tuple(x.shape))
                loss, _ = token_loss_fused(
                    e.model.features(h).flatten(0, 1), e.model.head(), e.model.vocab_bias,
                    e.runtime.to_device(y.flatten()), softcap=e.model.softcap,
                    softcap_type=e.model.softcap_type)
                grads = torch.autograd.grad(loss * (len(x) / rows), self.parameters,
                                            materialize_grads=True)
            total += self.flat(grads)
        e.runtime.sum_(total)
        return total

    @torch.no_grad()
    def train(self, first: int, stop: int) -> None:
        """ADAPT_STEPS on the targets first..stop, which have been scored."""
        c = self.config
        lr = c.adapt_lr * (1 + math.cos(math.pi * first / self.evaluator.targets)) / 2
        for _ in range(c.adapt_steps):
            grad = self.gradient(first, stop)
            norm = grad.norm()
            limit = (c.adapt_clip or math.inf) / (norm + 1e-6)
            self.momentum.mul_(0.9).add_(torch.where(norm.isfinite(), grad * limit.clamp(max=1), 0))
            self.master.sub_(self.momentum, alpha=lr)
            sizes = [parameter.numel() for parameter in self.parameters]
            for parameter, value in zip(self.parameters, self.master.split(sizes)):
                parameter.copy_(value.view_as(parameter))


def best_temperature(score: Callable[[Sequence[float]], list[Score]]) -> float:
    """Temperature of the lowest loss: a coarse list, then +-0.06 around its best in steps of 0.02.
    `score` maps temperatures to scores."""
    def best_of(temperatures: list[float]) -> float:
        losses = [result.loss for result in score(temperatures)]
        return temperatures[losses.index(min(losses))]

    best = best_of([0.5, 0.7, 0.85, 0.95, 1.0, 1.1, 1.3, 1.5, 2.0])
    return best_of([round(best + 0.02 * i, 4) for i in range(-3, 4)])


class EvalPass(NamedTuple):
    """A way to score the stored model; result.json, the log, tools/ and README take it from here.
    `score` maps (evaluator, configuration, temperature) to a Score."""
    name: str    # result.json: <name>_val_loss, <name>_val_bpb
    label: str
    asked: Callable[[Config], bool]
    score: Callable[[Evaluator, Config, float], Score]
    carries: Callable[[Config], bool] = lambda c: False  # its temperature: with carried states


def carries(c: Config) -> bool:
    return c.eval_state == "carry"


PASSES = (
    EvalPass("roundtrip", "round trip", lambda c: True, lambda e, c, t: e.standard()[0]),
    EvalPass("tempered", "temperature-scaled", lambda c: c.temp_scaling,
             lambda e, c, t: e.standard([t], "tempered")[0]),
    EvalPass("sliding", "sliding window", lambda c: c.sliding_eval,
             lambda e, c, t: e.sliding(c.sliding_eval_stride, c.sliding_batch_size, t)),
    EvalPass("carried", "state carried through, one pass", carries,
             lambda e, c, t: e.carried([t], c.overlap)[0], carries),
    EvalPass("adapted", "test-time training, each chunk scored first", lambda c: c.eval_adapt,
             lambda e, c, t: e.adapted(c, t), carries))


def final_scores(evaluator: Evaluator, c: Config, calibration: Tensor | None,
                 log: Callable[[str], None]) -> dict[str, Any]:
    """Scores of PASSES for the weights read from the artifact, as result.json and MODE=eval report
    them. `calibration`: training tokens that the temperature is chosen on (None: temperature 1)."""
    result: dict[str, Any] = dict(temperature=None, sliding_stride=None)
    started = now()
    chosen = {False: c.temp_calib or 1.0, True: c.temp_calib or 1.0}  # by EvalPass.carries
    if c.temp_scaling and not c.temp_calib and calibration is not None:
        chosen = search_temperatures(evaluator.on(calibration), c)
    elif c.temp_scaling and not c.temp_calib:
        log("temperature: 1 (no unseen training tokens to choose one on)")
    result["temperature_seconds"] = now() - started
    for row in PASSES:
        result[f"{row.name}_val_bpb"] = None
        if not row.asked(c):
            continue
        t = chosen[row.carries(c)] if c.temp_scaling and row.name != "roundtrip" else 1.0
        started = now()
        if row.name != "tempered" or t != 1:  # else the round trip's score stands
            score = row.score(evaluator, c, t)
        result |= {f"{row.name}_val_loss": score.loss, f"{row.name}_val_bpb": score.bpb}
        how = f" stride:{c.sliding_eval_stride}" if row.name == "sliding" else ""
        how += f" temperature:{t:g}" if row.name != "roundtrip" else ""
        log(f"{row.name}{how} val_loss:{score.loss:.6f} val_bpb:{score.bpb:.6f}")
        if row.name == "adapted":
            result["adapted_seconds"] = now() - started
            log(f"adapted: {result['adapted_seconds']:.1f} s of the {EVAL_SECONDS} s of evaluation")
    if result["roundtrip_val_bpb"] > 8 and shards_source(c.data_path) is None:
        log("warning: more than 8 bits per byte: are these shards of the model's tokenizer? No "
            f"source.json in DATA_PATH={c.data_path} says it")
    if c.temp_scaling:
        result["temperature"] = chosen[False]
        result |= dict(carried_temperature=chosen[True]) if carries(c) else {}
    result["sliding_stride"] = c.sliding_eval_stride if c.sliding_eval else None
    return result


def search_temperatures(chooser: Evaluator, c: Config) -> dict[bool, float]:
    """The best temperature with states reset (False) and, if the scores ask for it, carried."""
    chosen = {False: best_temperature(chooser.standard), True: 1.0}
    if carries(c):
        chosen[True] = best_temperature(functools.partial(chooser.carried, overlap=c.overlap))
    return chosen


# Statistics of the latent: tensors in, numbers out; nan for values that are not finite.

def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the covariance's normalized eigenvalues, from 1 to L; x (...,L). Roy &
    Vetterli 2007, https://ieeexplore.ieee.org/document/7098875."""
    covariance = torch.cov(x.float().flatten(0, -2).T).double().reshape(x.size(-1), -1)
    if not bool(covariance.isfinite().all()):
        return math.nan
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    share = values / values.sum().clamp(min=1e-30)
    return float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum()))


def within_share(x: Tensor) -> float:
    """Share of the variance of x (B,T,L) that lies within sequences: 0 if each is constant, near 1
    if they are alike."""
    x = x.double()
    within = (x - x.mean(1, keepdim=True)).square().mean()
    return float(within / (x - x.mean((0, 1))).square().mean().clamp(min=1e-30))


def lag1_autocorrelation(x: Tensor) -> float:
    """sum (x_t - m)(x_{t+1} - m) / sqrt(sum (x_t - m)^2 sum (x_{t+1} - m)^2) of x (B,T,L), m its
    mean."""
    x = x.double() - x.double().mean((0, 1))
    a, b = x[:, :-1], x[:, 1:]
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp(min=1e-30))


def latent_statistics(name: str, x: Tensor) -> dict[str, float]:
    """The three statistics above of x (B,T,L), under `name`."""
    return {f"{name}_effective_rank": effective_rank(x), f"{name}_within_share": within_share(x),
            f"{name}_lag1_autocorrelation": lag1_autocorrelation(x)}


def predictability(prediction: Tensor, target: Tensor) -> float:
    """1 - MSE / variance of the target, each (B,S,L): 1 perfect, 0 no better than the mean."""
    target = target.double()
    variance = (target - target.mean((0, 1))).square().mean().clamp(min=1e-30)
    return float(1 - (prediction.double() - target).square().mean() / variance)


def gradient_shares(leaf: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
    """Norm of each weighted term's gradient in `leaf` relative to that of "ce", and its cosine with
    it. terms: name -> weighted loss, a function of leaf."""
    grads = {name: torch.autograd.grad(loss, leaf, retain_graph=True)[0].double().flatten()
             for name, loss in terms.items()}
    ce, shares = grads.pop("ce"), {}
    reference = ce.norm().clamp(min=1e-30)
    for name, grad in grads.items():
        norm = grad.norm()
        shares[f"{name}_grad_ratio"] = float(norm / reference)
        shares[f"{name}_grad_cosine"] = float(grad @ ce / (norm.clamp(min=1e-30) * reference))
    return shares


def linear_probe(h: Tensor, targets: Tensor, lengths: Tensor, vocab_size: int, steps: int,
                 seed: int) -> float:
    """Bits per byte of a linear classifier on frozen h (n,D), trained on the first 80% of the
    positions with `steps` steps of Adam (1e-3, batch 4096) and scored on the last 20%. targets
    (n,) ids, lengths (n,) their bytes."""
    cut, generator, nll = int(0.8 * len(h)), torch.Generator().manual_seed(seed), 0.0
    h = h.float()
    weight = torch.zeros(vocab_size, h.size(-1), device=h.device, requires_grad=True)
    bias = torch.zeros(vocab_size, device=h.device, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=1e-3)
    for _ in HEARTBEAT.follow(range(steps), "probe step"):
        batch = torch.randint(cut, (min(4096, cut),), generator=generator).to(h.device)
        adam.zero_grad()
        with torch.enable_grad():
            token_loss_fused(h[batch], weight, bias, targets[batch])[0].backward()
        adam.step()
    for part, ids in zip(h[cut:].split(1024), targets[cut:].split(1024)):
        nll += float(F.cross_entropy(F.linear(part, weight, bias).detach(), ids, reduction="sum"))
    return float(nll / math.log(2) / lengths[cut:].sum().clamp(min=1))


@torch.no_grad()
def input_moments(model: nn.Module, batches: Iterable, forward: Callable) -> dict[str, Tensor]:
    """Mean of x x^T (C,C) in fp64 over the inputs x of every Linear layer, by the layer's name."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, _: nn.Module, inputs: tuple) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
        sums[name] = sums.get(name, 0) + (x.T @ x).double()
        counts[name] = counts.get(name, 0) + len(x)

    hooks = [layer.register_forward_pre_hook(functools.partial(add, name))
             for name, layer in model.named_modules() if isinstance(layer, Linear)]
    try:
        for batch in batches:
            forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}


# ------------------------------------------------------------------------------
# training: build, warm up, one step, the loop, the end of a run
# ------------------------------------------------------------------------------

def count_parameters(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def build_models(c: Config, kernels: Kernels | None = None
                 ) -> tuple[LanguageModel, JepaHead | None]:
    """The stored model and the training-only head (None when every latent term is off), both
    initialized from SEED."""
    torch.manual_seed(c.seed)
    model = LanguageModel(c, kernels)
    return model, JepaHead(c) if c.latent_on else None


def memory_need(c: Config, cuda: bool) -> float:
    """Rough bytes of memory that MODE needs on one rank, rather too few than too many: weights and
    what training keeps of each, activations of a micro-batch or of a batch of validation. Infinite
    where a shape overflows."""
    try:
        with torch.device("meta"):  # shapes only
            weights = sum(map(count_parameters, build_models(c)))
    except (RuntimeError, OverflowError, TypeError, ValueError):
        return math.inf
    if c.mode == "describe":
        return 12 * weights  # initial, synthetic, symbols
    T, D, tokens = c.train_seq_len, c.model_dim, c.micro_tokens
    value = 2 if c.dtype == "bf16" or cuda and c.dtype == "auto" else 4  # bytes
    mixers = {"m": 6 * c.d_inner + 4 * c.d_state, "a": 4 * D}  # values per token that autograd keeps
    layers = [4 * D + mixers[letter] + (2 * c.mlp_mult * D if index % c.mlp_every == 0 else 0)
              for index, letter in enumerate(c.pattern)]
    states = 4 * c.d_inner * c.d_state * c.pattern.count("m")  # bytes per sequence
    latents = c.latent * (2 + c.predictor_hidden_mult) * c.jepa_steps if c.jepa_on else 0
    training = tokens * (value * (sum(layers) + latents) + states / (c.ssd_chunk or 64))
    if c.latent_on:
        training += 4 * c.micro_sequences * min(T, 64) * c.num_proj * c.sigreg_knots
    training *= 2 if c.compile_mode == "off" else 1  # eager: autograd keeps more of the steps between
    if c.carry_state:
        training += states * c.micro_sequences * c.micro_batches
    need = 4 * c.num_proj * c.latent + 16 * c.train_batch_tokens + 100 * c.micro_batches
    if c.mode == "bench":
        return need + training + 16 * weights  # fp32 masters, compute weights, gradients, moments
    limit = c.val_max_tokens or math.inf
    batch = min(c.val_batch_size // c.micro_batches, limit)
    if c.sliding_eval:
        batch = max(batch, T * min(c.sliding_batch_size, limit / c.sliding_eval_stride))
    validation = batch * value * (D * len(layers) + max(layers)) / 2  # skips, and half of a layer
    need += 16 * c.rounding_tokens if c.rounding == "compensated" else 0
    return need + max(training, validation) + 32 * weights  # two good states besides


def check_memory(c: Config, cuda: bool) -> None:
    """UserError if MODE needs more memory than this machine has, before anything large is made; the
    size knob that is furthest above its default is named."""
    need, memory = memory_need(c, cuda), machine_memory(cuda)
    need *= 1 if cuda else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if need > memory:
        excess = lambda name: getattr(c, name.lower()) / (Config.knobs()[name].default or c.model_dim)
        name = max(Config.tagged("size"), key=excess)
        amount = f"about {need / 1e9:,.1f} GB of memory" if need < 1e18 else "memory beyond measure"
        raise UserError(f"{name}={getattr(c, name.lower())}: MODE={c.mode} needs {amount}, and "
                        f"{memory / 1e9:,.1f} GB are here; lower it, or another of the sizes")


def keyed_generator(*key: int) -> torch.Generator:
    """A random generator that depends on the key alone: equal on every rank and after a resume."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def compiled(function: Callable, mode: str) -> Callable:
    """torch.compile as one graph with static shapes, or the function itself."""
    if mode == "off":
        return function
    torch._dynamo.config.recompile_limit = 64  # one graph per combination of terms
    how = dict(backend="aot_eager") if mode == "aot_eager" else dict(mode=mode)
    return torch.compile(function, fullgraph=True, dynamic=False, **how)


class Trainer:
    """Model, optimizer and data of a run, and the step that joins them."""

    def __init__(self, config: Config, runtime: Runtime, stream: TokenStream):
        c = self.config = config
        self.runtime, self.stream = runtime, stream
        self.kernels, self.note = choose_kernels(c, runtime)
        self.model, self.jepa = build_models(c, self.kernels)
        self.plan = storage_plan(self.model, c)
        directions = torch.randn(c.num_proj, c.latent, generator=keyed_generator(c.seed, 1))
        self.directions = F.normalize(directions, dim=-1).to(runtime.device)
        self.model.to(runtime.device)
        if self.jepa is not None:
            self.jepa.to(runtime.device)
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
        self.ahead: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of `read_ahead`
        self.losses = compiled(self._losses, c.compile_mode)
        self.forward = compiled(self.model, c.compile_mode) if runtime.cuda else self.model

    def _losses(self, x: Tensor, y: Tensor, positions: Tensor, weights: Tensor, states,
                active: Active) -> tuple[Tensor, Tensor, list | None]:
        """Weighted sum of TERMS, the terms without gradient (cross-entropy without z-loss), and the
        mixers' states under CARRY_STATE; one graph."""
        h, states = self.model(x, self.runtime.dtype, states)
        terms = loss_terms(self.config, self.model, self.jepa, h, y, positions, self.directions,
                           active)
        total = sum(weight * terms[name] for weight, name in zip(weights, TERMS) if name in terms)
        shown = terms | ({"ce": terms["nll"]} if "ce" in terms else {})
        zero = h.new_zeros((), dtype=torch.float32)
        parts = torch.stack([shown.get(name, zero).detach() for name in TERMS])
        return total, parts, map_states(torch.detach, states) if self.config.carry_state else None

    def step_inputs(self, step: int, micro: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, y (B,T) and SIGReg's positions of one micro-batch, on the device; randomness follows
        from (seed, step, micro-batch)."""
        x, y = self.ahead.pop((self.position, micro), None) or self.batches(self.position, micro)
        generator = keyed_generator(self.config.seed, 2, step, micro)
        positions = torch.randint(x.size(1), (min(64, x.size(1)),), generator=generator)
        return tuple(map(self.runtime.to_device, (x, y, positions)))

    def read_ahead(self) -> str:
        """Read this rank's batches of the next step. Returns the fault of a shard, or "": the step
        has not begun then, and all ranks can save and end together."""
        try:
            self.ahead = {(self.position, micro): self.batches(self.position, micro)
                          for micro in self.micros}
        except UserError as fault:
            return str(fault)
        return ""

    def accumulate(self, step: int, weights: LossWeights, keep_states: bool = True) -> Tensor:
        """Gradients of this rank's micro-batches, summed over ranks; returns this rank's share of
        the mean of TERMS."""
        c, parts = self.config, torch.zeros(len(TERMS), device=self.runtime.device)
        numbers = self.runtime.to_device(torch.tensor(weights[:len(TERMS)]))
        for micro in self.micros:
            inputs = self.step_inputs(step, micro)
            loss, terms, states = self.losses(*inputs, numbers, self.states[micro], weights.active)
            self.weights.begin_micro(last=micro == self.micros[-1])
            (loss / c.micro_batches).backward()
            parts += terms / c.micro_batches
            if c.carry_state and keep_states:  # clone: CUDA graphs overwrite outputs at a replay
                self.states[micro] = map_states(torch.clone, states)
        self.weights.finish_gradients()
        return parts

    def train_step(self, progress: Progress) -> Tensor:
        """One optimizer step: storage grid, batches, losses, gradients, update. Returns this rank's
        share of TERMS, then the gradient norm."""
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
        """On a busy CPU, the number of threads that makes forward and backward fastest: two that wait
        for each other may be slower than one. Returns a line for the log, "" if nothing changed."""
        limit = torch.get_num_threads()
        settled = self.runtime.cuda or self.runtime.world > 1 or "OMP_NUM_THREADS" in os.environ
        if settled or not busy_machine(1):
            return ""
        seconds, threads = {}, 1
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
            f"threads: {best} instead of {limit}, measured on this busy machine ({measured}); bits may "
            f"differ from those of a run with {limit}; OMP_NUM_THREADS={limit} sets their number")

    def warm_up(self) -> None:
        """Warm-up steps at the base rates, without QAT and clip. Weights, data position and
        randomness are then rolled back; the optimizer's moments stay."""
        c = self.config
        masters = [group.master.clone() for group in self.weights.groups]
        position, states, rng = self.position, dict(self.states), torch.get_rng_state()
        for step in progress_bar(range(c.warmup_steps), "warm-up step", self.runtime.main):
            self.weights.load()
            self.accumulate(step, loss_weights(0.0, c))
            self.optimizer.step(1.0, c.muon_momentum, clip=False)
            self.weights.zero_grad()
            self.position += self.batches.values_per_step()
        self.run_phases()
        for group, master in zip(self.weights.groups, masters):
            group.master.copy_(master)
        self.position, self.states = position, states
        torch.set_rng_state(rng)
        self.optimizer.reset_after_warmup(c.warmup_rollback == "all")

    def run_phases(self) -> None:
        """Compile ahead: forward and backward once for every combination of terms that the schedule
        will ask for. Changes nothing."""
        if self.config.compile_mode == "off":
            return
        self.weights.load()
        phases = {}
        for p in np.linspace(0, 1, 1001).tolist():
            weights = loss_weights(p, self.config)
            phases.setdefault(weights.active, weights)
        for weights in progress_bar([*phases.values()], "compilation", self.runtime.main):
            self.accumulate(0, weights, keep_states=False)
            self.weights.zero_grad()

    def prepare(self, resumed: bool) -> None:
        """Warm-up steps; on resume only the compilation."""
        try:
            self.run_phases() if resumed else self.warm_up()
        except torch.OutOfMemoryError:
            c = self.config
            raise UserError(
                f"out of GPU memory with micro-batches of {c.micro_sequences} x {c.train_seq_len} "
                f"tokens; raise MICRO_BATCHES={c.micro_batches} or take a smaller model") from None


class RunStopped(Exception):
    """A run that ended early on purpose: `code` is the exit code, the message says how to go on."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Signals:
    """SIGTERM, SIGHUP and SIGINT as a flag for the loop; a second SIGINT ends at once."""

    def __init__(self):
        self.caught, self.released = 0, False
        with contextlib.suppress(ValueError):  # outside the main thread, in tests
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, self._catch)

    def _catch(self, number: int, frame) -> None:
        if self.released:
            raise RunStopped(f"stopped by {signal.Signals(number).name} in the final evaluation; the "
                             "same command repeats it", 128 + number)
        if self.caught and number == signal.SIGINT:
            os._exit(128 + number)
        self.caught = number

    def release(self) -> None:
        """From now on signals act at once: a checkpoint can repeat the final evaluation."""
        self.released = True


class Stopwatch:
    """Training seconds: stands still while validating, goes on after a resume."""

    def __init__(self, seconds: float = 0.0):
        self.before, self.started = seconds, None

    def start(self) -> None:
        self.started = now()

    def stop(self) -> None:
        self.before, self.started = self.seconds(), None

    def seconds(self) -> float:
        return self.before + (now() - self.started if self.started is not None else 0.0)

    @contextlib.contextmanager
    def paused(self, runtime: Runtime) -> Iterator[None]:
        """Stand still inside the block; both ends wait for the GPU's queue."""
        runtime.synchronize()
        self.stop()
        yield
        runtime.synchronize()
        self.start()


def default_run_id(c: Config) -> str:
    """Kind, size, seed, time and a hash of the configuration."""
    kind = {"mamba2": "mamba2", "attention": "bytejepa"}.get(c.mixer, "hybrid")
    begun = datetime.now()
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:  # the same name after a restart by torchrun
        with contextlib.suppress(OSError):
            begun = datetime.fromtimestamp(os.stat(f"/proc/{os.getppid()}").st_ctime)
    digest = hashlib.sha256(repr(c.named()).encode()).hexdigest()[:6]
    size = f"{c.num_layers}x{c.model_dim}-seed{c.seed}"
    return f"{kind}-{c.tokenizer}-{size}-{begun:%Y%m%d-%H%M%S}-{digest}"


RUN_FILES = ("log.txt", "metrics.jsonl", "config.json", "model.jepa", "result.json", "curves.png")


class RunLock:
    """An exclusive lock on a run's folder, held as long as this object lives (kill -9 included)."""

    def __init__(self, path: Path):
        self.note, self.file = "", open(path / ".lock", "a+", encoding="utf-8")
        self.file.seek(0)
        self.holder = self.file.read(200).strip()  # of this lock, or the last one
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"RUN_ID={path.name}: {path} is in use by {self.holder or 'another run'};"
                            " stop that run, or choose another RUN_ID") from None
        except OSError as error:
            self.note = f"{path}: no file locks here ({error.strerror}); two runs must not share it"
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} of {os.getppid()} on {platform.node()}")
        self.file.flush()


def open_run(c: Config, runtime: Runtime) -> tuple[Path, Checkpoints, RunLock | None]:
    """The run's folder, its checkpoints and, on rank 0, its lock. Rank 0 decides for all ranks. A
    finished run is refused unless OVERWRITE=1, which removes it."""
    restarts, locks = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), []

    def decide() -> str:
        base = c.run_id or default_run_id(c)
        for number in itertools.count(1):
            path = Path(c.runs_dir) / (base if number == 1 else f"{base}-{number}")
            try:
                path.mkdir(parents=True, exist_ok=bool(c.run_id) or restarts > 0)
                lock = RunLock(path)
            except FileExistsError:
                if c.run_id:  # a file
                    raise UserError(f"RUN_ID={c.run_id}: {path} is no folder") from None
                continue      # another run with a default name
            except OSError as error:
                raise UserError(f"RUNS_DIR={c.runs_dir}: {path} cannot be used "
                                f"({error.strerror})") from error
            if c.run_id or not restarts or f"of {os.getppid()} " in lock.holder:
                locks.append(lock)
                return path.name

    path = Path(c.runs_dir) / runtime.main_first(decide)
    checkpoints, finished = checkpoints_of(c, path), (path / "result.json").exists()

    def clear() -> None:
        if c.overwrite and not restarts:
            for old in [path / name for name in RUN_FILES] + checkpoints.paths():
                old.unlink(missing_ok=True)
        elif finished:
            if not (path / "curves.png").exists():  # the run was killed just before it
                plot_curves(path)
            raise UserError(f"RUN_ID={path.name}: {path} holds a finished run; choose another "
                            "RUN_ID, or OVERWRITE=1")
        for left in path.glob(".*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        if c.checkpoint_dir:
            checkpoints.probe()

    def prepare() -> None:
        try:
            clear()
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be changed ({error.strerror})") from error

    runtime.main_first(prepare)
    return path, checkpoints, locks[0] if locks else None


def checkpoints_of(c: Config, path: Path) -> Checkpoints:
    """In the run's folder, or in a folder of its name under CHECKPOINT_DIR; runs share none."""
    folder = Path(c.checkpoint_dir) / path.name if c.checkpoint_dir else path / "checkpoints"
    return Checkpoints(folder, c.checkpoint_keep)


class Run:
    """One training run, from the first line of its log to result.json."""

    def __init__(self, config: Config, runtime: Runtime):
        """Read the data and build the trainer, so that faults of data and settings show before a
        file is made."""
        self.config, self.runtime = config, runtime
        runtime.main_first(lambda: check_memory(config, runtime.cuda))
        HEARTBEAT.doing = "reading the shards"
        self.vocabulary = load_vocabulary(config)
        check_source(config, self.vocabulary)
        validation = load_validation(config)
        stream = TokenStream(find_shards(config.data_path, "train"), config.vocab_size)
        self.trainer = Trainer(config, runtime, stream)
        self.evaluator = Evaluator(
            self.trainer.model, validation, self.vocabulary, config.train_seq_len,
            max(1, config.val_batch_size // config.micro_batches), runtime, self.trainer.forward)
        self.step, self.clock, self.stage = 0, Stopwatch(), ""
        self.score, self.validated = None, -1  # of the last validation: its score and its step
        self.folder = None
        self.good: list[tuple[int, dict, dict]] = []  # the last two snapshots, see `remember`
        self.saved_at = 0.0   # training seconds at the last checkpoint
        self.busy = self.runtime.cuda        # whether the log needs no word on a busy machine
        self.pace = (0, 0.0, math.inf)  # at the last step:... line: step, seconds; fastest seconds/step
        self.reserve = 0.0    # seconds of MAX_WALLCLOCK_SECONDS for what reads training data later
        self.moments_seconds = 0.0

    def open(self) -> None:
        """Open the run's folder, go on from its newest checkpoint if it has one, and warm up."""
        self.signals = Signals()
        path, self.checkpoints, self.lock = open_run(self.config, self.runtime)
        notes = [self.lock.note] if self.lock and self.lock.note else []
        saved = self.load_checkpoint(path, notes.append)
        journals = saved["journals"] if saved else {"metrics.jsonl": 0}
        self.folder = RunFolder(path, self.runtime.main, journals)
        self.log = self.folder.log
        for note in notes:
            self.log(note)
        if saved:
            self.log(f"resumed at step {self.step} after {self.clock.seconds():.1f} s of training")
            for line in differences(saved["config"], self.config.named()):
                self.log(f"changed since the checkpoint: {line}")
        else:
            self.log_head()
        self.folder.write_json("config.json", self.config.named())
        if self.runtime.main:
            self.folder.track = open_tracker(self.config, path)
        if not saved and self.config.warmup_steps:
            self.log(f"warm-up: {self.config.warmup_steps} steps, rolled back afterwards")
        HEARTBEAT.doing = "first steps"
        if note := self.trainer.choose_threads():
            self.log(note)
        self.trainer.prepare(resumed=saved is not None)
        if cap := self.config.max_wallclock_seconds:
            self.reserve = self.config.reserve_seconds or min(self.measure_reserve(), cap / 2)
            self.log(f"clock: {self.reserve:.1f} s of MAX_WALLCLOCK_SECONDS={cap:g} are kept for "
                     "GPTQ's moments and the temperature search")

    def measure_reserve(self) -> float:
        """Seconds for what reads training data after the last step: GPTQ's moments and the
        temperature search, timed on one batch, and a quarter more. Equal on all ranks."""
        c, runtime, total = self.config, self.runtime, 0.0
        batch = self.evaluator.sequences * c.train_seq_len
        search = lambda count: search_temperatures(self.evaluator.on(self.next_tokens(count)), c)
        jobs = [(self.layer_moments, c.rounding_tokens)] if c.rounding == "compensated" else []
        if c.temp_scaling and not c.temp_calib:
            jobs.append((search, CALIBRATION))
        for work, count in jobs:
            if runtime.cuda:
                work(batch)  # compiles
            runtime.synchronize()
            started = now()
            work(batch)
            runtime.synchronize()
            total += (now() - started) * max(1.0, count / batch)
        return runtime.agree(1.25 * total)[0]

    def log_head(self) -> None:
        """Source, versions, hardware and configuration."""
        c, trainer, evaluator = self.config, self.trainer, self.evaluator
        source = source_text()
        self.log(source, console=False)
        digest = hashlib.sha256(source.encode()).hexdigest()
        self.log(f"script: {len(source.encode())} bytes, sha256 {digest}", console=False)
        self.log("\n" + c.render() + "\n", console=False)
        facts = self.runtime.describe()
        self.log("machine: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
        stored, extra = count_parameters(trainer.model), count_parameters(trainer.jepa)
        self.log(f"run: {self.folder.path}  parameters: {stored:,} stored + {extra:,} "
                 "training-only")
        self.log(f"data: {len(trainer.stream):,} training tokens, {evaluator.targets:,} validation "
                 f"tokens = {evaluator.bytes:,} bytes; documents begin with token "
                 f"{self.vocabulary.bos_id} (0 bytes)")
        if trainer.note:
            self.log(trainer.note)
        self.log(f"scan: {trainer.kernels.name}; compile: {c.compile_mode}; step: "
                 f"{c.train_batch_tokens:,} tokens in {c.micro_batches} micro-batches on "
                 f"{self.runtime.world} rank(s)")
        if not self.runtime.cuda and (busy := busy_machine()):
            self.busy = True
            self.log(f"busy: {busy}; other processes slow this run down, and under a time limit it "
                     "does fewer steps")

    def train(self) -> None:
        """The loop: agree on the clock, validate when due, step, log, save."""
        c, trainer, runtime, clock = self.config, self.trainer, self.runtime, self.clock
        clock.start()
        while True:
            seconds = clock.seconds() if runtime.main else -math.inf
            fault = trainer.read_ahead()
            elapsed, caught, bad = runtime.agree(seconds, self.signals.caught, bool(fault))
            progress = measure_progress(self.step, c.iterations, elapsed,
                                        max(c.max_wallclock_seconds - self.reserve, 0.0))
            finished = progress.fraction >= 1
            due = finished or c.val_loss_every and self.step % c.val_loss_every == 0
            if due and self.step != self.validated:
                with clock.paused(runtime):
                    self.validate(elapsed)
            if finished:
                break
            if caught:
                self.stop(int(caught))
            if bad:
                self.save(elapsed)
                self.checkpoints.wait()
                faults = [text for text in runtime.collect(fault) if text]
                raise UserError(f"{faults[0]}; the state of step {self.step} is saved")
            stage = loss_weights(progress.fraction, c).stage
            if stage != self.stage and c.loss_schedule == "staged":
                self.log(f"stage: {stage} begins at step {self.step} "
                         f"(progress {progress.fraction:.3f})")
            self.stage = stage
            self.remember(elapsed)
            HEARTBEAT.doing = f"step {self.step + 1}, {100 * progress.fraction:.0f}% of the training"
            parts = trainer.train_step(progress)
            self.step += 1
            if self.step % c.train_log_every == 0 or self.step <= 10:
                self.log_step(progress, parts)
            self.guard(progress, force=self.step % max(c.train_log_every, c.nonfinite_limit) == 0)
            if self.checkpoint_due(progress, elapsed):
                self.save(clock.seconds())
        clock.stop()
        if c.checkpoint_every:
            self.save(clock.seconds())
        self.checkpoints.wait()
        self.signals.release()

    def checkpoint_due(self, progress: Progress, elapsed: float) -> bool:
        """After CHECKPOINT_EVERY steps; without it every ten minutes of a run longer than thirty.
        Not in a row of steps that were skipped."""
        every, due = self.config.checkpoint_every, False
        if every:
            due = self.step % every == 0
        elif elapsed - self.saved_at >= 600 and elapsed > 1800 * progress.fraction:
            if not self.saved_at:
                self.log("checkpoints: every 10 minutes (CHECKPOINT_EVERY sets another interval)")
            due = True
        return due and not self.trainer.optimizer.skipped_in_row

    def remember(self, elapsed: float) -> None:
        """Keep copies of recent states on the device, for a run that diverges. Of two that are some
        steps apart, at least the older was followed by a finite loss and norm."""
        every = self.config.train_log_every if self.runtime.cuda else self.config.nonfinite_limit
        if self.step % every == 0 and not self.trainer.optimizer.skipped_in_row:
            meta, tensors = self.snapshot(elapsed)
            copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self.good = [*self.good[-1:], (self.step, meta, copies)]

    def term_names(self) -> list[str]:
        """Names of TERMS in the log: the anti-collapse term goes by its kind."""
        return [self.config.anticollapse if name == "anti" else name for name in TERMS]

    def log_step(self, progress: Progress, parts: Tensor) -> None:
        """The step:... line and metrics of the step just done. Only here does the loop wait for the
        device."""
        c, total = self.config, parts[:-1].clone()
        self.runtime.sum_(total)
        values, norm = total.tolist(), float(parts[-1])
        seconds, scale = self.runtime.from_main(self.clock.seconds()), lr_scale(progress, c)
        active = loss_weights(progress.fraction, c).active
        shown = " ".join(f"{name}:{value:.4f}" for name, value, on
                         in zip(self.term_names(), values, active) if on)
        left = seconds * (1 - progress.fraction) / max(progress.fraction, 1e-9)
        eta = f" eta:{int(left) // 60}:{int(left) % 60:02d}" if progress.fraction > 1e-4 else ""
        self.log(f"step:{self.step} {100 * progress.fraction:.0f}%{eta} {shown} grad_norm:{norm:.3f} "
                 f"lr_scale:{scale:.3f} time:{seconds:.1f}s "
                 f"step_avg:{1e3 * seconds / self.step:.1f}ms "
                 f"tok/s:{self.trainer.tokens / max(seconds, 1e-9):.0f}")
        self.watch_pace(seconds)
        terms = {name: value if on else None for name, value, on in zip(TERMS, values, active)}
        self.folder.metric(kind="train", step=self.step, progress=progress.fraction, **terms,
                           grad_norm=norm, lr_scale=scale, seconds=seconds,
                           skipped=int(self.trainer.optimizer.skipped))

    def watch_pace(self, seconds: float) -> None:
        """Say once if steps take three times as long as the fastest and the machine is busy."""
        step, before, fastest = self.pace
        pace = (seconds - before) / (self.step - step)
        self.pace = self.step, seconds, min(pace, fastest)
        if not self.busy and pace > 3 * fastest and (busy := busy_machine(1)):
            self.busy = True
            self.log(f"busy: {1e3 * pace:.0f} ms a step, {1e3 * fastest:.0f} ms at best; {busy}")

    def validate(self, elapsed: float) -> Score:
        """Standard score of the masters, or of their EMA where it has begun."""
        self.trainer.weights.load("average")
        score = self.evaluator.standard()[0]
        self.log(f"step:{self.step} val_loss:{score.loss:.4f} "
                 f"val_bpb:{score.bpb:.4f} train_time:{elapsed:.1f}s")
        HEARTBEAT.doing = "statistics of the latent"
        latent = self.latent_report() if self.config.diagnostics else {}
        self.folder.metric(kind="validation", step=self.step, val_loss=score.loss,
                           val_bpb=score.bpb, seconds=elapsed, **latent)
        self.score, self.validated = score, self.step
        return score

    def guard(self, progress: Progress, force: bool) -> None:
        """Stop after NONFINITE_LIMIT non-finite steps in a row; name the terms and the layers."""
        optimizer, trainer, c = self.trainer.optimizer, self.trainer, self.config
        if self.runtime.cuda and not force or optimizer.skipped_in_row < c.nonfinite_limit:
            return
        used = trainer.batches.values_per_step()
        trainer.weights.load(qat=qat_on(progress.fraction, c.qat_fraction))
        trainer.position -= used  # run the failing batch once more
        weights = loss_weights(progress.fraction, c)
        parts = trainer.accumulate(progress.step, weights, keep_states=False)
        trainer.position += used
        self.runtime.sum_(parts)
        terms = [name for name, value in zip(self.term_names(), parts.tolist())
                 if not math.isfinite(value)]
        layers = [name for group in trainer.weights.groups if group.touched
                  for name, grad in zip(group.names, group.grad) if not grad.isfinite().all()]
        trainer.weights.zero_grad()
        if not terms and not layers:
            layers = ["none, but the gradient's norm overflows"]
        skipped = int(optimizer.skipped_in_row)
        good = self.save_good_state(self.step - skipped)
        raise RunStopped(
            f"stopped at step {self.step}: {skipped} steps in a row had a non-finite gradient; "
            f"terms: {', '.join(terms) or 'all finite'}; layers: {', '.join(layers[:4]) or 'none'}; "
            f"the last good state, of step {good}, is saved: lower rates and "
            f"RESUME_AFTER_DIVERGENCE=1 RUN_ID={self.folder.path.name} go on from it", 1)

    def save_good_state(self, last_finite: int) -> int:
        """Make the newest state that was followed by a finite step the newest checkpoint; returns its
        step. Later checkpoints, which lead to the divergence, are removed."""
        self.checkpoints.wait()
        good = [snapshot for snapshot in self.good if snapshot[0] < max(last_finite, 1)]
        step, meta, tensors = good[-1]
        if self.runtime.main:
            for path in self.checkpoints.paths():
                if int(path.stem.removeprefix("step_")) >= max(last_finite, 1):
                    path.unlink()
            self.checkpoints.save(step, meta, tensors)
            self.checkpoints.wait()
        return step

    def stop(self, number: int) -> None:
        """End on a signal: save and leave with 128 + its number."""
        self.save(self.clock.seconds())
        self.checkpoints.wait()
        name = signal.Signals(number).name
        raise RunStopped(f"stopped by {name} after step {self.step}; the same command with "
                         f"RUN_ID={self.folder.path.name} goes on from there", 128 + number)

    def save(self, seconds: float) -> None:
        """Hand a snapshot to the checkpoint writer."""
        meta, tensors = self.snapshot(seconds)
        self.saved_at = seconds
        if self.runtime.main:
            self.checkpoints.save(self.step, meta, tensors)

    def snapshot(self, seconds: float) -> tuple[dict, dict[str, Tensor]]:
        """Everything a checkpoint holds: JSON-able meta data and tensors (views, on their device)."""
        trainer, weights = self.trainer, self.trainer.weights
        averaged = weights.groups[0].average is not None
        meta = dict(step=self.step, seconds=seconds, position=trainer.position,
                    tokens=trainer.tokens, stage=self.stage, journals=self.folder.sizes(),
                    fixed=self.config.fixed(), config=self.config.named(), averaged=averaged,
                    validated=self.validated, score=self.score)
        parts = {"master": weights.tensors(), "optimizer": trainer.optimizer.state()}
        if averaged:
            parts["average"] = weights.tensors("average")
        tensors = {f"{part}/{name}": t
                   for part, named in parts.items() for name, t in named.items()}
        tensors |= {"directions": trainer.directions, "rng": torch.get_rng_state()}
        own = {name: tensor.cpu() for name, tensor in self.named_states().items()}
        for states in self.runtime.collect(own) if self.config.carry_state else ():
            tensors |= states
        return meta, tensors

    def named_states(self) -> dict[str, Tensor]:
        """CARRY_STATE: the mixers' states of this rank's micro-batches, by name."""
        return {f"state/{micro}/{layer}/{index}": tensor
                for micro, states in self.trainer.states.items()
                for layer, state in enumerate(states or ()) for index, tensor in enumerate(state)}

    def load_checkpoint(self, path: Path, note: Callable[[str], None]) -> dict | None:
        """Restore the newest valid checkpoint and return its meta data; refuse one of another
        model or data."""
        newest = self.checkpoints.newest(note)
        if newest is None:
            return None
        try:
            self.restore(path, *newest)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"{self.checkpoints.folder}: the newest checkpoint is not one of this run "
                f"({type(error).__name__}: {str(error)[:80]}); move it away") from error
        return newest[0]

    def restore(self, path: Path, meta: dict, tensors: dict[str, Tensor]) -> None:
        """A checkpoint's contents into run and trainer; a foreign one raises an error that the
        caller names."""
        numbers = [meta[key] for key in ("step", "position", "tokens", "seconds")]
        sane = all(number >= 0 for number in (*numbers, *meta["journals"].values()))
        if not sane or not isinstance(meta["config"], dict):
            raise ValueError("its meta data")
        old, new = meta["fixed"], self.config.fixed()
        free = []
        if not old["QAT_FRACTION"] and not new["QAT_FRACTION"]:  # no training on the grid
            free += Config.tagged("grid")
        if self.config.resume_after_divergence:
            free += Config.tagged("rate")
        if lines := differences(old, new, but=free):
            raise UserError(f"RUN_ID={path.name}: its checkpoint was made with other settings; "
                            "undo these, or start another RUN_ID:\n"
                            + "\n".join("  " + line for line in lines))
        trainer = self.trainer
        part = lambda prefix: {name.removeprefix(prefix): t for name, t in tensors.items()
                               if name.startswith(prefix)}
        trainer.weights.restore("master", part("master/"))
        if meta["averaged"]:
            trainer.weights.restore("average", part("average/"))
        trainer.optimizer.load_state(part("optimizer/"))
        trainer.directions.copy_(checked_tensor(tensors, "directions", trainer.directions))
        torch.set_rng_state(tensors["rng"])
        for name, tensor in self.named_states().items():
            tensor.copy_(checked_tensor(tensors, name, tensor))
        trainer.position, trainer.tokens = int(meta["position"]), int(meta["tokens"])
        self.step, self.clock = int(meta["step"]), Stopwatch(float(meta["seconds"]))
        self.stage = meta["stage"]
        self.validated = int(meta["validated"])
        if meta["score"]:  # null stands for a number that was not finite
            self.score = Score(*(math.nan if value is None else value for value in meta["score"]))

    def finish(self) -> dict[str, Any]:
        """After the last step: diagnostics, artifact, reload, all scores of the reloaded file,
        result.json."""
        c, trainer, runtime, started = self.config, self.trainer, self.runtime, now()
        facts: dict[str, Any] = {}
        if trainer.weights.groups[0].average is not None:
            trainer.weights.load("master")
            facts["last_val_bpb"] = self.evaluator.standard()[0].bpb
            self.log(f"last weights: val_bpb:{facts['last_val_bpb']:.6f}; "
                     f"averaged weights: val_bpb:{self.score.bpb:.6f}")
        for name, weight in trainer.weights.tensors("average").items():
            if not all_finite(weight):
                raise RunStopped(f"the last steps diverged: {name} holds NaN or infinity and cannot "
                                 "be stored; lower the learning rates", 1)
        trainer.weights.load("average")
        diagnostics = self.diagnose() if c.diagnostics else {}
        report = self.write_model()
        model_path = self.folder.path / "model.jepa"
        load_artifact_into(trainer.model, model_path)
        calibration = None
        if self.unseen_position() is not None and c.temp_scaling and not c.temp_calib:
            try:
                calibration = runtime.main_first(lambda: self.next_tokens(CALIBRATION))
            except UserError as error:
                self.log(f"no temperature search: {error}")
        scores = final_scores(self.evaluator, c, calibration, self.log)
        seconds = self.clock.seconds()
        data_seconds = seconds + self.moments_seconds + scores["temperature_seconds"]
        if cap := c.max_wallclock_seconds:
            self.log(f"clock: training {seconds:.1f} s + moments {self.moments_seconds:.1f} s + "
                     f"temperature search {scores['temperature_seconds']:.1f} s = "
                     f"{data_seconds:.1f} s: {'WITHIN' if data_seconds <= cap else 'OVER'} {cap:g} s")
        result = dict(
            run_id=self.folder.path.name, steps=self.step, train_seconds=seconds,
            data_seconds=data_seconds,
            ms_per_step=1e3 * seconds / max(self.step, 1),
            tokens_per_second=trainer.tokens / max(seconds, 1e-9),
            val_loss=self.score.loss, val_bpb=self.score.bpb, **facts, **scores,
            **self.size_facts(report), artifact_sha256=file_hash(model_path),
            script_sha256=hashlib.sha256(source_text().encode()).hexdigest(),
            eval_params=count_parameters(trainer.model),
            train_only_params=count_parameters(trainer.jepa), world_size=runtime.world,
            seed=c.seed, device=runtime.describe()["device"],
            skipped_steps=int(trainer.optimizer.skipped), peak_memory_bytes=runtime.peak_memory(),
            eval_seconds=now() - started, diagnostics=diagnostics, machine=runtime.describe())
        self.folder.write_json("result.json", result)
        if runtime.main:
            HEARTBEAT.doing = "drawing curves.png"
            try:
                plot_curves(self.folder.path)
            except OSError as error:
                self.log(f"curves.png cannot be written ({error.strerror})")
        HEARTBEAT.doing = ""
        self.log(f"done: {self.folder.path}  roundtrip_val_bpb:{result['roundtrip_val_bpb']:.6f} "
                 f"eval_time:{result['eval_seconds']:.1f}s")
        if not math.isfinite(result["roundtrip_val_bpb"]):
            raise RunStopped("the final score is not finite: the stored model predicts nothing; lower "
                             "the learning rates, or mend LOGIT_SOFTCAP and the like", 1)
        return result

    def size_facts(self, report: dict[str, Any]) -> dict[str, Any]:
        """Artifact and code against SIZE_LIMIT, logged and returned."""
        code = len(shipped_script(source_text()))
        total = report["bytes"] + code
        self.log(f"size: artifact {report['bytes']:,} ({report['codec']}) + code {code:,} = "
                 f"{total:,} bytes: {'FITS' if total <= SIZE_LIMIT else 'OVER'} {SIZE_LIMIT:,}")
        return dict(artifact_bytes=report["bytes"], code_bytes=code, total_bytes=total,
                    fits=total <= SIZE_LIMIT, codec=report["codec"],
                    codec_bytes=report["codec_bytes"])

    def write_model(self) -> dict[str, Any]:
        """Write model.jepa on rank 0; every rank gets its report."""
        c, trainer = self.config, self.trainer
        weights = trainer.weights.tensors("average")
        header = dict(model=c.model_config(), vocabulary=self.vocabulary.pack(),
                      position=self.unseen_position())

        def write() -> dict:
            stored = ((name, weights[name]) for name in trainer.plan)
            tensors = artifact_tensors(stored, trainer.plan)
            rounded = self.compensate(tensors) if c.rounding == "compensated" else None
            return write_artifact(self.folder.path / "model.jepa", header, tensors, given=rounded)

        self.log(f"coding: {sum(w.numel() for w in weights.values()):,} weights, by each of "
                 f"{', '.join(name for name, codec in CODECS.items() if codec.module)}")
        HEARTBEAT.doing = "coding the artifact"
        report = self.runtime.main_first(write)
        HEARTBEAT.doing = "reading the artifact"
        sizes = ", ".join(f"{name} {size:,}" for name, size in report["codec_bytes"].items())
        self.log(f"artifact: {report['bytes']:,} bytes with {report['codec']} ({sizes}); "
                 f"entropy {report['entropy_bytes']:,}")
        return report

    def unseen_position(self) -> int | None:
        """Where unseen training tokens begin. None after a full epoch: calibrating on seen tokens
        biases the temperature low."""
        position = self.trainer.position
        return position if position + CALIBRATION < self.trainer.batches.span() else None

    def next_tokens(self, count: int) -> Tensor:
        """About `count` training tokens from where the next step would read on."""
        return calibration_tokens(self.trainer.stream, self.trainer.position,
                                  self.config.train_seq_len, count)

    def layer_moments(self, count: int) -> dict[str, Tensor]:
        """`input_moments` over about `count` training tokens, of the model on its plain grid, which
        is close to what the layers will see."""
        trainer = self.trainer
        trainer.weights.load("average", qat=True)
        sequences = self.next_tokens(count)[:-1].view(-1, self.config.train_seq_len)
        forward = lambda x: trainer.model(self.runtime.to_device(x), self.runtime.dtype)
        return input_moments(trainer.model, sequences.split(self.evaluator.sequences), forward)

    def compensate(self, tensors: dict[str, tuple[Tensor, Grid]]) -> dict[str, dict[str, Tensor]]:
        """Arrays of the INT matrices, rounded by their effect on the layer's output over
        ROUNDING_TOKENS of training text."""
        c, trainer, started = self.config, self.trainer, now()
        moments = self.layer_moments(c.rounding_tokens)
        self.runtime.synchronize()
        self.moments_seconds = now() - started
        arrays, shares = {}, []
        for name, (w, grid) in tensors.items():
            layer = name.partition("[")[0].removesuffix(".weight")
            if isinstance(grid, RowGrid) and layer in moments:
                arrays[name], share = round_compensated(w, grid, moments[layer])
                shares.append(share)
        trainer.weights.load("average")
        self.log(f"rounding: {len(arrays)} matrices compensated on {c.rounding_tokens:,} training "
                 f"tokens in {now() - started:.1f}s; output error "
                 f"x{np.median(shares or [1]):.3f} of plain rounding's (median)")
        return arrays

    def latent_report(self) -> dict[str, float]:
        """Statistics of h and z on a micro-batch of validation text, with the weights as loaded."""
        c, trainer, jepa = self.config, self.trainer, self.trainer.jepa
        to = self.runtime.to_device
        tokens = self.evaluator.tokens[:c.micro_sequences * c.train_seq_len + 1]
        x, y = (to(t.view(-1, c.train_seq_len)) for t in (tokens[:-1], tokens[1:]))
        with torch.no_grad():
            h, _ = trainer.model(x, self.runtime.dtype)
            report = latent_statistics("h", h)
            if jepa is None:
                return report
            z = jepa.project(h)
            positions = to(torch.linspace(0, c.train_seq_len - 1, 64).long().unique())
            value = float(sigreg(z[:, positions], trainer.directions, c.sigreg_knots))
            report |= latent_statistics("z", z) | dict(
                z_dim=z.size(-1), sigreg=value,
                sigreg_over_null=value / sigreg_null(len(z), c.sigreg_knots))
            if c.jepa_on:
                pairs = rollout(jepa, z, c.jepa_steps)
                report |= {f"predictability_{k}": predictability(*pair)
                           for k, pair in enumerate(pairs, 1)}
        weights = loss_weights(0.5 if c.loss_schedule == "staged" else 0.0,
                               dataclasses.replace(c, sigreg_schedule=False))
        leaf = h.detach().requires_grad_()
        with torch.enable_grad():
            terms = loss_terms(c, trainer.model, jepa, leaf, y, positions, trainer.directions,
                               weights.active._replace(ce=True))
            terms = {name: (1.0 if name == "ce" else weight) * terms[name]
                     for name, weight in zip(TERMS, weights) if name in terms}
            return report | gradient_shares(leaf, terms)

    @torch.no_grad()
    def diagnose(self) -> dict[str, Any]:
        """On at most 50,000 validation tokens: statistics of the latent, cosine and MSE of the
        prediction, accuracy, linear probe."""
        c, trainer, evaluator, model = self.config, self.trainer, self.evaluator, self.trainer.model
        self.log("diagnosing: statistics of the latent, accuracy, linear probe of "
                 f"{c.probe_steps} steps")
        HEARTBEAT.doing = "statistics of the latent"
        report: dict[str, Any] = self.latent_report()
        rows = min(50_000, evaluator.targets) // c.train_seq_len or 1
        tokens = evaluator.tokens[:rows * c.train_seq_len + 1]
        targets, hidden, hits = tokens[1:].to(self.runtime.device), [], torch.zeros(3)
        cosine, error, count = 0.0, 0.0, 0
        batches = tokens[:-1].view(-1, c.train_seq_len).split(evaluator.sequences)
        for x in progress_bar(batches, "hidden states", self.runtime.main):
            h, _ = model(self.runtime.to_device(x), self.runtime.dtype)
            hidden.append(h.flatten(0, 1))
            if c.jepa_on:
                prediction, target = next(rollout(trainer.jepa, trainer.jepa.project(h), 1))
                prediction, target = prediction.float(), target.float()
                cosine += float(F.cosine_similarity(prediction, target, dim=-1).sum())
                error += float((prediction - target).square().mean(-1).sum())
                count += target.size(0) * target.size(1)
        h = torch.cat(hidden)
        for part, ids in zip(h.split(1024), targets.split(1024)):
            right = model.logits(part).topk(min(10, c.vocab_size)).indices == ids.unsqueeze(-1)
            hits += torch.stack([right.float().cpu()[:, :k].sum() for k in (1, 5, 10)])
        accuracy = (hits / len(targets)).tolist()
        report |= dict(zip(("top1_accuracy", "top5_accuracy", "top10_accuracy"), accuracy))
        if c.jepa_on:
            report |= dict(jepa_cosine=cosine / count, jepa_mse=error / count)
        if c.probe_steps:
            lengths = self.vocabulary.target_bytes(tokens[:-1], tokens[1:]).to(self.runtime.device)
            report["probe_bpb"] = linear_probe(h, targets, lengths, c.vocab_size, c.probe_steps,
                                               c.seed)
        shown = " ".join(f"{name}:{value:.4g}" for name, value in report.items())
        self.log(f"diagnostics {shown}")
        return report


CALIBRATION = 65_536  # training tokens that the temperature is chosen on


def calibration_tokens(stream: TokenStream, position: int, seq_len: int,
                       count: int = CALIBRATION) -> Tensor:
    """About `count` training tokens from `position`, in whole sequences, for temperature and
    rounding."""
    return torch.from_numpy(stream.read(position, max(count // seq_len, 1) * seq_len + 1))


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@torch.no_grad()
def load_artifact_into(model: LanguageModel, path: Path) -> None:
    """Read the file and put its tensors into the model; UserError unless names and shapes are
    exactly the model's."""
    _, parts, _ = read_artifact(path)
    parameters, tensors = dict(model.named_parameters()), whole_tensors(parts, path)
    if shapes_of(parameters) != shapes_of(tensors):
        raise UserError(f"{path}: an artifact of another model: names or shapes differ from this "
                        "configuration's")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def read_metrics(path: Path) -> list[dict]:
    """Lines of metrics.jsonl; a last line that is still being written is left out."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def plot_curves(folder: Path) -> None:
    """curves.png over steps: cross-entropy, the other loss terms (log scale), validation BPB.
    Without matplotlib there is none."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    lines = read_metrics(folder / "metrics.jsonl")
    series = lambda kind, name: [(m["step"], m[name]) for m in lines
                                 if m.get("kind") == kind and m.get(name) is not None]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    colors = {"ce": "#0072B2", "jepa": "#E69F00", "anti": "#009E73", "cov": "#CC79A7"}  # Okabe-Ito
    for name, label in zip(TERMS, ("cross-entropy", "JEPA", "anti-collapse", "covariance")):
        if points := series("train", name):
            axes = left if name == "ce" else middle
            marker = "." if len(points) < 40 else None
            axes.plot(*zip(*points), label=label, color=colors[name], marker=marker)
    left.set(xlabel="step", ylabel="nats per token", title="Training cross-entropy")
    middle.set(xlabel="step", ylabel="loss (log scale)", title="Latent terms, unweighted")
    if middle.lines:
        middle.set_yscale("log")
        middle.yaxis.set_major_formatter("{x:g}")
        middle.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
        middle.legend(frameon=False)
    points = series("validation", "val_bpb")
    points = points[1:] if len(points) > 2 else points  # the untrained model would flatten the rest
    if points:
        right.plot(*zip(*points), marker="o", markersize=4, color="#D55E00")
    last = f", at the end {points[-1][1]:.4f}" if points else ""
    right.set(xlabel="step", ylabel="bits per byte", title=f"Validation before storage{last}")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.suptitle(folder.name)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


# ------------------------------------------------------------------------------
# evaluation alone and generation: from an artifact, on any machine
# ------------------------------------------------------------------------------

def config_of_artifact(c: Config, header: Any) -> Config:
    """The user's knobs with the artifact's model knobs in their place; UserError if those make no
    model."""
    model = header.get("model") if isinstance(header, dict) else None
    if not isinstance(model, dict) or set(model) != set(Config.tagged("model")):
        raise UserError(f"ARTIFACT={c.artifact}: its header describes no model of this script")
    knobs = Config.knobs()
    values = {name.lower(): parse_knob(name, knobs[name], format_knob(value))
              for name, value in model.items()}
    training_off = dict(train_batch_tokens=c.micro_batches * values["train_seq_len"],
                        loss_schedule="joint", ce_weight=1.0, jepa_weight=0.0, sigreg_lambda=0.0,
                        jepa_cov=0.0, carry_state=False,
                        sliding_eval_stride=min(c.sliding_eval_stride, values["train_seq_len"]))
    return dataclasses.replace(c, **values, **training_off).validate()


def meta_model(c: Config, shapes: dict[str, tuple], runtime: Runtime) -> LanguageModel:
    """The model of a configuration on the meta device (no memory); UserError unless its parameters
    have the names and shapes of the artifact's tensors."""
    fault = UserError(f"{c.artifact}: its tensors are not those of the model in its header")
    if c.num_layers > len(shapes):  # before so many blocks are made
        raise fault
    kernels, note = choose_kernels(c, runtime)
    if note and runtime.main:
        say(note)
    try:
        with torch.device("meta"):
            model = LanguageModel(c, kernels)
            parts = whole_tensors({name: torch.empty(shape) for name, shape in shapes.items()},
                                  c.artifact)
    except (RuntimeError, ValueError, OverflowError):
        raise fault from None
    if shapes_of(dict(model.named_parameters())) != shapes_of(parts):
        raise fault
    return model


def open_artifact(c: Config, runtime: Runtime) -> tuple[Config, LanguageModel, Vocabulary, dict]:
    """Read ARTIFACT strictly and build its model on this device: configuration, model, vocabulary,
    header. Nothing large is made or decoded before header and shapes agree."""
    if not c.artifact:
        raise UserError(f"ARTIFACT: MODE={c.mode} needs the model.jepa of a run: bash run_jepa_bpe.sh "
                        f"MODE={c.mode} ARTIFACT=runs/<RUN_ID>/model.jepa")
    header, shapes = artifact_outline(c.artifact)
    own = config_of_artifact(c, header)
    model = meta_model(own, shapes, runtime)
    tensors = whole_tensors(read_artifact(c.artifact)[1], c.artifact)
    vocabulary = Vocabulary.unpack(header.get("vocabulary"), own.vocab_size)
    if own.tokenizer == "byte" or own.tokenizer_path:
        known = load_vocabulary(own)
        source = vocabulary.source or known.source
        if dataclasses.replace(vocabulary, source=source).pack() != known.pack():
            other = "bytes" if own.tokenizer == "byte" else f"TOKENIZER_PATH={c.tokenizer_path}"
            raise UserError(f"{c.artifact}: its byte counts are not those of {other}; take the "
                            "artifact as its run wrote it, and the tokenizer of its training")
    for name, role, _ in named_roles(model):
        dtype = runtime.dtype if role in (*MATRICES, EMBEDDING, HEAD) else torch.float32
        value = tensors[name].to(runtime.device, dtype)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
    return own, model.to(runtime.device), vocabulary, header  # tables of constants, too


def evaluate_alone(c: Config) -> dict[str, Any]:
    """MODE=eval: scores of an artifact on the validation shards at DATA_PATH, equal to those of
    the run that wrote it."""
    with Runtime(c) as runtime:
        own, model, vocabulary, header = open_artifact(c, runtime)
        check_source(own, vocabulary)
        started, position = now(), header.get("position")
        if position is not None and type(position) is not int:
            raise UserError(f"ARTIFACT={c.artifact}: its data position is no number")
        log = lambda line: print(line, flush=True) if runtime.main else None
        forward = compiled(model, own.compile_mode) if runtime.cuda else model
        evaluator = Evaluator(model, load_validation(own), vocabulary, own.train_seq_len,
                              max(1, own.val_batch_size // own.micro_batches), runtime, forward)
        calibration = None
        if own.temp_scaling and not own.temp_calib and position is not None:
            try:
                stream = TokenStream(find_shards(own.data_path, "train"), own.vocab_size)
                calibration = calibration_tokens(stream, position, own.train_seq_len)
            except UserError as error:
                log(f"no temperature search: {error}; TEMP_CALIB sets a temperature")
        facts = dict(artifact=str(c.artifact), artifact_bytes=os.path.getsize(c.artifact),
                     artifact_sha256=file_hash(c.artifact), eval_params=count_parameters(model),
                     val_tokens=evaluator.targets, val_bytes=evaluator.bytes)
        log(f"artifact: {c.artifact} ({facts['artifact_bytes']:,} bytes), "
            f"{facts['eval_params']:,} parameters; {evaluator.targets:,} validation tokens = "
            f"{evaluator.bytes:,} bytes")
        if own.tokenizer == "bpe" and not own.tokenizer_path:
            log("byte counts: as the artifact says; TOKENIZER_PATH checks them")
        scores, seconds = final_scores(evaluator, own, calibration, log), now() - started
        best = min(value for name, value in scores.items() if name.endswith("_bpb") and value)
        log(f"evaluated in {seconds:.1f} s on {runtime.describe()['device']}: {best:.4f} bits per byte")
        return scores | facts | dict(eval_seconds=seconds, world_size=runtime.world,
                                     device=runtime.describe()["device"])


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


class TextDecoder:
    """Token ids to text as they come: whole UTF-8 characters, a replacement character for bytes
    that make none."""

    def __init__(self, pieces=None):
        self.pieces, self.ids, self.shown = pieces, [], ""
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int, last: bool = False) -> str:
        """Text that `token` completes ("" within a character). last=True also gives what is left
        over; token -1 adds nothing."""
        if self.pieces is None:
            return self.utf8.decode(bytes([token]) if token >= 0 else b"", final=last)
        self.ids += [token] if token >= 0 else []
        text = self.pieces.decode(self.ids)
        if not last and text.endswith("\N{REPLACEMENT CHARACTER}"):  # within a character
            return ""
        new, self.shown = text[len(self.shown):], text
        return new


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
        h, states = model(ids(token), runtime.dtype, states, step=True)


def sample(c: Config) -> None:
    """MODE=sample: NUM_SAMPLES continuations of PROMPT, streamed to the terminal."""
    with Runtime(c) as runtime:
        if runtime.world > 1:
            raise UserError("MODE=sample: one process; start it without torchrun")
        own, model, vocabulary, _ = open_artifact(c, runtime)
        pieces = load_sentencepiece(c.tokenizer_path) if own.tokenizer == "bpe" else None
        bos = vocabulary.bos_id
        body = pieces.encode(c.prompt) if pieces else [b for b in c.prompt.encode() if b != bos]
        silent = vocabulary.boundary.clone()  # padding, unknown and unused ids are never drawn
        silent[bos] = False                   # the end of the document may be
        for index in range(c.num_samples):
            generator, decoder = torch.Generator().manual_seed(c.seed + index), TextDecoder(pieces)
            choose = lambda logits, generator=generator: choose_token(
                logits.cpu().masked_fill(silent, -math.inf), c.temperature, c.top_k, c.top_p,
                generator)
            if c.num_samples > 1:
                print(f"--- sample {index + 1}")
            print(c.prompt, end="", flush=True)
            for token in body if pieces is not None else ():
                decoder.feed(token)
            for token in generate(model, [bos, *body], c.sample_tokens, runtime, choose, bos):
                print(decoder.feed(token), end="", flush=True)
            print(decoder.feed(-1, last=True), flush=True)


# ------------------------------------------------------------------------------
# describe, bench, main
# ------------------------------------------------------------------------------

COMPONENTS = {
    "in_proj": r"mixer\.in_proj", "out_proj": r"mixer\.out_proj",
    "attention q, k, v": r"mixer\.[qkv]_proj", "MLP fc": r"mlp\.up", "MLP down": r"mlp\.down",
    "embedding": r"^token_embed|^lm_head_correction",
    "embedding projections": r"^embed_proj|^adapter", "head": r"^lm_head$",
    "predictor": r"^jepa\.(fc|out)", "projections of the latent": r"^jepa\.", "scalars": ""}


def component(name: str) -> str:
    return next(label for label, pattern in COMPONENTS.items() if re.search(pattern, name))


class Drift(NamedTuple):
    """How far training moves weights from their initial values: rates times powers of the sum of LR
    scales. A fit to runs of 40 to 300 steps (RESULTS.md, Storage); only the shape of the
    distributions matters for the predicted bytes."""
    matrix: float = 1.25          # RMS of a Muon matrix per LR, times path ** matrix_path
    matrix_path: float = 0.66     # above 0.5: momentum makes steps correlated
    unit_spread: float = 0.33     # log-normal spread of MLP units behind a squaring activation
    shared: float = 1.16          # common direction of a tied embedding's rows, per LR
    shared_vocab: float = 0.15    # growth of that direction with the vocabulary
    shared_path: float = 0.22
    row: float = 0.16             # own movement of an embedding's row, per LR
    row_vocab: float = 0.1
    row_path: float = 0.55
    row_spread: float = 0.4       # log-normal spread over rows, and below over columns
    column_spread: float = 0.2
    scalar_path: float = 0.4      # vectors: movement per LR
    bias_shift: float = -2.5      # mean of vocab_bias: rare tokens all go down


def synthetic_weights(c: Config, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor): synthetic weights distributed like trained ones of this configuration."""
    drift, draw = Drift(), torch.Generator().manual_seed(0)
    host_gpu = c.device != "cpu" and torch.cuda.is_available()
    gpu = host_gpu if c.profile == "auto" else c.profile == "gpu"
    by_clock = int((10.0 if gpu else 2.5) * c.max_wallclock_seconds)  # rough steps a second
    steps = max(1, min(c.iterations, by_clock or c.iterations))
    scales = np.array([lr_scale(Progress(i, i / steps, steps - i), c) for i in range(steps)])
    normal = lambda *shape: torch.empty(shape).normal_(generator=draw)

    @functools.cache
    def decayed(lr: float, decay: float) -> tuple[float, float]:
        """What weight decay leaves of the sum of LR scales, and of the initial weights."""
        left = np.cumprod((1 - lr * decay * scales).clip(0)[::-1])[::-1]
        return float((scales * left).sum()), float(left[0])

    rates = base_rates(c)
    for name, role, w in named_roles(model):
        w, owner = w.detach(), owner_of(role, c)
        lr = rates[owner]
        if owner == "matrix":
            path, start = decayed(lr, c.muon_wd)
            walk = drift.matrix * lr * path ** drift.matrix_path * w.size(1) ** -0.5
            if name.endswith("mlp.down.weight"):
                walk = walk * (drift.unit_spread * normal(1, w.size(1))).exp()
            yield name, start * w + walk * normal(*w.shape)
        elif role in (EMBEDDING, HEAD, CORRECTION):
            path, start = decayed(lr, c.adam_wd)
            rows, columns = w.shape
            shared = drift.shared * rows ** drift.shared_vocab * path ** drift.shared_path
            shared = (shared if role == EMBEDDING and c.tie_embeddings else 0) * normal(1, columns)
            spread = drift.row_spread * normal(rows, 1) + drift.column_spread * normal(1, columns)
            row = drift.row * rows ** drift.row_vocab * path ** drift.row_path
            yield name, start * w + lr * (shared + row * spread.exp() * normal(rows, columns))
        else:
            shift = drift.bias_shift if name == "vocab_bias" else 0.0
            path = scales.sum() ** drift.scalar_path
            yield name, w + lr * path * (shift + normal(*w.shape))


def estimated_bytes(c: Config, model: nn.Module | None = None) -> int:
    """Expected bytes of this configuration's trained artifact, from entropies."""
    model = model or build_models(c)[0]
    tensors = artifact_tensors(synthetic_weights(c, model), storage_plan(model, c))
    return estimate_bytes(tensors)["bytes"]


def largest_fit(c: Config, name: str, step: int, budget: int) -> int | None:
    """The largest value of a size knob, in steps, whose artifact fits `budget` bytes; None if none
    does."""
    def fits(value: int) -> bool:
        return value >= step and estimated_bytes(dataclasses.replace(c, **{name: value})) <= budget

    low, high = 0, step
    while fits(high):
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // (2 * step) * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def describe(c: Config) -> dict[str, Any]:
    """MODE=describe: knobs with their sources, parameters by component, expected bytes."""
    check_memory(c, cuda=False)
    model, jepa = build_models(c)
    plan, by_grid, rows = storage_plan(model, c), {}, {}
    print((c.render() if c.all else c.render_changed()) + "\n")
    everything = named_roles(model) + (named_roles(jepa, "jepa.") if jepa is not None else [])
    for name, _, parameter in everything:
        grid, count = plan.get(name, "not stored"), parameter.numel()
        rows.setdefault((component(name), grid), []).append(count)
        if name in plan:
            by_grid[grid] = by_grid.get(grid, 0) + count
    print(f"{'component':<28}{'storage':<14}{'tensors':>8}{'parameters':>14}")
    by_component: dict[str, int] = {}
    for (label, grid), counts in sorted(rows.items(), key=lambda row: -sum(row[1])):
        print(f"{label:<28}{grid:<14}{len(counts):>8}{sum(counts):>14,}")
        by_component[label] = by_component.get(label, 0) + sum(counts)
    stored, extra = count_parameters(model), count_parameters(jepa)
    estimate, code = estimated_bytes(c, model), len(shipped_script(source_text()))
    fit = describe_fit(c, SIZE_LIMIT - code) if c.fit else None
    fits = estimate + code <= SIZE_LIMIT
    print(f"\nstored {stored:,} + training-only {extra:,} parameters; artifact about {estimate:,} "
          f"bytes (entropy of weights as training leaves them) + code {code:,} bytes: "
          f"{'FITS' if fits else 'OVER'} {SIZE_LIMIT:,}")
    return dict(eval_params=stored, train_only_params=extra, estimated_artifact_bytes=estimate,
                code_bytes=code, fits=fits, parameters_by_storage=by_grid,
                parameters_by_component=by_component, tokens_per_step=c.train_batch_tokens,
                micro_batches=c.micro_batches, largest_fit=fit)


def describe_fit(c: Config, budget: int) -> dict[str, int | None]:
    """FIT=1: the largest MODEL_DIM, and the largest MLP_MULT, that fit with all else as it is."""
    width = HEADDIM // math.gcd(HEADDIM, c.expand)
    width = math.lcm(width, 2 * c.num_heads) if "a" in c.pattern else width
    steps = {"MODEL_DIM": width} | ({"MLP_MULT": 1} if c.mlp_mult else {})
    fit = {name: largest_fit(c, name.lower(), step, budget) for name, step in steps.items()}
    print("\n" + "; ".join(f"the largest {name} that fits, all else as it is: {value or 'none'}"
                           for name, value in fit.items()))
    return fit


class SyntheticStream:
    """Random tokens in place of shards: MODE=bench needs no data."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return 1 << 40

    def read(self, position: int, count: int) -> np.ndarray:
        return np.random.default_rng(position).integers(0, self.vocab_size, count)


class PartClock:
    """Milliseconds of named pieces of work, the device's queue included."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.times = runtime, {}

    def __call__(self, name: str, work: Callable) -> Any:
        self.runtime.synchronize()
        started = now()
        value = work()
        self.runtime.synchronize()
        self.times.setdefault(name, []).append(1e3 * (now() - started))
        return value


def bench(c: Config, runtime: Runtime) -> dict[str, Any]:
    """MODE=bench: median ms per step on random tokens, then the share of its parts.

    Whole steps are timed first; then again with a wait between the parts, which gives the shares.
    On CUDA a profile names the largest kernels. The share of one H100 in the published runs:
    TRAIN_BATCH_TOKENS=65536 MICRO_BATCHES=1."""
    runtime.main_first(lambda: check_memory(c, runtime.cuda))
    trainer, clock = Trainer(c, runtime, SyntheticStream(c.vocab_size)), PartClock(runtime)
    trainer.run_phases()
    steps, warm = min(c.iterations, 50 if runtime.cuda else 5), 10 if runtime.cuda else 1
    progress = Progress(0, 0.5, steps)
    for step in range(-warm, steps):
        clock("step", lambda: trainer.train_step(progress))
        if runtime.main:
            print(f"step {step}: {clock.times['step'][-1]:.1f} ms", file=sys.stderr)
    peak, per_step = runtime.peak_memory(), float(np.median(clock.times.pop("step")[warm:]))
    rounds = max(1, min(steps, 10) // 2)
    for _ in range(rounds):
        time_parts(trainer, progress, clock)
    per_part = {name: float(np.median(np.array(times).reshape(rounds, -1).sum(1)))
                for name, times in clock.times.items()}
    total, flops = sum(per_part.values()), flops_per_token(c) * c.train_batch_tokens
    if runtime.main:
        print(f"{'part':<16}{'ms':>10}{'share':>8}")
        for name, ms in sorted(per_part.items(), key=lambda row: -row[1]):
            print(f"{name:<16}{ms:>10.2f}{ms / total:>8.1%}")
        print(f"{per_step:.1f} ms per step of {c.train_batch_tokens:,} tokens, median of {steps}: "
              f"{1e3 * c.train_batch_tokens / per_step:,.0f} tokens a second; peak memory "
              f"{peak / 1e9:.2f} GB; scan: {trainer.kernels.name}")
    report = dict(ms_per_step=per_step, tokens_per_second=1e3 * c.train_batch_tokens / per_step,
                  steps=steps, tokens_per_step=c.train_batch_tokens, peak_memory_bytes=peak,
                  parts_ms=per_part, shares={name: ms / total for name, ms in per_part.items()},
                  model_tflops=flops / per_step * 1e-9, mfu_of_h100=None,
                  gemm_floor_ms_at_800_tflops=None, largest_kernels=None,
                  scan=trainer.kernels.name, compile_mode=c.compile_mode, **runtime.describe())
    if runtime.cuda:  # 989: peak bf16 TFLOP/s of an H100; 800: what a large product reaches
        report |= dict(mfu_of_h100=flops / per_step * 1e-9 / 989 / runtime.world,
                       gemm_floor_ms_at_800_tflops=flops / 800e12 * 1e3 / runtime.world,
                       largest_kernels=largest_kernels(trainer, progress))
    return report


def time_parts(trainer: Trainer, progress: Progress, clock: PartClock) -> None:
    """The lines of Trainer.train_step, one by one under the clock."""
    c, weights = trainer.config, loss_weights(progress.fraction, trainer.config)
    numbers = trainer.runtime.to_device(torch.tensor(weights[:len(TERMS)]))
    clock("snap", lambda: trainer.weights.load(qat=qat_on(progress.fraction, c.qat_fraction)))
    for micro in trainer.micros:
        inputs = clock("data", functools.partial(trainer.step_inputs, progress.step, micro))
        trainer.weights.begin_micro(last=micro == trainer.micros[-1])
        forward = functools.partial(trainer.losses, *inputs, numbers, trainer.states[micro],
                                    weights.active)
        loss = clock("forward", forward)[0]
        clock("backward", (loss / c.micro_batches).backward)
    clock("gradient sums", trainer.weights.finish_gradients)
    clock("optimizer", lambda: trainer.optimizer.step(1.0, c.muon_momentum))
    trainer.weights.zero_grad()


def largest_kernels(trainer: Trainer, progress: Progress) -> list[dict[str, Any]]:
    """The five kernels of one step that take the most GPU time, with their share of all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        trainer.train_step(progress)
        trainer.runtime.synchronize()
    rows = [(event.key, event.self_device_time_total) for event in profile.key_averages()]
    total = sum(time for _, time in rows) or 1
    return [dict(kernel=name[:100], ms=time / 1e3, share=time / total)
            for name, time in sorted(rows, key=lambda row: -row[1])[:5]]


def flops_per_token(c: Config) -> float:
    """Floating-point operations of matrix products per trained token, forward and backward (three
    times the forward pass)."""
    model, jepa = build_models(dataclasses.replace(c, seed=0))
    products = sum(p.numel() for _, role, p in named_roles(model) if role in (*MATRICES, HEAD))
    products += c.vocab_size * c.embed if c.tie_embeddings else 0
    if c.jepa_on and jepa is not None:
        for name, role, p in named_roles(jepa):
            if role in MATRICES:  # the projector runs once, the predictor once per horizon
                products += p.numel() * (1 if "projector" in name else c.jepa_steps)
    return 6 * (products + sum(MIXERS[letter].flops(c) for letter in c.pattern))


def train(c: Config) -> dict[str, Any]:
    """MODE=train. However the run ends once its log is open, the log's last line says it."""
    with Runtime(c) as runtime:
        run = Run(c, runtime)
        try:
            run.open()
            run.train()
            return run.finish()
        except BaseException as end:
            if run.folder is not None:
                kind = "" if isinstance(end, (UserError, RunStopped)) else f"{type(end).__name__}: "
                with contextlib.suppress(UserError):  # the disk may be full
                    run.log(f"ended: {kind}{end}", console=False)
            raise


def run_mode(config: Config) -> dict | None:
    """Do what MODE asks for; returns the JSON report of describe, bench and eval."""
    if config.mode in ("train", "eval", "bench") and int(os.environ.get("RANK", 0)) == 0:
        HEARTBEAT.start()
    if config.mode == "train":
        train(config.validate())
        return None
    if config.mode == "describe":
        return describe(config.validate())
    if config.mode == "bench":
        with Runtime(config.validate()) as runtime:
            return bench(config, runtime)
    return evaluate_alone(config) if config.mode == "eval" else sample(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch on MODE. Exit codes: 0 done, 1 a run that diverged, 2 wrong input (a line each on
    stderr), 128 + n stopped by signal n."""
    argv = sys.argv[1:] if argv is None else argv
    rank = int(os.environ.get("RANK", 0))
    try:
        if any(argument in ("-h", "--help") for argument in argv):
            print(help_text(), flush=True)
            return 0
        config = Config.from_env(dict(os.environ), argv)
        report = run_mode(config)
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
        if stopped.code > 128:  # die by the signal itself: a shell loop around this run then ends too
            signal.signal(stopped.code - 128, signal.SIG_DFL)
            os.kill(os.getpid(), stopped.code - 128)
        return stopped.code
    except BrokenPipeError:  # the output's reader is gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())

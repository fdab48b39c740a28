#!/usr/bin/env bash
# System A on BPE tokens: JEPA-regularized Mamba-2 language model, vocabulary of 8,192 pieces.
#
#   bash run_jepa_bpe.sh [KEY=VALUE ...]   set-up included; 8 GPUs, fewer, or CPU: what is there
#   PROFILE=auto|gpu|cpu       auto: gpu where a CUDA device is found; cpu: small model, demo corpus
#   PRESET=published|best      published: the challenge entry; best: with what our runs found better
#   NPROC_PER_NODE=N           ranks (default: the GPUs found)
# Everything below is a default: exported variables and KEY=VALUE arguments win. tools/launch.sh has
# the rest of the defaults (system_a, system_a_best). Relative paths count from this folder.
source "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh"
start_run "demo_sp8192 fineweb10B_sp8192" "$@"

if [[ $PRESET == best ]]; then
    system_a_best MODEL_DIM=512 MLP_MULT=3 QUANT_K=0.385 TRAIN_SEQ_LEN=4096
fi
# The published 100,000-step run, and longer ones
if [[ ${MAX_WALLCLOCK_SECONDS-600} =~ ^0*\.?0*$ && ${ITERATIONS-} =~ ^[0-9]{6,}$ ]]; then
    [[ $PROFILE == gpu ]] && default_to VAL_LOSS_EVERY=5000 TRAIN_LOG_EVERY=1000
    default_to CHECKPOINT_EVERY=5000
fi
defaults <<'TABLE'
# knob                  published  cpu
TOKENIZER               bpe
VOCAB_SIZE              8192
MODEL_DIM               640        128
EMBED_DIM               336        64
MLP_MULT                4
SIGREG_NUM_PROJ         -          32
TRAIN_SEQ_LEN           1024       128
MATRIX_LR               0.02       0.015
EMBED_LR                -          0.015
SCALAR_LR               -          0.05
SLIDING_EVAL_STRIDE     16         32
SLIDING_BATCH_SIZE      512        64
VAL_LOSS_EVERY          500        30
TRAIN_LOG_EVERY         100        20
TABLE
system_a
launch

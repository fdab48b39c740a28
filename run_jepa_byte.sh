#!/usr/bin/env bash
# System A on bytes: JEPA-regularized Mamba-2 language model, no tokenizer.
#
#   bash run_jepa_byte.sh [KEY=VALUE ...]   set-up included; 8 GPUs, fewer, or CPU: what is there
#   PROFILE=auto|gpu|cpu       auto: gpu where a CUDA device is found; cpu: small model, demo corpus
#   PRESET=published|best      published: the challenge entry; best: with what our runs found better
#   NPROC_PER_NODE=N           ranks (default: the GPUs found)
# Everything below is a default: exported variables and KEY=VALUE arguments win. tools/launch.sh has
# the rest of the defaults (system_a, system_a_best). Relative paths count from this folder.
source "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh"
start_run "demo_bytes fineweb10B_bytes fineweb10B_sp1024_bytes" "$@"

if [[ $PRESET == best ]]; then
    # chunks of as much text as 32,768 pieces
    system_a_best MODEL_DIM=512 MLP_MULT=4 QUANT_K=0.396 ADAPT_CHUNK_TOKENS=131072
fi
defaults <<'TABLE'
# knob                  published  cpu
TOKENIZER               byte
VOCAB_SIZE              256
MODEL_DIM               768        128
EMBED_DIM               256        64
D_STATE                 -          32
MLP_MULT                3
SIGREG_NUM_PROJ         -          16
TRAIN_SEQ_LEN           8192       256
MATRIX_LR               0.02       0.025
EMBED_LR                -          0.02
SCALAR_LR               -          0.03
SLIDING_EVAL_STRIDE     128        64
SLIDING_BATCH_SIZE      128        64
VAL_LOSS_EVERY          0          30
TRAIN_LOG_EVERY         1000       20
TABLE
system_a
launch

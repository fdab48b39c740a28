#!/usr/bin/env bash
# System A on bytes: JEPA-regularized Mamba-2 language model, no tokenizer.
#
#   bash run_jepa_byte.sh [KEY=VALUE ...]      set-up included; 8 GPUs, fewer, or CPU: whatever is there
#   PROFILE=auto|gpu|cpu       auto: gpu where a CUDA device is found; cpu: small model on the demo corpus
#   PRESET=published|best      published: the challenge entry; best: with what our own runs found better
#   NPROC_PER_NODE=N           ranks (default: the GPUs found)
# Every value below is a default: what is exported (or given as KEY=VALUE) wins, an empty value too.
# Of two defaults for one knob, the first holds. Relative paths count from this folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_jepa.sh
take_arguments "$@"
choose_profile
choose_data demo_bytes fineweb10B_bytes fineweb10B_sp1024_bytes

if [[ $PRESET == best ]]; then default_to $BEST_A; fi

if [[ $PROFILE == cpu ]]; then      # about two minutes of training on two cores
    export MODEL_DIM="${MODEL_DIM-128}"
    export NUM_LAYERS="${NUM_LAYERS-4}"
    export EMBED_DIM="${EMBED_DIM-64}"
    export D_STATE="${D_STATE-32}"
    export JEPA_STEPS="${JEPA_STEPS-1}"
    export TRAIN_SEQ_LEN="${TRAIN_SEQ_LEN-256}"
    export TRAIN_BATCH_TOKENS="${TRAIN_BATCH_TOKENS-2048}"
    export MICRO_BATCHES="${MICRO_BATCHES-2}"
    export PREDICTOR_HIDDEN_MULT="${PREDICTOR_HIDDEN_MULT-1}"
    export MAX_WALLCLOCK_SECONDS="${MAX_WALLCLOCK_SECONDS-120}"
    export WARMUP_STEPS="${WARMUP_STEPS-3}"
    export MATRIX_LR="${MATRIX_LR-0.025}"
    export EMBED_LR="${EMBED_LR-0.02}"
    export SCALAR_LR="${SCALAR_LR-0.03}"
    export BETA2="${BETA2-0.99}"
    export SIGREG_NUM_PROJ="${SIGREG_NUM_PROJ-16}"
    export MUON_MOMENTUM_WARMUP_STEPS="${MUON_MOMENTUM_WARMUP_STEPS-100}"
    export WARMDOWN_FRACTION="${WARMDOWN_FRACTION-1}"
    export VAL_LOSS_EVERY="${VAL_LOSS_EVERY-100}"
    export TRAIN_LOG_EVERY="${TRAIN_LOG_EVERY-20}"
    export VAL_BATCH_SIZE="${VAL_BATCH_SIZE-16384}"
    export PROBE_STEPS="${PROBE_STEPS-20}"
    export COMPILE_MODE="${COMPILE_MODE-off}"
    export SLIDING_EVAL_STRIDE="${SLIDING_EVAL_STRIDE-64}"
    export SLIDING_BATCH_SIZE="${SLIDING_BATCH_SIZE-64}"
fi

# Published configuration, 10 minutes on 8 H100
export TOKENIZER="${TOKENIZER-byte}"
export VOCAB_SIZE="${VOCAB_SIZE-256}"
export MODEL_DIM="${MODEL_DIM-768}"
export NUM_LAYERS="${NUM_LAYERS-10}"
export EXPAND="${EXPAND-1}"
export MLP_MULT="${MLP_MULT-3}"
export MLP_EVERY="${MLP_EVERY-2}"
export EMBED_DIM="${EMBED_DIM-256}"
export TIE_EMBEDDINGS="${TIE_EMBEDDINGS-1}"
export SOFTCAP_TYPE="${SOFTCAP_TYPE-poly}"
export LOGIT_SOFTCAP="${LOGIT_SOFTCAP-15}"
export PREDICTOR_HIDDEN_MULT="${PREDICTOR_HIDDEN_MULT-4}"
export JEPA_STEPS="${JEPA_STEPS-3}"
export JEPA_WEIGHT="${JEPA_WEIGHT-1}"
export CE_WEIGHT="${CE_WEIGHT-1}"
export SIGREG_LAMBDA="${SIGREG_LAMBDA-1}"
export TRAIN_SEQ_LEN="${TRAIN_SEQ_LEN-8192}"
export TRAIN_BATCH_TOKENS="${TRAIN_BATCH_TOKENS-524288}"
export MICRO_BATCHES="${MICRO_BATCHES-8}"
export ITERATIONS="${ITERATIONS-10000}"
export MAX_WALLCLOCK_SECONDS="${MAX_WALLCLOCK_SECONDS-600}"
export WARMDOWN_FRACTION="${WARMDOWN_FRACTION-0.15}"
export MATRIX_LR="${MATRIX_LR-0.02}"
export MUON_BACKEND_STEPS="${MUON_BACKEND_STEPS-3}"
export MUON_MOMENTUM="${MUON_MOMENTUM-0.95}"
export MUON_MOMENTUM_WARMUP_START="${MUON_MOMENTUM_WARMUP_START-0.85}"
export MUON_MOMENTUM_WARMUP_STEPS="${MUON_MOMENTUM_WARMUP_STEPS-500}"
export MUON_WD="${MUON_WD-0.04}"
export ADAM_WD="${ADAM_WD-0.05}"
export GRAD_CLIP_NORM="${GRAD_CLIP_NORM-1}"
export SEED="${SEED-42}"
export QUANT_BITS="${QUANT_BITS-4}"
export FP_STORAGE="${FP_STORAGE-FP8}"
export QAT_FRACTION="${QAT_FRACTION-1}"
export TEMP_SCALING="${TEMP_SCALING-1}"
export SLIDING_EVAL="${SLIDING_EVAL-1}"
export SLIDING_EVAL_STRIDE="${SLIDING_EVAL_STRIDE-128}"
export SLIDING_BATCH_SIZE="${SLIDING_BATCH_SIZE-128}"
export VAL_MAX_TOKENS="${VAL_MAX_TOKENS-0}"
export VAL_LOSS_EVERY="${VAL_LOSS_EVERY-0}"
export TRAIN_LOG_EVERY="${TRAIN_LOG_EVERY-1000}"

launch

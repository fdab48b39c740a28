#!/usr/bin/env bash
# The experiments of RESULTS.md as ordinary runs: one change at a time, paired by seed, restartable.
#
#   bash tools/experiments.sh data TEXT           shards of an experiment corpus (a text file, see
#                                                 setup_jepa.sh text)
#   bash tools/experiments.sh GROUP [FORM ...]    all forms of a group, or those named; finished
#                                                 runs are left alone
#   bash tools/experiments.sh report GROUP        tools/compare.py over the group:
#                                                 runs/experiments/GROUP/compare.*
#   bash tools/experiments.sh list                groups, forms and the knobs that they change
#
# Groups: screen, confirm (does JEPA help?), collapse (rank of the latent at two widths), recipe_64,
# recipe_128, storage (one change each, without JEPA, so that more fit into an hour), best_64,
# best_128, best_bpe (PRESET=best against published, two minutes each; against published in best's
# data order, too); horizon (10,000 steps of a larger model, then its weights stored in other ways,
# scored at 200, 1,000, 3,000 and 10,000 steps on three texts: scores.jsonl beside the runs).
#   SEEDS="1 2" STEPS=200 JOBS=2 THREADS=1        defaults depend on the group; JOBS runs at a time
#   BASE="KNOB=VALUE ..."                         added to every run: another size, another corpus
# Ctrl-C and the same command again: runs go on where they stopped.
#
# RESULTS.md also has figures of forms that lost and whose knobs left train_jepa.py: JEPA_TARGET,
# JEPA_CHUNK, JEPA_ACTION, SIGREG_RESAMPLE, SIGREG_SCALE, MUON_NS=polar, SEQ_LEN_START and
# BATCH_TOKENS_START. Those come from v0.1 (commit 1dab51f), whose run_experiments.sh repeats them.
called_from=$PWD
# shellcheck source=tools/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# A small byte model of system A's make, with its published losses, storage and optimizers.
SMALL="TOKENIZER=byte DATA_PATH=data/datasets/mix_bytes TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=2048
MICRO_BATCHES=1 MODEL_DIM=128 NUM_LAYERS=4 EXPAND=1 D_STATE=32 MLP_MULT=4 MLP_EVERY=2
TIE_EMBEDDINGS=1 JEPA_STEPS=3 PREDICTOR_HIDDEN_MULT=4 QUANT_BITS=4 FP_STORAGE=FP8 MATRIX_LR=0.02
EMBED_LR=0.02 SCALAR_LR=0.03 MUON_MOMENTUM_WARMUP_STEPS=100 WARMDOWN_FRACTION=0.6 WARMUP_STEPS=2
VAL_MAX_TOKENS=100000 VAL_BATCH_SIZE=16384 VAL_LOSS_EVERY=100 TRAIN_LOG_EVERY=50 TEMP_SCALING=0
PROBE_STEPS=0 CHECKPOINT_EVERY=100 CHECKPOINT_KEEP=1 COMPILE_MODE=off DEVICE=cpu"
BPE="TOKENIZER=bpe VOCAB_SIZE=8192 TOKENIZER_PATH=data/demo/fineweb_8192_bpe.model
DATA_PATH=data/datasets/mix_sp8192 EMBED_DIM=64 TRAIN_SEQ_LEN=128"
SIGMA_BY_ROLE="PROJ_GRID=int4s0.36 MLP_GRID=int4s0.46"

# The long runs: width 192, six blocks, rows of 1,024, a corpus without one of its kinds.
HORIZON="DATA_PATH=data/datasets/horizon_bytes MODEL_DIM=192 NUM_LAYERS=6 TRAIN_SEQ_LEN=1024 LANES=1
VAL_MAX_TOKENS=65536 VAL_BATCH_SIZE=8192 VAL_LOSS_EVERY=200 CHECKPOINT_EVERY=200 CHECKPOINT_KEEP=50"
# A latent of 16 dimensions that keeps its rank: decorrelated, no gradient through the targets.
NARROW_LATENT="JEPA_DIM=16 JEPA_COV=1 DETACH_TARGETS=1"
NARROW_LATENT_ON="JEPA_WEIGHT=1 SIGREG_LAMBDA=1 $NARROW_LATENT"    # in a form that is without one
PRESET_A=${BEST_A//$'\n'/ }
OFF="JEPA_WEIGHT=0 SIGREG_LAMBDA=0 WARMDOWN_FRACTION=0.72" HEADS="NUM_HEADS=6 NUM_KV_HEADS=3"

GROUPS_HERE="screen confirm collapse recipe_64 recipe_128 storage best_64 best_128 best_bpe horizon"

# A line per form: name, knobs. FROM=form: no training, the weights of that form stored otherwise.
forms() {    # group
    local size
    case "$1" in
    screen) cat <<'FORMS'
off JEPA_WEIGHT=0 SIGREG_LAMBDA=0
sigreg_alone JEPA_WEIGHT=0
published
one_step JEPA_STEPS=1
lambda_0.1 SIGREG_LAMBDA=0.1
lambda_5 SIGREG_LAMBDA=5
detached DETACH_TARGETS=1
dim_32 JEPA_DIM=32 SIGREG_LAMBDA=5
covariance JEPA_COV=1
annealed JEPA_ANNEAL=0.5
over_time SIGREG_AXIS=time
over_both SIGREG_AXIS=both
carried CARRY_STATE=1 EVAL_STATE=carry
carried_off CARRY_STATE=1 EVAL_STATE=carry JEPA_WEIGHT=0 SIGREG_LAMBDA=0
FORMS
        ;;
    confirm) cat <<FORMS
off JEPA_WEIGHT=0 SIGREG_LAMBDA=0
sigreg_alone JEPA_WEIGHT=0
published
narrow $NARROW_LATENT
preset $PRESET_A
preset_latent $PRESET_A $NARROW_LATENT_ON
FORMS
        ;;
    collapse) cat <<FORMS
d64_published MODEL_DIM=64
d64_covariance MODEL_DIM=64 JEPA_COV=1
d64_narrow MODEL_DIM=64 $NARROW_LATENT
d128_published MODEL_DIM=128
d128_covariance MODEL_DIM=128 JEPA_COV=1
d128_narrow MODEL_DIM=128 $NARROW_LATENT
FORMS
        ;;
    recipe_64 | recipe_128)
        sed "s/\$/ JEPA_WEIGHT=0 SIGREG_LAMBDA=0 MODEL_DIM=${1#recipe_}/" <<'FORMS'
plain
mlp_everywhere MLP_EVERY=1 MLP_MULT=2
larger MLP_EVERY=1 MLP_MULT=3
larger_coarser MLP_EVERY=1 MLP_MULT=3 PROJ_GRID=int4s0.4 MLP_GRID=int4s0.51
leaky ACTIVATION=leaky_relu2
hybrid MIXER=mmam NUM_HEADS=4 NUM_KV_HEADS=2
min_lr MIN_LR=0.1
warmdown_all WARMDOWN_FRACTION=1
averaged SWA_START=0.7 SWA_DECAY=0.98
averaged_late SWA_START=0.85 SWA_DECAY=0.9
no_decay MUON_WD=0
late_qat QAT_FRACTION=0.3
lanes LANES=1
carried CARRY_STATE=1 EVAL_STATE=carry
FORMS
        ;;
    storage) sed 's/$/ JEPA_WEIGHT=0 SIGREG_LAMBDA=0/' <<FORMS
absmax
sigma QUANT_STEP=sigma QUANT_K=0.42
sigma_by_role $SIGMA_BY_ROLE
coarser_larger QUANT_STEP=sigma QUANT_K=0.6 MLP_EVERY=1 MLP_MULT=3
dt_8_bits DT_GRID=int8a
late_qat QAT_FRACTION=0.3
no_qat QAT_FRACTION=0
compensated FROM=absmax ROUNDING=compensated
late_qat_compensated FROM=late_qat QAT_FRACTION=0.3 ROUNDING=compensated
no_qat_compensated FROM=no_qat QAT_FRACTION=0 ROUNDING=compensated
no_qat_sigma FROM=no_qat QAT_FRACTION=0 $SIGMA_BY_ROLE
no_qat_sigma_compensated FROM=no_qat QAT_FRACTION=0 $SIGMA_BY_ROLE ROUNDING=compensated
FORMS
        ;;
    best_64 | best_128 | best_bpe)
        size=MODEL_DIM=${1#best_}
        [[ $1 == best_bpe ]] && size=${BPE//$'\n'/ }
        sed "s|\$| $size MAX_WALLCLOCK_SECONDS=120|" <<FORMS
published
published_lanes LANES=1
best $PRESET_A
FORMS
        ;;
    horizon)
        sed "s|\$| ${HORIZON//$'\n'/ }|" <<FORMS
base $OFF
preset $PRESET_A WARMDOWN_FRACTION=0.72
preset_min_lr $PRESET_A MIN_LR=0.1 WARMDOWN_FRACTION=0.72
preset_latent $PRESET_A MIN_LR=0.1 $NARROW_LATENT_ON WARMDOWN_FRACTION=0.72
published WARMDOWN_FRACTION=0.72
hybrid1 $OFF MIXER=mmmmam $HEADS
hybrid2 $OFF MIXER=mmamam $HEADS
mlp_everywhere $OFF MLP_EVERY=1 MLP_MULT=2
warmdown_015 ${OFF/0.72/0.15}
min_lr $OFF MIN_LR=0.1
no_qat $OFF QAT_FRACTION=0
$(stored_forms no_qat "$OFF QAT_FRACTION=0 TEMP_SCALING=1")
FORMS
        ;;
    *) die "$1: groups are $GROUPS_HERE" 2 ;;
    esac
}

# The weights of a form on grids of INT4, 5, 6 and k·σ, each with plain and compensated rounding.
stored_forms() {    # form knobs
    local grid name rounding
    for grid in QUANT_BITS={4,5,6} "QUANT_STEP=sigma QUANT_K="{0.34,0.38,0.42,0.5}; do
        for rounding in nearest compensated; do
            name=${grid//[A-Z_= ]/}
            echo "${1}_${name}_$rounding FROM=$1 $grid ROUNDING=$rounding $2"
        done
    done
}

train_one() {    # group form seed
    local stored=""
    local folder=runs/experiments/$1 name=$2-s$3 knobs
    [[ -f $folder/$name/result.json ]] && return
    knobs=$(forms "$1" | awk -v form="$2" '$1 == form { $1 = ""; print }')
    mkdir -p "$folder"
    if [[ $knobs =~ (.*)FROM=([a-z_0-9]+)(.*) ]]; then
        knobs="${BASH_REMATCH[1]}${BASH_REMATCH[3]}"
        local source=$folder/${BASH_REMATCH[2]}-s$3
        [[ -f $source/result.json ]] || { note "$1: $name waits for $source"; return; }
        stored=$folder/$name/checkpoints
        mkdir -p "$stored"
        cp "$source"/{log.txt,metrics.jsonl,config.json} "$folder/$name/"
        cp "$(printf '%s\n' "$source"/checkpoints/step_*.ckpt | tail -n 1)" "$stored/"
    fi
    note "$1: $name"
    # shellcheck disable=SC2086  # words are KNOB=VALUE
    env -u SEEDS OMP_NUM_THREADS="${THREADS:-1}" "$PY" train_jepa.py $SMALL RUNS_DIR="$folder" \
        RUN_ID="$name" SEED="$3" ITERATIONS="$STEPS" ${BASE-} $knobs >"$folder/$name.txt" 2>&1 ||
        note "$1: $name failed: $(tail -n 1 "$folder/$name.txt")"
    [[ -z $stored || ! -f $folder/$name/result.json ]] || rm -r "$stored"
}

run_group() {    # group form...
    local group=$1 seed form stage names stored
    names=$(forms "$group" | cut -d' ' -f1)
    shift
    for form in "$@"; do
        grep -qx "$form" <<<"$names" || die "$form: no form of $group (list shows them)" 2
    done
    # shellcheck disable=SC2086  # words are forms
    [[ $# -gt 0 ]] || set -- $names
    case "$group" in
    screen) : "${SEEDS:=1 2}" "${STEPS:=200}" ;;
    confirm) : "${SEEDS:=1 2 3 4 5}" "${STEPS:=300}" ;;
    best_*) : "${SEEDS:=1 2 3}" "${STEPS:=10000}" ;;
    horizon) : "${SEEDS:=1 2}" "${STEPS:=10000}" ;;
    *) : "${SEEDS:=1 2 3}" "${STEPS:=200}" ;;
    esac
    stored=$(forms "$group" | awk '/ FROM=/ { print $1 }')
    for stage in train store; do    # forms FROM another come when its weights are there
        for seed in $SEEDS; do
            for form in "$@"; do
                if grep -qx "$form" <<<"$stored"; then
                    [[ $stage == store ]] || continue
                else
                    [[ $stage == train ]] || continue
                fi
                while (($(jobs -rp | wc -l) >= ${JOBS:-2})); do wait -n || true; done
                train_one "$group" "$form" "$seed" &
            done
        done
        wait
    done
}

report() {    # group; its first form is the baseline
    local form runs=""
    for form in $(forms "$1" | cut -d' ' -f1); do
        if compgen -G "runs/experiments/$1/$form-s[0-9]*/config.json" >/dev/null; then
            runs+=" runs/experiments/$1/$form-s[0-9]*/"
        fi
    done
    [[ -n $runs ]] || die "runs/experiments/$1 holds no runs yet: bash tools/experiments.sh $1" 2
    "$PY" tools/compare.py RUNS="$runs" OUT="runs/experiments/$1"
}

usage="usage: bash tools/experiments.sh data TEXT | GROUP [FORM ...] | report GROUP | list"
case "${1-}" in
"") die "$usage" 2 ;;
data)
    [[ -n ${2-} ]] || die "$usage" 2
    [[ $2 == /* ]] || set -- data "$called_from/$2"
    TEXT_PATH=$2 TEXT_NAME=mix TEXT_PIECE=1024 bash setup_jepa.sh text
    "$PY" tools/horizon.py data "$2" ;;
list)
    for group in $GROUPS_HERE; do forms "$group" | sed "s/^/$group  /"; done ;;
report)
    forms "${2-}" >/dev/null
    report "$2" ;;
*)
    forms "$1" >/dev/null
    env_ready || bash setup_jepa.sh env
    corpus=data/datasets/mix_bytes
    [[ $1 == horizon ]] && corpus=data/datasets/horizon_bytes
    [[ -d $corpus || ${BASE-} == *DATA_PATH=* ]] ||
        die "$corpus is missing: bash $0 data TEXT, or BASE=DATA_PATH=..." 2
    run_group "$@"
    if [[ $1 == horizon ]]; then
        "$PY" tools/horizon.py score runs/experiments/horizon/*/
    fi ;;
esac

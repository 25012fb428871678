#!/usr/bin/env bash
# Everything that wants a GPU, in one go and without a network. Installs the package, lets doctor compare the CUDA kernels
# with the reference, and then does what is asked for, in the order asked for; tests, sanitizer, ops and attention by default.
#
#   benchmarks/device.sh [--check] [--ops] [--segment_attention] [--models] [--sanitize] [--tune] [--fuzz]
#                        [--next] [--dry]
#
# --check              tests that use the GPU                                      (at most 6 minutes)
# --ops                benches of norm_rope_append, compress_chunk, quantize_chunk, participation, prefetch  (6)
# --segment_attention  what a GPU has to do for it (conformance.py, for sm_90), tests of it in CUDA, its bench     (5)
# --tune               which backend of segment_attention is the fastest (worldkv tune, not kept), and which
#                      launch configuration                                              (7)
# --sanitize           every kernel once under memcheck, racecheck and synccheck   (6)
# --fuzz               1000 random windows on each backend of segment_attention, 300 more in CUDA                  (8)
# --models             rollouts of the models and a pass of each, LingBot's published path with a few layers  (8)
# --next               all of it, in this order of value, without the stages that stages.tsv in OUT says have ended well
#                      on this kind of card with the code as it is
#
# --dry   on a CPU, small cases; the environment it runs in is left as it is. Proves that the script works.
# OUT     folder for <gpu>-<date>.jsonl, .log, .clocks.csv, .tune.json and stages.tsv; benchmarks/results by default, with
#         --dry a new temporary folder
# PYTHON  the interpreter; python3 by default
# BUDGET  seconds in all, 530 by default; no stage runs past it. What found no time left can be asked for by itself.
# WORLDKV_COMMIT  the commit to record where the folder is no git repository
#
# Building takes a minute or more of sixteen cores. An extension that was built elsewhere for the same interpreter, by
#   WORLDKV_CUDA=1 WORLDKV_CUDA_ARCHS=90a python3.12 setup.py build_ext --inplace
# and lies beside the sources, no older than they are, is taken in its place.
#
# A stage that fails is named in the summary and does not stop the others. Exit status: 0 when all went well, else 1.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
python=${PYTHON:-python3}
case "$python" in
    /*) ;;
    */*) python=$PWD/$python ;;
esac
budget=${BUDGET:-530}
dry=0
next=0
parts=()
for option in "$@"; do
    case "$option" in
        --dry) dry=1 ;;
        --next) next=1 ;;
        --check | --ops | --segment_attention | --models | --sanitize | --tune | --fuzz) parts+=("${option#--}") ;;
        *)
            echo "device.sh: the options are --check, --ops, --segment_attention, --models, --sanitize, --tune," \
                "--fuzz, --next and --dry, got $option" >&2
            exit 2
            ;;
    esac
done
if [ "$next" = 1 ]; then
    parts=(check segment_attention models ops sanitize fuzz tune)
elif [ "${#parts[@]}" = 0 ]; then
    parts=(check sanitize ops segment_attention)
fi
if [ "$dry" = 1 ]; then
    export CUDA_VISIBLE_DEVICES=""
    out=${OUT:-$(mktemp -d)}
else
    out=${OUT:-$root/benchmarks/results}
fi
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd) || exit 1
export PYTHONUNBUFFERED=1

gpu=cpu
if [ "$dry" = 0 ]; then
    gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr '[:upper:] ' '[:lower:]-')
    gpu=$(printf '%s' "$gpu" | tr -cd 'a-z0-9._-')
    gpu=${gpu:-gpu}
fi
name=$gpu-$(date -u +%Y%m%d-%H%M%S)
stages=$out/stages.tsv # card, source and name of what has ended well
source=$("$python" "$root/benchmarks/machine.py")
results=$out/$name.jsonl
log=$out/$name.log
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
# Away from the sources, since "python -m" puts the current folder before PYTHONPATH.
mkdir -p "$scratch/here" && cd "$scratch/here" || exit 1

summary=""
failed=0

note() { # note STAGE WORDS...
    local stage=$1
    shift
    summary+=$(printf '%-20s %s' "$stage" "$*")$'\n'
}

skip() { # skip STAGE REASON...
    echo "== $1: skipped: ${*:2}"
    note "$1" "skipped: ${*:2}"
}

stage() { # stage NAME LIMIT COMMAND...
    local stage=$1 limit=$2 left status start=$SECONDS
    shift 2
    local done=$gpu$'\t'$source$'\t'$stage
    if [ "$next" = 1 ] && [ -e "$stages" ] && grep -qxF "$done" "$stages"; then
        skip "$stage" "it has ended well here"
        return 0
    fi
    left=$((budget - SECONDS))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "== $stage: no time left"
        note "$stage" "FAILED: no time left of $budget s"
        failed=1
        return 1
    fi
    echo
    echo "== $stage (at most $limit s, $SECONDS s gone)"
    # An interrupt, upon which pytest says what has failed so far. Where it was ignored, timeout undoes that.
    timeout -s INT -k 10 "$limit" "$@"
    status=$?
    case $status in
        0)
            note "$stage" "ok, $((SECONDS - start)) s"
            case $stage in install | environment | doctor | ceilings | "kernels once") ;; *) echo "$done" >>"$stages" ;; esac
            ;;
        124 | 137) note "$stage" "FAILED: ran past its $limit s" ;;
        *) note "$stage" "FAILED: status $status after $((SECONDS - start)) s" ;;
    esac
    [ "$status" = 0 ] || failed=1
    echo "== $stage: status $status, $((SECONDS - start)) s"
    return "$status"
}

# The package as it would be installed, put together from links: kernels/ is imported as worldkv_kernels.kernels, and
# benchmarks/ as worldkv_kernels.benchmarks.
link_package() {
    local entry
    mkdir -p "$scratch/path/worldkv_kernels" || return 1
    for entry in "$root"/worldkv_kernels/*; do
        ln -s "$entry" "$scratch/path/worldkv_kernels/" || return 1
    done
    ln -sfn "$root/kernels" "$scratch/path/worldkv_kernels/kernels" || return 1
    ln -sfn "$root/benchmarks" "$scratch/path/worldkv_kernels/benchmarks" || return 1
    export PYTHONPATH="$scratch/path${PYTHONPATH:+:$PYTHONPATH}"
}

compute_capability() { # such as 90
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .
}

# Whether an extension for this interpreter and card lies beside the sources and is younger than all it is built of.
is_built() { # is_built ARCH
    local built
    built=$root/worldkv_kernels/_cuda$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    [ -e "$built" ] && [ -z "$(find "$root/csrc" "$root/setup.py" -newer "$built" -print -quit)" ] &&
        (cd "$root/worldkv_kernels" && "$python" -c "import _cuda, sys; sys.exit('$1' not in _cuda.architectures.split(','))")
}

install_package() {
    local arch=none
    if [ "$dry" = 0 ]; then
        arch=$(compute_capability)
        case $arch in 90 | 100) arch+=a ;; esac
    fi
    if [ "$dry" = 0 ] && is_built "$arch"; then
        echo "== the CUDA extension for $arch is younger than its sources: taken as it is"
    elif [ "$dry" = 0 ]; then
        # With WORLDKV_CUDA=1 a build that fails is an error, and what nvcc said is printed.
        stage install 150 env WORLDKV_CUDA=1 WORLDKV_CUDA_ARCHS="$arch" \
            "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps -e "$root" && return
        echo "== pip could not install the package: the CUDA extension, if any, is not built"
    fi
    if link_package; then
        note "install" "by links on PYTHONPATH"
    else
        note "install" "FAILED: no links could be made"
        failed=1
    fi
}

# Run by a bash of its own, since timeout starts programs and not functions.
print_environment() {
    uname -srm
    nvidia-smi || echo "no nvidia-smi"
    nvcc --version 2>/dev/null | tail -n 2 || true
    "$python" --version
    "$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|pytest|hypothesis|scikit-image|nvidia-cudnn)' || true
}

export -f print_environment
export python

# Clock, power and temperature of the card, five times a second: what a figure was measured at.
sample_clocks() {
    [ "$dry" = 0 ] || return
    nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu \
        --format=csv,nounits -lms 200 >"$out/$name.clocks.csv" &
    sampler=$!
    trap 'kill "$sampler" 2>/dev/null; rm -rf "$scratch"' EXIT
}

conformance() {
    local arch
    if [ "$dry" = 1 ]; then
        if command -v nvcc >/dev/null; then
            stage conformance 60 "$python" "$root/benchmarks/conformance.py" --compile
        else
            skip conformance "needs a GPU, or nvcc to compile it"
        fi
        return
    fi
    arch=$(compute_capability)
    if [ "$arch" = 90 ]; then
        stage conformance 90 "$python" "$root/benchmarks/conformance.py" --jsonl "$results"
    else
        skip conformance "its facts are those of sm_90, and this GPU is of sm_$arch"
    fi
}

pytest=("$python" -m pytest -c "$root/pyproject.toml" -q --maxfail=40 -p no:cacheprovider)
processes=$(nproc)
[ "$processes" -gt 12 ] && processes=12
"$python" -c "import xdist" 2>/dev/null && pytest+=(-n "$processes")

run_tests() {
    # The files in which something runs on the GPU.
    stage tests 150 "${pytest[@]}" "$root"/tests/test_{backends,bank_streams,compress_chunk,compress_layers}.py \
        "$root"/tests/test_{compress_nearest,compress_nearest_triton,cuda_schedules,dequantize_chosen,first_and_large,graphs,integrations_graphs}.py \
        "$root"/tests/test_{norm_rope_append,participation,pass_graphs,prune_aside,quantize_chunk,rope,segment_attention,segment_attention_sdpa,segment_attention_triton,segment_attention_weights}.py
    stage "tests of sessions" 90 "${pytest[@]}" "$root"/tests/test_{content,received,integrations_attach,saving,saving_rollouts,saving_handles,sessions,world_memory_changes}.py
    # Without torch.compile's pool of processes, for which a worker of pytest waits at its end.
    stage "tests of models" 90 env TORCHINDUCTOR_COMPILE_THREADS=1 "${pytest[@]}" \
        "$root"/tests/test_{models_faster,models_small_world,models_matrix_game_2,small_world_memory}.py \
        -m "slow or not slow" -k "half_precision or dtype or remembers or draws or fp8 or compiled"
}

do_sanitize() {
    local tool
    if [ "$dry" = 1 ]; then
        skip memcheck "needs a GPU"
        return
    fi
    # What racecheck makes of attention's protocol, and nothing else: csrc/attention/NOTES.md.
    stage "racecheck itself" 60 "$python" "$root/benchmarks/racecheck.py" --jsonl "$results"
    # Once without a checker, which would slow the compiler down.
    stage "kernels once" 60 "$python" "$root/benchmarks/sanitize.py" || return
    for tool in memcheck racecheck synccheck; do
        if ! command -v compute-sanitizer >/dev/null; then
            skip "$tool" "compute-sanitizer is not on the PATH"
            continue
        fi
        stage "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 --report-api-errors no \
            --target-processes application-only "$python" "$root/benchmarks/sanitize.py"
    done
}

bench() { # bench LIMIT NAME [OPTIONS...]
    stage "${called:-$2}" "$1" "$python" "$root/benchmarks/bench_$2.py" --jsonl "$results" "${small[@]+"${small[@]}"}" "${@:3}"
}

do_check() {
    if [ "$dry" = 1 ]; then
        skip tests "run pytest itself on a CPU"
    else
        run_tests
    fi
}

do_ops() {
    bench 70 norm_rope_append
    bench 90 compress_chunk
    bench 70 quantize_chunk
    bench 70 participation
    bench 100 prefetch
}

do_segment_attention() {
    local own=ours
    conformance
    if [ "$dry" = 1 ]; then
        skip "attention in CUDA" "run pytest itself on a CPU"
    else
        stage "attention in CUDA" 90 "${pytest[@]}" "$root/tests/test_segment_attention_cuda.py"
        case $? in 124 | 137) own=triton ;; esac  # it hangs
    fi
    bench 200 segment_attention --core --only "$own,sdpa"  # others compile for minutes, or are not installed
    [ "$dry" = 1 ] || called="attention, grouped heads" bench 40 segment_attention --only "$own,sdpa" \
        --shape heads=32,kv_heads=8,q=4680,window=4680x1+2340x6+4680x3
}

do_tune() {
    if [ "$dry" = 1 ]; then
        export TRITON_INTERPRET=1
    else
        stage "worldkv tune" 120 env XDG_CACHE_HOME="$scratch/cache" \
            "$python" -m worldkv_kernels tune --json "$out/$name.tune.json"
    fi
    stage tune 300 "$python" "$root/benchmarks/tune_segment_attention.py" --jsonl "$results" "${small[@]+"${small[@]}"}"
}

do_fuzz() {
    if [ "$dry" = 1 ]; then
        skip fuzz "needs a GPU"
        return
    fi
    WORLDKV_FUZZ=1000 stage fuzz 240 "$python" -m pytest -c "$root/pyproject.toml" -q -p no:cacheprovider \
        "$root/tests/test_segment_attention.py" -k random_windows
    stage "windows in CUDA" 240 "${pytest[@]}" -m slow "$root/tests/test_segment_attention_cuda.py"
}

do_models() {
    local all=("${small[@]+"${small[@]}"}") modes=worldkv,worldkv_eager,sliding_as_long more=published,worldkv_host,worldkv_8_bits,worldkv_host_4_bits
    [ "$dry" = 1 ] || modes+=,worldkv_compiled,worldkv_fp8
    small=("${small[@]:0:1}") # a rollout makes the chunks it is told to, whatever the seconds
    called="rollout, matrix" bench 90 rollout --model matrix_game_2 --chunks 40 --only "$modes,$more"
    called="rollout, all layers" bench 200 rollout --model lingbot_world_fast --variant fast --chunks 16 --only "$modes"
    called="rollout, 8 layers" bench 100 rollout --model lingbot_world_fast --layers 8 --chunks 20 --only "$modes,$more"
    small=("${all[@]+"${all[@]}"}")
    bench 90 chunk
}

main() {
    local small=()
    [ "$dry" = 1 ] && small=(--small --seconds 0.1)
    install_package
    stage environment 30 bash -c print_environment
    sample_clocks
    stage doctor 90 "$python" -m worldkv_kernels doctor --prove
    stage ceilings 30 "$python" "$root/benchmarks/common.py" --jsonl "$results" "${small[@]:0:1}"
    local part all=("${small[@]+"${small[@]}"}")
    for part in "${parts[@]}"; do
        small=("${all[@]+"${all[@]}"}")
        "do_$part"
    done

    echo
    printf '%s' "$summary"
    echo "$SECONDS s; figures in $results, this log in $log"
    [ "$failed" = 0 ] || echo "NOT ALL WELL: see the stages marked FAILED above"
    echo
    [ -s "$results" ] && "$python" "$root/benchmarks/common.py" --short --table "$results"
    return "$failed"
}

main 2>&1 | tee "$log"
exit "${PIPESTATUS[0]}"

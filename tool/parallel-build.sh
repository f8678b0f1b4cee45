#!/bin/bash
# parallel-build.sh - builds the database of a plan on this machine with GNU parallel, several buckets at a time.
#
#   vecshard pack part*.h5 --bucket-rows 10000000 --out plan.json
#   tool/parallel-build.sh --plan plan.json --out db --publish s3://my-bucket/db -- --metric cosine
#
# Builds what is missing (a failed build is tried again), compares the database with the plan, publishes it. Give the same line
# again after whatever went wrong. What it comes down to:
#
#   vecshard verify db --plan plan.json --missing lines |
#     parallel --retries 3 --joblog db.logs/jobs vecshard build --resume --plan plan.json --bucket {} --threads 1 --out db
#   vecshard verify db --plan plan.json --quick && vecshard publish db s3://my-bucket/db
#
# One thread for each bucket makes more of a machine than many threads for one: nothing waits for anything. Half of the memory
# that is free, or that the cgroup allows, is shared out among the builds; the rest is for the pages that they write.
set -u

usage() {
  cat <<'TEXT'
usage: parallel-build.sh --plan FILE --out DB [OPTIONS] [-- OPTIONS OF vecshard build]

Builds the database of a plan of vecshard pack with GNU parallel. Run it again to go on after failures.

  --publish s3://BUCKET/PREFIX  publish the database when it is complete
  --jobs N                      buckets built at the same time (default: one for each CPU)
  --threads N                   threads of a build (default 1)
  --tries N                     tries of a build (default 3)
  --logs DIR                    where logs go (default DB.logs)

Environment: VECSHARD names the tool (default: build/vecshard beside this folder, else from PATH).
TEXT
}

fail() { echo "parallel-build.sh: $1" >&2; exit "${2-1}"; }

plan='' out='' publish='' jobs='' threads=1 tries=3 logs='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage; exit 0 ;;
    --) shift; options=("$@"); break ;;
    --plan | --out | --publish | --jobs | --threads | --tries | --logs) ;;
    *) fail "there is no option $1; see --help" 2 ;;
  esac
  [ $# -gt 1 ] || fail "$1 needs a value" 2
  case $1 in
    --plan) plan=$2 ;;
    --out) out=$2 ;;
    --publish) publish=$2 ;;
    --jobs) jobs=$2 ;;
    --threads) threads=$2 ;;
    --tries) tries=$2 ;;
    --logs) logs=$2 ;;
  esac
  shift 2
done
if [ -z "$plan" ] || [ -z "$out" ]; then fail "--plan and --out must be given; see --help" 2; fi
for number in "${jobs:-1}" "$threads" "$tries"; do
  case $number in '' | 0* | *[!0-9]*) fail "'$number' is no whole number from 1" 2 ;; esac
done
command -v parallel >/dev/null || fail "GNU parallel is not on PATH (Debian: apt-get install parallel)"
if [ -z "${VECSHARD-}" ]; then
  VECSHARD=$(dirname "$0")/../build/vecshard
  [ -x "$VECSHARD" ] || VECSHARD=$(command -v vecshard) || fail "there is no vecshard: run make, or set VECSHARD"
fi
[ -n "$jobs" ] || jobs=$((($(nproc) + threads - 1) / threads))
mkdir -p "$out" "${logs:=${out%/}.logs}" || exit 1

memory=$(awk '$1 == "MemAvailable:" {print int($2 / 1024)}' /proc/meminfo)
limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null)
case $limit in '' | *[!0-9]*) ;; *) [ $((limit >> 20)) -ge "$memory" ] || memory=$((limit >> 20)) ;; esac
memory=$((memory / 2 / jobs))
[ $memory -le 8192 ] || memory=8192
[ $memory -ge 64 ] || memory=64

# Status 1 with numbers: not complete; without: something else is wrong.
status=0
missing=$("$VECSHARD" verify "$out" --plan "$plan" --missing lines) || status=$?
[ $status = 0 ] || [ -n "$missing" ] || exit $status
if [ -n "$missing" ]; then
  # --tag: lines of many builds come mixed. What parallel thinks of its tries is in the job log; the check below decides.
  parallel --will-cite --quote --jobs "$jobs" --retries "$tries" --joblog "$logs/jobs" --tag --line-buffer \
    "$VECSHARD" build --resume --plan "$plan" --bucket '{}' --out "$out" --threads "$threads" --memory "${memory}M" \
    ${options[@]+"${options[@]}"} <<<"$missing" 2>&1 | tee -a "$logs/build.log"
fi
"$VECSHARD" verify "$out" --plan "$plan" --quick || fail "not complete; see $logs/build.log, then give the same line again"
[ -z "$publish" ] || "$VECSHARD" publish "$out" "$publish"

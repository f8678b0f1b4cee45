#!/bin/bash
# slurm-build.sh - builds the database of a plan on a Slurm cluster: an array of builds, a check, and publishing.
#
#   vecshard pack part*.h5 --bucket-rows 10000000 --out plan.json
#   tool/slurm-build.sh --plan plan.json --out db --cpus 8 --mem 16G --publish s3://my-bucket/db -- --metric cosine
#
# Give the same line again after whatever went wrong: only buckets that are not there yet are submitted, and if none is, only
# the check and publishing. --help lists the options; everything behind -- goes to `vecshard build`.
#
# What it relies on, and what it does not:
# - A task is idempotent: a bucket that is built is left alone within a second, a build that died goes on where its
#   temporary files are seen, or begins anew, and of two builds of one bucket the second waits for the first. So Slurm may run a task twice: after a node died, or after the
#   controller did (it forgets what ended last).
# - A failed try is repeated inside the task. Slurm's own RequeueExit would cancel the jobs that wait for the array.
# - The check waits for the end of the array, not for its success: it compares what is there with the plan, whatever the tasks
#   said. Publishing waits for the success of the check.
# - Threads and memory of a build follow from what Slurm gave to the task.
# Logs: DB.logs/bucketN.log, with every try of bucket N; check.log, publish.log, slurm.log.
set -u

usage() {
  cat <<'TEXT'
usage: slurm-build.sh --plan FILE --out DB [OPTIONS] [-- OPTIONS OF vecshard build]

Builds the database of a plan of vecshard pack on a Slurm cluster. Run it again to go on after failures.

  --publish s3://BUCKET/PREFIX  publish the database when it is complete
  --cpus N                      CPUs of a task (default 1)
  --mem SIZE                    memory of a task (default 4G)
  --time LIMIT                  time limit of a task, as sbatch takes it
  --at-once N                   tasks that run at the same time at most
  --tries N                     tries of a build or of publishing within its job (default 3)
  --pause SECONDS               before the second try; twice as long before each further one (default 10)
  --logs DIR                    where logs go (default DB.logs)
  --sbatch OPTION               a further option for sbatch, repeatable: --sbatch --partition=long
  --wait                        wait for the end; exit status 0: complete (and published)

Environment: VECSHARD names the tool (default: build/vecshard beside this folder, else from PATH).
TEXT
}

fail() { echo "slurm-build.sh: $1" >&2; exit "${2-1}"; }

step=submit plan='' out='' publish='' cpus=1 mem=4G time='' at_once='' tries=3 pause=10 logs='' base=0 wait=''
more=() options=()
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage; exit 0 ;;
    --wait) wait=1; shift; continue ;;
    --) shift; options=("$@"); break ;;
    --plan | --out | --publish | --cpus | --mem | --time | --at-once | --tries | --pause | --logs) ;;
    --sbatch | --step | --base) ;;
    *) fail "there is no option $1; see --help" 2 ;;
  esac
  [ $# -gt 1 ] || fail "$1 needs a value" 2
  case $1 in
    --plan) plan=$2 ;;
    --out) out=$2 ;;
    --publish) publish=$2 ;;
    --cpus) cpus=$2 ;;
    --mem) mem=$2 ;;
    --time) time=$2 ;;
    --at-once) at_once=$2 ;;
    --tries) tries=$2 ;;
    --pause) pause=$2 ;;
    --logs) logs=$2 ;;
    --sbatch) more+=("$2") ;;
    --step) step=$2 ;;  # task, check or publish: what the jobs call
    --base) base=$2 ;;  # bucket number = base + array index
  esac
  shift 2
done
if [ -z "$plan" ] || [ -z "$out" ]; then fail "--plan and --out must be given; see --help" 2; fi
for number in "$cpus" "$tries" "${at_once:-1}"; do
  case $number in '' | 0* | *[!0-9]*) fail "'$number' is no whole number from 1" 2 ;; esac
done
case $pause in '' | *[!0-9]*) fail "--pause is a whole number of seconds, not '$pause'" 2 ;; esac

# ---- inside the jobs ----

say() { echo "$(date '+%F %T') $(hostname -s) job ${SLURM_JOB_ID-}: $*"; }

# Runs a command until it succeeds, --tries times at most. Wrong usage does not get better; a signal ends the job.
with_tries() {
  local try status
  trap 'stopped=1; kill "$child" 2>/dev/null' TERM INT
  stopped=''
  for ((try = 1; ; try++)); do
    say "try $try: $*"
    "$@" &
    child=$!
    wait "$child"
    status=$?
    [ -z "$stopped" ] || { wait "$child"; say "stopped by a signal"; return 143; }
    [ $status != 0 ] || { say "done"; return 0; }
    say "try $try failed with status $status"
    [ $status != 2 ] && [ "$try" -lt "$tries" ] || return $status
    sleep "$pause" &
    child=$!
    wait "$child"
    pause=$((2 * pause))
  done
}

# Mebibytes that the task may have, or nothing when Slurm does not say.
task_memory() {
  local mib=0
  if [ -n "${SLURM_MEM_PER_NODE-}" ]; then mib=$SLURM_MEM_PER_NODE
  elif [ -n "${SLURM_MEM_PER_CPU-}" ]; then mib=$((SLURM_MEM_PER_CPU * ${SLURM_CPUS_ON_NODE:-1})); fi
  [ "$mib" -le 0 ] || echo "$mib"
}

# A build takes --memory and 200 MB more; an eighth is left to the pages that are being written.
build_memory() {
  local mib
  mib=$(task_memory)
  [ -n "$mib" ] || return 0
  mib=$((mib - 256 - mib / 8))
  [ $mib -ge 64 ] || mib=64
  echo "--memory=${mib}M"
}

task() {
  local bucket=$((base + SLURM_ARRAY_TASK_ID)) threads=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}} memory
  memory=$(build_memory)
  exec >>"$logs/bucket$bucket.log" 2>&1
  [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || say "started again by Slurm, time $SLURM_RESTART_COUNT"
  with_tries "$VECSHARD" build --resume --plan "$plan" --bucket "$bucket" --out "$out" --threads "$threads" \
    ${memory:+"$memory"} ${options[@]+"${options[@]}"}
}

check() {
  exec >>"$logs/check.log" 2>&1
  say "compare $out with $plan"
  "$VECSHARD" verify "$out" --plan "$plan" --quick && return
  say "not complete: see bucketN.log, then give the line of slurm-build.sh again"
  return 1
}

case $step in
  submit) ;;
  task) task; exit ;;
  check) check; exit ;;
  publish) exec >>"$logs/publish.log" 2>&1; with_tries "$VECSHARD" publish "$out" "$publish"; exit ;;
  *) fail "there is no step $step" 2 ;;
esac

# ---- where the user is ----

command -v sbatch >/dev/null || fail "sbatch is not on PATH: this runs where Slurm jobs are submitted"
if [ -z "${VECSHARD-}" ]; then
  VECSHARD=$(dirname "$0")/../build/vecshard
  [ -x "$VECSHARD" ] || VECSHARD=$(command -v vecshard) || fail "there is no vecshard: run make, or set VECSHARD"
fi
VECSHARD=$(realpath -e "$VECSHARD") || exit 1
export VECSHARD
plan=$(realpath -e "$plan") || exit 1
mkdir -p "$out" "${logs:=${out%/}.logs}" || exit 1
out=$(realpath -e "$out") && logs=$(realpath -e "$logs") || exit 1

# Numbers from 1, one a line. Status 1 with numbers: not complete; without: something else is wrong.
status=0
missing=$("$VECSHARD" verify "$out" --plan "$plan" --missing lines) || status=$?
[ $status = 0 ] || [ -n "$missing" ] || exit $status

# Indices of an array end below MaxArraySize: larger numbers go into further arrays, which count from a base.
limit=$(scontrol show config 2>/dev/null | awk '$1 == "MaxArraySize" {print $3 - 1}')
[ "${limit:-0}" -ge 1 ] || limit=1000
arrays() {
  awk -v limit="$limit" '
    function flush() { if (n) list = list (list == "" ? "" : ",") first (n > 1 ? "-" first + n - 1 : ""); n = 0 }
    { b = int(($1 - 1) / limit); i = $1 - b * limit
      if (b != base) { flush(); if (list != "") print base * limit, list; list = ""; base = b }
      if (n && i == first + n) n++; else { flush(); first = i; n = 1 } }
    END { flush(); if (list != "") print base * limit, list }'
}

name=$(basename "$out")
self=$(realpath -e "$0") || exit 1
common=(--plan "$plan" --out "$out" --logs "$logs" --tries "$tries" --pause "$pause")
submit() { sbatch --parsable --output "$logs/slurm.log" --open-mode=append --requeue ${more[@]+"${more[@]}"} "$@"; }

ids=''
if [ -n "$missing" ]; then
  while read -r from list; do
    id=$(submit --job-name "$name-build" --array "$list${at_once:+%$at_once}" --ntasks 1 --cpus-per-task "$cpus" --mem "$mem" \
      ${time:+--time "$time"} "$self" --step task --base "$from" "${common[@]}" -- ${options[@]+"${options[@]}"} </dev/null) ||
      fail "sbatch refused the array of builds"
    ids="$ids:${id%%;*}"
  done < <(arrays <<<"$missing")
fi
last=$(submit --job-name "$name-check" --ntasks 1 --mem 512M ${ids:+--dependency "afterany$ids"} "$self" --step check "${common[@]}") ||
  fail "sbatch refused the check"
last=${last%%;*}
jobs="${ids//:/ } $last"
if [ -n "$publish" ]; then
  last=$(submit --job-name "$name-publish" --ntasks 1 --mem 1G --dependency "afterok:$last" --kill-on-invalid-dep=yes \
    "$self" --step publish "${common[@]}" --publish "$publish") || fail "sbatch refused to publish"
  last=${last%%;*}
  jobs="$jobs $last"
fi
echo "slurm-build.sh: $(grep -c . <<<"$missing") buckets to build, jobs$(tr -s ' ' <<<" $jobs"), logs in $logs"
[ -n "$wait" ] || exit 0

# The last job ends last, whether it ran or was cancelled because the check failed.
while state=$(scontrol show job -o "$last" 2>/dev/null | grep -o 'JobState=[A-Z_]*'); do
  case $state in
    *=COMPLETED) exit 0 ;;
    *=PENDING | *=CONFIGURING | *=RUNNING | *=COMPLETING | *=SUSPENDED | *=REQUEUED) sleep 1 ;;
    *) fail "not complete: job $last ended as ${state#*=}; see $logs" ;;
  esac
done
fail "Slurm does not know job $last any more; see $logs"

#!/bin/bash
# run.sh - every check, called by `make test`: builds, C tests, the demo, SQL and tool tests, the same under sanitizers.
#
# A stage prints its output and its duration. C tests and pytest count by their own numbers, other stages as one. The last line
# is 'N passed, N failed'; the exit status is 0 only when something passed and nothing failed. Stages that need a package which
# is not there are left out with a line that says so; with CI set they fail instead, and so does a test that is skipped for it.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONDONTWRITEBYTECODE=1
unset MAKEFLAGS MAKELEVEL SAN OUT
jobs=$(nproc)
python=/usr/bin/python3
passed=0 failed=0
out=$(mktemp -d)
# One object store for all of pytest's runs, started by the first that needs it. It ends with this shell, however that ends.
if [ -z "${VECSHARD_S3_DIR-}" ]; then
  export VECSHARD_S3_DIR="$out/s3" VECSHARD_S3_OWNER=$$
fi
cleanup() {
  [ "$VECSHARD_S3_DIR" != "$out/s3" ] || "$python" test/s3/rgw.py stop "$VECSHARD_S3_DIR" --remove
  rm -rf "$out"
}
trap cleanup EXIT

count() { passed=$((passed + $1)); failed=$((failed + $2)); }

# Runs a command as a stage; its output stays in $out/last. Returns its status.
run() {
  local title=$1 start=$SECONDS status
  shift
  echo "==== $title"
  "$@" 2>&1 | tee "$out/last"
  status=${PIPESTATUS[0]}
  echo "---- $title: $((SECONDS - start)) s$([ "$status" = 0 ] || echo ", exit status $status")"
  return "$status"
}

# The same, with output (its last part) only when the command fails.
run_quietly() {
  local title=$1
  shift
  run "$title" logged "$@"
}
logged() {
  local status=0
  "$@" >"$out/log" 2>&1 || status=$?
  if [ $status = 0 ]; then grep -E '^\[  (PASSED|FAILED|SKIPPED) +\] [0-9]+ test' "$out/log"; else tail -n 200 "$out/log"; fi
  return $status
}

# A stage that passes or fails as a whole.
step() {
  if run "$@"; then count 1 0; else count 0 1; echo "FAILED: $1"; fi
}

# Sums the numbers that match a pattern with one number in it.
sum() { sed -nE "s/$1/\1/p" "$out/last" | awk '{n += $1} END {print n + 0}'; }

# Programs on cmocka ("[  PASSED  ] 12 test(s)."), a command line each, as many at once as there are cores. One that ends without a
# failure of its own but not with 0 has crashed. $1 is what their titles end with.
c_tests() {
  local suffix=$1 command name status seconds good bad
  shift
  printf '%s\0' "$@" | xargs -0 -P "$jobs" -n 1 bash -c '
    name=$(printf %s "$1" | tr -c a-zA-Z0-9 _) start=$SECONDS
    $1 >"$0/$name.log" 2>&1
    echo "$? $((SECONDS - start))" >"$0/$name.status"' "$out"
  for command; do
    name=$(printf %s "$command" | tr -c a-zA-Z0-9 _)
    read -r status seconds <"$out/$name.status"
    echo "==== ${command##*/}$suffix"
    cp "$out/$name.log" "$out/last"
    if [ "$status" = 0 ]; then grep -E '^\[  (PASSED|FAILED|SKIPPED) +\] [0-9]+ test' "$out/last"; else tail -n 200 "$out/last"; fi
    good=$(sum '.*\[  PASSED  \] ([0-9]+) test.*')
    bad=$(sum '.*\[  FAILED  \] ([0-9]+) test.*')
    if [ "$bad" = 0 ] && { [ "$status" != 0 ] || [ "$good" = 0 ]; }; then bad=1; fi
    echo "---- ${command##*/}$suffix: $seconds s$([ "$status" = 0 ] || echo ", exit status $status")"
    [ "$bad" = 0 ] || echo "FAILED: ${command##*/}$suffix"
    count "$good" "$bad"
  done
}

# pytest: "3 failed, 120 passed, 2 skipped, 1 error in 12.34s".
py_test() {
  local status=0 numbers good bad missing
  run "$@" || status=$?
  numbers=$(grep -E '[0-9]+ (passed|failed|errors?|skipped).* in [0-9.]+s' "$out/last" | tail -n 1)
  good=$(echo "$numbers" | grep -oE '[0-9]+ passed' | awk '{n += $1} END {print n + 0}')
  bad=$(echo "$numbers" | grep -oE '[0-9]+ (failed|error)' | awk '{n += $1} END {print n + 0}')
  if [ "$bad" = 0 ] && { [ $status != 0 ] || [ "$good" = 0 ]; }; then bad=1; fi
  if [ -n "${CI-}" ]; then
    missing=$(grep -cE '^SKIPPED .*(could not import|No module named|is not installed|not built|no tool|no sqlite3|no localedef|no source of)' "$out/last")
    [ "$missing" = 0 ] || { echo "FAILED: $1: skipped for lack of a package, and CI is set"; bad=$((bad + 1)); }
  fi
  [ "$bad" = 0 ] || echo "FAILED: $1"
  count "$good" "$bad"
}

# Something that is not there: left out, or a failure where CI is set.
lacking() {
  if [ -n "${CI-}" ]; then echo "FAILED: $1"; count 0 1; else echo "LEFT OUT: $1"; fi
}

finish() {
  echo "==== $SECONDS s in all"
  echo "$passed passed, $failed failed"
  [ "$failed" = 0 ] && [ "$passed" != 0 ]
  exit
}

# The longest first.
c_programs() { (cd test && ls -S test_*.c) | sed "s|^|$1/|; s|\.c$||"; }
# Three at a time on two cores: many tests wait for a store or for a clock. A file's tests stay together, and so do its shards.
pytest_all() {
  "$python" -m pytest -q -rs -p no:cacheprovider -n $((jobs + 1)) --dist loadfile --continue-on-collection-errors --durations=5 test
}

if ! run_quietly "build" make -s -j"$jobs" all c-tests; then echo "FAILED: build"; count 0 1; finish; fi
count 1 0
mapfile -t programs < <(c_programs build/test)

# The kernels of the other kind of CPU, emulated; 'max' is an ARM with every instruction that the emulator knows.
if [ "$(uname -m)" = x86_64 ]; then
  emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64)
  if [ -n "$emulator" ] && command -v aarch64-linux-gnu-gcc >/dev/null; then
    if run_quietly "build test_kernels, aarch64" \
        make -s -j"$jobs" CC=aarch64-linux-gnu-gcc OUT=build/aarch64 build/aarch64/test/bare_kernels; then
      programs=("$emulator -cpu max build/aarch64/test/bare_kernels" "${programs[@]}")
    else
      echo "FAILED: build test_kernels, aarch64"; count 0 1
    fi
  else
    lacking "kernels for aarch64: no aarch64-linux-gnu-gcc or no qemu-aarch64 (tool/install-deps test)"
  fi
fi
c_tests "" "${programs[@]}"

# The demo leaves the database whose first rows README.md shows; test_docs.py compares them.
step "demo" tool/demo.sh

has_pytest() { "$python" -c 'import pytest, xdist, numpy, h5py' 2>/dev/null; }
if has_pytest; then
  py_test "pytest" pytest_all
else
  lacking "pytest: /usr/bin/python3 lacks pytest, xdist, numpy or h5py (tool/install-deps test)"
fi

# Address and undefined behaviour. Python itself is not built for it: the runtime library is loaded first, leaks are its own.
# What a sanitizer finds ends the process, and pytest with it: the reports go to files, and are shown.
sanitized_pytest() {
  local status=0 report
  LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:log_path="$out/report" UBSAN_OPTIONS=print_stacktrace=1:log_path="$out/report" \
    VECSHARD_BUILD=build-address VECSHARD_TOOL="$PWD/build-address/vecshard" pytest_all || status=$?
  for report in "$out"/report.*; do
    [ -e "$report" ] && { head -n 40 "$report"; status=1; }
  done
  return $status
}
if run_quietly "build, SAN=address" make -s -j"$jobs" SAN=address all c-tests; then
  count 1 0
  mapfile -t programs < <(c_programs build-address/test)
  c_tests ", SAN=address" "${programs[@]}"
  has_pytest && py_test "pytest, SAN=address" sanitized_pytest
else
  echo "FAILED: build, SAN=address"; count 0 1
fi

# Threads. The thread sanitizer wants the usual address layout; where the kernel's is wider, randomisation is turned off. Of
# test_ivfpq those with threads, and small: all of it takes seven minutes.
plain=$(if setarch "$(uname -m)" -R true 2>/dev/null; then echo "setarch $(uname -m) -R "; fi)
if run_quietly "build, SAN=thread" make -s -j"$jobs" SAN=thread build-thread/test/test_base build-thread/test/test_ivfpq; then
  programs=("${plain}build-thread/test/test_base")
  for t in same_bytes filters brute_on_threads sketches many_partitions crowd runs kmeans failing_reads writer; do
    programs+=("${plain}build-thread/test/test_ivfpq test_$t")
  done
  c_tests ", SAN=thread" "${programs[@]}"
else
  echo "FAILED: build, SAN=thread"; count 0 1
fi

# Threads that search shards in a store, watched.
if run_quietly "build s3_threads, SAN=thread" make -s -j"$jobs" SAN=thread build-thread/test/s3_threads; then
  VECSHARD_THREADS_PROGRAM="${plain}build-thread/test/s3_threads" \
    py_test "threads and a store, SAN=thread" "$python" -m pytest -q -rs -p no:cacheprovider test/test_s3_shards.py -k watched
else
  echo "FAILED: build s3_threads, SAN=thread"; count 0 1
fi

if command -v clang >/dev/null; then
  step "build, clang" logged make -s -j"$jobs" CC=clang CFLAGS=-O0 OUT=build/clang all c-tests # for its warnings: at any level the same
else
  lacking "a build with clang, which is not installed (tool/install-deps test)"
fi
finish

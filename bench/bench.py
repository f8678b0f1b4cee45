#!/usr/bin/python3
"""bench.py - the benchmark of vecshard: searches through SQL on made or your own vectors, kernels, and other systems beside it.

    make bench                                   sets A and B, kernels: some minutes
    make bench QUICK=1                           a small set, seconds
    make bench ARGS='--sets A,B,C --json out.json'
    make bench ARGS='--set vectors.npy --metric cosine'
    make bench ARGS='--set base.f32 --dim 768 --queries queries.f32'
    make bench ARGS='--set glove-100-angular.hdf5'
    make bench-peers                             beside FAISS (Debian's package) and LanceDB (npm)
    make bench ARGS='--peers --faiss /opt/faiss' beside a FAISS of your own, which need not be installed

Settings are tuned on the first half of the queries; what is reported was measured on the others. q/s is by wall time of the best
pass; CPU us is CPU time of all threads per query, which says more on a machine that has other work. Bytes are what the scan and
the refining of one query take from the shard. What is set against FAISS comes from 15 rounds in which its measurement and ours
follow one another: of each the best, and under `side by side` the median of the rounds' ratios. Sets, shards, truth and peers'
indexes stay in the --data folder for the next run.
"""
import argparse
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
PROJECT = HERE.parent / os.environ.get("VECSHARD_BUILD", "build")
PARTS = ("search", "grid", "batch", "share", "recall", "curve", "kernels")

try:
    import bench_faiss
    import bench_kernels
    import bench_lancedb
    import bench_program
    import bench_report
    import bench_search
    import bench_sets
except ModuleNotFoundError as e:
    sys.exit("bench.py: %s: run it by /usr/bin/python3 with python3-numpy (tool/install-deps build)" % e)


def arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--sets", default=None, metavar="A,B,C", help="made sets: A 1,000,000 x 128 l2, B 300,000 x 960 cosine, "
                    "C 1,000,000 x 1,536 cosine (6 GB), quick 20,000 x 64 l2; default A,B")
    ap.add_argument("--set", action="append", default=[], metavar="FILE", dest="files", help=".f32 (with --dim), .npy, HDF5 as "
                    "ann-benchmarks has it, or a folder with base.f32, query.f32, meta.json; may repeat")
    ap.add_argument("--queries", metavar="FILE", help="of --set, in the same formats; else its `test`, or rows that are held out")
    ap.add_argument("--dim", type=int, help="of .f32 files")
    ap.add_argument("--metric", choices=("l2", "cosine", "dot"), help="of --set; default cosine, or what the file says")
    ap.add_argument("--data", default=str(PROJECT / "bench"), metavar="DIR", help="where sets and indexes are kept (default %(default)s)")
    ap.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    ap.add_argument("--build-args", default="", metavar="TEXT", help="more arguments for `vecshard build`, such as '--partitions 2000'")
    ap.add_argument("--peers", action="store_true", help="measure FAISS and LanceDB in the same run")
    ap.add_argument("--faiss", metavar="DIR", help="a build of FAISS: a folder with its headers and library; default Debian's libfaiss-dev")
    ap.add_argument("--no-lancedb", action="store_true", help="of the peers FAISS only")
    ap.add_argument("--quick", action="store_true", help="a small set and few settings: does it all work?")
    ap.add_argument("--json", metavar="FILE", help="write everything there, too")
    ap.add_argument("--turns", metavar="FILE", help="lock this file while timing, so that several benchmarks take turns")
    a = ap.parse_args()
    a.parts = [p for p in a.parts.split(",") if p]
    wrong = [p for p in a.parts if p not in PARTS]
    if wrong:
        ap.error("--parts: no %s; there are %s" % (wrong[0], ", ".join(PARTS)))
    a.sets = [s for s in (a.sets if a.sets is not None else "" if a.files else "quick" if a.quick else "A,B").split(",") if s]
    wrong = [s for s in a.sets if s not in bench_sets.MADE]
    if wrong:
        ap.error("--sets: no %s; there are %s" % (wrong[0], ", ".join(bench_sets.MADE)))
    if a.faiss:
        a.peers = True
    if (a.queries or a.dim) and not a.files:
        ap.error("--queries and --dim belong to --set")
    return a


def say(text):
    print(text, file=sys.stderr, flush=True)


def show(text):
    print(text + "\n", flush=True)


def machine():
    model = "unknown"
    if os.path.exists("/proc/cpuinfo"):
        names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith(("model name", "Model"))]
        model = names[0] if names else platform.machine()
    return dict(cpu=model, cores=len(os.sched_getaffinity(0)), system="%s %s" % (platform.system(), platform.release()))


def each_set(a):
    for name in a.sets:
        yield bench_sets.made(name, a.data, say)
    for f in a.files:
        yield bench_sets.given(f, a.queries, a.data, a.dim, a.metric, say=say)


def peers(a, data, goals, rival):
    """What every peer that is there reaches; for one that is not, the reason."""
    found = []
    place = bench_faiss.locate(a.faiss)
    tries = [("FAISS", lambda: bench_faiss.tuned(place, data, goals, say, rival, a.quick))]
    if not a.no_lancedb:
        tries.append(("LanceDB", lambda: bench_lancedb.tuned(data, a.data, goals, say)))
    for name, tune in tries:
        if name == "FAISS" and not place:
            show("  FAISS is not compared: no libfaiss-dev, and no --faiss")
            continue
        say("  %s" % name)
        try:
            peer = tune()
        except bench_sets.Failure as e:
            show("  %s" % e)
            continue
        if peer.get("note"):
            show("  %s: %s" % (peer["name"], peer["note"]))
        found.append(peer)
    return found


def write(path, report):
    if path:
        part = path + ".part"
        with open(part, "w") as f:
            json.dump(report, f, indent=1)
        os.replace(part, path)


def run(a):
    goals = (0.95, 0.99)
    report = dict(machine=machine(), sets=[], ratios=[])
    show("%(cpu)s, %(cores)d cores, %(system)s" % report["machine"])
    pathlib.Path(a.data).mkdir(parents=True, exist_ok=True)
    if "kernels" in a.parts:
        bench_program.turns.take()
        report["kernels"] = bench_kernels.measured(PROJECT / "bench")
        bench_program.turns.give()
        show(bench_report.kernels(report["kernels"]))
    for data in each_set(a) if a.parts != ["kernels"] else ():
        say("set %s" % data.name)
        data.truth(100)
        result = bench_search.whole(PROJECT, data, a.parts, goals, a.build_args.split(), a.quick, say)
        show(bench_report.search(result))
        if a.peers:
            with bench_search.Rival(PROJECT, data, result) as rival:
                result["peers"] = peers(a, data, goals, rival)
            report["ratios"] += bench_report.ratios(result)
        report["sets"].append(result)
        write(a.json, report)
    if report["ratios"]:
        show("ours against theirs, in this run, tuned on the same queries and reported on the same others\n" +
             bench_report.ratio_table(report["ratios"]))
    write(a.json, report)


def main():
    a = arguments()
    bench_program.turns.path = a.turns
    missing = [p for p in ("vecshard", "vecshard.so", "bench/bench_sql") if not (PROJECT / p).exists()]
    if missing:
        sys.exit("bench.py: %s is not built: run `make bench`" % (PROJECT / missing[0]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(a)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (bench_sets.Failure, OSError, subprocess.CalledProcessError) as e:
        sys.exit("bench.py: %s" % e)


if __name__ == "__main__":
    main()

"""bench_lancedb.py - LanceDB through npm, tuned over nprobes and refineFactor."""
import os
import pathlib
import shutil
import subprocess

from bench_program import Program, Search, cheapest, measure
from bench_sets import Failure

HERE = pathlib.Path(__file__).resolve().parent
NPROBES = (5, 8, 10, 14, 20, 28, 40, 56, 80, 112, 160)
REFINES = (2, 4, 8, 14, 20, 30)
QUERIES = 200  # of each half: a query takes some ten milliseconds


def installed(data, say):
    """The folder with LanceDB for node, installed there when it is not."""
    folder = pathlib.Path(data) / "lancedb"
    if not shutil.which("node") or not shutil.which("npm"):
        raise Failure("LanceDB cannot be compared: node and npm are not installed")
    if not (folder / "node_modules" / "@lancedb" / "lancedb").is_dir() or not (folder / "node_modules" / "apache-arrow").is_dir():
        say("  installing LanceDB with npm in %s" % folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text("{}")
        r = subprocess.run(["npm", "install", "--no-audit", "--no-fund", "@lancedb/lancedb", "apache-arrow@^18"], cwd=folder,
                           capture_output=True, text=True)
        if r.returncode:
            raise Failure("LanceDB cannot be compared: npm: %s" % (r.stderr.strip().splitlines() or ["failed"])[-1])
    return folder


class Some:
    """Some of the queries of a set, as a set: so many of the first half, then so many of the second."""

    def __init__(self, data, n):
        self.data, self.half = data, min(n, data.half)

    def recall(self, *a):
        return self.data.recall(*a)


def tuned(data, root, goals, say):
    folder = installed(root, say)
    place = data.cache / "lancedb"
    place.mkdir(exist_ok=True)
    link = place / "node_modules"
    if not link.exists():
        link.symlink_to((folder / "node_modules").resolve())
    threads = str(len(os.sched_getaffinity(0)))
    env = dict(os.environ, LANCE_CPU_THREADS=threads, LANCE_LOG="error")
    with Program("LanceDB", ["node", HERE / "bench_lancedb.mjs", data.base_file, data.query_file, data.dim, data.metric, place], env) as p:
        result = dict(name="LanceDB %s" % p.info["version"], version=p.info["version"], index=p.info["built"], points=[], best={},
                      note="LanceDB runs a query on as many threads as it likes: its queries per second of CPU time are the fair figure")
        some = Some(data, QUERIES)
        search = Search(p, some, 10, NPROBES, REFINES)
        p.run(0, some.half, 10, nprobe=NPROBES[-1], refine=REFINES[-1])  # warms
        for goal in goals:
            best = search.find(goal)
            if best:
                n = min(QUERIES, len(data.query) - data.half)
                words = dict(nprobe=best["nprobe"], refine=best["refine"])
                found = dict(single=measure(p, data, 10, data.half, n, passes=2, **words))
                try:
                    found["batch"] = measure(p, data, 10, data.batch_first, data.batch, batch=1, **words)
                except Failure as e:
                    say("  %s" % e)
                result["best"]["%.2f" % goal] = found
                for name, point in found.items():
                    say("  LanceDB at %.2f, %s: nprobes %d, refineFactor %d: recall %.4f, %.0f q/s (%.0f by CPU time)" % (
                        goal, name, point["nprobe"], point["refine"], point["recall"], point["qps"], point["qps_cpu"]))
        result["points"] = search.points
        return result

"""bench_search.py - what is measured of vecshard on one set, through SQL: every function returns a part of the report."""
import functools
import json
import os
import pathlib
import resource
import shutil
import subprocess
import time

from bench_program import Program, Search, cheapest, in_turns, measure, turns
from bench_sets import Failure

NPROBES = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23, 26, 30, 34, 38, 43, 48, 54, 60, 68, 76, 85, 96, 108, 120, 136, 152, 170, 192,
           216, 240, 272, 304, 340, 384, 432, 480, 544, 608, 680, 768, 864, 960, 1088, 1216, 1360, 1536, 2048, 2720, 4096)
REFINES = {10: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 25, 32, 40, 50, 64, 100, 200), 100: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 32)}
GRID = {10: ((8, 16, 32, 64, 128, 256), (2, 5, 10, 20, 40)), 100: ((16, 32, 64, 128, 256), (2, 4, 8, 16))}
ASKED = (0.80, 0.90, 0.95, 0.97, 0.99)
CURVE = (1, 10, 100, 1_000, 10_000, 50_000)


def built(project, data, arguments, say):
    """Builds the shard of a set unless it is there, from this tool and these arguments; what that took."""
    tool = project / "vecshard"
    out, note = data.cache / "shard", data.cache / "shard.json"
    st = tool.stat()
    key = [st.st_size, st.st_mtime_ns, str(data.base_file)] + arguments
    if note.exists():
        was = json.loads(note.read_text())
        if was["key"] == key:
            return out, was["build"]
    note.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    say("  building the shard")
    command = [tool, "build", data.base_file, "--dim", str(data.dim), "--metric", data.metric, "--out", out] + arguments
    turns.take()
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    r = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    turns.give()
    if r.returncode:
        raise Failure("vecshard build: %s" % (r.stderr.strip().splitlines() or ["status %d" % r.returncode])[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    build = dict(wall_s=wall, cpu_s=cpu, vectors_per_cpu_s=data.n / max(cpu, 1e-9), arguments=arguments,
                 bytes=sum(f.stat().st_size for f in out.rglob("*") if f.is_file()))
    note.write_text(json.dumps(dict(key=key, build=build)))
    return out, build


def opened(project, data, shard, env=None):
    return Program("bench_sql", [project / "bench" / "bench_sql", project / "vecshard", shard, data.query_file, data.dim],
                   dict(os.environ, **(env or {})))


def warm(p, data):
    """Every code and most vectors come into memory, and their checks are done, before anything is timed."""
    n = min(len(data.query), 200)
    p.run(0, 1, 10, nprobe=1 << 30, refine=100, threads=1)
    p.run(0, n, 10, nprobe=64, refine=50, threads=1)


def traced(p, data, point, first, n):
    """Adds what the searches of a point did: partitions, rows and bytes per query. Bytes are what a store would send: the codes and
    terms of the rows that are scanned, and the records of the rows that are refined."""
    words = {w: point[w] for w in ("nprobe", "refine", "recall_asked", "threads", "batch") if w in point}
    if "recall_asked" in words:
        words["recall"] = words.pop("recall_asked")
    t = p.ask("trace", first=first, n=n, k=point["k"], out=p.out.name, **words)
    s = p.info["segments"][0]
    scan_row = s["code_bytes"] + s["term_bytes"] if s["code_bytes"] else s["row_bytes"]
    point.update(partitions=t["partitions"] / n, rows=t["rows"] / n, refined=t["refined"] / n, scan_bytes=t["rows"] * scan_row / n,
                 refine_bytes=t["refined"] * s["row_bytes"] / n, scan_us=1e3 * t["scan_ms"] / n, refine_us=1e3 * t["refine_ms"] / n,
                 read_bytes=t["read"] / n)
    return point


def grid(p, data, k, quick):
    """The table of nprobe x refine, on the tuning half."""
    nprobes, refines = GRID[k]
    if quick:
        nprobes, refines = nprobes[::2], refines[::2]
    out = []
    for nprobe in nprobes:
        for refine in refines:
            out.append(traced(p, data, measure(p, data, k, 0, data.half, nprobe=nprobe, refine=refine, threads=1), 0, data.half))
    return out


def reported(p, data, k, search, goals, passes):
    """Per goal the cheapest setting of the tuning half, measured on the other half."""
    out = {}
    left = len(data.query) - data.half
    for goal in goals:
        search.find(goal)
        close = cheapest(search.points, goal, 6)
        if not close:
            out["%.2f" % goal] = None
            continue
        again = in_turns([functools.partial(measure, p, data, k, 0, data.half, nprobe=c["nprobe"], refine=c["refine"], threads=1)
                          for c in close], 1 if passes < 3 else 8)
        best = (cheapest(again, goal) or again)[0]
        point = measure(p, data, k, data.half, left, passes=passes, nprobe=best["nprobe"], refine=best["refine"], threads=1)
        out["%.2f" % goal] = traced(p, data, point, data.half, left)
    return out


def batches(p, data, goals, singles, quick):
    """Some 1,000 queries in one statement, on one and two threads; settings tuned as batches on the first half."""
    out = {}
    for goal in goals:
        single = singles["%.2f" % goal]
        if not single:
            continue
        near = [n for n in NPROBES if 0.6 * single["nprobe"] <= n <= 2 * single["nprobe"]]
        search = Search(p, data, 10, near, [r for r in REFINES[10] if r <= 3 * single["refine"]], batch=1, threads=1, passes=2)
        search.find(goal)
        close = cheapest(search.points, goal, 6)
        again = in_turns([functools.partial(measure, p, data, 10, 0, data.half, batch=1, threads=1, nprobe=c["nprobe"], refine=c["refine"])
                          for c in close], 1 if quick else 8)
        best = (cheapest(again, goal) or [single])[0]
        found = {}
        for threads in (1, 2):
            found["batch_%d" % threads] = measure(p, data, 10, data.batch_first, data.batch, batch=1, threads=threads,
                                                  passes=3 if quick else 15, nprobe=best["nprobe"], refine=best["refine"])
        out["%.2f" % goal] = found
    return out


class Rival:
    """Our own searches at the settings that were found, one measurement each time, for a peer that is measured beside them."""

    def __init__(self, project, data, result):
        self.data, self.result = data, result
        self.program = opened(project, data, data.cache / "shard")
        warm(self.program, data)

    def __enter__(self):
        return self

    def __exit__(self, *why):
        self.program.__exit__(*why)

    def of(self, goal, way):
        """A function that measures what a peer's `way` is compared with, or None."""
        name = "%.2f" % goal
        best = dict(single=self.result["tuned"]["10"].get(name), **self.result.get("batch", {}).get(name, {})).get(way)
        if not best:
            return None
        d, words = self.data, dict(nprobe=best["nprobe"], refine=best["refine"], threads=best["threads"], passes=3)
        if way == "single":
            return functools.partial(measure, self.program, d, 10, d.half, len(d.query) - d.half, **words)
        return functools.partial(measure, self.program, d, 10, d.batch_first, d.batch, batch=1, **words)


def curve(p, data, quick):
    """From one row to 50,000, nothing given but k: time, recall, and the time against that of the scan alone."""
    out = []
    n = min(10 if quick else 50, len(data.query) - data.half)
    ks = [k for k in CURVE if k <= data.n // 2]
    deep = data.truth(ks[-1], data.half, n)
    for k in ks:
        try:
            point = measure(p, data, k, data.half, n, deep, passes=3, threads=1)
        except Failure as e:
            raise Failure("k = %d: %s" % (k, e))
        scans = [traced(p, data, point, data.half, n)["scan_us"] for _ in range(3)]
        mean, point["scan_us"] = 1e6 / point["qps"], min(scans)
        point.update(mean_us=mean, of_scan=mean / point["scan_us"] if point["scan_us"] else None)
        out.append(point)
    return out


def asked(p, data, search, quick):
    """`recall = r`: what is reached on the second half, and the cost against the cheapest (nprobe, refine) that reached r on the
    first, both measured on the second."""
    out = []
    left = len(data.query) - data.half
    for r in ASKED[1::2] if quick else ASKED:
        point = measure(p, data, 10, data.half, left, recall=r, passes=3, threads=1)
        point["recall_asked"] = r
        traced(p, data, point, data.half, left)
        search.find(r)
        cheap = cheapest(search.points, r)
        if cheap:
            by = measure(p, data, 10, data.half, left, passes=3, nprobe=cheap[0]["nprobe"], refine=cheap[0]["refine"], threads=1)
            point.update(by_nprobe=by["nprobe"], by_refine=by["refine"], by_recall=by["recall"], by_cpu_us=by["cpu_us"],
                         cost=point["cpu_us"] / by["cpu_us"])
        out.append(point)
    return out


def asked_far(project, data, shard):
    """The same for queries that are unlike the rows: the calibration did not see such. None of a recall: nothing but k is given."""
    far = data.far()
    out = []
    with opened(project, far, shard) as p:
        warm(p, far)
        for r in (None, 0.90, 0.95, 0.99):
            point = measure(p, far, 10, 0, len(far.query), recall=r, passes=2, threads=1)
            point["recall_asked"] = r
            out.append(traced(p, far, {k: v for k, v in point.items() if v is not None}, 0, len(far.query)))
    return out


def share(p, data, point, quick):
    """Microseconds of a query that are SQLite's and the table's: prepared once, and prepared for each query."""
    n = min(len(data.query) - data.half, 1000)
    t = p.ask("share", first=data.half, n=n, k=10, nprobe=point["nprobe"], refine=point["refine"], threads=1, passes=3 if quick else 9)
    return dict(t, nprobe=point["nprobe"], refine=point["refine"], share_us=t["sql_us"] - t["core_us"],
                share_prepared_anew_us=t["prepared_anew_us"] - t["core_us"])


def plain_reads(project, data, shard, point):
    """What the process really reads per query when files are not mapped, codes, centroids and vectors alike."""
    n = min(100, len(data.query) - data.half)
    with opened(project, data, shard, {"VECSHARD_MMAP": "0"}) as p:
        p.run(data.half, n, 10, nprobe=point["nprobe"], refine=point["refine"], threads=1)
        return traced(p, data, dict(point, threads=1), data.half, n)["read_bytes"]


def whole(project, data, parts, goals, arguments, quick, say):
    """Everything of one set."""
    shard, build = built(project, data, arguments, say)
    result = dict(set=data.name, rows=data.n, dim=data.dim, metric=data.metric, build=build,
                  queries=dict(tuning=data.half, reported=len(data.query) - data.half, batch=data.batch))
    nprobes = NPROBES[::3] if quick else NPROBES
    with opened(project, data, shard) as p:
        result.update(vecshard=p.info)
        warm(p, data)
        search = Search(p, data, 10, nprobes, REFINES[10][::3] if quick else REFINES[10], threads=1, passes=1 if quick else 2)
        say("  settings for k = 10")
        result["tuned"] = {"10": reported(p, data, 10, search, goals, 2 if quick else 7)}
        for best in result["tuned"]["10"].values():
            if best:
                best["plain_read_bytes"] = plain_reads(project, data, shard, best)
        if "grid" in parts:
            say("  nprobe x refine")
            result["grid"] = {"10": grid(p, data, 10, quick)}
            if data.n >= 1000:
                result["grid"]["100"] = grid(p, data, 100, quick)
                result["tuned"]["100"] = reported(p, data, 100, Search(p, data, 100, nprobes, REFINES[100], threads=1), goals, 2)
        top = result["tuned"]["10"].get("%.2f" % goals[0])
        if "batch" in parts:
            say("  batches")
            result["batch"] = batches(p, data, goals, result["tuned"]["10"], quick)
        if "share" in parts and top:
            say("  SQL's share")
            result["share"] = share(p, data, top, quick)
        if "recall" in parts:
            say("  recall = r")
            try:
                result["recall"] = asked(p, data, search, quick)
                result["recall_far"] = asked_far(project, data, shard)
            except Failure as e:
                result["recall_error"] = str(e)
        if "curve" in parts:
            say("  k from 1 to %d" % CURVE[-1])
            result["curve"] = curve(p, data, quick)
        result["points"] = search.points
    return result

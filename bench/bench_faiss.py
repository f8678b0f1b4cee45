"""bench_faiss.py - FAISS in its best setting for a set: compiled against the build that is given, indexes tried, settings tuned.

Tried are IVF{nlist},PQ{M}x4fs with lists from sqrt(n) to 4 sqrt(n) and M of dim/8 to dim/2, then for the best of these the
residual form (x4fsr), 8-bit codes and a graph over the centroids; refined from float32 (RFlat) with every k_factor of FACTORS.
"""
import functools
import os
import pathlib
import platform
import subprocess

from bench_program import Program, Search, cheapest, in_turns, measure
from bench_sets import Failure

HERE = pathlib.Path(__file__).resolve().parent
ROUNDS = (4, 15)  # of close calls; of ours and FAISS's beside one another
FACTORS = (2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32)
NPROBES = (4, 6, 8, 10, 12, 14, 16, 18, 20, 23, 26, 30, 34, 38, 43, 48, 54, 60, 68, 76, 85, 96, 108, 120, 136, 152, 170, 192, 216,
           240, 272, 304, 340, 384, 432, 480, 544, 608, 680)


def simd_rank(path):
    """The widest instructions this machine has, by the name of the library; a plain name comes last."""
    flags = pathlib.Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    for rank, (name, flag) in enumerate((("avx512_spr", "avx512_fp16"), ("avx512", "avx512vl"), ("avx2", "avx2"), ("sve", " sve"))):
        if name in path.name:
            return rank if flag in flags else None
    return 9


def locate(folder):
    """(include folder or None, library) of a build: a folder that holds both somewhere, or lies in one that does."""
    if folder is None:
        for lib in sorted(pathlib.Path("/usr/lib").glob("*/libfaiss.so")) + sorted(pathlib.Path("/usr/lib").glob("*/libfaiss.a")):
            if os.path.exists("/usr/include/faiss/Index.h"):
                return None, lib
        return None
    folder = pathlib.Path(folder).resolve()
    if not folder.is_dir():
        raise Failure("--faiss %s: no such folder" % folder)
    libraries = [f for p in ("libfaiss*.so", "libfaiss*.a") for f in folder.rglob(p) if "_c" not in f.stem and "python" not in f.stem]
    ranked = sorted((simd_rank(f), len(f.parts), str(f)) for f in libraries if simd_rank(f) is not None)
    headers = [d for d in (folder, folder / "include", folder.parent, folder.parent / "include") if (d / "faiss" / "Index.h").exists()]
    if not ranked or not headers:
        raise Failure("--faiss %s: %s" % (folder, "no faiss/Index.h there or beside it" if ranked else "no libfaiss below it"))
    return headers[0], pathlib.Path(ranked[0][2])


def compiled(found, out):
    """Compiles bench_faiss.cpp; returns the program."""
    include, library = found
    program = pathlib.Path(out) / "bench_faiss"
    source = HERE / "bench_faiss.cpp"
    stamp = program.with_suffix(".from")  # the build of FAISS that it was compiled with
    if program.exists() and stamp.exists() and stamp.read_text() == str(library) and program.stat().st_mtime > max(
            source.stat().st_mtime, library.stat().st_mtime):
        return program
    base = [os.environ.get("CXX", "g++"), "-O2", "-std=c++20", "-fopenmp", str(source), "-o", str(program)]
    base += ["-I%s" % include] if include else []
    last = ""
    for blas in (["-lopenblas"], ["-lblas", "-llapack"]):
        try:
            r = subprocess.run(base + [str(library), "-Wl,-rpath,%s" % library.parent] + blas, capture_output=True, text=True)
        except OSError as e:
            raise Failure("FAISS cannot be compared: %s" % e)
        if not r.returncode:
            stamp.write_text(str(library))
            return program
        last = [line for line in r.stderr.splitlines() if "error" in line or "cannot find" in line] or r.stderr.splitlines() or [""]
    raise Failure("bench_faiss.cpp does not compile with %s: %s" % (library, last[0]))


def instruction_set(info):
    options = info["options"].upper()
    for name in ("AVX512_SPR", "AVX512", "AVX2", "NEON", "SVE"):
        if name in options:
            return name
    return "generic code"


def divisor(dim, want):
    """The number of sub-vectors nearest to `want` that divides dim."""
    return min((m for m in range(1, dim + 1) if dim % m == 0), key=lambda m: abs(m - want))


def tuned(found, data, goals, say, rival, quick=False):
    """The result for the report: what ran, every point, and per goal the best of single queries and of batches."""
    folder = data.cache / "peers"
    folder.mkdir(exist_ok=True)
    threads = len(os.sched_getaffinity(0))
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive")
    with Program("FAISS", [compiled(found, folder), data.base_file, data.query_file, data.dim, data.metric, folder, threads], env) as p:
        simd = instruction_set(p.info)
        result = dict(name="FAISS %s, %s" % (p.info["version"], simd), version=p.info["version"], instruction_set=simd,
                      options=p.info["options"], library=str(found[1].name), indexes=[], points=[], best={})
        if simd == "generic code" and platform.machine() == "x86_64":
            result["note"] = "this build of FAISS is generic code, without AVX2 or AVX-512: give a better one with --faiss"
        root = data.n ** 0.5
        lists = [round(f * root) for f in ((1,) if quick else (1, 2, 4))]
        widths = sorted({divisor(data.dim, data.dim / d) for d in ((4,) if quick else (8, 4, 2))})
        nprobes = NPROBES[::4] if quick else NPROBES
        factors = FACTORS[::3] if quick else FACTORS

        def open_index(choice):
            nlist, codes, hnsw = choice
            made = p.ask("index", nlist=nlist, codes=codes, hnsw=hnsw or None)
            name = "IVF%d%s,%s,RFlat" % (nlist, "_HNSW%d" % hnsw if hnsw else "", codes)
            return dict(made, name=name, choice=choice)

        def try_index(choice):
            made = open_index(choice)
            search = Search(p, data, 10, nprobes, factors, threads=1)
            for goal in goals:
                top = search.find(goal, best_cost(goal))
                say("  %s: %s" % (made["name"], "recall %.4f, %.0f q/s CPU, nprobe %d, k_factor %d" % (
                    top["recall"], top["qps_cpu"], top["nprobe"], top["refine"]) if top else "nothing better for %.2f" % goal))
            result["indexes"].append(made)
            result["points"] += [dict(point, index=made["name"], choice=choice) for point in search.points]
            return max(point["recall"] for point in search.points)

        def best_cost(goal):
            top = cheapest(result["points"], goal)
            return 1.2 * top[0]["cpu_us"] if top else float("inf")

        for nlist in lists:
            for m in list(widths):
                reached = try_index((nlist, "PQ%dx4fs" % m, 0))
                if reached < min(goals) and len(widths) > 1:
                    widths.remove(m)  # more lists do not make up for codes that are too short
        if not quick:
            more = set()
            for goal in goals:
                for top in cheapest(result["points"], goal):
                    nlist, codes, _ = top["choice"]
                    m = int(codes[2:].split("x")[0])
                    more |= {(nlist, "PQ%dx4fsr" % m, 0), (nlist, codes, 32), (nlist, "PQ%d" % divisor(data.dim, data.dim / 8), 0)}
            for choice in sorted(more):
                try_index(choice)
        for goal in goals:
            result["best"]["%.2f" % goal] = finals(p, data, result["points"], goal, open_index, say, threads, rival, quick)
        return result


def contenders(points, goal, n_indexes, each):
    """The cheapest points that reach the goal: so many of each of the best indexes."""
    chosen = {}
    for p in sorted((p for p in points if p["recall"] >= goal), key=lambda p: p["cpu_us"]):
        if p["choice"] in chosen or len(chosen) < n_indexes:
            chosen.setdefault(p["choice"], []).append(p)
    return {choice: found[:each] for choice, found in chosen.items()}


def rematch(p, data, points, open_index, rounds, **words):
    """Points of several indexes, each measured again in several rounds; of every point the best."""
    def once(c):
        open_index(c["choice"])
        point = measure(p, data, 10, 0, data.half, passes=2, nprobe=c["nprobe"], refine=c["refine"], threads=1, **words,
                        **({"implem": c["implem"]} if "implem" in c else {}))
        return dict(point, index=c["index"], choice=c["choice"])

    return in_turns([functools.partial(once, c) for c in points], rounds)


def beside(p, data, point, rival, rounds, first, n, **words):
    """A point on queries that tuned nothing, in turns with ours: of both the best, and the middle of the ratios of neighbours."""
    again = functools.partial(measure, p, data, 10, first, n, nprobe=point["nprobe"], refine=point["refine"], passes=3, **words)
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(again())
        if rival:
            ours.append(rival())
    best = dict(max(theirs, key=lambda q: q["qps"]), index=point["index"])
    if ours:
        ratios = sorted(o["qps"] / t["qps"] for o, t in zip(ours, theirs))
        best["ours"] = dict(max(ours, key=lambda q: q["qps"]), ratio_of_neighbours=ratios[len(ratios) // 2])
    return best


def finals(p, data, points, goal, open_index, say, threads, rival, quick):
    """Close calls are measured again, then the winner on the queries that tuned nothing; batches get settings of their own."""
    singles, batches = [], []
    again, rounds = (1, 2) if quick else ROUNDS
    for choice, close in contenders(points, goal, 4, 3).items():
        made = open_index(choice)
        singles += close
        near = [n for n in NPROBES if 0.6 * close[0]["nprobe"] <= n <= 1.7 * close[0]["nprobe"]]
        for implem in (0, 11):  # what it chooses itself; one query after another
            search = Search(p, data, 10, near, FACTORS, batch=1, threads=1, implem=implem, passes=2)
            search.find(goal)
            batches += [dict(found, index=made["name"], choice=choice) for found in cheapest(search.points, goal, 2)]
    if not singles:
        return None
    matched = rematch(p, data, singles, open_index, again)
    best = (cheapest(matched, goal) or matched)[0]
    open_index(best["choice"])
    out = dict(single=beside(p, data, best, rival.of(goal, "single"), rounds, data.half, len(data.query) - data.half, threads=1))
    b = (cheapest(rematch(p, data, cheapest(batches, goal, 6), open_index, again, batch=1), goal) or [dict(best, implem=0)])[0]
    open_index(b["choice"])
    for t in sorted({1, min(2, threads)}):
        way = "batch_%d" % t
        out[way] = beside(p, data, b, rival.of(goal, way), rounds, data.batch_first, data.batch, batch=1, threads=t, implem=b["implem"])
    for name, point in out.items():
        say("  FAISS at %.2f, %s: %s, nprobe %d, k_factor %g: recall %.4f, %.0f q/s (%.0f by CPU time)" % (
            goal, name, point["index"], point["nprobe"], point["refine"], point["recall"], point["qps"], point["qps_cpu"]))
    return out

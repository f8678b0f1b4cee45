"""bench_kernels.py - the kernel table: each kernel of ext/kernels beside the machine's ceilings and beside numpy.

    bench_kernels.py numpy     (internal) times numpy's operations on the same shapes, one thread; one line of JSON
"""
import json
import os
import subprocess
import sys
import time

import numpy as np

CEILING = {"flop": "fma_f32", "op": "dot_i8", "lookup": "lookup_u8", "byte": "read_l2"}  # what bounds a kernel of that unit
UNIT = {"flop": "GFLOP/s", "op": "Gop/s", "lookup": "Glookup/s", "byte": "GB/s"}


def numpy_times():
    g = np.random.default_rng(1)
    dim, rows, many, few, long, keys, want = 960, 1024, 256, 64, 16384, 100_000, 1000
    x = g.standard_normal((rows, dim), dtype=np.float32)
    q = g.standard_normal((many, dim), dtype=np.float32)
    v, flat, half = q[0], x.reshape(-1)[:long].copy(), x.reshape(-1)[:long].astype(np.float16)
    xb, qb = g.integers(-127, 128, (rows, dim)).astype(np.int8), g.integers(-127, 128, (few, dim)).astype(np.int8)
    xi, qi = xb.astype(np.float32), qb.astype(np.float32)  # numpy multiplies bytes without BLAS: floats are its fast way
    many_keys = g.integers(0, 1 << 62, keys, dtype=np.uint64)

    many_rows, bias, some = g.standard_normal((1024, dim), dtype=np.float32), -(x ** 2).sum(1) / 2, g.integers(0, rows, few)

    def l2sq():
        d = v - x[0]
        return d @ d

    tests = {
        ("dot_f32", "960"): lambda: v @ x[0],
        ("l2sq_f32", "960"): l2sq,
        ("f16_to_f32", "16384"): lambda: half.astype(np.float32),
        ("f32_to_f16", "16384"): lambda: flat.astype(np.float16),
        ("all_finite_f32", "16384"): lambda: np.isfinite(flat).all(),
        ("scores_f32", "1 x 960 x 1024"): lambda: x @ v,
        ("scores_many_f32", "256 x 960 x 1024"): lambda: q @ x.T,
        ("argmax_f32", "256 x 960 x 1024"): lambda: (q @ x.T).argmax(1),
        ("scores_i8", "1 x 960 x 1024"): lambda: xi @ qi[0],
        ("scores_i8", "64 x 960 x 1024"): lambda: qi @ xi.T,
        ("select_u64", "1000 of 100000"): lambda: np.argpartition(many_keys, want)[:want],
        ("kern_sort_u64", "100000"): lambda: np.sort(many_keys),
        ("kern_nearest_find", "1024 x 960 x 1024"): lambda: (many_rows @ x.T + bias).argmax(1),
        ("kern_sum_rows_f32", "64 x 960"): lambda: x[some].sum(0),
        ("kern_scale_sub_f32", "960"): lambda: x[0] * np.float32(0.5) - v,
    }
    out = []
    for (kernel, shape), call in tests.items():
        call()
        best = float("inf")
        for _ in range(5):
            n, start = 0, time.thread_time()
            while True:
                for _ in range(n // 4 + 1):
                    call()
                n += n // 4 + 1
                spent = time.thread_time() - start
                if spent > 0.01:
                    break
            best = min(best, spent / n)
        out.append(dict(kernel=kernel, shape=shape, ns=best * 1e9))
    return out


def measured(folder):
    """{"ceilings": {...}, "kernels": [...]}; folder holds the programs."""
    one = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    ceilings = json.loads(subprocess.run([folder / "bench_ceilings"], capture_output=True, text=True, check=True).stdout)
    lines = subprocess.run([folder / "bench_kernels"], capture_output=True, text=True, check=True).stdout.splitlines()
    theirs = json.loads(subprocess.run([sys.executable, __file__, "numpy"], capture_output=True, text=True, check=True, env=one).stdout)
    numpy_ns = {(t["kernel"], t["shape"]): t["ns"] for t in theirs}
    kernels = []
    for line in lines:
        k = json.loads(line)
        variant, ns = min(k["ns"].items(), key=lambda item: item[1])
        what = "tile_i8" if variant == "amx" and k["unit"] == "op" else CEILING[k["unit"]]
        bound = k["work"] / ceilings[what] if ceilings[what] else 0
        memory = "read_dram" if k["bytes"] > 32 << 20 else "read_l3"
        if k["bytes"] / ceilings[memory] > bound:
            bound, what = k["bytes"] / ceilings[memory], memory
        k.update(best=variant, per_s=k["work"] / ns * 1e9, ceiling=what, of_ceiling=1e9 * bound / ns if bound else None,
                 numpy_ns=numpy_ns.get((k["kernel"], k["shape"])))
        kernels.append(k)
    return dict(ceilings=ceilings, kernels=kernels)


def table(found):
    """Header and rows for bench_report.columns."""
    variants = [v for v in ("scalar", "neon", "dotprod", "avx2", "avx512", "amx") if any(v in k["ns"] for k in found["kernels"])]
    head = ["kernel", "shape"] + ["%s ns" % v for v in variants] + ["speed", "of", "ceiling", "numpy ns", "times numpy"]
    rows = []
    for k in found["kernels"]:
        rows.append([k["kernel"], k["shape"]] + ["%.1f" % k["ns"][v] if v in k["ns"] else "" for v in variants] +
                    ["%.1f %s" % (k["per_s"] / 1e9, UNIT[k["unit"]]), "%.0f %%" % (100 * k["of_ceiling"]) if k["of_ceiling"] else "",
                     k["ceiling"], "%.1f" % k["numpy_ns"] if k["numpy_ns"] else "",
                     "%.1f" % (k["numpy_ns"] / k["ns"][k["best"]]) if k["numpy_ns"] else ""])
    return head, rows


if __name__ == "__main__" and sys.argv[1:] == ["numpy"]:
    print(json.dumps(numpy_times()))

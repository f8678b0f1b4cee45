"""The benchmark still runs: a quick run's report is whole and plausible, its truth is brute force's, users' files are read, what is
wrong is said in one line, and Ctrl-C leaves nothing behind. Needs build/bench (make bench-programs)."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from conftest import ROOT, plain_environ

sys.path.insert(0, str(ROOT / "bench"))
import bench_sets  # noqa: E402

pytestmark = pytest.mark.plain_only("times under a sanitizer say nothing")


@pytest.fixture(scope="module", autouse=True)
def programs():
    subprocess.run(["make", "-s", "bench-programs"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def bench(*args, status=0):
    r = subprocess.run([str(ROOT / "bench" / "bench.py"), *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300, env=plain_environ())
    assert r.returncode == status, (r.returncode, r.stdout[-1000:], r.stderr[-1000:])
    assert "Traceback" not in r.stderr
    return r


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    r = bench("--quick", "--data", folder / "data", "--json", folder / "out.json")
    return r.stdout, json.loads((folder / "out.json").read_text())


def test_recall_and_costs_are_plausible(quick):
    _, report = quick
    (found,) = report["sets"]
    assert (found["rows"], found["dim"], found["metric"]) == (20_000, 64, "l2")
    for goal in ("0.95", "0.99"):
        best = found["tuned"]["10"][goal]
        assert best["recall"] >= float(goal) - 0.03  # on other queries than those that it was tuned on
        assert best["qps"] > 0 and best["cpu_us"] > 0 and best["p50_us"] <= best["p99_us"]
        assert best["rows"] >= best["partitions"] >= 1 and best["refined"] >= 10
        assert best["scan_bytes"] > best["rows"] and best["refine_bytes"] >= 4 * 64 * 10
        assert best["plain_read_bytes"] >= best["scan_bytes"]
    for k in ("10", "100"):
        points = found["grid"][k]
        last = max(p["nprobe"] for p in points)
        refined = [p["recall"] for p in points if p["nprobe"] == last]
        assert refined == sorted(refined) and refined[-1] >= 0.99


def test_batches_answer_as_single_queries_do(quick):
    _, report = quick
    (found,) = report["sets"]
    for goal, batches in found["batch"].items():
        assert set(batches) == {"batch_1", "batch_2"}
        assert batches["batch_1"]["recall"] == batches["batch_2"]["recall"] >= float(goal) - 0.03


def test_curve_share_and_recall(quick):
    _, report = quick
    (found,) = report["sets"]
    assert [p["k"] for p in found["curve"]] == [1, 10, 100, 1000, 10_000]
    assert all(p["recall"] > 0.9 and p["of_scan"] > 0 for p in found["curve"])
    assert found["share"]["sql_us"] > 0 and found["share"]["core_us"] > 0
    assert found["recall"] and len(found["recall_far"]) == 4
    for p in found["recall"]:
        assert p["recall"] >= p["recall_asked"] - 0.05 and p["cost"] > 0


def test_every_kernel_is_timed(quick):
    """One that was added to kern.h is one row more in bench_kernels.c."""
    text, report = quick
    timed = {k["kernel"] for k in report["kernels"]["kernels"]}
    header = (ROOT / "ext" / "kernels" / "kern.h").read_text()
    table = header.split("typedef struct kern {")[1].split("} kern;")[0]
    assert set(re.findall(r"\(\*(\w+)\)\(", table)) - timed == set()
    assert {n for n in re.findall(r"^void (kern_\w+)\(", header, re.M) if "pack" not in n and "init" not in n} - timed == set()
    assert all(ns > 0 for k in report["kernels"]["kernels"] for ns in k["ns"].values())
    assert report["kernels"]["ceilings"]["fma_f32"] > 1e9 and report["kernels"]["ceilings"]["read_dram"] > 1e8
    assert "pq_scan" in text and "times numpy" in text


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_truth_is_brute_force(metric):
    g = np.random.default_rng(5)
    x = (g.standard_normal((5000, 24)) + 3).astype(np.float32)
    x[1000:1400] = x[7]  # more equal rows than there are candidates
    q = np.concatenate((x[7:8], g.standard_normal((20, 24)).astype(np.float32)))
    ids, distances = bench_sets.nearest(x, q, metric, 50)
    for i in range(len(q)):
        d = bench_sets.exact_distances(q[i], x, metric)
        order = np.lexsort((np.arange(len(x)), d))[:50]
        assert (ids[i] == order).all() and np.allclose(distances[i], d[order], rtol=1e-12, atol=0)


def test_users_files(tmp_path):
    g = np.random.default_rng(6)
    x = g.standard_normal((6000, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    with h5py.File(tmp_path / "ann.hdf5", "w") as f:
        f["train"], f["test"] = x, x[:60] + np.float32(0.1)
        f.attrs["distance"] = "euclidean"
    x.tofile(tmp_path / "x.f32")
    (x[:40] + np.float32(0.1)).tofile(tmp_path / "q.f32")
    for name, more, rows, queries, metric in (("x.npy", ("--metric", "dot"), 5400, 600, "dot"), ("ann.hdf5", (), 6000, 60, "l2"),
                                              ("x.f32", ("--dim", "32", "--queries", tmp_path / "q.f32"), 6000, 40, "cosine")):
        out = tmp_path / (name + ".json")
        bench("--set", tmp_path / name, *more, "--quick", "--parts", "search", "--data", tmp_path / "data", "--json", out)
        (found,) = json.loads(out.read_text())["sets"]
        assert (found["rows"], found["queries"]["tuning"] + found["queries"]["reported"], found["metric"]) == (rows, queries, metric)


def test_faiss_beside_it(tmp_path):
    if not os.path.exists("/usr/include/faiss/Index.h"):
        pytest.skip("nothing to compare with: libfaiss-dev (tool/install-deps bench)")
    r = bench("--quick", "--peers", "--no-lancedb", "--parts", "batch", "--data", tmp_path, "--json", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert {(x["goal"], x["way"]) for x in report["ratios"]} >= {("0.95", "single"), ("0.95", "batch_1"), ("0.95", "batch_2")}
    assert all(x["ratio"] > 0 and x["theirs_recall"] > 0.9 for x in report["ratios"])
    assert "ours against theirs" in r.stdout and "generic code" in r.stdout


@pytest.mark.parametrize("args,status,says", [
    (("--set", "nowhere.npy", "--parts", "search"), 1, "nowhere.npy: no such file"),
    (("--sets", "Z"), 2, "no Z"),
    (("--parts", "luck"), 2, "no luck"),
    (("--sets", "quick", "--faiss", "/nowhere", "--parts", "search"), 1, "/nowhere"),
])
def test_errors_are_one_line(args, status, says, tmp_path):
    r = bench(*args, "--quick", "--data", tmp_path, status=status)
    assert says in r.stderr.splitlines()[-1]


def test_wrong_shapes_are_refused(tmp_path):
    np.zeros(33, np.float32).tofile(tmp_path / "x.f32")
    assert "--dim" in bench("--set", tmp_path / "x.f32", "--data", tmp_path, "--parts", "search", status=1).stderr
    assert "132 bytes" in bench("--set", tmp_path / "x.f32", "--dim", "32", "--data", tmp_path, "--parts", "search", status=1).stderr


def test_help_has_examples():
    text = bench("--help").stdout
    assert "make bench" in text and "--set glove" in text


def test_interrupt_ends_all(tmp_path):
    p = subprocess.Popen([str(ROOT / "bench" / "bench.py"), "--quick", "--data", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, start_new_session=True, env=plain_environ())
    time.sleep(3)
    os.killpg(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=20)
    assert p.returncode == 130 and "Traceback" not in err
    time.sleep(0.2)
    with pytest.raises(ProcessLookupError):
        os.killpg(p.pid, 0)

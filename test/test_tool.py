"""The command-line tool from outside: pack, build, info, verify, dump, query; exit statuses; nothing left behind.

Proves that plans are stable, that builds give the same bytes at any thread count, that bad rows and duplicate ids are named
and counted, that verify finds every flipped byte, that `query --exact` equals brute force, and that a build that fails or is
interrupted leaves neither shard nor files. Data is made here, seed SEED.
"""
import csv
import glob
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import time

import h5py
import numpy as np
import pytest

TOOL = os.environ.get("VECSHARD_TOOL", str(pathlib.Path(__file__).resolve().parent.parent / "build" / "vecshard"))
COMMANDS = ["pack", "build", "query", "info", "verify", "dump"]
SEED = 20240607


# A sanitizer's library that is preloaded into Python is none of the tool's business: one that is built for it has its own.
ENV = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}


def run(*args, want=0, env=None, cwd=None):
    r = subprocess.run([TOOL, *map(str, args)], capture_output=True, text=True, errors="surrogateescape", timeout=300,
                       env={**ENV, **(env or {})}, cwd=cwd)
    assert r.returncode == want, (args, r.returncode, r.stdout[-500:], r.stderr[-500:])
    if want == 1 and args[0] != "verify":
        assert r.stderr.startswith("vecshard: ") and len(r.stderr) > 20
    return r


def vectors(n, dim, seed=SEED):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(32, dim)) * 3
    return (centers[rng.integers(0, 32, n)] + rng.normal(size=(n, dim))).astype("<f4")


def write_h5(path, x, ids=None, **columns):
    with h5py.File(path, "w") as f:
        f.create_dataset("embedding", data=x)
        if ids is not None and len(ids) and isinstance(ids[0], str):
            f.create_dataset("id", data=np.array(ids, dtype=object), dtype=h5py.string_dtype("utf-8"))
        elif ids is not None:
            f.create_dataset("id", data=np.asarray(ids))
        for name, values in columns.items():
            if isinstance(values[0], str):
                f.create_dataset(name, data=np.array(values, dtype=object), dtype=h5py.string_dtype("utf-8"))
            else:
                f.create_dataset(name, data=np.asarray(values))


def write_fvecs(path, x):
    out = np.empty((len(x), x.shape[1] + 1), "<i4")
    out[:, 0] = x.shape[1]
    out[:, 1:] = x.view("<i4")
    out.tofile(path)


def segment(folder):
    files = glob.glob(str(folder) + "/*.ivf")
    assert len(files) == 1
    return files[0]


def contents(folder):
    return {os.path.basename(f): open(f, "rb").read() for f in glob.glob(str(folder) + "/*")}


def info(source):
    return json.loads(run("info", source, "--json").stdout)


def hits(text):
    return list(csv.DictReader(io.StringIO(text)))


def truth(x, q, metric):
    x, q = x.astype(np.float64), q.astype(np.float64)
    if metric == "l2":
        return np.sqrt(((q[:, None] - x[None]) ** 2).sum(2))
    if metric == "dot":
        return -(q @ x.T)
    return 1 - (q @ x.T) / (np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)[None])


# ---- usage ----

@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    r = run(command, "--help")
    assert "usage: vecshard " + command in r.stdout and "example:" in r.stdout and r.stderr == ""


def test_usage():
    assert re.match(r"vecshard \d+\.\d+\.\d+$", run("--version").stdout)
    for c in COMMANDS:
        assert "  " + c in run("--help").stdout
        assert "--help" in run(c, want=2).stderr
    run(want=2)
    run("bild", want=2)
    assert "did you mean --metric?" in run("build", "x.npy", "--out", "o", "--metrik", "l2", want=2).stderr


@pytest.mark.parametrize("args", [
    ["--bits", "5"], ["--metric", "L1"], ["--memory", "lots"], ["--memory", "1K"], ["--threads", "0"], ["--partitions", "0"],
    ["--partitions", "many"], ["--seed", "-1"], ["--bucket", "1"], ["--plan", "p.json"], ["--column", "distance"],
    ["--column", "a", "--column", "A:index"], ["--bits", "8", "--bits", "8"], ["--json=1"], ["--dim"], ["--out", ""]])
def test_wrong_options(tmp_path, args):
    run("build", "x.npy", "--out", tmp_path / "s", *args, want=2)
    assert os.listdir(tmp_path) == []


# ---- pack ----

def pack_files(folder, sizes, dim=4):
    names = []
    for i, n in enumerate(sizes):
        names.append(str(folder / ("part %d \"x\".npy" % i)))
        np.save(names[-1], vectors(n, dim, i))
    return names


def test_pack(tmp_path):
    names = pack_files(tmp_path, [50, 30, 70, 20, 40, 130, 0, 60])
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    r = run("pack", *[os.path.basename(n) for n in names], "--bucket-rows", 100, "--out", a, cwd=tmp_path)
    run("pack", *names, "--bucket-rows", 100, "--out", b)
    plan = json.load(open(a))
    assert a.read_bytes() == b.read_bytes()
    assert sorted(sum((x["files"] for x in plan["buckets"]), [])) == sorted(names)
    assert sorted(x["rows"] for x in plan["buckets"]) == [70, 100, 100, 130]
    assert "part 5" in r.stderr and "more than --bucket-rows" in r.stderr
    assert r.stdout.count("full") == 4
    out = json.loads(run("pack", *names, "--bucket-rows", 1000, "--out", a, "--json").stdout)
    assert (out["buckets"], out["rows"], out["dim"]) == (1, 400, 4)
    assert sorted(os.listdir(tmp_path)) == sorted([os.path.basename(n) for n in names] + ["a.json", "b.json"])


def test_pack_refuses(tmp_path):
    names = pack_files(tmp_path, [5, 6])
    np.save(tmp_path / "wide.npy", vectors(5, 5))
    plan = tmp_path / "plan.json"
    r = run("pack", *names, tmp_path / "wide.npy", "--bucket-rows", 9, "--out", plan, want=1)
    assert names[0] in r.stderr and "wide.npy" in r.stderr
    assert "twice" in run("pack", names[0], tmp_path / "." / os.path.basename(names[0]), "--bucket-rows", 9, "--out", plan, want=1).stderr
    assert "gone.npy" in run("pack", tmp_path / "gone.npy", "--bucket-rows", 9, "--out", plan, want=1).stderr
    run("pack", *names, "--bucket-rows", 9, "--out", tmp_path / "no" / "plan.json", want=1)
    for args in (["--bucket-rows", 9], ["--out", plan], ["--bucket-rows", 0, "--out", plan]):
        run("pack", *names, *args, want=2)
    assert not plan.exists()


def test_plan_to_database(tmp_path):
    names = pack_files(tmp_path, [50, 30, 70])
    plan, db = tmp_path / "plan.json", tmp_path / "db"
    run("pack", *names, "--bucket-rows", 80, "--out", plan)
    buckets = json.load(open(plan))["buckets"]
    for i in range(len(buckets)):
        run("build", "--plan", plan, "--bucket", i + 1, "--out", db)
    assert sorted(os.listdir(db)) == ["bucket%d" % (i + 1) for i in range(len(buckets))]
    d = info(db)
    assert d["rows"] == 150 and [s["rows"] for s in d["shards"]] == [b["rows"] for b in buckets]
    assert "no" in run("build", "--plan", plan, "--bucket", 3, "--out", db, want=1).stderr
    assert "built already" in run("build", "--plan", plan, "--bucket", 1, "--out", db).stdout
    assert "already holds a shard" in run("build", names[0], "--out", db / "bucket1", want=1).stderr
    assert "database" in run("build", names[0], "--out", db, want=1).stderr
    listed = json.dumps([str(db / "bucket2"), str(db / "bucket1")])
    assert info(listed)["rows"] == 150
    run("verify", db), run("verify", listed)
    for text in ("{", "{}", '{"buckets":[{"files":[1]}]}', '{"buckets":[{}]}', "", '{"buckets":7}'):
        plan.write_text(text)
        run("build", "--plan", plan, "--bucket", 1, "--out", tmp_path / "other", want=1)
    assert not (tmp_path / "other").exists()


# ---- build ----

def test_formats_agree(tmp_path):
    x = vectors(700, 24)
    np.save(tmp_path / "x.npy", x)
    x.tofile(tmp_path / "x.f32")
    write_fvecs(tmp_path / "x.fvecs", x)
    write_h5(tmp_path / "x.h5", x)
    run("build", tmp_path / "x.npy", "--out", tmp_path / "npy")
    run("build", tmp_path / "x.f32", "--dim", 24, "--out", tmp_path / "f32")
    run("build", tmp_path / "x.fvecs", "--out", tmp_path / "fvecs")
    run("build", tmp_path / "x.h5", "--id-dataset", "none", "--out", tmp_path / "h5")
    np.save(tmp_path / "1.npy", x[:300]), np.save(tmp_path / "2.npy", x[300:300]), np.save(tmp_path / "3.npy", x[300:])
    run("build", *[tmp_path / ("%d.npy" % i) for i in (1, 2, 3)], "--out", tmp_path / "parts")
    first = contents(tmp_path / "npy")
    assert len(first) == 2
    for other in ("f32", "fvecs", "h5", "parts"):
        assert contents(tmp_path / other) == first
    assert "--dim" in run("build", tmp_path / "x.f32", "--out", tmp_path / "no", want=1).stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.plain_only("bytes are the same in every build; test_same_bytes of test_ivfpq.c is watched")
@pytest.mark.parametrize("extra", [[], ["--bits", "4", "--store", "f16"], ["--partitions", "sqrt", "--subvectors", "5"]])
def test_same_bytes_at_any_thread_count(tmp_path, extra):
    x = vectors(6000, 32)
    ids = ["id-%d" % (i * 7919 % 6000) for i in range(6000)]
    write_h5(tmp_path / "a.h5", x[:2500], ids[:2500], length=np.arange(2500))
    write_h5(tmp_path / "b.h5", x[2500:], ids[2500:], length=np.arange(3500))
    for i, threads in enumerate((1, 2, 2)):
        run("build", tmp_path / "a.h5", tmp_path / "b.h5", "--out", tmp_path / str(i), "--threads", threads, "--seed", 5,
            "--column", "length", *extra)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")
    run("build", tmp_path / "a.h5", tmp_path / "b.h5", "--out", tmp_path / "other", "--seed", 6, "--column", "length", *extra)
    assert contents(tmp_path / "0").keys() != contents(tmp_path / "other").keys()
    run("verify", tmp_path / "0")


def test_columns(tmp_path):
    x = vectors(100, 8)
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["embedding"], f["id"] = x, np.arange(100) - 50
        f["meta/length"], f["score"] = np.arange(100), np.linspace(0, 1, 100)
        f.create_dataset("title", data=np.array(["näme \"%d\"" % i for i in range(100)], dtype=object), dtype=h5py.string_dtype())
    run("build", tmp_path / "a.h5", "--out", tmp_path / "s", "--column", "meta/length:index", "--column", "score", "--column", "title:stored")
    s = info(tmp_path / "s")["shards"][0]
    assert s["id"] == "integer"
    assert s["columns"] == [{"name": "length", "type": "integer", "filter": True, "index": True},
                            {"name": "score", "type": "real", "filter": True, "index": False},
                            {"name": "title", "type": "text", "filter": False, "index": False}]
    assert "length = 0, score = 0, title = 'näme \"0\"'" in run("dump", tmp_path / "s", "--rows", 3).stdout
    assert "nothing" in run("build", tmp_path / "a.h5", "--out", tmp_path / "t", "--column", "nothing", want=1).stderr
    np.save(tmp_path / "x.npy", x)
    assert "HDF5" in run("build", tmp_path / "x.npy", "--out", tmp_path / "t", "--column", "score", want=1).stderr


def test_summary_json(tmp_path):
    np.save(tmp_path / "x.npy", vectors(5000, 16))
    r = json.loads(run("build", tmp_path / "x.npy", "--out", tmp_path / "s", "--json").stdout)
    s = info(tmp_path / "s")["shards"][0]["segments"][0]
    assert (r["rows"], r["partitions"], r["m"], r["bits"], r["bytes"]) == (s["rows"], s["nlist"], s["m"], s["bits"], s["bytes"])
    assert r["bytes"] == os.path.getsize(segment(tmp_path / "s")) and r["rows"] == 5000 and r["peak_bytes"] > 1 << 20


def test_inputs_must_agree(tmp_path):
    x = vectors(20, 8)
    write_h5(tmp_path / "int.h5", x, np.arange(20))
    write_h5(tmp_path / "text.h5", x, ["t%d" % i for i in range(20)])
    np.save(tmp_path / "row.npy", x), np.save(tmp_path / "wide.npy", vectors(20, 9))
    for a, b in (("int.h5", "text.h5"), ("text.h5", "row.npy"), ("row.npy", "wide.npy"), ("int.h5", "row.npy")):
        e = run("build", tmp_path / a, tmp_path / b, "--out", tmp_path / "s", want=1).stderr
        assert a in e and b in e
    write_h5(tmp_path / "c1.h5", x, np.arange(20), c=np.arange(20))
    write_h5(tmp_path / "c2.h5", x, np.arange(20), c=["t"] * 20)
    e = run("build", tmp_path / "c1.h5", tmp_path / "c2.h5", "--column", "c", "--out", tmp_path / "s", want=1).stderr
    assert "c1.h5" in e and "c2.h5" in e
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("n", [100, 6000])
def test_bad_rows(tmp_path, n):
    x = vectors(n, 8)
    x[17, 3], x[60, 0], x[61] = np.nan, np.inf, 0
    np.save(tmp_path / "a.npy", x[:50]), np.save(tmp_path / "b.npy", x[50:])
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    e = run("build", a, b, "--out", tmp_path / "s", want=1).stderr
    assert "a.npy: row 17" in e and "--bad-rows skip" in e
    assert not (tmp_path / "s").exists()
    r = run("build", a, b, "--out", tmp_path / "s", "--bad-rows", "skip")
    assert "a.npy: row 17" in r.stderr and "b.npy: row 10" in r.stderr and "b.npy: row 11" in r.stderr
    assert "3 bad rows" in r.stdout and info(tmp_path / "s")["rows"] == n - 3
    run("build", a, b, "--out", tmp_path / "l2", "--bad-rows", "skip", "--metric", "l2")  # a zero vector is fine there
    assert info(tmp_path / "l2")["rows"] == n - 2
    np.save(a, np.full((500, 8), np.nan, "<f4"))
    assert run("build", a, b, "--out", tmp_path / "t", "--bad-rows", "skip").stderr.count("skipped:") == 20


@pytest.mark.parametrize("kind", ["text", "int"])
def test_duplicates(tmp_path, kind):
    x = vectors(30, 8)
    ids = ["r%d" % i for i in range(30)] if kind == "text" else list(range(30))
    ids[25] = ids[3]
    write_h5(tmp_path / "a.h5", x[:10], ids[:10]), write_h5(tmp_path / "b.h5", x[10:], ids[10:])
    args = ["build", tmp_path / "a.h5", tmp_path / "b.h5", "--metric", "l2"]
    e = run(*args, "--out", tmp_path / "s", want=1).stderr
    assert "a.h5: row 3" in e and "b.h5: row 15" in e and "--duplicates" in e
    x[25].tofile(tmp_path / "q.f32")
    for which, same in (("first", False), ("last", True)):
        r = run(*args, "--out", tmp_path / which, "--duplicates", which)
        assert "1 duplicates" in r.stdout and info(tmp_path / which)["rows"] == 29
        h = hits(run("query", tmp_path / which, "--queries", tmp_path / "q.f32", "-k", 1).stdout)[0]
        assert (h["id"] == str(ids[25]) and float(h["distance"]) == 0) == same


def test_empty_inputs(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((0, 8), "<f4"))
    run("build", tmp_path / "x.npy", "--out", tmp_path / "s")
    assert info(tmp_path / "s")["rows"] == 0
    run("verify", tmp_path / "s"), run("dump", tmp_path / "s", "--rows", 3)
    np.save(tmp_path / "q.npy", vectors(3, 8))
    assert run("query", tmp_path / "s", "--queries", tmp_path / "q.npy", "-k", 3).stdout == "query_no,shard,id,distance\n"
    (tmp_path / "no.f32").write_bytes(b"")
    run("build", tmp_path / "no.f32", "--dim", 8, "--out", tmp_path / "t")
    (tmp_path / "no.fvecs").write_bytes(b"")
    run("build", tmp_path / "no.fvecs", "--out", tmp_path / "u", want=1)
    assert not (tmp_path / "u").exists()


def test_folders(tmp_path):
    np.save(tmp_path / "x.npy", vectors(10, 8))
    bad = vectors(10, 8)
    bad[5] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    run("build", tmp_path / "bad.npy", "--out", tmp_path / "a" / "b" / "c", want=1)
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    run("build", tmp_path / "bad.npy", "--out", str(tmp_path / "a" / "b" / "c") + "/", want=1)
    assert os.listdir(tmp_path / "a") == []
    run("build", tmp_path / "x.npy", "--out", tmp_path / "x.npy" / "s", want=1)
    run("build", tmp_path / "x.npy", "--out", tmp_path / "s", "--tmpdir", tmp_path / "none", want=1)
    assert not (tmp_path / "s").exists()
    (tmp_path / "a" / ".seg-123.tmp").write_text("of a killed build")
    run("build", "x.npy", "--out", "a", cwd=tmp_path, env={"TMPDIR": ""})
    assert len(os.listdir(tmp_path / "a")) == 2


@pytest.mark.parametrize("delay", [0.05, 0.4, 0.9, 1.5])
def test_interrupt(tmp_path, delay):
    x = vectors(60000, 128)
    x.tofile(tmp_path / "x.f32")
    (tmp_path / "tmp").mkdir()
    p = subprocess.Popen([TOOL, "build", str(tmp_path / "x.f32"), "--dim", "128", "--out", str(tmp_path / "db" / "s"), "--tmpdir",
                          str(tmp_path / "tmp"), "--threads", "1", "--partitions", "3000"], stderr=subprocess.PIPE, text=True, env=ENV)
    time.sleep(delay)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    if p.returncode == 0:
        pytest.skip("the build was done before the signal")
    assert p.returncode in (1, -signal.SIGINT)  # the latter: before the handler was in place
    if p.returncode == 1:
        assert "interrupted" in err
    assert sorted(os.listdir(tmp_path)) == ["tmp", "x.f32"] and os.listdir(tmp_path / "tmp") == []


@pytest.mark.skipif("address" in TOOL, reason="a sanitizer needs all addresses")
def test_out_of_memory_names_the_remedy(tmp_path):
    np.save(tmp_path / "x.npy", vectors(20000, 128))
    said = set()
    for mb in range(40, 400, 10):
        r = subprocess.run([TOOL, "build", str(tmp_path / "x.npy"), "--out", str(tmp_path / "s"), "--memory", "3G", "--threads", "1"], capture_output=True,
                           text=True, env=ENV, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (mb << 20, mb << 20)))
        if r.returncode == 0:
            break
        said.add(r.stderr)
        assert os.listdir(tmp_path) == ["x.npy"]
    assert any("out of memory" in e and "--memory (it was 3" in e and "--threads" in e for e in said), said


# ---- verify ----

@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    d = tmp_path_factory.mktemp("sound")
    x = vectors(5000, 16)
    ids = ["id%d" % i if i % 100 else "long" * 20 + str(i) for i in range(5000)]
    write_h5(d / "a.h5", x, ids, n=np.arange(5000), t=["text%d" % i for i in range(5000)])
    run("build", d / "a.h5", "--out", d / "db" / "one", "--column", "n", "--column", "t:stored")
    run("build", d / "a.h5", "--out", d / "db" / "two", "--metric", "l2")
    return d


def test_verify_finds_flipped_bytes(sound, tmp_path):
    s = tmp_path / "s"
    shutil.copytree(sound / "db" / "one", s)
    run("verify", s)
    path = segment(s)
    rng = np.random.default_rng(SEED)
    with open(path, "r+b") as f:
        size = os.path.getsize(path)
        for at in rng.integers(0, size, 200).tolist() + [0, 63, size - 1, size - 64]:
            f.seek(at)
            old = f.read(1)[0]
            f.seek(at), f.write(bytes([old ^ (1 << int(rng.integers(0, 8)))])), f.flush()
            r = run("verify", s, want=1)
            assert path in r.stdout, at
            f.seek(at), f.write(bytes([old])), f.flush()
    run("verify", s)


def test_verify_goes_on(sound, tmp_path):
    db = tmp_path / "db"
    shutil.copytree(sound / "db", db)
    one, two = segment(db / "one"), segment(db / "two")
    os.truncate(one, os.path.getsize(one) - 1)
    os.remove(two)
    r = run("verify", db, want=1)
    assert one in r.stdout and two in r.stdout
    j = json.loads(run("verify", db, "--json", want=1).stdout)
    assert not j["sound"] and {f["path"] for f in j["faults"]} == {one, two}
    man = glob.glob(str(db / "one" / "manifest-*"))[0]
    open(man, "w").write("{")
    assert "one" in run("verify", db, want=1).stdout
    assert json.loads(run("verify", sound / "db", "--json").stdout) == {"faults": [], "sound": True, "shards": 2}
    run("verify", tmp_path / "nowhere", want=1)
    (tmp_path / "empty").mkdir()
    run("verify", tmp_path / "empty", want=1)


# ---- info, dump ----

def test_info_and_dump(sound, tmp_path):
    d = info(sound / "db" / "one")
    assert d["rows"] == 5000 and len(d["shards"]) == 1
    s = d["shards"][0]
    assert (s["dim"], s["metric"], s["id"], s["version"], s["name"]) == (16, "cosine", "text", 1, "one")
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", s["uuid"])
    text = run("info", sound / "db" / "one").stdout
    assert "5000" in text and "cosine" in text
    text = run("dump", sound / "db" / "one", "--rows", 10).stdout
    for word in ("VSIVFPQ", "SCAN", "PARAMS", "n_rows 5000", "partition 0:", "group    0:", "row      9:"):
        assert word in text
    assert run("dump", segment(sound / "db" / "one")).stdout in run("dump", sound / "db" / "one").stdout
    run("info", tmp_path, want=1), run("dump", tmp_path / "x", want=1)


def test_info_lists_shards_that_are_no_set(sound, tmp_path):
    """Of other metrics, dimensions and id types: not to be searched together, but to be listed."""
    np.save(tmp_path / "x.npy", vectors(30, 5))
    run("build", tmp_path / "x.npy", "--out", tmp_path / "db" / "one")
    shutil.copytree(sound / "db" / "two", tmp_path / "db" / "two")
    d = info(str(tmp_path / "db") + "/")
    assert d["rows"] == 5030
    assert [(s["name"], s["path"], s["dim"], s["metric"], s["id"]) for s in d["shards"]] == \
        [("one", str(tmp_path / "db" / "one"), 5, "cosine", "integer"), ("two", str(tmp_path / "db" / "two"), 16, "l2", "text")]
    text = run("info", tmp_path / "db").stdout
    assert "one " in text and "two " in text and "5030 rows in 2 shards" in text
    assert info(str(tmp_path / "db" / "one") + "//")["shards"][0]["path"] == str(tmp_path / "db" / "one")
    twice = info(json.dumps([str(tmp_path / "db" / "one"), str(sound / "db")]))  # folders that share a name are told apart
    assert [s["name"] for s in twice["shards"]] == [str(tmp_path / "db" / "one"), str(sound / "db" / "one"), "two"]
    assert "metric" in run("query", sound / "db", "--queries", tmp_path / "x.npy", "-k", 1, want=1).stderr
    assert "JSON" in run("info", '["a"', want=1).stderr
    shutil.rmtree(tmp_path / "db" / "two")
    (tmp_path / "db" / "two").mkdir()
    (tmp_path / "db" / "two" / "manifest-18446744073709551614.json").write_text("{")
    assert "two" in run("info", tmp_path / "db", want=1).stderr


# ---- query ----

@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("suffix", ["npy", "fvecs", "f32", "h5"])
def test_query_exact(tmp_path, metric, suffix):
    x, q = vectors(4500, 12), vectors(7, 12, 99)
    names = ['a,b', 'q"uote', "line\nend", "tab\t", "ü😀", "", " x "] + ["r%d" % i for i in range(4493)]
    write_h5(tmp_path / "x.h5", x, names)
    run("build", tmp_path / "x.h5", "--out", tmp_path / "s, 1", "--metric", metric)
    queries = tmp_path / ("q." + suffix)
    {"npy": np.save, "fvecs": write_fvecs, "f32": lambda p, v: v.tofile(p), "h5": write_h5}[suffix](queries, q)
    k = 4500 if suffix == "npy" else 40
    args = ["query", tmp_path / "s, 1", "--queries", queries, "-k", k, "--exact"]
    h = hits(run(*args).stdout.replace("\r", "\\r"))
    d = truth(x, q, metric)
    number = {n: i for i, n in enumerate(names)}
    assert [int(r["query_no"]) for r in h] == sum(([i] * k for i in range(7)), [])
    assert {r["shard"] for r in h} == {"s, 1"}
    for i in range(7):
        mine = h[i * k:(i + 1) * k]
        got = np.array([float(r["distance"]) for r in mine])
        assert np.all(np.diff(got) >= 0)
        assert np.allclose(got, np.sort(d[i])[:k], rtol=1e-5, atol=1e-5)
        assert np.allclose(got, d[i][[number[r["id"]] for r in mine]], rtol=1e-5, atol=1e-5)
        assert len({r["id"] for r in mine}) == k
    lines = run(*args, "--format", "jsonl", "--out", tmp_path / "o.jsonl")
    assert lines.stdout == ""
    j = [json.loads(line) for line in open(tmp_path / "o.jsonl", newline="\n")]
    assert [(str(r["query_no"]), r["shard"], r["id"]) for r in j] == [(r["query_no"], r["shard"], r["id"]) for r in h]
    assert not glob.glob(str(tmp_path / "*.tmp"))


def test_query_approximate_and_refusals(sound, tmp_path):
    q = vectors(20, 16, 7)
    np.save(tmp_path / "q.npy", q)
    one = sound / "db" / "one"
    args = ["query", one, "--queries", tmp_path / "q.npy"]
    exact = hits(run(*args, "-k", 10, "--exact").stdout)
    wide = hits(run(*args, "-k", 10, "--nprobe", 10**6, "--refine", 10**6).stdout)
    assert [r["distance"] for r in wide] == [r["distance"] for r in exact]
    assert len(hits(run(*args, "-k", 10, "--nprobe", 1, "--refine", 1).stdout)) == 200
    assert hits(run(*args, "-k", 0).stdout) == []
    q[4, 2] = np.nan
    np.save(tmp_path / "nan.npy", q)
    r = run("query", one, "--queries", tmp_path / "nan.npy", "-k", 3, "--out", tmp_path / "o.csv", want=1)
    assert "query 4" in r.stderr and not (tmp_path / "o.csv").exists() and not glob.glob(str(tmp_path / "*.tmp"))
    q[4] = 0
    np.save(tmp_path / "nan.npy", q)
    assert "query 4" in run("query", one, "--queries", tmp_path / "nan.npy", "-k", 3, want=1).stderr
    np.save(tmp_path / "d.npy", vectors(3, 17))
    e = run("query", one, "--queries", tmp_path / "d.npy", "-k", 3, want=1).stderr
    assert "16" in e and "17" in e
    run("query", one, "--queries", tmp_path / "none.npy", "-k", 3, want=1)
    run("query", tmp_path / "none", "--queries", tmp_path / "q.npy", "-k", 3, want=1)
    run(*args, want=2), run(*args, "-k", "-1", want=2), run(*args, "-k", 3, "--format", "xml", want=2)
    with open("/dev/full", "w") as full:
        p = subprocess.run([TOOL, *map(str, args), "-k", "3"], stdout=full, stderr=subprocess.PIPE, text=True, env=ENV)
        assert p.returncode == 1 and "write" in p.stderr


def test_query_into_links_and_devices(tmp_path):
    """A link stays a link, and what is no regular file is written, never renamed over."""
    q = tmp_path / "q.npy"
    np.save(q, vectors(2, 8))
    shard = build_small(tmp_path)
    (tmp_path / "real.csv").touch()
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    run("query", shard, "--queries", q, "-k", 1, "--out", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").read_text().count("\n") == 3
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    run("query", shard, "--queries", q, "-k", 1, "--out", tmp_path / "pipe")
    assert reader.communicate(timeout=30)[0].count("\n") == 3
    assert (tmp_path / "pipe").is_fifo()


def build_small(folder):
    np.save(folder / "x.npy", vectors(50, 8))
    run("build", folder / "x.npy", "--out", folder / "small")
    return folder / "small"

"""The host stays safe: the shell and Python load the extension, connections come and go, forks, interrupts, threads, other
kernels and readers give the same rows, damage gives an error or right rows. Rows come from numpy, seed SEED.
"""
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import BUILD, ROOT, blob, build_shard, clustered, connect

SEED = 11
PYTHON = sys.executable


@pytest.fixture(scope="module")
def shard(make_shard):
    return make_shard("hosts", clustered(6000, 16, SEED), options=("--partitions", 40))


def query(c, shard, q, k=10, more=""):
    return c.execute("SELECT id, distance FROM shard_union(?, ?, ?)" + more, ("[\"%s\"]" % shard.path, q, k)).fetchall()


def child(code, *args, env=None, timeout=120):
    """Runs Python code with `c` connected and `v` a query; returns its output."""
    head = ("import sqlite3, sys, os, json, time, numpy as np\nsys.path.insert(0, %r)\nfrom conftest import connect, blob\n" % str(ROOT / "test"))
    r = subprocess.run([PYTHON, "-c", head + code, *map(str, args)], capture_output=True, text=True, timeout=timeout,
                       env={**os.environ, **(env or {})})
    assert r.returncode == 0, (r.returncode, r.stdout[-500:], r.stderr[-2000:])
    return r.stdout


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the shell has no sanitizer runtime")
def test_the_shell_loads_it(shard):
    sql = ".load %s\nSELECT vecshard_version();\nSELECT count(*) FROM shard_union('[\"%s\"]', '%s', 5);\n" % (
        BUILD / "vecshard", shard.path, "[" + ",".join(["0.5"] * 16) + "]")
    r = subprocess.run(["sqlite3", ":memory:"], input=sql, capture_output=True, text=True)
    assert r.stderr == "" and re.match(r"\d+\.\d+\.\d+\n5\n", r.stdout), (r.stdout, r.stderr)


def test_a_thousand_connections_leave_nothing(shard):
    code = """
path = sys.argv[1]
q = blob([0.1] * 16)
def rss(): return int(open('/proc/self/statm').read().split()[1]) * 4
def fds(): return len(os.listdir('/proc/self/fd'))
seen = []
for i in range(1000):
    c = connect()
    c.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % path)
    assert len(c.execute("SELECT id FROM t WHERE embedding MATCH ? AND k = 5", (q,)).fetchall()) == 5
    c.close()
    if i in (99, 999): seen.append((rss(), fds()))
print(json.dumps(seen))
"""
    (rss0, fds0), (rss1, fds1) = json.loads(child(code, shard.path))
    assert fds1 <= fds0
    if "LD_PRELOAD" not in os.environ:  # a sanitizer keeps freed memory
        assert rss1 - rss0 < 4000, (rss0, rss1)  # KiB


def test_a_hundred_open_at_once(shard):
    cs = [connect() for _ in range(100)]
    want = query(cs[0], shard, blob([0.2] * 16))
    assert all(query(c, shard, blob([0.2] * 16)) == want for c in cs)
    for c in cs:
        c.close()


def test_two_extensions_side_by_side(shard, tmp_path):
    copy = tmp_path / "vecshard.so"  # SQLite derives the entry point from the name
    shutil.copy(BUILD / "vecshard.so", copy)
    code = """
c = connect()
c.enable_load_extension(True)
c.load_extension(sys.argv[2])  # a second copy, and the same one again
c.load_extension(%r)
c.load_extension(sys.argv[3])
d = connect()
q = blob([0.3] * 16)
s = json.dumps([sys.argv[1]])
a = c.execute("SELECT id FROM shard_union(?, ?, 5)", (s, q)).fetchall()
assert a == d.execute("SELECT id FROM shard_union(?, ?, 5)", (s, q)).fetchall() and len(a) == 5
try:
    c.execute("SELECT * FROM hdf5_vectors('/nowhere.h5')").fetchall()
    raise SystemExit("no error")
except sqlite3.Error as e:
    assert "/nowhere.h5" in str(e), e
print("fine")
"""
    assert "fine" in child(code % str(BUILD / "vecshard"), shard.path, copy, BUILD / "vecshard_hdf5")


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the address sanitizer's allocator hangs in a child forked beside threads")
@pytest.mark.parametrize("threads", [1, 4])
def test_fork_after_a_query(shard, threads):
    code = """
c = connect()
c.execute("SELECT vecshard_config('threads', %s)" % sys.argv[2])
s = '["%s"]' % sys.argv[1]
q = blob([0.4] * 16)
sql = "SELECT id, distance FROM shard_union(?, ?, 10) WHERE exact = 1"
want = c.execute(sql, (s, q)).fetchall()
for i in range(5):
    pid = os.fork()
    if pid == 0:
        d = connect()  # SQLite connections do not cross a fork; the process's threads and open shards must
        os._exit(0 if d.execute(sql, (s, q)).fetchall() == want else 7)
    assert os.waitpid(pid, 0)[1] == 0
    assert c.execute(sql, (s, q)).fetchall() == want
print("fine")
"""
    assert "fine" in child(code, shard.path, threads)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two million rows: an exact search takes long enough to be interrupted, repeated until it does."""
    d = tmp_path_factory.mktemp("large")
    np.random.default_rng(SEED).standard_normal((1000000, 16), dtype=np.float32).tofile(d / "x.f32")
    build_shard_tool(d / "x.f32", d / "s")
    os.unlink(d / "x.f32")
    return d / "s"


def build_shard_tool(f, out):
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run([BUILD / "vecshard", "build", f, "--dim", "16", "--metric", "l2", "--partitions", "64", "--out", out], check=True,
                   capture_output=True, env=env)


def test_interrupt_within_200_ms(large):
    c = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    c.enable_load_extension(True)
    c.load_extension(str(BUILD / "vecshard"))
    c.execute("SELECT vecshard_config('threads', 1)")
    c.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % large)
    q = blob([0.1] * 16)
    # forty searches in one packed batch: seconds of work inside a single xFilter
    many = "SELECT count(*) FROM shard_union('[\"%s\"]', (SELECT vec_pack(?) FROM json_each('[%s]')), 10) WHERE exact = 1" % (
        large, ",".join("1" * 400))
    for wait in (0.05, 0.3):
        at = []
        timer = threading.Timer(wait, lambda: (at.append(time.monotonic()), c.interrupt()))
        timer.start()
        with pytest.raises(sqlite3.OperationalError, match="interrupt"):
            c.execute(many, (q,)).fetchall()
        late = time.monotonic() - at[0]
        assert late < (1.0 if "LD_PRELOAD" in os.environ else 0.2), late
        assert len(c.execute("SELECT id FROM t WHERE embedding MATCH ? AND k = 3", (q,)).fetchall()) == 3


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the shell has no sanitizer runtime")
def test_ctrl_c_in_the_shell(large):
    p = subprocess.Popen(["sqlite3", ":memory:"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdin.write(".load %s\nSELECT 'start';\nSELECT count(*) FROM shard_union('[\"%s\"]', (SELECT vec_pack('[%s]') FROM json_each('[%s]')), 10) "
                  "WHERE exact = 1;\n" % (BUILD / "vecshard", large, ",".join(["0.1"] * 16), ",".join("1" * 400)))
    p.stdin.flush()
    assert p.stdout.readline() == "start\n"
    time.sleep(0.3)
    p.send_signal(signal.SIGINT)
    t = time.monotonic()
    out, err = p.communicate("SELECT 'after';\n", timeout=30)
    assert time.monotonic() - t < 5 and "interrupt" in err.lower(), (out, err)


def test_threads_with_a_connection_each(shard):
    qs = [blob(v) for v in clustered(40, 16, SEED + 1)]
    c = connect()
    want = [query(c, shard, q) for q in qs]
    wrong = []

    def work():
        mine = connect()
        for _ in range(3):
            for q, w in zip(qs, want):
                if query(mine, shard, q) != w:
                    wrong.append(q)
        mine.close()

    ts = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in ts]
    [t.join() for t in ts]
    assert not wrong


SAME = """
s = '["%s"]' % sys.argv[1]
qs = np.random.default_rng(5).standard_normal((30, 16)).astype('<f4')
c = connect()
print(json.dumps([[c.execute("SELECT id, distance FROM shard_union(?, ?, 10)" + w, (s, blob(v))).fetchall() for v in qs]
                  for w in ("", " WHERE exact = 1", " WHERE nprobe = 4")]))
"""


@pytest.mark.parametrize("env", [{"VECSHARD_SIMD": "scalar"}, {"VECSHARD_SIMD": "avx2"}, {"VECSHARD_SIMD": "avx512"}, {"VECSHARD_THREADS": "1"},
                                 {"VECSHARD_THREADS": "8"}, {"VECSHARD_MMAP": "0"}], ids=lambda e: "%s=%s" % next(iter(e.items())))
def test_same_rows_however_computed(shard, env):
    want, got = json.loads(child(SAME, shard.path)), json.loads(child(SAME, shard.path, env=env))
    for w, g in zip(sum(want, []), sum(got, [])):
        assert len(w) == len(g)
        for (wi, wd), (gi, gd) in zip(w, g):
            assert wi == gi or abs(wd - gd) <= 1e-5 * max(1, abs(wd)), (env, w, g)


def test_only_the_entry_point_is_exported():
    out = subprocess.run(["nm", "-D", "--defined-only", BUILD / "vecshard.so"], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in out.splitlines() if " T " in line]
    if "LD_PRELOAD" not in os.environ:
        assert names == ["sqlite3_vecshard_init"], names
    needed = subprocess.run(["readelf", "-d", BUILD / "vecshard.so"], capture_output=True, text=True, check=True).stdout
    assert "libsqlite3" not in needed and "libhdf5" not in needed


def test_a_shard_that_goes_away(tmp_path):
    x = clustered(300, 8, SEED)
    s = build_shard(tmp_path / "s", x)
    c = connect()
    c.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % s.path)
    assert c.execute("SELECT count(*) FROM t").fetchone()[0] == 300
    shutil.rmtree(s.path)
    with pytest.raises(sqlite3.Error, match="not a shard"):
        c.execute("SELECT count(*) FROM t").fetchone()
    c.execute("DROP TABLE t")


def test_damage_gives_an_error_or_right_rows(shard, tmp_path):
    """300 seeded flips: the stored vectors that come back are the ones that went in, or there is an error."""
    rng = np.random.default_rng(SEED)
    code = """
good, trial, n = sys.argv[1], sys.argv[2], 0
import glob, shutil
x = np.load(sys.argv[3])
seg = os.path.basename(glob.glob(good + '/*.ivf')[0])
data = open(os.path.join(good, seg), 'rb').read()
rng = np.random.default_rng(int(sys.argv[4]))
for i in range(300):
    d = os.path.join(trial, str(i))
    shutil.copytree(good, d)
    at = int(rng.integers(len(data)))
    open(os.path.join(d, seg), 'wb').write(data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1:])
    c = connect()
    try:
        c.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % d)
        for rid, e, dist in c.execute("SELECT id, embedding, distance FROM t WHERE embedding MATCH ? AND k = 20", (x[i].tobytes(),)):
            assert e == x[rid].tobytes() and abs(dist - np.sqrt(((x[rid].astype('f8') - x[i]) ** 2).sum())) < 1e-3, (at, rid)
        c.execute("SELECT count(*), sum(length(embedding)) FROM t").fetchall()
    except sqlite3.Error:
        n += 1
    c.close()
    shutil.rmtree(d)
print(n)
"""
    x = clustered(1000, 16, SEED)
    np.save(tmp_path / "x.npy", x)
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run([BUILD / "vecshard", "build", tmp_path / "x.npy", "--metric", "l2", "--partitions", "8", "--out", tmp_path / "good"],
                   check=True, capture_output=True, env=env)
    (tmp_path / "trial").mkdir()
    assert int(child(code, tmp_path / "good", tmp_path / "trial", tmp_path / "x.npy", SEED, timeout=300)) > 0

#!/usr/bin/python3
"""Long seeded campaigns, each proving one thing; run by `make soak` before an issue is resolved.

    /usr/bin/python3 test/soak.py [--seed N] [--minutes M] [CAMPAIGN ...]

shapes    random rows, dimension, metric, partitions, bits, store, ids: exact answers equal NumPy, every row is found by id,
          approximate answers are sorted, unique and right in their distances
damage    one good shard, one byte flipped or the file cut: an error or right rows, never a crash, and verify finds it
kill      builds killed with SIGKILL at random moments: no shard that a reader accepts, and the next build works
resume    builds killed with SIGKILL at 50 random moments or more, each then gone on with by --resume: the bytes of an undisturbed one
readers   processes querying a database while shards are added and removed: right rows or an error, never a crash
store     shards of random shapes on a real object store behind a proxy that breaks things at random: the rows that the local
          folder gives, or an error that names the object; then publish and pull under the same faults: the same files
travel    up to three publishers and three pullers of one shard at a time, killed and interrupted at random, amid faults: who
          sees a manifest sees all files, and in the end one run of each makes them the same, with no parts left in the folder
large     once: 200,000,000 x 16 as f16 (--large-rows), which takes some 30 GB of disk and 20 minutes: built within --memory 512M, verified,
          looked up, searched
Prints what it did and 'N passed, N failed'; exit status 1 when anything failed.
"""
import argparse, json, os, random, shutil, signal, sqlite3, subprocess, sys, tempfile, time
import h5py
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.join(ROOT, os.environ.get("VECSHARD_BUILD", "build"))
TOOL = os.path.join(BUILD, "vecshard")


def connect():
    c = sqlite3.connect(":memory:", isolation_level=None)
    c.enable_load_extension(True)
    c.load_extension(os.path.join(BUILD, "vecshard"))
    return c


def tool(*args, timeout=600):
    return subprocess.run([TOOL, *map(str, args)], capture_output=True, text=True, errors="replace", timeout=timeout)


def distances(metric, q, x):
    q, x = q.astype(np.float64), x.astype(np.float64)
    if metric == "l2":
        return np.sqrt(((x - q) ** 2).sum(1))
    if metric == "dot":
        return -(x @ q)
    return 1 - (x @ q) / (np.linalg.norm(x, axis=1) * np.linalg.norm(q))


def same(got, want, scale):
    return np.allclose(np.sort(got), np.sort(want), rtol=2e-5, atol=2e-5 * max(1.0, scale))


def one_shape(rng, d):
    n = int(rng.choice([0, 1, 2, 63, 64, 65, 255, 256, 257, 1000, 4095, 4096, 6000, 9000]))
    dim = int(rng.choice([1, 2, 3, 7, 8, 16, 31, 64, 100, 257]))
    metric = str(rng.choice(["l2", "cosine", "dot"]))
    x = rng.standard_normal((n, dim)).astype("<f4")
    kind = rng.integers(4)
    if n and kind == 1:
        x[rng.integers(n, size=n // 2)] = x[0]
    elif n and kind == 2:
        x = np.round(x * 2).astype("<f4") + (np.float32(0.5) if metric == "cosine" else np.float32(0))
    elif n and kind == 3:
        x *= np.exp(rng.standard_normal((n, 1)) * 2).astype("<f4")
    f = os.path.join(d, "x.npy")
    np.save(f, x)
    args = ["--metric", metric, "--seed", int(rng.integers(1 << 30)), "--threads", int(rng.integers(1, 4))]
    if rng.integers(3) == 0 and n > 10:
        args += ["--partitions", int(rng.integers(1, min(n, 200)))]
    if rng.integers(4) == 0 and dim > 1:
        args += ["--bits", 4]
    if rng.integers(4) == 0:
        args += ["--subvectors", int(rng.integers(1, min(dim, 60) + 1))]
    out = os.path.join(d, "s")
    shutil.rmtree(out, ignore_errors=True)
    r = tool("build", f, "--out", out, *args)
    what = "n %d dim %d %s kind %d %s" % (n, dim, metric, kind, args)
    if r.returncode:
        return "%s: build: %s" % (what, r.stderr[-200:])
    if tool("verify", out).returncode:
        return what + ": verify"
    c = connect()
    c.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % out)
    if c.execute("SELECT count(*) FROM t").fetchone()[0] != n:
        return what + ": count"
    for i in (rng.integers(n, size=5) if n else []):
        row = c.execute("SELECT id, embedding FROM t WHERE id = ?", (int(i),)).fetchall()
        if len(row) != 1 or row[0][1] != x[i].tobytes():
            return "%s: row %d" % (what, i)
    for _ in range(3):
        q = rng.standard_normal(dim).astype("<f4")
        k = int(rng.choice([0, 1, 5, 10, max(n, 1), n + 1, 2**63 - 1]))
        want = np.sort(distances(metric, q, x))[: min(k, n)] if n else np.zeros(0)
        got = c.execute("SELECT id, distance FROM t WHERE embedding MATCH ? AND k = ? AND exact = 1", (q.tobytes(), k)).fetchall()
        scale = float(np.abs(want).max()) if len(want) else 1.0
        if len(got) != min(k, n) or not same(np.array([g[1] for g in got]), want, scale):
            return "%s: exact k %d" % (what, k)
        got = c.execute("SELECT id, distance FROM t WHERE embedding MATCH ? AND k = ? AND nprobe = ?", (q.tobytes(), k, int(rng.integers(1, 300)))).fetchall()
        dist = np.array([g[1] for g in got])
        true = distances(metric, q, x[[g[0] for g in got]]) if got else np.zeros(0)
        if len(got) != min(k, n) or len({g[0] for g in got}) != len(got) or (np.diff(dist) < 0).any():
            return "%s: approximate k %d: %d rows" % (what, k, len(got))
        if not np.allclose(dist, true, rtol=2e-5, atol=2e-5 * max(1.0, scale, float(np.abs(true).max()) if len(true) else 1.0)):
            return "%s: approximate distances" % what
        lazy = c.execute("SELECT id FROM t WHERE embedding MATCH ? ORDER BY distance LIMIT 25", (q.tobytes(),)).fetchall()
        if len(lazy) != min(25, n) or len(set(lazy)) != len(lazy):
            return "%s: lazy" % what
    c.close()
    return None


def shapes(rng, until, d):
    bad, n = [], 0
    while time.time() < until:
        fault = one_shape(rng, d)
        n += 1
        if fault:
            bad.append(fault)
    return n, bad


PROBE = r"""
import sqlite3, sys, numpy as np
c = sqlite3.connect(":memory:", isolation_level=None)
c.enable_load_extension(True)
c.load_extension(sys.argv[1])
x = np.load(sys.argv[3])
try:
    c.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % sys.argv[2])
    for i in (0, 17, len(x) - 1):
        for w in ("", " AND exact = 1", " AND nprobe = 100000"):
            for rid, dist in c.execute("SELECT id, distance FROM t WHERE embedding MATCH ? AND k = 20" + w, (x[i].tobytes(),)):
                if abs(dist - float(np.sqrt(((x[rid].astype('f8') - x[i]) ** 2).sum()))) > 1e-3: print("WRONG", rid, dist); sys.exit(3)
        for rid, e in c.execute("SELECT id, embedding FROM t WHERE id = ?", (i,)):
            if e != x[i].tobytes(): print("WRONG ROW"); sys.exit(3)
    c.execute("SELECT count(*), sum(length(embedding)) FROM t").fetchall()
except sqlite3.Error as e:
    sys.exit(0)
"""


def damage(rng, until, d):
    x = rng.standard_normal((5000, 16)).astype("<f4")
    np.save(os.path.join(d, "x.npy"), x)
    good, trial = os.path.join(d, "good"), os.path.join(d, "trial")
    assert tool("build", os.path.join(d, "x.npy"), "--metric", "l2", "--out", good).returncode == 0
    seg = [f for f in os.listdir(good) if f.endswith(".ivf")][0]
    data = open(os.path.join(good, seg), "rb").read()
    bad, n = [], 0
    while time.time() < until:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(good, trial)
        at = int(rng.integers(len(data)))
        cut = rng.integers(8) == 0
        new = data[:at] if cut else data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        if rng.integers(5) == 0:  # the small sections at the end are a small target
            at = len(data) - 1 - int(rng.integers(4000))
            new = data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        open(os.path.join(trial, seg), "wb").write(new)
        what = "%s at %d of %d" % ("cut" if cut else "flip", at, len(data))
        r = subprocess.run(["/usr/bin/python3", "-c", PROBE, os.path.join(BUILD, "vecshard"), trial, os.path.join(d, "x.npy")], capture_output=True, text=True)
        if r.returncode:
            bad.append("%s: probe exit %d %s" % (what, r.returncode, (r.stdout + r.stderr)[-200:]))
        if tool("verify", trial).returncode != 1:
            bad.append(what + ": verify found nothing")
        n += 1
    return n, bad


def kill(rng, until, d):
    x = rng.standard_normal((60000, 32)).astype("<f4")
    f = os.path.join(d, "x.npy")
    np.save(f, x)
    out = os.path.join(d, "s")
    t = time.time()
    assert tool("build", f, "--metric", "l2", "--out", out).returncode == 0
    whole = time.time() - t
    bad, n = [], 0
    while time.time() < until:
        shutil.rmtree(out, ignore_errors=True)
        p = subprocess.Popen([TOOL, "build", f, "--metric", "l2", "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(float(rng.random()) * whole * 1.1)
        p.send_signal(signal.SIGKILL if rng.integers(2) else signal.SIGINT)
        p.wait()
        done = [m for m in (os.listdir(out) if os.path.isdir(out) else []) if m.startswith("manifest-")]
        if done and tool("verify", out).returncode:
            bad.append("a killed build left a damaged shard")
        if not done and tool("build", f, "--metric", "l2", "--out", out).returncode:
            bad.append("a build after a killed one fails")
        if tool("verify", out).returncode:
            bad.append("verify after a kill")
        n += 1
    return n, bad


def resume(rng, until, d):
    n_rows = 60000
    with h5py.File(os.path.join(d, "x.h5"), "w") as h:
        h["embedding"] = rng.standard_normal((n_rows, 48)).astype("<f4")
        h["id"], h["n"] = rng.permutation(n_rows), np.arange(n_rows)
    out, whole = os.path.join(d, "s"), os.path.join(d, "whole")
    args = ["build", os.path.join(d, "x.h5"), "--metric", "l2", "--column", "n", "--seed", "3"]
    t = time.time()
    assert tool(*args, "--memory", "16M", "--out", whole, "--resume").returncode == 0
    length, bad, n = time.time() - t, [], 0
    while time.time() < until or n < 50:
        shutil.rmtree(out, ignore_errors=True)
        how = ["--memory", "16M", "--threads", str(rng.integers(1, 3)), "--out", out, *(["--resume"] if rng.integers(4) else [])]
        for _ in range(int(rng.integers(1, 4))):
            p = subprocess.Popen([TOOL, *args, *how], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(float(rng.random()) * length * 1.05)
            p.kill()
            p.wait()
            n += 1
            shard = [m for m in os.listdir(out) if m.startswith("manifest-")] if os.path.isdir(out) else []
            if shard:
                break
        r = None if shard else tool(*args, "--memory", "16M", "--out", out, "--resume")
        if r and r.returncode:
            bad.append("--resume after a kill: " + r.stderr)
        if tool("verify", out).returncode or subprocess.run(["diff", "-r", "-x", ".vecshard-build-*", whole, out], capture_output=True).returncode:
            bad.append("the build that went on differs from an undisturbed one")
        if r and sorted(os.listdir(out)) != sorted(os.listdir(whole)):
            bad.append("something was left: %s" % os.listdir(out))
    return n, bad


READER = r"""
import sqlite3, sys, time, numpy as np
c = sqlite3.connect(":memory:", isolation_level=None)
c.enable_load_extension(True)
c.load_extension(sys.argv[1])
q = np.random.default_rng(int(sys.argv[3])).standard_normal((50, 16)).astype("<f4")
end = time.time() + float(sys.argv[4])
n = 0
while time.time() < end:
    v = q[n % 50]
    try:
        r = c.execute("SELECT shard, id, distance, embedding FROM shard_union(?, ?, 10)", (sys.argv[2], v.tobytes())).fetchall()
        for s, i, d, e in r:
            if abs(d - float(np.sqrt(((np.frombuffer(e, '<f4').astype('f8') - v) ** 2).sum()))) > 1e-3: print("WRONG"); sys.exit(3)
        if [x[2] for x in r] != sorted(x[2] for x in r): print("ORDER"); sys.exit(3)
    except sqlite3.Error:
        pass
    n += 1
print(n)
"""


def readers(rng, until, d):
    db = os.path.join(d, "db")
    os.makedirs(db)
    bad, n = [], 0
    for i in range(6):
        np.save(os.path.join(d, "p%d.npy" % i), rng.standard_normal((3000 + 1500 * i, 16)).astype("<f4"))
    tool("build", os.path.join(d, "p0.npy"), "--metric", "l2", "--out", os.path.join(db, "s0"))
    ps = [subprocess.Popen(["/usr/bin/python3", "-c", READER, os.path.join(BUILD, "vecshard"), db, str(i), str(until - time.time())], stdout=subprocess.PIPE, text=True) for i in range(3)]
    while time.time() < until:
        i = int(rng.integers(1, 6))
        s = os.path.join(db, "s%d" % i)
        if os.path.isdir(s):
            shutil.rmtree(s)
        elif tool("build", os.path.join(d, "p%d.npy" % i), "--metric", "l2", "--out", s).returncode:
            bad.append("a build fails while readers read")
        n += 1
    for p in ps:
        out = p.communicate()[0]
        if p.returncode:
            bad.append("reader exit %d %s" % (p.returncode, out[-200:]))
    return n, bad


RULES = [dict(status=503, p=0.2), dict(status=500, first=1), dict(status=429, p=0.1, retry_after="0"), dict(reset=True, p=0.1),
         dict(truncate=True, p=0.1), dict(drop=True, p=0.1), dict(corrupt=True, p=0.02, match="[.]ivf"), dict(latency_ms=2, jitter_ms=10),
         dict(lose=True, p=0.05), dict(stall_ms=300, p=0.02), dict(redirect="eu-west-9")]


def one_store(rng, d, uri, proxy):
    bad, db = [], os.path.join(d, "db")
    shutil.rmtree(db, ignore_errors=True)
    dim = int(rng.choice([1, 3, 16, 61]))
    for i in range(int(rng.integers(1, 5))):
        np.save(os.path.join(d, "p.npy"), rng.standard_normal((int(rng.choice([0, 1, 300, 5000, 9000])), dim)).astype("<f4"))
        tool("build", os.path.join(d, "p.npy"), "--metric", "l2", "--out", os.path.join(db, "s%d" % i), *(["--store", "f16"] if rng.integers(2) else []))
    proxy.reset(seed=int(rng.integers(1 << 30)))
    rules = [RULES[i] for i in rng.choice(len(RULES), int(rng.integers(0, 4)), replace=False)]
    for r in rules:
        proxy.faults(**r)
    r = tool("publish", db, uri)
    if r.returncode:
        return ["publish under %s: %s" % (rules, r.stderr)]
    c = connect()
    c.execute("SELECT vecshard_config('cache_mb', ?)", (int(rng.choice([0, 1, 64])),))
    for _ in range(6):
        q = rng.standard_normal(dim).astype("<f4").tobytes()
        sql = "SELECT shard, id, distance, embedding FROM shard_union(?, ?, %d) WHERE nprobe = %d AND refine = %d%s" % (
            rng.choice([1, 10, 3000]), rng.choice([1, 8, 1000]), rng.choice([1, 5]), " AND exact = 1" if rng.integers(4) == 0 else "")
        try:
            if c.execute(sql, (uri, q)).fetchall() != c.execute(sql, (db, q)).fetchall():
                bad.append("rows differ under %s: %s" % (rules, sql))
        except sqlite3.Error as e:
            if not any("corrupt" in r for r in rules) or "damaged" not in str(e):
                bad.append("%s under %s" % (e, rules))
    c.close()
    back = os.path.join(d, "back")
    shutil.rmtree(back, ignore_errors=True)
    r = tool("pull", uri, back)
    if r.returncode and "damaged" not in r.stderr:
        bad.append("pull under %s: %s" % (rules, r.stderr))
    elif not r.returncode and subprocess.run(["diff", "-r", db, back], capture_output=True).returncode:
        bad.append("pulled files differ under %s" % rules)
    return bad


def segment(rng, folder, n_bytes):
    """A shard's segment with so many bytes, or a few more; returns what a manifest says of it."""
    dim = int(rng.choice([16, 500]))
    np.save(folder + ".npy", rng.standard_normal((max(1, n_bytes // (4 * dim + 40)), dim)).astype("<f4"))
    shutil.rmtree(folder + "-one", ignore_errors=True)
    assert tool("build", folder + ".npy", "--metric", "l2", "--partitions", 1, "--out", folder + "-one").returncode == 0
    names = os.listdir(folder + "-one")
    return folder + "-one", [n for n in names if n.endswith("ivf")][0], [n for n in names if n.startswith("manifest-")][0]


def many_segments(rng, folder):
    """A folder that publish and pull take for a shard, of segments that have not much to do with one another."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    segments = []
    for _ in range(int(rng.integers(1, 6))):
        one, seg, name = segment(rng, folder, int(rng.choice([1000, 300_000, 6_000_000, 20_000_000])))
        m = json.load(open(os.path.join(one, name)))
        if not any(s["file"] == seg for s in segments):
            segments += m["segments"]
        os.replace(os.path.join(one, seg), os.path.join(folder, seg))
    json.dump({**m, "segments": segments}, open(os.path.join(folder, name), "w"))
    return {s["file"]: s["bytes"] for s in segments}


def end_some(rng, ps):
    for p in ps:
        kind = rng.integers(3)
        time.sleep(float(rng.random()) * 0.4)
        if kind:
            p.send_signal(signal.SIGKILL if kind == 1 else signal.SIGINT)
    return [p.wait(timeout=600) for p in ps]


def one_travel(rng, d, uri, proxy):
    bad, here, back = [], os.path.join(d, "here"), os.path.join(d, "back")
    files = many_segments(rng, here)
    shutil.rmtree(back, ignore_errors=True)
    bucket, prefix = uri[5:].split("/", 1)
    proxy.reset(seed=int(rng.integers(1 << 30)))
    rules = [RULES[i] for i in rng.choice(len(RULES), int(rng.integers(0, 3)), replace=False) if "corrupt" not in RULES[i]]
    for r in rules + [dict(bytes_per_s=30e6)]:
        proxy.faults(**r)
    ways = (["publish", here, uri, "--part-size", str(rng.choice(["5M", "7M"]))], ["pull", uri, back])
    for way in ways:
        for _ in range(3):
            end_some(rng, [subprocess.Popen([TOOL, *way, "--jobs", str(rng.integers(1, 5))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                           for _ in range(int(rng.integers(1, 4)))])
            there = {e["key"][len(prefix) + 1:]: e["size"] for e in proxy.client.entries(bucket, prefix + "/")} if way[0] == "publish" else {
                f: os.path.getsize(os.path.join(back, f)) for f in (os.listdir(back) if os.path.isdir(back) else [])}
            if any(n.startswith("manifest-") for n in there) and any(there.get(f) != size for f, size in files.items()):
                bad.append("%s under %s: a manifest without its files" % (way[0], rules))
        r = tool(*way)
        if r.returncode:
            return bad + ["%s under %s: %s" % (way[0], rules, r.stderr)]
    if subprocess.run(["diff", "-r", here, back], capture_output=True).returncode:
        bad.append("pulled files differ under %s" % rules)
    return bad


def on_a_store(one_round, rng, until, d):
    sys.path.insert(0, os.path.join(ROOT, "test"))
    from s3.client import Client
    from s3.fault_proxy import FaultProxy
    script = [sys.executable, os.path.join(ROOT, "test", "s3", "rgw.py")]
    folder = os.path.join(d, "rgw")
    subprocess.run([*script, "start", folder, "--owner", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)
    bad, n = [], 0
    try:
        env = dict(line.split("=", 1) for line in subprocess.run([*script, "env", folder], check=True, capture_output=True, text=True)
                   .stdout.replace("export ", "").split("\n") if "=" in line)
        Client(env["AWS_ENDPOINT_URL"], env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]).create_bucket("soak")
        with FaultProxy(env["AWS_ENDPOINT_URL"]) as proxy:
            os.environ.update({**env, "AWS_ENDPOINT_URL": proxy.endpoint})
            proxy.client = Client(env["AWS_ENDPOINT_URL"], env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"])
            while time.time() < until:
                bad += one_round(rng, d, "s3://soak/%d" % n, proxy)
                n += 1
    finally:
        subprocess.run([*script, "stop", folder, "--remove"])
    return n, bad


def store(rng, until, d):
    return on_a_store(one_store, rng, until, d)


def travel(rng, until, d):
    return on_a_store(one_travel, rng, until, d)


def anonymous_mb(pid):
    try:
        with open("/proc/%d/smaps_rollup" % pid) as f:
            return next(int(line.split()[1]) for line in f if line.startswith("Anonymous:")) / 1024
    except (OSError, StopIteration):
        return 0


def large_rows(first, n):
    """Rows first to first + n of the large set, the same at every call."""
    rng = np.random.default_rng([7, first])
    centers = np.random.default_rng(7).standard_normal((5000, 16), dtype="f4") * 2
    return (centers[rng.integers(0, len(centers), n)] + rng.standard_normal((n, 16), dtype="f4") * .5).astype("<f2")


def write_large(path, n, step, queries):
    """The file, and the ids of the ten rows nearest to each query."""
    best_d, best_i = np.full((len(queries), 10), np.inf), np.zeros((len(queries), 10), int)
    with h5py.File(path, "w") as f:
        data = f.create_dataset("embeddings", (n, 16), "<f2")
        for first in range(0, n, step):
            x = large_rows(first, min(step, n - first))
            data[first:first + len(x)] = x
            x = x.astype("f4")
            d = (x ** 2).sum(1) - 2 * (queries @ x.T)
            near = np.argpartition(d, 10, 1)[:, :10]
            d, near = np.hstack([best_d, np.take_along_axis(d, near, 1)]), np.hstack([best_i, near + first])
            keep = np.argsort(d, 1)[:, :10]
            best_d, best_i = np.take_along_axis(d, keep, 1), np.take_along_axis(near, keep, 1)
    return best_i


def large(rng, until, d):
    step, memory, bad = 500_000, 512, []
    n = large.rows // step * step
    queries = large_rows(n, 40).astype("f4")
    source, out = os.path.join(d, "large.h5"), os.path.join(d, "shard")
    truth = write_large(source, n, step, queries)
    start, peak = time.time(), 0
    build = subprocess.Popen([TOOL, "build", source, "--out", out, "--id-dataset", "none", "--metric", "l2", "--store", "f16", "--memory", "%dM" % memory])
    while build.poll() is None:
        peak = max(peak, anonymous_mb(build.pid))
        time.sleep(.1)
    if build.returncode:
        return 1, ["build: status %d" % build.returncode]
    print("large: %d rows built in %.0f s, %.0f MB of anonymous memory at most" % (n, time.time() - start, peak), flush=True)
    if peak > memory + 200:
        bad.append("build: %.0f MB with --memory %dM" % (peak, memory))
    os.unlink(source)
    start = time.time()
    if tool("verify", out, timeout=3600).returncode:
        bad.append("verify: not sound")
    print("large: verified in %.0f s" % (time.time() - start), flush=True)
    c = connect()
    c.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % out)
    for i in rng.integers(0, n, 100):
        got = c.execute("SELECT embedding FROM t WHERE id = ?", (int(i),)).fetchall()
        want = large_rows(int(i) // step * step, step)[int(i) % step].astype("<f4") if len(bad) < 3 else None
        if len(got) != 1 or got[0][0] != want.tobytes():
            bad.append("id %d: %d rows, or another vector" % (i, len(got)))
    hits, start = 0, time.time()
    for q, near in zip(queries, truth):
        ids = [r[0] for r in c.execute("SELECT id FROM t WHERE embedding MATCH ? AND k = 10", (q.tobytes(),))]
        hits += len(set(ids) & set(near.tolist()))
    print("large: recall@10 %.3f, %.1f ms a query" % (hits / 10 / len(queries), (time.time() - start) * 1e3 / len(queries)), flush=True)
    if hits < 9 * len(queries):
        bad.append("recall %.3f" % (hits / 10 / len(queries)))
    return 1, bad


CAMPAIGNS = {"shapes": shapes, "damage": damage, "kill": kill, "resume": resume, "readers": readers, "store": store, "travel": travel, "large": large}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("campaign", nargs="*", default=list(CAMPAIGNS))
    ap.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    ap.add_argument("--minutes", type=float, default=3.0, help="for each campaign")
    ap.add_argument("--large-rows", type=int, default=200_000_000)
    a = ap.parse_args()
    large.rows = a.large_rows
    passed = failed = 0
    for name in a.campaign:
        rng = np.random.default_rng([a.seed, len(name)])
        with tempfile.TemporaryDirectory(prefix="vecshard-soak-") as d:
            n, bad = CAMPAIGNS[name](rng, time.time() + a.minutes * 60, d)
        for b in bad[:20]:
            print("FAILED  %s: %s" % (name, b))
        print("%s: seed %d, %d rounds, %d faults" % (name, a.seed, n, len(bad)), flush=True)
        passed += n - min(n, len(bad))
        failed += len(bad)
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()

"""Recall on request and measured again: `recall = r` holds on queries that are like the rows, shard_recall() and `vecshard recall`
tell what searches find and take, and say so when queries are unlike the rows.

The truth is brute force with numpy, in float64. Rows lie near a curved surface of few dimensions, in lumps, as embeddings do.
"""
import json
import os
import signal
import sqlite3
import subprocess
import threading
import time

import numpy as np
import pytest

from conftest import BUILD, blob, build_shard, connect, plain_environ, tool, use_environ

SEED = 5
LEVELS = [.8, .9, .95, .98, .99, .995]
COLUMNS = ["nprobe", "refine", "recall", "ms", "requests", "bytes"]
SHAPES = {"l2": (30000, 32), "cosine": (20000, 128), "dot": (24000, 48)}
HELD_OUT = 1000


def surface(n, dim, seed=SEED, inner=12):
    """The same surface for the same seed; n rows drawn from it, the same ones for the same n."""
    rng = np.random.default_rng(seed)
    w, lumps = rng.normal(size=(inner, dim)) * .3, rng.normal(size=(40, inner)) * 1.5
    z = rng.normal(size=(n, inner)) + lumps[rng.integers(0, 40, n)]
    return (np.tanh(z @ w) + .1 * rng.normal(size=(n, dim))).astype("<f4")


def far(n, dim):
    return (np.random.default_rng(SEED + 1).normal(size=(n, dim)) * 2).astype("<f4")


def nearest(x, queries, k, metric, own=False):
    """Row numbers of the k nearest, query by query; own: query i is row i, which is left out."""
    x, q = x.astype(np.float64), queries.astype(np.float64)
    if metric == "cosine":
        x, q = x / np.linalg.norm(x, axis=1)[:, None], q / np.linalg.norm(q, axis=1)[:, None]
    d = -(q @ x.T)
    if metric == "l2":
        d = 2 * d + (x ** 2).sum(axis=1)
    if own:
        d[np.arange(len(q)), np.arange(len(q))] = np.inf
    return np.argpartition(d, k, axis=1)[:, :k]


def pack(db, queries):
    db.execute("CREATE TEMP TABLE IF NOT EXISTS q(n INTEGER PRIMARY KEY, e BLOB)")
    db.execute("DELETE FROM q")
    db.executemany("INSERT INTO q VALUES(?,?)", [(i, blob(v)) for i, v in enumerate(queries)])
    return db.execute("SELECT vec_pack(e) FROM (SELECT e FROM q ORDER BY n)").fetchone()[0]


def found(db, source, queries, k, how, args=(), own=False):
    """Sets of ids, query by query; own: without id i of query i, and at most k."""
    got = [[] for _ in queries]
    for n, i in db.execute("SELECT query_no, id FROM shard_union(?, ?, ?) WHERE %s" % how, (source, pack(db, queries), k + own, *args)):
        got[n].append(i)
    return [set([i for i in ids if not own or i != n][:k]) for n, ids in enumerate(got)]


def share(got, truth):
    return float(np.mean([len(g & set(t)) / len(t) for g, t in zip(got, truth.tolist())]))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """metric -> (path, rows, held-out queries, their ten nearest), built when first asked for."""
    folder, made = tmp_path_factory.mktemp("recall"), {}

    def make(metric):
        if metric not in made:
            n, dim = SHAPES[metric]
            x = surface(n + HELD_OUT, dim)
            build_shard(folder / metric, x[:n], metric=metric)
            np.save(folder / (metric + ".npy"), x[n:])
            made[metric] = (str(folder / metric), x[:n], x[n:], nearest(x[:n], x[n:], 10, metric))
        return made[metric]
    return make


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A folder of three shards of one set of rows, the last of them flat, and the rows: a row's number is its id."""
    folder = tmp_path_factory.mktemp("recalls")
    x = surface(17000, 40, seed=SEED + 2)
    for name, part in (("a", slice(0, 8000)), ("b", slice(8000, 14000)), ("c", slice(14000, 17000))):
        build_shard(folder / "db" / name, x[part], ids=list(range(17000))[part])
    return str(folder / "db"), x


def curve(db, *args):
    """Rows of shard_recall as dicts, target (None: the default) among them."""
    sql = "SELECT target, * FROM shard_recall(%s)" % ",".join("?" * len(args))
    c = db.execute(sql, args)
    assert [d[0] for d in c.description] == ["target"] + COLUMNS
    return [dict(zip(["target"] + COLUMNS, r)) for r in c]


def measured(source, *options, env=None):
    """`vecshard recall --json` and what it says on stderr."""
    r = tool("recall", source, "--json", *options, env=env)
    return json.loads(r.stdout), r.stderr


# ---- recall on request ----

@pytest.mark.plain_only("statistics")
@pytest.mark.parametrize("metric", SHAPES)
def test_recall_is_what_was_asked_for(db, shards, metric):
    """On queries of the same distribution that are not in the shard, and without looking everywhere."""
    path, x, queries, truth = shards(metric)
    scanned, compared = [], []
    for r in (.8, .9, .95, .99):
        got = share(found(db, path, queries, 10, "recall = ?", (r,)), truth)
        assert got >= r - .01, (r, got)
        for phase, to in (("scan", scanned), ("refine", compared)):
            to.append(db.execute("SELECT rows FROM shard_trace WHERE phase = ?", (phase,)).fetchone()[0] / len(queries))
    assert got < 1 and scanned[0] < scanned[-1] < len(x) / 8 and compared[0] < compared[-1] < 300, "nothing was spared"


@pytest.mark.plain_only("statistics")
@pytest.mark.parametrize("k", [1, 100])
def test_recall_of_other_k(db, shards, k):
    path, x, queries, _ = shards("l2")
    truth = nearest(x, queries, k, "l2")
    for r in (.8, .95):
        got = share(found(db, path, queries, k, "recall = ?", (r,)), truth)
        assert r - .015 <= got <= r + .12, (r, got)


def test_defaults_follow_the_calibration(db, tmp_path):
    """Long lists of rows with codes of one byte: the rule of thumb for nprobe and refine finds too little there, and is not left alone."""
    x = surface(41000, 8)
    x, queries = x[:-200], x[-200:]
    build_shard(tmp_path / "long", x, options=("--partitions", "60"))
    path = str(tmp_path / "long")
    truth = nearest(x, queries, 10, "l2")
    rule = share(found(db, path, queries, 10, "nprobe = 32 AND refine = 10"), truth)
    usual = share(found(db, path, queries, 10, "1"), truth)
    assert rule < .8 and usual >= .93, (rule, usual)


@pytest.mark.plain_only("statistics")
def test_many_rows_by_the_calibration(db, tmp_path):
    """How many candidates tens of thousands of rows take depends on the codes: poor ones need many more than good ones."""
    k, compared = 20_000, []
    x = surface(90_000, 16)
    x, queries = x[:-10], x[-10:]
    truth = nearest(x, queries, k, "l2")
    for m in (1, 8):
        path = str(tmp_path / ("m%d" % m))
        build_shard(path, x, options=("--subvectors", str(m)))
        got = share(found(db, path, queries, k, "1"), truth)
        compared.append(db.execute("SELECT rows FROM shard_trace WHERE phase = 'refine'").fetchone()[0] / len(queries) / k)
        assert got >= .97, (m, got)
    assert compared[0] > 1.15 * compared[1] and compared[1] < 2.2, compared


# ---- the figures ----

@pytest.mark.parametrize("metric", ["l2", *(pytest.param(m, marks=pytest.mark.plain_only("statistics")) for m in ("cosine", "dot"))])
def test_figures_are_those_of_brute_force(db, shards, metric, tmp_path):
    """Given queries: every figure is that of the same search in SQL, compared with numpy; given as nprobe and refine as well."""
    path, x, queries, truth = shards(metric)
    told, said = measured(path, "--queries", path + ".npy", "--threads", 1)
    assert (told["k"], told["queries"], told["source"], told["missed"], said) == (10, HELD_OUT, path, [], "")
    targets = [s["target"] for s in told["settings"]]
    assert set(targets) <= {None, *LEVELS} and {None, .8, .9, .95, .995} <= set(targets)
    for s in told["settings"]:
        how, args = ("recall = ?", (s["target"],)) if s["target"] else ("1", ())
        assert abs(share(found(db, path, queries, 10, how, args), truth) - s["recall"]) < 5e-4, s
        explicit = share(found(db, path, queries, 10, "nprobe = ? AND refine = ?", (s["nprobe"], s["refine"])), truth)
        assert explicit > s["recall"] - .02, s
        assert s["ms"] > 0 and s["requests"] == s["bytes"] == 0 and not s["exact"]
    by_target = {s["target"]: s for s in told["settings"]}
    assert by_target[.8]["recall"] < by_target[.9]["recall"] < by_target[.95]["recall"] < by_target[.995]["recall"]
    assert by_target[.8]["ms"] < by_target[.995]["ms"] * 1.5  # wall time, and others compute meanwhile
    np.save(tmp_path / "few.npy", queries[:7])
    few, said = measured(path, "--queries", tmp_path / "few.npy")
    assert (few["queries"], few["missed"], said) == (7, [], ""), "what a few queries miss may be chance"
    assert measured(path, "--queries", path + ".npy", "--sample", 50)[0]["queries"] == 50


def test_rows_as_queries_leave_themselves_out(db, tmp_path):
    """With all rows as queries the figures are those over all rows, each without itself."""
    x = surface(4500, 24)
    path = build_shard(tmp_path / "own", x).path
    rows = curve(db, path, 10, 4500)
    truth = nearest(x, x, 10, "l2", own=True)
    assert len(rows) >= 4
    for s in rows:
        how, args = ("recall = ?", (s["target"],)) if s["target"] else ("1", ())
        again = share(found(db, path, x, 10, how, args, own=True), truth)  # asking for 11 it spends a tenth more
        assert again - .03 < s["recall"] < again + .003, s
    assert rows[-1]["recall"] > .98
    for s in curve(db, path, 1):
        assert s["target"] not in (.8, .9) or s["target"] - .02 < s["recall"] < .97, "1 if a row were its own neighbour"
    sample = {s["target"]: s["recall"] for s in curve(db, path, 10)}
    for s in rows:
        assert abs(sample[s["target"]] - s["recall"]) < .03


def test_rows_of_the_table(db, shards):
    path, _, _, _ = shards("l2")
    before = db.execute("SELECT id FROM shard_union(?, ?, 3)", (path, blob(shards("l2")[2][0]))).fetchall()
    trace = db.execute("SELECT * FROM shard_trace").fetchall()
    rows = curve(db, path, 10)
    assert len(before) == 3 and db.execute("SELECT * FROM shard_trace").fetchall() == trace, "measuring is no search"
    targets = [r["target"] for r in rows if r["target"]]
    assert targets == sorted(targets) and len(set(targets)) == len(targets)
    assert [r["target"] for r in rows].count(None) == 1
    for r in rows:
        assert r["target"] is None or r["recall"] >= r["target"] - .02
        assert isinstance(r["nprobe"], int) and isinstance(r["refine"], int) and r["nprobe"] >= 1 and r["refine"] >= 1
        assert 0 < r["ms"] < 50 and r["requests"] == r["bytes"] == 0
    assert rows[0]["target"] == .8 and rows[0]["recall"] < rows[-1]["recall"], "the cheapest comes first"
    assert db.execute("SELECT count(*), min(k), max(k), max(queries) FROM shard_recall(?, 7, 90)", (path,)).fetchone()[1:] == (7, 7, 90)
    assert db.execute("SELECT DISTINCT k, queries FROM shard_recall(?)", (path,)).fetchall() == [(10, 400)]
    assert db.execute("SELECT count(*) FROM shard_recall(?, 10) WHERE target = 0.9", (path,)).fetchone() == (1,)
    listed = db.execute("SELECT a.k, b.recall > .7 FROM (SELECT 5 AS k UNION SELECT 20) a, shard_recall(?, a.k, 50) b", (path,)).fetchall()
    assert {k for k, _ in listed} == {5, 20} and all(good for _, good in listed)


def test_many_shards(db, database):
    """A database, a list and tables are one source; a held-out-like query is over all of them."""
    path, x = database
    rows = curve(db, path, 10)
    assert all(r["target"] is None or r["recall"] >= r["target"] - .02 for r in rows)
    assert len(rows) >= 4 and rows[-1]["recall"] > .98 and rows[0]["recall"] < .97
    names = [os.path.join(path, n) for n in "abc"]
    for n in "abc":
        db.execute("CREATE VIRTUAL TABLE %s USING vecshard(path='%s')" % (n, os.path.join(path, n)))
    want = [(r["target"], r["nprobe"], r["refine"], r["recall"]) for r in curve(db, path, 10, 100)]
    for source in (json.dumps(names), "a,b,c"):
        assert [(r["target"], r["nprobe"], r["refine"], r["recall"]) for r in curve(db, source, 10, 100)] == want
    truth = nearest(x, x[::17], 11, "l2")  # rows find themselves, and ten others
    got = share(found(db, path, x[::17], 11, "recall = .9"), truth)
    assert abs((11 * got - 1) / 10 - [r["recall"] for r in rows if r["target"] == .9][0]) < .03


def test_flat_small_and_empty(db, database, tmp_path):
    path, _ = database
    rows = curve(db, os.path.join(path, "c"), 10)
    assert [(r["nprobe"], r["recall"], r["target"]) for r in rows] == [(1, 1.0, .995)]
    assert curve(db, os.path.join(path, "c"), 10 ** 9)[0]["recall"] == 1.0, "k is at most the rows there are"
    copies = build_shard(tmp_path / "copies", np.tile(surface(5, 8), (100, 1))).path
    assert [r["recall"] for r in curve(db, copies, 3)] == [1.0], "copies of a row are its neighbours"
    one = build_shard(tmp_path / "one", surface(1, 8)).path
    np.save(tmp_path / "x.npy", np.zeros((0, 8), "<f4"))
    tool("build", tmp_path / "x.npy", "--out", tmp_path / "none")
    for source in (one, str(tmp_path / "none"), None):
        assert curve(db, source, 10) == []
    d, said = measured(tmp_path / "none")
    assert d["settings"] == [] and d["queries"] == 0 and "no rows" in said
    one_query = tmp_path / "q.npy"
    np.save(one_query, surface(1, 8))
    assert [s["recall"] for s in measured(one, "--queries", one_query)[0]["settings"]] == [1.0]


def test_large_k(db, shards):
    path, x, _, _ = shards("dot")
    rows = curve(db, path, 2000, 40)
    assert len(rows) > 3 and all(r["recall"] >= (r["target"] or .8) - .03 for r in rows)


# ---- errors and ends ----

def test_errors(db, shards, tmp_path):
    path = shards("l2")[0]
    for args, says in [((path, 0), "k must be at least 1"), ((path, -1), "k must be a whole number"), ((path, 1.5), "k must be a whole"),
                       ((path, "ten"), "k must be a whole"), ((path, b"1"), "k must be a whole"), ((path, 10, 0), "queries must be at least 1"),
                       ((path, 10, -3), "queries must be a whole"), (("/none/such", 10), "/none/such"), (("no_table", 10), "no_table")]:
        with pytest.raises(sqlite3.Error, match=says):
            curve(db, *args)
    with pytest.raises(sqlite3.Error, match="shard_recall needs a source"):
        db.execute("SELECT * FROM shard_recall").fetchall()
    db.execute("CREATE VIEW v AS SELECT * FROM shard_recall('%s', 10)" % path)
    with pytest.raises(sqlite3.Error, match="unsafe"):
        db.execute("SELECT * FROM v").fetchall()

    np.save(tmp_path / "wide.npy", surface(10, 33))
    np.save(tmp_path / "nan.npy", np.full((3, 32), np.nan, "<f4"))
    np.save(tmp_path / "empty.npy", np.zeros((0, 32), "<f4"))
    for args, status, says in [((path, "-k", 0), 2, "-k"), ((), 2, "SOURCE"), (("/none/such",), 1, "/none/such"),
                               ((path, "--queries", tmp_path / "wide.npy"), 1, "dimension 33, not 32"),
                               ((path, "--queries", tmp_path / "nan.npy"), 1, "query 0"),
                               ((path, "--queries", tmp_path / "empty.npy"), 1, "no vectors"),
                               ((path, "--queries", tmp_path / "missing.npy"), 1, "missing.npy")]:
        r = tool("recall", *args, ok=False)
        assert r.returncode == status and says in r.stderr, (args, r.stderr)
    cosine = shards("cosine")[0]
    np.save(tmp_path / "zero.npy", np.zeros((3, 128), "<f4"))
    assert "zero vector" in tool("recall", cosine, "--queries", tmp_path / "zero.npy", ok=False).stderr


def test_interrupt(shards, tmp_path):
    """While the truth is sought and while settings are measured; the connection goes on."""
    path, x, queries, _ = shards("cosine")
    c = sqlite3.connect(":memory:", check_same_thread=False)
    c.enable_load_extension(True)
    c.load_extension(str(BUILD / "vecshard"))
    c.execute("SELECT vecshard_config('threads', 1)")
    start = time.monotonic()
    c.execute("SELECT count(*) FROM shard_recall(?, 10, 1500)", (path,)).fetchall()
    whole = time.monotonic() - start
    for at in (.1, .5):
        begun = []
        timer = threading.Timer(whole * at, lambda: (begun.append(time.monotonic()), c.interrupt()))
        timer.start()
        with pytest.raises(sqlite3.OperationalError, match="interrupt"):
            c.execute("SELECT * FROM shard_recall(?, 10, 1500)", (path,)).fetchall()
        assert time.monotonic() - begun[0] < max(.3, whole / 4)
        timer.join()
    assert len(c.execute("SELECT * FROM shard_recall(?, 10, 20)", (path,)).fetchall()) > 3
    c.close()

    p = subprocess.Popen([str(BUILD / "vecshard"), "recall", path, "--sample", "3000", "--threads", "1"], stderr=subprocess.PIPE,
                         stdout=subprocess.DEVNULL, text=True, env=plain_environ())
    time.sleep(whole / 4)
    start = time.monotonic()
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=60)[1]
    assert p.returncode == 1 and "interrupted" in said and time.monotonic() - start < max(1, whole / 2)


# ---- the tool ----

def test_table_of_the_tool(db, shards):
    path = shards("dot")[0]
    lines = tool("recall", path, "-k", 5).stdout.splitlines()
    assert lines[0].split() == ["target", "nprobe", "refine", "recall", "ms/query", "requests", "bytes"]
    table = [line.split() for line in lines[1:]]
    assert [r[0] for r in table if r[0] != "default"] == [str(r) for r in LEVELS if str(r) in {t[0] for t in table}]
    rows = curve(db, path, 5)
    assert [(None if r[0] == "default" else float(r[0]), int(r[1]), int(r[2])) for r in table] == \
        [(r["target"], r["nprobe"], r["refine"]) for r in rows]
    assert all(abs(float(t[3]) - r["recall"]) < 1e-4 and float(t[4]) > 0 and t[5:] == ["0.0", "0"] for t, r in zip(table, rows))


@pytest.mark.plain_only("statistics")
@pytest.mark.parametrize("metric", SHAPES)
def test_far_queries_are_warned_about(db, shards, metric, tmp_path):
    """What is named for each target that is missed reaches it, and fewer partitions would not."""
    path, x, _, _ = shards(metric)
    queries = far(200, x.shape[1])
    np.save(tmp_path / "far.npy", queries)
    truth = nearest(x, queries, 10, metric)
    d, said = measured(path, "--queries", tmp_path / "far.npy")
    assert "warning" in said and "far.npy" in said and "queries that are like the rows" in said and len(said.splitlines()) == 1
    assert d["missed"]
    recall = {s["target"]: s["recall"] for s in d["settings"]}
    missed = {m["target"]: m for m in d["missed"]}
    assert set(missed) == {t for t, r in recall.items() if t and r < t - .02}
    for target, m in missed.items():
        how = m["reached"]
        assert m["recall"] == recall[target]
        if how["exact"]:
            assert "%g: exact = 1" % target in said
            continue
        assert "%g: nprobe = %d AND refine = %d" % (target, how["nprobe"], how["refine"]) in said
        got = share(found(db, path, queries, 10, "nprobe = ? AND refine = ?", (how["nprobe"], how["refine"])), truth)
        assert got >= target - 1e-3 and abs(got - how["recall"]) < 1e-3, (target, got)
    least = d["missed"][0]
    less = share(found(db, path, queries, 10, "nprobe = ? AND refine = ?",
                       (max(1, least["reached"]["nprobe"] // 4), max(1, least["reached"]["refine"] // 4))), truth)
    assert less < least["target"]
    plain = tool("recall", path, "--queries", tmp_path / "far.npy")
    assert plain.stderr == said and plain.stdout.startswith("target")


def test_info_tells_the_calibration(db, database):
    path, _ = database
    rows = db.execute("SELECT shard, calibrated, beta, reach FROM shard_info(?)", (path,)).fetchall()
    assert [r[0] for r in rows] == ["a", "b", "c"]
    assert all(n >= 256 and 0 <= beta <= 4 and reach >= 0 for _, n, beta, reach in rows[:2]) and rows[2][1:] == (0, 0, 0)
    assert any(r[3] > 0 for r in rows)
    told = [s["segments"][0] for s in json.loads(tool("info", path, "--json").stdout)["shards"]]
    assert [(s["calibrated"], round(s["beta"], 5), round(s["reach"], 4)) for s in told] == [(n, round(b, 5), round(r, 4)) for _, n, b, r in rows]
    lines = tool("info", path).stdout.splitlines()
    assert lines[0].split()[-3:] == ["calibrated", "beta", "reach"]
    assert [int(line.split()[-3]) for line in lines[1:4]] == [r[1] for r in rows]


# ---- a store ----

@pytest.mark.plain_only("statistics; test_s3_shards.py reads stores in every build")
def test_in_a_store(db, s3, database, monkeypatch):
    """The same recall; requests and bytes are those of searches that find nothing in the cache, whatever was searched before."""
    use_environ(monkeypatch, s3.env)
    names = [os.path.join(database[0], n) for n in "bc"]
    uris = [s3.uri(n) for n in "bc"]
    for path, uri in zip(names, uris):
        tool("publish", path, uri, env=s3.env)
    near = curve(db, json.dumps(names), 10)
    rows = curve(db, json.dumps(uris), 10)
    assert [(r["target"], r["nprobe"], r["refine"], round(r["recall"], 3)) for r in rows] == \
        [(r["target"], r["nprobe"], r["refine"], round(r["recall"], 3)) for r in near]
    size = sum(os.path.getsize(os.path.join(path, f)) for path in names for f in os.listdir(path))
    for r in rows:
        assert 3 <= r["requests"] <= 300 and 10000 < r["bytes"] < size and r["ms"] > 0
    assert rows[0]["bytes"] < rows[-1]["bytes"], "by the last one the cache would hold all"
    told, _ = measured(uris[0], "--sample", 50, env=s3.env)
    assert all(s["requests"] > 0 and s["bytes"] > 0 for s in told["settings"])
    db.execute("SELECT vecshard_config('max_bytes', 100000)")
    with pytest.raises(sqlite3.Error, match="max_bytes"):
        curve(db, json.dumps(uris), 10)


def test_hidden_columns_take_their_place(db):
    columns = db.execute("SELECT name, hidden FROM pragma_table_xinfo('shard_recall')").fetchall()
    assert [n for n, hidden in columns if not hidden] == COLUMNS
    assert [n for n, hidden in columns if hidden] == ["source", "k", "queries", "target"]
    with connect() as c:
        assert c.execute("SELECT * FROM shard_recall(NULL, 10)").fetchall() == []

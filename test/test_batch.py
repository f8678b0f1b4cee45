"""Many queries at once: each gets the very rows that it gets alone, whatever the others, the threads, the place of the shards.

The truth is the same search one query at a time, which the other tests compare with brute force.
"""
import csv
import io
import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import threading
import time

import numpy as np
import pytest

from conftest import BUILD, blob, build_shard, clustered, connect, few_directions, plain_environ, tool, use_environ

COLUMNS = "query_no, query_key, shard, id, distance"


def pack(db, queries, keys=None):
    """What vec_pack() makes of the queries."""
    db.execute("CREATE TEMP TABLE IF NOT EXISTS q(n INTEGER PRIMARY KEY, e BLOB, key)")
    db.execute("DELETE FROM q")
    db.executemany("INSERT INTO q VALUES(?,?,?)", [(i, blob(v), keys[i] if keys else None) for i, v in enumerate(queries)])
    how = "vec_pack(e, key)" if keys else "vec_pack(e)"
    return db.execute("SELECT %s FROM (SELECT e, key FROM q ORDER BY n)" % how).fetchone()[0]


def one_by_one(db, source, queries, where, args=(), table="shard_union(?, ?)", columns="shard, id, distance"):
    sql = "SELECT %s FROM %s %s" % (columns, table, where)
    return [(i, *r) for i, v in enumerate(queries) for r in db.execute(sql, (source, blob(v), *args))]


def together(db, source, queries, where, args=(), table="shard_union(?, ?)", columns="shard, id, distance"):
    sql = "SELECT query_no, %s FROM %s %s" % (columns, table, where)
    return db.execute(sql, (source, pack(db, queries), *args)).fetchall()


def threads(db, n):
    db.execute("SELECT vecshard_config('threads', ?)", (n,))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """name -> (source, queries): dimensions on both sides of what is projected and sketched, three metrics, flat and coded
    segments, one and many of them, ids as numbers and texts, f16."""
    folder = tmp_path_factory.mktemp("batch")
    made = {}

    def add(name, rows, dim, metric, seed, ids=None, options=()):
        x = clustered(rows, dim, seed, centers=60)
        build_shard(folder / name, x, ids(rows) if ids else None, {"year": [1900 + i % 100 for i in range(rows)]}, metric, options=options)
        q = clustered(70, dim, seed, centers=60)
        made[name] = (str(folder / name), q[np.random.default_rng(seed).permutation(len(q))])

    few = few_directions(6070, 96, 6)
    build_shard(folder / "turned", few[:6000], metric="cosine")
    assert int(tool("dump", folder / "turned").stdout.split(" turn ")[1].split()[0]) > 0
    made["turned"] = (str(folder / "turned"), few[6000:])
    add("l2", 20000, 40, "l2", 1, options=("--partitions", "150"))
    add("cosine", 9000, 300, "cosine", 2, ids=lambda n: ["id%06d" % i for i in range(n)], options=("--partitions", "90"))
    add("dot", 12000, 24, "dot", 3, options=("--partitions", "100", "--bits", "4"))
    add("half", 8000, 130, "l2", 4, options=("--store", "f16",))
    add("flat", 1500, 17, "cosine", 5)
    db = folder / "db"
    for n, rows in enumerate((9000, 7000, 900)):
        build_shard(db / ("s%d" % n), clustered(rows, 32, seed=10 + n), ["%s-%05d" % ("abc"[n], i) for i in range(rows)],
                    {"year": [1900 + i % 120 for i in range(rows)]})
    made["union"] = (str(db), np.concatenate([clustered(25, 32, seed=10 + n) for n in range(3)]))
    long = folder / "long"
    build_shard(long / "one", clustered(5000, 20, 21), ["%0*d" % (60 + i % 40, i) for i in range(5000)])
    build_shard(long / "two", clustered(5000, 20, 22), ["x%0*d" % (60 + i % 40, i) for i in range(5000)])
    made["long"] = (str(long), clustered(33, 20, 21))
    return made


NAMES = ["l2", "cosine", "dot", "half", "flat", "union", "long", "turned"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_rows_are_those_of_single_queries(db, shapes, name, n_threads):
    source, queries = shapes[name]
    threads(db, n_threads)
    for where in ("WHERE k = 10", "WHERE k = 10 AND nprobe = 3 AND refine = 2", "WHERE k = 1 AND nprobe = 1 AND refine = 1",
                  "WHERE k = 300 AND nprobe = 20", "WHERE k = 10 AND recall = 0.9", "WHERE k = 5 AND nprobe = 100000 AND refine = 100000",
                  "WHERE k = 7 AND exact = 1", "WHERE k = 0"):
        alone = one_by_one(db, source, queries, where)
        assert together(db, source, queries, where) == alone, where
        assert len(alone) or where == "WHERE k = 0"


def test_large_k(db, shapes):
    source, queries = shapes["union"]
    for where in ("WHERE k = 6000", "WHERE k = 100000", "WHERE k = 20000 AND exact = 1"):
        assert together(db, source, queries[:6], where) == one_by_one(db, source, queries[:6], where)


@pytest.mark.parametrize("name", ["l2", "cosine", "union", "flat"])
def test_filters(db, shapes, name):
    """Loose and strict ones: those that need more partitions than nprobe says go on, each query as far as it has to."""
    source, queries = shapes[name]
    if name == "union":
        db.execute("CREATE VIRTUAL TABLE u USING shard_union(source='%s')" % source)
    else:
        db.execute("CREATE VIRTUAL TABLE u USING shard_union(source='[\"%s\"]')" % source)
    for where, args in (("year > 1950", ()), ("year = 1977", ()), ("year IN (1901, 1902, 1903)", ()), ("year BETWEEN 1990 AND 1999", ()),
                        ("year > 3000", ()), ("id IN (SELECT id FROM known)", ())):
        db.execute("CREATE TEMP TABLE IF NOT EXISTS known AS SELECT id FROM u WHERE query = ? AND k = 50", (blob(queries[0]),))
        for how in ("k = 20", "k = 20 AND nprobe = 2 AND refine = 3", "k = 20 AND exact = 1"):
            sql = "SELECT %%s shard, id, distance, year FROM u WHERE query = ? AND %s AND %s" % (how, where)
            alone = [(i, *r) for i, v in enumerate(queries) for r in db.execute(sql % "", (blob(v), *args))]
            assert db.execute(sql % "query_no,", (pack(db, queries), *args)).fetchall() == alone, (where, how)


def test_bounds_of_distance(db, shapes):
    source, queries = shapes["l2"]
    d = [r[3] for r in one_by_one(db, source, queries[:1], "WHERE k = 50")]
    for where in ("WHERE k = 50 AND distance < %r" % d[20], "WHERE k = 50 AND distance <= %r" % d[20], "WHERE k = 20 AND distance > %r" % d[10],
                  "WHERE k = 20 AND distance BETWEEN %r AND %r" % (d[5], d[30]), "WHERE k = 20 AND distance < 0"):
        assert together(db, source, queries, where) == one_by_one(db, source, queries, where), where


def test_keys_and_other_columns(db, shapes):
    source, queries = shapes["union"]
    keys = [[None, 7, 2.5, "text", b"blob"][i % 5] for i in range(len(queries))]
    got = db.execute("SELECT %s, row, embedding FROM shard_union(?, ?, 4)" % COLUMNS, (source, pack(db, queries, keys))).fetchall()
    alone = one_by_one(db, source, queries, "WHERE k = 4", columns="shard, id, distance, row, embedding")
    assert [(r[0], *r[2:]) for r in got] == alone
    assert [r[1] for r in got] == [keys[r[0]] for r in got]


def test_order_by_distance_over_all_queries(db, shapes):
    source, queries = shapes["l2"]
    blob_of_all = pack(db, queries)
    got = db.execute("SELECT query_no, id, distance FROM shard_union(?, ?, 10) ORDER BY distance", (source, blob_of_all)).fetchall()
    plain = db.execute("SELECT query_no, id, distance FROM shard_union(?, ?, 10)", (source, blob_of_all)).fetchall()
    assert got == sorted(plain, key=lambda r: r[2]) and len(got) == 700
    limited = db.execute("SELECT query_no, id, distance FROM shard_union(?, ?, 10) ORDER BY distance LIMIT 25", (source, blob_of_all)).fetchall()
    assert limited == got[:25]
    by_query = db.execute("SELECT query_no, id, distance FROM shard_union(?, ?, 10) ORDER BY query_no, distance", (source, blob_of_all)).fetchall()
    assert by_query == plain


def test_one_query_none_and_null(db, shapes):
    source, queries = shapes["l2"]
    assert together(db, source, queries[:1], "WHERE k = 10") == one_by_one(db, source, queries[:1], "WHERE k = 10")
    assert db.execute("SELECT * FROM shard_union(?, (SELECT vec_pack(e) FROM q WHERE 0), 10)", (source,)).fetchall() == []
    assert db.execute("SELECT * FROM shard_union(?, NULL, 10)", (source,)).fetchall() == []


def test_what_is_refused(db, shapes):
    source, queries = shapes["cosine"]
    db.execute("CREATE TABLE bad(n INTEGER PRIMARY KEY, e BLOB)")
    db.executemany("INSERT INTO bad VALUES(?, ?)", [(0, blob(queries[0])), (1, blob(queries[1][:-1]))])
    with pytest.raises(sqlite3.Error, match="dimension"):
        db.execute("SELECT vec_pack(e) FROM bad").fetchall()
    nan = queries[:3].copy()
    nan[1, 5] = np.nan
    with pytest.raises(sqlite3.Error, match="NaN"):
        pack(db, nan)
    zero = queries[:5].copy()
    zero[3] = 0
    with pytest.raises(sqlite3.Error, match="query 3.*zero vector"):
        together(db, source, zero, "WHERE k = 3")
    assert len(together(db, source, queries, "WHERE k = 3")) == 210  # and the next statement is fine
    with pytest.raises(sqlite3.Error, match="need k"):
        db.execute("SELECT * FROM shard_union(?, ?)", (source, pack(db, queries))).fetchall()
    with pytest.raises(sqlite3.Error, match="dimensions"):
        together(db, shapes["l2"][0], queries, "WHERE k = 3")


def test_many_thousand_queries_in_blocks(db, shapes):
    """More queries than a block holds; rows come in the order of the queries, and the same on one thread and two."""
    source, queries = shapes["l2"]
    many = np.concatenate([queries + np.float32(0.01 * i) for i in range(143)])[:10000]
    answers = []
    for n in (2, 1):
        threads(db, n)
        answers.append(together(db, source, many, "WHERE k = 3 AND nprobe = 4 AND refine = 3"))
    assert answers[0] == answers[1]
    assert [r[0] for r in answers[0]] == [i for i in range(10000) for _ in range(3)]
    some = np.random.default_rng(0).integers(0, 10000, 200)
    for i in some:
        alone = db.execute("SELECT shard, id, distance FROM shard_union(?, ?) WHERE k = 3 AND nprobe = 4 AND refine = 3", (source, blob(many[i]))).fetchall()
        assert [r[1:] for r in answers[0][3 * i:3 * i + 3]] == alone


def test_first_rows_do_not_wait_for_the_last_query(db, shapes):
    """A block is searched when its first row is asked for."""
    source, queries = shapes["l2"]
    many = pack(db, np.concatenate([queries] * 150))

    def seconds(n):
        start = time.process_time()
        got = db.execute("SELECT query_no, id FROM shard_union(?, ?, 5) LIMIT ?", (source, many, n)).fetchall()
        assert len(got) == n
        return time.process_time() - start
    seconds(1)
    assert min(seconds(1) for _ in range(3)) < 0.8 * min(seconds(5 * 70 * 150) for _ in range(3))


def test_interrupt(db, shapes):
    source, queries = shapes["cosine"]
    many = pack(db, np.concatenate([queries] * 100))
    for where in ("k = 5000 AND nprobe = 1000", "k = 10 AND exact = 1"):
        for n in (1, 2):
            threads(db, n)
            pressed = []

            def press():
                time.sleep(0.3)
                pressed.append(time.monotonic())
                db.interrupt()
            t = threading.Thread(target=press)
            t.start()
            with pytest.raises(sqlite3.OperationalError, match="interrupt"):
                db.execute("SELECT count(*) FROM shard_union(?, ?) WHERE %s" % where, (source, many)).fetchall()
            t.join()
            late = time.monotonic() - pressed[0]
            assert late < float(os.environ.get("VECSHARD_TEST_STOP_S", "0.5")), late  # 0.2 s, and what the machine has to do besides


def test_a_damaged_partition_is_an_error(db, shapes, tmp_path):
    source, queries = shapes["l2"]
    copy = tmp_path / "copy"
    copy.mkdir()
    for f in pathlib.Path(source).iterdir():
        data = bytearray(f.read_bytes())
        if f.suffix == ".ivf":
            data[4096:300000:1024] = bytes(b ^ 0x55 for b in data[4096:300000:1024])
        (copy / f.name).write_bytes(data)
    with pytest.raises(sqlite3.DatabaseError, match="damaged"):
        together(db, str(copy), queries, "WHERE k = 10 AND nprobe = 50")


# ---- stores ----

@pytest.fixture
def cloud(s3, proxy, shapes, monkeypatch):
    """name -> URI of that source in a store, through the proxy."""
    use_environ(monkeypatch, proxy.env)
    bucket, made = s3.bucket("batch"), {}

    def publish(name):
        if name not in made:
            made[name] = "s3://%s/%s" % (bucket, name)
            tool("publish", shapes[name][0], made[name])
        return made[name]
    return publish


@pytest.mark.parametrize("name", ["l2", "cosine", "flat", "union", "long"])
def test_rows_from_a_store(db, cloud, shapes, name):
    uri, (source, queries) = cloud(name), shapes[name]
    for where in ("WHERE k = 10", "WHERE k = 10 AND nprobe = 3 AND refine = 2", "WHERE k = 400 AND nprobe = 5", "WHERE k = 4 AND exact = 1",
                  "WHERE k = 8 AND recall = 0.95"):
        for n in (2, 1):
            threads(db, n)
            assert together(db, uri, queries, where) == together(db, source, queries, where), where


def test_filters_in_a_store(db, cloud, shapes):
    uri, (source, queries) = cloud("union"), shapes["union"]
    db.execute("CREATE VIRTUAL TABLE far USING shard_union(source='%s')" % uri)
    db.execute("CREATE VIRTUAL TABLE near USING shard_union(source='%s')" % source)
    for where in ("year > 1950", "year = 1977", "year > 3000"):
        sql = "SELECT query_no, shard, id, distance FROM %%s WHERE query = ? AND k = 20 AND nprobe = 2 AND %s" % where
        assert db.execute(sql % "far", (pack(db, queries),)).fetchall() == db.execute(sql % "near", (pack(db, queries),)).fetchall()


def trace(db):
    return {r[0]: r for r in db.execute("SELECT phase, requests, rounds, bytes FROM shard_trace")}


def test_rounds_are_those_of_one_query(db, cloud, shapes, proxy, tmp_path):
    """All queries' partitions are one round, all their rows another; what several want is read once."""
    uri, (source, queries) = cloud("union"), shapes["union"]
    code = ("import sys, json, sqlite3; c = sqlite3.connect(':memory:'); c.enable_load_extension(True); c.load_extension(sys.argv[1]);"
            "n = len(c.execute('SELECT id FROM shard_union(?, ?, 10, 8, 4)', (sys.argv[2], bytes.fromhex(open(sys.argv[3]).read()))).fetchall());"
            "print(json.dumps([n, c.execute('SELECT sum(requests), sum(rounds), sum(bytes) FROM shard_trace WHERE phase <> ?', ('total',)).fetchone()]))")

    def cold(q):
        (tmp_path / "q.hex").write_text(q.hex())
        r = subprocess.run(["/usr/bin/python3", "-c", code, str(BUILD / "vecshard"), uri, str(tmp_path / "q.hex")], capture_output=True,
                           text=True, timeout=120, env=dict(os.environ))
        assert r.returncode == 0, r.stderr[-500:]
        return json.loads(r.stdout)
    n_one, (requests_one, rounds_one, bytes_one) = cold(blob(queries[0]))
    n_all, (requests, rounds, n_bytes) = cold(pack(db, queries))
    assert n_one == 10 and n_all == 10 * len(queries)
    assert rounds <= rounds_one
    files = sum(f.stat().st_size for f in pathlib.Path(source).rglob("*.ivf"))
    assert n_bytes < 1.5 * files and bytes_one < n_bytes
    assert requests < requests_one * len(queries) / 3


def test_a_store_that_fails_now_and_then(db, cloud, shapes, proxy):
    uri, (source, queries) = cloud("union"), shapes["union"]
    right = together(db, source, queries, "WHERE k = 10 AND nprobe = 6")
    rule = proxy.faults(status=503, p=0.2)
    assert together(db, uri, queries, "WHERE k = 10 AND nprobe = 6") == right
    assert rule.hits


# ---- the tool ----

def hits(text):
    return [(int(r["query_no"]), r["shard"], r["id"], float(r["distance"])) for r in csv.DictReader(io.StringIO(text))]


@pytest.mark.parametrize("name", ["l2", "union", "long"])
def test_tool_gives_the_same_rows(db, shapes, tmp_path, name):
    source, queries = shapes[name]
    many = np.concatenate([queries] * 3)
    np.save(tmp_path / "q.npy", many)
    right = [(i, s, str(r), d) for i, s, r, d in together(db, source, many, "WHERE k = 6 AND nprobe = 4 AND refine = 3")]
    for n in (1, 2):
        got = hits(tool("query", source, "--queries", tmp_path / "q.npy", "-k", 6, "--nprobe", 4, "--refine", 3, "--threads", n).stdout)
        assert [r[:3] for r in got] == [r[:3] for r in right]
        assert np.allclose([r[3] for r in got], [r[3] for r in right], rtol=1e-7)
    recall = hits(tool("query", source, "--queries", tmp_path / "q.npy", "-k", 6, "--recall", "0.9").stdout)
    assert [r[:3] for r in recall] == [(i, s, str(r)) for i, s, r, _ in together(db, source, many, "WHERE k = 6 AND recall = 0.9")]
    assert tool("query", source, "--queries", tmp_path / "q.npy", "-k", 6, "--recall", "1.5", ok=False).returncode == 2


def test_tool_is_interrupted_and_leaves_nothing(shapes, tmp_path):
    source, queries = shapes["cosine"]
    np.save(tmp_path / "q.npy", np.concatenate([queries] * 1000))
    p = subprocess.Popen([str(BUILD / "vecshard"), "query", source, "--queries", str(tmp_path / "q.npy"), "-k", "100", "--nprobe", "90", "--out",
                          str(tmp_path / "hits.csv")], stderr=subprocess.PIPE, text=True, env=plain_environ())
    time.sleep(1)
    start = time.monotonic()
    p.send_signal(signal.SIGINT)
    text = p.communicate(timeout=60)[1]
    assert p.returncode == 1 and "interrupted" in text
    assert time.monotonic() - start < 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["q.npy"]


def test_tool_pulls_when_it_is_cheaper(cloud, shapes, tmp_path, s3, proxy):
    """A few queries read what they need, many fetch the shards first; interrupted or not, the answer is the same."""
    uri, (source, queries) = cloud("l2"), shapes["l2"]
    np.save(tmp_path / "few.npy", queries[:1])
    np.save(tmp_path / "many.npy", np.concatenate([queries + np.float32(0.3 * i) for i in range(40)]))
    args = ("-k", 5, "--nprobe", 4, "--refine", 4)
    env = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    for queries_file, says, pulled in (("few.npy", "stay there", False), ("many.npy", "are pulled", True), ("few.npy", "there already", True)):
        right = tool("query", source, "--queries", tmp_path / queries_file, *args).stdout
        r = tool("query", uri, "--queries", tmp_path / queries_file, *args, "--pull", tmp_path / "here", env=env)
        assert r.stdout == right
        assert says in r.stderr
        assert (tmp_path / "here" / "l2").exists() == pulled
    assert tool("query", source, "--queries", tmp_path / "few.npy", *args, "--pull", tmp_path / "x", ok=False).returncode == 2
    uri, (source, queries) = cloud("union"), shapes["union"]
    np.save(tmp_path / "many.npy", np.concatenate([queries + np.float32(0.1 * i) for i in range(40)]))
    r = tool("query", uri, "--queries", tmp_path / "many.npy", *args, "--pull", tmp_path / "db", env=env)
    assert "are pulled" in r.stderr and r.stdout == tool("query", source, "--queries", tmp_path / "many.npy", *args).stdout
    assert sorted(f.name for f in (tmp_path / "db").iterdir()) == ["s0", "s1", "s2"]

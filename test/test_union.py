"""`shard_union` through SQL: as a function over folders, lists and tables, with batches of queries, and as a virtual table.

The truth is brute force over all shards together. Data is made here, seed SEED.
"""
import json
import os
import shutil
import sqlite3

import numpy as np
import pytest
from conftest import blob, build_shard, clustered, connect

SEED = 11
N, DIM = 1500, 12


@pytest.fixture(scope="module")
def folder(make_shard):
    """A database of three shards with columns, one of them with 20 partitions, integer ids that repeat between shards."""
    x = clustered(3 * N, DIM, SEED)
    shards = []
    for i, name in enumerate("abc"):
        rows = range(N * i, N * (i + 1))
        columns = {"kind": ["k%d" % (r % 5) for r in rows], "size": [r % 37 for r in rows],
                   "score": [float("nan") if r % 4 == 0 else r / 7 for r in rows], "note": ['%d "quoted" \\ \t é' % r for r in rows]}
        shards.append(make_shard("database/" + name, x[rows], ids=list(range(i * 100, i * 100 + N)), columns=columns, kinds={"note": "stored"},
                                 options=("--partitions", 20) if name == "b" else ()))
    return os.path.dirname(shards[0].path), shards


Q = clustered(3 * N, DIM, SEED)[700] + np.float32(0.2)
QB = blob(Q)


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    """Whoever runs the tests has no keys for a store, so that none is asked."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_NO_SIGN_REQUEST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def truth(shards, q, k, where=None):
    """(shard, id) of the k nearest over all shards; ties by shard, then id."""
    rows = []
    for s in shards:
        d = s.distances(q)
        rows += [(d[n], os.path.basename(s.path), s.ids[n]) for n in range(len(s.ids)) if where is None or where(s, n)]
    return [r[1:] for r in sorted(rows)[:k]]


def fails(db, sql, *args, says):
    with pytest.raises(sqlite3.Error) as e:
        db.execute(sql, args).fetchall()
    for text in [says] if isinstance(says, str) else says:
        assert text in str(e.value)


# ---- the function ----

def test_folder_list_and_tables(db, folder):
    path, shards = folder
    want = truth(shards, Q, 15)
    db.execute("ATTACH ':memory:' AS other")
    db.execute("CREATE VIRTUAL TABLE a USING vecshard(path='%s')" % shards[0].path)
    db.execute("CREATE VIRTUAL TABLE other.\"b b\" USING vecshard(path='%s')" % shards[1].path)
    sources = {path: "abc", path + "/": "abc", path + "//": "abc", json.dumps([s.path for s in shards]): "abc", json.dumps([path]): "abc",
               json.dumps([s.path + "/" for s in shards]): "abc"}
    for source, names in sources.items():
        got = db.execute("SELECT shard, id FROM shard_union(?, ?, 15) WHERE exact = 1", (source, QB)).fetchall()
        assert got == want, source
    for source in (path + "/", path + "//", json.dumps([path + "//"]), shards[0].path + "//"):
        shown = [r[0] for r in db.execute("SELECT path FROM shard_list(?)", (source,))]
        assert shown == ([s.path for s in shards] if "database" == os.path.basename(source.strip('[]"').rstrip("/")) else [shards[0].path]), source
    named = {"a": "a", "other.b b": "b", "b b": "b", "A": "a", "main.a": "a", " a ": "a"}
    for source, name in named.items():
        got = db.execute("SELECT shard, id FROM shard_union(?, ?, 5)", (source, QB)).fetchall()
        s = shards["abc".index(name)]
        assert got == [(source.strip(), i) for i in s.nearest(Q, 5)], source
    both = db.execute("SELECT shard, id FROM shard_union('a, other.b b', ?, 15) WHERE exact = 1", (QB,)).fetchall()
    assert [({"a": "a"}.get(n, "b"), i) for n, i in both] == truth(shards[:2], Q, 15)


def test_unknown_sources(db, folder, tmp_path, no_credentials):
    path, _ = folder
    db.execute("CREATE TABLE ordinary(x)")
    for source, says in [("nothing", "nothing is not a vecshard table"), ("main.nothing", "not a vecshard table"), ("ordinary", "not a vecshard table"),
                         ("a,,b", "a is not a vecshard table"), ("", "source is empty"), (",", "name is missing"), (" , ", "name is missing"), (",nothing", "name is missing"),
                         (" ", "source is empty"), ("no\"quote", "not a vecshard table"), ("no.such.name", "not a vecshard table"),
                         ("[", "not valid JSON"), ("[]", "names no shard"), ("[1]", "JSON texts"), ('["a"', "not valid JSON"), ("[null]", "JSON texts"),
                         (str(tmp_path / "none"), "none"), (str(tmp_path), "holds no shard"), ("s3://bucket/x", "no credentials"),
                         (json.dumps([path, "s3://b/c"]), "the name of a bucket"), (json.dumps([path, str(tmp_path)]), "holds no shard")]:
        fails(db, "SELECT * FROM shard_union(?, ?, 3)", source, QB, says=says)
    db.execute("CREATE VIRTUAL TABLE a USING vecshard(path='%s/a')" % path)
    for source in ("a,,a", "a, ,a", ",a", "a,,", "a,"):
        fails(db, "SELECT * FROM shard_union(?, ?, 3)", source, QB, says=["name is missing", "'%s'" % source])
    assert db.execute("SELECT * FROM shard_union(NULL, ?, 3)", (QB,)).fetchall() == []
    assert db.execute("SELECT * FROM shard_union(?, NULL, 3)", (path,)).fetchall() == []
    fails(db, "SELECT * FROM shard_union", says="shard_union(source, query, k)")
    fails(db, "SELECT * FROM shard_union(?)", path, says="needs a query")
    fails(db, "SELECT * FROM shard_union WHERE k = 3", says="shard_union(source, query, k)")
    fails(db, "SELECT * FROM shard_union WHERE embedding MATCH ? AND k = 3", QB, says="shard_union(source, query, k)")


def test_arguments(db, folder):
    path, shards = folder
    assert db.execute("SELECT k, nprobe, refine, recall, exact FROM shard_union(?, ?, 2, 3, 4)", (path, QB)).fetchone() == (2, 3, 4, None, 0)
    assert len(db.execute("SELECT id FROM shard_union(?, ?, 1e99)", (path, QB)).fetchall()) == 3 * N
    assert db.execute("SELECT id FROM shard_union(?, ?, 0)", (path, QB)).fetchall() == []
    fails(db, "SELECT * FROM shard_union(?, ?, -1)", path, QB, says="k must be")
    fails(db, "SELECT * FROM shard_union(?, ?, 3) WHERE recall = 90", path, QB, says="recall must be")
    assert db.execute("SELECT k, recall FROM shard_union(?, ?, 2, NULL, NULL, .9)", (path, QB)).fetchone() == (2, .9)
    fails(db, "SELECT * FROM shard_union(?, ?) WHERE k IN (1, 2)", path, QB, says="one k")
    fails(db, "SELECT * FROM shard_union(?, ?, 3) WHERE embedding MATCH ?", path, QB, QB, says="two queries")
    for column in ("k", "nprobe", "refine", "recall", "exact"):
        for op in ("> 1", "<> 1", "BETWEEN 0 AND 1", "LIKE 1"):
            fails(db, "SELECT * FROM shard_union(?, ?) WHERE %s %s" % (column, op), path, QB, says="%s takes only" % column)
    assert db.execute("SELECT shard, id FROM shard_union(?, ?) WHERE k IS 3 AND k < 9 AND nprobe IS NULL AND source IS ?1", (path, QB)).fetchall() == truth(shards, Q, 3)
    fails(db, "SELECT * FROM shard_union(?, '[1,2]', 3)", path, says=["2 dimensions", "12"])
    assert db.execute("SELECT shard, id FROM shard_union(?, ?, 3)", (path, json.dumps([float(v) for v in Q]))).fetchall() == truth(shards, Q, 3)


def test_exact_equals_merging_by_hand(db, folder):
    path, shards = folder
    by_hand = []
    for s in shards:
        db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % s.path)
        by_hand += [(d, os.path.basename(s.path), i) for i, d in
                    db.execute("SELECT id, distance FROM t WHERE embedding MATCH ? AND k = 40 AND exact = 1", (QB,))]
        db.execute("DROP TABLE t")
    got = db.execute("SELECT distance, shard, id FROM shard_union(?, ?, 40) WHERE exact = 1", (path, QB)).fetchall()
    assert got == sorted(by_hand)[:40]


def test_ties_come_by_shard_then_id(db, make_shard):
    x = np.ones((30, 4), dtype="<f4")
    for name, first in (("n", 50), ("m", 90)):
        s = make_shard("ties/" + name, x, ids=[first - 3 * i for i in range(30)])
    got = db.execute("SELECT shard, id FROM shard_union(?, '[1,1,1,2]', 60) WHERE exact = 1", (os.path.dirname(s.path),)).fetchall()
    assert got == sorted(got) and len(got) == 60
    lazy = db.execute("SELECT shard, id FROM shard_union(?, '[1,1,1,2]') ORDER BY distance", (os.path.dirname(s.path),)).fetchall()
    assert sorted(lazy) == got


@pytest.mark.plain_only("statistics")
def test_two_phase_recall(db, make_shard):
    """Refining the global best loses at most 0.002 of recall@10 against refining in every shard."""
    x = clustered(24000, 32, SEED + 1, centers=200)
    shards = [make_shard("recall/s%d" % i, x[i::3], ids=list(range(8000)), options=("--partitions", 60, "--subvectors", 8)) for i in range(3)]
    path = os.path.dirname(shards[0].path)
    for i, s in enumerate(shards):
        db.execute("CREATE VIRTUAL TABLE t%d USING vecshard(path='%s')" % (i, s.path))
    together = apart = 0
    rng = np.random.default_rng(SEED)
    for row in rng.integers(0, len(x), 200):
        q = blob(x[row] + rng.normal(size=32).astype("f4") * .3)
        want = set(db.execute("SELECT shard, id FROM shard_union(?, ?, 10) WHERE exact = 1", (path, q)).fetchall())
        together += len(want & set(db.execute("SELECT shard, id FROM shard_union(?, ?, 10)", (path, q)).fetchall()))
        merged = sorted((d, "s%d" % i, r) for i in range(3) for r, d in db.execute("SELECT id, distance FROM t%d(?, 10)" % i, (q,)))
        apart += len(want & {m[1:] for m in merged[:10]})
    assert apart / 2000 > .9
    assert together / 2000 >= apart / 2000 - .002


def test_lazy_stream(db, folder):
    path, shards = folder
    everything = truth(shards, Q, 3 * N)
    got = db.execute("SELECT shard, id, distance FROM shard_union(?, ?) WHERE exact = 1 ORDER BY distance", (path, QB)).fetchall()
    assert sorted(r[:2] for r in got) == sorted(everything) and [r[2] for r in got] == sorted(r[2] for r in got)
    assert [r[:2] for r in got[:50]] == everything[:50]
    for more in ("", "ORDER BY distance", "WHERE nprobe = 1 AND refine = 1 ORDER BY distance"):
        assert sorted(db.execute("SELECT shard, id FROM shard_union(?, ?) " + more, (path, QB))) == sorted(everything), more
    only_c = db.execute("SELECT id FROM shard_union(?, ?) WHERE exact = 1 AND shard = 'c' ORDER BY distance LIMIT 5", (path, QB)).fetchall()
    assert [r[0] for r in only_c] == shards[2].nearest(Q, 5)


def test_row_and_embedding(db, folder):
    path, shards = folder
    for name, i, e, row in db.execute("SELECT shard, id, embedding, row FROM shard_union(?, ?, 25)", (path, QB)):
        s = shards["abc".index(name)]
        n = s.at[i]
        assert e == s.x[n].tobytes()
        assert list(json.loads(row).items()) == [(c, s.value(c, n)) for c in ("kind", "size", "score", "note")]
        assert db.execute("SELECT json_valid(?)", (row,)).fetchone() == (1,)


def test_row_without_columns(db, make_shard):
    s = make_shard("bare", clustered(20, 4, SEED), metric="dot")
    assert db.execute("SELECT row, query_no, query_key FROM shard_union(?, '[1,1,1,1]', 1)", (s.path,)).fetchone() == ("{}", 0, None)


# ---- batches ----

def test_batch(db, folder):
    path, shards = folder
    db.execute("CREATE TABLE queries(name, e)")
    keys = ["one", 2, 3.5, None, b"\0\1"]
    vectors = [shards[i % 3].x[10 * i] for i in range(5)]
    db.executemany("INSERT INTO queries VALUES(?,?)", zip(keys, map(blob, vectors)))
    sql = "SELECT query_no, query_key, shard, id, distance FROM shard_union(?, (SELECT vec_pack(e, name) FROM queries), 4) WHERE exact = 1"
    got = db.execute(sql, (path,)).fetchall()
    assert [r[:4] for r in got] == [(i, keys[i], *hit) for i, v in enumerate(vectors) for hit in truth(shards, v, 4)]
    by_distance = db.execute(sql + " ORDER BY distance", (path,)).fetchall()
    assert by_distance == sorted(got, key=lambda r: (r[4], r[0])) and by_distance != got
    assert db.execute(sql + " ORDER BY query_no, distance", (path,)).fetchall() == got
    assert db.execute(sql + " ORDER BY query_no DESC, distance", (path,)).fetchall() == sorted(got, key=lambda r: (-r[0], r[4]))
    assert db.execute("SELECT max(distance), min(distance) FROM (" + sql + ")", (path,)).fetchone() == (max(r[4] for r in got), min(r[4] for r in got))
    plain = db.execute("SELECT query_no, query_key FROM shard_union(?, (SELECT vec_pack(e) FROM queries), 1)", (path,)).fetchall()
    assert plain == [(i, None) for i in range(5)]
    some = db.execute("SELECT query_no, embedding, json_extract(row, '$.size') FROM shard_union(?, (SELECT vec_pack(e) FROM queries), 1)", (path,)).fetchall()
    assert [r[1] for r in some] == [blob(v) for v in vectors]
    one = db.execute("SELECT query_no, query_key, id FROM shard_union(?, (SELECT vec_pack(e, 'x') FROM queries WHERE name = 2), 1)", (path,)).fetchall()
    assert one == [(0, "x", shards[1].ids[10])]


def test_batch_errors(db, folder):
    path, _ = folder
    assert db.execute("SELECT * FROM shard_union(?, (SELECT vec_pack(e) FROM (SELECT 1 AS e WHERE 0)), 3)", (path,)).fetchall() == []
    fails(db, "SELECT * FROM shard_union(?, (SELECT vec_pack(column1) FROM (VALUES('[1,2]'),('[2,3]'))), 3)", path, says="2 dimensions")
    pack = db.execute("SELECT vec_pack(column1) FROM (VALUES(?1),(?1))", (QB,)).fetchone()[0]
    fails(db, "SELECT * FROM shard_union(?, ?)", path, pack, says="several queries at once need k")
    fails(db, "SELECT * FROM shard_union(?, ?, 3)", path, pack[:-4], says="BLOB")


# ---- the table ----

def test_table_form(db, folder):
    path, shards = folder
    db.execute("CREATE VIRTUAL TABLE every USING shard_union(source='%s')" % path)
    assert [r[1] for r in db.execute("PRAGMA table_info(every)")] == \
        ["shard", "id", "distance", "query_no", "query_key", "embedding", "row", "kind", "size", "score", "note"]
    assert db.execute("SELECT shard, id FROM every WHERE embedding MATCH ? AND k = 10 AND exact = 1", (QB,)).fetchall() == truth(shards, Q, 10)
    assert db.execute("SELECT shard, id FROM every WHERE query = ? AND k = 10 AND exact = 1", (QB,)).fetchall() == truth(shards, Q, 10)
    for where, keep in [("size = 5", lambda s, n: s.value("size", n) == 5), ("kind IN ('k1', 'k3')", lambda s, n: s.value("kind", n) in ("k1", "k3")),
                        ("score IS NULL", lambda s, n: s.value("score", n) is None), ("note LIKE '7%'", lambda s, n: s.value("note", n)[0] == "7"),
                        ("score < 9 AND size > 30", lambda s, n: (s.value("score", n) or 99) < 9 and s.value("size", n) > 30),
                        ("id BETWEEN 200 AND 220", lambda s, n: 200 <= s.ids[n] <= 220), ("id = '250'", lambda s, n: s.ids[n] == 250)]:
        want = truth(shards, Q, 12, keep)
        assert want
        assert db.execute("SELECT shard, id FROM every WHERE embedding MATCH ? AND exact = 1 AND k = 12 AND " + where, (QB,)).fetchall() == want, where
        near = db.execute("SELECT shard, id FROM every WHERE embedding MATCH ? AND nprobe = 1 AND k = 12 AND " + where, (QB,)).fetchall()
        assert len(near) == len(want), where
    for k in (1, 9, 2000):
        only_b = db.execute("SELECT shard, id FROM every WHERE embedding MATCH ? AND exact = 1 AND k = ? AND shard = 'b'", (QB, k)).fetchall()
        assert only_b == truth(shards[1:2], Q, k)
    for name in ("B", "none", "", None, 5):
        assert db.execute("SELECT id FROM every WHERE embedding MATCH ? AND k = 9 AND shard = ?", (QB, name)).fetchall() == []
    assert len(db.execute("SELECT id FROM every WHERE embedding MATCH ? AND k = 9 AND shard = 'B' COLLATE NOCASE", (QB,)).fetchall()) <= 9
    named = db.execute("SELECT n.column1, count(*) FROM (VALUES('a'),('c')) n CROSS JOIN every e ON e.shard = n.column1 AND e.embedding MATCH ? AND e.k = 4 GROUP BY 1", (QB,))
    assert named.fetchall() == [("a", 4), ("c", 4)]
    kept = db.execute("SELECT shard, id FROM every WHERE embedding MATCH ? AND exact = 1 AND (size = 3 OR kind = 'k2') ORDER BY distance LIMIT 8", (QB,)).fetchall()
    assert kept == truth(shards, Q, 8, lambda s, n: s.value("size", n) == 3 or s.value("kind", n) == "k2")
    for row in db.execute("SELECT shard, id, kind, size, score, note FROM every WHERE embedding MATCH ? AND k = 5", (QB,)):
        s = shards["abc".index(row[0])]
        assert row[2:] == tuple(s.value(c, s.at[row[1]]) for c in s.columns)
    fails(db, "SELECT * FROM every", says="every needs a query: WHERE embedding MATCH")
    fails(db, "SELECT * FROM every WHERE k = 3 AND size = 5 ORDER BY distance", says="every needs a query")
    fails(db, "SELECT * FROM every WHERE embedding MATCH ? AND k > 3", QB, says="k takes only")
    assert db.execute("SELECT DISTINCT source FROM every WHERE embedding MATCH ? AND k = 3", (QB,)).fetchall() == [(path,)]
    assert db.execute("SELECT id FROM every WHERE embedding MATCH ? AND k = 3 AND source = '/elsewhere'", (QB,)).fetchall() == []


def test_distance_bounds(db, folder):
    """They hold before k is cut: with one query, with several, with named ids, with and without k."""
    path, shards = folder
    db.execute("CREATE VIRTUAL TABLE every USING shard_union(source='%s')" % path)
    want = truth(shards, Q, 60)
    d = [r[0] for r in db.execute("SELECT distance FROM shard_union(?, ?, 60) WHERE exact = 1", (path, QB))]
    for source in ("shard_union('%s', :q)" % path, "every('%s', :q)" % path):
        for op, first in ((">", 20), (">=", 19)):
            got = db.execute("SELECT shard, id FROM %s WHERE exact = 1 AND k = 10 AND distance %s :d" % (source, op), {"q": QB, "d": d[19]}).fetchall()
            assert got == want[first:first + 10]
        got = db.execute("SELECT shard, id FROM %s WHERE exact = 1 AND k = 50 AND distance > :a AND distance <= :b" % source, {"q": QB, "a": d[19], "b": d[29]})
        assert got.fetchall() == want[20:30]
        for k in ("", "AND k = 40"):
            got = db.execute("SELECT shard, id FROM %s WHERE exact = 1 AND distance < :d %s ORDER BY distance" % (source, k), {"q": QB, "d": d[29]}).fetchall()
            assert got == want[:29]
        got = db.execute("SELECT shard, id FROM %s WHERE distance > :d ORDER BY distance LIMIT 10" % source, {"q": QB, "d": d[19]}).fetchall()
        assert len(set(got) & set(want[20:30])) >= 9
    ids = sorted({i for _, i in want[:9]})
    named = [h for h in truth(shards, Q, 4500) if h[1] in ids]
    got = db.execute("SELECT shard, id FROM every WHERE embedding MATCH ? AND k = 2 AND distance > ? AND id IN (%s)" % ",".join(map(str, ids)), (QB, d[0])).fetchall()
    assert got == named[1:3]
    other = shards[1].x[5] + np.float32(.1)
    pack = db.execute("SELECT vec_pack(column1) FROM (VALUES(?), (?))", (QB, blob(other))).fetchone()[0]
    got = db.execute("SELECT query_no, shard, id, distance FROM shard_union(?, ?, 5) WHERE exact = 1 AND distance > ? AND distance < ?", (path, pack, d[19], d[59])).fetchall()
    assert [r[1:3] for r in got if r[0] == 0] == want[20:25]
    all_other = db.execute("SELECT shard, id, distance FROM shard_union(?, ?) WHERE exact = 1", (path, blob(other))).fetchall()
    assert [r[1:] for r in got if r[0] == 1] == [r for r in all_other if d[19] < r[2] < d[59]][:5]


def test_two_searches_with_or(db, folder):
    """Rows of two searches are told apart by what they are, not by their rank."""
    path, shards = folder
    other = shards[2].x[3]
    db.execute("CREATE VIRTUAL TABLE every USING shard_union(source='%s')" % path)
    got = db.execute("SELECT shard, id FROM every WHERE (embedding MATCH ?1 AND k = 3) OR (embedding MATCH ?2 AND k = 4)", (QB, blob(other))).fetchall()
    assert sorted(got) == sorted(set(truth(shards, Q, 3)) | set(truth(shards, other, 4)))
    for row in range(5):  # the same row of two shards
        got = db.execute("SELECT shard, id FROM every WHERE (embedding MATCH ?1 AND k = 1) OR (embedding MATCH ?2 AND k = 1)",
                         (blob(shards[0].x[row]), blob(shards[2].x[row]))).fetchall()
        assert sorted(got) == [("a", row), ("c", 200 + row)]


def test_table_form_declarations(db, folder, make_shard, tmp_path):
    path, shards = folder
    for arguments in ("source=''", "", "path='%s'" % path, "source='%s', k=3" % path, "source", "source='%s/none'" % path):
        fails(db, "CREATE VIRTUAL TABLE every USING shard_union(%s)" % arguments if arguments else "CREATE VIRTUAL TABLE every USING shard_union(source=)",
              says="")
    assert db.execute("SELECT name FROM sqlite_schema").fetchall() == []
    x = clustered(10, DIM, SEED)
    a = make_shard("mixed/a", x, columns={"kind": ["a"] * 10})
    b = make_shard("mixed/b", x, columns={"size": list(range(10))})
    fails(db, "CREATE VIRTUAL TABLE every USING shard_union(source='%s')" % os.path.dirname(a.path), says=[a.path, b.path, "columns"])
    got = db.execute("SELECT shard, row FROM shard_union(?, ?, 2) ORDER BY shard", (os.path.dirname(a.path), blob(x[4]))).fetchall()
    assert got == [("a", '{"kind":"a"}'), ("b", '{"size":4}')]
    taken = make_shard("taken/a", x, columns={"source": ["a"] * 10})
    fails(db, "CREATE VIRTUAL TABLE every USING shard_union(source='%s')" % taken.path, says="source")


def test_table_form_lives_in_its_database(folder, tmp_path):
    """Reopened, moved together with its shards, renamed, dropped when the shards are gone."""
    path, shards = folder
    shutil.copytree(path, tmp_path / "home" / "shards")
    db = connect(tmp_path / "home" / "app.db")
    db.execute("CREATE VIRTUAL TABLE every USING shard_union(source='shards/')")
    db.execute("CREATE VIRTUAL TABLE two USING shard_union(source='[\"shards/a\", \"./shards/c\"]')")
    db.close()
    os.rename(tmp_path / "home", tmp_path / "moved")
    db = connect(tmp_path / "moved" / "app.db")
    assert db.execute("SELECT shard, id FROM every WHERE embedding MATCH ? AND k = 5 AND exact = 1", (QB,)).fetchall() == truth(shards, Q, 5)
    assert db.execute("SELECT shard, id FROM two WHERE embedding MATCH ? AND k = 5", (QB,)).fetchall() == truth([shards[0], shards[2]], Q, 5)
    db.execute("ALTER TABLE every RENAME TO renamed")
    db.close()
    db = connect(tmp_path / "moved" / "app.db")
    assert len(db.execute("SELECT id FROM renamed WHERE embedding MATCH ? AND k = 5", (QB,)).fetchall()) == 5
    shutil.rmtree(tmp_path / "moved" / "shards")
    fails(db, "SELECT id FROM renamed WHERE embedding MATCH ? AND k = 5", QB, says="moved/shards")
    db.execute("DROP TABLE renamed")
    db.execute("DROP TABLE two")
    assert db.execute("SELECT name FROM sqlite_schema").fetchall() == []
    db.close()


def test_other_columns_later(db, tmp_path):
    """A shard with other columns joins the folder after the table was created: an error, not a guess."""
    x = clustered(40, 6, SEED)
    build_shard(tmp_path / "db" / "a", x, columns={"kind": ["a"] * 40, "size": list(range(40))})
    db.execute("CREATE VIRTUAL TABLE every USING shard_union(source='%s')" % (tmp_path / "db"))
    assert len(db.execute("SELECT size FROM every WHERE embedding MATCH ? AND k = 3", (blob(x[0]),)).fetchall()) == 3
    for name, columns in (("b", {}), ("b", {"kind": ["b"] * 40}), ("b", {"size": list(range(40)), "kind": ["a"] * 40})):
        added = build_shard(tmp_path / "db" / name, x, columns=columns)
        fails(db, "SELECT size FROM every WHERE embedding MATCH ? AND k = 3 AND size > 3", blob(x[0]), says=[added.path, "columns"])
        shutil.rmtree(added.path)


# ---- sets of shards ----

@pytest.mark.parametrize("what, options", [("dimensions", {}), ("metric", {"metric": "dot"}), ("id type", {"ids": ["i%d" % i for i in range(10)]})])
def test_mixed_shards_are_refused(db, make_shard, what, options):
    a = make_shard("differ %s/a" % what, clustered(10, 4, SEED))
    b = make_shard("differ %s/b" % what, clustered(10, 5 if what == "dimensions" else 4, SEED), **options)
    db.execute("CREATE VIRTUAL TABLE x USING vecshard(path='%s')" % a.path)
    db.execute("CREATE VIRTUAL TABLE y USING vecshard(path='%s')" % b.path)
    for source in (os.path.dirname(a.path), json.dumps([a.path, b.path]), "x,y"):
        fails(db, "SELECT * FROM shard_union(?, '[1,2,3,4]', 3)", source, says=[a.path, b.path, what])
        names = ["x", "y"] if source == "x,y" else ["a", "b"]
        dims = [(names[0], 10, 4), (names[1], 10, 5 if what == "dimensions" else 4)]  # but they can be listed
        for _ in range(2):
            assert db.execute("SELECT shard, rows, dim FROM shard_list(?)", (source,)).fetchall() == dims
        assert db.execute("SELECT shard, rows FROM shard_info(?)", (source,)).fetchall() == [d[:2] for d in dims]
        assert db.execute("SELECT shard, sum(rows) FROM shard_partitions(?) GROUP BY shard", (source,)).fetchall() == [d[:2] for d in dims]
        assert db.execute("SELECT * FROM shard_verify(?)", (source,)).fetchall() == []
    same = json.dumps([a.path, b.path, a.path, os.path.dirname(a.path) + "//"])
    paths = [a.path, b.path, a.path, a.path, b.path]
    assert db.execute("SELECT shard, path FROM shard_list(?)", (same,)).fetchall() == list(zip(paths, paths))
    fails(db, "SELECT * FROM shard_list(?)", json.dumps([a.path, b.path, "/none"]), says="/none")


def test_duplicate_names(db, make_shard):
    a, b = (make_shard("%s/same" % d, clustered(10, 4, SEED + i)) for i, d in enumerate(("left", "right")))
    got = db.execute("SELECT DISTINCT shard FROM shard_union(?, '[1,2,3,4]', 99) ORDER BY shard", (json.dumps([a.path, b.path]),)).fetchall()
    assert got == [(a.path,), (b.path,)]
    twice = db.execute("SELECT count(*) FROM shard_union(?, '[1,2,3,4]', 99)", (json.dumps([a.path, a.path]),)).fetchone()
    assert twice == (20,)


def test_shards_come_and_go(db, tmp_path):
    def names():
        return [r[0] for r in db.execute("SELECT DISTINCT shard FROM shard_union(?, '[1,2,3,4]', 99) ORDER BY 1", (str(tmp_path / "db"),))]
    a = build_shard(tmp_path / "db" / "a", clustered(10, 4, SEED))
    assert names() == ["a"]
    for name in ("b", "c", "d"):
        build_shard(tmp_path / name, clustered(10, 4, SEED))
        os.rename(tmp_path / name, tmp_path / "db" / name)
        os.makedirs(tmp_path / "db" / (name + " is no shard"))
        assert names()[-1] == name
    assert names() == ["a", "b", "c", "d"]
    shutil.rmtree(a.path)
    assert names() == ["b", "c", "d"]


def test_many_sources_in_turn(db, folder):
    """More sources than a connection keeps open."""
    _, shards = folder
    lists = [json.dumps([shards[i].path, shards[j].path]) for i in range(3) for j in range(3) if i != j]
    for _ in range(2):
        for source in lists:
            pair = [s for s in shards if s.path in source]
            assert db.execute("SELECT shard, id FROM shard_union(?, ?, 3) WHERE exact = 1", (source, QB)).fetchall() == truth(pair, Q, 3)


def test_union_joins(db, folder):
    path, shards = folder
    db.execute("CREATE TABLE queries(n INTEGER, e)")
    db.executemany("INSERT INTO queries VALUES(?,?)", [(i, blob(shards[0].x[i])) for i in range(4)])
    got = db.execute("SELECT q.n, u.shard, u.id FROM queries q, shard_union(?, q.e, q.n) u WHERE u.exact = 1", (path,)).fetchall()
    assert got == [(i, *hit) for i in range(4) for hit in truth(shards, shards[0].x[i], i)]
    nested = db.execute("SELECT (SELECT id FROM shard_union(?, q.e, 1)) FROM queries q", (path,)).fetchall()
    assert nested == [(i,) for i in range(4)]


def test_functions_stay_out_of_schemas(db, folder):
    """What reads any path is DIRECTONLY: a view or trigger of somebody else's file cannot run it."""
    path, shards = folder
    for i, select in enumerate(["id FROM shard_union('%s', x'00', 3)" % path, "* FROM shard_list('%s')" % path, "* FROM shard_info('%s')" % path,
                                "* FROM shard_partitions('%s')" % path, "* FROM shard_verify('%s')" % path]):
        db.execute("CREATE VIEW v%d AS SELECT %s" % (i, select))
        fails(db, "SELECT * FROM v%d" % i, says="unsafe use of virtual table")
    db.execute("CREATE TABLE log(x)")
    db.execute("CREATE TRIGGER tr AFTER INSERT ON log BEGIN DELETE FROM log WHERE x IN (SELECT id FROM shard_union('%s', new.x, 3)); END" % path)
    fails(db, "INSERT INTO log VALUES(1)", says="unsafe use of virtual table")
    db.execute("CREATE VIRTUAL TABLE every USING shard_union(source='%s')" % path)
    db.execute("CREATE VIEW near AS SELECT shard, id FROM every WHERE embedding MATCH vec_f32('%s') AND k = 3" % [float(v) for v in Q])
    assert db.execute("SELECT * FROM near").fetchall() == truth(shards, Q, 3)


# ---- what describes a source ----

def test_info_functions(db, folder):
    path, shards = folder
    listed = db.execute("SELECT shard, path, rows, version, dim, metric, id_type, segments FROM shard_list(?)", (path,)).fetchall()
    assert listed == [(n, os.path.join(path, n), N, 1, DIM, "l2", "INTEGER", 1) for n in "abc"]
    info = db.execute("SELECT shard, rows, deleted, unindexed, nlist, bytes, version FROM shard_info(?)", (path,)).fetchall()
    size = [sum(os.path.getsize(os.path.join(s.path, f)) for f in os.listdir(s.path) if f.startswith("seg-")) for s in shards]
    assert info == [(n, N, 0, 0, 20 if n == "b" else 1, size[i], 1) for i, n in enumerate("abc")]
    parts = db.execute("SELECT shard, count(*), sum(rows) FROM shard_partitions(?) GROUP BY shard", (path,)).fetchall()
    assert parts == [(n, 20 if n == "b" else 1, N) for n in "abc"]
    assert db.execute("SELECT * FROM shard_verify(?)", (path,)).fetchall() == []
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % shards[1].path)
    assert db.execute("SELECT shard, rows FROM shard_list('t')").fetchall() == [("t", N)]
    assert db.execute("SELECT count(*) FROM shard_partitions('t')").fetchone() == (20,)
    for source in ("t", json.dumps([s.path for s in shards])):
        assert db.execute("SELECT * FROM shard_verify(?)", (source,)).fetchall() == []
    for f in ("shard_list", "shard_info", "shard_partitions", "shard_verify"):
        assert db.execute("SELECT count(*) FROM %s(NULL)" % f).fetchone() == (0,)
        fails(db, "SELECT * FROM %s('/none')" % f, says="/none")
        fails(db, "SELECT * FROM %s" % f, says="")


def test_verify_finds_damage(db, folder, tmp_path):
    path, shards = folder
    shutil.copytree(path, tmp_path / "db")
    name = [f for f in os.listdir(tmp_path / "db" / "b") if f.startswith("seg-")][0]
    with open(tmp_path / "db" / "b" / name, "r+b") as f:
        f.seek(os.path.getsize(f.name) // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
    found = db.execute("SELECT shard, fault FROM shard_verify(?)", (str(tmp_path / "db"),)).fetchall()
    assert found and {os.path.basename(r[0]) for r in found} == {"b"} and all(r[1] for r in found)


def test_a_table_named_config_is_not_taken_over(make_shard, db):
    s = make_shard("config", clustered(300, 8, SEED))
    db.execute("CREATE TABLE u_config(k, v)")
    db.execute("INSERT INTO u_config VALUES('mine', 1)")
    with pytest.raises(sqlite3.Error, match="u_config"):
        db.execute("CREATE VIRTUAL TABLE u USING shard_union(source='%s')" % s.path)
    assert db.execute("SELECT * FROM u_config").fetchall() == [("mine", 1)]

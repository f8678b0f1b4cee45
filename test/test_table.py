"""The virtual table `vecshard` through SQL: declaring it, searching, filters, joins, look-ups, and its life in a host database.

The truth is brute force in float64 (Shard.distances) and, for conditions, SQLite itself over an ordinary table with the same
rows. Searches that must equal it use exact = 1 or filters that leave few rows; data is made here, seed SEED.
"""
import json
import os
import shutil
import sqlite3
import subprocess

import numpy as np
import pytest
from conftest import blob, build_shard, clustered, connect

SEED = 7
N, DIM, NLIST = 6000, 16, 40


@pytest.fixture(scope="module")
def ints(make_shard):
    """Integer ids, 40 partitions, columns of every kind; score has NULLs."""
    n = range(N)
    columns = {"kind": ["Kind%d" % (i * 7 % 11) for i in n], "length": [i * 13 % 100 - 20 for i in n],
               "score": [float("nan") if i % 5 == 0 else i * 37 % 1000 / 8 for i in n], "note": ["note %d" % (i % 300) for i in n],
               "code": ["%d" % (i % 40) if i % 2 else "%02d" % (i % 40) for i in n]}
    return make_shard("ints", clustered(N, DIM, SEED), ids=[3 * i - 600 for i in n], columns=columns,
                      kinds={"length": "index", "note": "stored"}, options=("--partitions", NLIST, "--subvectors", 4))


@pytest.fixture(scope="module")
def texts(make_shard):
    n = range(400)
    return make_shard("texts", clustered(400, 8, SEED + 1), ids=["p%03d" % (i * 7 % 400) for i in n], metric="cosine",
                      columns={"organism": ["é%d" % (i % 4) for i in n]})


@pytest.fixture(scope="module")
def dots(make_shard):
    return make_shard("dots", clustered(300, 8, SEED + 2), metric="dot")


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    """Whoever runs the tests has no keys for a store, so that none is asked."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_NO_SIGN_REQUEST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def declare(db, shard, name="t", more=""):
    db.execute("CREATE VIRTUAL TABLE %s USING vecshard(path='%s'%s)" % (name, shard.path, more))


@pytest.fixture
def t(db, ints):
    """A connection with the table t of `ints` and an ordinary table `plain` with the same rows and their distance from Q."""
    declare(db, ints)
    db.execute("CREATE TABLE plain(id INTEGER, kind TEXT, length INTEGER, score REAL, note TEXT, code TEXT, d REAL)")
    rows = zip(ints.ids, *ints.columns.values(), ints.distances(Q).tolist())
    db.executemany("INSERT INTO plain VALUES(?,?,?,?,?,?,?)", rows)
    return db


Q = clustered(N, DIM, SEED)[17] + np.float32(0.1)
QB = blob(Q)


def column(db, sql, *args):
    return [r[0] for r in db.execute(sql, args)]


def fails(db, sql, *args, says):
    with pytest.raises(sqlite3.Error) as e:
        db.execute(sql, args).fetchall()
    assert says.lower() in str(e.value).lower()


def same_ranking(shard, q, got, want):
    """Equal ids, or ids whose distances are so close that float32 may swap them."""
    assert len(got) == len(set(got)) == len(want)
    if got != want:
        d = shard.distances(q)
        np.testing.assert_allclose([d[shard.at[i]] for i in got], [d[shard.at[i]] for i in want], rtol=1e-5, atol=1e-5)


# ---- CREATE ----

def test_columns_come_from_the_shard(db, ints, texts):
    declare(db, ints)
    declare(db, texts, "u")
    shown = [(r[1], r[2]) for r in db.execute("PRAGMA table_info(t)")]
    assert shown == [("id", "INTEGER"), ("embedding", "BLOB"), ("kind", "TEXT"), ("length", "INTEGER"), ("score", "REAL"), ("note", "TEXT"),
                     ("code", "TEXT")]
    hidden = [r[1] for r in db.execute("PRAGMA table_xinfo(t)") if r[6] == 1]
    assert hidden == ["t", "k", "nprobe", "refine", "recall", "exact", "distance"]
    assert [r[2] for r in db.execute("PRAGMA table_info(u)")] == ["TEXT", "BLOB", "TEXT"]


ALL = "kind TEXT, length INTEGER INDEXED, score REAL, +note TEXT, code TEXT"


@pytest.mark.parametrize("definition", [
    "id INTEGER PRIMARY KEY, embedding FLOAT[16] distance_metric=l2, " + ALL,
    "  ID integer primary key ,Embedding float[ 16 ]  distance_metric = L2," + ALL.lower(),
    "embedding FLOAT[16] distance_metric=l2, kind TEXT, length INT, score DOUBLE, note TEXT, \"code\" TEXT",
])
def test_declared_columns_that_match(db, ints, definition):
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(%s, path = '%s')" % (definition, ints.path))
    assert db.execute("SELECT count(*) FROM t").fetchone() == (N,)


@pytest.mark.parametrize("definition, says", [
    ("id TEXT PRIMARY KEY, embedding FLOAT[16] distance_metric=l2, " + ALL, "primary key is id INTEGER"),
    ("key INTEGER PRIMARY KEY, embedding FLOAT[16] distance_metric=l2, " + ALL, "primary key is id INTEGER"),
    ("embedding FLOAT[17] distance_metric=l2, " + ALL, "16 dimensions, not 17"),
    ("embedding FLOAT[16], " + ALL, "distance_metric is l2"),
    ("vector FLOAT[16] distance_metric=l2, " + ALL, "vector column is called embedding"),
    ("embedding FLOAT[16] distance_metric=l2, kind TEXT", "5 metadata columns, not 1"),
    ("embedding FLOAT[16] distance_metric=l2, " + ALL.replace("kind TEXT", "kind INTEGER"), "column 1 of the shard is kind TEXT"),
    ("embedding FLOAT[16] distance_metric=l2, " + ALL.replace("note", "memo"), "column 4 of the shard is note TEXT"),
    ("kind TEXT", "vector column is missing"),
    ("embedding FLOAT, " + ALL, "FLOAT[dimension]"),
    ("embedding FLOAT[0]", "dimension must be"),
    ("embedding FLOAT[99999999999999999999]", "dimension must be"),
    ("embedding FLOAT[16] distance_metric=hamming", "l2, cosine or dot"),
    ("embedding FLOAT[16] distance_metric", "distance_metric="),
    ("embedding FLOAT[16] UNIQUE", "unknown words"),
    ("embedding FLOAT[16], other FLOAT[16]", "one vector column"),
    ("id INTEGER PRIMARY KEY AUTOINCREMENT, embedding FLOAT[16]", "nothing behind it"),
    ("id INTEGER PRIMARY KEY, key INTEGER PRIMARY KEY, embedding FLOAT[16]", "one primary key"),
    ("score REAL PRIMARY KEY, embedding FLOAT[16]", "one primary key"),
    ("embedding FLOAT[16], kind TEXT NOT NULL", "no column constraint"),
    ("embedding FLOAT[16], kind TEXT DEFAULT 'x'", "no column constraint"),
    ("embedding FLOAT[16], kind BLOB", "type must be"),
    ("embedding FLOAT[16], kind", "type must be"),
    ("embedding FLOAT[16] distance_metric=l2, +", "empty column"),
    ("version=0", "version must be"),
    ("version=-1", "version must be"),
    ("version=1.5", "version must be"),
    ("version=99", "version"),
    ("path='elsewhere'", "path is given twice"),
])
def test_declarations_that_are_refused(db, ints, definition, says):
    fails(db, "CREATE VIRTUAL TABLE t USING vecshard(%s, path='%s')" % (definition, ints.path) if "path=" in definition else
          "CREATE VIRTUAL TABLE t USING vecshard(path='%s', %s)" % (ints.path, definition), says=says)
    assert column(db, "SELECT name FROM sqlite_schema") == []  # nothing is left behind


@pytest.mark.parametrize("name", ["k", "nprobe", "refine", "recall", "exact", "distance", "K", "embedding", "id", "kind"])
def test_names_of_hidden_columns_are_refused(db, ints, name):
    fails(db, "CREATE VIRTUAL TABLE \"%s\" USING vecshard(path='%s')" % (name, ints.path), says="name")
    assert column(db, "SELECT name FROM sqlite_schema") == []
    declare(db, ints)
    fails(db, 'ALTER TABLE t RENAME TO "%s"' % name, says="searches use")
    assert db.execute("SELECT count(*) FROM t").fetchone() == (N,)


def test_missing_shards_and_paths(db, tmp_path, no_credentials):
    fails(db, "CREATE VIRTUAL TABLE t USING vecshard(path='%s/none')" % tmp_path, says="is not a shard")
    fails(db, "CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % tmp_path, says="vecshard build")
    fails(db, "CREATE VIRTUAL TABLE t USING vecshard(path='s3://bucket/x')", says="no credentials")
    fails(db, "CREATE VIRTUAL TABLE t USING vecshard()", says="needs a path")
    fails(db, "CREATE VIRTUAL TABLE t USING vecshard", says="needs a path")
    assert column(db, "SELECT name FROM sqlite_schema") == []


def test_default_path(tmp_path, ints):
    shutil.copytree(ints.path, tmp_path / "app.db.vecshard" / "t")
    db = connect(tmp_path / "app.db")
    db.execute("CREATE VIRTUAL TABLE t USING vecshard")
    assert db.execute("SELECT count(*) FROM t").fetchone() == (N,)
    db.close()


def test_quotes_in_names(db, ints, tmp_path):
    odd = str(tmp_path / "it's \"odd\", really")
    shutil.copytree(ints.path, odd)
    db.execute("CREATE VIRTUAL TABLE \"a \"\"b\"\" 'c'\" USING vecshard(path='%s')" % odd.replace("'", "''"))
    assert column(db, "SELECT id FROM \"a \"\"b\"\" 'c'\" WHERE embedding MATCH ? AND k = 1", QB) == ints.nearest(Q, 1)
    db.execute("DROP TABLE \"a \"\"b\"\" 'c'\"")


# ---- searching ----

@pytest.mark.parametrize("name", ["ints", "texts", "dots"])
def test_exact_is_brute_force(db, request, name):
    s = request.getfixturevalue(name)
    declare(db, s)
    for row in (0, 17, 250):
        q = s.x[row] * np.float32(1.5)
        got = db.execute("SELECT id, distance FROM t WHERE embedding MATCH ? AND k = 20 AND exact = 1", (blob(q),)).fetchall()
        same_ranking(s, q, [r[0] for r in got], s.nearest(q, 20))
        d = s.distances(q)
        np.testing.assert_allclose([r[1] for r in got], [d[s.at[r[0]]] for r in got], rtol=2e-5, atol=2e-5)
        assert [r[1] for r in got] == sorted(r[1] for r in got)


def test_recall_nprobe_refine(t, ints):
    """Approximate search finds nearly all; all partitions and all rows refined find all; one partition finds fewer."""
    found = {"": 0, "AND nprobe = 1": 0, "AND nprobe = 1000 AND refine = 1000": 0, "AND refine = 1 AND nprobe = 40": 0}
    for row in range(0, 600, 12):
        want = set(ints.nearest(ints.x[row], 10))
        for more in found:
            got = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 10 " + more, blob(ints.x[row]))
            assert len(got) == 10
            found[more] += len(want & set(got)) / 500
    assert found["AND nprobe = 1000 AND refine = 1000"] > .999
    assert found[""] > .9
    assert found["AND nprobe = 1"] < found[""]
    assert found["AND refine = 1 AND nprobe = 40"] < .95  # 4 codes for 16 dimensions do not rank well alone


def test_ways_to_give_a_query(t, ints):
    want = ints.nearest(Q, 3)
    as_json = json.dumps([float(v) for v in Q])
    for sql, args in [("SELECT id FROM t WHERE embedding MATCH ? AND k = 3", (QB,)), ("SELECT id FROM t WHERE embedding MATCH ? AND k = 3", (as_json,)),
                      ("SELECT id FROM t(?, 3)", (QB,)), ("SELECT id FROM t(?, 3)", (as_json,)), ("SELECT id FROM t(?, 3, 40, 10, NULL, 1)", (QB,)),
                      ("SELECT id FROM t(?, 3, NULL, NULL, NULL, NULL)", (QB,)), ("SELECT id FROM t(?, NULL) ORDER BY distance LIMIT 3", (QB,)),
                      ("SELECT id FROM t WHERE t = ? AND k = 3", (QB,)),
                      ("SELECT id FROM t WHERE k = 3 AND embedding MATCH (SELECT ?)", (QB,)),
                      ("SELECT id FROM t WHERE embedding MATCH vec_f32(?) AND k = 3.0", (QB,)),
                      ("SELECT id FROM t WHERE embedding MATCH ? ORDER BY distance LIMIT 3", (QB,))]:
        assert column(t, sql, *args) == want, sql


def test_arguments_as_columns(t):
    assert t.execute("SELECT k, nprobe, refine, recall, exact FROM t(?, 2, 7)", (QB,)).fetchone() == (2, 7, None, None, 0)
    assert t.execute("SELECT k, nprobe, refine, recall, exact FROM t(?, 2, NULL, NULL, 0.9)", (QB,)).fetchone() == (2, None, None, .9, 0)
    assert t.execute("SELECT k, nprobe, distance FROM t LIMIT 1").fetchone() == (None, None, None)


def test_null_query_gives_no_rows(t):
    assert t.execute("SELECT * FROM t WHERE embedding MATCH NULL AND k = 3").fetchall() == []
    assert t.execute("SELECT * FROM t(NULL, 3)").fetchall() == []
    assert t.execute("SELECT * FROM t(?)", (None,)).fetchall() == []
    assert t.execute("SELECT count(*) FROM t WHERE embedding MATCH (SELECT note FROM t WHERE id = 123456) AND k = 3").fetchone() == (0,)


def test_limits_of_k(t):
    assert column(t, "SELECT id FROM t(?, 0)", QB) == []
    assert len(column(t, "SELECT id FROM t(?, 100000)", QB)) == N
    assert len(column(t, "SELECT id FROM t(?, 9223372036854775807)", QB)) == N
    assert len(column(t, "SELECT id FROM t(?, 1e300)", QB)) == N
    assert len(column(t, "SELECT id FROM t(?, 5, 9223372036854775807, 9223372036854775807)", QB)) == 5


@pytest.mark.parametrize("where, says", [
    ("embedding MATCH '[1,2]' AND k = 3", "2 dimensions"),
    ("embedding MATCH x'0000' AND k = 3", "4 bytes per element"),
    ("embedding MATCH x'' AND k = 3", "4 bytes per element"),
    ("embedding MATCH 'abc' AND k = 3", "JSON array"),
    ("embedding MATCH 5 AND k = 3", "not a number"),
    ("embedding MATCH :nan AND k = 3", "NaN or Inf at element 3"),
    ("embedding MATCH :inf AND k = 3", "NaN or Inf"),
    ("embedding MATCH :q AND k = -1", "k must be"),
    ("embedding MATCH :q AND k = 1.5", "k must be"),
    ("embedding MATCH :q AND k = 'ten'", "k must be"),
    ("embedding MATCH :q AND k = x'01'", "k must be"),
    ("embedding MATCH :q AND nprobe = -1", "nprobe must be"),
    ("embedding MATCH :q AND refine = 'x'", "refine must be"),
    ("embedding MATCH :q AND exact = 'x'", "exact must be"),
    *[("embedding MATCH :q AND k = 3 AND recall = " + r, "recall must be") for r in ("0", "-0.5", "1.01", "95", "'most'", "x'01'", "1e999", "-1e999")],
    ("embedding MATCH :q AND k IN (1, 2)", "one k per search"),
    ("embedding MATCH :q AND k IN (SELECT 1 UNION SELECT 2)", "one k per search"),
    ("embedding MATCH :q AND embedding MATCH :q AND k = 3", "two queries"),
    ("embedding MATCH :q AND t = :q AND k = 3", "two queries"),
    ("k = 3", "k needs a query: embedding MATCH"),
    ("exact = 1", "exact needs a query: embedding MATCH"),
    ("exact = 1 AND k = 3", "needs a query: embedding MATCH"),
    ("k = 3 AND id = 300", "k needs a query"),
    ("k = 3 AND length > 5 ORDER BY distance", "k needs a query"),
    *[("embedding MATCH :q AND " + c, "%s takes only `%s = n`" % ((c.split()[0],) * 2)) for c in (
        "k > 5", "k < 5", "k >= 5", "k <= 5", "k <> 5", "k BETWEEN 1 AND 9", "k LIKE '5'", "k GLOB 5", "nprobe > 1", "refine BETWEEN 1 AND 9",
        "recall > .9", "recall >= .9", "exact > 0", "exact <> 0", "k > (SELECT 5)")],
    ("embedding MATCH :q AND k = 3 AND nprobe BETWEEN 1 AND 9", "nprobe takes only"),
])
def test_errors(t, where, says):
    bad = Q.copy()
    bad[3] = np.nan
    worse = Q.copy()
    worse[0] = np.inf
    with pytest.raises(sqlite3.Error) as e:
        t.execute("SELECT id FROM t WHERE " + where, {"q": QB, "nan": blob(bad), "inf": blob(worse)}).fetchall()
    assert says in str(e.value)
    assert column(t, "SELECT id FROM t(?, 1)", QB) != []  # the table still works


def test_k_and_its_like_as_plain_columns(t, ints):
    """What is no mistake stays: IS means =, other comparisons beside a =, and anything without a query."""
    want = ints.nearest(Q, 5)
    for where in ("k IS 5", "k IS 5.0 AND nprobe IS NULL", "k = 5 AND k < 9", "k = 5 AND k BETWEEN 1 AND 9", "k = 5 AND nprobe IS NULL", "k = 5 AND k IS NOT NULL",
                  "k = 5 AND exact IS 0", "k = 5 AND exact IS 1 AND exact > 0", "k = 5 AND k IS NOT 7", "k = 5 AND recall IS NULL"):
        assert column(t, "SELECT id FROM t WHERE embedding MATCH ? AND " + where, QB) == want, where
    assert column(t, "SELECT id FROM t WHERE t IS ? AND k = 5", QB) == want
    assert len(column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k IS NULL ORDER BY distance LIMIT 20", QB)) == 20
    assert len(column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k IS ? ORDER BY distance LIMIT 20", QB, None)) == 20
    for where, n in (("k IS NULL", N), ("k IS NOT NULL", 0), ("k > 5", 0), ("nprobe BETWEEN 1 AND 9", 0), ("exact IS NULL", N), ("k IS 5", 0), ("k IS NOT 5", N)):
        assert column(t, "SELECT count(*) FROM t WHERE " + where) == [n], where
    assert column(t, "SELECT count(*) FROM t WHERE k = 3 AND 0") == [0]
    both = column(t, "SELECT id FROM t WHERE k = 5 AND (embedding MATCH ?1 OR embedding MATCH ?2)", QB, blob(ints.x[900]))
    assert sorted(both) == sorted(set(want) | set(ints.nearest(ints.x[900], 5)))


def test_zero_vector_only_fails_under_cosine(db, texts, dots):
    declare(db, texts)
    declare(db, dots, "u")
    fails(db, "SELECT * FROM t(?, 3)", blob([0] * 8), says="zero vector")
    assert len(column(db, "SELECT id FROM u(?, 3)", blob([0] * 8))) == 3


def test_no_writing(t):
    for sql in ("INSERT INTO t(id) VALUES(1)", "DELETE FROM t", "UPDATE t SET kind = 'x'"):
        fails(t, sql, says="may not be modified")


# ---- order, LIMIT, the lazy stream ----

def test_order_by_distance(t, ints):
    want = ints.nearest(Q, 10)
    assert column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 10 ORDER BY distance", QB) == want
    assert column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 10 ORDER BY distance DESC", QB) == want[::-1]
    assert column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 10 ORDER BY length, id", QB) == \
        sorted(want, key=lambda i: (ints.value("length", ints.at[i]), i))
    far, near = t.execute("SELECT max(distance), min(distance) FROM t WHERE embedding MATCH ? AND k = 10 AND exact = 1", (QB,)).fetchone()
    d = sorted(ints.distances(Q))
    assert (far, near) == (pytest.approx(d[9], rel=1e-5), pytest.approx(d[0], rel=1e-4))
    assert t.execute("SELECT min(distance) FROM t WHERE embedding MATCH ? AND k = 10", (QB,)).fetchone()[0] == near
    assert t.execute("SELECT max(distance) FROM t WHERE embedding MATCH ? AND k = 10", (QB,)).fetchone()[0] == far


def test_limit_and_offset(t, ints):
    want = ints.nearest(Q, 400)
    same_ranking(ints, Q, column(t, "SELECT id FROM t(?) WHERE exact = 1 ORDER BY distance LIMIT 10 OFFSET 25", QB), want[25:35])
    same_ranking(ints, Q, column(t, "SELECT id FROM t(?) WHERE exact = 1 ORDER BY distance LIMIT 20 OFFSET 380", QB), want[380:])
    assert column(t, "SELECT id FROM t(?, 5) ORDER BY distance LIMIT 10 OFFSET 3", QB) == want[3:5]
    assert column(t, "SELECT id FROM t(?, 5) LIMIT 0", QB) == []
    same_ranking(ints, Q, column(t, "SELECT id FROM t(?) WHERE exact = 1 ORDER BY distance DESC LIMIT 3", QB), ints.nearest(Q, N)[:-4:-1])


def test_complete_stream(t, ints):
    """Without k every row comes once, ascending where order was asked for but for the few that early searches missed."""
    d = ints.distances(Q)
    for sql in ("WHERE exact = 1 ORDER BY distance", "WHERE exact = 1", "", "ORDER BY distance", "WHERE nprobe = 1 AND refine = 1 ORDER BY distance"):
        got = t.execute("SELECT id, distance FROM t(?) " + sql, (QB,)).fetchall()
        assert len(got) == N and {r[0] for r in got} == set(ints.ids), sql
        falls = sum(a[1] > b[1] for a, b in zip(got, got[1:]))
        assert falls <= (0 if "exact" in sql else 1), sql
        assert [r[1] for r in got[:16]] == sorted(r[1] for r in got[:16]), sql
        np.testing.assert_allclose([r[1] for r in got], [d[ints.at[r[0]]] for r in got], rtol=1e-4, atol=1e-4)


def test_complete_stream_of_equal_distances(db, make_shard):
    """All cosine distances are 0 or 2 in one dimension: early searches can only guess which of the equal rows come first."""
    x = np.random.default_rng(SEED).normal(size=(5000, 1)).astype("<f4")
    s = make_shard("line", x, metric="cosine")
    declare(db, s)
    for sql in ("", "ORDER BY distance", "WHERE nprobe = 1 ORDER BY distance"):
        got = db.execute("SELECT id, distance FROM t('[1]') " + sql).fetchall()
        assert len(got) == 5000 and {r[0] for r in got} == set(range(5000)), sql
    different = sorted({r[1] for r in got})  # rounding leaves a few more than two; equal ones meet wherever they came from
    assert column(db, "SELECT DISTINCT distance FROM t('[1]') ORDER BY distance") == different
    assert column(db, "SELECT distance FROM t('[1]') GROUP BY distance") == different


def test_a_condition_kept_by_sqlite_finds_its_only_row(t, ints):
    """However roughly the first batches search, the row is not passed over for good."""
    for i in ints.nearest(Q, 60) + ints.ids[::997]:
        for more in ("", "AND nprobe = 1 AND refine = 0"):
            got = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND +id = ? %s ORDER BY distance LIMIT 1" % more, QB, i)
            assert got == [i], more


def test_a_stream_ends_when_a_filter_leaves_few_rows(t):
    """Fewer rows than asked for: every partition was looked at, and nothing is searched again by brute force."""
    got = t.execute("SELECT id FROM t WHERE embedding MATCH ? AND note = 'note 7' AND kind = 'Kind3' ORDER BY distance LIMIT 30", (QB,)).fetchall()
    want = t.execute("SELECT id FROM plain WHERE note = 'note 7' AND kind = 'Kind3' ORDER BY d").fetchall()
    assert got == want != []
    rows = t.execute("SELECT rows FROM shard_trace WHERE phase = 'scan'").fetchone()[0]
    assert rows <= N


def test_stream_reads_no_more_than_it_must(t):
    """LIMIT 10 must not rank the whole shard: it costs far less than a complete pull."""
    def steps(sql):
        count = [0]
        t.set_progress_handler(lambda: count.__setitem__(0, count[0] + 1), 1)
        t.execute(sql, (QB,)).fetchall()
        t.set_progress_handler(None, 0)
        return count[0]
    assert steps("SELECT id FROM t(?) ORDER BY distance LIMIT 10") * 50 < steps("SELECT id FROM t(?) ORDER BY distance")


# What SQLite keeps to itself.
KEPT = ["kind = 'Kind3' OR length > 70", "NOT (length BETWEEN -20 AND 60)", "kind NOT IN ('Kind1', 'Kind2', 'Kind3')", "length + 1 = 20",
        "length % 10 = 3 AND kind = 'Kind5'", "abs(score) > 100 OR note = 'note 7'", "EXISTS(SELECT 1 FROM plain p WHERE p.id = t.id AND p.length = 4)",
        "score IS NULL OR note LIKE '%9'", "kind = 'kind4' COLLATE NOCASE", "kind COLLATE NOCASE IN ('kind4', 'KIND5')", "length > score",
        "CASE WHEN length > 0 THEN kind = 'Kind3' ELSE note = 'note 5' END", "kind || note = 'Kind0note 11'", "substr(kind, 5) = '4'", "+length = 7",
        "(kind, length) = ('Kind3', 4)", "NOT kind GLOB 'Kind[0-8]'", "length NOT BETWEEN 0 AND 79", "note NOT LIKE 'note 1%'", "id % 100 = 0",
        "kind LIKE 'Kind1' ESCAPE '\\'", "score LIKE '12.%'", "score GLOB '1*'"]


@pytest.mark.parametrize("where", KEPT)
def test_conditions_kept_by_sqlite_stream(t, ints, where):
    plain = where.replace("t.id", "plain.id")
    want = column(t, "SELECT id FROM plain WHERE %s ORDER BY d, id LIMIT 12" % plain)
    assert want
    got = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND exact = 1 AND (%s) ORDER BY distance LIMIT 12" % where, QB)
    same_ranking(ints, Q, got, want)
    near = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND (%s) ORDER BY distance LIMIT 12" % where, QB)
    assert len(near) == len(set(near)) and len(near) >= .9 * len(want) and len(set(near) & set(want)) >= .8 * len(want)


# ---- filters before the top k ----

FILTERS = [
    "length = 7", "length == '7'", "length = 7.0", "length = 'seven'", "length <> 7", "length < -18", "length <= -18", "length > 77", "length >= 77.5",
    "length > '77'", "length < 'a'", "length > 'a'", "length > x'00'", "length < x'00'", "length = 3 AND kind = 'Kind3'", "length = NULL", "length <> NULL",
    "length > NULL", "length IS NULL", "length IS NOT NULL", "length IS 9", "length IS NOT 9", "length BETWEEN 3 AND 4", "length BETWEEN 4 AND 3",
    "length IN (1, 2, 3)", "length IN ('1', 2.0, NULL, 'x')", "length IN ()", "length IN (SELECT length FROM plain WHERE id < -590)",
    "length IN (SELECT '5')", "length = 5 OR length = 9", "length = 9223372036854775807", "length < 1e300", "length > -1e300", "length IN (SELECT NULL)",
    "score IS NULL", "score IS NOT NULL", "score = 12.5", "score = '12.5'", "score < 0.5", "score >= 124", "score <> 12.5", "score IS 12.5", "score IS NOT 12.5",
    "score IS NOT NULL AND score < 1", "score BETWEEN 10 AND 10.5", "score IN (1, 2, 2.5)", "score IN (NULL)", "score > 'a'",
    "kind = 'Kind3'", "kind = 'kind3'", "kind <> 'Kind3'", "kind < 'Kind1'", "kind <= 'Kind1'", "kind > 'Kind8'", "kind >= 'Kind9'", "kind > 5", "kind < 5",
    "kind < x'00'", "kind = x'4b696e6433'", "kind IS 'Kind10'", "kind IS NOT 'Kind10'", "kind IS NULL", "kind BETWEEN 'Kind1' AND 'Kind2'",
    "kind IN ('Kind1', 'Kind4', '')", "kind IN (SELECT 'Kind' || (length % 3) FROM plain)", "kind LIKE 'kIND1%'", "kind LIKE '%1_'", "kind LIKE NULL",
    "kind GLOB 'Kind[1-3]'", "kind GLOB 'kind*'", "kind = 'Kind1' OR kind = 'Kind2' OR kind = 'Kind9'", 
    "note = 'note 7'", "note > 'note 98'", "note LIKE '%77'", "note GLOB '*[5]5'", "note IN ('note 1', 'note 2')", "note IS NOT NULL AND note < 'note 10'",
    "note = 'note 7' AND length > 10", "note LIKE 'note 2%' AND kind = 'Kind2' AND score IS NOT NULL AND length < 50",
    "length LIKE '1%'", "length GLOB '[34]*'", "length LIKE '-%'", "length LIKE 5", "id LIKE '3_0'",
    "code = '07'", "code = 7", "code IN (7, 8)", "code > 30", "code = 7.0", "code = 12 AND length > 0",
    "id = 300", "id = '300'", "id = 300.0", "id = 300.5", "id = 'x'", "id IN (0, 3, 6, 7, NULL, '9')", "id IN (SELECT id FROM plain WHERE length = 7)", "id < -580",
    "id > 17000 AND id <= 17100", "id BETWEEN 0 AND 100", "id IS 30", "id IS NOT 30", "id IS NULL", "id <> 30", "id = 30 OR id = 33", "rowid = 30",
]


@pytest.mark.parametrize("where", FILTERS)
def test_filters_before_top_k(t, ints, where):
    want = column(t, "SELECT id FROM plain WHERE %s ORDER BY d, id LIMIT 15" % where.replace("rowid", "id"))
    got = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 15 AND exact = 1 AND (%s)" % where, QB)
    same_ranking(ints, Q, got, want)
    same_ranking(ints, Q, column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 15 AND nprobe = 40 AND refine = 1000 AND (%s)" % where, QB), want)
    one = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 15 AND nprobe = 1 AND (%s)" % where, QB)
    assert len(one) == len(set(one)) == len(want)  # never fewer while others satisfy it, though only one partition was asked for
    allowed = set(column(t, "SELECT id FROM plain WHERE " + where.replace("rowid", "id")))
    assert set(one) <= allowed
    assert set(column(t, "SELECT id FROM t WHERE " + where)) == allowed  # and the same rows without a query


def test_bound_values_take_the_columns_affinity(t):
    for where, value in [("length = ?", "7"), ("length = ?", 7.0), ("id = ?", "300"), ("code = ?", 12), ("kind = ?", b"Kind3"), ("score < ?", "1")]:
        want = t.execute("SELECT count(*) FROM plain WHERE " + where, (value,)).fetchone()
        assert t.execute("SELECT count(*) FROM t WHERE embedding MATCH ? AND k = 6000 AND " + where, (QB, value)).fetchone() == want, (where, value)


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16le", "UTF-16be"])
def test_encodings_of_the_host_database(db, make_shard, encoding):
    """SQLite orders the texts of a UTF-16 database by their UTF-16 bytes."""
    names = ["a", "Z", "Ā", "é", "\U0001f600", "\uff5e", ""] * 3
    s = make_shard("names", clustered(21, 4, SEED), columns={"name": names})
    db.execute("PRAGMA encoding = '%s'" % encoding)
    declare(db, s)
    db.execute("CREATE TABLE plain(id INTEGER, name TEXT)")
    db.executemany("INSERT INTO plain VALUES(?,?)", enumerate(names))
    for op in ("=", "<>", "<", "<=", ">", ">=", "LIKE", "GLOB", "IS", "IN"):
        for value in set(names):
            want = column(db, "SELECT id FROM plain WHERE name %s (?) ORDER BY id" % op, value)
            assert sorted(column(db, "SELECT id FROM t WHERE embedding MATCH '[1,2,3,4]' AND k = 99 AND name %s (?)" % op, value)) == want, (op, value)


def test_text_ids_as_filters(db, texts):
    declare(db, texts)
    q = texts.x[3]
    for where, keep in [("id < 'p050'", lambda i: i < "p050"), ("id IN ('p001', 'p399', 'q')", lambda i: i in ("p001", "p399")),
                        ("id GLOB 'p?0?'", lambda i: i[2] == "0"), ("id LIKE 'P_1%'", lambda i: i[2] == "1"), ("id = 7", lambda i: False),
                        ("organism = 'é2'", lambda i: texts.value("organism", texts.at[i]) == "é2")]:
        got = column(db, "SELECT id FROM t WHERE embedding MATCH ? AND k = 30 AND " + where, blob(q))
        same_ranking(texts, q, got, texts.nearest(q, 30, lambda n: keep(texts.ids[n])))


def test_distance_bounds(t, ints):
    d = np.sort(ints.distances(Q))
    for bound in (0, float(d[3] + d[4]) / 2, float(d[200] + d[201]) / 2, 1e9):
        n = int((d < bound).sum())
        for op in ("<", "<="):
            assert len(column(t, "SELECT id FROM t WHERE embedding MATCH ? AND exact = 1 AND distance %s ?" % op, QB, bound)) == n
            assert len(column(t, "SELECT id FROM t WHERE embedding MATCH ? AND exact = 1 AND k = 50 AND distance %s ?" % op, QB, bound)) == min(n, 50)
            ordered = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND distance %s ? ORDER BY distance LIMIT 50" % op, QB, bound)
            assert len(ordered) <= min(n, 50) and len(ordered) >= .9 * min(n, 50)
        got = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND exact = 1 AND distance > ? ORDER BY distance LIMIT 5", QB, bound)
        same_ranking(ints, Q, got, ints.nearest(Q, N)[n:n + 5])
    at = t.execute("SELECT distance FROM t(?, 1)", (QB,)).fetchone()[0]
    assert column(t, "SELECT count(*) FROM t(?) WHERE distance < ?", QB, at) == [0]
    assert column(t, "SELECT count(*) FROM t(?) WHERE distance <= ?", QB, at) == [1]
    assert column(t, "SELECT count(*) FROM t(?) WHERE distance < 'text'", QB) == [N]  # a number lies below any text
    assert column(t, "SELECT count(*) FROM t(?) WHERE distance < '1' AND exact = 1", QB) == [int((d < 1).sum())]  # numeric affinity
    assert column(t, "SELECT count(*) FROM t(?) WHERE distance < NULL", QB) == [0]


def test_named_ids_beyond_a_distance(t, ints):
    """A lower bound holds before k is cut, also where the rows are looked up by id."""
    ids = ints.nearest(Q, 12)
    d = [r[0] for r in t.execute("SELECT distance FROM t(?, 12) WHERE exact = 1", (QB,))]
    for op, first in ((">", 6), (">=", 5)):
        for k in (1, 3, 99):
            got = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND id IN (%s) AND distance %s ? AND k = ?" % (",".join(map(str, ids)), op), QB, d[5], k)
            assert got == ids[first:first + k]
    assert column(t, "SELECT id FROM t WHERE embedding MATCH ? AND id IN (?, ?) AND distance > ? AND distance < ? AND k = 1", QB, ids[0], ids[4], d[1], d[6]) == [ids[4]]


def test_pages_by_distance(t, ints):
    """k rows beyond a distance: the bound holds before k is cut."""
    want = ints.nearest(Q, N)
    d = t.execute("SELECT id, distance FROM t(?) WHERE exact = 1 ORDER BY distance", (QB,)).fetchall()
    for more in ("AND exact = 1", "AND nprobe = 40 AND refine = 1000", "AND exact = 1 ORDER BY distance"):
        for at in (9, 700, 3000, N - 4):
            for op, first in ((">", at + 1), (">=", at)):
                got = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 10 AND distance %s ? %s" % (op, more), QB, d[at][1])
                same_ranking(ints, Q, got, want[first:first + 10])
    got = column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 10 AND distance > ? AND distance <= ?", QB, d[9][1], d[14][1])
    assert set(got) <= set(want[10:15]) and len(got) >= 4
    for at in (9, 450, 700, 3000):  # approximate: k rows, ascending, whatever the depth
        got = t.execute("SELECT distance FROM t WHERE embedding MATCH ? AND k = 100 AND distance > ? ORDER BY distance", (QB, d[at][1])).fetchall()
        assert len(got) == 100 and got == sorted(got) and got[0][0] > d[at][1]
    assert column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 10 AND distance > 1e300", QB) == []
    assert len(column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 10 AND distance > -1e300", QB)) == 10
    assert len(column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 10 AND distance >= -9e999", QB)) == 10
    assert column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 0 AND distance > 1", QB) == []


# ---- joins and shapes of statements ----

@pytest.fixture
def queries(t, ints):
    t.execute("CREATE TABLE queries(name TEXT, e BLOB, n INTEGER)")
    t.executemany("INSERT INTO queries VALUES(?,?,?)", [("q%d" % i, blob(ints.x[i * 50]), i) for i in range(6)] + [("none", None, 2)])
    return t


def test_k_holds_per_outer_row(queries, ints):
    got = queries.execute("SELECT q.name, t.id FROM queries q JOIN t ON t.embedding MATCH q.e AND t.k = 4 AND t.exact = 1 ORDER BY q.rowid, distance").fetchall()
    assert got == [("q%d" % i, r) for i in range(6) for r in ints.nearest(ints.x[i * 50], 4)]
    assert queries.execute("SELECT q.name, t.id FROM queries q, t(q.e, 4) ORDER BY q.rowid, distance").fetchall() == got
    assert queries.execute("SELECT q.name, t.id FROM t, queries q WHERE t.embedding MATCH q.e AND k = 4 ORDER BY q.rowid, distance").fetchall() == got
    for op in ("=", "IS"):
        counts = queries.execute("SELECT q.name, count(t.id) FROM queries q JOIN t ON t.embedding MATCH q.e AND t.k %s q.n GROUP BY q.name" % op).fetchall()
        assert counts == [("q%d" % i, i) for i in range(1, 6)]  # k from the outer row
    fails(queries, "SELECT count(*) FROM queries q JOIN t ON t.embedding MATCH q.e AND t.k < q.n", says="k takes only")
    fails(queries, "SELECT count(*) FROM queries q JOIN t ON t.k = q.n", says="k needs a query")


def test_left_join_and_conditions_on_both_sides(queries):
    got = dict(queries.execute("SELECT q.name, count(t.id) FROM queries q LEFT JOIN t ON t.embedding MATCH q.e AND t.k = 3 GROUP BY q.name"))
    assert got == {**{"q%d" % i: 3 for i in range(6)}, "none": 0}
    got = queries.execute("SELECT q.n, t.length FROM queries q JOIN t ON t.embedding MATCH q.e AND t.length = q.n AND t.k = 3").fetchall()
    assert len(got) == 18 and all(a == b for a, b in got)
    got = queries.execute("SELECT t.id, p.kind = t.kind AND p.length = t.length FROM t JOIN plain p ON p.id = t.id WHERE t.embedding MATCH ? AND k = 9", (QB,)).fetchall()
    assert len(got) == 9 and all(r[1] for r in got)


def test_self_join(t, ints):
    got = t.execute("SELECT b.id FROM t a JOIN t b ON b.embedding MATCH a.embedding AND b.k = 3 WHERE a.id = ?", (ints.ids[40],)).fetchall()
    assert [r[0] for r in got] == ints.nearest(ints.x[40], 3)
    two = t.execute("SELECT a.id, b.id FROM t a, t b WHERE a.embedding MATCH ?1 AND a.k = 5 AND b.embedding MATCH ?1 AND b.k = 5 AND a.id = b.id", (QB,)).fetchall()
    assert sorted(two) == sorted((i, i) for i in ints.nearest(Q, 5))


def test_materialized_cte_fixes_the_search_first(t, ints):
    want = [i for i in ints.nearest(Q, 20) if ints.value("length", ints.at[i]) > 30]
    sql = "WITH hits AS MATERIALIZED (SELECT id, length, distance FROM t WHERE embedding MATCH ? AND k = 20) SELECT id FROM hits WHERE length > 30 ORDER BY distance"
    assert 0 < len(want) < 20
    same_ranking(ints, Q, column(t, sql, QB), want)
    assert len(column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = 20 AND length > 30", QB)) == 20


def test_other_shapes(queries, ints):
    db, want = queries, ints.nearest(Q, 5)
    assert column(db, "SELECT id FROM (SELECT id, distance FROM t(?, 5)) ORDER BY distance", QB) == want
    assert column(db, "SELECT id FROM t(?1, 5) UNION SELECT id FROM t(?1, 3)", QB) == sorted(want)
    assert column(db, "SELECT id FROM t(?1, 5) EXCEPT SELECT id FROM t(?1, 3)", QB) == sorted(want[3:])
    assert len(column(db, "SELECT id FROM t(?1, 5) UNION ALL SELECT id FROM t(?1, 3)", QB)) == 8
    assert column(db, "SELECT (SELECT id FROM t WHERE embedding MATCH q.e AND k = 1) FROM queries q") == [ints.ids[i * 50] for i in range(6)] + [None]
    assert column(db, "SELECT name FROM queries q WHERE EXISTS (SELECT 1 FROM t(q.e, 1) WHERE distance < 0.001)") == ["q%d" % i for i in range(6)]
    assert column(db, "SELECT kind FROM plain WHERE id IN (SELECT id FROM t(?, 1))", QB) == [ints.value("kind", ints.at[want[0]])]
    grouped = db.execute("SELECT kind, count(*) FROM t(?, 500) GROUP BY kind", (QB,)).fetchall()
    assert sum(r[1] for r in grouped) == 500 and [r[0] for r in grouped] == sorted(r[0] for r in grouped)
    assert len(column(db, "SELECT DISTINCT kind FROM t(?, 500)", QB)) == len(grouped)
    assert column(db, "SELECT DISTINCT distance FROM t(?, 5) ORDER BY distance", QB) == sorted(column(db, "SELECT distance FROM t(?, 5)", QB))
    ranks = db.execute("SELECT id, row_number() OVER (ORDER BY distance) FROM t(?, 5) ORDER BY 2", (QB,)).fetchall()
    assert ranks == list(zip(want, range(1, 6)))
    two = column(db, "SELECT id FROM t WHERE (embedding MATCH ?1 AND k = 5) OR (embedding MATCH ?2 AND k = 5)", QB, blob(ints.x[900]))
    assert sorted(two) == sorted(set(want) | set(ints.nearest(ints.x[900], 5)))
    either = column(db, "SELECT id FROM t WHERE embedding MATCH ? AND k = 10 AND exact = 1 AND (length = 5 OR length = 6)", QB)
    assert either == ints.nearest(Q, 10, lambda n: ints.value("length", n) in (5, 6))
    db.execute("CREATE TABLE found AS SELECT id, distance FROM t(?, 5)", (QB,))
    assert column(db, "SELECT id FROM found ORDER BY distance") == want


def test_several_cursors_at_once(t, ints):
    a = t.execute("SELECT id FROM t(?) WHERE exact = 1 ORDER BY distance", (QB,))
    b = t.execute("SELECT id FROM t(?) WHERE exact = 1 ORDER BY distance", (blob(ints.x[8]),))
    got = [(a.fetchone()[0], b.fetchone()[0]) for _ in range(100)]
    same_ranking(ints, Q, [x for x, _ in got], ints.nearest(Q, 100))
    same_ranking(ints, ints.x[8], [y for _, y in got], ints.nearest(ints.x[8], 100))


def test_statement_used_again(t, ints):
    """One prepared statement, rebound: nothing of the search before remains."""
    for row in (1, 2, 1):
        for k in (3, 0, 7):
            assert column(t, "SELECT id FROM t WHERE embedding MATCH ? AND k = ? AND exact = 1", blob(ints.x[row]), k) == ints.nearest(ints.x[row], k)


def test_plans(t):
    def plan(sql):
        return " | ".join(r[3] for r in t.execute("EXPLAIN QUERY PLAN " + sql, {"q": QB}))
    assert "TEMP B-TREE" not in plan("SELECT id FROM t WHERE embedding MATCH :q ORDER BY distance LIMIT 10")
    assert "TEMP B-TREE FOR ORDER BY" in plan("SELECT id FROM t WHERE embedding MATCH :q ORDER BY distance DESC LIMIT 10")
    assert "TEMP B-TREE FOR ORDER BY" in plan("SELECT id FROM t WHERE embedding MATCH :q ORDER BY length LIMIT 10")
    many = plan("SELECT id FROM t WHERE embedding MATCH :q AND k = 5 AND (kind = 'a' OR kind = 'b' OR length > 5)")
    assert "MULTI-INDEX OR" not in many and many.count("VIRTUAL TABLE") == 1
    assert plan("SELECT id FROM t WHERE embedding MATCH :q AND k = 5 AND kind IN ('a', 'b')").count("VIRTUAL TABLE") == 1
    for more in ("", " AND p.length = 3", " ORDER BY distance"):  # the search comes first: it runs once
        assert plan("SELECT p.id FROM plain p JOIN t ON t.id = p.id WHERE t.embedding MATCH :q AND t.k = 5" + more).startswith("SCAN t VIRTUAL")
    assert plan("SELECT id FROM t WHERE embedding MATCH :q AND k = 5 AND (id = 3 OR rowid = 4)").count("VIRTUAL TABLE") == 1
    lookup = plan("SELECT t.id FROM plain p JOIN t ON t.id = p.id")
    assert lookup.index("SCAN p") < lookup.index("SCAN t")


def test_views_and_triggers(t, ints):
    t.execute("CREATE VIEW near AS SELECT id, distance FROM t WHERE embedding MATCH (SELECT e FROM wanted) AND k = 5")
    t.execute("CREATE TABLE wanted(e BLOB)")
    t.execute("CREATE TABLE log(id INTEGER, kind TEXT)")
    t.execute("CREATE TRIGGER tr AFTER INSERT ON wanted BEGIN INSERT INTO log SELECT id, kind FROM t WHERE embedding MATCH new.e AND k = 2; END")
    t.execute("INSERT INTO wanted VALUES(?)", (QB,))
    assert column(t, "SELECT id FROM near ORDER BY distance") == ints.nearest(Q, 5)
    assert column(t, "SELECT id FROM log") == ints.nearest(Q, 2)
    assert column(t, "SELECT kind FROM log") == [ints.value("kind", ints.at[i]) for i in ints.nearest(Q, 2)]


# ---- look-ups, scans, values ----

def test_point_lookup(t, db, texts, ints):
    for n in (0, 1, 999, N - 1):
        row = t.execute("SELECT id, kind, length, score, note, embedding FROM t WHERE id = ?", (ints.ids[n],)).fetchone()
        assert row == (ints.ids[n], *[ints.value(c, n) for c in ("kind", "length", "score", "note")], ints.x[n].tobytes())
        assert t.execute("SELECT rowid, note FROM t WHERE rowid = ?", (ints.ids[n],)).fetchone() == (ints.ids[n], row[4])
    for missing in (1, "x", None, 0.5, b"\0", 2**62, -2**63, 9.3e18):
        assert t.execute("SELECT id FROM t WHERE id = ?", (missing,)).fetchall() == [], missing
    assert column(t, "SELECT id FROM t WHERE id IN (0, 3, 4, 6)") == [0, 3, 6]
    declare(db, texts, "u")
    assert db.execute("SELECT id, organism FROM u WHERE id = 'p007'").fetchone() == ("p007", texts.value("organism", texts.at["p007"]))
    assert db.execute("SELECT id FROM u WHERE id IN ('P007', '', 'p', 'p0070')").fetchall() == []
    assert column(db, "SELECT id FROM u WHERE id = 'P007' COLLATE NOCASE") == ["p007"]
    rows = db.execute("SELECT rowid, id FROM u").fetchall()
    assert len({r[0] for r in rows}) == 400
    assert all(db.execute("SELECT id FROM u WHERE rowid = ?", (r,)).fetchone() == (i,) for r, i in rows[::37])
    assert db.execute("SELECT id FROM u WHERE rowid IN (-1, 400, 4294967296, 9223372036854775807, 'x')").fetchall() == []
    found = db.execute("SELECT rowid, id FROM u(?, 3)", (blob(texts.x[0]),)).fetchall()
    assert all((r, i) in rows for r, i in found)


def test_lookup_reads_one_row(t):
    plan = [r[3] for r in t.execute("EXPLAIN QUERY PLAN SELECT * FROM t WHERE id = 3")]
    scan = [r[3] for r in t.execute("EXPLAIN QUERY PLAN SELECT * FROM t")]
    assert plan != scan and "INDEX 1:" in plan[0]


def test_full_scan(t, ints):
    rows = t.execute("SELECT id, kind, length, score, note, code, embedding, distance FROM t").fetchall()
    assert len(rows) == N
    for r in rows:
        n = ints.at[r[0]]
        assert r[1:6] == tuple(ints.value(c, n) for c in ints.columns) and r[6] == ints.x[n].tobytes() and r[7] is None
    assert t.execute("SELECT count(*), count(score), min(length), sum(length) FROM t").fetchone() == \
        t.execute("SELECT count(*), count(score), min(length), sum(length) FROM plain").fetchone()
    assert t.execute("SELECT typeof(id), typeof(kind), typeof(length), typeof(score), typeof(note), typeof(embedding) FROM t WHERE id = 0").fetchone() == \
        ("integer", "text", "integer", "null", "text", "blob")
    assert t.execute("SELECT typeof(score) FROM t WHERE id = 3").fetchone() == ("real",)


def test_embedding_is_what_was_stored(db, tmp_path):
    x = np.array([[1.1, -0.0, 3e-40, 1e17], [0.1, 1e-7, -5, 65504]], dtype="<f4")
    s = build_shard(tmp_path / "s", x)
    declare(db, s)
    assert column(db, "SELECT embedding FROM t ORDER BY id") == [v.tobytes() for v in x]
    assert column(db, "SELECT embedding FROM t(?, 1)", blob(x[1])) == [x[1].tobytes()]


# ---- life in a host database ----

@pytest.fixture
def home(tmp_path, ints):
    """A folder with app.db and its shard in shards/a, named by a relative path."""
    home = tmp_path / "home"
    shutil.copytree(ints.path, home / "shards" / "a")
    db = connect(home / "app.db")
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='shards/a')")
    db.close()
    return home


def test_reopen_and_move(home, tmp_path, ints):
    os.rename(home, tmp_path / "moved")
    db = connect(tmp_path / "moved" / "app.db")
    assert column(db, "SELECT id FROM t(?, 3)", QB) == ints.nearest(Q, 3)
    db.close()


def test_shard_gone(home):
    db = connect(home / "app.db")
    shutil.rmtree(home / "shards")
    assert [r[1] for r in db.execute("PRAGMA table_list") if r[1].startswith("t")] != []
    assert len(db.execute("PRAGMA table_info(t)").fetchall()) == 7
    fails(db, "SELECT * FROM t(?, 3)", QB, says="is not a shard")
    fails(db, "SELECT count(*) FROM t", says=str(home / "shards" / "a"))
    db.execute("DROP TABLE t")
    assert column(db, "SELECT name FROM sqlite_schema") == []
    db.close()


def test_drop_leaves_the_shard(home, ints):
    db = connect(home / "app.db")
    before = sorted(os.listdir(home / "shards" / "a"))
    db.execute("SELECT * FROM t(?, 1)", (QB,)).fetchall()
    db.execute("DROP TABLE t")
    assert column(db, "SELECT name FROM sqlite_schema") == [] and sorted(os.listdir(home / "shards" / "a")) == before
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='shards/a')")
    assert column(db, "SELECT id FROM t(?, 3)", QB) == ints.nearest(Q, 3)
    db.close()


def test_rename(home, ints):
    db = connect(home / "app.db")
    db.execute("ALTER TABLE t RENAME TO \"new name\"")
    assert sorted(column(db, "SELECT name FROM sqlite_schema WHERE sql NOT NULL")) == ["new name", "new name_config"]
    assert column(db, "SELECT id FROM \"new name\"(?, 3)", QB) == ints.nearest(Q, 3)
    assert column(db, "SELECT id FROM \"new name\" WHERE \"new name\" = ? AND k = 3", QB) == ints.nearest(Q, 3)
    assert column(db, "SELECT id FROM shard_union('new name', ?, 3)", QB) == ints.nearest(Q, 3)
    fails(db, "SELECT id FROM shard_union('t', ?, 3)", QB, says="t is not a vecshard table")
    db.close()
    db = connect(home / "app.db")
    assert column(db, "SELECT id FROM \"new name\"(?, 3)", QB) == ints.nearest(Q, 3)
    db.close()


@pytest.fixture
def beside(tmp_path, ints):
    """A folder with app.db, whose table t has its shard at the default path."""
    shutil.copytree(ints.path, tmp_path / "app.db.vecshard" / "t")
    db = connect(tmp_path / "app.db")
    db.execute("CREATE VIRTUAL TABLE t USING vecshard")
    db.close()
    return tmp_path


def test_rename_keeps_the_default_path(beside, ints):
    want = ints.nearest(Q, 3)
    db = connect(beside / "app.db")
    db.execute("BEGIN")
    db.execute("ALTER TABLE t RENAME TO never")
    db.execute("ROLLBACK")
    assert column(db, "SELECT id FROM t(?, 3)", QB) == want
    for name in ("\"it's new\"", "u", "t", "v"):
        old = column(db, "SELECT name FROM sqlite_schema WHERE sql LIKE 'CREATE VIRTUAL%'")[0]
        db.execute('ALTER TABLE "%s" RENAME TO %s' % (old, name))
        assert column(db, "SELECT id FROM %s(?, 3)" % name, QB) == want
        db.close()
        db = connect(beside / "app.db")  # renamed before it was ever opened, too
        db.execute("PRAGMA trusted_schema = OFF")
        if name != "u":
            assert column(db, "SELECT id FROM %s(?, 3)" % name, QB) == want
    db.close()
    for end in ("", ".vecshard"):  # the folder still goes with the database file's name
        os.rename(str(beside / "app.db") + end, str(beside / "other.db") + end)
    db = connect(beside / "other.db")
    assert column(db, "SELECT id FROM v(?, 3)", QB) == want
    db.execute("DROP TABLE v")
    assert column(db, "SELECT name FROM sqlite_schema") == []
    db.close()


def test_default_path_left_behind(beside, ints):
    """A copy of the database file alone says what else to copy; in memory it can at least be dropped."""
    db = connect(beside / "app.db")
    db.execute("VACUUM INTO '%s'" % (beside / "copy.db"))
    memory = connect()
    db.backup(memory)
    db.close()
    copy = connect(beside / "copy.db")
    for _ in range(2):
        with pytest.raises(sqlite3.Error) as e:
            copy.execute("SELECT * FROM t").fetchall()
        assert all(w in str(e.value) for w in ("copy.db.vecshard/t", "copy or move the folder", "path="))
    shutil.copytree(beside / "app.db.vecshard", beside / "copy.db.vecshard")
    assert column(copy, "SELECT id FROM t(?, 3)", QB) == ints.nearest(Q, 3)
    copy.close()
    fails(memory, "SELECT * FROM t", says="in memory needs a path")
    memory.execute("DROP TABLE t")
    assert column(memory, "SELECT name FROM sqlite_schema") == []
    fails(connect(beside / "new.db"), "CREATE VIRTUAL TABLE t USING vecshard()", says="path=")


def test_a_name_leads_nowhere_else(tmp_path, ints):
    """With trusted_schema off the default path is trusted for plain names only: a name can hold dots and slashes."""
    shutil.copytree(ints.path, tmp_path / "elsewhere")
    os.mkdir(tmp_path / "app.db.vecshard")
    db = connect(tmp_path / "app.db")
    db.execute("CREATE VIRTUAL TABLE \"../elsewhere\" USING vecshard")
    assert db.execute("SELECT count(*) FROM \"../elsewhere\"").fetchone() == (N,)
    db.close()
    db = connect(tmp_path / "app.db")
    db.execute("PRAGMA trusted_schema = OFF")
    fails(db, "SELECT count(*) FROM \"../elsewhere\"", says="trusted_schema is off")
    db.close()


def test_rollback(home, ints):
    db = connect(home / "app.db")
    db.execute("BEGIN")
    db.execute("CREATE VIRTUAL TABLE u USING vecshard(path='shards/a')")
    db.execute("ALTER TABLE t RENAME TO v")
    assert len(column(db, "SELECT id FROM u(?, 3)", QB)) == len(column(db, "SELECT id FROM v(?, 3)", QB)) == 3
    db.execute("ROLLBACK")
    fails(db, "SELECT * FROM u", says="no such table")
    fails(db, "SELECT id FROM shard_union('u', ?, 3)", QB, says="not a vecshard table")
    assert column(db, "SELECT id FROM t(?, 3)", QB) == ints.nearest(Q, 3)
    db.execute("BEGIN")
    db.execute("DROP TABLE t")
    db.execute("ROLLBACK")
    assert column(db, "SELECT id FROM t(?, 3)", QB) == ints.nearest(Q, 3)
    db.close()


def test_vacuum_dump_and_backup(home, ints):
    db = connect(home / "app.db")
    db.execute("VACUUM")
    db.execute("VACUUM INTO '%s'" % (home / "copy.db"))
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    other = connect(home / "back.db")
    db.backup(other)
    shell = subprocess.run(["sqlite3", str(home / "app.db"), ".dump"], capture_output=True, text=True).stdout if shutil.which("sqlite3") else None
    db.close(), other.close()
    for name in ("app.db", "copy.db", "back.db"):
        db = connect(home / name)
        assert column(db, "SELECT id FROM t(?, 3)", QB) == ints.nearest(Q, 3), name
        db.close()
    if shell:
        assert "INSERT INTO sqlite_schema" in shell and "t_config" in shell
        db = connect(home / "restored.db")
        db.executescript(shell)
        db.close()
        db = connect(home / "restored.db")
        assert column(db, "SELECT id FROM t(?, 3)", QB) == ints.nearest(Q, 3)
        db.close()


def test_shadow_table_is_protected(home):
    db = connect(home / "app.db")
    assert [r[2] for r in db.execute("PRAGMA table_list") if r[1] == "t_config"] == ["shadow"]
    db.close()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{\"format\":0}", "x" * 1000])
def test_damaged_shadow_table(home, text):
    db = connect(home / "app.db")
    db.execute("UPDATE t_config SET v = ? WHERE k = 'columns'", (text,))
    db.close()
    db = connect(home / "app.db")
    with pytest.raises(sqlite3.Error):
        db.execute("SELECT * FROM t").fetchall()
    db.close()


def test_trusted_schema_off(home, ints, tmp_path):
    db = connect(home / "app.db")
    db.execute("CREATE VIRTUAL TABLE absolute USING vecshard(path='%s')" % ints.path)
    db.execute("CREATE VIRTUAL TABLE upward USING vecshard(path='../home/shards/a')")
    db.execute("CREATE VIRTUAL TABLE many USING shard_union(source='%s')" % ints.path)
    db.close()
    db = connect(home / "app.db")
    for name in ("absolute", "upward", "many"):  # trusted: all work
        assert len(db.execute("SELECT id FROM %s WHERE embedding MATCH ? AND k = 2" % name, (QB,)).fetchall()) == 2, name
    db.close()
    db = connect(home / "app.db")
    db.execute("PRAGMA trusted_schema = OFF")
    assert len(column(db, "SELECT id FROM t(?, 2)", QB)) == 2  # beside the database file
    for name in ("absolute", "upward", "many"):
        fails(db, "SELECT id FROM %s WHERE embedding MATCH ? AND k = 2" % name, QB, says="trusted_schema is off")
    db.execute("SELECT vecshard_config('allow', ?)", (ints.path[:-2],))  # a prefix of the name is no folder
    fails(db, "SELECT count(*) FROM absolute", says="vecshard_config('allow'")
    db.execute("SELECT vecshard_config('allow', ?)", (os.path.dirname(ints.path),))
    assert db.execute("SELECT count(*) FROM absolute").fetchone() == (N,)
    assert len(column(db, "SELECT id FROM many WHERE embedding MATCH ? AND k = 2", QB)) == 2
    fails(db, "SELECT count(*) FROM upward", says="allow', '%s')" % (home / "shards" / "a"))
    db.execute("SELECT vecshard_config('allow', ?)", (str(home) + "/",))
    assert db.execute("SELECT count(*) FROM upward").fetchone() == (N,)
    db.execute("CREATE VIRTUAL TABLE mine USING vecshard(path='%s')" % ints.path)  # what this connection says itself is fine
    assert db.execute("SELECT count(*) FROM mine").fetchone() == (N,)
    db.close()


# ---- versions ----

def add_version_2(path, other):
    """Makes what another shard holds version 2 of the one in `path`: its segment, and a manifest under the next name."""
    with open(os.path.join(other, "manifest-%020d.json" % (2**64 - 2))) as f:
        manifest = json.load(f)
    manifest["version"] = 2
    for segment in manifest["segments"]:
        shutil.copy(os.path.join(other, segment["file"]), path)
    with open(os.path.join(path, "new"), "w") as f:
        json.dump(manifest, f)
    os.rename(os.path.join(path, "new"), os.path.join(path, "manifest-%020d.json" % (2**64 - 3)))


def test_newest_version_and_pin(db, tmp_path):
    x = clustered(300, 8, SEED + 3)
    a, b = build_shard(tmp_path / "a", x[:200]), build_shard(tmp_path / "b", x)
    declare(db, a)
    declare(db, a, "pinned", ", version=1")
    open_cursor = db.execute("SELECT id FROM t(?)", (blob(x[0]),))
    first = open_cursor.fetchone()
    assert db.execute("SELECT count(*) FROM t").fetchone() == (200,)
    fails(db, "CREATE VIRTUAL TABLE later USING vecshard(path='%s', version=2)" % a.path, says="version 2")
    add_version_2(a.path, b.path)
    assert db.execute("SELECT count(*) FROM t").fetchone() == (300,)
    assert db.execute("SELECT count(*) FROM pinned").fetchone() == (200,)
    assert len([first] + open_cursor.fetchall()) == 200  # a statement keeps the version that it began with
    db.execute("CREATE VIRTUAL TABLE later USING vecshard(path='%s', version='2')" % a.path)
    assert db.execute("SELECT count(*) FROM later").fetchone() == (300,)
    assert db.execute("SELECT sum(rows), max(version) FROM shard_info(?)", (a.path,)).fetchone() == (300, 2)
    os.unlink(os.path.join(a.path, "manifest-%020d.json" % (2**64 - 2)))
    other = connect()
    fails(other, "CREATE VIRTUAL TABLE pinned USING vecshard(path='%s', version=1)" % a.path, says="version 1")
    other.close()


def test_other_columns_in_a_newer_version(db, tmp_path):
    """A table whose shard was replaced by one with other columns says so, every time, and recovers when it is created again."""
    x = clustered(50, 8, SEED + 4)
    a = build_shard(tmp_path / "a", x, columns={"kind": ["a"] * 50})
    b = build_shard(tmp_path / "b", x, columns={"size": list(range(50))})
    c = build_shard(tmp_path / "c", x)
    for other in (b, c):
        declare(db, a)
        assert db.execute("SELECT count(*) FROM t WHERE kind = 'a'").fetchone() == (50,)
        add_version_2(a.path, other.path)
        for _ in range(3):
            fails(db, "SELECT kind FROM t WHERE embedding MATCH ? AND k = 3 AND kind = 'a'", blob(x[0]), says="other columns")
            fails(db, "SELECT kind FROM t", says="other columns")
        db.execute("DROP TABLE t")
        declare(db, a)
        assert len(db.execute("SELECT * FROM t(?, 3)", (blob(x[0]),)).fetchall()) == 3
        db.execute("DROP TABLE t")
        os.unlink(os.path.join(a.path, "manifest-%020d.json" % (2**64 - 3)))


# ---- attached and temporary ----

def test_attached_and_temp(tmp_path, ints, texts):
    db = connect(tmp_path / "main.db")
    db.execute("ATTACH ? AS other", (str(tmp_path / "other.db"),))
    shutil.copytree(texts.path, tmp_path / "near")
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % ints.path)
    db.execute("CREATE VIRTUAL TABLE other.t USING vecshard(path='near')")  # relative to other.db
    db.execute("CREATE VIRTUAL TABLE temp.u USING vecshard(path='%s')" % texts.path)
    assert db.execute("SELECT count(*) FROM t").fetchone() == (N,)
    assert db.execute("SELECT count(*) FROM other.t").fetchone() == (400,)
    assert db.execute("SELECT count(*) FROM u").fetchone() == (400,)
    q = blob(texts.x[0])
    assert column(db, "SELECT id FROM other.t WHERE embedding MATCH ? AND k = 2", q) == texts.nearest(texts.x[0], 2)
    assert column(db, "SELECT id FROM shard_union('other.t', ?, 2)", q) == texts.nearest(texts.x[0], 2)
    assert column(db, "SELECT id FROM shard_union('t', ?, 2)", QB) == ints.nearest(Q, 2)  # main before attached, as in SQL
    db.execute("DETACH other")
    fails(db, "SELECT id FROM shard_union('other.t', ?, 2)", q, says="not a vecshard table")
    db.execute("DROP TABLE temp.u")
    assert column(db, "SELECT name FROM sqlite_temp_schema") == []
    db.close()


def test_wal_and_second_connection(home, ints):
    one, two = connect(home / "app.db"), connect(home / "app.db")
    one.execute("PRAGMA journal_mode = WAL")
    one.execute("ALTER TABLE t RENAME TO moved")
    assert column(two, "SELECT id FROM moved(?, 2)", QB) == ints.nearest(Q, 2)
    two.execute("DROP TABLE moved")
    fails(one, "SELECT * FROM moved", says="no such table")
    one.close(), two.close()


def test_interrupt(t):
    t.set_progress_handler(lambda: 1, 100)
    fails(t, "SELECT count(*) FROM t a, t b", says="interrupted")
    t.set_progress_handler(None, 0)
    assert t.execute("SELECT count(*) FROM t(?)", (QB,)).fetchone() == (N,)

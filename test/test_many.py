"""Thousands of results of one search: in order, each once, by every way that they are handed out.

Searches that look at all partitions and refine every row must equal brute force; brute force is checked against NumPy. Whole numbers
as vectors make distances exact, and many of them equal: ties come by id. Data is made here, seed SEED.
"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, blob

SEED = 11
N, DIM, K = 20000, 8, 9000
ALL = " AND nprobe = 1000000 AND refine = 1000000"


def numbers(n, dim, seed, scale=1.5):
    return np.round(np.random.default_rng(seed).normal(size=(n, dim)) * scale).astype("<f4")


@pytest.fixture(scope="module")
def many(make_shard):
    """Three shards of one database, with ids in no order; the first alone has as many rows as the tests want."""
    rng = np.random.default_rng(SEED)
    shards = []
    for s, n in enumerate((N, 3000, 2000)):
        shards.append(make_shard("many/%s" % "abc"[s], numbers(n, DIM, SEED + s), ids=(rng.permutation(n) * 7 + s * 1000000).tolist(),
                                 columns={"length": [i % 50 for i in range(n)]}, options=("--partitions", 60, "--subvectors", 4)))
    return shards


@pytest.fixture
def t(db, many):
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % many[0].path)
    return db


def ranked(shards, q, k):
    """(shard, id, distance) of the k nearest: by distance, ties by shard. Which of the last ties come is the shard's affair."""
    rows = [(float(np.float32(d)), s, i) for s, x in enumerate(shards) for i, d in zip(x.ids, x.distances(q))]
    return sorted(rows)[:k]


def check(got, want):
    """got: (shard, id, distance). The same but for which of the rows at the last distance were taken."""
    last = want[-1][0]
    assert len(got) == len(want)
    assert [r for r in got if r[0] < last] == [r for r in want if r[0] < last]
    assert {r[0] for r in got[-1:]} == {last} and len(set(got)) == len(got)


@pytest.mark.parametrize("more", [" AND exact = 1", ALL], ids=["brute force", "refined"])
def test_order_and_ties(t, many, more):
    for q in numbers(3, DIM, SEED + 9):
        rows = t.execute("SELECT distance, id FROM t WHERE embedding MATCH ? AND k = ?" + more, (blob(q), K)).fetchall()
        check([(d, 0, i) for d, i in rows], ranked(many[:1], q, K))
        assert len({d for d, _ in rows}) < K / 20  # ties there are


@pytest.mark.parametrize("more", [" AND exact = 1", ALL], ids=["brute force", "refined"])
def test_order_over_shards(db, many, more):
    q = numbers(1, DIM, SEED + 9)[0]
    rows = db.execute("SELECT distance, shard, id FROM shard_union WHERE source = ? AND query = ? AND k = 15000" + more,
                      (os.path.dirname(many[0].path), blob(q))).fetchall()
    check([(d, "abc".index(s), i) for d, s, i in rows], ranked(many, q, 15000))


def test_every_column(t, many):
    """Ids, positions, vectors and metadata of the same rows, however a statement asks for them."""
    q, s = numbers(1, DIM, SEED + 9)[0], many[0]
    where = " FROM t WHERE embedding MATCH ? AND k = 5000"
    ids = [r[0] for r in t.execute("SELECT id" + where, (blob(q),))]
    assert len(set(ids)) == 5000
    for columns in ("id, distance", "distance, id", "rowid", "id, embedding", "embedding, id", "length, id", "id, rowid, length"):
        rows = t.execute("SELECT %s%s" % (columns, where), (blob(q),)).fetchall()
        named = [dict(zip(columns.split(", "), r)) for r in rows]
        for i, row in zip(ids, named):
            n = s.at[i]
            assert row.get("id", i) == i and row.get("rowid", i) == i and row.get("length", n % 50) == n % 50
            assert row.get("embedding", s.x[n].tobytes()) == s.x[n].tobytes()
    assert t.execute("SELECT count(*), count(DISTINCT id)" + where, (blob(q),)).fetchone() == (5000, 5000)
    assert [r[0] for r in t.execute("SELECT id FROM shard_union('t', ?, 5000)", (blob(q),))] == ids
    wide = t.execute("SELECT id FROM t WHERE embedding MATCH ? ORDER BY distance LIMIT 5000", (blob(q),)).fetchall()
    assert len({r[0] for r in wide}) == 5000


def test_more_than_are_read_together(db, make_shard):
    """More results than ids are read for at once."""
    n = 70000
    s = make_shard("more", numbers(n, 2, SEED + 20, scale=300), ids=[i * 3 for i in range(n)], options=("--partitions", 20))
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % s.path)
    q = np.array([1, -2], dtype="<f4")
    rows = db.execute("SELECT distance, id FROM t WHERE embedding MATCH ? AND k = ?", (blob(q), n)).fetchall()
    assert [i for _, i in rows] == [i for _, _, i in ranked([s], q, n)]


def test_sketched(db, make_shard):
    s = make_shard("sketched", numbers(9000, 300, SEED + 30), options=("--partitions", 30))
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % s.path)
    q = numbers(1, 300, SEED + 31)[0]
    want = db.execute("SELECT distance, id FROM t WHERE embedding MATCH ? AND k = 4200 AND exact = 1", (blob(q),)).fetchall()
    assert db.execute("SELECT distance, id FROM t WHERE embedding MATCH ? AND k = 4200" + ALL, (blob(q),)).fetchall() == want
    check([(d, 0, i) for d, i in want], ranked([s], q, 4200))


def test_few_of_many(db, make_shard):
    """So large a segment that candidates are put in order by sorting, not by marking them."""
    n = 540000
    s = make_shard("large", np.random.default_rng(SEED + 40).normal(size=(n, 2)).astype("<f4"), options=("--partitions", 100))
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % s.path)
    q = np.array([30, 0], dtype="<f4")
    got = db.execute("SELECT id, distance FROM t WHERE embedding MATCH ? AND k = 4100 AND nprobe = 1000 AND refine = 1", (blob(q),)).fetchall()
    d = s.distances(q)
    assert len({i for i, _ in got}) == 4100 and [r[1] for r in got] == sorted(r[1] for r in got)
    np.testing.assert_allclose([r[1] for r in got], d[[i for i, _ in got]], rtol=1e-5)


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from conftest import connect
db = connect()
q = bytes.fromhex(sys.argv[3])
print(json.dumps(db.execute("SELECT shard, id, distance FROM shard_union(?, ?, 12000)", (sys.argv[2], q)).fetchall()))
"""


@pytest.mark.parametrize("env", [{"VECSHARD_MMAP": "0"}, {"VECSHARD_THREADS": "1"}, {"VECSHARD_THREADS": "7"}], ids=lambda e: "%s=%s" % next(iter(e.items())))
def test_same_rows_however_read(many, env):
    q = blob(numbers(1, DIM, SEED + 9)[0]).hex()
    args = [sys.executable, "-c", CHILD, str(ROOT / "test"), os.path.dirname(many[0].path), q]
    want, got = [json.loads(subprocess.run(args, capture_output=True, text=True, check=True, env={**os.environ, **e}, timeout=120).stdout)
                 for e in ({}, env)]
    assert got == want and len(got) == 12000

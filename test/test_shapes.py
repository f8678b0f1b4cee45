"""Shards of unusual shapes: no rows, one row, sizes around a block of 256, one dimension and thousands, equal rows, lopsided
partitions, extreme options, and k from 0 to 2^63-1.

Under exact = 1 every answer equals brute force in float64: the distances at each rank, each row once. Approximate answers
have min(k, n) rows, ascending. Data is made here, seed SEED.
"""
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, blob, build_shard, clustered, connect, tool

SEED = 23


def check(s, queries, ks=None, exact_only=False):
    """The right rows for every k, exactly and approximately."""
    db, n = connect(), len(s.ids)
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % s.path)
    assert db.execute("SELECT count(*) FROM t").fetchone() == (n,)
    for q in queries:
        d = s.distances(q)
        ranked = np.sort(d)
        # float32 sums of `dim` terms: a relative error, and where terms cancel one relative to their size
        size = np.abs(s.x.astype("f8")).max(initial=0) * np.abs(np.asarray(q, dtype="f8")).max() * s.x.shape[1]
        slack = dict(rtol=1e-4, atol=1e-6 * size + 2e-6 if s.metric != "l2" else 2e-3 * np.sqrt(1e-3 * size) + 1e-6)
        for k in ks or (0, 1, n, n + 1, 2**63 - 1):
            for exact in (1,) if exact_only else (1, 0):
                got = db.execute("SELECT id, distance FROM t WHERE embedding MATCH ? AND k = ? AND exact = ?", (blob(q), k, exact)).fetchall()
                assert len(got) == len({r[0] for r in got}) == min(k, n), (k, exact)
                assert [r[1] for r in got] == sorted(r[1] for r in got)
                np.testing.assert_allclose([r[1] for r in got], [d[s.at[r[0]]] for r in got], **slack)
                if exact:
                    np.testing.assert_allclose([r[1] for r in got], ranked[:min(k, n)], **slack)
        lazy = db.execute("SELECT id FROM t(?) WHERE exact = 1 ORDER BY distance", (blob(q),)).fetchall()
        assert len(lazy) == n and {r[0] for r in lazy} == set(s.ids)
    db.close()
    assert tool("verify", s.path).returncode == 0


SIZES, DIMS = (0, 1, 2, 255, 256, 257, 5000), (1, 2, 7, 16, 997, 4096)


LARGE = pytest.mark.plain_only("its rows and its dimensions come apart as well, and this is 27 s of a sanitizer")


@pytest.mark.parametrize("n, dim", [pytest.param(n, d, marks=[LARGE] if n * d > 10**7 else []) for n in SIZES for d in DIMS if (n, d) != (5000, 997)])
def test_rows_and_dimensions(tmp_path, n, dim):
    """The metric goes round, so that every size meets each and every dimension does."""
    metric = ("l2", "cosine", "dot")[(SIZES.index(n) + DIMS.index(dim)) % 3]
    x = clustered(n, dim, SEED + n + dim)
    s = build_shard(tmp_path / "s", x, metric=metric)
    large = n * dim > 10**7
    check(s, [clustered(1, dim, SEED)[0]], ks=(1, n + 1) if large else None)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("n, options", [(300, ()), (5000, ()), (5000, ("--partitions", 30))])
def test_all_rows_equal(tmp_path, metric, n, options):
    s = build_shard(tmp_path / "s", np.full((n, 6), .7, dtype="f4"), metric=metric, options=options)
    check(s, [s.x[0], np.float32([1, 0, 0, 0, 0, 0])], ks=(1, 7, n, n + 1))


@pytest.mark.parametrize("options", [(), ("--partitions", 40)])
def test_half_duplicates(tmp_path, options):
    x = clustered(2500, 9, SEED)
    s = build_shard(tmp_path / "s", np.vstack([x, x]), options=options)
    check(s, [x[5], x[6] * 2], ks=(1, 2, 3, 50, 5000))
    db = connect()
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % s.path)
    assert [r[0] for r in db.execute("SELECT id FROM t WHERE embedding MATCH ? AND k = 2 AND exact = 1", (blob(x[5]),))] == [5, 2505]
    db.close()


def test_one_partition_holds_nearly_all(tmp_path):
    rng = np.random.default_rng(SEED)
    far = rng.normal(size=(600, 10)) * 5 + rng.integers(1, 30, (600, 1)) * 100
    s = build_shard(tmp_path / "s", np.vstack([np.full((5400, 10), 1.0) + rng.normal(size=(5400, 10)) * 1e-4, far]), options=("--partitions", 16))
    db = connect()
    most, = db.execute("SELECT max(rows) FROM shard_partitions(?)", (s.path,)).fetchone()
    db.close()
    assert most >= 1000  # lopsided, though balancing may split the crowd
    check(s, [s.x[0], s.x[5999], np.zeros(10, dtype="f4")], ks=(1, 10, 5401, 6000))


@pytest.mark.parametrize("n, partitions", [(0, 1), (0, 50), (1, 1), (1, 50), (2, 50), (40, 40), (300, 299), (5000, 1), (5000, 2000)])
def test_partitions_and_few_rows(tmp_path, n, partitions):
    s = build_shard(tmp_path / "s", clustered(n, 8, SEED), options=("--partitions", partitions))
    check(s, [clustered(1, 8, SEED + 1)[0]])


@pytest.mark.parametrize("dim, options", [
    (16, ("--bits", 4)), (16, ("--bits", 4, "--subvectors", 16)), (16, ("--bits", 4, "--subvectors", 1)), (7, ("--bits", 4)), (1, ("--bits", 4)),
    (16, ("--store", "f16")), (7, ("--store", "f16", "--bits", 4)), (997, ("--store", "f16")), (16, ("--subvectors", 1)), (16, ("--subvectors", 16)),
    (16, ("--subvectors", 5)), (7, ("--subvectors", 7)), (7, ("--subvectors", 2)), (997, ("--subvectors", 1)), (1, ("--subvectors", 1)), (64, ("--subvectors", 64)),
])
@pytest.mark.parametrize("n", [3, 1200])
def test_codes_and_stores(tmp_path, n, dim, options):
    """Coded, because partitions are asked for; float16 distances are those of the rounded vectors."""
    x = clustered(n, dim, SEED + dim)
    if "f16" in options:
        x = x.astype("f2").astype("f4")
    s = build_shard(tmp_path / "s", x, options=("--partitions", 12, *options), metric="cosine" if dim == 7 else "l2")
    check(s, [x[n // 2], x[0] * np.float32(1.1)], ks=(0, 1, 20, n, 2**63 - 1))
    db = connect()
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % s.path)
    assert db.execute("SELECT embedding FROM t WHERE id = 1").fetchone() == (x[1].tobytes(),)
    if n > 1000 and dim == 16:
        found = 0
        for row in range(0, 1000, 50):
            want = set(s.nearest(x[row], 10))
            found += len(want & {r[0] for r in db.execute("SELECT id FROM t(?, 10, 12, 30)", (blob(x[row]),))})
        assert found >= .9 * 200, options
    db.close()


@pytest.mark.plain_only("statistics")
def test_recall_with_4_bits_is_not_luck(tmp_path):
    """Codes rank: refining few candidates finds far more than chance would."""
    x = clustered(6000, 16, SEED)
    s = build_shard(tmp_path / "s", x, options=("--partitions", 20, "--bits", 4, "--subvectors", 16))
    db = connect()
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % s.path)
    found = sum(len(set(s.nearest(x[r], 10)) & {i for i, in db.execute("SELECT id FROM t(?, 10, 20, 4)", (blob(x[r]),))}) for r in range(0, 1000, 25))
    assert found >= .7 * 400
    db.close()


@pytest.mark.parametrize("options, says", [(("--subvectors", 17), "not 17"), (("--partitions", 0), "partitions"), (("--bits", 5), "bits"),
                                           (("--store", "f64"), "store")])
def test_impossible_options(tmp_path, options, says):
    np.save(tmp_path / "x.npy", clustered(20, 16, SEED))
    r = tool("build", tmp_path / "x.npy", "--out", tmp_path / "s", *options, ok=False)
    assert says in r.stderr and not os.path.exists(tmp_path / "s")


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e16])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_scales(tmp_path, metric, scale):
    """Tiny and huge elements: distances have the right order of magnitude, every row comes once, nothing is NaN."""
    x = (clustered(400, 8, SEED).astype("f8") * scale).astype("f4")
    s = build_shard(tmp_path / "s", x, metric=metric, options=("--partitions", 4))
    db = connect()
    db.execute("CREATE VIRTUAL TABLE t USING vecshard(path='%s')" % s.path)
    got = db.execute("SELECT id, distance FROM t WHERE embedding MATCH ? AND k = 400", (blob(x[9]),)).fetchall()
    assert len({r[0] for r in got}) == 400 and all(r[1] is not None for r in got)
    if metric == "cosine" or 1e-10 < scale < 1e10:
        d = s.distances(x[9])
        np.testing.assert_allclose([r[1] for r in got], [d[s.at[r[0]]] for r in got], rtol=1e-3, atol=1e-3 * np.abs(d).max())
    db.close()


@pytest.mark.plain_only("a sanitizer's memory is not ours")
def test_memory_does_not_follow_k(tmp_path):
    """k = 2^63-1 on a small shard takes no more memory than k = 10: children of this test report their peak."""
    s = build_shard(tmp_path / "s", clustered(5000, 16, SEED), options=("--partitions", 20))
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from conftest import connect, blob; import resource; db = connect()\n"
            "db.execute(\"CREATE VIRTUAL TABLE t USING vecshard(path='%s')\" % sys.argv[2])\n"
            "n = sum(1 for _ in db.execute('SELECT id, distance FROM t(?, ?, NULL, ?)', (blob([1.0] * 16), int(sys.argv[3]), int(sys.argv[4]))))\n"
            "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")

    def peak_kib(k, refine):
        out = subprocess.run([sys.executable, "-c", code, str(ROOT / "test"), s.path, str(k), str(refine)], capture_output=True, text=True, check=True).stdout
        n, kib = map(int, out.split())
        assert n == min(k, 5000)
        return kib
    small = peak_kib(10, 1)
    for k, refine in ((5000, 10), (2**40, 10), (2**63 - 1, 2**63 - 1), (10, 2**63 - 1)):
        assert peak_kib(k, refine) < small + 16384, (k, refine)

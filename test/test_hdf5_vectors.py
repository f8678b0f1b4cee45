"""Proves what the SQL table hdf5_vectors promises: its columns, its arguments, joins, limits, directonly, and errors that a
user can act on. Makes its own files with h5py. VECSHARD_BUILD names another build folder."""
import os
import sqlite3

import pytest

h5py = pytest.importorskip("h5py")
np = pytest.importorskip("numpy")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get("VECSHARD_BUILD", os.path.join(ROOT, "build"))


@pytest.fixture
def db():
    c = sqlite3.connect(":memory:")
    c.enable_load_extension(True)
    c.load_extension(os.path.join(BUILD, "vecshard_hdf5"))
    yield c
    c.close()


@pytest.fixture
def made(tmp_path):
    """(path, ids, vectors) of a file with 3,000 rows: several batches."""
    path = str(tmp_path / "a.h5")
    v = np.random.RandomState(1).rand(3000, 12).astype("<f4")
    ids = ["id %d" % i for i in range(3000)]
    with h5py.File(path, "w") as f:
        f.create_dataset("embedding", data=v, chunks=(128, 12), compression="gzip")
        f.create_dataset("id", data=np.array(ids, dtype=object), dtype=h5py.string_dtype(), chunks=(100,), compression="gzip")
    return path, ids, v


def write(path, **data):
    with h5py.File(str(path), "w") as f:
        for k, v in data.items():
            f.create_dataset(k, data=v)
    return str(path)


def error(db, sql, *args):
    with pytest.raises(sqlite3.Error) as e:
        db.execute(sql, args).fetchall()
    return str(e.value)


def test_all_rows(db, made):
    path, ids, v = made
    rows = db.execute("SELECT rowid, id, embedding FROM hdf5_vectors(?)", (path,)).fetchall()
    assert [r[0] for r in rows] == list(range(3000))
    assert [r[1] for r in rows] == ids
    assert np.array_equal(np.frombuffer(b"".join(r[2] for r in rows), "<f4").reshape(-1, 12), v)


def test_types_and_arguments(db, made):
    path = made[0]
    assert db.execute("SELECT typeof(id), typeof(embedding), length(embedding) FROM hdf5_vectors(?) LIMIT 1",
                      (path,)).fetchone() == ("text", "blob", 48)
    assert db.execute("SELECT id, typeof(id), file FROM hdf5_vectors(?, 'embedding', 'none') LIMIT 1 OFFSET 7",
                      (path,)).fetchone() == (7, "integer", path)
    assert db.execute("SELECT count(*) FROM hdf5_vectors(NULL)").fetchone() == (0,)
    assert db.execute("SELECT count(*) FROM hdf5_vectors(?, NULL, NULL, NULL)", (path,)).fetchone() == (3000,)
    assert db.execute("SELECT count(*) FROM hdf5_vectors WHERE file = ? AND id_dataset = 'id'", (path,)).fetchone() == (3000,)
    assert db.execute("SELECT rowid FROM hdf5_vectors(?) WHERE id = 'id 2999'", (path,)).fetchone() == (2999,)


def test_joins(db, made, tmp_path):
    path, ids, _ = made
    other = write(tmp_path / "b.h5", embedding=np.ones((2, 3), "f8"), id=np.array([5, 6]))
    db.execute("CREATE TABLE files(f)")
    db.executemany("INSERT INTO files VALUES(?)", [(path,), (other,), (None,)])
    assert db.execute("SELECT f, count(*) FROM files, hdf5_vectors(files.f) GROUP BY f ORDER BY 2").fetchall() == [(other, 2), (path, 3000)]
    # The same file twice at once.
    assert db.execute("SELECT count(*) FROM hdf5_vectors(?1) a JOIN hdf5_vectors(?1) b ON a.rowid = b.rowid WHERE a.rowid < 3 AND b.rowid < 3 "
                      "AND a.id = b.id", (other,)).fetchone() == (2,)
    db.execute("CREATE TABLE t AS SELECT id, embedding FROM hdf5_vectors(?)", (path,))
    assert db.execute("SELECT count(DISTINCT id) FROM t").fetchone() == (3000,)


def test_bad_rows(db, tmp_path):
    v = np.ones((5, 3), "f4")
    v[3, 1] = np.nan
    path = write(tmp_path / "bad.h5", embedding=v, id=np.arange(5))
    assert path + ": row 3: NaN" in error(db, "SELECT * FROM hdf5_vectors(?)", path)
    assert [r[0] for r in db.execute("SELECT id FROM hdf5_vectors(?, NULL, NULL, 'skip')", (path,))] == [0, 1, 2, 4]
    assert "'fail' or 'skip'" in error(db, "SELECT * FROM hdf5_vectors(?, NULL, NULL, 'x')", path)
    # A cursor that failed, and the connection, stay usable.
    assert db.execute("SELECT count(*) FROM hdf5_vectors(?, NULL, NULL, 'skip')", (path,)).fetchone() == (4,)


def test_errors(db, tmp_path):
    assert "needs a file" in error(db, "SELECT * FROM hdf5_vectors")
    assert "/no/such.h5" in error(db, "SELECT * FROM hdf5_vectors('/no/such.h5')")
    assert "directory" in error(db, "SELECT * FROM hdf5_vectors(?)", str(tmp_path))
    path = write(tmp_path / "i.h5", embedding=np.ones((3, 2), "i4"), id=np.arange(3))
    assert "integers" in error(db, "SELECT * FROM hdf5_vectors(?)", path)
    assert "no such module" not in error(db, "SELECT * FROM hdf5_vectors(?, 'nope')", path)


def test_only_direct_and_read_only(db, made):
    db.execute("CREATE VIEW v AS SELECT id FROM hdf5_vectors('%s')" % made[0])
    assert "unsafe use" in error(db, "SELECT * FROM v")
    error(db, "INSERT INTO hdf5_vectors(id) VALUES(1)")
    error(db, "CREATE VIRTUAL TABLE t USING hdf5_vectors")


def test_unsigned_and_half(db, tmp_path):
    v = (np.random.RandomState(2).randn(50, 33) * 10).astype("f2")
    path = write(tmp_path / "h.h5", embedding=v, id=np.arange(50, dtype="u8") + 2**63 - 1)
    rows = db.execute("SELECT id, embedding FROM hdf5_vectors(?)", (path,)).fetchall()
    assert [r[0] for r in rows] == [str(2**63 - 1 + i) for i in range(50)]
    assert np.array_equal(np.frombuffer(b"".join(r[1] for r in rows), "<f4").reshape(50, 33), v.astype("f4"))


def test_npy(db, tmp_path):
    path = str(tmp_path / "a.npy")
    v = np.random.RandomState(3).rand(9, 4).astype(">f8")
    np.save(path, v)
    rows = db.execute("SELECT id, embedding FROM hdf5_vectors(?)", (path,)).fetchall()
    assert [r[0] for r in rows] == list(range(9))
    assert np.array_equal(np.frombuffer(b"".join(r[1] for r in rows), "<f4").reshape(9, 4), v.astype("<f4"))

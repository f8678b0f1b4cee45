"""Proves what the functions on vectors promise: which values are vectors and which are refused with what text, results
against plain Python arithmetic, sqlite-vec's conventions (NULL, slices, vec_each), the packed BLOB's layout and keys,
and that damaged packed BLOBs are refused or harmless. Random data from SEED."""
import json
import math
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys

import pytest
from conftest import BUILD, ROOT, blob, connect, tool

SEED = 20240607
HEADER = 24


def one(db, sql, *args):
    return db.execute(sql, args).fetchone()[0]


def error(db, sql, *args):
    with pytest.raises(sqlite3.Error) as e:
        db.execute(sql, args).fetchall()
    return str(e.value)


def floats(b):
    return list(struct.unpack("<%df" % (len(b) // 4), b))


def close(got, want):
    assert got == pytest.approx(want, rel=1e-5, abs=1e-6)


# ---- values ----

@pytest.mark.parametrize("text, want", [
    ("[1,2,3]", [1, 2, 3]),
    (" [ 1 ,\t2\r\n, 3 ] ", [1, 2, 3]),
    ("[-0.5,1e3,1E-2,2.5e+1,0]", [-0.5, 1000, 0.01, 25, 0]),
    ("[1e-400]", [0]),
    ("[" + "9" * 30 + "]", [1e30]),
    ("[0." + "0" * 5000 + "1]", [0]),
])
def test_text(db, text, want):
    close(floats(one(db, "SELECT vec_f32(?)", text)), want)


@pytest.mark.parametrize("text, says", [
    ("", "JSON array"), ("  ", "JSON array"), ("1,2", "JSON array"), ("{}", "JSON array"),
    ("[]", "empty"), ("[ ]", "empty"),
    ("[1,2", "character 4"), ("[1,]", "character 3"), ("[,1]", "character 1"), ("[1,,2]", "character 3"),
    ("[1 2]", "character 3"), ("[1,2]x", "character 5"), ("[1][2]", "character 3"),
    ("[[1]]", "character 1"), ("[1,[2]]", "character 3"), ('["1"]', "character 1"), ("[null]", "character 1"),
    ("[1,nan]", "character 3"), ("[inf]", "character 1"), ("[-inf]", "character 1"), ("[-]", "character 1"),
    ("[+1]", "character 1"), ("[.5]", "character 1"), ("[1.]", "character 1"), ("[1.e5]", "character 1"),
    ("[1e]", "character 1"), ("[1e+]", "character 1"), ("[01]", "character 2"), ("[0x10]", "character 2"),
    ("[1;2]", "character 2"), ("[1,5.5,2,3 4]", "character 11"), ("[1]\0", "NUL"), ("[1\0]", "NUL"),
    ("[1e39]", "element 0"), ("[1,-1e999]", "element 1"), ("[é]", "character 1"),
    ("[" + "1," * 16384 + "1]", "16384"),
])
def test_bad_text(db, text, says):
    assert says in error(db, "SELECT vec_f32(?)", text)
    assert says in error(db, "SELECT * FROM vec_each(?)", text)


@pytest.mark.parametrize("value, says", [
    (b"", "0 bytes"), (b"abc", "3 bytes"), (b"abcdef", "6 bytes"), (bytes(4 * 16385), "16384"),
    (blob([1, math.nan]), "element 1"), (blob([math.inf]), "element 0"), (blob([1, 2, -math.inf]), "element 2"),
    (1, "number"), (2.5, "number"),
])
def test_bad_blob(db, value, says):
    assert says in error(db, "SELECT vec_f32(?)", value)


def test_limits_and_encodings(db):
    assert one(db, "SELECT vec_length(?)", bytes(4 * 16384)) == 16384
    assert one(db, "SELECT vec_length(zeroblob(64))") == 16
    assert one(db, "SELECT vec_length(?)", "[" + "1," * 16383 + "1]") == 16384
    db.execute("PRAGMA encoding = 'UTF-16le'")
    assert one(db, "SELECT vec_to_json(vec_f32(?))", "[1.5,2]") in ("[1.5,2]", "[1.5,2.0]")


def test_locale(tmp_path):
    """A host whose decimal sign is a comma changes nothing."""
    if not shutil.which("localedef"):
        pytest.skip("no localedef")
    made = subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")],
                          capture_output=True)
    if made.returncode > 1 or not (tmp_path / "de_DE.UTF-8").exists():
        pytest.skip("no source of de_DE")
    code = ("import locale, sys; sys.path.insert(0, sys.argv[1]); from conftest import connect\n"
            "locale.setlocale(locale.LC_ALL, 'de_DE.UTF-8'); assert locale.localeconv()['decimal_point'] == ','\n"
            "print(connect().execute(\"SELECT vec_to_json('[0.5,1.25]'), vec_length('[1,2]')\").fetchone())")
    r = subprocess.run([sys.executable, "-c", code, str(ROOT / "test")], capture_output=True, text=True,
                       env={**os.environ, "LOCPATH": str(tmp_path)})
    assert r.stdout.strip() == "('[0.5,1.25]', 2)", r.stderr


# ---- functions ----

def test_null_is_an_error_as_in_sqlite_vec(db):
    v = "'[1,2]'"
    for call in ["vec_f32(NULL)", "vec_to_json(NULL)", "vec_length(NULL)", "vec_normalize(NULL)", "vec_slice(NULL,0,1)",
                 *("%s(NULL,%s)" % (f, v) for f in BINARY), *("%s(%s,NULL)" % (f, v) for f in BINARY)]:
        assert "NULL" in error(db, "SELECT " + call), call
    assert "NULL" in error(db, "SELECT * FROM vec_each(NULL)")


BINARY = ["vec_add", "vec_sub", "vec_distance_l2", "vec_distance_cosine", "vec_distance_dot"]


@pytest.mark.parametrize("f", BINARY)
def test_two_arguments(db, f):
    text = error(db, "SELECT %s('[1,2]','[1,2,3]')" % f)
    assert "2" in text and "3" in text and "dimensions" in text
    assert "first vector" in error(db, "SELECT %s('[1,','[1]')" % f)
    assert "second vector" in error(db, "SELECT %s('[1]','[1,')" % f)


def test_arithmetic(db):
    rng = random.Random(SEED)
    for dim in [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 960]:
        a, b = (floats(blob([rng.gauss(0, 1) for _ in range(dim)])) for _ in range(2))
        args = blob(a), blob(b)
        dot, aa, bb = sum(x * y for x, y in zip(a, b)), sum(x * x for x in a), sum(y * y for y in b)
        close(one(db, "SELECT vec_distance_l2(?,?)", *args), math.dist(a, b))
        close(one(db, "SELECT vec_distance_cosine(?,?)", *args), 1 - dot / math.sqrt(aa * bb))
        assert one(db, "SELECT vec_distance_dot(?,?)", *args) == pytest.approx(-dot, rel=1e-5, abs=1e-4)
        close(floats(one(db, "SELECT vec_add(?,?)", *args)), [x + y for x, y in zip(a, b)])
        close(floats(one(db, "SELECT vec_sub(?,?)", *args)), [x - y for x, y in zip(a, b)])
        close(floats(one(db, "SELECT vec_normalize(?)", args[0])), [x / math.sqrt(aa) for x in a])


def test_special_results(db):
    assert one(db, "SELECT vec_distance_l2('[0,0]','[3,4]')") == 5
    assert one(db, "SELECT vec_distance_cosine('[0,0]','[1,2]')") is None
    assert one(db, "SELECT vec_distance_cosine('[1,2]','[0,0]')") is None
    close(floats(one(db, "SELECT vec_normalize('[0,0]')")), [0, 0])
    close(floats(one(db, "SELECT vec_normalize('[3e38,3e38]')")), [math.sqrt(.5)] * 2)
    close(floats(one(db, "SELECT vec_normalize('[1e-40,0]')")), [1, 0])
    assert "float32" in error(db, "SELECT vec_add('[1,3e38]','[1,3e38]')")
    assert "float32" in error(db, "SELECT vec_sub('[-3e38]','[3e38]')")


def test_slice(db):
    assert floats(one(db, "SELECT vec_slice('[1,2,3,4]',1,3)")) == [2, 3]
    assert floats(one(db, "SELECT vec_slice('[1,2,3,4]',0,4)")) == [1, 2, 3, 4]
    for bad in ["-1,2", "0,5", "3,2", "2,2", "5,6", "0,-1", "4,4", "9223372036854775807,1", "0,4294967297"]:
        assert "vec_slice" in error(db, "SELECT vec_slice('[1,2,3,4]',%s)" % bad), bad


def test_json(db):
    rng = random.Random(SEED)
    v = [0.1, 1e-30, 3.4028235e38, 1e-45, -1.17549435e-38, 16777217, 123456.789, 0, 1e10]
    v += [struct.unpack("<f", struct.pack("<I", rng.getrandbits(31) & 0x7f7fffff))[0] for _ in range(3000)]
    b = blob(v)
    text = one(db, "SELECT vec_to_json(?)", b)
    assert one(db, "SELECT vec_f32(?)", text) == b
    assert blob(json.loads(text)) == b
    assert one(db, "SELECT vec_to_json('[0.1,2]')") in ("[0.1,2]", "[0.1,2.0]")
    assert json.loads(one(db, "SELECT json_array(vec_to_json('[1,2]'))")) == [[1, 2]]


def test_nested(db):
    assert floats(one(db, "SELECT vec_add(vec_f32('[1,2]'), vec_slice(vec_normalize('[3,0,0]'),0,2))")) == [2, 2]


def test_in_indexes_and_untrusted_schemas(db):
    """Deterministic (indexes, generated columns) and innocuous (schemas of untrusted files)."""
    db.execute("PRAGMA trusted_schema = 0")
    db.execute("CREATE TABLE t(v, n GENERATED ALWAYS AS (vec_length(v)) VIRTUAL)")
    db.execute("CREATE INDEX i ON t(vec_distance_l2(v, '[0,0]'))")
    db.execute("CREATE VIEW w AS SELECT e.value FROM t, vec_each(t.v) e")
    db.execute("INSERT INTO t(v) VALUES('[3,4]')")
    assert one(db, "SELECT n FROM t WHERE vec_distance_l2(v, '[0,0]') = 5") == 2
    assert db.execute("SELECT value FROM w").fetchall() == [(3,), (4,)]


def test_version_and_cpu(db):
    assert one(db, "SELECT vecshard_version()") == "0.1.0"
    cpu = one(db, "SELECT vecshard_cpu()")
    names = cpu.replace("(also: ", ", ").replace(")", "").replace(" ,", ",").split(", ")
    assert "scalar" in names and len(set(names)) == len(names)


def test_cpu_capped():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from conftest import connect\n"
            "print(connect().execute('SELECT vecshard_cpu()').fetchone()[0])")
    r = subprocess.run([sys.executable, "-c", code, str(ROOT / "test")], capture_output=True, text=True,
                       env={**os.environ, "VECSHARD_SIMD": "scalar"})
    assert r.stdout.startswith("scalar"), r.stderr


# ---- vec_each ----

def test_each(db):
    assert db.execute("SELECT rowid, value FROM vec_each('[1,2.5,-3]')").fetchall() == [(0, 1.0), (1, 2.5), (2, -3.0)]
    assert db.execute("SELECT rowid, value FROM vec_each(?)", (blob([7, 8]),)).fetchall() == [(0, 7.0), (1, 8.0)]
    assert db.execute("SELECT column1, value FROM (VALUES('[1,2]'),('[3]')), vec_each(column1)").fetchall() == [
        ("[1,2]", 1), ("[1,2]", 2), ("[3]", 3)]
    assert one(db, "SELECT sum(value) FROM vec_each(?)", bytes(4 * 16384)) == 0
    error(db, "SELECT * FROM vec_each")
    error(db, "CREATE VIRTUAL TABLE t USING vec_each")


# ---- vec_pack ----

def packed(vectors, keys=None, **changes):
    """The layout of vec_value.h, written a second time."""
    f = {"magic": b"VSPK", "version": 1, "dim": len(vectors[0]), "count": len(vectors), "flags": int(keys is not None),
         "reserved": 0, **changes}
    out = f["magic"] + struct.pack("<5I", f["version"], f["dim"], f["count"], f["flags"], f["reserved"])
    out += b"".join(map(blob, vectors))
    for k in keys or []:
        if k is None: out += b"\0"
        elif isinstance(k, int): out += b"\1" + struct.pack("<q", k)
        elif isinstance(k, float): out += b"\2" + struct.pack("<d", k)
        else:
            raw = k.encode() if isinstance(k, str) else k
            out += (b"\3" if isinstance(k, str) else b"\4") + struct.pack("<I", len(raw)) + raw
    return out + bytes((2 - len(out)) % 4)


KEYS = [None, 7, -2**63, 1.5, "name", "", "ü" * 3, b"\0\1", b""]


def test_pack(db):
    db.execute("CREATE TABLE q(e, k)")
    v = [[i, i + .5] for i in range(len(KEYS))]
    db.executemany("INSERT INTO q VALUES(?,?)", [(blob(x), k) for x, k in zip(v, KEYS)])
    rows = "(SELECT * FROM q ORDER BY rowid)"
    assert one(db, "SELECT vec_pack(e, k) FROM " + rows) == packed(v, KEYS)
    assert one(db, "SELECT vec_pack(e) FROM " + rows) == packed(v)
    assert one(db, "SELECT vec_pack('[1,2]')") == packed([[1, 2]])
    assert one(db, "SELECT vec_pack(e) FROM q WHERE 0") is None
    assert one(db, "SELECT vec_pack(NULL)") is None
    assert one(db, "SELECT vec_pack(column1) FROM (VALUES('[1]'),(NULL),('[2]'))") == packed([[1], [2]])
    assert len(db.execute("SELECT vec_pack(e, k) FROM q GROUP BY rowid").fetchall()) == len(v)
    for n in range(1, 40):  # whatever the keys, never the length of a bare vector
        assert len(one(db, "SELECT vec_pack('[1,2,3]', ?)", "x" * n)) % 4 == 2


def test_pack_refuses(db):
    text = error(db, "SELECT vec_pack(column1) FROM (VALUES('[1]'),('[1,2]'))")
    assert "1" in text and "2" in text and "dimensions" in text
    assert "character" in error(db, "SELECT vec_pack('[1,')")
    p = one(db, "SELECT vec_pack('[1,2]')")
    assert "vec_pack" in error(db, "SELECT vec_length(?)", p)  # a batch is not a vector, and the text says what it is


@pytest.fixture
def searched(tmp_path):
    """ask(query) -> rows of shard_union; an empty folder is source enough, since the query is read first."""
    db = connect()
    yield lambda q: db.execute("SELECT query_no, query_key FROM shard_union(?, ?, 1)", (str(tmp_path), q)).fetchall()
    db.close()


GOOD = packed([[1, 2], [3, 4]], ["a", None])
BROKEN = {
    "no vectors": packed([[1, 2]], None, count=0)[:HEADER] + b"\0\0",
    "version": packed([[1, 2]], version=2),
    "flags": packed([[1, 2]], flags=2),
    "reserved": packed([[1, 2]], reserved=1),
    "dim 0": packed([[1, 2]], dim=0),
    "dim too large": packed([[1.0] * 16385]),
    "count too large": packed([[1, 2]], count=2**32 - 1),
    "product wraps": packed([[1, 2]], dim=2**31, count=2**31),
    "product wraps to this length": packed([[1, 2]], dim=2**16, count=2**30),
    "count too small": packed([[1, 2], [3, 4]], count=1),
    "one vector short": packed([[1, 2]], count=2),
    "keys missing": packed([[1, 2]] * 3, flags=1),
    "key type": packed([[1, 2]], flags=1)[:HEADER + 8] + b"\5\0",
    "text longer than the BLOB": packed([[1, 2]], flags=1)[:HEADER + 8] + b"\3\xff\xff\xff\xff" + bytes(5),
    "key cut": packed([[1, 2]], flags=1)[:HEADER + 8] + b"\1\0",
    "rubbish behind": packed([[1, 2]]) + bytes(4),
    "padding not zero": packed([[1, 2]])[:-1] + b"\1",
    "NaN": packed([[1, 2], [3, math.nan]]),
    "header only": b"VSPK\1\0",
}


def test_keys_come_back(tmp_path):
    """Through a real shard: every type of key, none at all, and one bare vector."""
    if not (BUILD / "vecshard").exists():
        pytest.skip("no tool in " + str(BUILD))
    (tmp_path / "v.f32").write_bytes(b"".join(blob([i, 1]) for i in range(50)))
    tool("build", tmp_path / "v.f32", "--dim", "2", "--metric", "l2", "--out", tmp_path / "db" / "s")
    db = connect()
    sql = "SELECT query_key, query_no, id FROM shard_union(?, ?, 1) ORDER BY query_no"
    ask = lambda q: db.execute(sql, (str(tmp_path / "db"), q)).fetchall()
    v = [[i, 1] for i in range(len(KEYS))]
    assert ask(packed(v, KEYS)) == [(k, i, i) for i, k in enumerate(KEYS)]
    assert ask(packed(v)) == [(None, i, i) for i in range(len(v))]
    assert ask(blob([7, 1])) == ask("[7,1]") == [(None, 0, 7)]
    assert ask(None) == []


@pytest.mark.parametrize("name", BROKEN)
def test_broken_batches(searched, name):
    assert len(BROKEN[name]) % 4 == 2
    with pytest.raises(sqlite3.Error) as e:
        searched(BROKEN[name])
    text = str(e.value)
    assert "vec_pack" in text or "packed" in text, text
    if name == "NaN":
        assert "vector 1" in text and "element 1" in text


def test_damaged_batches_do_no_harm(searched):
    """Every byte changed, every length cut: an error or an answer, never a crash (the sanitizers watch)."""
    rng = random.Random(SEED)
    for i in range(len(GOOD)):
        for b in (0, 1, 2, 3, 4, 0x7f, 0xff, rng.randrange(256)):
            cut = GOOD[:i] + bytes([b]) + GOOD[i + 1:]
            for q in (cut, cut[:rng.randrange(len(cut))], cut + bytes(4)):
                try:
                    searched(q)
                except sqlite3.Error as e:
                    assert len(str(e)) > 10

"""Proves that hdf5_vectors copes with every file of the shared sets h5_made and h5_real: what shall load gives h5py's rows,
what shall not is refused by a message that names the file, rows that hold no vector are reported by number.

Each file is opened in a process of its own: a crash is then a failed test, and h5py (which registers the LZF filter with the
same libhdf5) cannot help. Skipped where the sets are absent. VECSHARD_BUILD names another build folder.
"""
import json
import os
import sqlite3
import subprocess
import sys

import pytest

h5py = pytest.importorskip("h5py")
np = pytest.importorskip("numpy")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OPEN = os.path.join(ROOT, "..", "shared", "data", "open")
BUILD = os.environ.get("VECSHARD_BUILD", os.path.join(ROOT, "build"))
MADE = os.path.join(OPEN, "h5_made")
REAL = os.path.join(OPEN, "h5_real")

pytestmark = pytest.mark.skipif(not os.path.isdir(OPEN), reason="no shared/data/open")

READER = """
import json, sqlite3, sys
c = sqlite3.connect(":memory:")
c.enable_load_extension(True)
c.load_extension(sys.argv[1])
try:
    rows = c.execute("SELECT rowid, id, hex(embedding) FROM hdf5_vectors(?, ?, ?, ?)", json.loads(sys.argv[2])).fetchall()
    print(json.dumps({"rows": rows}))
except sqlite3.Error as e:
    print(json.dumps({"error": str(e)}))
"""

ARGS = {"odd_nested.h5": ["/data/emb/embedding", "/data/meta/id"], "odd_no_id.h5": [None, "none"],
        "jobsim.h5": [None, "none"]}

# What each error has to say, so that a user knows what to do; for the rest the file's name is enough.
SAYS = {"bad_not_hdf5.h5": "git-lfs", "bad_unclean_close.h5": "h5clear", "odd_lzf.h5": "32000 (lzf)", "odd_transposed.h5": "transposed",
        "bad_bf16_as_u16.h5": "bfloat16", "bad_external_link.h5": "external link", "bad_external_storage.h5": "external storage",
        "bad_soft_link.h5": "/nowhere", "bad_gzip_flip.h5": "inflate", "bad_fletcher_flip.h5": "hecksum", "odd_compound.h5": "compound",
        "odd_per_residue.h5": "ean-pool", "bad_ids_short.h5": "60 rows", "bad_embedding_is_group.h5": "group",
        "bad_truncated_99.h5": "cut at 74645 bytes", "bad_zero_bytes.h5": "empty", "bad_is_dir.h5": "directory"}

# Rows that only a build can judge (zero vectors under cosine, duplicate ids): here they are rows like others.
BUILD_JUDGES = {"bad_zero_vectors.h5", "bad_duplicate_ids.h5", "bad_hole_contiguous.h5"}
# Written zeros in the chunk's rest come first there; the hole proper begins with the second chunk of 50 rows.
FIRST_BAD = {"bad_unwritten_chunks.h5": 50}


def manifest(folder):
    try:
        m = json.load(open(os.path.join(folder, "manifest.json")))
    except OSError:
        return []
    return m["files"] if isinstance(m, dict) else m


def read(path, *args):
    args = ([path] + list(args) + [None] * 3)[:4]
    p = subprocess.run([sys.executable, "-c", READER, os.path.join(BUILD, "vecshard_hdf5"), json.dumps(args)],
                       capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, "exit %d: %s" % (p.returncode, p.stderr)
    return json.loads(p.stdout)


def truth(path, args):
    """ids and vectors as h5py reads them, in the order that input_hdf5.c promises."""
    with h5py.File(path, "r") as f:
        name = args[0] if args and args[0] else next((n for n in ("embedding", "embeddings", "train") if n in f), None)
        if name is None:
            names = sorted(f, key=lambda n: n.encode())
            ids = [f[n].attrs.get("original_id", n) for n in names]
            return [i.decode() if isinstance(i, bytes) else i for i in ids], [f[n][()].reshape(-1).astype("<f4") for n in names]
        e = f[name][()].astype("<f4")
        ids = args[1] if len(args) > 1 else "id"
        if ids == "none" or name == "train":
            return list(range(len(e))), list(e)
        ids = f[ids][()].tolist()
        if isinstance(ids[0], int):
            return [str(i) if max(ids) >= 2**63 else i for i in ids], list(e)
        return [i.decode("utf-8", "surrogateescape") for i in ids], list(e)


def check_rows(path, args, got, skipped=()):
    ids, vectors = truth(path, args)
    want = [i for i in range(len(ids)) if i not in skipped]
    assert [r[0] for r in got] == want
    assert [r[1] for r in got] == [ids[i] for i in want]
    assert [r[2] for r in got] == [vectors[i].tobytes().hex().upper() for i in want]


@pytest.mark.parametrize("m", manifest(MADE), ids=[m["file"] for m in manifest(MADE)])
def test_made(m):
    path = os.path.join(MADE, m["file"])
    if not os.path.exists(path):
        pytest.skip("not in this copy of the set")
    args = ARGS.get(m["file"], [])
    r = read(path, *args)
    if m["file"] == "odd_dim_mismatch.h5":  # alone it is sound
        check_rows(path, args, r["rows"])
    elif m["expect"] == "load":
        assert len(r["rows"]) == m["rows"]
        check_rows(path, args, r["rows"])
    elif m["expect"] == "error":
        assert path in r["error"] and SAYS.get(m["file"], "") in r["error"]
    elif m["file"] in BUILD_JUDGES:
        check_rows(path, args, r["rows"])
    else:
        first = FIRST_BAD.get(m["file"], m["bad_rows"][0])
        assert path in r["error"] and "row %d:" % first in r["error"]
        check_rows(path, args, read(path, None, None, "skip")["rows"], [b for b in m["bad_rows"] if b >= first])


def test_no_ids_are_never_assumed():
    for path in (os.path.join(MADE, "odd_no_id.h5"), os.path.join(REAL, "jobsim.h5")):
        assert "--id-dataset none" in read(path)["error"]


@pytest.mark.parametrize("m", manifest(REAL), ids=[m["file"] for m in manifest(REAL)])
def test_real(m):
    path = os.path.join(REAL, m["file"])
    args = ARGS.get(m["file"], [])
    r = read(path, *args)
    if "refuse" in m["what"]:
        assert path in r["error"]
    else:
        check_rows(path, args, r["rows"])


def test_real_pandas_matrix_by_path():
    path = os.path.join(REAL, "wikigraph_embeddings.h5")
    args = ["/df/block0_values", "none"]
    r = read(path, *args)
    check_rows(path, args, r["rows"]) if "rows" in r else None
    assert "rows" in r or path in r["error"]

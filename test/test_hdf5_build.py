"""Proves that a shard does not depend on how its vectors were stored: the same rows as .f32, contiguous HDF5 and HDF5 in chunks of
several shapes and filters give the same segment, byte for byte, at one thread and at several; and that damage in a file is an
error that names its rows. VECSHARD_BUILD names another build folder."""
import hashlib
import itertools
import os
import subprocess

import pytest

h5py = pytest.importorskip("h5py")
np = pytest.importorskip("numpy")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOOL = os.path.join(os.environ.get("VECSHARD_BUILD", os.path.join(ROOT, "build")), "vecshard")
ROWS, DIM = 9000, 24


def build(out, *args, threads=2):
    env = dict(os.environ, VECSHARD_THREADS=str(threads))
    p = subprocess.run([TOOL, "build", *map(str, args), "--metric", "l2", "--threads", str(threads), "--out", str(out)],
                       capture_output=True, text=True, env=env, timeout=300)
    return p


def segments(folder):
    return sorted((n, hashlib.sha256(open(os.path.join(folder, n), "rb").read()).hexdigest())
                  for n in os.listdir(folder) if n.startswith("seg-"))


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(5)
    centre = rng.normal(size=(50, DIM))
    return (centre[rng.integers(0, 50, ROWS)] + 0.2 * rng.normal(size=(ROWS, DIM))).astype("<f4")


KINDS = {
    "contiguous": {},
    "gzip": dict(chunks=(700, DIM), compression="gzip", compression_opts=1),
    "everything": dict(chunks=(333, 7), compression="gzip", shuffle=True, fletcher32=True),
    "unfiltered": dict(chunks=(1000, DIM)),
    "auto": dict(compression="gzip"),
    "lzf": dict(chunks=(512, DIM), compression="lzf"),
}


@pytest.mark.plain_only("a build per storage layout; test_input.c reads each layout in every build")
def test_storage_does_not_show(tmp_path, vectors):
    raw = tmp_path / "a.f32"
    vectors.tofile(raw)
    want = None
    for threads in (1, 3):
        out = tmp_path / ("raw%d" % threads)
        p = build(out, raw, "--dim", DIM, threads=threads)
        assert p.returncode == 0, p.stderr
        want = want or segments(out)
        assert segments(out) == want
    for threads, (kind, how) in zip(itertools.cycle((3, 1)), KINDS.items()):
        path = tmp_path / (kind + ".h5")
        with h5py.File(path, "w") as f:
            f.create_dataset("embedding", data=vectors, **how)
        out = tmp_path / kind
        p = build(out, path, "--id-dataset", "none", threads=threads)
        if kind == "lzf" and "32000 (lzf)" in p.stderr:
            continue  # a filter that libhdf5 has only inside Python
        assert p.returncode == 0, p.stderr
        assert segments(out) == want, (kind, threads)


def test_ids_in_every_storage(tmp_path, vectors):
    """Text ids, contiguous and in chunks: the same shard."""
    ids = np.array(["protein-%d" % (i * 7) for i in range(ROWS)], dtype=object)
    want = None
    for n, how in enumerate(({}, dict(chunks=(100,)), dict(chunks=(1000,), compression="gzip"))):
        path = tmp_path / ("ids%d.h5" % n)
        with h5py.File(path, "w") as f:
            f.create_dataset("embedding", data=vectors, chunks=(700, DIM), compression="gzip")
            f.create_dataset("id", data=ids, dtype=h5py.string_dtype("utf-8"), **how)
        p = build(tmp_path / ("ids%d" % n), path)
        assert p.returncode == 0, p.stderr
        want = want or segments(tmp_path / ("ids%d" % n))
        assert segments(tmp_path / ("ids%d" % n)) == want


def test_damage_names_its_rows(tmp_path, vectors):
    path = tmp_path / "hurt.h5"
    with h5py.File(path, "w") as f:
        d = f.create_dataset("embedding", data=vectors, chunks=(1000, DIM), compression="gzip")
        at = d.id.get_chunk_info(5)
        assert at.chunk_offset == (5000, 0)
    with open(path, "r+b") as f:
        f.seek(at.byte_offset + at.size // 2)
        f.write(b"\xff" * 16)
    for threads in (1, 3):
        p = build(tmp_path / ("out%d" % threads), path, "--id-dataset", "none", threads=threads)
        assert p.returncode == 1
        assert str(path) in p.stderr and "rows 5000 to 5999 of 'embedding'" in p.stderr and "inflate" in p.stderr
        assert not (tmp_path / ("out%d" % threads)).exists() or not segments(tmp_path / ("out%d" % threads))

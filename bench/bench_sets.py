"""bench_sets.py - the vectors of the benchmark: made, or the user's, as plain files that every program reads; and the truth.

A set is a folder: base.f32 and query.f32 (little-endian float32, row by row), meta.json (dim, metric), and truth.*.npz, the exact
nearest neighbours, computed once. Nothing here holds more than some blocks of the vectors in memory.

Made sets look like embeddings do: clusters of skewed sizes in a space of few latent dimensions, stretched differently in each
cluster, mapped linearly into all dimensions with a decaying spectrum, an offset common to all, a little noise everywhere, and
norms that vary where the metric ignores them. A block of rows depends on the seed and its number only.
"""
import hashlib
import json
import os
import pathlib
import shutil

import numpy as np

BLOCK_ROWS = 50_000     # of the generator: part of what a seed means
BLOCK_BYTES = 128 << 20  # of everything that streams

MADE = {
    "A": dict(n=1_000_000, dim=128, metric="l2"),
    "B": dict(n=300_000, dim=960, metric="cosine"),
    "C": dict(n=1_000_000, dim=1536, metric="cosine"),
    "quick": dict(n=20_000, dim=64, metric="l2", clusters=200, queries=400),
}


class Failure(Exception):
    """Something the user can put right; the text says what."""


class Mixture:
    """The distribution of a made set."""

    def __init__(self, dim, metric, seed=1, clusters=2000, latent=48, spread=0.7, decay=0.5, noise=0.03):
        g = np.random.default_rng([seed, 0])
        latent = min(latent, dim)
        self.seed, self.dim, self.metric, self.noise = seed, dim, metric, noise
        spectrum = np.arange(1, latent + 1) ** -decay
        axes = np.linalg.qr(g.standard_normal((dim, latent)))[0].T * spectrum[:, None]
        self.map = (axes * np.sqrt(dim / (spectrum ** 2).sum())).astype(np.float32)  # variance near 1 in every dimension
        self.centres = g.standard_normal((clusters, latent)).astype(np.float32)
        self.stretch = (spread * np.exp(0.35 * g.standard_normal((clusters, latent)))).astype(np.float32)
        share = np.exp(0.9 * g.standard_normal(clusters))
        self.edges = np.cumsum(share / share.sum())
        self.offset = (0.5 * g.standard_normal(dim)).astype(np.float32)

    def rows(self, stream, number, n):
        g = np.random.default_rng([self.seed, stream, number])
        c = np.minimum(np.searchsorted(self.edges, g.random(n)), len(self.edges) - 1)
        x = (g.standard_normal((n, self.map.shape[0]), dtype=np.float32) * self.stretch[c] + self.centres[c]) @ self.map
        x += self.offset
        x += g.standard_normal(x.shape, dtype=np.float32) * np.float32(self.noise)
        if self.metric == "cosine":
            x *= np.exp(0.15 * g.standard_normal((n, 1), dtype=np.float32))
        return x


class Set:
    """An opened set. query is in memory, base is mapped."""

    def __init__(self, name, folder, base, query, dim, metric, cache=None):
        self.name, self.folder, self.cache = name, pathlib.Path(folder), pathlib.Path(cache or folder)
        self.base_file, self.query_file, self.dim, self.metric = pathlib.Path(base), pathlib.Path(query), dim, metric
        for f in (self.base_file, self.query_file):
            if not f.exists() or f.stat().st_size == 0 or f.stat().st_size % (4 * dim):
                raise Failure("%s: not rows of %d float32" % (f, dim))
        self.base = np.memmap(self.base_file, "<f4", "r").reshape(-1, dim)
        self.query = np.fromfile(self.query_file, "<f4").reshape(-1, dim)
        self.n = len(self.base)
        self.half = len(self.query) // 2  # settings are tuned on queries [0, half), reported on the others
        if self.half < 1:
            raise Failure("%s: at least two queries are needed, one to tune with and one to report" % self.query_file)
        # a batch is the last 1,000: where there are fewer than 2,000, queries that tuned are among them
        self.batch = min(1000, len(self.query))
        self.batch_first = len(self.query) - self.batch

    def far(self, n=200):
        """Queries that lie far from all rows, as a set over the same rows: real ones with their dimensions shuffled, which keeps their
        length and their values and leaves nothing of the few directions that the rows lie in."""
        folder = self.cache / "far"
        folder.mkdir(exist_ok=True)
        shuffled = np.random.default_rng(3).permutation(self.dim)
        write_rows(folder / "query.f32", [self.query[-n:][:, shuffled]])
        return Set(self.name + ", far", folder, self.base_file, folder / "query.f32", self.dim, self.metric)

    def truth(self, k, first=0, n=None):
        """(ids, distances) of the k nearest of queries first..first+n, ascending; k is cut to the rows there are."""
        n = len(self.query) - first if n is None else n
        k = min(k, self.n)
        f = self.cache / ("truth.%d.%d.%d.npz" % (k, first, n))
        if f.exists():
            with np.load(f) as z:
                return z["ids"], z["distances"]
        ids, distances = nearest(self.base, self.query[first:first + n], self.metric, k)
        part = f.with_suffix(".part.npz")
        np.savez(part, ids=ids, distances=distances)
        os.replace(part, f)
        return ids, distances

    def recall(self, ids, k, first, deep=None):
        """The mean share of the true k nearest among ids (one row per query from `first` on, -1: none). A row as near as the
        k-th counts, whatever its id; one that comes twice counts once."""
        true, far = deep or self.truth(max(k, 100))
        k = min(k, self.n)
        at = 0 if deep else first
        hits = 0
        for i, row in enumerate(ids):
            row = np.unique(row[:k])
            row = row[row >= 0]
            known = np.isin(row, true[at + i, :k])
            hits += int(known.sum())
            others = row[~known]
            if len(others):
                limit = far[at + i, k - 1]
                d = exact_distances(self.query[first + i], self.base[others], self.metric)
                hits += int((d <= limit + abs(limit) * 1e-6 + 1e-9).sum())
        return hits / (len(ids) * k)


def exact_distances(q, x, metric):
    """In float64, as DESIGN.md of the extension defines them: l2 is Euclidean, cosine 1 - cos, dot the negative product."""
    q, x = q.astype(np.float64), np.asarray(x, np.float64)
    if metric == "l2":
        return np.sqrt(((x - q) ** 2).sum(1))
    if metric == "dot":
        return -(x @ q)
    return 1 - (x @ q) / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(q), 1e-300)


def nearest(base, queries, metric, k):
    """The exact k nearest of each query. Scores come from float32 matrix products, block by block; candidates beyond k absorb
    their rounding, and the order is made again in float64. Where the candidates cannot be proved to suffice (many rows at about
    the same distance), that query is computed in float64 as a whole."""
    n, dim = base.shape
    k = min(k, n)
    keep = min(n, k + 32 + k // 8)
    centre = np.zeros(dim, np.float32)
    if metric == "l2":  # distances do not change when all vectors move; less is cancelled near the origin
        centre = np.asarray(base[:: max(1, n // 10_000)], np.float32).mean(0, dtype=np.float64).astype(np.float32)
    q = queries - centre
    if metric == "cosine":
        q = (queries / np.maximum(np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True), 1e-300)).astype(np.float32)
    n_q = len(q)
    found = [np.empty((0,), np.int64)] * n_q, [np.empty((0,), np.float32)] * n_q
    bound = np.full(n_q, np.inf, np.float32)
    longest = 0.0
    step = int(max(256, min(BLOCK_BYTES // (4 * n_q), BLOCK_BYTES // (4 * dim))))
    for at in range(0, n, step):
        x = np.asarray(base[at:at + step], np.float32) - centre
        norm2 = np.einsum("ij,ij->i", x, x, dtype=np.float64)
        longest = max(longest, float(np.sqrt(norm2.max())))
        if metric == "cosine":
            x = x / np.maximum(np.sqrt(norm2), 1e-300).astype(np.float32)[:, None]
        score = q @ x.T
        np.negative(score, out=score)
        if metric == "l2":
            score += (norm2 / 2).astype(np.float32)
        for i in range(n_q):
            s = score[i]
            near = np.flatnonzero(s <= bound[i])
            if not len(near):
                continue
            ids, scores = np.concatenate((found[0][i], near + at)), np.concatenate((found[1][i], s[near]))
            if len(ids) > keep:
                cut = np.argpartition(scores, keep - 1)[:keep]
                ids, scores = ids[cut], scores[cut]
                bound[i] = scores.max()
            found[0][i], found[1][i] = ids, scores
    # twice the rounding of a product of dim terms: for what was left out and for what was kept
    length = 1.0 if metric == "cosine" else longest
    slack = 2 * (dim + 4) * 2.0 ** -24
    out_ids, out_d = np.empty((n_q, k), np.int32), np.empty((n_q, k))
    for i in range(n_q):
        ids = np.sort(found[0][i])
        d = exact_distances(queries[i], base[ids], metric)
        order = np.lexsort((ids, d))[:k]
        if len(ids) < n:
            q_length = float(np.linalg.norm(q[i].astype(np.float64)))
            worst = d[order[-1]]
            exact_score = (worst ** 2 - q_length ** 2) / 2 if metric == "l2" else worst - 1 if metric == "cosine" else worst
            if exact_score + slack * (q_length * length + (length ** 2 if metric == "l2" else 0)) >= bound[i]:
                d = np.concatenate([exact_distances(queries[i], base[a:a + step], metric) for a in range(0, n, step)])
                ids = np.arange(n)
                order = np.lexsort((ids, d))[:k]
        out_ids[i], out_d[i] = ids[order], d[order]
    return out_ids, out_d


def write_rows(path, blocks):
    """Writes blocks of rows; the name appears when all is there."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        for x in blocks:
            np.ascontiguousarray(x, "<f4").tofile(f)
    os.replace(part, path)


def made(name, data, say):
    """Set `name` of MADE, made in data/name unless it is there."""
    want = dict(MADE[name])
    folder = pathlib.Path(data) / name
    queries = want.pop("queries", 2000)
    n = want.pop("n")
    meta = dict(want, n=n, queries=queries, maker=1)
    f = folder / "meta.json"
    if not f.exists() or json.loads(f.read_text()) != meta:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        say("making set %s: %d x %d, %s" % (name, n, want["dim"], want["metric"]))
        room(folder, 4 * want["dim"] * (n + queries))
        m = Mixture(**want)
        write_rows(folder / "query.f32", [m.rows(2, 0, queries)])
        write_rows(folder / "base.f32", (m.rows(1, i, min(BLOCK_ROWS, n - at)) for i, at in enumerate(range(0, n, BLOCK_ROWS))))
        f.write_text(json.dumps(meta))
    return Set(name, folder, folder / "base.f32", folder / "query.f32", want["dim"], want["metric"])


def room(folder, need):
    free = shutil.disk_usage(folder).free
    if free < need * 1.1:
        raise Failure("%s: %.1f GB are free, %.1f GB are needed; give another folder with --data" % (folder, free / 1e9, need / 1e9))


def given(path, queries, data, dim=None, metric=None, n_held=2000, say=print):
    """A set from the user's files: a folder as above, .f32 with dim, .npy, or HDF5 as ann-benchmarks has it. Without queries (a
    file, or `test` in HDF5) some rows are held out."""
    path = pathlib.Path(path)
    if path.is_dir():
        f = path / "meta.json"
        meta = json.loads(f.read_text()) if f.exists() else {}
        dim, metric = dim or meta.get("dim"), metric or meta.get("metric")
        if not dim or not metric:
            raise Failure("%s: no meta.json with dim and metric; give --dim and --metric" % path)
        cache = keyed(data, path.resolve(), path / "base.f32", dim, metric)
        return Set(path.name, path, path / "base.f32", queries or path / "query.f32", int(dim), metric, cache)
    if not path.exists():
        raise Failure("%s: no such file" % path)
    base, test, found_metric = read_rows(path, dim)
    metric = metric or found_metric or "cosine"
    dim = base.shape[1]
    if queries:
        test = read_rows(pathlib.Path(queries), dim)[0]
        if test.shape[1] != dim:
            raise Failure("%s has %d dimensions, %s has %d" % (queries, test.shape[1], path, dim))
    cache = keyed(data, path.resolve(), path, dim, metric, queries, n_held)
    if not (cache / "base.f32").exists():
        say("reading %s: %d x %d, %s" % (path, len(base), dim, metric))
        room(cache, 4 * dim * len(base))
        stay = np.ones(len(base), bool)
        if test is None:
            held = np.sort(np.random.default_rng(1).choice(len(base), min(n_held, len(base) // 10), replace=False))
            stay[held] = False
            test = np.asarray(base[held])
        write_rows(cache / "query.f32", [test[:n_held]])
        step = max(1, BLOCK_BYTES // (4 * dim))
        write_rows(cache / "base.f32", (np.asarray(base[at:at + step])[stay[at:at + step]] for at in range(0, len(base), step)))
    return Set(path.stem, cache, cache / "base.f32", cache / "query.f32", dim, metric)


def keyed(data, path, file, *more):
    """A folder for what is derived from this file as it is now."""
    st = os.stat(file)
    key = hashlib.sha256(repr((str(path), st.st_size, st.st_mtime_ns) + tuple(str(m) for m in more)).encode()).hexdigest()[:12]
    folder = pathlib.Path(data) / ("%s-%s" % (pathlib.Path(path).stem, key))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_rows(path, dim):
    """(rows, test rows or None, metric or None) of a file, mapped or read as they are sliced."""
    if path.suffix == ".npy":
        x = np.load(path, mmap_mode="r")
        if x.ndim != 2:
            raise Failure("%s: %d axes, not two" % (path, x.ndim))
        return x, None, None
    if path.suffix in (".h5", ".hdf5"):
        import h5py
        f = h5py.File(path, "r")
        names = [n for n in ("train", "embedding") if n in f]
        if not names or f[names[0]].ndim != 2:
            raise Failure("%s: no dataset `train` (ann-benchmarks) or `embedding` with two axes" % path)
        metric = {"angular": "cosine", "euclidean": "l2"}.get(f.attrs.get("distance"))
        return f[names[0]], f["test"][:] if "test" in f else None, metric
    if path.suffix == ".f32":
        if not dim:
            raise Failure("%s: give --dim" % path)
        if path.stat().st_size % (4 * dim):
            raise Failure("%s: %d bytes are no rows of %d float32" % (path, path.stat().st_size, dim))
        return np.memmap(path, "<f4", "r").reshape(-1, dim), None, None
    raise Failure("%s: not .f32, .npy, .h5, .hdf5 or a folder" % path)

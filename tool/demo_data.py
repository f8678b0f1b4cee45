#!/usr/bin/python3
"""Makes HDF5 files that look like the embeddings a protein language model writes, for the demo and the documentation tests.

    /usr/bin/python3 tool/demo_data.py DIR [--rows N] [--queries N] [--dim D] [--seed S]

Writes DIR/part1.h5 ... part6.h5 of uneven sizes with the datasets `id` (text, like A0A0000017), `embedding` (float32,
chunked, gzip) and `length` (an integer), and DIR/queries.h5 with vectors of the same kind that are in none of them.

The vectors: a mixture of clusters of uneven sizes in 48 latent dimensions, mapped linearly to D dimensions with a falling
spectrum, plus a common offset, a little noise and varying norms. Neither uniform noise, on which every index looks bad, nor
tight balls, on which every index looks good. The same options give the same vectors.
"""
import argparse
import os

import h5py
import numpy as np

SHARES = [0.232, 0.2046, 0.1815, 0.1518, 0.1286, 0.1010]  # of the rows; fill three buckets of a third each
LATENT = 48


class Mixture:
    def __init__(self, dim, clusters, seed):
        rng = np.random.default_rng([seed, 0])
        spectrum = np.arange(1, LATENT + 1) ** -0.5
        basis, _ = np.linalg.qr(rng.standard_normal((dim, min(LATENT, dim))))
        self.to_dim = basis.T * spectrum[: basis.shape[1], None] * np.sqrt(dim / (spectrum**2).sum())
        latent = basis.shape[1]
        self.centers = rng.standard_normal((clusters, latent))
        self.spread = 0.7 * np.exp(0.35 * rng.standard_normal((clusters, latent)))
        share = np.exp(0.9 * rng.standard_normal(clusters))
        self.share = share / share.sum()
        self.offset = 0.5 * rng.standard_normal(dim)

    def draw(self, n, rng):
        c = rng.choice(len(self.share), size=n, p=self.share)
        latent = self.centers[c] + self.spread[c] * rng.standard_normal((n, self.centers.shape[1]))
        x = latent @ self.to_dim + self.offset + 0.03 * rng.standard_normal((n, len(self.offset)))
        return (x * np.exp(0.15 * rng.standard_normal((n, 1)))).astype("<f4")


def write(path, ids, x, length):
    with h5py.File(path, "w") as f:
        f.create_dataset("id", data=np.array(ids, dtype=object), dtype=h5py.string_dtype("utf-8"))
        f.create_dataset("embedding", data=x, chunks=(min(512, len(x)), x.shape[1]), compression="gzip", compression_opts=1)
        f.create_dataset("length", data=length)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("dir")
    ap.add_argument("--rows", type=int, default=60000)
    ap.add_argument("--queries", type=int, default=50)
    ap.add_argument("--dim", type=int, default=960)
    ap.add_argument("--seed", type=int, default=1)
    a = ap.parse_args()
    if a.rows < 100 or a.queries < 1 or a.dim < 1:
        ap.error("--rows starts at 100, --queries and --dim at 1")

    os.makedirs(a.dir, exist_ok=True)
    mixture = Mixture(a.dim, max(10, a.rows // 100), a.seed)
    sizes = [int(a.rows * s) for s in SHARES]
    numbers = np.random.default_rng([a.seed, 1]).permutation(10 * sum(sizes)) + 1
    first = 0
    for part, n in enumerate(sizes):
        rng = np.random.default_rng([a.seed, 2, part])
        ids = ["A0A%07d" % i for i in numbers[first : first + n]]
        length = np.clip(rng.lognormal(5.7, 0.6, n), 30, 5000).astype("<i4")
        write(os.path.join(a.dir, "part%d.h5" % (part + 1)), ids, mixture.draw(n, rng), length)
        first += n
    rng = np.random.default_rng([a.seed, 3])
    ids = ["query%03d" % (i + 1) for i in range(a.queries)]
    write(os.path.join(a.dir, "queries.h5"), ids, mixture.draw(a.queries, rng), np.full(a.queries, 300, "<i4"))
    print("%d rows of %d dimensions in %d files, and %d queries" % (sum(sizes), a.dim, len(sizes), a.queries))


if __name__ == "__main__":
    main()

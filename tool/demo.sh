#!/bin/sh
# demo.sh [FILE.h5 ...] - vecshard from end to end on local files: pack, build, query, recall and times. No server.
#
# Without arguments it makes six HDF5 files in build/demo (60,000 protein-like embeddings of 960 dimensions, 50 queries that
# are in none of them). With arguments it reads those files; the queries are then rows of theirs, which are left out of their
# own answers. Everything it makes is in build/demo, which it clears first.
set -eu

cd "$(dirname "$0")/.."
tool=build/vecshard
demo=build/demo
python=/usr/bin/python3
n_queries=50

fail() { echo "demo: $*" >&2; exit 1; }
[ -x $tool ] && [ -e build/vecshard.so ] && [ -e build/vecshard_hdf5.so ] || fail "nothing is built: run 'make demo', or 'make' first"
for file; do [ -r "$file" ] || fail "cannot read $file"; done
now() { date +%s%N; }
took() { echo "$1 $(now)" | awk '{printf "%.1f s", ($2 - $1) / 1e9}'; }

rm -rf $demo
mkdir -p $demo

own=1
start=$(now)
if [ $# -eq 0 ]; then
  own=0
  echo "== data (tool/demo_data.py)"
  $python tool/demo_data.py $demo --queries $n_queries || fail "the data could not be made"
  set -- $demo/part*.h5
  bucket_rows=20000
  echo "   $(du -cm "$@" | awk 'END {print $1}') MB of HDF5 in $(took "$start")"
else
  # One bucket per file tells their rows: a bucket then takes a third of all, or the largest file.
  $tool pack "$@" --bucket-rows 1 --out $demo/plan.json >$demo/log 2>&1 || { cat $demo/log >&2; fail "see above"; }
  bucket_rows=$($python -c 'import json, sys
rows = [b["rows"] for b in json.load(open(sys.argv[1]))["buckets"]]
print(max(-(-sum(rows) // 3), *rows, 1))' $demo/plan.json)
fi

echo "== pack: files to buckets of about $bucket_rows rows"
$tool pack "$@" --bucket-rows "$bucket_rows" --out $demo/plan.json || fail "see above"
buckets=$($python -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["buckets"]))' $demo/plan.json)

echo "== build: $buckets shards, one after another (each could run on a machine of its own)"
start=$(now)
bucket=1
while [ $bucket -le "$buckets" ]; do
  $tool build --plan $demo/plan.json --bucket $bucket --out $demo/db || fail "see above"
  bucket=$((bucket + 1))
done
echo "   $(took "$start")"

# The queries, as a table of an ordinary database: name, embedding and, when it is a row of a shard, which.
if [ $own = 0 ]; then
  sqlite3 -bail -cmd '.load build/vecshard_hdf5' $demo/queries.db \
    "CREATE TABLE queries AS SELECT id AS name, embedding, NULL AS shard, NULL AS id FROM hdf5_vectors('$demo/queries.h5')" ||
    fail "the queries could not be read"
else
  $python - $demo $n_queries <<'PY' || fail "the queries could not be picked"
import sqlite3, sys
demo, n = sys.argv[1], int(sys.argv[2])
c = sqlite3.connect(demo + "/queries.db", isolation_level=None)
c.enable_load_extension(True)
c.load_extension("build/vecshard")
c.execute("CREATE TABLE queries(name, embedding, shard, id)")
shards = c.execute("SELECT shard, path, rows FROM shard_list(?)", (demo + "/db",)).fetchall()
total = sum(s[2] for s in shards)
for shard, path, rows in shards:
    c.execute("CREATE VIRTUAL TABLE temp.s USING vecshard(path='%s')" % path.replace("'", "''"))
    share = max(1, n * rows // total)
    for i in range(share):
        c.execute("INSERT INTO queries SELECT id, embedding, ?, id FROM s LIMIT 1 OFFSET ?", (shard, rows * i // share))
    c.execute("DROP TABLE s")
PY
fi

echo "== a first query: sqlite3 < sql/first_query.sql"
sqlite3 -bail < sql/first_query.sql || fail "the first query failed"

echo "== recall@10 and times"
$python - $demo <<'PY' || fail "the measurement failed"
import sqlite3, statistics, sys, time
demo = sys.argv[1]
c = sqlite3.connect(demo + "/queries.db", isolation_level=None)
c.enable_load_extension(True)
c.load_extension("build/vecshard")
queries = c.execute("SELECT embedding, shard, id FROM queries").fetchall()
sql = "SELECT shard, id, distance FROM shard_union(:source, :q, :k)"

def search(sql, query):
    vector, shard, own_id = query
    k = 10 if shard is None else 11  # one more, because the row itself is left out
    start = time.perf_counter()
    rows = c.execute(sql, {"source": demo + "/db", "q": vector, "k": k}).fetchall()
    ms = (time.perf_counter() - start) * 1e3
    return [r for r in rows if (r[0], r[1]) != (shard, own_id)][:10], ms

search(sql, queries[0])  # opens the shards
answers = [search(sql, q) for q in queries]
truths = [search(sql + " WHERE exact = 1", q) for q in queries]
hits = wanted = 0
for (rows, _), (truth, _) in zip(answers, truths):
    wanted += len(truth)
    hits += min(len(truth), sum(r[2] <= truth[-1][2] + 1e-6 for r in rows)) if truth else 0
if not wanted:
    sys.exit("the shards hold too few rows to measure")
which = "held out of the shards" if queries[0][1] is None else "rows of the shards, each left out of its own answer"
print("   %d queries, %s; %s, SQLite %s" % (len(queries), which, c.execute("SELECT vecshard_cpu()").fetchone()[0].split()[0] + " kernels", sqlite3.sqlite_version))
print("   shard_union          recall@10 %.3f   median %.3f ms per query" % (hits / wanted, statistics.median(a[1] for a in answers)))
print("   shard_union exact=1  recall@10 1.000   median %.3f ms per query" % statistics.median(t[1] for t in truths))
if hits < 0.9 * wanted and queries[0][1] is None:
    sys.exit("recall@10 is below 0.9")
PY
echo "== next: sqlite3 < sql/many_shards.sql, and README.md"

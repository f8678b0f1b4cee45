#!/bin/sh
# demo-s3.sh - vecshard from end to end over S3: HDF5 -> pack -> build -> publish -> shard_union('s3://...') in the shell -> CSV.
#
# The store is a real one, a one-node Ceph with its S3 gateway (test/s3/rgw.py), started on this machine for the demo and ended
# with it. With AWS_ENDPOINT_URL or VECSHARD_DEMO_URI (s3://bucket/prefix) set, that store is used instead. Everything local is
# in build/demo-s3, which it clears first.
set -eu

cd "$(dirname "$0")/.."
tool=build/vecshard
demo=build/demo-s3
python=/usr/bin/python3
rows=20000

fail() { echo "demo-s3: $*" >&2; exit 1; }
[ -x $tool ] && [ -e build/vecshard.so ] || fail "nothing is built: run 'make demo-s3', or 'make' first"
now() { date +%s%N; }
took() { echo "$1 $(now)" | awk '{printf "%.1f s", ($2 - $1) / 1e9}'; }

rm -rf $demo
mkdir -p $demo
uri=${VECSHARD_DEMO_URI-s3://vecshard-demo/proteins}

if [ -z "${AWS_ENDPOINT_URL-}${VECSHARD_DEMO_URI-}" ]; then
  echo "== a store on this machine (test/s3/rgw.py)"
  start=$(now)
  store=$(mktemp -d)
  trap '$python test/s3/rgw.py stop "$store" --remove >/dev/null 2>&1 || true; rm -rf "$store"' EXIT
  trap 'exit 130' INT TERM HUP
  $python test/s3/rgw.py start "$store/rgw" --owner $$ >$demo/store.env || fail "the store did not start"
  eval "$($python test/s3/rgw.py env "$store/rgw")"
  (cd test && $python -c '
import os
from s3.client import Client
Client(os.environ["AWS_ENDPOINT_URL"], os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]).create_bucket("vecshard-demo")') ||
    fail "the bucket could not be made"
  store="$store/rgw"
  echo "   $AWS_ENDPOINT_URL in $(took "$start")"
fi

echo "== data, pack, build: $rows vectors of 960 dimensions in three shards"
start=$(now)
$python tool/demo_data.py $demo --rows $rows --queries 20 || fail "the data could not be made"
$tool pack $demo/part*.h5 --bucket-rows $((rows / 3 + 1)) --out $demo/plan.json >$demo/log || fail "see above"
for bucket in 1 2 3; do $tool build --plan $demo/plan.json --bucket $bucket --out $demo/db >>$demo/log || fail "see above"; done
echo "   $(took "$start")"

echo "== vecshard publish $demo/db $uri"
$tool publish $demo/db "$uri" || fail "see above"
$tool publish $demo/db "$uri" || fail "see above"

echo "== a query from the sqlite3 shell, cold, and what it took; then once more, warm"
cat >$demo/query.sql <<SQL
.mode box
CREATE TEMP TABLE q AS SELECT embedding FROM hdf5_vectors('$demo/queries.h5') LIMIT 1;
SELECT shard, id, round(distance, 4) AS distance FROM shard_union('$uri', (SELECT embedding FROM q), 5);
SELECT phase, rounds, requests, bytes, cache_hits, round(ms, 1) AS ms FROM shard_trace;
SELECT count(*) AS rows FROM shard_union('$uri', (SELECT embedding FROM q), 5);
SELECT phase, rounds, requests, bytes, cache_hits, round(ms, 1) AS ms FROM shard_trace WHERE phase = 'total';
SQL
sqlite3 -bail -cmd '.load build/vecshard' -cmd '.load build/vecshard_hdf5' :memory: <$demo/query.sql || fail "the query failed"

echo "== 20 queries to CSV: from the store, and from the local folder"
$tool query "$uri" --queries $demo/queries.h5 -k 10 --out $demo/far.csv || fail "see above"
$tool query $demo/db --queries $demo/queries.h5 -k 10 --out $demo/near.csv || fail "see above"
head -n 4 $demo/far.csv
cmp $demo/far.csv $demo/near.csv || fail "the answers differ"
echo "   $(($(wc -l <$demo/far.csv) - 1)) rows, the same from both"

echo "== an ordinary SQLite database on the store, opened where it lies"
sqlite3 $demo/names.db "CREATE TABLE names(id INTEGER PRIMARY KEY, name); WITH RECURSIVE n(i) AS (VALUES(1) UNION ALL SELECT i + 1 FROM n WHERE i < 50000)
  INSERT INTO names SELECT i, 'name ' || i FROM n"
(cd test && $python -c '
import os, sys
from s3.client import Client
c = Client(os.environ["AWS_ENDPOINT_URL"], os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
bucket, key = sys.argv[1][5:].split("/", 1)
c.put(bucket, key + "/names.db", open(sys.argv[2], "rb").read())' "$uri" "../$demo/names.db") || fail "the database could not be put there"
sqlite3 -bail -cmd '.load build/vecshard' :memory: "ATTACH 'file:$uri/names.db?vfs=s3' AS far; SELECT name FROM far.names WHERE id = 31415;" ||
  fail "the database could not be opened"

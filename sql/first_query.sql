-- The ten proteins nearest to one embedding, over every shard of the demo's database.
-- After `make demo`, from the project's folder: sqlite3 < sql/first_query.sql
.open build/demo/queries.db
.load build/vecshard
.mode box

SELECT shard, id, round(distance, 4) AS distance
  FROM shard_union('build/demo/db', (SELECT embedding FROM queries LIMIT 1), 10)
 ORDER BY distance;

-- Several shards as one source: what they hold, several queries in one statement, the same with filters, and the truth.
-- After `make demo`, from the project's folder: sqlite3 < sql/many_shards.sql
.open build/demo/queries.db
.load build/vecshard
.mode box

-- What is in the database.
SELECT shard, rows, dim, metric, segments FROM shard_list('build/demo/db');

-- The two nearest rows of three queries, in one pass over the shards.
SELECT query_key, shard, id, round(distance, 4) AS distance
  FROM shard_union('build/demo/db',
                   (SELECT vec_pack(embedding, name) FROM (SELECT * FROM queries LIMIT 3)), 2)
 ORDER BY query_no, distance;

-- One shard as a table, here of this connection only: temp.
CREATE VIRTUAL TABLE temp.bucket1 USING vecshard(path='build/demo/db/bucket1');
SELECT id, round(distance, 4) AS distance FROM bucket1
 WHERE embedding MATCH (SELECT embedding FROM queries LIMIT 1) AND k = 3;

-- More partitions, more candidates: nearer to the truth, slower. exact = 1 is the truth.
SELECT count(*) AS found_by_both
  FROM (SELECT shard, id FROM shard_union('build/demo/db', (SELECT embedding FROM queries LIMIT 1), 100)
         WHERE nprobe = 64 AND refine = 20
        INTERSECT
        SELECT shard, id FROM shard_union('build/demo/db', (SELECT embedding FROM queries LIMIT 1), 100)
         WHERE exact = 1);

-- What the files say about themselves, and whether every byte is as it was written: no row when sound.
SELECT shard, segment, rows, nlist, M, bits, bytes FROM shard_info('build/demo/db');
SELECT * FROM shard_verify('build/demo/db');

DROP TABLE bucket1;

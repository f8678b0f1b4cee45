// bench_lancedb.mjs - LanceDB as a peer of the benchmark: the protocol of bench_faiss.cpp, on standard input and output.
//
//   node bench_lancedb.mjs BASE.f32 QUERIES.f32 DIM l2|cosine|dot FOLDER     (FOLDER has node_modules with @lancedb/lancedb)
//
// The table and its index are made in FOLDER once: IVF_PQ as its defaults have it, sqrt(rows) partitions and dim/16 sub-vectors of 8
// bits. `run` tunes nprobes and refineFactor (refine=0: none); batch=1 asks for all vectors in one plan with addQueryVector.
import fs from 'node:fs';
import path from 'node:path';
import readline from 'node:readline';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [baseFile, queryFile, dimText, metric, folder] = process.argv.slice(2);
if (!folder) {
  console.error('usage: bench_lancedb.mjs BASE.f32 QUERIES.f32 DIM l2|cosine|dot FOLDER');
  process.exit(2);
}
const dim = Number(dimText);
const from = createRequire(path.join(path.resolve(folder), 'x.js'));
const load = name => import(pathToFileURL(from.resolve(name)).href);
const arrow = await load('apache-arrow');
const lancedb = await load('@lancedb/lancedb');

function readFloats(file, first, n) {
  const bytes = Buffer.allocUnsafeSlow(n * 4), fd = fs.openSync(file, 'r');
  for (let have = 0; have < bytes.length;) {
    const got = fs.readSync(fd, bytes, have, bytes.length - have, first * 4 + have);
    if (!got) throw new Error(`${file}: too short`);
    have += got;
  }
  fs.closeSync(fd);
  return new Float32Array(bytes.buffer, 0, n);
}
const rows = fs.statSync(baseFile).size / 4 / dim, nQueries = fs.statSync(queryFile).size / 4 / dim;
const queries = readFloats(queryFile, 0, nQueries * dim);
const query = i => queries.subarray(i * dim, (i + 1) * dim);
const cpuSeconds = () => { const u = process.cpuUsage(); return (u.user + u.system) / 1e6; };
const wallNs = () => process.hrtime.bigint();

const vectorType = new arrow.FixedSizeList(dim, new arrow.Field('item', new arrow.Float32(), true));
const schema = new arrow.Schema([new arrow.Field('id', new arrow.Int32(), false), new arrow.Field('vector', vectorType, false)]);

function block(first, n) {
  const ids = Int32Array.from({ length: n }, (_, i) => first + i);
  const floats = readFloats(baseFile, first * dim, n * dim);
  const values = arrow.makeData({ type: new arrow.Float32(), length: n * dim, nullCount: 0, data: floats });
  const columns = [
    arrow.makeData({ type: new arrow.Int32(), length: n, nullCount: 0, data: ids }),
    arrow.makeData({ type: vectorType, length: n, nullCount: 0, child: values }),
  ];
  const struct = arrow.makeData({ type: new arrow.Struct(schema.fields), length: n, nullCount: 0, children: columns });
  return new arrow.Table(schema, [new arrow.RecordBatch(schema, struct)]);
}

// The table, indexed: from an earlier run when the marker says that it was finished.
async function openTable() {
  const db = await lancedb.connect(path.join(folder, 'db')), done = path.join(folder, 'done');
  const t0 = wallNs(), c0 = cpuSeconds();
  if (fs.existsSync(done)) return { table: await db.openTable('t'), built: JSON.parse(fs.readFileSync(done)) };
  const step = Math.max(10000, Math.floor(1e8 / 4 / dim));
  let table;
  for (let at = 0; at < rows; at += step) {
    const b = block(at, Math.min(step, rows - at));
    if (at) await table.add(b);
    else table = await db.createTable('t', b, { mode: 'overwrite' });
  }
  const partitions = Math.floor(Math.sqrt(rows));
  const subVectors = [16, 8, 4, 2, 1].map(d => dim / d).find(Number.isInteger);
  const config = lancedb.Index.ivfPq({ distanceType: metric, numPartitions: partitions, numSubVectors: subVectors });
  await table.createIndex('vector', { config, replace: true });
  const built = { partitions, subVectors, wall_s: Number(wallNs() - t0) / 1e9, cpu_s: cpuSeconds() - c0 };
  fs.writeFileSync(done, JSON.stringify(built));
  return { table, built };
}
const { table, built } = await openTable();
const version = JSON.parse(fs.readFileSync(path.join(folder, 'node_modules/@lancedb/lancedb/package.json'))).version;

function plan(vectors, w) {
  let q = table.query().nearestTo(vectors[0]);
  for (const v of vectors.slice(1)) q = q.addQueryVector(v);
  q = q.distanceType(metric).nprobes(w.nprobe).limit(w.k).select(['id', '_distance']);
  return w.refine > 0 ? q.refineFactor(w.refine) : q;
}

async function pass(w, ids, ns) {
  if (w.batch) {
    const found = await plan(Array.from({ length: w.n }, (_, i) => query(w.first + i)), w).toArrow();
    const id = found.getChild('id').toArray(), which = found.getChild('query_index').toArray(), have = new Uint32Array(w.n);
    for (let j = 0; j < id.length; j++) if (have[which[j]] < w.k) ids[which[j] * w.k + have[which[j]]++] = BigInt(id[j]);
    return;
  }
  for (let i = 0; i < w.n; i++) {
    const start = wallNs(), id = (await plan([query(w.first + i)], w).toArrow()).getChild('id').toArray();
    ns[i] = wallNs() - start;
    for (let j = 0; j < id.length && j < w.k; j++) ids[i * w.k + j] = BigInt(id[j]);
  }
}

async function run(w) {
  const ids = new BigInt64Array(w.n * w.k).fill(-1n), ns = new BigUint64Array(w.batch ? 0 : w.n);
  let wall = Infinity, cpu = Infinity;
  for (let i = 0; i < (w.passes || 1); i++) {
    const t0 = wallNs(), c0 = cpuSeconds();
    await pass(w, ids, ns);
    wall = Math.min(wall, Number(wallNs() - t0) / 1e9), cpu = Math.min(cpu, cpuSeconds() - c0);
  }
  fs.writeFileSync(w.out, Buffer.concat([Buffer.from(ids.buffer), Buffer.from(ns.buffer)]));
  return { wall_s: wall, cpu_s: cpu };
}

console.log(JSON.stringify({ name: 'LanceDB', version, node: process.version, rows, queries: nQueries, built }));
for await (const line of readline.createInterface({ input: process.stdin })) {
  const [command, ...rest] = line.trim().split(' ');
  const w = Object.fromEntries(rest.map(x => [x.slice(0, x.indexOf('=')), x.slice(x.indexOf('=') + 1)]));
  for (const name of Object.keys(w)) if (name !== 'out') w[name] = Number(w[name]);
  try {
    if (command !== 'run') throw new Error(`unknown command ${command}`);
    console.log(JSON.stringify(await run(w)));
  } catch (e) {
    console.log(JSON.stringify({ error: String(e).slice(0, 500) }));
  }
}
process.exit(0);

"""bench_report.py - the tables of the benchmark."""
import bench_kernels

# Published for 10,000,000 x 1,536 by people who run such a search: beside set C, which is a tenth of it.
PUBLISHED = "published elsewhere for 10,000,000 x 1,536 on another machine: 3.2 ms from a local disk, 8.7 ms from S3, per query"


def columns(head, rows, indent="  "):
    """Aligned text: the first column to the left, the others to the right."""
    cells = [[str(c) for c in r] for r in [head] + rows]
    width = [max(len(r[i]) for r in cells) for i in range(len(head))]
    return "\n".join(indent + "  ".join([r[0].ljust(width[0])] + [c.rjust(w) for c, w in zip(r[1:], width[1:])]).rstrip() for r in cells)


def size(n):
    return "%.0f B" % n if n < 1e4 else "%.1f kB" % (n / 1e3) if n < 1e7 else "%.1f MB" % (n / 1e6)


def points(rows, name="recall", label=None):
    head = ([label] if label else []) + ["nprobe", "refine", name, "q/s", "p50 us", "p99 us", "CPU us", "partitions", "rows", "scanned",
                                         "refined"]
    out = []
    for text, p in rows:
        if not p:
            out.append([text] + ["not reached"] + [""] * (len(head) - 2))
            continue
        out.append(([text] if label else []) + [
            p.get("nprobe", "-"), p.get("refine", "-"), "%.4f" % p["recall"], "%.0f" % p["qps"], "%.1f" % p["p50_us"], "%.1f" % p["p99_us"],
            "%.1f" % p["cpu_us"], "%.1f" % p["partitions"], "%.0f" % p["rows"], size(p["scan_bytes"]), size(p["refine_bytes"])])
    return columns(head, out)


def search(r):
    """The text of what bench_search.whole returns."""
    out = []
    seg = r["vecshard"]["segments"][0]
    n = r["queries"]
    out.append("%s: %d x %d, %s; %d queries to tune with, %d reported" % (r["set"], r["rows"], r["dim"], r["metric"], n["tuning"],
                                                                          n["reported"]))
    b = r["build"]
    out.append("  built in %.1f s, %.1f s of CPU: %.0f vectors per CPU second; %s; %d partitions, %d bytes of code and term a row" % (
        b["wall_s"], b["cpu_s"], b["vectors_per_cpu_s"], size(b["bytes"]), seg["nlist"], seg["code_bytes"] + seg["term_bytes"]))
    out.append("  vecshard %s, %s kernels, SQLite %s; one thread, one query at a time, a prepared statement" % (
        r["vecshard"]["version"], r["vecshard"]["cpu"], r["vecshard"]["sqlite"]))
    for k, rows in sorted(r.get("grid", {}).items(), key=lambda i: int(i[0])):
        out += ["", "  nprobe x refine at k = %s (tuning queries)" % k, points([("", p) for p in rows], "recall@" + k)]
    for k, best in sorted(r["tuned"].items(), key=lambda i: int(i[0])):
        out += ["", "  cheapest settings that reached a recall@%s on the tuning queries, on the others" % k,
                points([(">= " + goal, p) for goal, p in best.items()], "recall@" + k, "goal")]
        for goal, p in best.items():
            if p and p.get("plain_read_bytes"):
                out.append("  >= %s: %s a query are read in all when files are not mapped" % (goal, size(p["plain_read_bytes"])))
    if r["set"] == "C":
        out.append("  " + PUBLISHED)
    if r.get("batch"):
        mixed = ", those that tuned among them" if n["batch"] > n["reported"] else ""
        out += ["", "  %d queries in one statement%s" % (n["batch"], mixed),
                columns(["goal", "threads", "nprobe", "refine", "recall@10", "q/s", "CPU us"],
                        [[">= " + goal, p["threads"], p["nprobe"], p["refine"], "%.4f" % p["recall"], "%.0f" % p["qps"],
                          "%.1f" % p["cpu_us"]] for goal, found in r["batch"].items() for p in found.values()])]
    if r.get("share"):
        s = r["share"]
        out += ["", "  SQL's share at nprobe %d, refine %d: %.1f us a query through SQL, %.1f us by the C function below: %.1f us" % (
            s["nprobe"], s["refine"], s["sql_us"], s["core_us"], s["share_us"]),
            "  with the statement prepared anew for each query: %.1f us more than the C function" % s["share_prepared_anew_us"]]
    if r.get("recall"):
        out += ["", "  recall = r, and the cheapest (nprobe, refine) that reached r on the tuning queries",
                columns(["asked", "reached", "CPU us", "cheapest", "reaches", "CPU us", "cost"],
                        [["%.2f" % p["recall_asked"], "%.4f" % p["recall"], "%.1f" % p["cpu_us"],
                          *(("%d x %d" % (p["by_nprobe"], p["by_refine"]), "%.4f" % p["by_recall"], "%.1f" % p["by_cpu_us"], "%.2f" % p["cost"])
                            if "cost" in p else ("none", "", "", ""))] for p in r["recall"]])]
    if r.get("recall_far"):
        out += ["", "  the same for %d queries far from all rows (real ones, dimensions shuffled)" % 200,
                columns(["asked", "reached", "CPU us", "partitions", "rows"],
                        [["%.2f" % p["recall_asked"] if p.get("recall_asked") else "nothing", "%.4f" % p["recall"], "%.1f" % p["cpu_us"],
                          "%.1f" % p["partitions"], "%.0f" % p["rows"]] for p in r["recall_far"]])]
    if r.get("recall_error"):
        out += ["", "  recall = r: " + r["recall_error"]]
    if r.get("curve"):
        out += ["", "  nothing given but k",
                columns(["k", "recall", "mean us", "p99 us", "CPU us", "scan alone us", "times the scan", "scanned", "refined"],
                        [[p["k"], "%.4f" % p["recall"], "%.1f" % p["mean_us"], "%.1f" % p["p99_us"], "%.1f" % p["cpu_us"],
                          "%.1f" % p["scan_us"], "%.2f" % p["of_scan"] if p["of_scan"] else "-", size(p["scan_bytes"]),
                          size(p["refine_bytes"])] for p in r["curve"]])]
    return "\n".join(out)


def ratios(r):
    """Rows (what, ours, theirs, times, times by CPU time) of one set against its peers; also for the JSON."""
    out = []
    for peer in r.get("peers", []):
        for goal, theirs in peer["best"].items():
            if not theirs:
                continue
            ours = dict(single=r["tuned"]["10"].get(goal), **r.get("batch", {}).get(goal, {}))
            for way, their in theirs.items():
                our = their.get("ours") or ours.get("batch_2" if way == "batch" else way)
                if our:
                    out.append(dict(set=r["set"], peer=peer["name"], goal=goal, way=way, ours_qps=our["qps"], ours_recall=our["recall"],
                                    theirs_qps=their["qps"], theirs_recall=their["recall"], ratio=our["qps"] / their["qps"],
                                    ratio_cpu=our["qps_cpu"] / their["qps_cpu"], ratio_of_neighbours=our.get("ratio_of_neighbours"),
                                    setting=setting(their), our_setting=setting(our)))
    return out


def setting(p):
    return "%snprobe %d, refine %g" % (p["index"] + ", " if "index" in p else "", p["nprobe"], p["refine"])


WAYS = {"single": "one at a time", "batch_1": "batch, 1 thread", "batch_2": "batch, 2 threads", "batch": "batch, all threads"}


def ratio_table(rows):
    return columns(["set", "peer", "recall@10", "queries", "ours q/s", "recall", "theirs q/s", "recall", "times", "by CPU", "side by side",
                    "their setting"],
                   [[x["set"], x["peer"], ">= " + x["goal"], WAYS[x["way"]], "%.0f" % x["ours_qps"], "%.4f" % x["ours_recall"],
                     "%.0f" % x["theirs_qps"], "%.4f" % x["theirs_recall"], "%.2f" % x["ratio"], "%.2f" % x["ratio_cpu"],
                     "%.2f" % x["ratio_of_neighbours"] if x["ratio_of_neighbours"] else "-", x["setting"]] for x in rows])


def kernels(found):
    c = found["ceilings"]
    head, rows = bench_kernels.table(found)
    lines = ["kernels, one core: the time of a call, its speed, and that as a part of what the machine can do"]
    lines.append("  ceilings: fp32 %.0f GFLOP/s, bytes %.0f Gop/s, look-ups %.1f G/s, tiles of bytes %.0f Gop/s, memory %.1f GB/s, "
                 "third cache %.0f GB/s, second %.0f GB/s, random rows of 512 bytes %.1f GB/s, of 4,096 %.1f GB/s" % tuple(c[n] / 1e9 for n in (
                     "fma_f32", "dot_i8", "lookup_u8", "tile_i8", "read_dram", "read_l3", "read_l2", "rows_512", "rows_4096")))
    return "\n".join(lines + [columns(head, rows)])

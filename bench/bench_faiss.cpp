/* bench_faiss.cpp - FAISS as a peer of the benchmark: one process per set, driven by bench_peers.py over standard input and output.
 *
 *   bench_faiss BASE.f32 QUERIES.f32 DIM l2|cosine|dot CACHE_DIR THREADS
 *
 * Prints one JSON line when it is ready, then answers each line of words name=value with one JSON line:
 *
 *   index nlist=N codes=TEXT [hnsw=M]        builds IVF{N},{TEXT} (with hnsw: a graph of M links finds the lists), or reads the
 *                                            file that an earlier run left in CACHE_DIR; TEXT as the index factory takes it
 *   run first=F n=N k=K nprobe=P refine=R threads=T batch=0|1 implem=I passes=C out=FILE
 *                                            queries F..F+N, one call each or (batch=1) all in one call; refine is k_factor, 0: none
 *                                            the best of C passes counts
 *
 * FILE gets N*K int64 row numbers (-1: none), then without batch N uint64 nanoseconds, one per query. Building, reading and the
 * first touch of everything happen outside the times. The vectors are kept once: every index refines with the same flat one, in
 * float32, which is what the factory's RFlat is. Under cosine vectors and queries come to length 1 beforehand and are searched
 * by l2: the same order, and the kernels that FAISS tunes most. Centroids are trained once per list count and shared by all code
 * sizes. Queries and result arrays are allocated once; what FAISS allocates inside a search is its own.
 */
#include <faiss/IVFlib.h>
#include <faiss/IndexFlat.h>
#include <faiss/IndexHNSW.h>
#include <faiss/IndexIVF.h>
#include <faiss/IndexIVFFastScan.h>
#include <faiss/IndexIVFPQ.h>
#include <faiss/IndexIVFPQFastScan.h>
#include <faiss/IndexRefine.h>
#include <faiss/index_factory.h>
#include <faiss/index_io.h>
#include <faiss/utils/distances.h>
#include <faiss/utils/utils.h>
#include <omp.h>
#include <sys/stat.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

/* OpenBLAS has threads of its own, and a batch on "one thread" would use them. */
extern "C" void openblas_set_num_threads(int) __attribute__((weak));

namespace {

using words = std::map<std::string, std::string>;

double seconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
double wall_s() { return seconds(CLOCK_MONOTONIC); }
double cpu_s() { return seconds(CLOCK_PROCESS_CPUTIME_ID); }

long number(const words &w, const char *name, long otherwise) {
  auto it = w.find(name);
  return it == w.end() ? otherwise : atol(it->second.c_str());
}
std::string text(const words &w, const char *name) {
  auto it = w.find(name);
  if (it == w.end()) throw std::runtime_error(std::string("no ") + name + "= given");
  return it->second;
}

/* Of OpenMP, and of the BLAS beneath FAISS. */
void set_threads(int n) {
  omp_set_num_threads(n);
  if (openblas_set_num_threads) openblas_set_num_threads(n);
}

std::string quoted(const std::string &s) {
  std::string out = "\"";
  for (char c : s)
    if (c == '"' || c == '\\') (out += '\\') += c;
    else out += (unsigned char)c < 32 ? ' ' : c;
  return out + "\"";
}

struct file {
  FILE *f;
  std::string name;
  file(const std::string &path, const char *mode) : f(fopen(path.c_str(), mode)), name(path) {
    if (!f) throw std::runtime_error(path + ": " + strerror(errno));
  }
  ~file() { if (f) fclose(f); }
  void read(void *to, size_t n) {
    if (fread(to, 1, n, f) != n) throw std::runtime_error(name + ": too short");
  }
  void write(const void *from, size_t n) {
    if (fwrite(from, 1, n, f) != n) throw std::runtime_error(name + ": " + strerror(errno));
  }
  void close() {
    FILE *was = f;
    f = nullptr;
    if (fclose(was)) throw std::runtime_error(name + ": " + strerror(errno));
  }
};

size_t bytes_of(const std::string &path) {
  struct stat st;
  return stat(path.c_str(), &st) ? 0 : (size_t)st.st_size;
}

class peer {
 public:
  peer(char **arg)
      : dim(atol(arg[3])), metric(!strcmp(arg[4], "dot") ? faiss::METRIC_INNER_PRODUCT : faiss::METRIC_L2), cache(arg[5]),
        build_threads(atoi(arg[6])) {
    bool unit = !strcmp(arg[4], "cosine");
    n_queries = bytes_of(arg[2]) / dim / sizeof(float);
    queries.resize(n_queries * dim);
    file(arg[2], "rb").read(queries.data(), queries.size() * sizeof(float));
    if (unit) faiss::fvec_renorm_L2(dim, n_queries, queries.data());
    n_rows = bytes_of(arg[1]) / dim / sizeof(float);
    flat = std::make_unique<faiss::IndexFlat>(dim, metric);
    /* read in place: an array that grows would hold the rows twice for a moment */
    flat->codes.resize(n_rows * dim * sizeof(float));
    flat->ntotal = (int64_t)n_rows;
    file(arg[1], "rb").read(flat->get_xb(), n_rows * dim * sizeof(float));
    if (unit) faiss::fvec_renorm_L2(dim, n_rows, flat->get_xb());
  }

  std::string hello() const {
    std::ostringstream o;
    o << "{\"name\":\"FAISS\",\"version\":\"" << FAISS_VERSION_MAJOR << '.' << FAISS_VERSION_MINOR << '.' << FAISS_VERSION_PATCH
      << "\",\"options\":" << quoted(faiss::get_compile_options()) << ",\"rows\":" << n_rows << ",\"queries\":" << n_queries << "}";
    return o.str();
  }

  std::string index(const words &w) {
    const long nlist = number(w, "nlist", 0), hnsw = number(w, "hnsw", 0);
    const std::string codes = text(w, "codes");
    const std::string lists = "IVF" + std::to_string(nlist) + (hnsw ? "_HNSW" + std::to_string(hnsw) : "");
    const std::string path = cache + "/faiss." + lists + "." + codes + ".index";
    double w0 = wall_s(), c0 = cpu_s();
    bool cached = bytes_of(path) > 0;
    refined.reset();
    base.reset();
    set_threads(build_threads);
    if (cached) {
      base.reset(faiss::read_index(path.c_str()));
    } else {
      base.reset(faiss::index_factory((int)dim, (lists + "," + codes).c_str(), metric));
      give_centroids(nlist);
      train_codes();
      for (size_t at = 0; at < n_rows; at += 100000) base->add(std::min<size_t>(100000, n_rows - at), vectors() + at * dim);
      faiss::write_index(base.get(), (path + ".part").c_str());
      if (rename((path + ".part").c_str(), path.c_str())) throw std::runtime_error(path + ": " + strerror(errno));
    }
    ivf = faiss::ivflib::extract_index_ivf(base.get());
    refined = std::make_unique<faiss::IndexRefineFlat>();
    refined->own_refine_index = false;
    refined->own_fields = false;
    refined->base_index = base.get();
    refined->refine_index = flat.get();
    refined->d = (int)dim;
    refined->metric_type = metric;
    refined->ntotal = base->ntotal;
    refined->is_trained = true;
    std::ostringstream o;
    o << "{\"cached\":" << (cached ? "true" : "false") << ",\"wall_s\":" << wall_s() - w0 << ",\"cpu_s\":" << cpu_s() - c0
      << ",\"code_bytes\":" << ivf->code_size << ",\"bytes_per_row\":" << (double)bytes_of(path) / (double)n_rows << "}";
    return o.str();
  }

  std::string run(const words &w) {
    if (!refined) throw std::runtime_error("run before index");
    const size_t first = number(w, "first", 0), n = number(w, "n", 0), k = number(w, "k", 10);
    const long nprobe = number(w, "nprobe", 1), passes = number(w, "passes", 1);
    const bool batch = number(w, "batch", 0);
    const double refine = atof(text(w, "refine").c_str());
    if (!n || first + n > n_queries) throw std::runtime_error("queries out of range");
    ids.assign(n * k, -1);
    distances.resize(n * k);
    set(nprobe, number(w, "implem", 0));
    refined->k_factor = (float)refine;
    const faiss::Index *searched = refine > 0 ? refined.get() : base.get();
    set_threads((int)number(w, "threads", 1));
    double best_wall = 1e30, best_cpu = 1e30;
    std::vector<uint64_t> ns(batch ? 0 : n), best_ns(ns);
    for (long pass = 0; pass < passes; pass++) {
      double w0 = wall_s(), c0 = cpu_s();
      if (batch) {
        searched->search(n, queries.data() + first * dim, k, distances.data(), ids.data());
      } else {
        for (size_t i = 0; i < n; i++) {
          double t = wall_s();
          searched->search(1, queries.data() + (first + i) * dim, k, distances.data() + i * k, ids.data() + i * k);
          ns[i] = (uint64_t)(1e9 * (wall_s() - t));
        }
      }
      double cpu = cpu_s() - c0, wall = wall_s() - w0;
      best_cpu = std::min(best_cpu, cpu);
      if (wall < best_wall) best_wall = wall, best_ns = ns;
    }
    file out(text(w, "out"), "wb");
    out.write(ids.data(), ids.size() * sizeof ids[0]);
    out.write(best_ns.data(), best_ns.size() * sizeof best_ns[0]);
    out.close();
    std::ostringstream o;
    o << "{\"wall_s\":" << best_wall << ",\"cpu_s\":" << best_cpu << "}";
    return o.str();
  }

 private:
  const size_t dim;
  const faiss::MetricType metric;
  const std::string cache;
  const int build_threads;
  size_t n_rows, n_queries;
  std::vector<float> queries;
  std::unique_ptr<faiss::IndexFlat> flat;
  std::unique_ptr<faiss::Index> base;
  std::unique_ptr<faiss::IndexRefineFlat> refined;
  faiss::IndexIVF *ivf = nullptr;
  std::vector<int64_t> ids;
  std::vector<float> distances;

  const float *vectors() const { return flat->get_xb(); }

  /* k-means of the lists costs most of a build and depends only on their number: kept in a file, in row order. */
  void give_centroids(long nlist) {
    const std::string path = cache + "/faiss." + std::to_string(nlist) + ".centroids";
    ivf = faiss::ivflib::extract_index_ivf(base.get());
    std::vector<float> centroids((size_t)nlist * dim);
    if (bytes_of(path) == centroids.size() * sizeof(float)) {
      file(path, "rb").read(centroids.data(), centroids.size() * sizeof(float));
    } else {
      faiss::ClusteringParameters how;
      how.niter = 10; /* what IndexIVF sets */
      faiss::Clustering kmeans((int)dim, (int)nlist, how);
      faiss::IndexFlat assign((int)dim, metric);
      kmeans.train(n_rows, vectors(), assign);
      centroids.assign(kmeans.centroids.begin(), kmeans.centroids.end());
      file out(path + ".part", "wb");
      out.write(centroids.data(), centroids.size() * sizeof(float));
      out.close();
      if (rename((path + ".part").c_str(), path.c_str())) throw std::runtime_error(path + ": " + strerror(errno));
    }
    ivf->quantizer->train(nlist, centroids.data());
    ivf->quantizer->add(nlist, centroids.data());
  }

  /* 4-bit quantizers see 65,536 rows as the 8-bit ones do by default, not 4,096: slightly better recall for seconds of building. */
  void train_codes() {
    if (auto *fast = dynamic_cast<faiss::IndexIVFPQFastScan *>(ivf)) fast->pq.cp.max_points_per_centroid = 4096;
    base->train(n_rows, vectors());
  }

  void set(long nprobe, long implem) {
    ivf->nprobe = nprobe;
    if (auto *fast = dynamic_cast<faiss::IndexIVFFastScan *>(ivf)) fast->implem = (int)implem;
    if (auto *graph = dynamic_cast<faiss::IndexHNSW *>(ivf->quantizer)) graph->hnsw.efSearch = (int)std::max(nprobe + nprobe / 2, 32l);
  }
};

}  // namespace

int main(int argc, char **argv) {
  if (argc != 7) {
    fprintf(stderr, "usage: bench_faiss BASE.f32 QUERIES.f32 DIM l2|cosine|dot CACHE_DIR THREADS\n");
    return 2;
  }
  try {
    peer p(argv);
    std::cout << p.hello() << std::endl;
    std::string line;
    while (std::getline(std::cin, line)) {
      std::istringstream in(line);
      std::string command, word;
      words w;
      in >> command;
      while (in >> word) {
        size_t eq = word.find('=');
        if (eq != std::string::npos) w[word.substr(0, eq)] = word.substr(eq + 1);
      }
      try {
        if (command == "index") std::cout << p.index(w) << std::endl;
        else if (command == "run") std::cout << p.run(w) << std::endl;
        else throw std::runtime_error("unknown command " + command);
      } catch (const std::exception &e) {
        std::cout << "{\"error\":" << quoted(e.what()) << "}" << std::endl;
      }
    }
  } catch (const std::exception &e) {
    fprintf(stderr, "bench_faiss: %s\n", e.what());
    return 1;
  }
  return 0;
}

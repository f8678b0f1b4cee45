# vecshard: make | make test | make demo | make demo-s3 | make check SAN=address|thread | make bench | make soak | make clean
#
# What speaks to SQLite is compiled twice: build/obj/ext for the loadable extension (through sqlite3_api), build/obj/core for
# static linking and the tool (SQLite called directly); all else is there once, in build/obj/core. Only the kernel files get wider
# instructions; they are chosen at run time. SAN=address (with undefined) or SAN=thread builds into a folder of its own.

CC ?= gcc
SAN ?=
OUT := build$(if $(SAN),-$(SAN))
comma := ,
SAN_FLAGS := $(if $(filter address,$(SAN)),-fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined)$(if $(filter thread,$(SAN)),-fsanitize=thread)
WARN := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Werror
CFLAGS ?= -O2 -g
ALL_CFLAGS := -std=gnu11 -D_GNU_SOURCE -fPIC -fvisibility=hidden -ffp-contract=off -fno-omit-frame-pointer $(WARN) $(CFLAGS) $(SAN_FLAGS)
HDF5_CFLAGS := $(shell pkg-config --cflags hdf5-serial 2>/dev/null || pkg-config --cflags hdf5 2>/dev/null)
HDF5_LIBS := $(shell pkg-config --libs hdf5-serial 2>/dev/null || pkg-config --libs hdf5 2>/dev/null || echo -lhdf5) -ldeflate
NET_LIBS := -lcurl -lexpat -lcrypto
LIBS := -lm -lpthread

LOWER := $(wildcard ext/base/*.c ext/kernels/*.c ext/ivfpq/*.c) ext/input/input_fault.c
UPPER := $(wildcard ext/s3vfs/*.c ext/shard/*.c) $(filter-out ext/vtab/hdf5_vectors.c,$(wildcard ext/vtab/*.c)) ext/vecshard.c
INPUT := $(filter-out ext/input/input_fault.c,$(wildcard ext/input/*.c))
HDF5_EXT := ext/vecshard_hdf5.c ext/vtab/hdf5_vectors.c $(INPUT) ext/input/input_fault.c $(addprefix ext/base/,vs_err.c vs_pool.c vs_scope.c)
TOOL := $(wildcard tool/*.c)

SPEAKS_SQLITE := $(wildcard ext/*.c ext/vtab/*.c) $(addprefix ext/s3vfs/,s3_vfs.c db_interrupt.c) $(addprefix ext/shard/,shard_manifest.c shard_set.c)
ext_obj = $(patsubst %.c,$(OUT)/obj/ext/%.o,$(filter $(SPEAKS_SQLITE),$(1))) $(call core_obj,$(filter-out $(SPEAKS_SQLITE),$(1)))
core_obj = $(patsubst %.c,$(OUT)/obj/core/%.o,$(1))

all: $(OUT)/vecshard.so $(OUT)/libvecshard.a $(OUT)/vecshard.h $(OUT)/vecshard $(OUT)/vecshard_hdf5.so

$(OUT)/vecshard.so: $(call ext_obj,$(LOWER) $(UPPER))
	@echo "  LINK  $@"; $(CC) -shared $(if $(SAN),,-Wl$(comma)-z$(comma)defs) $(SAN_FLAGS) $(LDFLAGS) -o $@ $^ $(NET_LIBS) $(LIBS)
$(OUT)/vecshard_hdf5.so: $(call ext_obj,$(HDF5_EXT))
	@echo "  LINK  $@"; $(CC) -shared $(if $(SAN),,-Wl$(comma)-z$(comma)defs) $(SAN_FLAGS) $(LDFLAGS) -o $@ $^ $(HDF5_LIBS) $(LIBS)
$(OUT)/libvecshard.a: $(call core_obj,$(LOWER) $(UPPER))
	@echo "  AR    $@"; rm -f $@ && ar rcs $@ $^
$(OUT)/vecshard.h: ext/vecshard.h
	mkdir -p $(@D) && cp $< $@
$(OUT)/vecshard: $(call core_obj,$(TOOL) $(INPUT)) $(OUT)/libvecshard.a
	@echo "  LINK  $@"; $(CC) $(SAN_FLAGS) $(LDFLAGS) -o $@ $^ $(HDF5_LIBS) -lsqlite3 $(NET_LIBS) $(LIBS)

# Unrolled further under a sanitizer they take twice as long to compile, and run no faster. (-O1 for all made tests up to twice as slow.)
KERN_LEVEL := $(if $(SAN),-O2,-O3)
KERN_FLAGS_scalar := -fno-tree-vectorize
ARCH := $(shell $(CC) -dumpmachine 2>/dev/null)
ifneq ($(filter x86_64%,$(ARCH)),)
KERN_FLAGS_avx2 := $(KERN_LEVEL) -mavx2 -mfma -mf16c
KERN_FLAGS_avx512 := $(KERN_LEVEL) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vbmi2 -mavx512vnni -mavx2 -mfma -mf16c
KERN_FLAGS_words_avx512 := $(KERN_FLAGS_avx512)
KERN_FLAGS_nearest_avx512 := $(KERN_FLAGS_avx512) -mamx-tile -mamx-int8
KERN_FLAGS_grouped_avx512 := $(KERN_FLAGS_nearest_avx512)
else ifneq ($(filter aarch64%,$(ARCH)),)
KERN_FLAGS_neon := $(KERN_LEVEL)
KERN_FLAGS_dotprod := $(KERN_LEVEL) -march=armv8.2-a+dotprod
endif
kern_flags = $(KERN_FLAGS_$(patsubst kern_%,%,$(notdir $(basename $(1)))))

$(OUT)/obj/ext/%.o: %.c Makefile
	@mkdir -p $(@D)
	@echo "  CC    $@"; $(CC) $(ALL_CFLAGS) $(HDF5_CFLAGS) $(call kern_flags,$<) -MMD -MP -c -o $@ $<
$(OUT)/obj/core/%.o: %.c Makefile
	@mkdir -p $(@D)
	@echo "  CC    $@"; $(CC) $(ALL_CFLAGS) $(HDF5_CFLAGS) -DSQLITE_CORE $(call kern_flags,$<) -MMD -MP -c -o $@ $<

# ---- tests ----
# test_*.c of the lower folders link without SQLite: the proof that they do not need it.
C_TESTS := $(patsubst test/%.c,$(OUT)/test/%,$(wildcard test/test_*.c))
$(OUT)/test/test_kernels: $(call core_obj,$(wildcard ext/kernels/*.c))
$(OUT)/test/test_matrix: $(call core_obj,$(wildcard ext/kernels/*.c))
$(OUT)/test/test_ivfpq: $(call core_obj,$(LOWER) ext/s3vfs/io_local.c)
$(OUT)/test/test_base: $(call core_obj,$(wildcard ext/base/*.c) ext/s3vfs/io_local.c)
$(OUT)/test/test_input: $(call core_obj,$(INPUT) ext/input/input_fault.c tool/input_concat.c $(wildcard ext/base/*.c) ext/s3vfs/io_local.c)
$(OUT)/test/test_s3_sign: $(call core_obj,ext/base/vs_err.c ext/s3vfs/s3_sign.c)
$(OUT)/test/test_s3_config: $(call core_obj,ext/base/vs_err.c ext/s3vfs/s3_config.c ext/s3vfs/s3_profile.c)
$(OUT)/test/test_manifest: $(OUT)/libvecshard.a
$(OUT)/test/test_embed: $(OUT)/libvecshard.a
SQLITE_LIB_test_manifest := -lsqlite3
SQLITE_LIB_test_embed := -lsqlite3
$(OUT)/test/s3_threads: $(OUT)/libvecshard.a
SQLITE_LIB_s3_threads := -lsqlite3
$(OUT)/test/%: $(OUT)/obj/core/test/%.o
	@mkdir -p $(@D)
	@echo "  LINK  $@"; $(CC) $(SAN_FLAGS) $(LDFLAGS) -o $@ $^ -lcmocka $(if $(findstring test_input,$@),$(HDF5_LIBS)) $(SQLITE_LIB_$(notdir $@)) $(NET_LIBS) $(LIBS)
# The kernel tests as one static program without cmocka's library, so that a cross compiler and an emulator are enough.
$(OUT)/test/bare_kernels: test/test_kernels.c $(call core_obj,$(wildcard ext/kernels/*.c)) test/bare/cmocka.h
	@mkdir -p $(@D)
	@echo "  LINK  $@"; $(CC) $(ALL_CFLAGS) -Itest/bare -static -o $@ $(filter %.c %.o,$^) -lm -lpthread
.SECONDARY:

# ---- the benchmark ----
# make bench ARGS='--set base.npy --json out.json'; bench/bench.py --help. QUICK=1: seconds. bench-peers: beside FAISS and LanceDB.
BENCH := $(OUT)/bench/bench_sql $(OUT)/bench/bench_kernels $(OUT)/bench/bench_ceilings
$(OUT)/bench/bench_sql: $(call core_obj,bench/bench_sql.c) $(OUT)/libvecshard.a
	@mkdir -p $(@D)
	@echo "  LINK  $@"; $(CC) $(SAN_FLAGS) $(LDFLAGS) -o $@ $^ -lsqlite3 $(NET_LIBS) $(LIBS)
$(OUT)/bench/bench_kernels: $(call core_obj,bench/bench_kernels.c $(wildcard ext/kernels/*.c))
	@mkdir -p $(@D)
	@echo "  LINK  $@"; $(CC) $(SAN_FLAGS) $(LDFLAGS) -o $@ $^ $(LIBS)
$(OUT)/bench/bench_ceilings: bench/bench_ceilings.c Makefile
	@mkdir -p $(@D)
	@echo "  CC    $@"; $(CC) -std=gnu11 -D_GNU_SOURCE $(WARN) -O3 -ffp-contract=fast -o $@ $<
bench-programs: all $(BENCH)
bench: deps
	@$(MAKE) --no-print-directory -s -j$$(nproc) bench-programs
	@bench/bench.py $(if $(QUICK),--quick) $(ARGS)
bench-peers:
	@tool/install-deps bench
	@$(MAKE) --no-print-directory bench ARGS='--peers $(ARGS)'

deps:
	@tool/install-deps build
deps-store:
	@tool/install-deps store
deps-test:
	@tool/install-deps test

test: deps-test
	@$(MAKE) --no-print-directory check-all
check-all:
	@test/run.sh
c-tests: all $(C_TESTS)
check: c-tests
	@for t in $(C_TESTS); do echo "== $$t"; $$t || exit 1; done

demo: deps
	@$(MAKE) --no-print-directory -s -j$$(nproc) all
	@tool/demo.sh $(H5)

demo-s3: deps-store
	@$(MAKE) --no-print-directory -s -j$$(nproc) all
	@tool/demo-s3.sh

soak: deps-test
	@$(MAKE) --no-print-directory all
	@/usr/bin/python3 test/soak.py

clean:
	rm -rf build build-address build-thread

-include $(shell find $(OUT)/obj -name '*.d' 2>/dev/null)
.PHONY: all test c-tests check check-all bench bench-peers bench-programs demo demo-s3 soak deps deps-store deps-test clean

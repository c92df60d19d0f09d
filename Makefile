# Safelight: the whole build. `make help` lists what there is.
#
#   make SAN=address|undefined|thread   a sanitizer build, in a folder of its own
#   make CC=clang                       another compiler
# Flags are tracked (build/*/.flags): a changed flag rebuilds. Dependencies are generated. Nothing is cleaned to switch.

SAN     ?=
CC      ?= cc
BUILD   := build/$(if $(SAN),$(SAN),release)
PORT    ?= 8080
MODEL   ?= weights/emoji
CFLAGS  ?= -O2 -g
WARN    := -Wall -Wextra -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wshadow -Werror
# Headers and libraries that tests/gpu/pack gathered for a machine without packages.
CARRY   := $(wildcard build/carry)
COMMA   := ,
CARRIED := $(if $(CARRY),-isystem $(CARRY)/include -L$(CARRY)/lib -Wl$(COMMA)-rpath$(COMMA)$(abspath $(CARRY))/lib)
STD     := -std=c11 -D_GNU_SOURCE -I. -I$(BUILD) $(CARRIED) -fopenmp -fno-omit-frame-pointer
SANFLAGS := $(if $(SAN),-fsanitize=$(SAN) -fno-sanitize-recover=all)
LIBS    := -lmicrohttpd -ljansson -ldeflate -lspng -ljpeg -lwebp -lwebpmux -lutf8proc -lsodium -lsqlite3 -ldnnl -lm -lpthread
ALL_CFLAGS := $(STD) $(CFLAGS) $(WARN) $(SANFLAGS)

PRODUCT := $(wildcard base/*.c kernels/*.c kernels/cpu/*.c models/*.c proto/*.c server/*.c)
LIB_OBJ := $(patsubst %.c,$(BUILD)/%.o,$(filter-out server/main.c,$(PRODUCT)))
PAGES   := $(wildcard server/page/*)

# A test program is one tests/<layer>/test_*.c; what else lies in its folder is linked to each of them.
TEST_SRC := $(wildcard tests/unit/test_*.c tests/ops/test_*.c tests/golden/test_*.c)
TEST_BIN := $(patsubst %.c,$(BUILD)/%,$(TEST_SRC))
TEST_HELP_OBJ = $(patsubst %.c,$(BUILD)/%.o,$(filter-out tests/$(1)/test_%,$(wildcard tests/$(1)/*.c)))
FUZZ_BIN := $(patsubst tests/fuzz/%.c,build/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c))

.DEFAULT_GOAL := all
.PHONY: cuda gpu-ops gpu-programs gpu-check cudasim print-libs all run test tests bench fuzz deps help clean style print-config FORCE
.SECONDARY:

all: $(BUILD)/safelight ## build the server (after `make deps`)

deps: ## install what is missing on Debian (asks for root only when something is)
	@deploy/install-deps build

run: deps ## build and serve the bundled model at http://127.0.0.1:8080 (PORT=, MODEL=)
	@[ -x $(BUILD)/safelight ] || echo 'building, a minute or two'
	@$(MAKE) --no-print-directory -s -j$$(nproc) all
	@$(BUILD)/safelight serve --model $(MODEL) --port $(PORT)

test: ## run every test, as CI does
	@deploy/install-deps test
	@tests/run

bench: all ## measure this machine: the bundled architecture and SD1.5
	@$(BUILD)/safelight bench --arch emoji
	@$(BUILD)/safelight bench --arch sd15

print-config: all ## print the commented configuration, which is its manual
	@$(BUILD)/safelight serve --print-config

style: ## check the rules that a script can check
	@tests/style.sh

fuzz: $(FUZZ_BIN) ## build the fuzz targets (clang)

tests: $(TEST_BIN) ## build the test programs

clean: ## remove everything that was built
	rm -rf build

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# ---- rules ----

$(BUILD)/.flags: FORCE
	@mkdir -p $(BUILD); echo '$(CC) $(ALL_CFLAGS) $(LIBS)' | cmp -s - $@ || echo '$(CC) $(ALL_CFLAGS) $(LIBS)' > $@
FORCE:

# A missing library is one sentence with the package's name instead of a page of errors.
HEADERS := microhttpd.h:libmicrohttpd-dev jansson.h:libjansson-dev libdeflate.h:libdeflate-dev utf8proc.h:libutf8proc-dev \
           sodium.h:libsodium-dev sqlite3.h:libsqlite3-dev dnnl.h:libdnnl-dev spng.h:libspng-dev jpeglib.h:libjpeg-dev webp/mux.h:libwebp-dev
$(BUILD)/.libraries: $(BUILD)/.flags
	@command -v $(firstword $(CC)) >/dev/null || { echo 'there is no C compiler "$(CC)"; `make deps` installs gcc' >&2; exit 1; }; \
	missing=; for h in $(HEADERS); do \
	  echo "#include <$${h%%:*}>" | $(CC) $(STD) -E -x c - >/dev/null 2>&1 || missing="$$missing $${h#*:}"; \
	done; \
	[ -z "$$missing" ] || { echo "these packages are missing, \`make deps\` installs them:$$missing" >&2; exit 1; }; \
	touch $@

$(BUILD)/%.o: %.c $(BUILD)/.flags | $(BUILD)/.libraries
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -MMD -MP -c $< -o $@

# The web page becomes C arrays.
$(BUILD)/server/page.inc: $(PAGES) tools/embed
	@mkdir -p $(@D)
	tools/embed $(PAGES) > $@
$(BUILD)/server/page.o: $(BUILD)/server/page.inc

$(BUILD)/libsafelight.a: $(LIB_OBJ)
	@rm -f $@
	ar rcs $@ $(LIB_OBJ)

$(BUILD)/safelight: $(BUILD)/server/main.o $(BUILD)/libsafelight.a
	$(CC) $(ALL_CFLAGS) -o $@ $^ $(LIBS)

define TEST_RULE
$(BUILD)/tests/$(1)/test_%: $(BUILD)/tests/$(1)/test_%.o $(call TEST_HELP_OBJ,$(1)) $(BUILD)/libsafelight.a
	$$(CC) $$(ALL_CFLAGS) -o $$@ $$^ $$(LIBS) -lcmocka
endef
$(foreach layer,unit ops golden,$(eval $(call TEST_RULE,$(layer))))

# Fuzz targets: libFuzzer over a library of their own, with ASan and UBSan.
FUZZ_FLAGS := $(STD) -O1 -g $(WARN) -fsanitize=address,undefined -fno-sanitize-recover=all
build/fuzz/%: tests/fuzz/%.c $(wildcard base/*.[ch] models/*.[ch] proto/*.[ch] server/cors.[ch] server/peer.[ch] server/trace.[ch])
	@mkdir -p $(@D)
	clang $(filter-out -fopenmp,$(FUZZ_FLAGS)) -fsanitize=fuzzer $< $$(sed -n 's,^ \* links: ,,p' $<) -o $@ -ljansson -lutf8proc -ldeflate -lsodium -lspng -ljpeg -lwebp -lwebpmux -lm

# ---- the CUDA backend on the CPU: its own sources under tests/cudasim, by clang with ASan and UBSan; everything else as released ----

SIM       := build/cudasim
SIM_FLAGS := -O1 -g -D_GNU_SOURCE -Itests/cudasim/include -I. -fsanitize=address,undefined -fno-sanitize-recover=all \
             -fno-omit-frame-pointer -fno-strict-aliasing -Wall -Wextra -Wvla -Wshadow -Werror
SIM_C     := $(wildcard kernels/cuda/*.c tests/cudasim/*.c) $(filter-out tests/ops/test_%,$(wildcard tests/ops/*.c)) tests/golden/make_adapter.c \
             tests/golden/tiny.c tests/golden/write_ckpt.c
SIM_OBJ   := $(patsubst %,$(SIM)/%.o,$(filter-out tests/cudasim/test_% kernels/cuda/vendor_%,$(SIM_C)) $(wildcard kernels/cuda/*.cu tests/cudasim/*.cu))
SIM_BIN   := $(patsubst %.c,$(SIM)/%,$(wildcard tests/cudasim/test_*.c)) $(SIM)/tests/gpu/bench

cudasim: $(SIM_BIN) ## build the CUDA backend's tests that need no GPU (clang)

print-libs:
	@echo '$(LIBS)'

$(SIM)/%.c.o: %.c
	@mkdir -p $(@D)
	clang -std=c11 $(SIM_FLAGS) -Wstrict-prototypes -Wmissing-prototypes -MMD -MP -c $< -o $@

$(SIM)/%.cu.o: %.cu
	@mkdir -p $(@D)
	clang++ -x c++ -std=c++17 $(SIM_FLAGS) -MMD -MP -c $< -o $@

$(SIM)/tests/cudasim/test_%: $(SIM)/tests/cudasim/test_%.c.o $(SIM_OBJ) $(BUILD)/libsafelight.a
	clang++ -fsanitize=address,undefined -o $@ $^ $(LIBS) -lgomp -lcmocka

$(SIM)/tests/gpu/bench: $(SIM)/tests/gpu/bench.c.o $(SIM_OBJ) $(BUILD)/libsafelight.a
	clang++ -fsanitize=address,undefined -o $@ $^ $(LIBS) -lgomp -lcmocka

# ---- the CUDA backend for GPUs: a shared object beside the program, which loads it when there is a GPU (CUDA=, ARCHS=) ----

CUDA     ?= $(patsubst %/bin/nvcc,%,$(firstword $(wildcard $(CURDIR)/.cuda/bin/nvcc /usr/local/cuda/bin/nvcc) $(shell command -v nvcc) /usr/local/cuda/bin/nvcc))
CUDA_LIB ?= $(CUDA)/lib64
CUDNN    ?= $(CUDA)
ARCHS    ?= 80 86 89 90a 100 120
GPU      := build/cuda
GPU_CU   := $(patsubst %,$(GPU)/%.o,$(wildcard kernels/cuda/*.cu))
GPU_C    := $(patsubst %,$(GPU)/%.o,$(wildcard kernels/cuda/*.c) kernels/convert.c kernels/dry.c kernels/backend.c base/err.c)
GPU_CC   := $(CC) -std=c11 -D_GNU_SOURCE -O2 -g $(WARN) -I. -isystem $(CUDA)/include -isystem $(CUDNN)/include $(if $(CARRY),-isystem $(CARRY)/include) -fPIC -fvisibility=hidden

cuda: $(BUILD)/safelight-cuda.so $(BUILD)/safelight-no-driver.so $(GPU)/compile_graphs ## build the CUDA backend (needs nvcc, cuBLAS and cuDNN 9)

# Fails here, in one sentence, when the toolkit is not there.
$(GPU)/.toolkit:
	@mkdir -p $(@D)
	@[ -x $(CUDA)/bin/nvcc ] || { echo 'there is no CUDA toolkit: set CUDA= to the folder of bin/nvcc, or run deploy/install-cuda' >&2; exit 1; }
	@[ -e $(CUDA)/include/cublasLt.h ] || { echo 'cublasLt.h is missing: install cuBLAS of the CUDA toolkit' >&2; exit 1; }
	@[ -e $(CUDNN)/include/cudnn.h ] || { echo 'cudnn.h is missing: install cuDNN 9 and set CUDNN= to its folder' >&2; exit 1; }
	@touch $@

# Another toolkit or other architectures: built anew.
$(GPU)/.flags: FORCE
	@mkdir -p $(GPU); echo '$(CUDA) $(CUDNN) $(ARCHS)' | cmp -s - $@ || echo '$(CUDA) $(CUDNN) $(ARCHS)' > $@

# ptxas says what a kernel takes; tests/gpu/registers reads it.
$(GPU)/%.cu.o: %.cu $(GPU)/.flags | $(GPU)/.toolkit
	@mkdir -p $(@D)
	$(CUDA)/bin/nvcc -std=c++17 -O3 -I. $(foreach a,$(ARCHS),-gencode arch=compute_$a,code=sm_$a) -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden \
	  -MMD -MP -c $< -o $@ 2>$@.ptxas || { cat $@.ptxas >&2; rm -f $@; exit 1; }

$(GPU)/%.c.o: %.c $(GPU)/.flags | $(GPU)/.toolkit
	@mkdir -p $(@D)
	$(GPU_CC) -MMD -MP -c $< -o $@

$(BUILD)/safelight-cuda.so: $(GPU_CU) $(GPU_C)
	@mkdir -p $(@D)
	$(CC) -shared -o $@ $^ -Wl,--no-undefined -L$(CUDA_LIB) -L$(CUDNN)/lib64 -L$(CUDNN)/lib -Wl,-rpath,$(CUDA_LIB) -lcudart_static -lcublasLt -lcudnn \
	  -lstdc++ -lm -lrt -ldl -lpthread

# What the driver is for `safelight compile`.
$(BUILD)/safelight-no-driver.so: kernels/cuda/stand_in $(GPU)/.flags | $(GPU)/.toolkit
	@mkdir -p $(@D)
	CC='$(CC)' kernels/cuda/stand_in $(CUDA)/include/cuda.h $@

$(GPU)/compile_graphs: tests/gpu/compile_graphs.c $(GPU)/kernels/cuda/vendor_graph.c.o $(GPU)/kernels/cuda/vendor_nvrtc.c.o $(GPU)/base/err.c.o
	$(GPU_CC) -o $@ $^ -L$(CUDNN)/lib64 -L$(CUDNN)/lib -Wl,-rpath,$(CUDA_LIB) -Wl,-rpath,$(CUDNN)/lib64 -lcudnn -ldl -lpthread

# The simulator's tests and the benchmark on a real card. gpu-ops needs no library but cmocka; the others need what models/ needs.
CARD      := build/card
CARD_WRAP := $(foreach f,Malloc Free MallocHost FreeHost MallocAsync FreeAsync StreamSynchronize StreamBeginCapture GraphInstantiate GraphLaunch GraphExecDestroy,-Wl,--wrap=cuda$f)
CARD_LINK  = -fopenmp $(CARRIED) -L$(CUDA_LIB) -L$(CUDNN)/lib64 -L$(CUDNN)/lib -Wl,-rpath,$(CUDA_LIB) -Wl,-rpath,$(CUDNN)/lib -Wl,-rpath,$(CUDNN)/lib64 \
             -lcudart_static -lcublasLt -lcudnn -lcmocka -lstdc++ -lm -lrt -ldl -lpthread
CARD_OPS  := $(patsubst %,$(CARD)/%.o,tests/cudasim/test_ops.c tests/gpu/card.c $(filter-out tests/ops/test_%,$(wildcard tests/ops/*.c)) \
               $(wildcard kernels/ref*.c) kernels/normal.c)
CARD_REST := $(patsubst %,$(CARD)/%.o,tests/gpu/card.c tests/golden/make_adapter.c tests/golden/tiny.c tests/golden/write_ckpt.c)

gpu-ops: $(CARD)/test_ops ## build the op tests for the card of this machine (ARCHS=, CUDA=, CUDNN=)
gpu-programs: $(CARD)/test_model $(CARD)/test_pass $(CARD)/test_draws $(CARD)/bench $(BUILD)/safelight-cuda.so $(GPU)/compile_graphs ## build the rest for the card of this machine
gpu-check: ## everything that a card can show, in one command and under ten minutes: tests/gpu/README.md
	@tests/gpu/check

$(CARD)/%.c.o: %.c $(GPU)/.flags | $(GPU)/.toolkit
	@mkdir -p $(@D)
	$(GPU_CC) -fopenmp -MMD -MP -c $< -o $@

$(CARD)/test_ops: $(CARD_OPS) $(GPU_CU) $(GPU_C)
	$(CC) -o $@ $^ $(CARD_WRAP) $(CARD_LINK)

$(CARD)/bench: $(CARD)/tests/gpu/bench.c.o
$(CARD)/test_model: $(CARD)/tests/cudasim/test_model.c.o
$(CARD)/test_pass: $(CARD)/tests/cudasim/test_pass.c.o
$(CARD)/test_draws: $(CARD)/tests/cudasim/test_draws.c.o
$(CARD)/bench $(CARD)/test_model $(CARD)/test_pass $(CARD)/test_draws: $(CARD_REST) $(GPU_CU) $(GPU_C) $(BUILD)/libsafelight.a
	$(CC) -o $@ $(filter %.o,$^) $(BUILD)/libsafelight.a $(CARD_WRAP) -ljansson -lutf8proc -lsodium $(CARD_LINK)

-include $(shell find $(BUILD) $(SIM) $(GPU) $(CARD) -name '*.d' 2>/dev/null)

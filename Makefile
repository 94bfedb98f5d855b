# make demo   trains a small model by DDP on 2 ranks, with and without compression, and compares
# make test   runs all tests, in WORKERS=2 processes
# make test-trainers   runs the tests of all trainers, including Ray Train, DeepSpeed and torchft, which
#             are installed into the same environment (1 GB)
# make docs   builds the documentation into build/site, and fails on a broken link
# make docs-serve   serves it on http://127.0.0.1:8000, and rebuilds it when a file changes
# make fuzz   searches for minutes for inputs that break a promised property (FUZZ=20 SEED=1)
# make lint   runs the checks that CI and pre-commit run
# make sanitize   runs the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (gcc)
# make slurm  runs launch/slurm.sbatch under a real Slurm of two nodes on this machine, as root; skips
#             if slurm-wlm or munge is missing
# make matrix   runs the core tests on the oldest and the newest versions (downloads up to 18 GB)
# make peers   runs torch's own distributed tests with this hook (docs/peers.md)
# make cross   checks the C kernels under qemu on aarch64 and riscv64, and with clang, if installed
# make wheels   builds an sdist and portable wheels in dist/, installs them and tests them
#             (docs/release.md; downloads 1 GB)
# make        lists these

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A file's tests share fixtures, so they stay together; long files come first in the usual order.
PARALLEL = --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder
WORKERS ?= 2
FUZZ ?= 20
SEED ?= $(shell date +%s)

.PHONY: help demo test test-trainers docs docs-serve fuzz lint sanitize cross matrix peers slurm wheels clean

help:
	@sed -n 's/^# //p' Makefile

C_SOURCES := rhtcomm/kernels/cpu.c $(wildcard rhtcomm/kernels/native/*.h)

$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(C_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint,docs]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python launch/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL)

$(VENV)/.trainers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test-trainers]'
	touch $@

test-trainers: $(VENV)/.trainers
	$(BIN)/python -m pytest tests/trainers

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed
	$(BIN)/mkdocs build

docs-serve: export NO_MKDOCS_2_WARNING = 1
docs-serve: $(VENV)/.installed
	$(BIN)/mkdocs serve

fuzz: $(VENV)/.installed
	RHTCOMM_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/codec/test_fuzz.py --hypothesis-seed=$(SEED)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch benchmarks/*.sh findings/*.sh .ci/run

sanitize: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/sanitize -DRHTCOMM_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize --parallel 2
	RHTCOMM_TEST_LIBRARY=build/sanitize/rhtcomm_cpu.so ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest -s tests/kernels/test_kernels.py tests/kernels/test_ecdq_kernels.py tests/kernels/test_lattice_kernels.py tests/kernels/test_feedback.py -k "not environment"

slurm: $(VENV)/.installed
	PYTHONPATH=tests/lib $(BIN)/python tests/launch/slurm_local.py

matrix: $(VENV)/.installed
	$(BIN)/python tests/packaging/matrix.py

peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/python tests/peers/run.py

cross: $(VENV)/.installed
	$(BIN)/python tests/kernels/cross/run.py

wheels: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[release]'
	$(BIN)/python tests/packaging/wheels/run.py

clean:
	rm -rf $(VENV) demo-results dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

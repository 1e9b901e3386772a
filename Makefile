# `make demo` and `make test` work on a bare machine: they make their own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
TORCH ?= 2.11.0
OTHER := $(VENV)-torch-$(TORCH)
TORCH_TESTS := tests/losses tests/model/test_deferred.py tests/model/test_padding.py tests/model/test_varlen.py tests/engine/test_accumulation.py \
	tests/engine/test_compile.py tests/engine/test_equivalence.py tests/engine/test_fp8.py
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-docs test-cluster test-torch test-gpu test-image bench gpu docs lint clean

$(READY): requirements.lock setup.py
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --require-hashes -r requirements.lock
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" RUN=$(DEMO) bash demo.sh

# two at a time, as many of them keep one core busy; a file's tests stay together, in our order
test: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# every command of README and docs; 20 minutes on 2 cores, and Debian's openmpi-bin for all of them
test-docs: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 python -m pytest -m docs tests/docs $(PYTEST_ARGS)

# needs root and Debian's slurmctld, slurmd, slurm-client, munge and openmpi-bin; some 13 minutes
test-cluster: $(READY)
	@PATH="$(CURDIR)/$(BIN):/usr/sbin:$$PATH" OMP_NUM_THREADS=1 python -m pytest -m cluster tests/cluster tests/distributed $(PYTEST_ARGS)

# what is compiled, losses and curves under another torch, by default that of the GPU machines, and the
# numpy that its Triton's interpreter takes; 8 minutes with the install
test-torch:
	@$(PYTHON) -m venv $(OTHER)
	@$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) 'numpy<2.4' pytest hypothesis -e .
	@PATH="$(CURDIR)/$(OTHER)/bin:$$PATH" OMP_NUM_THREADS=1 python -m pytest $(TORCH_TESTS) $(PYTEST_ARGS)

# needs a GPU; over five minutes on an H200
test-gpu: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cuda python -m pytest -m gpu tests $(PYTEST_ARGS)

# needs root and Debian's buildah and debootstrap
test-image: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -s -m image tests/docker $(PYTEST_ARGS)

# ten minutes on 2 idle cores
bench: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python benchmarks/bench.py $(BENCH_ARGS)

# half an hour on a GPU, in parts of under ten minutes: bash benchmarks/gpu.sh
gpu: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/gpu.sh all

docs: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo "built build/site; to read it: $(BIN)/python -m http.server --directory build/site 8000"

lint: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" && ruff check . && ruff format --check . && mypy && lint-imports && shellcheck slurm/*.sh docker/*.sh docs/*.sh benchmarks/*.sh demo.sh .ci/run && hadolint docker/Dockerfile

clean:
	rm -rf $(VENV) $(VENV)-torch-* runs

# A virtual environment in .venv, made on first use; stamp files in it remember what is installed.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
SOAK_TESTS := tests/proofs/test_isolation.py tests/proofs/test_linearizable.py tests/proofs/test_leaks.py \
	tests/registry/test_registry_machine.py tests/store/test_kill.py tests/store/test_faults.py
# the programs in tools/ use what the tests have: tiny bases, kinds of adapters, servers
TOOL := PYTHONPATH=tests/support:tests/kinds $(VENV)/bin/python

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help serve test check isolation fuzz soak bench bench-life bench-overload bench-encoders bench-formats bench-extract bench-evaluation clients tables picture gpu-check demo-adapters clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile
	@echo 'ARGS="..." is passed on: make serve ARGS="--port 9000", make test ARGS="-k config"'

serve: $(VENV)/.runtime ## serve the embedded base and the demo adapters on 127.0.0.1:8000
	$(BIN)/swaplora serve --adapter-dir demo $(ARGS)

# with data of its own: adapters of one base do not fit another
.PHONY: serve-encoder
serve-encoder: $(VENV)/.runtime ## serve the embedded encoder and the demo classifiers on 127.0.0.1:8000
	$(BIN)/swaplora serve embedded-minilm --adapter-dir demo/classifiers \
		--data-dir $${XDG_DATA_HOME:-$$HOME/.local/share}/swaplora-encoder $(ARGS)

# Two processes, a file's tests in one of them, for the servers that they share. Whichever is free takes the next file, in
# the order of the rooms: the long files of kinds, proofs and store come well before the end, so that neither waits long.
test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore tests/ray $(ARGS)

# with ARGS="--numprocesses 2 --dist loadgroup" two clusters beside each other: tests that share replicas are a group
.PHONY: test-ray
test-ray: $(VENV)/.ray ## install Ray, and run the tests of replicas on it (some minutes)
	$(BIN)/python -m pytest tests/ray $(ARGS)

check: $(VENV)/.dev ## lint, format check, types, who imports whom, Dockerfile, compose file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy server adapters tests tools demo
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint Dockerfile deploy/ray/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml

isolation: $(VENV)/.dev ## the proof that no request is answered with another's weights (ARGS="--servers 2" for several)
	$(TOOL) tools/proving/isolation.py $(ARGS)

fuzz: $(VENV)/.dev ## what the API makes of requests of every shape (ARGS="--cases 50000 --seed 1" for many, about an hour)
	$(TOOL) tools/fuzz_api.py $(ARGS)

soak: $(VENV)/.dev ## the long forms of the tests that have one (an hour or more on two cores)
	SWAPLORA_SOAK=1 $(BIN)/python -m pytest -s $(SOAK_TESTS) $(ARGS)

bench: $(VENV)/.dev ## measure throughput on this machine, base against adapters (ARGS=--quick for one short round)
	$(TOOL) tools/bench.py $(ARGS)

bench-life: $(VENV)/.dev ## measure what loads, uploads, vectors of long inputs and a working set beyond the memory cost
	$(TOOL) tools/bench_life.py $(ARGS)

bench-formats: $(VENV)/.dev ## measure what hostile grammars cost a stream beside them
	$(TOOL) tools/bench_formats.py $(ARGS)

bench-encoders: $(VENV)/.dev ## measure an encoder's vectors beside sentence-transformers (ARGS=FOLDER of a model of its)
	$(TOOL) tools/bench_encoders.py $(ARGS)

bench-overload: $(VENV)/.dev ## measure a server that is asked for more than it can do, and who pays for a flood
	$(TOOL) tools/bench_overload.py $(ARGS)

.PHONY: bench-shared
bench-shared: $(VENV)/.dev ## measure what a shared store costs, and two servers on it beside one (ARGS=--ray for replicas too)
	$(TOOL) tools/bench_shared.py $(ARGS)

bench-extract: $(VENV)/.dev ## measure how much of a full fine-tune adapters of each rank keep (half an hour)
	PYTHONPATH=tests/support:demo $(BIN)/python tools/loop/bench_extract.py $(ARGS)

bench-evaluation: $(VENV)/.dev ## measure what an evaluation costs the live stream beside it (four minutes)
	PYTHONPATH=tools:tests/support:tests/kinds $(BIN)/python tools/loop/bench_evaluation.py $(ARGS)

.PHONY: simulate
simulate: $(VENV)/.dev ## routing by affinity beside other ways on 2 to 64 replicas, on paper (some minutes; ARGS=--quick)
	$(TOOL) tools/routing/simulate.py $(ARGS)

clients: $(VENV)/.dev ## run other people's clients against a server, and write the table of docs/clients.md (some minutes)
	$(TOOL) tools/clients $(ARGS)

tables: $(VENV)/.dev ## write the measured tables of the docs (some minutes)
	$(TOOL) tools/kinds_table.py
	$(TOOL) tools/refused_list.py

picture: $(VENV)/.dev ## take the README's picture of the page again (needs Chromium)
	PYTHONPATH=tests/support:tests/page $(BIN)/python tools/pictures/page.py

.PHONY: dashboard-picture
dashboard-picture: $(VENV)/.dev ## draw the dashboard's panels as Prometheus answers them (apt install prometheus)
	$(TOOL) tools/pictures/dashboard.py $(ARGS)

# the path is set, so that it runs from the tree alone where the packages are there and this one is not installed
gpu-check: $(VENV)/.dev ## check what a GPU serves, and measure it against its floors (ARGS=--dry: a small form on the CPU)
	PYTHONPATH=tools:tools/proving:server:adapters:tests/support:tests/kinds $(BIN)/python tools/gpu_check.py $(ARGS)

demo-adapters: $(VENV)/.dev ## train the demo adapters again, into build/demo, and the classifiers (about half an hour on two cores)
	$(BIN)/python demo/make_data.py build/demo
	for name in sql json intent; do $(BIN)/swaplora train --config demo/recipes/$$name.toml $(ARGS) || exit; done
	$(BIN)/python demo/train_classifiers.py

clean: ## remove the environment and all caches
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .clients
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and stays pinned beside everything else: the build chosen here (a CPU one where pip is set up with
# an index that has it) is the one that stays, and no later package pulls in gigabytes of another.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "swaplora needs Python 3.11 or newer: set PYTHON=")'
	@echo "making $(VENV) and installing $(TORCH) (once, about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) $(TORCH)
	@touch $@

$(VENV)/.runtime: pyproject.toml $(VENV)/.torch
	@echo "installing swaplora"
	@$(INSTALL) $(TORCH) -e .
	@touch $@

$(VENV)/.ray: $(VENV)/.dev
	@echo "installing Ray"
	@$(INSTALL) $(TORCH) -e '.[dev,ray]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	@echo "installing swaplora and its development tools"
	@$(INSTALL) $(TORCH) -e '.[dev]'
	@touch $@

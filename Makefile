# Two commands on a fresh machine with Python 3.11: `make demo` and `make test`. Each installs what it needs into .venv first.
# Without a GPU, `UV_TORCH_BACKEND=cpu make demo` fetches PyTorch's smaller CPU build where its index can be reached.

PYTHON ?= python3.11
BIN    := .venv/bin
STORE  ?= out/store
JOBS   ?= 2

export PREFECT_SERVER_ANALYTICS_ENABLED = false
export DO_NOT_TRACK = 1

.PHONY: install demo test check unit serve benchmark clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable .
	touch $@

# compileall: tests start many processes, and each would compile torch anew where Python may not write bytecode
.venv/.installed-dev: .venv/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable . --group dev
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # some packages carry templates and files broken on purpose
	touch $@

demo: install  ## the demo manifest becomes a release; then the ground truth says how good it is
	$(BIN)/darkroom run data/manifests/demo.parquet --store $(STORE) --name demo --judge data/models/tiny-clip-judge
	@$(BIN)/python data/models/ground_truth.py --store $(STORE) --name demo

test: check unit

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: .venv/.installed-dev  ## files of tests, JOBS at a time; PYTEST="-m 'not slow'" leaves the long ones out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST)

serve: install  ## server, work pool, worker and deployments on this machine; Ctrl-C stops them all
	PATH="$(CURDIR)/$(BIN):$$PATH" deployments/serve.sh

benchmark: install
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/select.py
	$(BIN)/python benchmarks/plan.py

clean:  ## the demo's store and reports; not .venv
	rm -rf out

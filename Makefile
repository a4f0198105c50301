# The two commands of the README are `make demo` and `make test`; both work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed
# The peer of the derivatives' tests and benchmarks. Without its dependencies: through backpack they ask for torchvision, whose
# wheel does not fit a CPU build of torch, and transformers stumbles over such a one.
PEER := curvlinops-for-pytorch linear_operator einconv einops opt_einsum

.PHONY: demo lab-study forecast-study test lint format bench bench-geometry bench-large clean

# torch first and by itself: a plain `torch` of another package would fetch the newest CUDA build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[lab,dev]'
	$(PIP) --no-deps $(PEER)
	touch $@

demo: $(STAMP)
	$(BIN)/python -m paper_repro.lab build --out runs/demo-lab
	$(BIN)/interference geometry runs/demo-lab/base -o runs/demo-geometry $(foreach d,math code qa writing,$(d)=runs/demo-lab/rl_$(d))
	$(BIN)/interference forecast runs/demo-lab/forecast.yaml
	$(BIN)/interference diagnose runs/demo-lab/diagnose.yaml
	$(BIN)/python analyses/forecast.py

# A world whose answers show steps: single-domain, multi-task and merged models, before and after RL (about 25 minutes).
lab-study: $(STAMP)
	$(BIN)/python -m paper_repro.lab build --world m2rl --out runs/m2rl-lab
	$(BIN)/interference probe runs/m2rl-lab/probe.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On an idle core about 15 minutes; the large size 45 minutes and 18 GiB.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.jets --size small
	$(BIN)/python -m benchmarks.jets --size medium

bench-geometry: $(STAMP)
	$(BIN)/python -m benchmarks.geometry

bench-large: $(STAMP)
	$(BIN)/python -m benchmarks.jets --size large --rounds 2

# Processor hours; finished stages are reused, and two processes share the set-ups (protocol.md).
forecast-study: $(STAMP)
	$(BIN)/python -m paper_repro.forecast_study run & $(BIN)/python -m paper_repro.forecast_study run; wait
	$(BIN)/python -m paper_repro.forecast_study run
	$(BIN)/python -m paper_repro.forecast_study score

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache

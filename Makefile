# What a person types. Every target sets up what is missing first; the second time that costs nothing.

PYTHON ?= python3
JOBS ?= 2
export PYTHON
# Enough to run everything from this folder where nothing can be installed, and harmless where it is.
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
export PYTHONUNBUFFERED := 1
# OpenMP threads that spin while they wait starve the others where cores are shared: 4 s a training step instead of 0.6 s.
export OMP_WAIT_POLICY := passive

READY := .venv/ready
# diffusers, a sentence-embedding model and what they want: only the suite, benchmarks and some examples need them
READY_EXTRAS := .venv/ready-cogvideox,embeddings
READY_DOCS := .venv/ready-docs
RUN = $$( [ -x .venv/bin/python ] && echo .venv/bin/python || echo $(PYTHON) )
XDIST = $$( $(RUN) -c 'import xdist' 2>/dev/null && printf '%s' '-n $(JOBS)' )

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow bench costs gpu gpu-rehearsal lint types aot versions docs notebook gallery dist browser lerobot

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints-cpu.txt scripts/setup.sh
	@scripts/setup.sh

$(READY_EXTRAS): $(READY)
	@scripts/setup.sh cogvideox,embeddings

$(READY_DOCS): $(READY) pyproject.toml
	@scripts/setup.sh docs

setup: $(READY) $(READY_EXTRAS) ## make .venv ready (every other target does it when needed)

demo: $(READY) ## CartPole end to end: record, declare, train, compare, draw; OUT=folder (default out/demo)
	@$(RUN) -m examples.cartpole --out $(or $(OUT),out/demo)

test: $(READY_EXTRAS) ## the whole suite; JOBS=processes, ARGS="what pytest takes"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest $(XDIST) -q $(ARGS)

slow: $(READY_EXTRAS) ## the tests that take minutes: every function in every mode of torch, 2,200 random canvases, two processes
	@OMP_NUM_THREADS=1 $(RUN) -m pytest $(XDIST) -q -m slow $(ARGS)

bench: $(READY_EXTRAS) ## block-sparse attention against dense masks and loops, ten minutes; docs/benchmarks and docs/performance.md's tables
	@OMP_NUM_THREADS=1 $(RUN) -m benchmarks.bench --seconds 2 --save benchmarks/results/bench.json
	@$(RUN) -m benchmarks.bench --documents

costs: $(READY_EXTRAS) ## what takes long: functions, fleets, CogVideoX, slow providers, most of an hour; docs/families.md and the report
	@OMP_NUM_THREADS=1 $(RUN) -m benchmarks.bench --long --seconds 60 --save benchmarks/results/long.json
	@$(RUN) -m benchmarks.bench --documents

gallery: $(READY) ## pictures of canvases, topologies and tables, with the lines that draw them: docs/gallery.md
	@OMP_NUM_THREADS=1 $(RUN) -m scripts.gallery

notebook: $(READY_DOCS) ## the tutorial as a notebook: examples/tutorial.ipynb, and run into out/tutorial.ipynb
	@OMP_NUM_THREADS=1 $(RUN) -m scripts.notebook

docs: $(READY_DOCS) gallery notebook ## the site with its gallery and the notebook run, strictly and offline, into out/site
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build && echo "out/site/index.html"

versions: ## the suite on the oldest, the reference and the newest versions, beside .venv; ARGS="what pytest takes"
	@ARGS="$(ARGS)" JOBS=$(JOBS) scripts/versions.sh

lerobot: ## files of ours under LeRobot's own loader and the reverse, in an environment of its own beside .venv
	@scripts/lerobot.sh

dist: $(READY) ## wheel and sdist: the wheel runs by itself, and the sdist's own tests pass in its folder
	@scripts/dist.sh

browser: ## Chromium for the explorer's tests, by apt-get where that is there and none is installed
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		{ command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y chromium >/dev/null; } || \
		echo "browser: no Chromium, and none could be installed; the explorer's tests in it say so and are skipped"

lint: $(READY) ## ruff
	@$(RUN) -m ruff check .

types: $(READY_EXTRAS) ## pyright, on both packages
	@$(RUN) -m pyright --pythonpath $(RUN) --level error $(ARGS)

aot: $(READY) $(TRITON:%=.versions/triton-%) ## compile every shipped kernel without a GPU and read rates off the machine code; none may be worse than before; TRITON=3.6.0: sm_90 with that release
	@PYTHONPATH=$(TRITON:%=$(CURDIR)/.versions/triton-%:)$(PYTHONPATH) $(RUN) -m benchmarks.aot \
		--save out/aot$(TRITON:%=-%).json $(TRITON:%=--arch sm_90) $(ARGS)

.versions/triton-%: | $(READY)
	@$(RUN) -m pip install --quiet --no-deps --target $@.part triton==$* && mv $@.part $@

# No set-up here: a GPU machine is measured with its own torch and Triton, and may have no network.
gpu: ## on an NVIDIA machine: correctness, timings and profiles in less than six minutes; OUT=folder, ARGS=--resume
	@$(PYTHON) -m benchmarks.gpu --out $(or $(OUT),out/gpu) $(ARGS)

gpu-rehearsal: ## all of make gpu at toy size, without a GPU, on the reference GPU machine's versions; OUT=folder
	@OUT=$(or $(OUT),out/gpu-rehearsal) scripts/versions.sh rehearsal

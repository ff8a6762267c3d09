# make demo | make test | make quick | make fuzz | make test-matrix | make check | make docs | make reports | make public |
# make dist | make lock | make offline-bundle | make bigger-than-memory | make faults:
# each creates the environment if there is none.
PYTHON ?= python3
# Tests start hundreds of processes, which would otherwise compile every module again.
export PYTHONDONTWRITEBYTECODE :=
VENV ?= .venv
BIN := $(VENV)/bin
LOCKS := $(wildcard requirements/*.lock) scripts/install_locked.sh
SOURCES := planner models distributed reports cli

.PHONY: demo test quick fuzz test-matrix system-packages check format docs reports public dist lock \
	offline-bundle bigger-than-memory faults clean
.NOTPARALLEL:

demo: $(VENV)/.demo
	PATH="$(abspath $(BIN)):$$PATH" sh examples/demo.sh

# Tests that start ranks begin when DeepSpeed's ops are compiled, which takes minutes; then half of the workers run them.
# One worker more than there are cores keeps two cores busy; with two more, the ranks disturb each other, and
# all takes a seventh longer. At most eight.
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$(( cores < 8 ? cores + 1 : 8 )))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist load --no-loadscope-reorder
FAST := --ignore tests/integration --ignore tests/browser --ignore tests/docs --ignore tests/scripts \
	--ignore tests/benchmarks --ignore tests/architecture/test_dist.py -m "not slow"

test: system-packages $(VENV)/.dev
	$(PYTEST) --compile-ops

# Without the tests that start ranks or a browser, build documentation or packages, run scripts or benchmarks, or are slow.
quick: $(VENV)/.dev
	$(PYTEST) $(FAST) -m "not slow and not ranks"

# The tests that draw their cases at random, with a new seed and many more cases.
SEED ?= $(shell date +%s)
fuzz: system-packages $(VENV)/.dev
	@echo "seed $(SEED); the same cases again: make fuzz SEED=$(SEED)"
	TRANSLUTION_FUZZ_SEED=$(SEED) $(PYTEST) --compile-ops -m "hypothesis or fuzz" --hypothesis-seed=$(SEED) || \
		{ echo "the same cases again: make fuzz SEED=$(SEED)"; exit 1; }

# The fast tests with the oldest allowed Python and packages, and with the newest, but for those of the sources' structure.
test-matrix: $(VENV)/.dev
	sh scripts/test_matrix.sh $(abspath $(BIN)/uv) -n logical $(FAST) --ignore tests/architecture

system-packages:
	@sh scripts/install_system_packages.sh

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/hadolint Dockerfile
	$(BIN)/python scripts/check_wording.py
	$(BIN)/lint-imports --no-logo --cache-dir build/import_linter
	PATH="$(abspath $(BIN)):$$PATH" sh scripts/check_types.sh

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	$(BIN)/python scripts/pictures/import_graph.py
	$(BIN)/python scripts/pictures/drawings.py
	$(BIN)/python scripts/pictures/record_plan.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo wrote build/site/index.html

# The committed gallery. Commands stand on its pages as they are here.
PLANS := build/plans
GALLERY := reports/gallery
EXPERIMENTS := $(if $(wildcard reports/experiments/*/result.json),--experiments reports/experiments)

reports: $(VENV)/.demo
	$(BIN)/translution plan vit-base/16 --cluster 8xH100 --precision bf16 --data synthetic --out $(PLANS)/vit-base --force
	mkdir -p $(GALLERY)
	rm -f $(GALLERY)/*.svg $(GALLERY)/index.html $(GALLERY)/README.md $(GALLERY)/gallery.json
	$(BIN)/translution report $(PLANS)/vit-base \
		--model vit-base/16 --model vit-tiny/56 --model vit-small/16 --model vit-large/16 \
		--model gpt-small/160 --model gpt-base/1024 --model gpt-large/1024 \
		--compare vit-base/16 --compare vit-large/16 --compare gpt-base/1024 --scaling vit-small/16 --cluster 8xH100 \
		--accuracy reports/accuracy.json --step-time reports/step_time.json $(EXPERIMENTS) \
		--benchmarks benchmarks/results --gpu reports/gpu --public reports/public.json \
		--out $(GALLERY)/index.html --markdown $(GALLERY)/README.md --data $(GALLERY)/gallery.json

# Predicted and published step times of real GPUs.
public: $(VENV)/.demo
	$(BIN)/python benchmarks/public_runs.py --out reports

# Trains a model whose training state exceeds this machine's memory, for half an hour or more; BIGGER has options of the
# script, such as --nvme-path.
bigger-than-memory: $(VENV)/.demo
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/bigger_than_memory.py $(BIGGER)

# Disturbs runs in some twenty ways, for about ten minutes, and writes reports/faults.md; as root, or some are left out.
faults: system-packages $(VENV)/.demo
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/faults.py --out reports/faults.md

# The wheel and the sdist of a release, checked, and the list of the packages that it was tested with (CycloneDX); TAG is the
# release's tag, for the last step of CONTRIBUTING.md.
dist: $(VENV)/.dev
	$(BIN)/python scripts/check_release.py $(TAG)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	mkdir -p build/release
	cat requirements/torch-cuda.lock requirements/build.lock requirements/demo.lock requirements/use.lock | \
		PYTHONWARNINGS=ignore $(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --mc-type library --output-reproducible \
		--output-format JSON --output-file build/release/translution-scale.cdx.json -

# The wheels that a machine with torch and without a network needs; BUNDLE has options of the script, such as --python.
offline-bundle: $(VENV)/.dev
	$(BIN)/python scripts/offline_bundle.py --out build/offline $(BUNDLE)

# The versions and hashes of every package that an environment holds; after a change of pyproject.toml or constraints.txt.
lock: $(VENV)/.dev
	$(BIN)/python scripts/lock_requirements.py

$(VENV)/.demo: pyproject.toml $(LOCKS) scripts/check_system.sh
	sh scripts/check_system.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sh scripts/install_locked.sh $(BIN)/python requirements/demo.lock
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	sh scripts/install_locked.sh $(BIN)/python requirements/demo.lock requirements/use.lock requirements/dev.lock
	touch $@

clean:
	rm -rf $(VENV) build demo dist *.egg-info

# `make demo` and `make test` install what they need first; a second call reuses the environment.

VENV ?= .venv
DEMO ?= runs/demo
DOCS_VENV ?= .venv-docs
BIN := $(abspath $(VENV))/bin
IMAGE ?= fastssl
IMAGE_BUILD ?= docker build
# Bytecode is written, whatever the environment says: tests start hundreds of processes that import the packages.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -p no:cacheprovider
# A worker a core and one more, up to eight: a third of the time tests wait. The slow ones measure, one at a time.
PARALLEL := -n $(shell cores=$$(nproc); echo $$((cores < 8 ? cores + 1 : 8))) --dist worksteal

.PHONY: demo test test-slow test-multinode fuzz lint format type clean install install-dev image docs

install:
	@VENV=$(VENV) scripts/install.sh run

install-dev:
	@VENV=$(VENV) scripts/install.sh dev

demo: install
	@PATH="$(BIN):$$PATH" scripts/demo.sh $(DEMO)

test: install-dev
	$(PYTEST) $(PARALLEL) -m "not slow and not gpu and not multinode" $(ARGS)

test-slow: install-dev
	$(PYTEST) -m "slow and not gpu and not multinode" $(ARGS)

# Two hosts on this machine: needs root and iproute2, and skips without.
test-multinode: install-dev
	$(PYTEST) -rs tests/multinode $(ARGS)

# CASES=10000: of each file of tests/fuzz. The last lines say how many cases ran.
fuzz: install-dev
	FUZZ_CASES=$(or $(CASES),1000) $(PYTEST) -q -n0 tests/fuzz $(ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/hadolint Dockerfile

type: install-dev
	$(BIN)/pyright

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, build/docs/site/index.html. A warning is an error. Its environment has none of the packages of a training.
docs: $(DOCS_VENV)/installed
	$(DOCS_VENV)/bin/python scripts/docs_site/build.py

$(DOCS_VENV)/installed: requirements/docs.txt
	$(or $(PYTHON),python3) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install -q --disable-pip-version-check -r requirements/docs.txt
	@touch $@

# BASE=... builds on another base image; IMAGE_BUILD="buildah build ..." needs no daemon (docs/docker.md).
image:
	$(IMAGE_BUILD) --tag $(IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .import_linter_cache

# Needs make and Python 3.11 or newer; `make test` needs Go and etcd, too. Everything else is installed into .venv, with hashes.
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo setup test test-fast kube-servers coverage test-programs test-managers conformance matrix skew check bench docs chart image test-image test-migration e2e e2e-demo lock clean

PYTHON ?= python3
GO ?= go
UV ?= uv

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_CLIENT := build/democlient
GO_FILES := $(shell find conformance -name '*.go' -o -name go.mod -o -name go.sum)
SANS_IO := src/clusterproxy_proto/*,src/clusterproxy/grpc/*,src/clusterproxy/tunnel/*
MANAGERS := $(sort $(wildcard tests/kube/test_addon*.py tests/kube/test_manager*.py))
PYTEST_ARGS ?=
BENCH_ARGS ?=
E2E_ARGS ?=
IMAGE ?=
IMAGE_ARCHES ?=
IMAGE_ARGS ?=

help: ## show this
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## certificates, server, agent and a service that only the agent reaches; requests through the tunnel
	@if command -v $(GO) >/dev/null; then $(MAKE) -s $(DEMO_CLIENT) || echo "The Go client could not be built: the demo goes on without it."; fi
	@exec $(BIN)/clusterproxy demo $$(test -x $(DEMO_CLIENT) && echo --go-client $(DEMO_CLIENT)) $(DEMO_ARGS)

setup: $(READY) ## the virtual environment, which all other targets make as needed

test: $(READY) go-is-here kube-servers $(DEMO_CLIENT) coverage ## all tests with coverage, and the conformance matrix against Go (needs Go and etcd)

test-fast: $(READY) ## the tests that start no programs (no Go, under 90 s)
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m 'not programs and not kube and not image and not e2e' --hypothesis-profile=fast $(PYTEST_ARGS)

e2e: $(READY) go-is-here kube-servers ## the documentation's steps on a hub and two clusters, in namespaces of their own (7 minutes; E2E_ARGS=--image)
	@cd tests && ../$(BIN)/python -m e2e $(E2E_ARGS)

e2e-demo: $(READY) go-is-here kube-servers ## the demo of the whole, as docs/demo tells: from the Go original to ours and back (7 minutes)
	@cd tests && ../$(BIN)/python -m e2e --demo

kube-servers: $(READY) go-is-here ## the Kubernetes, OCM and Prometheus of the tests, built once (10 to 20 minutes) and kept in the user's cache folder
	@PYTHONPATH=tests $(BIN)/python -m kube.build

coverage: $(READY)
	@$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n auto --dist loadfile -m 'not programs and not kube and not image and not e2e' $(PYTEST_ARGS)
	@echo "Two halves side by side, the first one's output as it comes, the second one's when it has ended ..."
	$(BIN)/python tests/side_by_side.py -- $(MAKE) -s test-programs -- $(MAKE) -s -k test-managers matrix
	@$(MAKE) -s skew
	@$(BIN)/coverage combine -q
	$(BIN)/coverage report --fail-under=90
	$(BIN)/coverage report --fail-under=100 --include='$(SANS_IO)'

# They wait as much as they work. The second half has ports by a slot, from a range of its own, or at an address of its own.
test-programs: $(READY) go-is-here
	$(BIN)/coverage run -m pytest -m '(programs or kube) and not image and not e2e and not migration' $(MANAGERS:%=--ignore=%) $(PYTEST_ARGS)

test-managers: $(READY) go-is-here
	$(BIN)/coverage run -m pytest -m 'not migration' $(MANAGERS) $(PYTEST_ARGS)

conformance: matrix skew

matrix: $(READY) go-is-here
	@mkdir -p build
	cd conformance && $(GO) run ./cmd/matrix -binding -json ../build/conformance.json

# Its rows are whole sessions with programs of others: one of them lost a greeting while two cores did the work of six.
skew: $(READY) go-is-here
	cd conformance && $(GO) run ./cmd/skew

check: $(READY) ## ruff, mypy --strict, pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY) go-is-here ## measure beside the Go programs and others: verdicts and plots (more than half an hour; BENCH_ARGS=--quick: everything once)
	@PYTHONPATH=conformance $(BIN)/python -m bench --json build/bench.json $(BENCH_ARGS)

docs: $(READY) ## write docs/api.md and the pinned public surface anew
	$(BIN)/python tests/public_surface.py

chart: $(READY) go-is-here ## pack the Helm charts into dist/charts, with their index
	@rm -rf dist/charts && mkdir -p dist/charts
	PYTHONPATH=tests $(BIN)/python -m helm_programs dist/charts

test-migration: $(READY) go-is-here kube-servers ## from the Go original to ours and back, under traffic (10 minutes)
	$(BIN)/python -m pytest -m migration $(PYTEST_ARGS)

test-image: $(READY) go-is-here ## the tests of the container image (root, buildah, podman, runc, debootstrap; 2 minutes, the first time 5)
	$(BIN)/python -m pytest -m image $(PYTEST_ARGS)

image: $(READY) go-is-here ## build the container image, by buildah, podman or docker (IMAGE=NAME:TAG, IMAGE_ARCHES="amd64 arm64")
	@IMAGE_ARCHES="$(IMAGE_ARCHES)" deploy/image/build.sh "$(IMAGE)" $(IMAGE_ARGS)

lock: ## write requirements/*.txt anew from pyproject.toml (needs uv)
	$(UV) pip compile $(LOCK) pyproject.toml -o requirements/runtime.txt
	$(UV) pip compile $(LOCK) pyproject.toml requirements/tools.in --extra demo --group dev -o requirements/dev.txt
	echo cyclonedx-bom | $(UV) pip compile $(LOCK) - -o requirements/image-tools.txt

clean: ## remove everything that make has made here
	rm -rf $(VENV) build dist .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis

LOCK := -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url

$(READY): requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "This needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Installing into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(DEMO_CLIENT): $(GO_FILES)
	@echo "Building the Go client ..."
	@cd conformance && $(GO) build -o ../$@ ./cmd/democlient

.PHONY: go-is-here
go-is-here:
	@command -v $(GO) >/dev/null || { echo "The tests compare with the original programs, which are written in Go: install Go, or run make test-fast."; exit 1; }

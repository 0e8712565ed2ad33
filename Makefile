# Every target sets up what it needs: on a fresh machine with Python 3.11 one command is enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
# Most of a cluster test is waiting for leases and process starts: two files at a time fit on two cores.
JOBS   ?= 2
PYTEST := $(BIN)/python -m pytest
MANY   := $(PYTEST) -n $(JOBS) --dist loadfile
ARGS   ?=
SEED   ?=
PROTOS := $(wildcard proto/backstayd/v1/*.proto)
# Types of the wire messages: for mypy and editors, made when proto/ is newer, not checked in.
STUBS  := daemon/backstayd/v1/coordinator_pb2.pyi
PROTOC  = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto

.PHONY: help setup demo bench fmt lint type test test-quick test-cluster simulate proto sample manifests checkov check clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) $(STUBS)  ## make .venv with everything in it

# torch goes first and alone, so that nothing else chooses another version of it.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "backstay needs Python 3.11 or newer: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11" >&2; exit 1; }
	@test -x $(BIN)/python -a -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && rm -rf $(VENV) && \
		apt-get update -q && apt-get install -q -y python3-venv && $(PYTHON) -m venv --clear $(VENV); } || { \
		rm -rf $(VENV); echo "cannot make a virtual environment: apt-get install python3-venv, then try again" >&2; exit 1; }
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable '.[dev,test]' setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation deepspeed==0.19.8
	@touch $(STAMP)

demo: $(STAMP)  ## break a real training run and watch it recover (ARGS="--nodes 4 ...")
	$(BIN)/backstay demo $(ARGS)

bench: $(STAMP)  ## measure what a snapshot costs, against peers (ARGS="--json FILE ...")
	$(BIN)/python -m bench $(ARGS)

fmt: $(STAMP)  ## format the code
	$(BIN)/ruff format client daemon bench tests
	$(BIN)/ruff check --fix --quiet client daemon bench tests || true

lint: $(STAMP)  ## ruff and the layers
	$(BIN)/ruff check client daemon bench tests
	$(BIN)/lint-imports --no-cache

type: $(STAMP) $(STUBS)  ## mypy, strict
	$(BIN)/mypy

test: $(STAMP)  ## all tests (ARGS="-k name"; JOBS=1 one file at a time)
	$(MANY) tests $(ARGS)

test-quick: $(STAMP)  ## the tests without the cluster tier
	$(MANY) tests --ignore=tests/cluster $(ARGS)

test-cluster: $(STAMP)  ## real daemons and trainers as processes
	$(MANY) tests/cluster $(ARGS)

simulate: $(STAMP)  ## the cores of many nodes under a seeded fake network (SEED=7)
	BACKSTAY_SEED=$(SEED) $(PYTEST) tests/simulation $(ARGS)

proto: $(STAMP) $(STUBS)  ## generate daemon/backstayd/v1 from proto/
	$(PROTOC) --python_out=daemon --grpc_python_out=daemon $(PROTOS)

$(STUBS): $(PROTOS) pyproject.toml | $(STAMP)
	@$(PROTOC) --mypy_out=quiet:daemon --mypy_grpc_out=quiet:daemon $(PROTOS)

sample: $(STAMP)  ## write deploy/config and docs/configuration.md from the code
	$(BIN)/python -m backstayd.config.reference --sample > deploy/config/backstayd.toml
	$(BIN)/python -m backstayd.config.reference > docs/configuration.md

check: lint type test-quick  ## what a change must pass

checkov: .venv-checkov/bin/checkov  ## what judges the manifests, apart from the rest: it is large and clashes with it

.venv-checkov/bin/checkov:
	$(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/pip install --quiet checkov==3.3.30

manifests: $(STAMP)  ## write deploy/kubernetes from the chart
	$(BIN)/python deploy/kubernetes/render.py

clean:  ## remove what was built (not .venv)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Every target sets up what it needs; `.venv` is made once and reused.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-long lint proto bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard kernels/csrc/*.cpp)
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11: make PYTHON=/path/to/python3.11" >&2; exit 4; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	@$(BIN)/diloco demo

test: lint
	$(BIN)/python -m pytest -q -m "not long"

test-long: install
	$(BIN)/python -m pytest -q -m long

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proto: install
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. diloco/comms/diloco_v1.proto

bench: install
	$(BIN)/python benchmarks/demo_parity.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache runs

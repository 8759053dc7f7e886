# `make help` lists the targets. Each may be run twice: what is installed already is not installed again.
# `make test VENV=/path` uses another environment, and adds only what it lacks.

VENV ?= .venv
PYTHON = $(VENV)/bin/python
PIP = $(PYTHON) -m pip --disable-pip-version-check
DONE = $(VENV)/.flashtask
# One torch thread a process and a process a core: the tests are many small models. Bytecode is written even where the
# environment forbids it: otherwise each of the many processes that they start compiles the package again.
IN_TESTS = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PYTHON) -m pytest -n 2
PYTEST = $(IN_TESTS) --dist loadfile
# One file builds every backbone, so here tests are shared out one by one.
PYTEST_LONG = $(IN_TESTS) --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo demo-detection demo-instances demo-segmentation demo-keypoints test test-long lint types bench clean

# An environment that another checkout was installed into is installed again.
ifneq ($(shell cat "$(DONE)/checkout" 2>/dev/null),$(CURDIR))
$(shell rm -rf "$(DONE)")
endif

help:
	@sed -n 's/^## //p' Makefile

## make install   the package and what the demo needs, into .venv
install: $(DONE)/demo

## make demo      fine-tune on photographs of solar cells, predict, show where the run is (about a minute)
demo: $(DONE)/demo
	$(PYTHON) scripts/demo.py

## make demo-detection   fine-tune on aerial photographs of trees, draw the boxes that are found (four minutes)
demo-detection: $(DONE)/detection $(DONE)/demo
	test -f demo/packages/deepforest-2.1.0-py3-none-any.whl || $(PIP) download --quiet --no-deps --dest demo/packages deepforest==2.1.0
	$(PYTHON) scripts/demo_detection.py

## make demo-instances   fine-tune on nuclei under a microscope, draw each of those that are found (some minutes)
demo-instances: $(DONE)/detection $(DONE)/demo
	$(PYTHON) scripts/demo_instances.py

## make demo-segmentation   fine-tune on cells under a microscope, draw the predicted masks (some minutes)
demo-segmentation: $(DONE)/demo
	$(PYTHON) scripts/demo_segmentation.py

## make demo-keypoints      fine-tune on keypoints of nuclei under a microscope, draw them (some minutes)
demo-keypoints: $(DONE)/demo
	$(PYTHON) scripts/demo_keypoints.py

## make test      every promise, at a few of its cases (some minutes)
test: $(DONE)/test
	$(PYTEST)

## make test-long all the other cases: every entry of the zoo, every launcher, thousands of damaged files
test-long: $(DONE)/test
	$(PYTEST_LONG) -m long

## make lint      ruff: mistakes and layout; size and structure of the package against scripts/house.json
lint: $(DONE)/dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) scripts/house.py --check

## make types     mypy, strict; .link gives it the package under its own name
types: $(DONE)/dev
	mkdir -p .link
	ln -sfn .. .link/flashtask
	$(PYTHON) -m mypy

## make bench     flashtask, a loop by hand and every peer that is installed; BENCH="--quick" sees whether it runs
bench: $(DONE)/bench
	$(PYTHON) benchmarks/run.py $(BENCH)

## make clean     remove what the targets made, except the environment
clean:
	rm -rf .hypothesis .link .mypy_cache .pytest_cache .ruff_cache build demo dist flashtask.egg-info
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

$(PYTHON):
	python3 -m venv "$(VENV)"

# First, and alone: torch and torchvision must be one pair.
$(DONE)/torch: constraints.txt | $(PYTHON)
	$(PIP) install --quiet --constraint constraints.txt torch torchvision
	mkdir -p "$(DONE)"
	pwd > "$(DONE)/checkout"
	touch $@

# The extra of pyproject.toml with the name of the target. A left-over egg-info would add its files to the next sdist.
$(DONE)/%: pyproject.toml constraints.txt $(DONE)/torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$*]"
	rm -rf build flashtask.egg-info
	touch $@

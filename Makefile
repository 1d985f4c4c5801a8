# Two commands do all their own set-up, on a machine with Python 3.11 and nothing else:
#   make demo    install, then distil, export and bench the embedded digits; ends in a table and a report
#   make test    install, then ruff, mypy and every test
# and a third the long form of the tests that kill and fuzz:
#   make soak    install, then some fifty kills and ten thousand hostile inputs
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP = -m pip install --quiet --disable-pip-version-check
VENV = .venv/bin

.PHONY: demo test soak clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	$(VENV)/prgkit distill demo export --trt bench

test: .venv/dev.stamp .venv-base/base.stamp
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/python -m pytest

soak: .venv/dev.stamp .venv-base/base.stamp
	$(VENV)/python -m pytest -m soak -o faulthandler_timeout=3600

clean:
	rm -rf .venv .venv-base runs targets

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(VENV)/python $(PIP) -e '.[demo]'
	touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(VENV)/python $(PIP) -e '.[dev]'
	touch $@ .venv/demo.stamp

# The device's install: no torch. Tests prove there what must run without it.
.venv-base/base.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-base
	.venv-base/bin/python $(PIP) -e .
	touch $@

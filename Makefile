# Two commands do all their own set-up, on a machine with Python 3.11 and nothing else:
#   make demo    install, then distil, export and bench the embedded digits; ends in a table and a report
#   make test    install, then ruff, mypy and every test, in two processes (WORKERS=4: in four)
# Three more:
#   make docs    install, then build the site in build/docs; a broken link or reference fails
#   make soak    install, then some fifty kills and ten thousand hostile inputs
#   make dist    build wheel and source archive, check them, and try the wheel without extras in an environment of its own
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP = -m pip install --quiet --disable-pip-version-check
VENV = .venv/bin
WORKERS ?= 2

.PHONY: demo test docs soak dist clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	$(VENV)/prgkit distill demo export --trt bench

test: .venv/dev.stamp .venv-base/base.stamp
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/python -m pytest -n $(WORKERS) --dist loadfile

docs: .venv/docs.stamp
	$(VENV)/python -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env --quiet docs build/docs
	@echo "the site is build/docs/index.html"

soak: .venv/dev.stamp .venv-base/base.stamp
	$(VENV)/python -m pytest -m soak -o faulthandler_timeout=3600

dist:
	rm -rf dist .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python $(PIP) build twine
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/python -m twine check --strict dist/*
	rm -rf .venv-dist build
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python $(PIP) dist/*.whl
	cd dist && ../.venv-dist/bin/python -c "from importlib.resources import files; \
	  lacks = [name for name in ('py.typed', 'demo/teacher/open_clip_model.safetensors', 'recipes/demo.yaml', \
	    'recipes/classes/cifar100.txt', 'evaluate/report/templates/sheet.html', \
	    'export/formats/templates/README.md.j2') if not (files('prgkit') / name).is_file()]; \
	  assert not lacks, lacks"
	cd dist && ../.venv-dist/bin/prgkit --version && ../.venv-dist/bin/prgkit recipes && ../.venv-dist/bin/prgkit doctor
	rm -rf .venv-dist

clean:
	rm -rf .venv .venv-base .venv-dist build dist runs targets

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(VENV)/python $(PIP) -e '.[demo]'
	touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(VENV)/python $(PIP) -e '.[dev]'
	touch $@ .venv/demo.stamp .venv/docs.stamp

.venv/docs.stamp: pyproject.toml | .venv/bin/python
	$(VENV)/python $(PIP) -e '.[docs]'
	touch $@

# The device's install: no torch. Tests prove there what must run without it.
.venv-base/base.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-base
	.venv-base/bin/python $(PIP) -e .
	touch $@

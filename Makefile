PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
APT := DEBIAN_FRONTEND=noninteractive apt-get

.PHONY: demo test check doc lab sample clean

demo: $(VENV)/.ready
	$(BIN)/python -m tests.lab.demo

test: $(VENV)/.ready check doc
	$(BIN)/pytest

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

doc: $(VENV)/.ready
	$(BIN)/sphinx-build -W --keep-going -q -b html doc doc/_build/html
	$(BIN)/sphinx-build -W --keep-going -q -b man doc doc/_build/man

lab: $(VENV)/.ready
	$(BIN)/python -m tests.lab

sample: $(VENV)/.ready
	$(BIN)/oslo-config-generator --namespace nvdimm_driver --output-file etc/nvdimm-driver.conf

# Debian's packages first: without python3-venv there is no virtual environment.
$(VENV)/.ready: setup.py pyproject.toml bindep.txt nvdimm_driver/xen/abi.py
	$(APT) update -q
	$(APT) install -q -y --no-install-recommends $$(cat bindep.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[test,doc]'
	touch $@

clean:
	rm -rf $(VENV) build dist doc/_build *.egg-info

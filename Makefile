# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
NOVA_VENV := .venv-nova
APT := DEBIAN_FRONTEND=noninteractive apt-get
DEB := dist/nvdimm-driver_$(shell sed -n '1s/.*(\(.*\)).*/\1/p' debian/changelog)_all.deb
DEB_SOURCES := setup.py pyproject.toml README.md NEWS.rst $(shell find debian doc etc nvdimm_driver shim -type f \
	! -path '*/__pycache__/*' ! -path 'doc/_build/*' ! -name _xen.py)

# Reports of tests, from which 'tried' makes the table of doc/hosts.rst.
REPORTS := build/reports
# What needs no lab. A test that hangs ends its process, and pytest-xdist gives the same test to the next process: so
# only one process is replaced.
HERE = nice -n 19 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 1 \
	-o faulthandler_timeout=2700 --junitxml $(REPORTS)/here.xml tests/unit tests/integration $(SELECTED)

.PHONY: demo test test-here test-long thorough tried check doc docs deb images lab sample xen-write-back clean

demo: $(VENV)/.ready
	$(BIN)/python -m tests.lab.demo

# Two targets at a time, each with its output in one piece. Then the lab, and beside it the other tests, which have
# what the lab leaves of the machine: its Xen and libvirt wait some seconds for a device model, and not more. Their
# lines are mixed; sed passes on whole ones. What the lab says of its failures comes once more at the end. The images of
# the other release are built by its first test, beside what needs no lab.
test: $(VENV)/.ready
	$(MAKE) -j2 --output-sync=target $(NOVA_VENV)/.ready images check doc deb
	@status=0; mkdir -p build; set -x -o pipefail; \
	($(BIN)/python -m pytest --junitxml $(REPORTS)/lab.xml tests/lab $(SELECTED) | sed -u 'w build/lab.log') & lab=$$!; \
	$(HERE) | sed -u '' || status=$$?; \
	wait $$lab || { status=$$?; sed -n '/^=\+ \(ERRORS\|FAILURES\) =\+$$/,$$p' build/lab.log; }; \
	tail -n 1 build/lab.log; \
	exit $$status

test-here: $(VENV)/.ready $(NOVA_VENV)/.ready deb
	$(HERE)

# Also run the slow tests, most of them the lab's, which 'test' leaves out, and what needs no lab on fresh systems of
# three releases.
thorough: SELECTED := -m 'not long'
thorough: test
	set -e; for release in trixie bookworm forky; do \
		$(BIN)/python -m tests.fresh --lab-cache $$release make test-here; \
	done

tried: $(VENV)/.ready
	$(BIN)/python -m tests.tried $(REPORTS)/*.xml

# Run what takes a day and more: doc/reliability.rst says what, and has the figures.
test-long: $(VENV)/.ready images
	@status=0; set -x; \
	$(BIN)/python -m pytest -s -m long -n 2 -o faulthandler_timeout=0 tests/unit tests/integration || status=$$?; \
	$(BIN)/python -m pytest -s -m long -o faulthandler_timeout=0 tests/lab || status=$$?; \
	exit $$status

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

doc: $(VENV)/.ready
	$(BIN)/sphinx-build -W --keep-going -q -b html doc doc/_build/html
	$(BIN)/sphinx-build -W --keep-going -q -b man doc doc/_build/man

docs: doc

deb: $(DEB)

# Build in a copy: the tools write into the source folder, and put the package beside it.
$(DEB): build/deb/.ready $(DEB_SOURCES)
	rm -rf build/deb/source
	mkdir -p build/deb/source dist
	@tar -cf - $(DEB_SOURCES) | tar -xf - -C build/deb/source
	@echo 'building $@'; cd build/deb/source && dpkg-buildpackage -b -us -uc >../build.log 2>&1 || { cat ../build.log; exit 1; }
	mv build/deb/$(@F) $@

build/deb/.ready: debian/control
	$(APT) update -q
	$(APT) build-dep -q -y --no-install-recommends ./
	mkdir -p $(@D)
	touch $@

images: $(VENV)/.ready
	$(BIN)/python -m tests.lab build

lab: $(VENV)/.ready
	$(BIN)/python -m tests.lab

sample: $(VENV)/.ready
	$(BIN)/oslo-config-generator --namespace nvdimm_driver --output-file etc/nvdimm-driver.conf

# Install Debian's packages first: the virtual environment needs python3-venv.
$(VENV)/.ready: setup.py pyproject.toml bindep.txt nvdimm_driver/xen/abi.py
	$(APT) update -q
	$(APT) install -q -y --no-install-recommends $$(cat bindep.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[test,doc]'
	touch $@

$(NOVA_VENV)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(NOVA_VENV)
	$(NOVA_VENV)/bin/pip install -q -e '.[nova,nova-test]'
	touch $@

# A hypervisor package with the change of contrib/xen-write-back, of the Debian release that RELEASE names.
xen-write-back:
	nice -n 19 $(PYTHON) contrib/xen-write-back/build.py $(RELEASE)

clean:
	rm -rf $(VENV) $(NOVA_VENV) build dist doc/_build *.egg-info

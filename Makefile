# make train: set up, then train the demo on two workers.   make test: set up, then lint, types and tests.
# ENGINE=torch, with any of these: without Horovod; torchrun starts the workers.
# make chaos: a run under fifty random faults, next to the same run left alone.
# make docs: builds the documentation into docs/_build/html; a warning is an error.
# make check-gpu: checks of exactness, speed and faults on a GPU, without make setup; make gpu-kit: what it needs there.
# make check-ops: draws the dashboard, builds the image and runs in it, runs a job under Slurm.
.PHONY: setup train test docs chaos gpu-kit check-gpu check-ops
SHELL := bash
export ENGINE ?= horovod
# Whole files in two processes of one thread: many tests wait for workers, so that one process leaves a core idle.
pytest = OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
launch_horovod = horovodrun -np 2
launch_torch = torchrun --standalone --nproc-per-node 2 --no-python

setup:
	@launch/setup.sh

train: setup
	@. .venv/bin/activate && $(launch_$(ENGINE)) python -m infomcr_dist.train $(ARGS)

test: setup
	@. .venv/bin/activate && ruff check && ruff format --check && mypy && $(pytest) $(ARGS)

docs: setup
	@. .venv/bin/activate && sphinx-build --fail-on-warning --keep-going --fresh-env -q docs docs/_build/html $(ARGS)

chaos: setup
	@. .venv/bin/activate && PYTHONPATH=. python benchmarks/chaos.py engine=$(ENGINE) $(ARGS)

gpu-kit:
	@launch/gpu_kit.sh $(if $(DALI),dali)

check-gpu:
	@$(or $(PYTHON),python3) benchmarks/gpu.py $(ARGS)

check-ops: setup
	@. .venv/bin/activate && python -m pytest -m ops $(ARGS)

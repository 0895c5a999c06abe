PYTHON ?= python

.PHONY: check soak completions
check:
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: check
	$(PYTHON) -m pytest -m "slow and not gpu and not network"

completions:
	$(PYTHON) -m opensora_cli.completion completions

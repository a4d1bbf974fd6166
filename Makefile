# las_nb: `make train` and `make test` work on a bare clone (git, make, Python >= 3.10).
PYTHON ?= python3
BIN := .venv/bin
NBTEST = OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/nbdev_test

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1|/p' Makefile | awk -F'|' '{printf "%-14s%s\n", $$1, $$2}'

.venv/ready: settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "las_nb needs Python >= 3.10; name one with: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	@touch $@

train: .venv/ready  ## plain attention and LaS on 8x8 digits, with a table and a figure (about 4 minutes)
	$(BIN)/las digits

test: .venv/ready  ## everything: export in sync, every notebook, pytest, docs checks (about 20 minutes)
	@$(NBTEST) --n_workers 1 --path nbs/solutions.ipynb & longest=$$!; \
	$(NBTEST) --n_workers 2 --timing --skip_file_re '^[_.]|solutions' && wait $$longest
	$(BIN)/python -m pytest -n 3 --dist worksteal

quick: .venv/ready  ## what a small change needs: layout, export in sync, imports, core mathematics, two notebooks
	$(BIN)/ruff check -q nbs las_nb tests
	$(BIN)/python -m pytest -x tests/test_notebooks.py tests/test_rooms.py tests/test_las.py
	for page in 05_las 06_model; do OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 1 --path nbs/$$page.ipynb || exit 1; done

lab: .venv/ready  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

sync: .venv/ready  ## format, export the library, clean the notebooks, rewrite links and README.md
	$(BIN)/ruff format -q nbs tests setup.py
	$(BIN)/nbdev_export
	$(BIN)/ruff format -q las_nb
	$(BIN)/nbdev_clean
	$(BIN)/python tests/tools/pages.py

docs: .venv/ready  ## render the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto: get it from https://quarto.org/docs/get-started, then run make docs again"; exit 2; }
	touch README.md
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)/tests/tools" nbdev_docs

experiments: .venv/ready  ## make the runs of the book that are missing; takes up what was cut (many hours, on a GPU)
	$(BIN)/las experiments run --results nbs/results

results: .venv/ready  ## repeat the measurement of the digits page, three seeds (about 11 minutes)
	$(BIN)/las digits --seeds 0,1,2 --out runs/results
	cp runs/results/digits.json nbs/results/
	mkdir -p nbs/results/digits-plain nbs/results/digits-las
	cp runs/results/plain-seed0/* nbs/results/digits-plain/
	cp runs/results/las-seed0/* nbs/results/digits-las/

BENCH := $(BIN)/las bench
SMALL := --backward --lengths 32,64,128,256,512 --rounds 15
MODEL := --rounds 3 --lengths 1024,4096,16384 --max_rate 0.5 --ways plain-native,auto,linear --trained nbs/results/smnist-short-las-none-0
bench: .venv/ready  ## repeat the measurements of the speed page (about 25 minutes on 2 cores; leave the machine alone meanwhile)
	$(BENCH) --rounds 3 --backward --models
	$(BENCH) $(SMALL) --ways plain-native,auto --name bench-cpu-small
	$(BENCH) $(SMALL) --ways plain-native,auto,dense --batch 16 --name bench-cpu-small-batch
	$(BENCH) --rounds 1 --backward --lengths 65536 --max_rate 0.5,0.05 --ways auto --name bench-cpu-long
	$(BENCH) --rounds 3 --max_rate 0.5 --name bench-cpu-forward
	$(BENCH) $(MODEL) --name bench-cpu-trained
	$(BENCH) $(MODEL) --score_scale 4 --name bench-cpu-trained-x4
	cp runs/bench/bench-cpu*.json nbs/results/

.PHONY: help train test quick lab sync docs experiments results bench

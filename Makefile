# Every target first creates .venv, and creates it again if a requirements file has changed.
PYTHON ?= python3
BIN := .venv/bin
# The stamp is written last, so an installation that fails half way is repeated.
STAMP := .venv/.installed
BENCH_STAMP := .venv/.installed_bench
STUDY_STAMP := .venv/.installed_study
RESULTS := benchmarks/results
# Processes that run tests; each test goes to the next free one.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadgroup
BENCHMARKS := rna_encoder atac_encoder loading throughput busy_neighbour prediction_memory scaling where_time_goes table

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint docs bench study study-quick tasks soak clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 21

demo: $(STAMP) ## run every stage on simulated donors (writes demo_output/)
	$(BIN)/python demo.py

test: $(STAMP) ## run the tests but the slow ones (five minutes on two cores; WORKERS=… processes)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: $(STAMP) ## run all tests
	$(BIN)/python -m pytest $(PARALLEL)

lint: $(STAMP) ## check style, formatting, and the links and commands in the documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -o addopts=-q tests/test_docs.py

docs: $(STAMP) ## run docs/tutorial.ipynb from top to bottom and keep its outputs (3 minutes)
	$(BIN)/python docs/run_tutorial.py

bench: $(BENCH_STAMP) ## measure time and memory, and compare with the goals (half an hour)
	[ -d demo_output/runs/celltype_student ] || $(BIN)/python demo.py
	for script in $(BENCHMARKS); do \
		echo "== $$script"; \
		$(BIN)/python -m benchmarks.$$script || exit 1; \
	done

soak: $(STAMP) ## kill and resume every training script, read thousands of damaged files (half an hour)
	$(BIN)/python -m tests.soak

# --no-deps: the peer names further packages, which it does not need.
$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps performer-pytorch==1.1.4 local-attention==1.9.0 axial-positional-embedding==0.3.12
	@touch $(BENCH_STAMP)

PAIRED = $(BIN)/python -m benchmarks.paired --data_path "$(DATA)"
RNA_ONLY = $(BIN)/python -m benchmarks.rna_only --data_path "$(DATA)"
PRETRAINED = embeddings,controls,shuffled_denoiser,translation,controls_translation

study: DATA = ../shared/data
study: $(STUDY_STAMP) ## make the runs that benchmarks/results/study lacks, and the tables (DATA=folder; hours)
	@[ -f "$(DATA)/snareseq2_mop.h5mu" ] || { echo "$(DATA) lacks snareseq2_mop.h5mu: name its folder, make study DATA=..." >&2; exit 1; }
	for fold in 0 1 2; do \
		$(PAIRED) --fold $$fold --seeds 0,1 --parts $(PRETRAINED),types,mixed,subclasses || exit 1; \
		$(PAIRED) --fold $$fold --pretraining_seed 1 --parts embeddings,translation || exit 1; \
		$(PAIRED) --fold $$fold --seeds 0,1,2 --parts scANVI || exit 1; \
	done
	for fold in 0 1; do \
		$(PAIRED) --data bmmc --fold $$fold --parts embeddings,translation,types,mixed || exit 1; \
	done
	for fold in 0 1 2; do \
		$(RNA_ONLY) --data immune --fold $$fold --parts types,mixed || exit 1; \
		$(RNA_ONLY) --data pbmc68k --fold $$fold --parts types,mixed || exit 1; \
		$(RNA_ONLY) --data pbmc_3tech --fold $$fold || exit 1; \
	done
	$(BIN)/python -m benchmarks.study

study-quick: DATA = ../shared/data
study-quick: $(STAMP) ## pretrain one fold again, and set some of its rows beside the kept ones (DATA=folder; 6 minutes)
	rm -rf runs/study_quick
	$(PAIRED) --parts quick --out_path runs/study_quick/models --results_path runs/study_quick/results
	$(BIN)/python -m benchmarks.study --compare runs/study_quick/results

tasks: DATA = ../shared/data
tasks: $(STAMP) ## run the other tasks of the paper and write docs/tasks.md (DATA=folder; up to 72 minutes)
	$(BIN)/python -m benchmarks.tasks --data_path "$(DATA)"

$(STUDY_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c requirements.txt scvi-tools==1.4.2
	@touch $(STUDY_STAMP)

clean: ## remove demo_output/, tutorial_output/ and caches (not .venv)
	rm -rf demo_output tutorial_output .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(STAMP): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is missing or older than Python 3.11: install it and run make PYTHON=/path/to/python3.11." >&2; exit 1; }
	@rm -f $(STAMP)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	@touch $(STAMP)

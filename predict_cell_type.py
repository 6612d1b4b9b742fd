"""Label new cells with a model of train_missing_celltype_func.py.

    python predict_cell_type.py --data_path my_pbmc.h5ad                                  # reference/pbmc
    python predict_cell_type.py --data_path new_cells.h5ad --model_path runs/celltype     # your own model
    python predict_cell_type.py --data_path mixed.h5mu --model_path runs/celltype_both,runs/celltype,runs/celltype_atac

Without --model_path, the model that ships with the repository labels human blood (reference/pbmc); a file that does not
look like human blood is refused.

Input: raw cells in any format that preprocess.py reads. Genes are matched, peaks projected and values normalised as
for the model's training cells, with a report of what was found and what was lost.

Output: the same cells in the same order with everything that the file holds, and for each cell, in obs:
  predicted_cell_type, confidence   the type and its calibrated probability
  second_cell_type, margin          the next type, and the difference of the two probabilities
  prediction_set                    the types that the cell may have; --coverage of the sets hold the true one
  parent_cell_type                  the closest common parent of these types, if trained with a hierarchy
  agreement                         the share of the model and three simple classifiers that give the model's type
  novelty, is_novel                 how unlike training cells it is, from 0 to 1; --reject unassigns novel cells
  rna_measured, atac_measured       whether the model has read the cell's RNA and ATAC
  labelled_by                       with several model folders, the one that has labelled the cell: the first of them
                                    whose modalities were all measured in the cell
in obsm the embeddings X_scmomer, X_scmomer_rna and X_scmomer_atac, and cell_type_probability; in uns["scmomer"] a
record of the model and the command. <data>.predicted.csv holds the columns of obs. docs/predictions.md explains them.
With --explain 10, <data>.explained.csv holds the ten genes that the model has used most for each predicted type, and
whether removing them lowers the confidence more than removing other genes: check this before you trust the list.
With --report, the page <data>.report.html shows them in figures and says what each column means.
Memory holds some thousand cells at a time, and torchrun shares the cells among processes; the output of an .h5ad or
.h5mu is a copy of the input, to which the predictions are added. Predictions of an earlier run are replaced. Your own
columns of these names are never replaced: choose other names with --prefix.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.cells.config import IngestConfig
from utils.cli import check_numbers, flag, parse_flags, run_script
from utils.errors import UserError
from utils.train.config import InferConfig, LabelConfig


@dataclass
class Flags:
    data_path: str | None = flag("cells to label: .h5ad, .h5mu, 10x .h5 or folder, .loom, .csv or .tsv", None)
    model_path: str | None = flag(
        "model folder: its name in --ckpt_dir, or a path; several with the same types, separated by commas, share the "
        "cells by what they were measured in; by default reference/pbmc, for what looks like human blood",
        None,
    )
    rna_path: str | None = flag("instead of --data_path, RNA of paired cells in a file of its own", None)
    atac_path: str | None = flag("and their ATAC; the two are joined by barcode", None)
    ckpt_dir: str = flag("folder that holds the model folder", ".")
    out_path: str | None = flag("file to write; by default <data>.predicted.<h5ad|h5mu> beside the input", None)
    prefix: str | None = flag("text before each name that is written, for example new_", None)
    explain: int = flag(
        "write this many top genes (and peaks) of each predicted type to <data>.explained.csv; 0: none", 0
    )
    report: bool = flag("also write a page with figures, <data>.report.html; takes about 15 seconds", False)
    sample_column: str | None = flag(
        "for the page: column of obs with samples; by default donor, sample or batch", None
    )
    label_column: str | None = flag("for the page: column of obs with true types, where they are known", None)

    def __post_init__(self):
        check_numbers(self, "explain")
        for name in ("sample_column", "label_column"):
            if getattr(self, name) is not None and not self.report:
                raise UserError(f"--{name} {getattr(self, name)}: needs the page; add --report")


def main() -> None:
    flags, choices, ingest, config = parse_flags(__doc__, Flags, LabelConfig, IngestConfig, InferConfig)

    # Slow to import: --help and mistaken flags do not wait for them.
    from utils.cells.preprocessed import open_cells
    from utils.files.write import check_target, path_with_name
    from utils.predict.box import box_for
    from utils.predict.explain import explain_query, explained_path
    from utils.predict.label import label_file
    from utils.predict.names import Names
    from utils.predict.report import check_columns, labelled_cells, report_path, write_report_of
    from utils.predict.table import comments_of, table_path, write_table
    from utils.train.distributed import distributed_run
    from utils.train.model_folder import load_model

    inputs = (flags.data_path, flags.rna_path, flags.atac_path)
    with open_cells(*inputs) as file, distributed_run(config.device) as runtime:
        names = Names(flags.prefix or "")
        names.claim(file)  # a clash of names stops the run before anything slow
        path = path_with_name(file.path)
        bare = path.name.removesuffix(file.suffix)  # a.csv and a.h5ad do not share an output
        out_path = flags.out_path or str(path.with_name(f"{bare}.predicted{file.suffix}"))
        check_target(out_path, file.suffix, inputs)
        csv_path = str(table_path(out_path))
        check_target(csv_path, ".csv", inputs)
        page_path = str(report_path(out_path))
        explained = explained_path(out_path)
        if flags.explain:
            check_target(str(explained), ".csv", inputs)
        if flags.report:
            check_target(page_path, ".html", inputs)
            check_columns(file, flags.sample_column, flags.label_column)
        if flags.model_path is None:
            saved, reason = box_for(file, ingest)
            models = [saved]
            runtime.say(reason)
        else:
            named = folders(flags)
            if flags.explain and len(named) > 1:
                raise UserError(f"--explain {flags.explain}: is for one model folder; label with each of them alone")
            models = [load_model(path, "celltype") for path in named]

        def explanation(types, shares, entry) -> dict:
            found = explain_query(
                shares[0].query, models[0], types, flags.explain, config=config, device=runtime.device
            )
            found.write(explained, comments_of(entry))
            runtime.say("\n".join([*found.lines, f"wrote {explained}"]))
            return {"explanation": found.entry}

        more = explanation if flags.explain else None
        labelled = label_file(file, models, out_path, names.prefix, ingest, config, runtime, choices, more)
        if labelled is None:
            return
        write_table(labelled, csv_path)
        if flags.report:
            shown = labelled_cells(labelled, out_path, flags.sample_column, flags.label_column)
            write_report_of(shown, page_path, file.path.name)
            runtime.say(f"wrote {page_path}")
        for path, is_new in ((page_path, flags.report), (explained, flags.explain)):
            if Path(path).is_file() and not is_new:
                runtime.say(f"note: {path} is of an earlier run, and does not describe this output")
        sizes = labelled.columns[f"{names.prefix}predicted_cell_type"].value_counts()
        types = ", ".join(f"{name} {size:,}" for name, size in sizes.items() if size)
        runtime.say(f"wrote {out_path} and {Path(csv_path).name}: {sizes.sum():,} cells; {types}")


def folders(flags: Flags) -> list[Path | str]:
    """The model folders that --model_path names, alone or separated by commas; addresses on the hub as they are."""
    named = [flags.model_path] if Path(flags.model_path).exists() else flags.model_path.split(",")
    inside = [Path(flags.ckpt_dir) / name.strip() for name in named]
    return [path if path.exists() else name.strip() for path, name in zip(inside, named, strict=True)]


if __name__ == "__main__":
    run_script(main)

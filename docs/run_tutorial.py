"""Run docs/tutorial.ipynb from top to bottom and keep its outputs; an error in any cell stops it.

`make docs` calls this script.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def main() -> None:
    """Run the notebook in the repository's top folder and write it back."""
    # The shell commands of the cells must find this `python` even if its environment is not activated.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1200,  # seconds for one cell
        resources={"metadata": {"path": str(ROOT)}},
        record_timing=False,  # times of day would change the file at each run
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute()
    notebook.metadata.pop("language_info", None)  # holds the version of the Python that ran it
    nbformat.write(notebook, NOTEBOOK)
    print(f"ran {NOTEBOOK.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

"""The notebooks of examples/, run from the first cell to the last at tiny sizes; each asserts its own result."""

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = {
    "1_sample_and_explore": "MODEL = {model!r}\nSIZE = 64",
    "2_fine_tune": 'BASE = {model!r}\nCONFIGS = "tiny"\nCOUNT = 40\nPRIOR_STEPS, DECODER_STEPS = 3, 2',
    "3_train_from_nothing": "STEPS = 20",
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def test_the_notebooks_are_known_and_hold_no_output():
    assert {path.stem for path in (ROOT / "examples").glob("*.ipynb")} == set(NOTEBOOKS)
    for name, parameters in NOTEBOOKS.items():
        cells = read(name).cells
        assert any("assert " in cell.source for cell in cells)
        assert not any(cell.get("outputs") for cell in cells)
        (chosen,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        assert names(chosen) == names(parameters.format(model="m"))


def names(source: str) -> list[str]:
    """What the lines of `source` assign to."""
    return [line.partition(" = ")[0] for line in source.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tiny_folder, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(name)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = NOTEBOOKS[name].format(model=str(tiny_folder))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()

"""The notebook of the docs runs on a small run, from its first cell to its last."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm3leon import CM3Leon

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorials" / "look_and_draw.py"


def test_the_notebook_of_the_page_s_steps_runs(
    tuned_model: CM3Leon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jupytext = pytest.importorskip("jupytext", reason="needs cm3leon[dev]")
    nbclient = pytest.importorskip("nbclient", reason="needs cm3leon[dev]")
    pytest.importorskip("ipykernel", reason="needs cm3leon[dev]")

    # Jupyter writes its own files into the test's folder, and the run is tuned on instructions.
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("CM3LEON_RUN", str(tuned_model.run.folder))

    notebook = jupytext.read(NOTEBOOK)
    client = nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()

    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1))
    images, texts = [], []
    outputs = [output for cell in codes for output in cell.outputs]
    for output in outputs:
        if content := output.get("data", {}).get("image/png"):
            images.append(Image.open(io.BytesIO(base64.b64decode(content))))
        texts.append(output.get("text", ""))

    # The cells show documents, samples, samples alone and guided, a filled image, edits, and what
    # is drawn with an added document.
    side = int(tuned_model.run.image_tokenizer.image_size)
    assert [image.width // side for image in images] == [2 * 4, 4 * 4, 8 * 3, 2 * 4, 3 * 4, 4 * 4]
    said = "".join(texts)
    assert f"row {len(tuned_model.run.bank)} of {len(tuned_model.run.bank) + 1:,}" in said
    assert "UserError" not in said

    # The picture shows what the same call gives here.
    model = CM3Leon.load(tuned_model.run.folder)
    drawn = [each.image for each in model.generate("a handwritten seven", n=4, retrieve=2, seed=0)]
    for place, image in enumerate(drawn):
        pixels_HWC = np.asarray(images[1].convert("RGB"))[::4, ::4]
        assert np.array_equal(pixels_HWC[:, place * side : (place + 1) * side], np.asarray(image))

from __future__ import annotations

import pytest
from PIL import Image
from validation_reports import STEPS, check, make_report

from dllava_export.sparsity import DENSE
from dllava_export.validation.plot import plot_drift

LAYERS = [
    check("prefill", "layers.0/key", relative=0.0),
    check("prefill", "layers.1/hidden_states", "drift", 0.3),
    check("decode.0", "layers.1/hidden_states", "mismatch", float("nan")),
]


def colours(path):
    with Image.open(path) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


def test_layers_get_a_panel_of_their_own(tmp_path):
    plot_drift(make_report(*STEPS), tmp_path / "steps.png")
    plot_drift(make_report(*STEPS, *LAYERS), tmp_path / "layers.png")
    with Image.open(tmp_path / "steps.png") as one, Image.open(tmp_path / "layers.png") as two:
        assert two.width == 2 * one.width
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.png", "steps.png"]


def test_mismatches_are_red(tmp_path):
    red = (0xC8, 0x32, 0x1F)
    plot_drift(make_report(*STEPS), tmp_path / "good.png")
    plot_drift(make_report(*STEPS, *LAYERS), tmp_path / "bad.png")
    assert red not in colours(tmp_path / "good.png")
    assert red in colours(tmp_path / "bad.png")


def test_a_dense_bundle_has_no_sparse_layers(tmp_path):
    shade = (0xF1, 0xF3, 0xF6)
    layers = [*STEPS, LAYERS[0]]
    plot_drift(make_report(*layers), tmp_path / "sparse.png")
    plot_drift(make_report(*layers, sparsity=DENSE), tmp_path / "dense.png")
    assert shade in colours(tmp_path / "sparse.png")
    assert shade not in colours(tmp_path / "dense.png")


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"suffix '.bmp', expected one of .png, .svg, .pdf"):
        plot_drift(make_report(*STEPS), tmp_path / "out.bmp")

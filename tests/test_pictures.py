"""`--pictures`: the charts of a page as files that need no page."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import on_disk
import pytest
from test_report import sample_run, write
from typer.testing import CliRunner

from multum._pictures import alone
from multum._report_charts import COLORS, Drawing
from multum.cli import app
from multum.errors import InputError

SVG = "{http://www.w3.org/2000/svg}"


def test_a_picture_alone_has_paper_a_title_its_key_and_a_font():
    inside = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="100" height="50" viewBox="0 0 100 50">'
        '<text font-family="inherit">a</text></svg>'
    )
    key = (("chosen", "●", "a < b"), ("limit", "▼", "worse"))
    root = ElementTree.fromstring(alone(Drawing(inside, 'says "so" & more', key)))  # noqa: S314 - our own
    assert root.get("viewBox") == "0 0 140 120"
    assert root.find(f"{SVG}title").text == 'says "so" & more'
    assert root.find(f"{SVG}rect").get("width") == "100%"
    nested = root.find(f"{SVG}svg")
    assert (nested.get("x"), nested.get("y"), nested.get("viewBox")) == ("20", "20", "0 0 100 50")
    assert "inherit" not in nested.find(f"{SVG}text").get("font-family")
    shown = [(part.text, part.get("fill")) for part in root.findall(f"{SVG}text")]
    assert shown == [("●", COLORS["chosen"]), ("a < b", COLORS["muted"]), ("▼", COLORS["limit"]), ("worse", COLORS["muted"])]
    places = [float(part.get("x")) for part in root.findall(f"{SVG}text")]
    assert places == sorted(places)
    assert 'viewBox="0 0 140 90"' in alone(Drawing(inside, "", ()))


def test_the_charts_of_a_report_are_written_as_files(tmp_path):
    folder = write(tmp_path / "run", sample_run())
    done = CliRunner().invoke(app, ["report", str(folder), "--pictures", str(tmp_path / "pictures")])
    assert done.exit_code == 0, done.output
    names = [f"{name}.{kind}" for name in ("curve", "p50", "size") for kind in ("png", "svg")]
    assert on_disk.listing(tmp_path / "pictures") == names
    assert all(str(tmp_path / "pictures" / name) in done.stdout for name in names)
    for name in names:
        path = tmp_path / "pictures" / name
        if path.suffix == ".png":
            content = path.read_bytes()
            assert content.startswith(b"\x89PNG")
            assert int.from_bytes(content[16:20]) > 900
        else:
            root = ElementTree.fromstring(path.read_text())  # noqa: S314 - our own
            assert len(list(root.iter(f"{SVG}path"))) > 3
    text = (tmp_path / "pictures" / "curve.svg").read_text()
    assert "original, exported" in text
    assert "inherit" not in text


def test_a_place_that_is_a_file_is_refused(tmp_path):
    from multum._report import pictures

    folder = write(tmp_path / "run", sample_run())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"--pictures: .*file is a file; give a folder"):
        pictures(folder, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"

"""The pictures of the documentation are what the package's code gives now."""

from doc_scripts import DOCS, load


def test_the_pictures_are_up_to_date():
    for name, svg in load("draw").pictures().items():
        there = (DOCS / "pictures" / name).read_text(encoding="utf-8")
        assert there == svg, f"{name} is old: run `python docs/draw.py`"

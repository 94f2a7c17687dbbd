"""Links, pictures and anchors of the pages, without MkDocs; every page is in the navigation."""

import json
import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page):
    """A page with its included files."""
    text = page.read_text(encoding="utf-8")
    return re.sub(
        r'^--8<-- "([^"]+)"$', lambda m: (ROOT / m[1]).read_text(encoding="utf-8"), text, flags=re.M
    )


def anchors_of(page):
    """Anchors of a page's headings, as Python-Markdown makes them."""
    found = set()
    body = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.+)$", body, re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def nav_files():
    """Pages that mkdocs.yml names."""
    _, _, nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    return re.findall(r": (\S+\.md)$", nav, re.MULTILINE)


def test_every_page_is_in_the_navigation_once():
    files = nav_files()
    assert sorted(files) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_of_a_page_resolve(page):
    text = _CODE.sub("", text_of(page))
    for target in _LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name}: {target}"


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n\n[ok](#one) [no](#two)\n")
    with pytest.raises(AssertionError, match="#two"):
        test_links_of_a_page_resolve(page)


def test_the_notebook_is_python_and_has_its_outputs():
    notebook = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        compile("".join(cell["source"]), "tour.ipynb", "exec")
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"]
    assert "image/png" in cells[-1]["outputs"][0]["data"]


def test_commands_of_the_pages_are_ones_that_exist():
    from xtoken_jax.cli.parser import make_parser

    _, commands = make_parser()
    for page in PAGES:
        for command in re.findall(r"(?:^|`)xtoken ([a-z][a-z-]*)", text_of(page), re.MULTILINE):
            assert command in commands, f"{page.name}: xtoken {command}"

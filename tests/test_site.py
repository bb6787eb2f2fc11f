"""The documentation as a site: no page left out, no link that leads nowhere, nothing fetched.

Not built with ``--quiet``: mkdocs 1.6.1 then counts no warnings, and a strict build passes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FETCHED = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]*)')


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-f", config, "-d", site],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)


def test_the_site_is_built_and_fetches_nothing(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="tasks/language-model.html"' in start and "CONTRIBUTING.html" in start
    assert 'href="notebooks/first-compile.html"' in start
    assert "target" in (tmp_path / "reference.html").read_text(encoding="utf-8")
    page = (tmp_path / "notebooks" / "first-compile.html").read_text(encoding="utf-8")
    assert "<th>pruned</th>" in page and "<circle" in page and 'href="../concepts.html"' in page
    for page in tmp_path.rglob("*.html"):
        fetched = FETCHED.findall(page.read_text(encoding="utf-8"))
        assert not fetched, (page, fetched)


def test_every_page_stands_in_the_site() -> None:
    """A page that the navigation leaves out fails the build; those that it names are there.

    A notebook is a page, too.
    """
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/-]+\.md", text[text.index("\nnav:"):]))
    pages = {str(p.relative_to(ROOT / "docs").with_suffix(".md"))
             for kind in ("md", "ipynb") for p in (ROOT / "docs").rglob(f"*.{kind}")}
    assert {p for p in pages if not p.startswith("adr/0")} <= named


def test_a_link_that_leads_nowhere_fails(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "page.md").write_text("[gone](nowhere.md)\n", encoding="utf-8")
    config = tmp_path / "mkdocs.yml"
    config.write_text("site_name: x\nstrict: true\n", encoding="utf-8")
    assert build(config, tmp_path / "site").returncode == 1

"""The site's pages that lie elsewhere in the repository, links to them, and notebooks as pages."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Where each page lies in the repository, by its name in the site.
PAGES = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "findings.md": "findings/README.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of PAGES, and those of docs/ that other rules leave out."""
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text("utf-8")))
    for place in sorted((ROOT / "docs").rglob("*.ipynb")):
        name = place.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        files.append(File.generated(config, name, content=notebook(place)))
    return files


def notebook(place: Path) -> str:
    """Return a notebook as a page: its texts, its code, and what is stored below each cell."""
    parts = []
    for cell in json.loads(place.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts.extend(_output(each) for each in cell.get("outputs", ()))
    return "\n\n".join([*parts, f'<a href="{place.name}">This page as a notebook</a>']) + "\n"


def _output(shown: dict[str, Any]) -> str:
    """A table or a picture where there is one, else text."""
    data = shown.get("data", {})
    rich = data.get("text/html") or data.get("image/svg+xml")
    if rich:
        return f'<div class="output" markdown="0">\n{"".join(rich).strip()}\n</div>'
    text = "".join(shown.get("text") or data.get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository into links between pages of the site.

    A file that is there but no page (a script, say) is named without a link.
    """
    here = page.file.src_uri
    source = PurePosixPath(PAGES.get(here, f"docs/{here}"))
    names = {place: name for name, place in PAGES.items()}

    def moved(found: re.Match[str]) -> str:
        text, link, place = found[1], found[2], found[3] or ""
        target = normpath(str(source.parent / link))
        target = f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target
        if target in names or target.startswith("docs/"):
            inside = names.get(target) or target.removeprefix("docs/").replace(".ipynb", ".md")
            return f"[{text}]({relpath(inside, str(PurePosixPath(here).parent))}{place})"
        return text if (ROOT / target).is_file() else found[0]

    return LINK.sub(moved, markdown)

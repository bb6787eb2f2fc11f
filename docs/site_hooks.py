"""The site's pages that lie elsewhere in the repository, and links to them."""

from __future__ import annotations

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
    return files


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
            inside = names.get(target) or target.removeprefix("docs/")
            return f"[{text}]({relpath(inside, str(PurePosixPath(here).parent))}{place})"
        return text if (ROOT / target).is_file() else found[0]

    return LINK.sub(moved, markdown)

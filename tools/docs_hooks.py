"""Hooks of mkdocs: the repository's own pages (EXPERIMENTS.md and others) become pages of the site.

`docs/` links to them as `../NAME.md`, which is right in the repository; in the site they lie beside the other pages.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("EXPERIMENTS.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie in the repository's root."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links between `docs/` and the root: to where the pages are in the site."""
    if page.file.src_uri in PAGES:
        return re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(r"\]\(\.\./([A-Z]+\.md)", r"](\1", markdown)

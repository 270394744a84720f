"""Checks the links of the built site and of the repository's Markdown files, offline. External ones are listed.

python docs/check_links.py build/docs
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    """The links of a page, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Of every tag its id, of links and pictures where they lead."""
        for name, value in attrs:
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)
            if value and name in ("href", "src") and tag in ("a", "img", "link", "script"):
                self.links.append(value)


@cache
def read(path: Path) -> Page:
    """The page of a file."""
    return Page(path.read_text(encoding="utf-8"))


def broken_in_site(site: Path, external: set[str]) -> Iterator[str]:
    """Links of the site that lead nowhere."""
    for path in sorted(site.rglob("*.html")):
        for link in read(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                external.add(link)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                yield f"{path.relative_to(site)}: {link}: there is no such file"
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).anchors:
                yield f"{path.relative_to(site)}: {link}: the page has no such anchor"


def broken_in_repository(external: set[str]) -> Iterator[str]:
    """Links of Markdown files that lead to no file: as they are read without the site."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
            parts = urlsplit(link)
            if parts.scheme:
                external.add(link)
                continue
            target = (ROOT / name).parent / unquote(parts.path)
            if parts.path and not target.exists() and target.parent != ROOT / "docs" / "reference":  # generated
                yield f"{name}: {link}: there is no such file"


def main(site: Path) -> int:
    """Print what is broken, and what was not looked at. Returns the exit code."""
    external: set[str] = set()
    broken = [*broken_in_site(site, external), *broken_in_repository(external)]
    print("\n".join(broken))
    print(f"{len(broken)} broken links; {len(external)} external ones, not looked at:")
    print("\n".join(f"  {link}" for link in sorted(external)))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

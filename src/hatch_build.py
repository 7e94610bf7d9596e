"""README.md as a package index shows it, where a relative link leads nowhere."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def for_index(text: str, repository: str | None) -> str:
    """The text with links into the repository, or where it has no address yet, with their words and without images."""

    def link(match: re.Match[str]) -> str:
        mark, words, path = match.groups()
        if repository is None:
            return "" if mark else words
        return f"{mark}[{words}]({repository}/{'raw' if mark else 'blob'}/HEAD/{path})"

    return _RELATIVE_LINK.sub(link, text)


class CustomMetadataHook(MetadataHookInterface):
    """The long description; `Repository` of `project.urls` is where its links lead to."""

    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = for_index(text, metadata["urls"].get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}

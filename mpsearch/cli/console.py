"""The console that the commands print to, to which strings are data; apart, because rich takes time to import."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from mpsearch.cli.text import visible


class DataConsole(Console):
    """A console that reads no string as markup and lets none command the terminal; rich's own objects are ours.

    Args:
        settings: rich's.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """A string, also one in a table, as it is printed: in one line."""
        return super().render_str(visible(text), **settings)


class WordsColumn(ProgressColumn):
    """A column of a progress bar with values of its task, as data; rich's own reads them as markup.

    Args:
        words: with `{task.description}` and the like in them.
    """

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words

    def render(self, task: Task) -> str:
        """The words of a task."""
        return self._words.format(task=task)

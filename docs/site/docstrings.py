"""Docstrings as they were written: their tables and equations are set by columns, so they keep their spaces."""

import griffe


class Preformatted(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring and not obj.docstring.value.startswith("```"):
            obj.docstring.value = f"```text\n{obj.docstring.value}\n```"

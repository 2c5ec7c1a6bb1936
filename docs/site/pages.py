"""Pages of the site that are not written in docs/: the README as its home, the log, and the API from each `__all__`."""

import ast
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "tokencredit"
TEXTS = {
    "README.md": "index.md",
    "LOG.md": "LOG.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CITATION.cff": "CITATION.cff",
}
# Page of the API: the module whose `__all__` it shows.
API = {
    "tokencredit": "__init__.py",
    "testing": "testing/__init__.py",
    "tasks": "tasks/__init__.py",
    "lm": "lm/__init__.py",
    "logs": "logs/__init__.py",
    "runs": "runs.py",
    "report": "report/__init__.py",
}


def on_files(files: Files, config) -> Files:
    for source, page in TEXTS.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for example in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{example.name}", content=example.read_text(encoding="utf-8")))
    for name, module in API.items():
        files.append(File.generated(config, f"api/{name}.md", content=api_page(name, module)))
    return files


def api_page(name: str, module: str) -> str:
    """One heading for every name of the module's `__all__`, in its order, at the place that defines it."""
    title = name if name == "tokencredit" else f"tokencredit.{name}"
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    note = ast.get_docstring(tree) or ""
    lines = [f"# {title}", f"```text\n{note}\n```"]
    lines += [f"::: {title}.{each}" for each in public_names(tree) if not each.startswith("__")]
    return "\n\n".join(lines) + "\n"


def public_names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    raise ValueError("the module has no __all__ that is a list of names")

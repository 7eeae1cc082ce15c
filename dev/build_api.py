"""Write docs/api.md: every public name of every room, from its docstring. `--check` only says whether it is current."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

ROOMS = (
    "config",
    "window",
    "kernels",
    "data",
    "addressing",
    "stores",
    "optim",
    "memory",
    "fusion",
    "models",
    "generate",
    "train",
    "hub",
)
PAGE = Path(__file__).parent.parent / "docs" / "api.md"


def signature(thing: object) -> str:
    try:
        text = str(inspect.signature(thing))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    return text.replace("'", "").split(" -> ")[0] if inspect.isclass(thing) else text.replace("'", "")


def entry(name: str, thing: object) -> str:
    doc = inspect.getdoc(thing) or ""
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return f"### `{name}`\n"
    parts = [f"### `{name}{signature(thing)}`", doc]
    if inspect.isclass(thing):
        for key, member in vars(thing).items():
            public = not key.startswith("_") and getattr(member, "__doc__", None)
            if public and (inspect.isfunction(member) or isinstance(member, property | classmethod)):
                target = member.fget if isinstance(member, property) else getattr(thing, key)
                call = "" if isinstance(member, property) else signature(target)
                first = (inspect.getdoc(target) or "").split("\n\n")[0].replace("\n", " ")
                parts.append(f"- `{key}{call}`: {first}")
    return "\n\n".join(parts[:2]) + ("\n\n" + "\n".join(parts[2:]) if len(parts) > 2 else "") + "\n"


def markdown(text: str) -> str:
    """Docstring markup as Markdown: roles and double backquotes become code."""
    return re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", text).replace("``", "`")


def page() -> str:
    sections = ["# The library's public names\n\nFrom the docstrings; `python dev/build_api.py` writes this page.\n"]
    for room in ROOMS:
        module = importlib.import_module(f"torch_engram.{room}")
        public = getattr(module, "__all__", None)
        names = public or [
            name
            for name, thing in vars(module).items()
            if inspect.isclass(thing) and thing.__module__ == module.__name__ and not name.startswith("_")
        ]
        summary = (module.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        sections.append(f"## `torch_engram.{room}`\n\n{summary}\n")
        sections += [entry(name, getattr(module, name)) for name in names]
    return markdown("\n".join(sections))


def main() -> None:
    text = page()
    if "--check" in sys.argv:
        sys.exit(None if PAGE.read_text() == text else f"{PAGE} is out of date: run python dev/build_api.py")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()

"""Hooks of mkdocs: write the command-line reference from the commands themselves, and the list of public names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

CLI = "<!-- commands -->"
API = "<!-- public names -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the placeholders of the reference pages."""
    if CLI in markdown:
        markdown = markdown.replace(CLI, command_reference())
    if API in markdown:
        markdown = markdown.replace(API, api_reference())
    return markdown


def api_reference() -> str:
    """One mkdocstrings block for each public name."""
    import offcut

    return "\n\n".join(f"::: offcut.{name}" for name in offcut.__all__)


def command_reference() -> str:
    """Every command with its usage, arguments and options, in the order of ``offcut --help``."""
    from typer.main import get_command

    from offcut.cli import app

    root = get_command(app)
    return "\n\n".join(_section(path, command) for path, command in _commands("offcut", root))


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    for name, child in getattr(command, "commands", {}).items():
        if getattr(child, "commands", None):
            yield from _commands(f"{path} {name}", child)
        elif not child.hidden:
            yield f"{path} {name}", child


def _section(path: str, command: Any) -> str:
    context = command.make_context(path, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## {path}", "", _prose(command.help), "", "```text", f"{path} {usage}", "```", ""]
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        if "--help" not in parameter.opts:
            panels.setdefault(parameter.rich_help_panel or "", []).append(_row(parameter))
    for panel, rows in panels.items():
        lines += [f"**{panel}**", ""] if panel else []
        lines += ["| option | meaning | default |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    value = "" if getattr(parameter, "is_flag", False) else f" `{_value(parameter)}`"
    shown = "required" if parameter.required else _default(parameter.default)
    return f"| {names}{value} | {_prose(parameter.help)} | {shown} |"


def _value(parameter: Any) -> str:
    """Placeholder of the option's value."""
    annotation = parameter.type_descriptor.annotation
    single = next(iter(get_args(annotation)), annotation)
    return parameter.metavar or getattr(single, "__name__", str(single)).upper()


def _default(value: Any) -> str:
    return "" if value is None or value is False or value == [] or callable(value) else f"`{value}`"


def _prose(text: str | None) -> str:
    """Help text on one line, safe inside a table."""
    return " ".join((text or "").split()).replace("|", "&#124;").replace("<", "&lt;").replace("[", "&#91;")

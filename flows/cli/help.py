"""What `--help` adds to the options of a command: the form each belongs to, and what that form takes where nothing is given."""

import re
from typing import Any, get_args

from typer.core import TyperCommand, TyperOption

# the forms (flows/parameters.py) whose fields a command's options set
FORMS = {
    "run": ("Generation", "Scoring", "Policy", "Budget", "Learning", "Workers"),
    "train": ("Learning", "Generation"),
    "promote": ("Exam", "Generation", "Scoring", "Workers"),
}
# options that are called otherwise than their field
FIELDS = {
    "adapter": "adapters",
    "exam": "exam_manifest",
    "learn": "options",
    "max_candidates": "Budget.candidates",
    "no_champion": "champion",
    "option": "options",
    "quota": "quotas",
}
STAND_INS = (0, -1, 1, "", "auto")  # defaults that mean something else


class FormCommand(TyperCommand):
    """A command whose help knows the defaults of forms, which are imported only when somebody asks for help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for option in [param for param in self.params if isinstance(param, TyperOption)]:
            form, field = field_of(option.name or "", self.name or "")
            if field:
                option.rich_help_panel = form
                if option.default is None:
                    option.show_default = default_in_words(field) or False
        super().format_help(ctx, formatter)
        if self.name == "train":
            _print_settings()


def field_of(option: str, command: str) -> tuple[str, Any]:
    """The name of the form that a command's option belongs to, and the field it sets; None: it belongs to no form."""
    from flows import parameters

    form, _, name = FIELDS.get(option, option).rpartition(".")
    for there in FORMS.get(command, ()):
        fields = getattr(parameters, there).model_fields
        if name in fields and form in ("", there):
            return there, fields[name]
    return "", None


def default_in_words(field: Any) -> str:
    """What a field is where nothing is given, or what its description says of that (`0: no limit`); empty: nothing."""
    match field.default:
        case bool(default):
            value = "yes" if default else "no"
        case float(default):
            value = f"{default:g}"
        case default:
            value = "" if default in ({}, []) else str(default)
    meaning = re.search(rf"(?:^|; ){re.escape(value or 'empty')}: ([^;]+)", field.description or "")
    return meaning[1] if meaning and field.default in STAND_INS else value


def _print_settings() -> None:
    """What `--option` may set."""
    from rich.console import Console
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table

    from tasks.trainers import Settings

    table = Table.grid(padding=(0, 2))
    for name, field in Settings.model_fields.items():
        told = field.description or ", ".join(map(str, get_args(field.annotation)))
        default = default_in_words(field)
        shown = rf"[dim]\[default: {escape(default)}]" if default else ""
        table.add_row(f"[cyan]{name}", f"{escape(told)} {shown}".strip())
    title = "Settings: -o name=value; a model's own darkroom.json may say otherwise"
    Console().print(Panel(table, title=title, title_align="left", border_style="dim"))

"""--help in groups: the comments that head the fields of an Args dataclass, such as `# Sampling`.

Args itself stays flat. tyro makes a group of each nested dataclass, so it is shown one that is nested.
"""

import ast
import dataclasses
import inspect
import typing
from typing import Annotated

import tyro


def parse_in_groups(Args, **options):
    """tyro.cli(Args, **options), with the flags in groups where the source of Args has headings."""
    groups = read_groups(Args)
    if not groups:
        return tyro.cli(Args, **options)
    members = []
    for heading, helps in groups.items():
        group = make_group(Args, heading, helps)
        members.append((heading.lower().replace(" ", "_"), group, dataclasses.field(default_factory=group)))
    nested = tyro.cli(dataclasses.make_dataclass("Groups", members), **options)
    values = {}
    for name, _, _ in members:
        values |= vars(getattr(nested, name))
    return Args(**values)


def make_group(Args, heading, helps):
    """A dataclass with some fields of Args; helps: {name of a field: its help}."""
    hints = typing.get_type_hints(Args, include_extras=True)
    fields = []
    for field in dataclasses.fields(Args):
        if field.name in helps:
            shown = tyro.conf.arg(help=helps[field.name], prefix_name=False)  # --seed, not --run.seed
            default = dataclasses.field(default=field.default)
            fields.append((field.name, Annotated[hints[field.name], shown], default))
    return dataclasses.make_dataclass(heading, fields)


def read_groups(Args):
    """{heading: {field: its docstring}}, in order; {} unless every field has a docstring."""
    try:
        lines = inspect.getsource(Args).splitlines()
        body = ast.parse("\n".join(lines)).body[0].body
    except (OSError, IndentationError):  # made in a notebook, or inside a function
        return {}
    groups = {}
    heading = "Run"
    for number, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign):
            continue
        following = body[number + 1] if number + 1 < len(body) else None
        if not isinstance(following, ast.Expr):
            return {}
        above = lines[node.lineno - 2].strip()
        if above.startswith("# "):
            heading = above.removeprefix("# ")
        groups.setdefault(heading, {})[node.target.id] = " ".join(following.value.value.split())
    return groups

"""Write docs/recipes.md and docs/commands.md from the code: every field of a recipe, every option of a command.

python tools/write_reference.py            write the pages
python tools/write_reference.py --check    exit with 1 if a page is not what the code says
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
NOTE = "<!-- written by tools/write_reference.py -->"

ABOUT_RECIPES = """\
A recipe holds every setting of a run besides the checkpoint and the images. `odcft recipes` lists the shipped ones,
`odcft recipes small` prints one with every field. A field that a recipe does not set has the default below.

`--set memory.momentum=0.3` changes one field, `--recipe mine.yaml` takes your own file; in Python these are
`set={"memory.momentum": 0.3}` and `recipe="mine.yaml"`, or a `Recipe` from `odcft.load_recipe`. An unknown field or an
impossible value is refused. Fields that are `auto` are decided once checkpoint and images are known; `recipe.yaml` in
the RUN has what was decided.

## Shipped recipes
"""
ABOUT_COMMANDS = """\
`odcft COMMAND --help` prints the same. Every command ends with exit code 0 (done), 2 (something for you to fix: one
message says what), 75 (stopped on request; `--resume` continues) or 1 (anything else). Results for people go to stderr;
with `--json`, one JSON object goes to stdout.
"""


def recipes_page() -> str:
    """docs/recipes.md: the fields with their defaults, and each shipped recipe."""
    from odcft.recipe import Recipe, shipped

    lines = [f"# Recipes\n\n{NOTE}\n\n{ABOUT_RECIPES}"]
    texts = shipped()
    lines += ["| name | what for |", "|---|---|"]
    lines += [f"| [{name}](#{name}) | {text.splitlines()[0].lstrip('# ')} |" for name, text in texts.items()]
    lines += ["", "## Fields", ""]
    docs, comments = field_comments()
    for name, field in Recipe.model_fields.items():
        group = field.annotation
        if not (isinstance(group, type) and hasattr(group, "model_fields")):
            continue
        lines += [f"### {name}", "", docs[group.__name__], "", "| field | default | what it is |", "|---|---|---|"]
        for inner, info in group.model_fields.items():
            what = "; ".join(filter(None, (choices(info.annotation), comments.get((group.__name__, inner), ""))))
            lines.append(
                f"| `{name}.{inner}` | `{shown(info.get_default(call_default_factory=True))}` | {cell(what)} |"
            )
        lines.append("")
    lines += ["Besides these there are `method` (`odc`, `dc` or `codc`) and `seed`.", ""]
    for name, text in texts.items():
        lines += [f"## {name}", "", "```yaml", text.rstrip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def shown(value: Any) -> str:
    """A default as YAML shows it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(f'{number:.4g}' for number in value)}]"
    return str(value)


def choices(annotation: Any) -> str:
    """The values of a field that takes one of a few words."""
    words = re.findall(r"'([^']+)'", " ".join(re.findall(r"Literal\[([^\]]+)\]", str(annotation))))
    return ", ".join(f"`{word}`" for word in words) if len(words) > 1 else ""


def cell(text: str) -> str:
    """Text that fits in a cell of a table."""
    return text.replace("|", "\\|")


def field_comments() -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """The docstrings of the groups, and the comments above or beside their fields, in recipe.py."""
    source = (ROOT / "odcft" / "recipe.py").read_text(encoding="utf-8")
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens}
    own_line = {token.start[0] for token in tokens if token.line.lstrip().startswith("#")}
    docs, found = {}, {}
    for node in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        docs[node.name] = " ".join((ast.get_docstring(node) or "").split())
        for field in (one for one in node.body if isinstance(one, ast.AnnAssign)):
            first, last = field.lineno, field.end_lineno or field.lineno
            while first - 1 in own_line:
                first -= 1
            told = [comments[line] for line in range(first, last + 1) if line in comments]
            found[node.name, ast.unparse(field.target)] = " ".join(told)
    return docs, found


def commands_page() -> str:
    """docs/commands.md: every command with its arguments and options."""
    import typer

    from odcft.cli import app

    lines = [f"# Commands\n\n{NOTE}\n\n{ABOUT_COMMANDS}"]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        lines += [f"## odcft {name}", "", " ".join((command.help or "").split()), ""]
        lines += ["| argument or option | default | what it is |", "|---|---|---|"]
        lines += list(option_rows(command))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def option_rows(command: Any) -> Iterator[str]:
    """A row of the table for each argument and option of a command."""
    for option in command.params:
        argument = option.param_type_name == "argument"
        metavar = option.metavar or ("" if getattr(option, "is_flag", False) else option.name.upper())
        names = metavar if argument else f"{', '.join(option.opts)} {metavar}".strip()
        hint = getattr(option, "show_default", None)
        default = hint if isinstance(hint, str) else option.default
        needed = "required" if option.required else ""
        told = needed if default in (None, False, ()) or callable(default) else f"{default}"
        yield f"| `{cell(names)}` | {cell(told)} | {cell(' '.join((option.help or '').split()))} |"


PAGES = {"recipes.md": recipes_page, "commands.md": commands_page}


def main() -> None:
    """See the top of the file."""
    outdated = []
    for name, write in PAGES.items():
        path, text = ROOT / "docs" / name, write()
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            outdated.append(f"docs/{name}")
    if outdated:
        sys.exit(f"{' and '.join(outdated)}: not what the code says. Run: python tools/write_reference.py")


if __name__ == "__main__":
    main()

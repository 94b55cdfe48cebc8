"""Draw which part of odcft imports which into docs/architecture.md, from the import statements of the code.

python tools/draw_architecture.py            write the drawing
python tools/draw_architecture.py --check    exit with 1 if the drawing is not what the code says
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "odcft"
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by tools/draw_architecture.py -->", "<!-- end of the drawing -->"

# Modules beside the rooms that are drawn as one box.
BOXES = {
    "command line": ("cli", "demo"),
    "Python functions": ("api",),
    "programs": ("train", "first_memory", "exports"),
    "shared by all": ("errors", "text", "seeds", "precision", "files", "recipe", "optim", "progress"),
}
SKIPPED = ("__init__", "__main__", "torchvision_on_cpu")


def imported(path: Path) -> Iterator[str]:
    """The modules of odcft that a file imports, dotted and without "odcft."."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "odcft":
            inner = node.module.removeprefix("odcft").lstrip(".")
            for alias in node.names:
                dotted = f"{inner}.{alias.name}".lstrip(".")
                stands = (PACKAGE / f"{dotted.replace('.', '/')}.py").exists() or (PACKAGE / dotted).is_dir()
                yield dotted if stands else inner


def box(dotted: str) -> str:
    """The box that a module is drawn in: its room, or one of BOXES, or itself."""
    first = dotted.split(".")[0]
    if (PACKAGE / first).is_dir():
        return f"{first}/"
    return next((name for name, modules in BOXES.items() if first in modules), first)


def arrows() -> dict[str, set[str]]:
    """Box to the boxes it imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        dotted = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if dotted.split(".")[-1] in SKIPPED:
            continue
        own = box(dotted)
        found.setdefault(own, set()).update(
            box(other) for other in imported(path) if other and other.split(".")[0] not in SKIPPED
        )
        found[own].discard(own)
    return found


def without_shortcuts(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no longer way stands for."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in graph.get(todo.pop(), set()) - seen:
                seen.add(other)
                todo.append(other)
        return seen

    return {
        start: {end for end in ends if not any(end in reached(other) for other in ends - {end})}
        for start, ends in graph.items()
    }


def drawing() -> str:
    """Mermaid's words for the boxes and their arrows, each box above all that it imports."""
    graph = without_shortcuts(arrows())
    number = {name: f"n{place}" for place, name in enumerate(sorted(graph))}
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'  {number[name]}["{name}"]' for name in sorted(graph)]
    lines += [f"  {number[start]} --> {number[end]}" for start in sorted(graph) for end in sorted(graph[start])]
    return "\n".join([*lines, "```"])


def main() -> None:
    """See the top of the file."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    drawn = f"{before}{BEGIN}\n{drawing()}\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit(int(drawn != text))
    DOCUMENT.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()

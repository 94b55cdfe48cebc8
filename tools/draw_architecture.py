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
    "programs": ("train", "first_memory", "exports", "cluster_listing", "duplicate_groups"),
    "settings, files": ("files", "cache_folder", "recipe", "optim", "progress"),
    "basics": ("errors", "text", "seeds", "precision"),
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


def levels(graph: dict[str, set[str]]) -> list[list[str]]:
    """The boxes from the top down: each one level below the lowest box that imports it."""
    depth = dict.fromkeys(graph, 0)
    for _ in graph:  # the longest path has fewer arrows than there are boxes
        for start, ends in graph.items():
            for end in ends:
                depth[end] = max(depth[end], depth[start] + 1)
    return [sorted(name for name in graph if depth[name] == level) for level in range(max(depth.values()) + 1)]


def svg(width: int = 860, row: int = 62, size: tuple[int, int] = (124, 30)) -> str:
    """The same drawing for the site, which has no mermaid."""
    graph = without_shortcuts(arrows())
    rows = levels(graph)
    place = {
        name: ((i + 0.5 + (number % 2) * 0.12) * width / (len(names) + 0.24), (number + 0.5) * row)
        for number, names in enumerate(rows)
        for i, name in enumerate(names)
    }
    w, h = size
    lines = [
        f'<path d="M{x} {y + h / 2} L{place[end][0]} {place[end][1] - h / 2}" marker-end="url(#tip)"/>'
        for start, (x, y) in place.items()
        for end in sorted(graph[start])
    ]
    fill = "var(--color-background-primary)"
    boxes = [
        f'<rect x="{x - w / 2}" y="{y - h / 2}" width="{w}" height="{h}" rx="4" fill="{fill}"/>'
        f'<text x="{x}" y="{y + 5}" text-anchor="middle" stroke="none" fill="currentColor">{name}</text>'
        for name, (x, y) in place.items()
    ]
    tip = '<marker id="tip" markerWidth="7" markerHeight="6" refX="7" refY="3" orient="auto">'
    tip += '<path d="M0 0L7 3L0 6"/></marker>'
    shape = f'viewBox="0 0 {width} {len(rows) * row}" fill="none" stroke="currentColor" font-size="14" role="img"'
    return f"<svg {shape}><title>Which part of odcft imports which</title>{tip}{''.join(lines + boxes)}</svg>"


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

"""Put a report together as one HTML file that needs nothing else: no network, no server.

Text from files is data: the template escapes it; JSON cannot end its script element, and the page's own script only
sets it as text. A content security policy allows that script (by its hash) and nothing else to run or to be loaded.
"""

import base64
import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from odcft import files
from odcft.errors import OdcftError
from odcft.reports.charts import Chart
from odcft.reports.class_agreement import ClassAgreement
from odcft.reports.health import Finding
from odcft.run.output_checks import refuse_invalid_path, why_unwritable

GENERATOR = "odcft report"  # how these files are told from others
TRAINING = "odcft-run"  # the name of a mark in the report of a run that trains: it is not the last one
MARK_WITHIN = 4096  # bytes from the start


@dataclass
class Page:
    """What a report shows; sections without content are left out.

    Attributes:
        title: of the page.
        lead: what was done, in a sentence.
        verdict: whether it got better, in a sentence; "" if nobody has measured it.
        verdict_kind: better, worse or open: how the verdict is marked.
        facts: names and values.
        findings: on the health of the run.
        charts: curves.
        map: of the clusters.
        about_clusters: what the gallery shows.
        about_neighbours: what the neighbours are, and the title of their section.
        classes: clusters against labels.
        recipe: as YAML.
        notes: what is missing from the report, and why.
        data: for the script: `clusters`, `images`, `neighbours` as columns.
        thumbnails: encoded, of the first of the images in `data`; b"" where there is none.
        media: their media type.
        folder: where thumbnails of the others are, beside the page; "" for nowhere.
        command: an odcft command to show at the end.
        training: whether the run has not ended.
    """

    title: str
    lead: str
    verdict: str = ""
    verdict_kind: str = "open"
    facts: list[tuple[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    map: Chart | None = None
    about_clusters: str = ""
    about_neighbours: str = ""
    neighbours_title: str = "Neighbours"
    classes: ClassAgreement | None = None
    recipe: str = ""
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    thumbnails: list[bytes] = field(default_factory=list)
    media: str = "image/webp"
    folder: str = ""
    command: str = ""
    training: bool = False


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    folder = resources.files("odcft.reports")
    template, style, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.html.jinja", "page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pictures = "data: 'self' file:" if page.folder else "data:"
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src {pictures}; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template).render(
        page=page,
        generator=GENERATOR,
        mark=TRAINING,
        policy=policy,
        style=style,
        script=script,
        data=safe_json({**page.data, "media": page.media, "folder": page.folder}),
        thumbnails="\n".join(base64.b64encode(one).decode("ascii") for one in page.thumbnails),
    )


def safe_json(value: Any) -> str:
    """JSON that can stand in a script element: ASCII, and without characters that HTML knows.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(page: Page, out: Path) -> int:
    """Write the page, completely or not at all; return its bytes.

    Raises:
        OdcftError: it cannot be written.
    """
    content = render(page).encode("utf-8", "backslashreplace")
    try:
        with files.new_folder(out.parent), files.atomic_file(out) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise OdcftError(f"{out} cannot be written: {error.strerror or error}. Choose another --out.") from None
    return len(content)


def refuse_page(out: Path, overwrite: bool) -> None:
    """Refuse a place for a page that cannot be written, holds another file, or an earlier report (if not `overwrite`).

    Raises:
        OdcftError: says which.
    """
    if out.suffix not in (".html", ".htm"):
        raise OdcftError(f"--out {out}: end the name with .html.")
    refuse_invalid_path(out)
    if out.is_symlink() or out.exists():
        if out.is_symlink() or not out.is_file() or not is_report(out):
            raise OdcftError(f"{out} was not written by odcft report, so it is not replaced. Choose another --out.")
        if not overwrite:
            raise OdcftError(f"{out} exists. Choose another --out, or pass --overwrite.")
    if why := why_unwritable(out):
        raise OdcftError(why)


def is_report(path: Path) -> bool:
    """Whether a file says of itself that it is a report."""
    return f'<meta name="generator" content="{GENERATOR}">'.encode() in _beginning(path)


def is_early_report(path: Path) -> bool:
    """Whether a file is a report that was written before its run had ended."""
    return is_report(path) and f'<meta name="{TRAINING}"'.encode() in _beginning(path)


def _beginning(path: Path) -> bytes:
    """The first bytes of a file; b"" if it is a link, or cannot be read."""
    try:
        if not path.is_file():
            return b""
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
            return file.read(MARK_WITHIN)
    except OSError:
        return b""

"""What `odcft inspect` says about a checkpoint."""

from typing import Any

from odcft.backbone.load import Loaded, first_few
from odcft.text import short_repr


def describe(loaded: Loaded) -> tuple[dict[str, Any], list[str]]:
    """Describe a loaded checkpoint: the fields of `odcft inspect --json`, and the lines it prints."""
    backbone, found, input = loaded.backbone, loaded.match, loaded.backbone.input
    expected = len(backbone.net.state_dict()) if found is None else found.expected
    values: dict[str, Any] = {
        "family": loaded.family,
        "arch": backbone.arch,
        "arch_args": backbone.arch_args,
        "input": input.dump(),
        "expected": expected,
        "matched": expected if found is None else len(found.tensors),
        "missing": [] if found is None else found.missing,
        "unexpected": [] if found is None else found.unexpected,
        "dropped": [] if found is None else found.dropped,
        "where": loaded.source if found is None else found.where,
        "notes": loaded.notes,
    }
    built = ", ".join(f"{key}={value}" for key, value in backbone.arch_args.items())
    lines = [
        (
            f"{loaded.family} · {backbone.arch}{f' ({built})' if built else ''} · {_COLORS[input.color]} {input.size}"
            f"{' only' if backbone.fixed_size else ''}, mean {_numbers(input.mean)}, std {_numbers(input.std)}, "
            f"{input.describe_view()}"
        ),
        f"  backbone   {values['matched']} of {expected} tensors "
        f"under {short_repr(values['where'], 200, quotes=False)}",
    ]
    for title, names in (
        ("missing", values["missing"]),
        ("left out", values["dropped"]),
        ("mismatched", values["unexpected"]),
        ("also found", [] if found is None else [other or "the file itself" for other in found.others]),
    ):
        if names:
            lines.append(f"  {title:<10} {first_few(names)}")
    lines += [f"  note       {note}" for note in loaded.notes]
    if loaded.not_finite:
        lines.append(
            "It cannot be fine-tuned, because weights that are not finite give no features. Use an earlier checkpoint."
        )
    return values, lines


_COLORS = {"rgb": "RGB", "bgr": "BGR", "gray": "gray", "lab_l": "lightness (Lab L)", "sobel": "Sobel of RGB"}


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{v:.4g}" for v in values)

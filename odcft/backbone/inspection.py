"""What `odcft inspect` says about a checkpoint."""

import shlex
from typing import Any

from odcft.backbone.input_resizing import USUAL_SIZE
from odcft.backbone.left_out_tensors import Group, left_out_groups
from odcft.backbone.load import Loaded, first_few
from odcft.backbone.network_stages import Stage, stages
from odcft.text import Branch, count_of, short_repr


def describe(loaded: Loaded) -> tuple[dict[str, Any], Branch]:
    """Describe a loaded checkpoint: the fields of `odcft inspect --json`, and what it draws."""
    backbone, found, input = loaded.backbone, loaded.match, loaded.backbone.input
    expected = len(backbone.net.state_dict()) if found is None else found.expected
    parts, groups = stages(backbone), [] if found is None else left_out_groups(found, loaded.parts)
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
        "features": backbone.width,
        "parameters": sum(parameter.numel() for parameter in backbone.net.parameters()),
        "stages": [vars(stage) for stage in parts],
        "parts": [vars(part) for part in loaded.parts],
        "why": loaded.why,
        "left_out": {group.name: {"count": len(group.members), "why": group.why} for group in groups},
    }
    return values, _drawing(loaded, values, parts, groups)


def _drawing(loaded: Loaded, values: dict[str, Any], parts: list[Stage], groups: list[Group]) -> Branch:
    """The answer for a person: what the file is, the network, what was left out, and what odcft will feed it."""
    backbone, found, input = loaded.backbone, loaded.match, loaded.backbone.input
    built = ", ".join(f"{key}={value}" for key, value in backbone.arch_args.items())
    where = short_repr(values["where"], 200, quotes=False)
    root = Branch(
        f"{loaded.family} · {backbone.arch}{f' ({built})' if built else ''} · {_COLORS[input.color]} {input.size}"
        f"{_other_sizes(loaded)}"
    )
    network = root.add(f"{'backbone':<10} {values['matched']} of {values['expected']} tensors under {where}")
    for stage in parts:
        network.add(str(stage))
    network.add(f"all of it · {values['parameters']:,} parameters · {backbone.width:,} features an image")
    for title, names in (("missing", values["missing"]), ("mismatched", values["unexpected"])):
        if names:
            root.add(f"{title:<10} {first_few(names)}")
    if len(loaded.parts) > 1:
        _add_parts(root, loaded)
    if groups:
        left_out = root.add(f"{'left out':<10} {_counts(found)}")
        for group in groups:
            left_out.add(f"{group.name} ({group.why}): {first_few(group.members)}")
    seen = root.add(
        f"{'input':<10} {_COLORS[input.color]}, values 0..{input.range:g}, mean {_numbers(input.mean)}, "
        f"std {_numbers(input.std)}, {input.describe_view()}"
    )
    if backbone.fixed_size and backbone.size > USUAL_SIZE and _takes_other_sizes(loaded):
        seen.add(f"fine-tuning shows it {USUAL_SIZE} pixels or fewer, unless --set data.size says otherwise")
    for note in loaded.notes:
        root.add(f"{'note':<10} {note}")
    return root


def _other_sizes(loaded: Loaded) -> str:
    """What to say behind the size of the images a network was made for."""
    backbone = loaded.backbone
    if not backbone.fixed_size:
        return ""
    if _takes_other_sizes(loaded):
        return f", or any multiple of {backbone.size_step}"
    return " only"


def _takes_other_sizes(loaded: Loaded) -> bool:
    """Whether timm can resample a network of fixed size: those that it can have a method for it."""
    return callable(getattr(loaded.backbone.net, "set_input_size", None))


def _add_parts(root: Branch, loaded: Loaded) -> None:
    """The complete backbones in the file: which one is taken and why, and how to take another."""
    taken, *others = loaded.parts
    several = root.add(f"{'backbones':<10} {len(loaded.parts)} complete ones in this file")
    several.add(f"{short_repr(taken.where, 200, quotes=False)} is taken: {loaded.why}")
    for part in others[:8]:
        where = short_repr(part.where, 200, quotes=False)
        several.add(
            f"{where} holds the same tensors"
            if part.same
            else f"{where} is another: take it with --part {shlex.quote(where)}"
        )


def _counts(found: Any) -> str:
    counts = ((len(found.dropped), "tensor"), (len(found.others), "other state dict"))
    return " and ".join(count_of(count, what) for count, what in counts if count)


_COLORS = {"rgb": "RGB", "bgr": "BGR", "gray": "gray", "lab_l": "lightness (Lab L)", "sobel": "Sobel of RGB"}


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{v:.4g}" for v in values)

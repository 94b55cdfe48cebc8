"""Write timm_index.json: how many tensors each of timm's networks has, fingerprints of some, and sums of all shapes.

    python tools/index_timm.py            (takes about ten minutes; run it again for every new version of timm)

The fingerprints are of the four tensors that the fewest other networks have, and of the first convolution, whatever its
number of channels. Networks with the same tensors share one entry, under the name that is in `COMMON`, or else the
shortest. Tensors that depend on the input size are left out. Last in an entry is what odcft/backbone/structure_index.py
keeps of the shapes of all tensors, then the names of networks that have the same tensors and compute something else.
Networks that share an entry but for tensors that depend on the input size have an entry with only this.
"""

import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
from torch import nn

from odcft.backbone.architecture_recognition import COMMON_ARCHITECTURES, fingerprint, without_input_channels
from odcft.backbone.structure_index import summary

OUT = Path(__file__).parent.parent / "odcft" / "backbone" / "timm_index.json"
WITH_THE_INPUT = ("pos_embed", "relative_position", "attn_mask", "rope", "rel_pos", "num_batches_tracked")


# Attributes that follow from the size of the images, or matter for the first weights or the classifier only.
WITH_THE_SIZE = (
    *("grid_size", "num_patches", "feature_size", "feat_size", "feat_shape", "input_resolution", "output_resolution"),
    *("img_size", "num_relative_distance", "init_values", "distillation"),
)
# Those of windows: they show in a table of positions, but not in SwinV2.
OF_WINDOWS = (
    *("window_size", "window_area", "shift_size", "target_shift_size", "bias_shape", "partition_size"),
    *("pretrained_window_size", "always_partition"),
)


def computation(net: nn.Module, but: tuple[str, ...] = WITH_THE_SIZE) -> str:
    """What a network computes besides its tensors: classes, numbers and names of functions in its modules.

    Args:
        net: the network.
        but: names of attributes that do not count.
    """
    told = []
    for module in net.modules():
        for key, value in sorted(vars(module).items()):
            if callable(value):
                value = getattr(value, "__name__", type(value).__name__)
            if (
                key[0] != "_"
                and key not in but
                and not key.endswith("_cfg")
                and isinstance(value, int | float | str | tuple | None)
            ):
                told.append((type(module).__name__, key, value))
    return repr(told)


def fingerprints(net: nn.Module) -> tuple[int, list[int], list[int]]:
    """The number of tensors of a network, and fingerprints: those of its first convolutions, and of its other tensors.

    Tensors that depend on the input size have none.
    """
    first = net.pretrained_cfg.get("first_conv") or ()
    firsts = tuple(f"{conv}." for conv in ((first,) if isinstance(first, str) else first))
    tensors = net.state_dict()
    kept = [n for n in tensors if not n.startswith(firsts) and not any(word in n for word in WITH_THE_INPUT)]
    return (
        len(tensors),
        [
            fingerprint(n, without_input_channels(t.shape))
            for n, t in tensors.items()
            if n.startswith(firsts) and t.ndim == 4
        ],
        [fingerprint(n, tensors[n].shape) for n in kept],
    )


def main() -> None:
    """Build all networks on the meta device, count their fingerprints, and write the index."""
    warnings.filterwarnings("ignore")
    found: dict[str, tuple[int, list[int], list[int]]] = {}
    same: dict[tuple[int, frozenset[int], str], str] = {}
    same_tensors: dict[tuple[tuple[str, tuple[int, ...]], ...], str] = {}
    computations: dict[str, str] = {}
    structures: dict[str, list[int | str]] = {}
    for name in sorted(sys.argv[1:] or timm.list_models(), key=lambda n: (n not in COMMON_ARCHITECTURES, len(n), n)):
        try:
            with torch.device("meta"):
                net = timm.create_model(name, pretrained=False, num_classes=0)
            count, firsts, prints = fingerprints(net)
        except Exception as error:  # some need other packages or network access
            print(f"{name} left out: {error!r:.100}", file=sys.stderr)
            continue
        tensors = net.state_dict()
        twin = same_tensors.setdefault(tuple((key, tuple(one.shape)) for key, one in tensors.items()), name)
        if twin != name:
            if computation(net) != computations[twin]:
                structures[twin].append(name)
            continue
        computations[name], structures[name] = computation(net), list(summary(tensors))
        alike = count, frozenset(firsts + prints), computation(net, WITH_THE_SIZE + OF_WINDOWS)
        if same.setdefault(alike, name) == name:
            found[name] = count, firsts, prints
    how_many = Counter(one for _, _, prints in found.values() for one in set(prints))
    index: dict[str, list[int | list[int | str]]] = {name: [own] for name, own in sorted(structures.items())}
    for name, (count, firsts, prints) in found.items():
        rarest = sorted(dict.fromkeys(prints), key=lambda one: how_many[one])[:4]
        index[name] = [count, *firsts[:1], *rarest, structures[name]]
    lines = ",\n".join(f'"{name}": {json.dumps(entry)}' for name, entry in index.items())
    OUT.write_text(f"{{\n{lines}\n}}\n")
    print(f"{len(index)} networks in {OUT}")


if __name__ == "__main__":
    main()

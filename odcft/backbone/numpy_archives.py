"""Read `.npz` archives of numpy arrays, as JAX code writes them, without unpickling anything."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odcft.errors import OdcftError
from odcft.text import short_repr

MAX_ARRAYS = 30_000
_KINDS = "fiub"  # of numpy's dtypes: floating point, signed and unsigned integers, booleans


def is_npz(names: list[str]) -> bool:
    """Whether a zip archive of these files holds numpy's arrays and nothing of torch's."""
    return bool(names) and all(name.endswith(".npy") for name in names)


def load_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an archive by name, with dots for slashes; arrays of other kinds than numbers are left out.

    Raises:
        OdcftError: the archive is damaged, or an array in it claims to be larger than it is.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_ARRAYS:
                raise OdcftError(f"{path} holds {len(members):,} arrays, far more than any network.")
            for member in members:
                with archive.open(member) as file:
                    array = _read_array(file, member.file_size)
                if array is not None:
                    name = member.filename.removesuffix(".npy").replace("/", ".")
                    tensors[name] = torch.from_numpy(array)
    except (ValueError, TypeError, KeyError, EOFError, OSError, zipfile.BadZipFile, RuntimeError) as error:
        reason = short_repr(str(error), 100, quotes=False)
        raise OdcftError(f"{path} is a damaged archive of arrays ({reason}). Copy or download it again.") from None
    return tensors


def _read_array(file: Any, size: int) -> np.ndarray | None:
    """One array of a stream of `size` bytes; None if it does not hold plain numbers.

    Raises:
        ValueError: it is not an array of numpy's, or not as large as its header says.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read_header(file)
    # numpy knows no bfloat16, so JAX's arrays of it are two bytes that mean nothing (void).
    is_bfloat16 = dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None and dtype.subdtype is None
    if dtype.hasobject or (dtype.kind not in _KINDS and not is_bfloat16) or dtype.itemsize > 8:
        return None
    count = 1
    for side in shape:
        count *= int(side)
    if count < 0 or count * dtype.itemsize > size:
        raise ValueError(f"an array of shape {shape} in {size:,} bytes")
    data = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
    if is_bfloat16:
        flat = torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    else:
        flat = data.astype(dtype.newbyteorder("="))
    return flat.reshape(shape, order="F" if by_column else "C").copy()

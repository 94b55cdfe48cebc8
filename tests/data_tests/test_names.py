"""Names in one array of bytes behave like a list of strings, and cost loader processes nothing."""

import copy
import multiprocessing
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from odcft.data import names as module
from odcft.data.names import Names

ODD = ["a", "", "caf\u00e9 \U0001f600", "\udcff\udcfe.png", "a\nb", "x" * 1000]


@pytest.mark.parametrize("piece", [1, 2, 1 << 16])
def test_names_are_like_a_list(monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    names = Names(iter(ODD))
    assert list(names) == ODD
    assert names == ODD
    assert names != [*ODD[:-1], "y"]
    assert names != ODD[:-1]
    assert [names[i] for i in range(-6, 6)] == [ODD[i] for i in range(-6, 6)]
    assert names[1:5:2] == ODD[1:5:2]
    assert names[::-1] == ODD[::-1]
    assert names.take(np.array([3, 3, 0])) == [ODD[3], ODD[3], ODD[0]]
    assert names.take(np.array([], np.int64)) == Names() == []
    assert names.rows_of(["a\nb", "nowhere", "a"]) == {"a\nb": 4, "a": 0}
    assert "" in names
    assert "b" not in names
    assert 3 not in names
    with pytest.raises(IndexError):
        names[6]


def test_equality_with_names_is_of_the_strings():
    assert Names(["ab", "c"]) != Names(["a", "bc"])
    assert Names(["ab", "c"]) == Names(["ab", "c"])
    assert Names(["ab"]) != "ab"


def test_copies_are_equal():
    assert copy.deepcopy(Names(ODD)) == ODD


def test_a_process_that_is_spawned_gets_a_handle_not_the_names():
    names = Names(f"image-{i:07d}.jpg" for i in range(50_000))
    assert len(ForkingPickler.dumps(names)) < 2000


@pytest.mark.slow
def test_a_spawned_process_reads_the_names():
    names = Names(f"image-{i:07d}.jpg" for i in range(50_000))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_last, (names,)) == "image-0049999.jpg"


def _last(names):
    return names[-1]


@pytest.mark.parametrize("ends", [[1, 3], [0, 2], [0, 4, 3], [0, -1, 3], []])
def test_offsets_out_of_order_are_refused(ends):
    with pytest.raises(ValueError, match=r"out of order|wrong types"):
        Names.of_arrays(np.zeros(3, np.uint8), np.array(ends, np.int64))
    with pytest.raises(ValueError, match="wrong types"):
        Names.of_arrays(np.zeros(3, np.int8), np.array([0, 3]))

"""The names of the protocols."""

import pytest

from odcft.errors import OdcftError
from odcft.evaluation.protocols import check_protocols


def test_unknown_protocols_are_refused():
    with pytest.raises(OdcftError, match="choose from svm, low-shot, linear, knn, clusters"):
        check_protocols("svm,nmi")
    assert check_protocols(" knn ,svm") == ["knn", "svm"]

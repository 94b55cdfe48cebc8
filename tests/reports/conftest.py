"""What the tests of reports share: runs, and charts that are not drawn, because drawing takes most of the time."""

import pytest
from written_runs import write_run


@pytest.fixture
def make_run():
    """`write_run`, for tests that take what they need by name."""
    return write_run


@pytest.fixture
def drawn():
    """Asks for charts that are drawn."""


@pytest.fixture(autouse=True)
def not_drawn(request, monkeypatch):
    """Charts are empty, unless a test is slow anyway or asks for `drawn`."""
    if "drawn" not in request.fixturenames and not request.node.get_closest_marker("slow"):
        from odcft.reports import charts

        monkeypatch.setattr(charts, "as_svg", lambda *args: "<svg></svg>")
        monkeypatch.setattr(charts, "layout", lambda centroids_KD: (centroids_KD[:, :2], "a test"))

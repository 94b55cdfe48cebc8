"""odcft keeps to itself: nothing it does opens a connection, except for weights that are asked for by name."""

import socket

import pytest

TINY = ["--recipe", "small", "--epochs", "1", "--set", "optim.batch_size=4", "--set", "data.size=32"]


@pytest.fixture
def connections(monkeypatch):
    """The addresses that somebody tried to reach: none can be."""
    tried = []

    def refuse(kind):
        def call(*args, **kwargs):
            tried.append((kind, args))
            raise OSError("no network here")

        return call

    monkeypatch.setattr(socket.socket, "connect", refuse("connect"))
    monkeypatch.setattr(socket.socket, "connect_ex", refuse("connect"))
    monkeypatch.setattr(socket.socket, "sendto", refuse("sendto"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse("look up"))
    monkeypatch.setattr(socket, "gethostbyname", refuse("look up"))
    return tried


def test_the_fixture_sees_what_libraries_do(connections):
    from urllib.error import URLError
    from urllib.request import urlopen

    with pytest.raises(URLError):
        urlopen("http://example.org", timeout=1)
    assert connections


@pytest.mark.slow
def test_no_command_uses_the_network(odcft_command, tmp_path, make_checkpoint, make_images, connections, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    checkpoint, images = make_checkpoint(tmp_path / "c.pth"), make_images(tmp_path / "images")
    run = tmp_path / "run"
    for command in (
        ["recipes", "small"],
        ["inspect", checkpoint],
        ["check-data", images],
        ["finetune", checkpoint, images, "--out", run, *TINY],
        ["finetune", "scratch:test_resnet", images, "--out", tmp_path / "scratch", *TINY, "--dry-run"],
        ["evaluate", run, images, "--protocol", "knn", "--size", "32"],
        ["embed", run, images, "--out", tmp_path / "features.npz"],
        ["export", run, tmp_path / "exported"],
    ):
        code, _, err = odcft_command(*command)
        assert code == 0, err
        assert not connections, f"odcft {command[0]} tried to reach {connections}"

"""Without the hub: nothing waits for retries, and what is missing is told with what to give."""

import socket

import pytest
from huggingface_hub import constants

from tokencredit import hub
from tokencredit.lm.load import load_config, load_tokenizer
from tokencredit.tasks import load


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A hub whose port nobody listens on, and an empty cache."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv(hub.OFFLINE, raising=False)
        hub.reachable.cache_clear()
        yield tmp_path
    hub.reachable.cache_clear()


def test_a_model_that_is_not_in_the_cache(nowhere):
    told = rf"the model some/model is not in the cache \({nowhere}\).*name a directory .*HF_HOME"
    warned = pytest.warns(UserWarning, match=r"cannot be reached .*only what is in the cache")
    with warned, pytest.raises(ValueError, match=told):
        load_config("some/model")
    assert constants.HF_HUB_OFFLINE, "whatever comes next does not wait either"
    with pytest.raises(ValueError, match=told):
        load_tokenizer("some/model")


def test_gsm8k_by_its_hub_name(nowhere):
    told = r"openai/gsm8k is not in the cache .*--option path=DIRECTORY.*HF_HOME"
    with pytest.warns(UserWarning, match="cannot be reached"), pytest.raises(RuntimeError, match=told):
        load("gsm8k").rows("train")


def test_a_hub_that_answers(monkeypatch):
    """Whatever it answers, 404 too."""
    import http.server
    import threading

    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.reachable.cache_clear()
    try:
        assert hub.reachable() and not constants.HF_HUB_OFFLINE
    finally:
        hub.reachable.cache_clear()
        server.shutdown()
        server.server_close()

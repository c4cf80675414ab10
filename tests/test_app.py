"""The page, served for real and asked through Gradio's own client."""

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from app import build


@pytest.fixture
def address(tiny):
    page = build(tiny)
    _, url, _ = page.launch(
        server_name="127.0.0.1", server_port=None, prevent_thread_lock=True, quiet=True, ssr_mode=False, show_error=False
    )
    yield url
    page.close()


def test_the_page_draws_and_names_mistakes(address):
    client = Client(address, verbose=False)
    with Image.open(client.predict("a star", 3, 64, api_name="/draw")) as first:
        assert first.size == (64, 64)
        pixels = first.tobytes()
    with Image.open(client.predict("a star", 3, 64, api_name="/draw")) as again:
        assert again.tobytes() == pixels
    with pytest.raises(AppError, match="prompt is empty"):
        client.predict("", 3, 64, api_name="/draw")

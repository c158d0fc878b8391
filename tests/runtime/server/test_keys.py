"""With an API key, only the page and the health checks are open."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from offcut.runtime.server.settings import ServeSettings

KEY = "correct-horse"


@pytest.fixture(scope="module")
def server_with_key(start_server: Any) -> Iterator[Any]:
    with start_server(ServeSettings(api_key=KEY, steps=2)) as running:
        yield running


def test_the_page_and_health_checks_need_no_key(server_with_key: Any) -> None:
    for path in ("/", "/page.js", "/page.css", "/v2/health/live", "/v2/health/ready"):
        assert server_with_key.get(path).status_code == 200


@pytest.mark.parametrize("key", [None, "wrong", KEY + "x", KEY[:-1], "Basic " + KEY])
def test_other_paths_need_the_key(server_with_key: Any, key: str | None, caplog: pytest.LogCaptureFixture) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    with caplog.at_level(logging.DEBUG):
        replies = [
            *(
                server_with_key.get(path, headers=headers)
                for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing")
            ),
            server_with_key.post({"prompt": "a"}, headers=headers),
            server_with_key.post({"prompt": "a"}, headers={"authorization": f"Basic {KEY}"}),
        ]
    for reply in replies:
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert KEY not in reply.text
    messages = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert not any(KEY in message for message in messages)


def test_the_right_key_is_accepted(server_with_key: Any) -> None:
    client = openai.OpenAI(base_url=f"{server_with_key.url}/v1", api_key=KEY, max_retries=0)
    assert client.models.list().data[0].id == "tiny"
    assert client.images.generate(prompt="a").data
    assert server_with_key.get("/metrics", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server_with_key.url}/v1", api_key="other", max_retries=0).images.generate(prompt="a")

"""OpenAI's embeddings API, asked by OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

TEXTS = ["The cat sat on the mat.", "Stocks fell. " * 60]


@pytest.fixture
def client(tiny_server: Live) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_embedding_is_the_mean_of_the_last_hidden_states_of_length_1(client, tiny):
    answer = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    for item, text in zip(answer.data, TEXTS, strict=True):
        hidden = tiny.model.hidden(mx.array([tiny.encode(text)]))[0]
        expected = np.array(hidden.mean(axis=0))
        expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(item.embedding, expected, rtol=1e-3, atol=1e-5)
    assert [item.index for item in answer.data] == [0, 1]
    assert answer.usage.prompt_tokens == sum(len(tiny.encode(text)) for text in TEXTS)


def test_base64_holds_the_same_numbers(client):
    # The client asks for base64 by itself, and decodes it.
    packed = client.embeddings.create(model="tiny", input=TEXTS[0]).data[0].embedding
    plain = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float")
    np.testing.assert_allclose(packed, plain.data[0].embedding, rtol=1e-6)
    raw = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="base64")
    assert isinstance(raw.data[0].embedding, str)


@pytest.mark.parametrize("ids", [[5, 6], [[5, 6]], [[5, 6], [7]]])
def test_ids_that_may_be_of_another_tokenizer_are_refused(client, ids):
    import openai

    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length") as refused:
        client.embeddings.create(model="tiny", input=ids)
    assert refused.value.param == "input"


def test_ids_are_read_as_text_is_where_they_are_allowed(client, tiny, tiny_server, monkeypatch):
    monkeypatch.setattr(tiny_server.service, "embedding_ids", True)
    ids = [tiny.encode(text) for text in TEXTS]
    many = client.embeddings.create(model="tiny", input=ids, encoding_format="float").data
    text = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float").data
    one = client.embeddings.create(model="tiny", input=ids[0], encoding_format="float").data
    for found, expected in zip([*many, *one], [*text, text[0]], strict=True):
        np.testing.assert_allclose(found.embedding, expected.embedding, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_honoured_is_refused_by_name(client):
    import openai

    for options in ({"input": ""}, {"input": []}, {"dimensions": 8}, {"encoding_format": "int8"}):
        with pytest.raises(openai.BadRequestError, match=next(iter(options))):
            client.embeddings.create(model="tiny", input="a", extra_body=options)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="ada", input="a")

"""Tokenizers: text to token ids and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import MissingTemplateError, TokenizerError
from .backend import load_backend, looks_special
from .chat_template import BUILTIN, Template
from .decode import StreamDecoder, piece_decoder
from .encode import TypedTextEncoder
from .message_text import MessageText, PromptText
from .messages import prepare_messages
from .python_tools import TOKEN as TOOL_TOKEN
from .python_tools import with_python_tools
from .thinking import ThinkingForm, thinking_form
from .tokenizer_files import NAMED, TokenizerFiles, refusing

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from ..model_cards import Card


T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """A model's tokenizer; made by `load_tokenizer`.

    `backend` is the `tokenizers.Tokenizer` that encodes. `bos_id` is None where there is no such
    token, and `adds_bos` says whether the model expects it in front; generation ends at any of
    `eos_ids`. `template` is None where the folder has no chat template.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        adds_bos: bool = False,
        eos_ids: Iterable[int] = (),
        template: Template | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.adds_bos = adds_bos
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.template = template
        self._piece_bytes, self._drops_space = piece_decoder(backend)
        self._added = backend.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        self._message_texts: dict[str, MessageText] = {}
        self._thinking: dict[str, ThinkingForm | None] = {}
        self._vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self._beyond: dict[int, str] = {}
        """Tokens by id that the model does not know."""

    def limit_to(self, rows: int) -> None:
        """Refuse text with tokens beyond a model's embedding of `rows`.

        TokenizerError where these are more than tokens that were added later.
        """
        used = {*self.backend.get_vocab().values(), self.bos_id or 0} - self._added.keys()
        if max(used, default=0) >= rows or (self.adds_bos and (self.bos_id or 0) >= rows):
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} tokens and the model {rows}; are its files "
                "those of another model?"
            )
        self._beyond = {i: token.content for i, token in self._added.items() if i >= rows}
        self.eos_ids = tuple(i for i in self.eos_ids if i < rows)
        self._vocab_size = min(self._vocab_size, rows)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Names and ids of the tokens that text leaves out or that end a reply."""
        ends = {*self.eos_ids, self.bos_id}
        return {
            token.content: token_id
            for token_id, token in self._added.items()
            if token.special or token_id in ends
        }

    @property
    def vocab_size(self) -> int:
        """The highest id that the model knows + 1, added tokens included; a model's own may be
        padded further."""
        return self._vocab_size

    def encode(self, text: str | PromptText, add_bos: bool = True) -> list[int]:
        """The token ids of `text`, in which special tokens are recognized where not `typed`.

        If the model expects bos, exactly one leads: none is added to text that begins with it.
        """
        prompt = PromptText(text) if isinstance(text, str) else text
        try:
            prompt.text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text must be valid Unicode, found half a surrogate pair at {error.start}; "
                "decode the bytes it came from as UTF-8"
            ) from None
        with refusing("the tokenizer", "cannot encode this text"):
            if prompt.typed:
                ids = self._typed_text_encoder.encode(prompt.text, [at for at, _ in prompt.typed])
            else:
                ids = self.backend.encode(prompt.text, add_special_tokens=False).ids
        if self._beyond and (unknown := next((i for i in ids if i in self._beyond), None)):
            raise TokenizerError(
                f"the text has the token {self._beyond[unknown]!r}, which the model does not know: "
                f"its number is {unknown} and the model has {self._vocab_size}; leave it out"
            )
        if add_bos and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(skip_special)
        text = "".join([stream.add(token_id) for token_id in ids])
        return text + stream.finish()

    def stream(
        self,
        skip_special: bool = True,
        continues: bool = False,
        marks: Mapping[int, str] | None = None,
    ) -> StreamDecoder:
        """A decoder for one id at a time; its pieces joined equal `decode` of all ids.

        With `continues`, other text comes before them, so that a space may come first. `marks` are
        put in front of the text of tokens.
        """
        drops_space = self._drops_space and not continues
        return StreamDecoder(partial(self._token_bytes, skip_special), drops_space, marks)

    def render(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> PromptText:
        """The conversation, and the tools it may call, formatted by the model's template.

        `variables` are more that the template uses, such as `enable_thinking`. The names of special
        tokens in messages stay ordinary text when it is encoded.
        """
        template = self.template
        if template is None:
            raise MissingTemplateError(
                "the model's folder has no chat template; add a chat_template.jinja to it"
            )
        messages = prepare_messages(messages)  # here, so that names in JSON text are found as well
        if self.calls_in_python:
            messages, tools = with_python_tools(messages, tools), None
        return self._message_text.render(
            lambda messages, tools: template.render(
                messages, add_generation_prompt, tools, variables
            ),
            messages,
            tools,
        )

    def chat_text(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of `render`."""
        return self.render(messages, add_generation_prompt, tools).text

    def chat_ids(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The conversation as token ids: what `render` gives, encoded with one bos."""
        return self.encode(self.render(messages, add_generation_prompt, tools))

    def typed(self, text: str) -> PromptText:
        """The beginning or the whole of a reply, in which special tokens are not recognized."""
        return self._message_text.typed(text)

    @property
    def thinking(self) -> ThinkingForm | None:
        """How the model marks its thoughts; None: it writes none."""
        source = self.template.source if self.template else ""
        if source not in self._thinking:
            tokens = {token.content: token_id for token_id, token in self._added.items()}
            self._thinking = {source: thinking_form(self.template, tokens)}
        return self._thinking[source]

    @property
    def takes_tools(self) -> bool:
        """Whether the prompt can tell of tools: the template does, or the system message."""
        return self.calls_in_python or (self.template is not None and self.template.takes_tools)

    @property
    def calls_in_python(self) -> bool:
        """Whether the model was trained to call functions in Python and its template has no place
        for them, so that the system message tells of them."""
        names = (token.content for token in self._added.values())
        return self.template is not None and not self.template.takes_tools and TOOL_TOKEN in names

    @property
    def _message_text(self) -> MessageText:
        source = self.template.source if self.template else ""
        if source not in self._message_texts:
            others = [token.content for token in self._added.values() if not token.special]
            marks = [name for name in others if name in source and looks_special(name)]
            # A switch such as MiniCPM5's /no_think is there to be typed.
            special = [name for name in self.special_tokens if not re.fullmatch(r"/\w+", name)]
            self._message_texts = {source: MessageText(special, marks)}
        return self._message_texts[source]

    @cached_property
    def _typed_text_encoder(self) -> TypedTextEncoder:
        return TypedTextEncoder(self.backend, self.special_tokens)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token; for a special token, its name."""
        return self._token_bytes(False, token_id)

    def _token_bytes(self, skip_special: bool, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return b"" if skip_special and added.special else added.content.encode()
        if token_id not in self._bytes:
            self._bytes[token_id] = self._piece_bytes(self._piece(token_id))
        return self._bytes[token_id]

    def _piece(self, token_id: int) -> str:
        try:
            piece = self.backend.id_to_token(token_id)
        except (OverflowError, TypeError):  # not a 32-bit unsigned number
            piece = None
        if piece is None:
            raise TokenizerError(
                f"token ids must be in the vocabulary, 0 to {self.vocab_size - 1}, "
                f"found {token_id!r}; is this tokenizer the model's own?"
            )
        return piece


def load_tokenizer(folder: str | Path, *, eos: Sequence[int] | None = None) -> Tokenizer:
    """The tokenizer of a model folder, from tokenizer.json, else tokenizer.model.

    `eos` replaces the end tokens that the folder's files name. Raises TokenizerError for files
    that are missing, corrupt or contradict each other.

        >>> load_tokenizer("MiniCPM-2B-dpo-bf16").encode("<用户>")
        [1, 1786, 4194, 95388]
    """
    files = TokenizerFiles(Path(folder))
    backend = load_backend(files)
    bos_token, eos_token = files.token("bos_token"), files.token("eos_token")
    leading = _leading_special(backend)
    bos_ids = _ids_of(backend, bos_token) + leading + files.ids("bos_token_id")
    eos_ids = files.ids("eos_token_id") + _ids_of(backend, eos_token)
    if not eos_ids:  # a bare tokenizer file; without an end token generation would never stop
        eos_ids = [i for i in map(backend.token_to_id, _USUAL_EOS) if i is not None]

    bos_id = bos_ids[0] if bos_ids else None
    adds_bos = leading == [bos_id] if files.adds_bos is None else files.adds_bos
    if adds_bos and bos_id is None:
        raise files.wrong("bos_token", "named, as add_bos_token is true", None)
    source = files.chat_template or _builtin_template(files, backend)
    bos_text = bos_token or _text_of(backend, bos_ids)
    eos_text = eos_token or _text_of(backend, eos_ids)
    others: dict[str, str | list[str]] = {
        "unk_token": getattr(backend.model, "unk_token", None) or "",
        **{key: token for key in NAMED[2:] if (token := files.token(key))},
        "additional_special_tokens": files.additional_tokens,
    }
    return Tokenizer(
        backend,
        bos_id=bos_id,
        adds_bos=adds_bos,
        eos_ids=eos_ids if eos is None else eos,
        template=Template(source, bos_text, eos_text, others) if source else None,
    )


_USUAL_EOS = ("</s>", "<|im_end|>")


def _leading_special(backend: Backend) -> list[int]:
    """The special token that the tokenizer's own post-processor puts in front, if any."""
    with refusing("the tokenizer", "cannot encode"):
        encoding = backend.encode("a")
    return encoding.ids[:1] if encoding.special_tokens_mask[:1] == [1] else []


def _ids_of(backend: Backend, token: str | None) -> list[int]:
    """The id of a token that a config names, as a list of at most one."""
    if token is None:
        return []
    with refusing("the tokenizer", "cannot look up bos_token and eos_token"):
        token_id = backend.token_to_id(token)
    if token_id is None:
        raise TokenizerError(
            f"bos_token and eos_token must be in the tokenizer's vocabulary, found {token!r}; "
            "download the model's tokenizer files again"
        )
    return [token_id]


def _text_of(backend: Backend, ids: Sequence[int]) -> str:
    """The first id's token; "" if there is none."""
    added = backend.get_added_tokens_decoder()
    if ids and ids[0] in added:  # id_to_token normalizes them
        return added[ids[0]].content
    return (backend.id_to_token(ids[0]) if ids else None) or ""


def _builtin_template(files: TokenizerFiles, backend: Backend) -> str | None:
    """The family's own template for a folder without one, chosen by its vocabulary."""
    in_family = files.is_minicpm
    if in_family is None:
        user = backend.encode("<用户>", add_special_tokens=False).tokens
        in_family = user == ["▁<", "用户", ">"]
    if not in_family:
        return None
    return BUILTIN["minicpm" if backend.token_to_id("<|im_start|>") is None else "chatml"]


def tokenizer_of(card: Card, folder: Path, rows: int | None = None) -> Tokenizer:
    """The tokenizer in `folder`, with the card's end tokens and template, if it has them.

    `rows` of the model's embedding: see `limit_to`.
    """
    tokenizer = load_tokenizer(folder, eos=card.eos or None)
    if card.template is not None:
        tokenizer.template = Template(BUILTIN[card.template])
    if rows is not None:
        try:
            tokenizer.limit_to(rows)
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from None
    return tokenizer

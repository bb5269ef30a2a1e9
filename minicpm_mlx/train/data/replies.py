"""Encodes a reply after its prompt, as the model would generate it: thoughts, text and calls.

A prompt is that of `chat_prompt`, as at inference, and what is taught must be read back there as
the row has it. If a token of the whole
text would span the end of the prompt (MiniCPM's `<AI>` and a reply that begins with `<`), the
prompt keeps its ids and the reply is encoded on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import DataError, InvalidArgumentError, TemplateError
from ...text.chat_prompt import ChatPrompt, chat_prompt
from ...text.message_text import PromptText
from ...text.thinking import Phase, ThinkingForm, ThoughtReader
from ...text.tokenizer import Tokenizer
from ...text.tools import describe_tools
from .examples import TemplateOptions
from .messages import Message
from .read_back import ReplyReader


@dataclass(frozen=True, slots=True)
class EncodedReply:
    """A prompt and the reply to it."""

    prompt: list[int]
    reply: list[int]
    learned: list[bool]
    """Whether each token of the reply is learned."""
    names: frozenset[str]
    """Names of special tokens that are ordinary text."""


class ReplyEncoder:
    """Encodes replies with the model's own chat template and the `options` of their conversation.

    `learns_thoughts`: whether thoughts are learned beside answers and calls.
    """

    def __init__(
        self, tokenizer: Tokenizer, options: TemplateOptions, *, learns_thoughts: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.learns_thoughts = learns_thoughts
        self._reader: ReplyReader | None = None

    def encode(self, messages: list[Message], *, is_good: bool = True) -> EncodedReply:
        """The last message as a reply to those before it.

        DataError where the template leaves out a part of it, or where a reply that `is_good` would
        be read back otherwise; TemplateError where the template cannot render the messages.
        """
        chat = self._prompt(messages[:-1])
        messages = [_with_thought(message, chat.thinking) for message in messages]
        prompt, prompt_text = chat.ids, chat.text
        reply_text = self._reply_text(messages, chat)
        ids = self.tokenizer.encode(prompt_text + reply_text)
        reply = ids[len(prompt) :]
        if ids[: len(prompt)] != prompt:
            reply = encode_continuation(self.tokenizer, reply_text)
        reply = self._until_end(reply)
        if is_good:
            self._check_read_back(chat, reply, messages[-1])
        return EncodedReply(
            prompt, reply, self._learned(chat, reply), prompt_text.names | reply_text.names
        )

    def _prompt(self, messages: list[Message]) -> ChatPrompt:
        tools, variables = self.options.tools, self.options.variables
        try:
            return chat_prompt(self.tokenizer, messages, tools=tools, variables=variables)
        except InvalidArgumentError as error:
            place = "tools" if error.field == "tools" else "chat_template_kwargs.enable_thinking"
            raise DataError(f"{place}: {error.problem}") from None

    def _render(self, messages: list[Message]) -> PromptText:
        """The messages with the last reply as a past one."""
        form, variables = self.tokenizer.thinking, dict(self.options.variables)
        if form and not form.has_switch:
            variables.pop("enable_thinking", None)  # the prompt has what it says
        tools = describe_tools(self.options.tools)
        return self.tokenizer.render(messages, False, tools or None, variables)

    def _check_read_back(self, chat: ChatPrompt, reply: list[int], message: Message) -> None:
        form = chat.thinking
        marks = (form.opening, form.closing) if form else ()
        has_marks = any(mark in message["content"] for mark in marks)
        if self.options.tools or has_marks or "reasoning_content" in message:
            self._reader = self._reader or ReplyReader(self.tokenizer, self.options.tools)
            self._reader.check(chat, reply, message)

    def _reply_text(self, messages: list[Message], chat: ChatPrompt) -> PromptText:
        whole, last, prompt_text = self._render(messages), messages[-1], chat.text
        self._check_calls(messages, whole)
        form, thought = chat.thinking, last.get("reasoning_content", "")
        is_open = chat.in_thought
        start = _start_of_thought(prompt_text.text, form)
        if thought and start is not None and not is_open:
            raise DataError(
                "reasoning_content: expected no thought, as the prompt ends with an empty one, "
                "found one; set enable_thinking to true, or remove the thought"
            )
        begins_thought = False
        if whole.text.startswith(prompt_text.text):
            reply, begins_thought = whole.since(len(prompt_text.text)), is_open
        elif start is not None and whole.text.startswith(prompt_text.text[:start]):
            reply = whole.since(start)
            if is_open and form and reply.text.startswith(form.opening):
                written = reply.text.removeprefix(form.opening).lstrip()
                reply, begins_thought = reply.since(len(reply.text) - len(written)), True
        elif "tool_calls" in last:
            raise DataError(
                "tool_calls: expected a template that writes them after its own prompt, found one "
                "that begins past replies in another way; use a model that was trained with tools"
            )
        else:
            # A template may write a past turn without the start that its generation prompt adds.
            reply = self.tokenizer.typed(last["content"])
        if thought and not self._is_read(messages, whole, -1, "reasoning_content"):
            # MiniCPM4.1's marks thoughts only in prompts, and the model writes them itself.
            return self._thought(thought, form, is_open) + reply
        if is_open and form and not begins_thought:
            return PromptText(f"\n{form.closing}\n\n") + reply
        return reply

    def _thought(self, thought: str, form: ThinkingForm | None, is_open: bool) -> PromptText:
        if form is None:
            raise DataError(
                "reasoning_content: expected a chat template with a place for thoughts, found one "
                "without; remove the thoughts, or use a model that thinks"
            )
        opening = PromptText("" if is_open else f"{form.opening}\n")
        text = self.tokenizer.typed(thought.strip("\n"))
        return opening + text + PromptText(f"\n{form.closing}\n\n")

    def _check_calls(self, messages: list[Message], whole: PromptText) -> None:
        """DataError if the template leaves out the last calls, or the text beside them."""
        index = max((i for i, m in enumerate(messages) if "tool_calls" in m), default=None)
        if index is None:
            return
        if not self._is_read(messages, whole, index, "tool_calls"):
            raise DataError(
                "tool_calls: expected a chat template with a place for calls, found one without; "
                "remove such samples, or use a model that was trained with tools"
            )
        has_text = bool(messages[index]["content"].strip())
        if has_text and not self._is_read(messages, whole, index, "content"):
            raise DataError(
                "content: expected none beside tool_calls, as the chat template leaves it out, "
                "found some; remove it, or write it into reasoning_content"
            )

    def _is_read(self, messages: list[Message], whole: PromptText, index: int, field: str) -> bool:
        """Whether the template uses a field of a message."""
        changed = list(messages)
        changed[index] = {**messages[index], field: [] if field == "tool_calls" else ""}
        try:
            return self._render(changed).text != whole.text
        except TemplateError:
            return True

    def _until_end(self, reply: list[int]) -> list[int]:
        """Strips the blanks that a template writes after its end mark."""
        ends = [i for i, token in enumerate(reply) if token in self.tokenizer.eos_ids]
        if ends and not self.tokenizer.decode(reply[ends[-1] + 1 :], skip_special=False).strip():
            return reply[: ends[-1] + 1]
        return reply

    def _learned(self, chat: ChatPrompt, reply: list[int]) -> list[bool]:
        form = chat.thinking
        if self.learns_thoughts or form is None:
            return [True] * len(reply)
        reader = ThoughtReader(form, is_open=chat.in_thought)
        stream = self.tokenizer.stream(skip_special=False)
        learned: list[bool] = []
        for token in reply:
            before = reader.phase
            text = stream.add(token)
            if is_mark := reader.is_mark(token):
                reader.mark(token)
            else:
                reader.add(text)
            if before is Phase.START and reader.phase is Phase.THINKING:
                learned = [False] * len(learned)  # the opening mark, where it is text
            learned.append(not is_mark and Phase.THINKING not in (before, reader.phase))
        return learned


def encode_continuation(tokenizer: Tokenizer, text: PromptText, *before: str) -> list[int]:
    """Encodes `text` as the continuation of a text that it does not merge with; `before` is tried
    first as that text."""
    for anchor in (*before, *_ANCHORS):
        ids = tokenizer.encode(anchor, add_bos=False)
        both = tokenizer.encode(PromptText(anchor) + text, add_bos=False)
        if both[: len(ids)] == ids:
            return both[len(ids) :]
    return tokenizer.encode(text, add_bos=False)  # at worst with a space before it


_ANCHORS = ("x", "。", "\n", ".", " ", "0", "\n\n", "Q:")
"""Texts to continue; the first whose last token does not merge with the continuation is used."""


def _with_thought(message: Message, form: ThinkingForm | None) -> Message:
    """A message whose content begins with a thought between the model's marks, with it apart.

    DataError if it has another thought too.
    """
    text = message["content"].lstrip()
    if message["role"] != "assistant" or form is None or not text.startswith(form.opening):
        return message
    thought, closing, answer = text.removeprefix(form.opening).partition(form.closing)
    if not closing:
        return message
    if message.get("reasoning_content", thought).strip() != thought.strip():
        raise DataError(
            "reasoning_content: expected the thought that the content begins with, found another; "
            "remove one"
        )
    parts = {"reasoning_content": thought.strip()} if thought.strip() else {}
    return message | {"content": answer.lstrip()} | parts


def _start_of_thought(prompt: str, form: ThinkingForm | None) -> int | None:
    """Where the marks of a thought begin that `prompt` ends with; None if it ends with none."""
    start = prompt.rfind(form.opening) if form else -1
    if form is None or start < 0:
        return None
    rest = prompt[start:].replace(form.opening, "").replace(form.closing, "")
    return None if rest.strip() else start

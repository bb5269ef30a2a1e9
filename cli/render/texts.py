"""What the chat says, in English and in Chinese."""

from __future__ import annotations

import locale
import os

LANGUAGES = ("en", "zh")

TEXTS = {
    "tips": (
        "/help lists commands · /exit or Ctrl-D leaves · Ctrl-C stops · Alt-Enter: new line",
        "/help 列出命令 · /exit 或 Ctrl-D 退出 · Ctrl-C 停止 · Alt-Enter 换行",
    ),
    "waiting": ("⋯ {seconds} s", "⋯ {seconds} 秒"),
    "loading": ("the model is still loading …", "模型仍在加载 …"),
    "bounded": (
        "the conversation may have {context} tokens: memory has room for no more",
        "内存所限，对话最多 {context} 个词元",
    ),
    "stopped": ("stopped", "已停止"),
    "leave": ("Ctrl-C once more leaves", "再按一次 Ctrl-C 退出"),
    "speed": ("{speed:.1f} tok/s", "{speed:.1f} 词元/秒"),
    "first": ("first after {seconds:.2f} s", "首个 {seconds:.2f} 秒"),
    "context": ("context {used}/{all}", "上下文 {used}/{all}"),
    "memory": ("{gb:.1f} GB", "{gb:.1f} GB"),
    "cut": (
        "cut off at {limit} tokens (/set max_tokens)",
        "达到 {limit} 个词元上限，已截断（/set max_tokens）",
    ),
    "full": (
        "the context is full: /undo, /new or /set on_overflow slide",
        "上下文已满：可用 /undo、/new 或 /set on_overflow slide",
    ),
    "full_slides": ("the context is full: /undo or /new", "上下文已满：可用 /undo 或 /new"),
    "alone": (
        "this message alone has {count} tokens, and there is room for {room}",
        "仅这条消息就有 {count} 个词元，而空间只有 {room} 个",
    ),
    "drop": ("/attach off drops the files that wait", "/attach off 可去掉待发的文件"),
    "filled": (
        "cut off: the context is full; the oldest turns make room for the next one",
        "上下文已满，已截断；下一轮会让最早的对话让出空间",
    ),
    "slid": (
        "the {count} oldest messages no longer fit and are not shown to the model",
        "最早的 {count} 条消息放不下，模型已看不到",
    ),
    "cleared": ("conversation cleared", "对话已清空"),
    "new": ("a new conversation", "新的对话"),
    "saved": ("saved as {name}", "已保存为 {name}"),
    "exported": ("written to {path}", "已写入 {path}"),
    "exists": (
        "{name} exists already; /save -f {typed} replaces it",
        "{name} 已存在；/save -f {typed} 会覆盖它",
    ),
    "document": (
        "{name}: a document is FILE.md; a session's name has no such ending",
        "{name}：文档应为 FILE.md；会话名不能有这样的后缀",
    ),
    "elsewhere": (
        "{name} was changed elsewhere meanwhile; this conversation goes on as {new}",
        "{name} 已在别处被修改；本对话改存为 {new}",
    ),
    "unsaved": ("not saved: {error}", "未保存：{error}"),
    "resumed": ("{name}: {messages}", "{name}：{messages}"),
    "rereads": ("it is read again at the next turn", "下一轮会重新读取全部内容"),
    "other": (
        "so far it was held with {model}; this one reads it again at the next turn",
        "此前使用的模型是 {model}；现在的模型会在下一轮重新读取",
    ),
    "none": ("no saved sessions yet", "还没有保存的会话"),
    "undone": ("taken back: {text}", "已撤回：{text}"),
    "copied": ("copied", "已复制"),
    "nothing": ("there is no reply yet", "还没有回复"),
    "no_turn": ("there is no turn yet", "还没有对话"),
    "more": ("… and {count} more", "… 另有 {count} 个"),
    "attached": (
        "{name}: {tokens}, goes with your next message",
        "{name}：{tokens}，随下一条消息发送",
    ),
    "no_files": (
        "no file waits for your next message; /attach FILE",
        "没有待发的文件；可用 /attach FILE",
    ),
    "dropped": ("no file goes with your next message", "下一条消息不附文件"),
    "waits": ("{name} waits already; not attached again", "{name} 已在待发；未重复附上"),
    "empty": ("{path}: an empty file; not attached", "{path}：空文件；未附上"),
    "too_long": (
        "{path} does not fit: some {count} tokens, and there is room for {room}; not attached",
        "{path} 放不下：约 {count} 个词元，只剩 {room} 个的空间；未附上",
    ),
    "binary": ("{path}: not a text file in UTF-8", "{path}：不是 UTF-8 文本文件"),
    "no_file": ("{path}: not a file", "{path}：不是文件"),
    "failed": ("{path}: {reason}", "{path}：{reason}"),
    "system": ("system text: {text}", "系统提示：{text}"),
    "no_system": ("no system text", "没有系统提示"),
    "adapter": ("adapter: {path}", "适配器：{path}"),
    "no_adapter": ("no adapter", "没有适配器"),
    "no_longer": ("its adapter cannot be put on: {error}", "它的适配器无法使用：{error}"),
    "set": ("{name} = {value}", "{name} = {value}"),
    "no_setting": ("no setting {name}; there are {names}", "没有设置 {name}；可用：{names}"),
    "whole": ("{name} must be a whole number, got {value}", "{name} 应为整数，而不是 {value}"),
    "number": ("{name} must be a number, got {value}", "{name} 应为数字，而不是 {value}"),
    "model": ("now {model}", "当前模型：{model}"),
    "unknown": ("no command {name}; /help lists them", "没有命令 {name}；/help 列出全部"),
    "usage": ("usage: {usage}", "用法：{usage}"),
    "absent": (
        "{model} is not on this disk. It is a download of {gb} GB, once.",
        "{model} 还不在本机上。需要下载 {gb} GB，只需一次。",
    ),
    "offer": (
        "[d] download it, [t] try the demo model instead (small, not MiniCPM), [q] quit: ",
        "[d] 下载，[t] 先试用 demo 模型（很小，不是 MiniCPM），[q] 退出：",
    ),
    "total": (
        "{turns}, {tokens}, {speed:.1f} tok/s on average, {each:.1f} tokens a pass",
        "{turns}，{tokens}，平均 {speed:.1f} 词元/秒，每次前向 {each:.1f} 个词元",
    ),
    "cache": ("cache: {used}, {mb:.0f} MB{bits}", "缓存：{used}，{mb:.0f} MB{bits}"),
    "in_bits": (
        ", in {bits} bits (on the demo: perplexity {loss}, {share} % of 16 bits)",
        "，{bits} 位（demo 实测：困惑度 {loss}，占 16 位的 {share} %）",
    ),
}

COUNTED = {
    "message": ("message", "messages", "条消息"),
    "reply": ("reply", "replies", "次回复"),
    "token": ("token", "tokens", "个词元"),
}
"""One, several, and in Chinese."""


class Texts:
    """Looks texts up in one language."""

    def __init__(self, language: str | None = None) -> None:
        self.language = language or of_locale()

    def __call__(self, key: str, **values: object) -> str:
        return TEXTS[key][LANGUAGES.index(self.language)].format(**values)

    def some(self, thing: str, count: int) -> str:
        """So many of them: "1 reply", "2 replies"."""
        one, several, chinese = COUNTED[thing]
        return f"{count} {self.pick(one if count == 1 else several, chinese)}"

    def pick(self, english: str, chinese: str) -> str:
        return chinese if self.language == "zh" and chinese else english


def of_locale() -> str:
    """The language the environment asks for."""
    asked = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG")
    return "zh" if (asked or locale.getlocale()[0] or "").lower().startswith("zh") else "en"
